"""From a row of a dataset to the tensors a detector takes: decode, process, stack."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import DataLoader

from ..errors import InputError, one_line
from .formats import (
    FULL,
    SLICES,
    Window,
    check_depth,
    is_medical,
    is_white_zero,
    load_pixels,
    open_raster,
    read_slice,
    stored_values,
    to_eight_bits,
)

if TYPE_CHECKING:
    import datasets


_MAX_DECODED_PIXELS = 2**22  # of images held at once before they are resized: 64 of 256 px


def _name(value: Any, where: str) -> str:
    """What to call an image in an error: its file, else `where` and the file it was embedded from, if known."""
    path = value.get("path") if isinstance(value, dict) else None
    if path is None:
        return where
    return path if value.get("bytes") is None else f"{where} ({path})"


def file_name(value: Any, otherwise: str) -> str:
    """Where a person finds an image: its file with the folder above it, which is often its class; `otherwise` if it did not come from a file."""
    path = value.get("path") if isinstance(value, dict) else None
    if path is None:
        return otherwise
    parts = Path(path).parts
    return "/".join(parts[-1:] if parts[-4:-2] == SLICES else parts[-2:])


def _unreadable(value: Any, where: str, error: Exception) -> InputError:
    if isinstance(error, PIL.UnidentifiedImageError):  # whose own text names a memory address
        reason = "the file is empty" if _is_empty(value) else "unknown image format"
    else:
        reason = getattr(error, "strerror", None) or one_line(error)
    remedy = "remove it or replace it by an intact one"
    if isinstance(error, FileNotFoundError):
        remedy = "restore the file, or leave it out of the list that names it"
    elif isinstance(error, PermissionError):
        remedy = "change its permissions"
    elif isinstance(error, IsADirectoryError):
        remedy = "name the images in it"
    elif isinstance(error, PIL.Image.DecompressionBombError):
        remedy = "it is too large: shrink it or cut it up"
    return InputError(f"{_name(value, where)}: unreadable image ({reason}); {remedy}")


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not (Path(value["path"]).stat().st_size if value.get("bytes") is None else value["bytes"])


def open_image(value: dict[str, Any] | PIL.Image.Image | np.ndarray, where: str, window: Window = None) -> PIL.Image.Image:
    """Opens an image without decoding its pixels and refuses more than 8 bits a channel, unless there is a window. DICOM and NIfTI files are decoded.

    Args:
        value: `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it; a PIL image; or a uint8 array (H, W), (H, W, 1) or (H, W, 3).
        where: what to call the image in an error if it has no path, such as `"row 17 of split 'train'"`.
        window: see `Reading`.

    Raises:
        InputError: missing or unreadable image, array of another shape or type, or a 16-bit, 32-bit, float or signed image without a window.
    """
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or value.shape[2:] not in ((), (1,), (3,)):
            raise InputError(f"{where}: an array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), not {value.dtype} {value.shape}")
        return PIL.Image.fromarray(value[:, :, 0] if value.shape[2:] == (1,) else value)
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path") is not None and is_medical(value["path"]):
        return read_slice(value["path"], window)
    if isinstance(value, PIL.Image.Image):
        image = value
    elif isinstance(value, dict) and (value.get("bytes") is not None or value.get("path") is not None):
        try:
            image = open_raster(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else Path(value["path"]))
        except Exception as error:  # on broken files PIL's plugins raise OSError, SyntaxError, struct.error, DecompressionBombError …
            raise _unreadable(value, where, error) from error
    elif value is None or isinstance(value, dict):
        raise InputError(f"{where}: the image is missing; remove the row")
    else:  # such as a path
        raise InputError(f"{where}: a {type(value).__name__} is no image; make it one with cast_column('image', datasets.Image())")
    check_depth(image, _name(value, where), window)
    return image


def num_pages(image: PIL.Image.Image) -> int:
    """How many pages or frames an opened file has; 1 if what follows the first is broken, or is part of it, as in PSD and MPO."""
    with suppress(Exception):  # as in open_image
        if image.format in ("TIFF", "GIF", "WEBP", "PNG", "AVIF"):
            page = image.tell()
            try:
                return image.n_frames
            finally:
                image.seek(page)  # broken ones leave it where they are
    return 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image turned as its EXIF orientation says; itself, not a copy, if there is nothing to turn."""
    return image if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1 else PIL.ImageOps.exif_transpose(image)


def decode_image(value: dict[str, Any] | PIL.Image.Image | np.ndarray, where: str, window: Window = None) -> PIL.Image.Image:
    """Decodes one image, upright: the EXIF orientation is applied. Modes (L, RGB, P, …) stay as in `to_eight_bits`; converting them is the processor's part.

    Args:
        value: `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it; a PIL image; or a uint8 array (H, W), (H, W, 1) or (H, W, 3).
        where: what to call the image in an error if it has no path, such as `"row 17 of split 'train'"`.
        window: what becomes 0 and 255 of an image of more than 8 bits a channel, see `Reading`.

    Raises:
        InputError: missing, unreadable or truncated image, or more than 8 bits a channel and no window.
    """
    image = open_image(value, where, window)
    try:
        load_pixels(image)
        return to_eight_bits(upright(image), window, _name(value, where))
    except InputError:
        raise
    except Exception as error:  # as in open_image
        raise _unreadable(value, where, error) from error


def decode_mask(value: dict[str, Any] | PIL.Image.Image | np.ndarray, where: str) -> np.ndarray:
    """(H, W) bool, upright: True where a mask of any depth is above 0: its values, a palette's indices, or any channel of colour. In a JPEG file, where
    compression leaves ripples round what is marked, True where it is above half of its highest level.

    Args:
        value, where: as in `decode_image`.

    Raises:
        InputError: missing, unreadable or truncated mask.
    """
    image = open_image(value, where, FULL)
    if is_white_zero(image):
        raise InputError(
            f"{_name(value, where)}: zero is white in this TIFF, which does not tell what a mask marks; save it with zero as black"
        )
    is_jpeg = image.format in ("JPEG", "MPO")  # which an image that is turned no longer tells
    try:
        load_pixels(image)
        image = upright(image)
        if image.mode in ("LA", "La", "PA"):
            image = image.getchannel(0)
        values = stored_values(image if len(image.getbands()) == 1 else image.convert("RGB"))
        marked = values > (values.max() / 2 if is_jpeg else 0)
    except Exception as error:  # as in open_image
        raise _unreadable(value, where, error) from error
    return marked if marked.ndim == 2 else marked.any(axis=2)


def pieces(images: Iterable[PIL.Image.Image], most: int | None = None) -> Iterator[list[PIL.Image.Image]]:
    """Decoded images, a few at a time: a batch of large ones would take gigabytes.

    Args:
        most: how many at once at most, however small they are; None: any number.
    """
    held, pixels = [], 0
    for image in images:
        held.append(image)
        pixels += image.width * image.height
        if pixels >= _MAX_DECODED_PIXELS or len(held) == most:
            yield held
            held, pixels = [], 0
    if held:
        yield held


def process_decoded(images: Iterable[PIL.Image.Image], processor: Callable[..., Any], return_tensors: str, **options: Any) -> list:
    """What an image processor makes of images: `processor(images=[PIL, …], return_tensors=…, …)["pixel_values"]`, a few at a time."""
    return [x for piece in pieces(images) for x in processor(images=piece, return_tensors=return_tensors, **options)["pixel_values"]]


def process_images(values: Sequence[Any], names: Sequence[str], processor: Callable[..., Any], return_tensors: str, **options: Any) -> list:
    """As `process_decoded`, of encoded images.

    Args:
        values, names: `decode_image`'s; its `window` is the processor's, if it has one.

    Raises:
        InputError: as `decode_image`.
    """
    window = getattr(processor, "window", None)
    images = (decode_image(value, name, window) for value, name in zip(values, names, strict=True))
    return process_decoded(images, processor, return_tensors, **options)


class PixelTransform:
    """The transform of `datasets.Dataset.with_transform` that gives a detector's inputs.

    Takes a batch of columns: `image` (see `decode_image`), and, if there are any, `label` or `labels` (int), `dissolved_images` (V images a row) and
    `row` (used to name the culprit in errors). Gives

    - `pixel_values`: list of (C, H, W) float32 tensors in [-1, 1], whatever the processor makes of the images;
    - `labels`: list of ints, if the batch has labels;
    - `dissolved_pixel_values`: list of (V, C, H, W) uint8 tensors, if the batch has `dissolved_images`, 8-bit L or RGB images which were saved at the
      model's size. They stay levels v, which stand for x = v / 127.5 - 1: a step takes one of the V, and rescales that one.

    Args:
        processor: an image processor, called as `processor(images=[PIL, …], return_tensors="pt")["pixel_values"]`; its `window`, if it has one, is that
            of images of more than 8 bits.
        extra_columns: further columns to hand on unchanged. Training ignores them unless the detector's `forward` names them.

    Raises:
        InputError: on call, for a missing column or an image that cannot be decoded.
    """

    def __init__(self, processor: Callable[..., Any], extra_columns: Sequence[str] = ()):
        self.processor = processor
        self.extra_columns = tuple(extra_columns)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for column in ("image", *self.extra_columns):
            if column not in batch:
                hint = "; with a Trainer, set remove_unused_columns=False" if column == "image" else ""
                raise InputError(f"no column {column!r} in the batch; its columns: {', '.join(batch)}{hint}")
        names = (
            [f"row {row}" for row in batch["row"]] if "row" in batch else [f"image {i} of the batch" for i in range(len(batch["image"]))]
        )
        features: dict[str, list[Any]] = {"pixel_values": [x.float() for x in process_images(batch["image"], names, self.processor, "pt")]}
        if labels := [batch[column] for column in ("label", "labels") if column in batch]:
            features["labels"] = labels[0]
        if "dissolved_images" in batch:
            pairs = zip(batch["dissolved_images"], names, strict=True)
            features["dissolved_pixel_values"] = [self._dissolved(views, f"dissolved views of {name}") for views, name in pairs]
        return features | {column: batch[column] for column in self.extra_columns}

    @staticmethod
    def _dissolved(views: list[Any], where: str) -> torch.Tensor:
        images = [decode_image(view, where) for view in views]
        if len({(image.mode, image.size) for image in images}) != 1 or images[0].mode not in ("L", "RGB"):
            raise InputError(
                f"{where}: the column 'dissolved_images' needs L or RGB images of one size a row; cache the dissolved views anew"
            )
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def _undecoded(feature: Any) -> Any:
    """The feature with every `Image` in it, also those in lists, left encoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return feature


