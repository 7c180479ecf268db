"""Any source of images as one-class splits: normals to train on, normals held out for calibration, and a labelled test split."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL.Image

from ..errors import InputError
from .transforms import open_image

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
T = TypeVar("T")

SPLIT_NAMES = {  # ours -> the names under which a source may have it, compared in lower case
    "train": ("train", "training"),
    "calibration": ("calibration",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
NORMAL_NAMES = ("normal", "good", "healthy")
MASK_FOLDERS = ("ground_truth", "groundtruth", "masks")  # pixel annotation, as MVTec AD lays it out: no images to score
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # where imagefolder finds further columns
GRAY_MODES = ("1", "L", "LA", "La")


@dataclass(frozen=True)
class OneClassSplits:
    """What `load_one_class` gives. Every dataset has exactly the columns `image` (`Image(decode=False)`), `label` (`ClassLabel`: 0 normal,
    1 anomaly) and `row` (int, the index in its source split); `train` and `calibration` hold normals only.

    Attributes:
        train: the normals to train on; None with `evaluation_only`.
        calibration: held-out normals, disjoint from `train`; None if `calibration_fraction` is 0 or with `evaluation_only`.
        test: the labelled split to evaluate on; None if there is none, or if it has no labels. With `evaluation_only` it is there.
        test_missing_reason: why `test` cannot give an AUROC (missing, no labels, no anomalies, no normals), one line; None if it can.
        num_channels: 1 if every normal of the source's training split (with `evaluation_only`: every image of `test`) is gray by its header
            (modes 1, L, LA), else 3 (palettes too).
        native_size: the larger side of the most common (height, width) among those images, in pixels.
        source: the `dataset_name` asked for.
        normal_label: the class taken as normal; "normal" if there are no labels.
        split_hash: SHA-256, in hex, over (split, source row, label) of every row of the datasets that are there: of `test` alone with
            `evaluation_only`.
    """

    train: datasets.Dataset | None
    calibration: datasets.Dataset | None
    test: datasets.Dataset | None
    test_missing_reason: str | None
    num_channels: int
    native_size: int
    source: str
    normal_label: str
    split_hash: str


def load_one_class(
    dataset_name: str | os.PathLike[str],
    *,
    normal_label: int | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    calibration_fraction: float = 0.2,
    eval_split: str = "test",
    evaluation_only: bool = False,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
) -> OneClassSplits:
    """Loads images as one-class splits.

    Args:
        dataset_name: one of
            "digits", scikit-learn's 8x8 digits, with a fixed stratified 20 % test split;
            an `.npz` file of MedMNIST's layout, `{train,val,test}_{images,labels}`: images (n, h, w[, 1 or 3]), uint8 or floats in [0, 1];
            a folder of images: `train/ test/ validation/` or none of them, in each class folders or nothing but (normal) images, or with an
            imagefolder's `metadata.csv`; mask folders such as MVTec AD's `ground_truth` are left out;
            a `.parquet` file (a training split, unless `evaluation_only`), or a folder of parquet files;
            the id of a dataset on the Hub.
        normal_label: name or index of the normal class; everything else is an anomaly. By default the class called normal, good or healthy,
            or the only class of the training split, or "0" of digits. A training split without labels is all normal.
        image_column: by default the first `Image` column.
        label_column: by default `label`, `labels`, or the only `ClassLabel` column.
        calibration_fraction: share of the training normals, in [0, 1), to hold out, unless the source has a split called "calibration".
        eval_split: "test" or "validation" (in the source also val, valid, dev): what becomes `test`.
        evaluation_only: load `test` alone. A training split then only tells the normal class; a labelled source of nothing but a training
            split, which is what a folder of class folders or a parquet file is, becomes `test` as a whole.
        seed: of the calibration draw.
        config_name, revision: of a dataset on the Hub.

    Raises:
        InputError: nothing readable under that name, a missing column, an undecided or absent normal class, rows without a label beside
            rows with one, an unreadable image or one of more than 8 bits a channel, too few normals to hold one out; with `evaluation_only` also
            no split to evaluate on, or one without labels.
    """
    source = os.fspath(dataset_name)
    if not 0 <= calibration_fraction < 1:
        raise InputError(f"calibration_fraction={calibration_fraction} is outside [0, 1); 0.2 holds out a fifth of the training normals")
    if eval_split not in ("test", "validation"):
        raise InputError(f"eval_split={eval_split!r} is neither 'test' nor 'validation'")

    raw = _read(source, label_column, config_name, revision)
    splits = _by_our_names(raw)
    if evaluation_only and splits.keys() == {"train"}:
        logger.warning("%r has no split %r: all of it is evaluated; the detector must not have been trained on it", source, eval_split)
        splits = {eval_split: splits["train"]}
    needed, remedy = (
        (eval_split, "choose with eval_split") if evaluation_only else ("train", "rename the one that holds the training images")
    )
    if needed not in splits:
        raise InputError(f"{source!r} has no split {needed!r}; its splits: {', '.join(raw)}; {remedy}")
    splits = {name: splits[name] for name in ("train", "calibration", eval_split) if name in splits}

    label_column = _label_column(source, splits, label_column)
    labels = {name: _labels(split, label_column, f"split {name!r} of {source!r}") for name, split in splits.items()}
    normal_label = _normal_class(source, splits, labels, label_column, normal_label)
    image_column = image_column or _image_column(splits[needed])
    wanted = [eval_split] if evaluation_only else list(splits)
    data = {name: _one_class(splits[name], image_column, labels[name], normal_label, name) for name in wanted}
    normals = {name: np.flatnonzero(np.asarray(split["label"][:]) == 0) for name, split in data.items()}
    headers = {}
    for name in [name for name in data if name != eval_split]:
        if not len(normals[name]):
            raise InputError(f"no image of split {name!r} of {source!r} is {normal_label!r}; {_counts(labels, name)}; give normal_label")
        if left_out := len(data[name]) - len(normals[name]):
            logger.info("%d anomalies of split %r of %r are left out", left_out, name, source)
        data[name] = data[name].select(normals[name])
        headers[name] = check_images(data[name], name)

    train, calibration = data.get("train"), data.get("calibration")
    if train is not None and calibration is None and calibration_fraction > 0:
        train, calibration = _hold_out(train, calibration_fraction, seed, source)

    test, reason = data.get(eval_split), None
    where = f"split {eval_split!r} of {source!r}"
    if test is None:
        reason = f"{source!r} has no split {eval_split!r}; its splits: {', '.join(raw)}"
    elif labels[eval_split] is None:
        test, reason = None, f"{where} has no labels"
        if evaluation_only:
            raise InputError(f"{reason} to evaluate against; give label_column or a labelled source")
    else:
        headers[eval_split] = check_images(test, eval_split)
        if not len(normals[eval_split]):
            reason = f"{where} holds no normals: no image labelled {normal_label!r}"
        elif len(normals[eval_split]) == len(test):
            reason = f"{where} holds no anomalies: every image is labelled {normal_label!r}"

    described = headers[needed]
    return OneClassSplits(
        train=train,
        calibration=calibration,
        test=test,
        test_missing_reason=reason,
        num_channels=1 if all(mode in GRAY_MODES for mode, _ in described) else 3,
        native_size=max(Counter(size for _, size in described).most_common(1)[0][0]),
        source=source,
        normal_label=normal_label,
        split_hash=_split_hash({"train": train, "calibration": calibration, "test": test}),
    )


def check_images(dataset: datasets.Dataset, split_name: str) -> list[tuple[str, tuple[int, int]]]:
    """Reads the header of every image, without decoding pixels.

    Args:
        dataset: with a column `image` as `Image(decode=False)`, and `row` if rows are to be named by their source.
        split_name: for messages.

    Returns:
        For every image its PIL mode and its (height, width) in pixels, before any EXIF rotation.

    Raises:
        InputError: an image is missing, unreadable, or has more than 8 bits a channel; names its path, or its row.
    """
    from tqdm.auto import tqdm

    rows = dataset["row"][:] if "row" in dataset.column_names else range(len(dataset))
    headers = []
    values = (value for batch in dataset.select_columns("image").iter(batch_size=256) for value in batch["image"])
    progress = tqdm(values, total=len(dataset), desc=f"Checking {split_name}", disable=len(dataset) <= 1000)
    for row, value in zip(rows, progress, strict=True):
        with open_image(value, f"row {row} of split {split_name!r}") as image:
            headers.append((image.mode, (image.height, image.width)))
    return headers


# Sources: each gives {split name: Dataset}, with the names and columns that the source has.


def _read(source: str, label_column: str | None, config_name: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
    import datasets

    path = Path(source).expanduser()
    local = source == "digits" or (source != "" and path.exists())  # Path("") is the working directory
    if local and (config_name or revision):
        raise InputError(f"{source!r} is local, and config_name and revision choose among a Hub dataset's versions; leave them out")
    if source == "digits":
        return _read_digits()
    if local and path.is_dir():
        return _read_folder(path, label_column)
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path)
    if path.is_file() and path.suffix == ".parquet":
        return {"train": _load(source, datasets.Dataset.from_parquet, str(path))}
    if path.is_file():
        raise InputError(f"{source!r}: not a kind of file to load images from; give an .npz or .parquet file, a folder or a Hub id")
    if path.suffix in (".npz", ".parquet", ".zip", ".csv") or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise InputError(f"{source!r} is neither an existing file or folder nor the id of a Hub dataset; check the spelling")
    return dict(
        _load(f"{source!r} is no local path, and as a Hub dataset it", datasets.load_dataset, source, config_name, revision=revision)
    )


def _load(what: str, load: Any, *args: Any, **options: Any) -> Any:
    """`load(*args, **options)`; whatever goes wrong in there (network, names, formats) becomes one line."""
    try:
        return load(*args, **options)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{what} cannot be loaded: {reason[:400]}") from error


def _read_digits() -> dict[str, datasets.Dataset]:
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0 … 16 to 0 … 255
    parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    label = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    return {name: _from_arrays(images[rows], digits.target[rows], label) for name, rows in zip(("train", "test"), parts, strict=True)}


def _from_arrays(images: np.ndarray, labels: np.ndarray | None, label_feature: Any = None) -> datasets.Dataset:
    """A dataset of uint8 images (n, h, w[, 3]), as PNG."""
    import datasets

    def png(pixels: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    features = {"image": datasets.Image(decode=False)}
    dataset = datasets.Dataset.from_dict({"image": [png(pixels) for pixels in images]}, features=datasets.Features(features))
    return dataset if labels is None else dataset.add_column("label", labels.tolist(), feature=label_feature)


def _read_npz(path: Path) -> dict[str, datasets.Dataset]:
    try:
        with np.load(path, allow_pickle=False) as archive:  # a pickled array could run code
            arrays = {name: archive[name] for name in archive.files if name.endswith(("_images", "_labels"))}
    except Exception as error:  # BadZipFile, ValueError (pickled arrays), AttributeError (a bare .npy) …
        raise InputError(f"{path}: not an .npz file of plain arrays ({' '.join(str(error).split())}); save it with numpy.savez") from error
    if not any(name.endswith("_images") for name in arrays):
        raise InputError(f"{path} has no array of images; name them <split>_images and <split>_labels, such as 'train_images'")
    splits = {}
    for key in (name for name in arrays if name.endswith("_images")):
        split = key.removesuffix("_images")
        images, labels = _uint8(arrays[key], f"{path}, array {key!r}"), arrays.get(f"{split}_labels")
        if labels is not None:
            labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
            if labels.shape != (len(images),):
                shape = tuple(arrays[f"{split}_labels"].shape)
                raise InputError(f"{path}, array '{split}_labels' has shape {shape}; ({len(images)},) or ({len(images)}, 1) is needed")
        splits[split] = _from_arrays(images, labels)
    return splits


def _uint8(images: np.ndarray, where: str) -> np.ndarray:
    """Images (n, h, w[, 1 or 3]), uint8 or floats in [0, 1], as uint8 (n, h, w[, 3])."""
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise InputError(f"{where} has shape {images.shape}; (n, h, w), (n, h, w, 1) or (n, h, w, 3) is needed")
    if images.dtype.kind == "f":
        axes = tuple(range(1, images.ndim))
        for bad, what in ((~np.isfinite(images), "NaN or infinite values"), ((images < 0) | (images > 1), "floats outside [0, 1]")):
            rows = np.flatnonzero(bad.any(axis=axes))
            if len(rows):
                raise InputError(f"{where}, row {rows[0]}: {what}; save uint8 images, or floats in [0, 1]")
        images = np.round(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise InputError(f"{where} is of type {images.dtype}; save uint8 images, or floats in [0, 1]")
    return images[..., 0] if images.shape[3:] == (1,) else images


def _read_folder(root: Path, label_column: str | None) -> dict[str, datasets.Dataset]:
    """Class folders are read here, not by imagefolder, which infers splits from file names too, and labels from the splits read so far."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")) and name.lower() not in MASK_FOLDERS)
        files += (Path(folder, name) for name in sorted(names) if not name.startswith("."))
    images = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS]
    if any(file.name in METADATA_FILES for file in files):
        splits = dict(_load(f"{root}", datasets.load_dataset, "imagefolder", data_dir=str(root)))
        if any(_label_columns(split, label_column) for split in splits.values()):
            return splits
    elif any(file.suffix == ".parquet" for file in files) and not images:
        return dict(_load(f"{root}", datasets.load_dataset, "parquet", data_dir=str(root)))
    if not images:
        raise InputError(f"{root} holds neither images nor parquet files; check the path")

    folders = {folder.name: folder for folder in root.iterdir() if folder.is_dir()}
    named = _by_our_names(folders)
    listed = {}
    for split, folder in (named or {"train": root}).items():
        paths = [path.relative_to(folder) for path in images if path.is_relative_to(folder)]
        if paths:
            listed[split] = (folder, paths, [path.parts[0] if len(path.parts) > 1 else None for path in paths])
    classes = {label for _, _, labels in listed.values() for label in labels if label is not None}
    for folder, paths, labels in listed.values():
        if None in labels and any(labels):
            raise InputError(f"{folder / paths[labels.index(None)]} lies beside class folders; move it into one of them")
        nested = next((path for path in paths if len(path.parts) > 2), None)
        if nested and len(classes) == 1 and min(classes).lower() not in NORMAL_NAMES:
            # Most likely the folder above the dataset's own: its anomalies would all be trained on as one class.
            inner = folder / nested.parts[0]
            raise InputError(f"{inner} is the only class folder and holds folders of its own; give {str(inner)!r} instead")
    image, label = datasets.Features({"image": datasets.Image(decode=False)}), datasets.Value("string")
    return {
        split: datasets.Dataset.from_dict(
            {"image": [str(folder / path) for path in paths]} | ({"label": labels} if any(labels) else {}),
            features=datasets.Features(image | ({"label": label} if any(labels) else {})),
        )
        for split, (folder, paths, labels) in listed.items()
    }


