"""Columns of images that are computed once and kept in files below the cache of datasets."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from ..files import canonical_json
from .content import files_fingerprint
from .transforms import process_images

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_FORMAT = 4  # raise it when what is stored changes: old cache files are then no longer found


def encode_levels(levels: np.ndarray) -> dict[str, bytes | None]:
    """An image of 8-bit levels (C, H, W), gray or RGB, as `datasets.Image` stores it: PPM, uncompressed, since PNG takes up to ten times as long to read."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(buffer, "PPM")
    return {"bytes": buffer.getvalue(), "path": None}


def shrink_images(
    dataset: datasets.Dataset, processor: Callable[..., Any], batch_size: int = 64, cache_dir: str | os.PathLike | None = None
) -> datasets.Dataset:
    """Every image as the processor resizes it, so that whoever reads it many times need not decode a large file each time.

    Args:
        dataset: with columns `image` and `row`, as `load_one_class` gives it.
        processor: an `AnomalyImageProcessor`; what it makes of the shrunk images is bit for bit what it makes of the images.
        batch_size: images at once.
        cache_dir: see `map_cached`.

    Returns:
        The dataset, its column `image` of 8-bit gray or RGB images.

    Raises:
        InputError: an image is missing or cannot be read; names it.
    """

    def shrink(batch: dict[str, list], _: list[int]) -> dict[str, list]:
        names = [f"row {row}" for row in batch["row"]]
        levels = process_images(batch["image"], names, processor, "np", do_rescale=False, do_normalize=False)  # of (C, H, W) uint8
        return {"image": [encode_levels(array) for array in levels]}

    key = {"processor": processor.to_dict()}
    return map_cached(dataset, shrink, name="shrunk", key=key, batch_size=batch_size, cache_dir=cache_dir, desc="Shrinking")


def map_cached(
    dataset: datasets.Dataset,
    function: Callable[[dict[str, list], list[int]], dict[str, list]],
    *,
    name: str,
    key: dict[str, Any],
    batch_size: int,
    cache_dir: str | os.PathLike | None,
    desc: str,
    columns: dict[str, Any] | None = None,
) -> datasets.Dataset:
    """`Dataset.map` whose result is found again by a fingerprint of `key`, the dataset and its image files, unless its file is cut off. A transform of the
    dataset is dropped.

    Args:
        dataset: with a column `image`, which `function` gets encoded: a broken file then has a name, and bytes that are kept stay as they were.
        function: of a batch's columns and the indices of its rows.
        name: what the cache's files begin with.
        key: what the result depends on beside the dataset.
        cache_dir: their folder; None is `hf_anomaly` under the cache of datasets.
        desc: beside the progress bar.
        columns: the features of new columns.
    """
    import datasets

    undecoded = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
    content = {"format": _FORMAT, "dataset": dataset._fingerprint, "files": files_fingerprint(undecoded), **key}
    fingerprint = hashlib.sha256(canonical_json(content)).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_anomaly" if cache_dir is None else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{fingerprint}.arrow"
    if file.is_file() and not _is_whole(file, len(dataset)):
        logger.warning("%s is damaged: what it should hold is computed anew", file)
        file.unlink()
    return undecoded.map(
        function,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        features=datasets.Features({**dataset.features, **(columns or {})}),
        cache_file_name=str(file),
        new_fingerprint=fingerprint,
        desc=desc,
    )


def _is_whole(file: Path, num_rows: int) -> bool:
    """Whether a file of the cache has so many rows. One that was not yet on the disk when the machine failed, or copied in part, is cut off."""
    import datasets
    import pyarrow

    try:
        return len(datasets.Dataset.from_file(str(file))) == num_rows
    except (pyarrow.ArrowInvalid, OSError):
        return False
