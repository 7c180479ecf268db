"""Datasets made of arrays and of files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import check_name

if TYPE_CHECKING:
    import datasets

ARROW_BYTES = 2**30  # in one array of files: its offsets are 32-bit


def from_arrays(images: np.ndarray, labels: np.ndarray | None, label_feature: Any = None) -> datasets.Dataset:
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


def uint8_images(images: np.ndarray, where: str) -> np.ndarray:
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


def from_files(paths: list[Path], labels: list[str | None], masks: list[Path | None] | None = None) -> datasets.Dataset:
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