def prepare(
    dataset: datasets.Dataset | datasets.IterableDataset, processor: Callable[..., Any], extra_columns: Sequence[str] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset with a `PixelTransform`: its rows become `pixel_values`, `labels` and so on when they are read, also those of a stream.

    Image columns are left encoded first, so that an unreadable image is named by `PixelTransform`.

    Raises:
        InputError: something else, such as a `DatasetDict`; and when read, as `PixelTransform`.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise InputError(f"prepare takes one split, a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")
    transform = PixelTransform(processor, extra_columns)
    is_stream = isinstance(dataset, datasets.IterableDataset)
    features = dataset.features or {}  # of a stream from a generator or `map` nobody knows them
    columns = list(features or next(iter(dataset), {}))
    for column, feature in features.items():
        if _undecoded(feature) != feature:
            dataset = dataset.cast_column(column, _undecoded(feature))
    # A stream has no transforms. Its batches are small: they are read ahead.
    return dataset.map(transform, batched=True, batch_size=16, remove_columns=columns) if is_stream else dataset.with_transform(transform)


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[Any]]:
    """Stacks rows: tensors of shape S to (B, *S), numbers to (B,); `labels`, or `label` where there is no `labels`, become int64 `labels`. Anything else, such
    as names, stays a list of B.

    Args:
        features: rows as a dataset with a `PixelTransform` gives them, all with the same keys and shapes; `pixel_values` also as arrays or lists, which
            is how `dataset.map(processor)` keeps them.

    Raises:
        InputError: they are no dicts, or have no `pixel_values`, or a label is no whole number.
    """
    if not isinstance(features[0], Mapping):
        raise InputError(
            f"a row of the dataset is a {type(features[0]).__name__}: give dicts that hold 'pixel_values' (C, H, W), "
            "as prepare(dataset, processor) does, or a data_collator of your own"
        )
    if "pixel_values" not in features[0]:
        raise InputError(f"rows of a dataset have {', '.join(features[0])}, but no pixel_values: pass prepare(dataset, processor)")
    batch: dict[str, torch.Tensor | list[Any]] = {}
    for key in features[0]:
        values = [row[key] for row in features]
        name = "labels" if key == "label" and "labels" not in features[0] else key
        if name == "labels":
            batch[name] = _whole_numbers(values)
        elif isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        elif name == "pixel_values":
            stacked = torch.from_numpy(np.stack(values))
            batch[name] = stacked.float() if stacked.is_floating_point() else stacked  # which the detector refuses
        else:
            batch[name] = torch.tensor(values) if all(isinstance(value, Real) for value in values) else values
    return batch


def image_loader(dataset: datasets.Dataset | datasets.IterableDataset, processor: Callable[..., Any], batch_size: int) -> DataLoader:
    """Reads a dataset's images in their order, prepared, in batches that a detector takes."""
    return DataLoader(prepare(dataset, processor), batch_size=batch_size, collate_fn=collate)


def _whole_numbers(labels: list[Any]) -> torch.Tensor:
    with suppress(TypeError, ValueError, RuntimeError):
        numbers = torch.tensor(labels).long()
        if numbers.ndim == 1 and numbers.tolist() == labels:  # not 0 for 0.9
            return numbers
    found = ", ".join(sorted({shorten(repr(label), 80) for label in labels})[:5])
    raise InputError(f"labels must be whole numbers, 0 for normal images and 1 for anomalies; a batch has {found}")