# Columns, labels, splits


def _by_our_names(splits: dict[str, T]) -> dict[str, T]:
    lower = {name.lower(): split for name, split in splits.items()}
    return {ours: lower[next(n for n in names if n in lower)] for ours, names in SPLIT_NAMES.items() if not lower.keys().isdisjoint(names)}


def _image_column(split: datasets.Dataset) -> str:
    import datasets

    images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
    return images[0] if images else "image"


def _label_columns(split: datasets.Dataset, label_column: str | None) -> list[str]:
    """The columns that may hold the labels, best first."""
    import datasets

    if label_column is not None:
        return [label_column] if label_column in split.column_names else []
    named = [name for name in ("label", "labels") if name in split.column_names]
    classes = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    return named or (classes if len(classes) == 1 else [])


def _label_column(source: str, splits: dict[str, datasets.Dataset], label_column: str | None) -> str | None:
    found = [column for split in splits.values() for column in _label_columns(split, label_column)]
    columns = next(iter(splits.values())).column_names
    if not found and label_column is not None:
        raise InputError(f"{source!r} has no column {label_column!r}; its columns: {', '.join(columns)}")
    if not found and len(columns) > 1:
        logger.warning("%s has no label column among %s: every image counts as normal; else give label_column", source, ", ".join(columns))
    return found[0] if found else None


