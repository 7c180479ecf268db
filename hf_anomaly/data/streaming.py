"""One-class splits of a source that is larger than memory: read row by row, but for a head of it that calibrates and is compared with."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..errors import InputError, one_line
from .content import read_image_file
from .formats import Reading
from .loading import OneClassSplits, channels_and_sizes, check_images, class_asked_for, image_column_of, label_column_of
from .protocols import Division
from .sources import (
    UnknownClassError,
    all_evaluated,
    as_images,
    by_our_names,
    class_name,
    default_normal_class,
    plain_splits,
    read_source,
    with_bytes,
)

if TYPE_CHECKING:
    import datasets

LOOKED_AT = 100  # rows read for a normal one of the head, or for a label, before it is given up


def stream_one_class(
    source: str | os.PathLike[str] | Mapping[str, datasets.IterableDataset],
    *,
    normal_label: int | str | None = None,
    classes: Mapping[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    calibration_fraction: float = 0.2,
    head: int = 1000,
    shuffle_buffer: int = 1000,
    max_train_images: int | None = None,
    eval_split: str = "test",
    evaluation_only: bool = False,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    reading: Reading = Reading(),
    recipe: str | None = None,
) -> OneClassSplits:
    """As `load_one_class` with protocol "official", but `train` and `test` are streams, which are never in memory as a whole.

    The first `head` normals of the training split are read at once. Ordered by a seeded hash of their content, the first of them, a share
    `calibration_fraction`, calibrate; the others are `reference`, which detectors compare with. Images of a calibration image's content do not train,
    wherever they come in the stream, in whatever order and number of workers it is read; all other normals do.

    Args:
        source: what `load_one_class` takes (of which parquet and Hub datasets are read as streams all the way), or split name → stream.
        head: normals read at once; they are kept in memory, encoded. The memory bank is no larger.
        shuffle_buffer: rows among which the next one is drawn in training; they are kept in memory, encoded.
        max_train_images: only so many of the first normals train, and are compared with.
        The others are as in `load_one_class`; a split called "calibration" is not used.

    Returns:
        `train` and `test` are `datasets.IterableDataset`s with the columns `image` and `label`, `train` shuffled anew in every epoch. `num_channels`,
        `native_size` and `largest_size` are of the head, `split_hash` of its contents, and with `evaluation_only` of those of the first rows of `test`.
        `test_missing_reason` cannot tell whether `test` has both classes.

    Raises:
        InputError: as `load_one_class`; no normals among the first 100 · `head` rows.
    """
    if not 0 <= calibration_fraction < 1:
        raise InputError(f"calibration_fraction={calibration_fraction} is outside [0, 1); 0.2 holds out a fifth of the head")
    if head < 2 or shuffle_buffer < 1 or (max_train_images is not None and max_train_images < 1):
        raise InputError("head must be at least 2, shuffle_buffer and max_train_images at least 1")
    if not isinstance(source, Mapping | str | os.PathLike):
        raise InputError(
            f"a stream comes by the name of its split, as {{'train': stream}}, or from a name, not from {type(source).__name__}"
        )
    name = "a stream" if isinstance(source, Mapping) else os.fspath(source)
    raw = (
        plain_splits(source)
        if isinstance(source, Mapping)
        else read_source(name, label_column, config_name, revision, image_column=image_column, reading=reading, streaming=True)
    )
    splits = by_our_names(raw)
    splits = all_evaluated(name, splits, eval_split) if evaluation_only else splits
    needed = eval_split if evaluation_only else "train"
    if needed not in splits:
        raise InputError(f"{name!r} has no split {needed!r}; its splits: {', '.join(raw)}")
    splits = {ours: _stream(split) for ours, split in splits.items() if ours in ("train", eval_split)}
    column = label_column_of(name, splits, label_column)
    columns = {ours: column if column in split.features else None for ours, split in splits.items()}
    if columns.get(eval_split) is not None and not _has_labels(name, splits[eval_split], column):
        columns[eval_split] = None
    image_column = image_column or image_column_of(splits[needed])
    normal_label = "normal" if column is None else _normal_class(name, splits, column, classes, normal_label)
    streams = {
        ours: _labelled(name, split, image_column, columns[ours], classes, normal_label)
        for ours, split in splits.items()
        if not (evaluation_only and ours == "train")
    }

    first = list(streams[eval_split].take(head)) if evaluation_only else _first_normals(name, streams["train"], head, normal_label)
    if not first:
        raise InputError(f"split {eval_split!r} of {name!r} is empty")
    keys = [content_key(row["image"], seed) for row in first]
    training = {"train": None, "calibration": None, "reference": None}
    if not evaluation_only:
        held_out = _held_out(name, keys, calibration_fraction) if calibration_fraction else set()
        training = _training_part(streams["train"], first, keys, held_out, max_train_images, shuffle_buffer, seed)
    headers = check_images(_in_memory(first), needed, reading.window)
    test, reason = streams.get(eval_split), None
    if test is None:
        reason = f"{name!r} has no split {eval_split!r}; its splits: {', '.join(raw)}"
    elif columns[eval_split] is None:
        test, reason = None, f"split {eval_split!r} of {name!r} has no labels"
        if evaluation_only:
            raise InputError(f"{reason} to evaluate against; give label_column or a labelled source")
    elif next(iter(test), None) is None:
        test, reason = None, f"split {eval_split!r} of {name!r} has no images of the classes that count"
    digest = hashlib.sha256(b"stream\n" + b"".join(sorted(key.to_bytes(8, "little") for key in keys)))
    return OneClassSplits(
        **training,
        test=test,
        test_missing_reason=reason,
        **channels_and_sizes(headers),
        source=name,
        division=Division(
            recipe=recipe,
            protocol="stream",
            seed=seed,
            normal_label=normal_label,
            classes=None if classes is None else dict(classes),
            contamination=0.0,
            max_train_images=max_train_images,
            split_hash=digest.hexdigest(),
            calibration_fraction=None if evaluation_only else calibration_fraction,
        ),
    )


def _first_normals(name: str, stream: datasets.IterableDataset, head: int, normal_label: str) -> list[dict[str, Any]]:
    """Raises InputError: there are hardly any among the first rows."""
    rows = itertools.islice(stream, LOOKED_AT * head)
    first = list(itertools.islice((row for row in rows if row["label"] == 0), head))
    if len(first) < 2:
        raise InputError(
            f"{name!r} has {len(first)} images of class {normal_label!r} among its first {LOOKED_AT * head}; give normal_label"
        )
    return first


def _training_part(
    stream: datasets.IterableDataset,
    first: list[dict[str, Any]],
    keys: list[int],
    held_out: set[int],
    max_train_images: int | None,
    shuffle_buffer: int,
    seed: int,
) -> dict[str, Any]:
    """What of `OneClassSplits` comes from the training stream, of which the first normals with their keys have been read."""
    train = stream.filter(partial(_trains, seed=seed, held_out=held_out), input_columns=["image", "label"])
    train = train if max_train_images is None else train.take(max_train_images)
    calibration = _in_memory(row for row, key in zip(first, keys, strict=True) if key in held_out)
    others = (row for row, key in zip(first, keys, strict=True) if key not in held_out)
    decisive = repr((sorted(held_out), max_train_images, shuffle_buffer))
    return {
        "train": train.shuffle(seed=seed, buffer_size=shuffle_buffer),
        "calibration": calibration if calibration else None,
        "reference": _in_memory(itertools.islice(others, max_train_images)),
        "stream_digest": hashlib.sha256(decisive.encode()).hexdigest(),
    }


def content_key(image: dict[str, Any], seed: int) -> int:
    """64 bits of a hash of an encoded image, embedded or in a file of its own; uniform, and the same wherever and whenever it is read."""
    content = image["bytes"] if image.get("bytes") is not None else read_image_file(image["path"]) if image.get("path") else b""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little")


def _held_out(name: str, keys: list[int], fraction: float) -> set[int]:
    """The contents that calibrate, the first of them by their key: so many that they make up the share of the images, or as near as copies let it be.

    Raises:
        InputError: all images are the same, so that none would be left to train on.
    """
    counts = Counter(keys)
    if len(counts) == 1:
        raise InputError(
            f"the first {len(keys)} normals of {name!r} are copies of one image, which cannot train and calibrate; take a larger head, or "
            "calibration_fraction=0"
        )
    wanted, held_out, size = round(fraction * len(keys)), set(), 0
    for key in sorted(counts):
        if len(held_out) < len(counts) - 1 and abs(size + counts[key] - wanted) < abs(size - wanted):
            held_out.add(key)
            size += counts[key]
    return held_out or {min(sorted(counts), key=counts.get)}


def _stream(split: datasets.Dataset | datasets.IterableDataset) -> datasets.IterableDataset:
    """As a stream that knows its columns."""
    import datasets
    import pyarrow

    if isinstance(split, datasets.Dataset):
        return split.to_iterable_dataset()
    try:
        return split if split.features is not None else split._resolve_features()
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"the stream has no features, and its rows do not tell them ({one_line(error)}): give them where it is made, or call decode(False) before map"
        ) from error


def _normal_class(
    name: str, splits: dict[str, datasets.IterableDataset], column: str, classes: Mapping[str, str] | None, asked: int | str | None
) -> str:
    """The name of the normal class: as asked for, or found among the names that the source declares, or else in its first 100 rows."""
    import datasets

    split = next(split for split in splits.values() if column in split.features)
    feature = split.features[column]
    seen = (
        feature.names
        if isinstance(feature, datasets.ClassLabel)
        else [class_name(row[column], feature) for row in split.select_columns([column]).take(LOOKED_AT)]
    )
    named = [label for label in seen if label is not None]  # a row without one is told of where it is read
    counted = list(dict.fromkeys(named if classes is None else [classes[label] for label in named if label in classes]))
    if asked is None:
        found = default_normal_class(name, counted, counted)
        if found is None:
            raise InputError(f"which class of {name!r} is normal? Give normal_label; classes found: {', '.join(map(repr, counted[:20]))}")
        return found
    found = asked if asked in counted else str(asked) if classes is not None else class_asked_for(asked, feature, counted)
    if isinstance(feature, datasets.ClassLabel) and found not in counted:
        raise UnknownClassError(
            f"normal_label={asked!r} is no label of {name!r}; its labels: {', '.join(map(repr, counted[:20]))}", counted
        )
    return found


def _has_labels(name: str, split: datasets.IterableDataset, column: str) -> bool:
    """Whether the first rows have labels.

    Raises:
        InputError: only some have.
    """
    names = [class_name(row[column], split.features[column]) for row in split.select_columns([column]).take(LOOKED_AT)]
    are_labelled = any(name is not None for name in names)
    if are_labelled and None in names:
        raise InputError(
            f"row {names.index(None)} (counted from 0) of the split of {name!r} to evaluate on has no label in column {column!r}; label or remove it"
        )
    return are_labelled


def _labelled(
    name: str, split: datasets.IterableDataset, image_column: str, column: str | None, classes: Mapping[str, str] | None, normal_label: str
) -> datasets.IterableDataset:
    """The stream with the columns `image`, encoded, and `label`, 0 or 1; without the images of classes that `classes` does not list."""
    if image_column not in split.features:
        raise InputError(f"the stream has no column {image_column!r}; its columns: {', '.join(split.features)}; give image_column")
    feature = None if column is None else split.features[column]
    split = split.decode(False)  # files of their own on the Hub are decoded before a cast would keep them from it
    split = split.select_columns([image_column] if column is None else [image_column, column])
    split = as_images(split, image_column, f"column {image_column!r} as images")
    if column is not None and classes is not None:
        split = split.filter(partial(_counts, feature=feature, classes=classes), input_columns=[column])
    label = partial(
        _label, name=name, image_column=image_column, column=column, feature=feature, classes=classes, normal_label=normal_label
    )
    return split.map(label, remove_columns=list(split.features), features=_features())


# What is done to each row: functions of this module, which can be sent to a worker process that was not forked.


def _counts(value: Any, feature: Any, classes: Mapping[str, str]) -> bool:
    return class_name(value, feature) in classes


def _label(
    row: dict[str, Any],
    name: str,
    image_column: str,
    column: str | None,
    feature: Any,
    classes: Mapping[str, str] | None,
    normal_label: str,
) -> dict[str, Any]:
    if row[image_column] is None:
        raise InputError(f"a row of the stream has no image in column {image_column!r}; remove it")
    if isinstance(row[image_column], PIL.Image.Image):  # encoded again it would be another
        raise InputError("the images of the stream are decoded, as filter and map leave them: call decode(False) on it before these")
    if column is None:
        return {"image": with_bytes(row[image_column], name), "label": 0}
    found = class_name(row[column], feature)
    if found is None:
        raise InputError(f"an image of the stream has no label in column {column!r}; label it or remove it")
    counted = found if classes is None else classes[found]
    return {"image": with_bytes(row[image_column], name), "label": int(counted != normal_label)}


def _trains(image: dict[str, Any], label: int, seed: int, held_out: Collection[int]) -> bool:
    return label == 0 and content_key(image, seed) not in held_out


def _in_memory(rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    features, rows = _features(), list(rows)
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _features() -> datasets.Features:
    """Of the columns of a stream, and of what is read of it at once."""
    import datasets

    return datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["normal", "anomaly"])})
