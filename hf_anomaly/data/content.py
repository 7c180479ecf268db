"""The content of images, byte for byte, whether they are embedded in a dataset or in files beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import datasets
    import pyarrow


def content_digest(dataset: datasets.Dataset) -> str:
    """SHA-256, in hex, over the content of every image of a dataset's column `image`, in order, wherever it lies."""
    digest = hashlib.sha256()
    for data, path in _encoded(dataset):
        digest.update(_digest(data, path))
    return digest.hexdigest()


def find_copies(among: datasets.Dataset, *others: datasets.Dataset) -> list[list[int]]:
    """For each of the other datasets, the indices of its images that are byte for byte also in `among`. Images whose length is only on one side are not
    read."""
    theirs, *ours = ([(_length(*image), *image) for image in _encoded(images)] for images in (among, *others))
    shared = {length for length, *_ in theirs} & {length for images in ours for length, *_ in images}
    digests = {_digest(*image) for length, *image in theirs if length in shared}
    return [[i for i, (length, *image) in enumerate(images) if length in shared and _digest(*image) in digests] for images in ours]


def files_fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256, in hex, over path, size and time of every image file: of images that are not embedded a dataset's own fingerprint covers the path alone."""
    digest = hashlib.sha256()
    for path in paths_beside(dataset):
        stat = _stat(path)
        digest.update(f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def paths_beside(dataset: datasets.Dataset, column: str = "image") -> Iterator[str]:
    """The paths of the images that are not embedded."""
    return (path for data, path in _encoded(dataset, column) if data is None and path is not None)


def paths_of(dataset: datasets.Dataset, column: str = "image") -> Iterator[str | None]:
    """The path of every image, of which embedded ones may have none."""
    return (path for _, path in _encoded(dataset, column))


def _encoded(dataset: datasets.Dataset, column: str = "image") -> Iterator[tuple[pyarrow.Buffer | None, str | None]]:
    """Bytes and path of every image, of which one may be missing. Embedded bytes are not copied."""
    import datasets
    import pyarrow.compute

    undecoded = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    for batch in undecoded.select_columns(column).with_format("arrow").iter(batch_size=1000):
        data, paths = (pyarrow.compute.struct_field(batch[column], name) for name in ("bytes", "path"))
        yield from ((value.as_buffer(), path.as_py()) for value, path in zip(data, paths, strict=True))


def _length(data: pyarrow.Buffer | None, path: str | None) -> int:
    return _stat(path).st_size if data is None else data.size


def _digest(data: pyarrow.Buffer | None, path: str | None) -> bytes:
    return hashlib.sha256(read_image_file(path) if data is None else data).digest()


def read_image_file(path: str) -> bytes:
    """The content of an image file.

    Raises:
        InputError: there is none.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _missing(path, error) from error


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise _missing(path, error) from error


def _missing(path: str, error: OSError) -> InputError:
    return InputError(f"{path}: no image to be had there ({error.strerror}); restore the file or leave out its row")