def _class_name(value: Any, feature: Any) -> str | None:
    """The name of a class from its value in a column; None for a missing value, which a ClassLabel writes as -1."""
    import datasets

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.names[value] if 0 <= value < feature.num_classes else None
    if feature.dtype == "bool":
        return str(bool(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _labels(split: datasets.Dataset, column: str | None, where: str) -> list[str] | None:
    """The class name of every row; None if the split has no labels at all."""
    import datasets

    if column not in split.column_names:
        return None
    feature = split.features[column]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise InputError(f"column {column!r} of {where} holds {type(feature).__name__}, not one label an image; give another label_column")
    names = [_class_name(value, feature) for value in split[column][:]]
    if all(name is None for name in names):
        return None
    if None in names:
        raise InputError(f"row {names.index(None)} of {where} has no label in column {column!r}; label it or remove it")
    return names


def _counts(labels: dict[str, list[str] | None], *names: str) -> str:
    counts = Counter(label for name in names for label in labels[name] or ())
    listed = ", ".join(f"{label!r} ({count})" for label, count in counts.most_common(20))
    return f"its labels: {listed}{', …' if len(counts) > 20 else ''}" if counts else "it has no labels"


def _normal_class(
    source: str,
    splits: dict[str, datasets.Dataset],
    labels: dict[str, list[str] | None],
    column: str | None,
    normal_label: int | str | None,
) -> str:
    """The name of the normal class, as asked for or found."""
    seen = dict.fromkeys(label for names in labels.values() for label in names or ())
    if not seen:
        if normal_label is not None:
            columns = ", ".join(next(iter(splits.values())).column_names)
            raise InputError(
                f"normal_label={normal_label!r}, but {source!r} has no labels (columns: {columns}); give label_column or drop it"
            )
        return "normal"
    if normal_label is None and source == "digits":
        return "0"
    if normal_label is None:
        named = [label for label in seen if label.lower() in NORMAL_NAMES]
        in_train = set(labels.get("train") or ())
        if len(named) == 1 or (not named and len(in_train) == 1):
            return (named or list(in_train))[0]
        raise InputError(f"which class of {source!r} is normal? Give normal_label; {_counts(labels, *labels)}")
    if normal_label in seen:
        return normal_label
    feature = next(split.features[column] for name, split in splits.items() if labels[name])
    is_index = isinstance(normal_label, int) or normal_label.isdecimal()
    name = _class_name(int(normal_label), feature) if is_index else normal_label
    if name not in seen:
        raise InputError(f"normal_label={normal_label!r} is no label of {source!r}; {_counts(labels, *labels)}")
    return name


def _one_class(split: datasets.Dataset, image_column: str, labels: list[str] | None, normal_label: str, name: str) -> datasets.Dataset:
    """Columns `image`, `label` and `row` for all rows. Nothing is copied or decoded."""
    import datasets

    if image_column not in split.column_names:
        raise InputError(f"split {name!r} has no column {image_column!r}; its columns: {', '.join(split.column_names)}; give image_column")
    is_anomaly = [0] * len(split) if labels is None else [int(label != normal_label) for label in labels]
    images = split.select_columns([image_column])
    images = images if image_column == "image" else images.rename_column(image_column, "image")
    what = f"column {image_column!r} of split {name!r} as images"
    images = _load(what, images.cast_column, "image", datasets.Image(decode=False))
    images = images.add_column("label", is_anomaly, feature=datasets.ClassLabel(names=["normal", "anomaly"]))
    return images.add_column("row", range(len(split)), feature=datasets.Value("int64"))


def _hold_out(normals: datasets.Dataset, fraction: float, seed: int, source: str) -> Iterable[datasets.Dataset]:
    """(train, calibration), both in the source's order. scikit-learn draws from NumPy's frozen RandomState: the same rows everywhere."""
    from sklearn.model_selection import train_test_split

    if len(normals) < 2:
        raise InputError(f"{source!r} has a single normal training image, none to hold out; add images or set calibration_fraction=0")
    size = min(max(round(fraction * len(normals)), 1), len(normals) - 1)
    parts = train_test_split(np.arange(len(normals)), test_size=size, random_state=seed)
    return tuple(normals.select(np.sort(rows)) for rows in parts)


def _split_hash(splits: dict[str, datasets.Dataset | None]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        if split is not None:
            digest.update(f"{name} {len(split)}\n".encode())
            digest.update(np.asarray([split["row"][:], split["label"][:]], dtype="<i8").tobytes())
    return digest.hexdigest()
