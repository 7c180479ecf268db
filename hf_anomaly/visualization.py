"""An anomaly map as something a person sees."""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from .detector import AnomalyDetector
from .errors import InputError
from .files import writing
from .image_processing import AnomalyImageProcessor, to_eight_bit_image
from .ops.resizing import resize

logger = logging.getLogger(__name__)


def write_image(image: PIL.Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG file, whole or not at all."""
    with writing(path) as temporary:
        image.save(temporary, format="PNG", compress_level=1)  # the default takes three to five times as long


def _heat() -> np.ndarray:
    """From purple over red and orange to yellow, (256, 3) uint8: the upper part of matplotlib's inferno, ever lighter, also to the colour-blind."""
    anchors = [(147, 38, 103), (191, 57, 82), (226, 87, 52), (247, 132, 16), (251, 186, 31), (241, 239, 117)]
    positions = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(positions, range(len(anchors)), channel) for channel in np.transpose(anchors)], 1).round().astype(np.uint8)


HEAT = _heat()
VISIBLE = 224  # px: smaller pictures are enlarged to be looked at; images of the usual size of vision models stay as they are
GRID_CELL = 128  # px, as VISIBLE, of the images in a grid
_ROWS = 32  # painted at once: the colours of a whole photo would take a gigabyte, and longer
DIMMED = 0.6  # what is left of the image's brightness under a map: on full white, yellow would hardly be seen


def overlay_anomaly_map(
    image: "PIL.Image.Image | np.ndarray | torch.Tensor",
    anomaly_map: "torch.Tensor | np.ndarray",
    *,
    value_range: Sequence[float],
    alpha: float = 0.8,
    colormap: np.ndarray | None = None,
    least_size: int = 1,
) -> PIL.Image.Image:
    """Paints heat over an image that is turned gray and dark, so that whatever has a colour is anomalous: nothing where the map is at or below the range,
    the more the higher it is.

    Args:
        image: a PIL image of any 8-bit mode, or an array (H, W), (H, W, C) or (C, H, W) of uint8 or of floats in [0, 1]; the original, of any size.
        anomaly_map: (h, w), or with leading dimensions of 1; higher = more anomalous. It is stretched to the image.
        value_range: (low, high), what is painted not at all and in full. One range for all images makes them comparable, and keeps normal images clean:
            take `model.config.anomaly_map_range`, which `calibrate` learned from normal images, and not the map's own extremes.
        alpha: opacity of the highest heat, in [0, 1].
        colormap: (n, 3), uint8 or floats in [0, 1], from the low end to the high one; by default `HEAT`.
        least_size: small images are enlarged by a whole factor until their longer side has so many pixels; 224 can be looked at.

    Returns:
        An RGB image of the size of the original, or of a multiple with `least_size`, upright as its EXIF orientation says.

    Raises:
        InputError: NaN or infinite values, a map that is no map, or a value out of range.
    """
    if value_range is None:
        raise InputError("value_range is None: calibrate the detector, or give the (low, high) of normal images' maps")
    low, high = (float(value) for value in value_range) if len(value_range) == 2 else (np.nan, np.nan)
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(f"value_range must be two finite numbers, the lower one first, got {tuple(value_range)}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    colors = HEAT if colormap is None else np.asarray(colormap)
    if colors.ndim != 2 or colors.shape[1] != 3 or len(colors) < 2:
        raise InputError(f"colormap must be (n, 3), the colours from low to high, got {colors.shape}")
    if colors.dtype == np.uint8:
        colors = colors / 255
    elif not np.issubdtype(colors.dtype, np.floating) or colors.min() < 0 or colors.max() > 1:
        raise InputError(f"colormap must be uint8 or floats in [0, 1], got {colors.dtype} from {colors.min()} to {colors.max()}")
    # A copy by NumPy: torch takes no mirrored arrays and no other byte order, and warns of read-only ones.
    values = anomaly_map if isinstance(anomaly_map, torch.Tensor) else torch.from_numpy(np.array(anomaly_map, dtype=np.float32))
    values = values.detach().cpu().float()
    if values.ndim < 2 or values.numel() == 0 or values.shape[:-2].numel() != 1:
        raise InputError(f"anomaly_map must be one map (H, W), got shape {tuple(values.shape)}: give them one by one, each with its image")
    if not torch.isfinite(values).all():
        raise InputError("anomaly_map holds NaN or infinite values: it cannot be painted")
    picture = enlarge(to_eight_bit_image(image), least_size).convert("RGB").convert("L")
    values = resize(values.view(1, 1, *values.shape[-2:]), (picture.height, picture.width))[0, 0].numpy()
    heat = ((values - low) / (high - low)).clip(0, 1)
    opacity = alpha * heat[..., None] ** 1.5  # so that what is usual leaves but a trace
    gray, painted = np.asarray(picture), np.empty((*heat.shape, 3), np.uint8)
    for start in range(0, len(heat), _ROWS):
        rows = slice(start, start + _ROWS)
        colored = colors[np.rint(heat[rows] * (len(colors) - 1)).astype(int)]
        painted[rows] = np.rint((1 - opacity[rows]) * DIMMED * gray[rows, :, None] + opacity[rows] * 255 * colored)
    return PIL.Image.fromarray(painted)


def why_no_overlay(model: AnomalyDetector) -> str:
    """Why there can be no overlay of a detector's maps, in words for a person; "" if there can be one."""
    if not model.supports_anomaly_maps:
        return model.unsupported_maps_reason
    if model.config.anomaly_map_range is None:
        return "the detector does not know how high the maps of normal images are: calibrate it and save it again"
    return ""


def check_overlay(model: AnomalyDetector, flag: str, folder: str | os.PathLike, inputs: Iterable[str]) -> None:
    """Before any image is scored: refuses a flag that asks for overlays in a folder if the detector gives none, and warns of other pictures there.

    Args:
        inputs: where the images come from; it also warns if the overlays would lie in one of these folders.

    Raises:
        InputError: says why.
    """
    if reason := why_no_overlay(model):
        raise InputError(f"{flag}: {reason}")
    if any(Path(folder).glob("*.png")):
        logger.warning("%s %s: there are pictures already, which stay among the new ones but for those of the same names", flag, folder)
    for name in inputs:
        if Path(name).is_dir() and Path(folder).resolve().is_relative_to(Path(name).resolve()):
            logger.warning("%s %s lies in %s: the next time its pictures would be scored, too; name another folder", flag, folder, name)


@torch.no_grad()
def paint(model: AnomalyDetector, processor: AnomalyImageProcessor, image: PIL.Image.Image) -> PIL.Image.Image:
    """An image with the map that a detector makes of it, at a size to look at; see `overlay_anomaly_map` and `why_no_overlay`."""
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    maps = model.eval()(pixel_values, output_anomaly_maps=True).anomaly_maps
    return overlay_anomaly_map(image, maps[0], value_range=model.config.anomaly_map_range, least_size=VISIBLE)


def enlarge(image: PIL.Image.Image, least_size: int) -> PIL.Image.Image:
    """The image, enlarged by a whole factor until its longer side has `least_size` pixels. Pixels become squares, as blurring would show what is not there."""
    factor = max(1, -(-least_size // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)


def image_grid(rows: "Sequence[Sequence[torch.Tensor]]", captions: Sequence[str], row_captions: Sequence[str] = ()) -> PIL.Image.Image:
    """Images side by side, with a caption over each column and on request beside each row.

    Args:
        rows: images (C, H, W) in [−1, 1], gray or RGB, as many in each row as there are captions.
        row_captions: one a row, of one or more lines.

    Returns:
        An RGB image.
    """
    from PIL import ImageDraw

    margin, header = 4, 20
    measure = ImageDraw.Draw(PIL.Image.new("RGB", (1, 1)))

    def longest(texts: Sequence[str]) -> int:
        return max((math.ceil(measure.multiline_textbbox((0, 0), text)[2]) for text in texts), default=0)

    cells = [[enlarge(to_picture(image), GRID_CELL) for image in row] for row in rows]
    width = max(longest(captions), *(cell.width for row in cells for cell in row)) + margin
    heights = [max(cell.height for cell in row) + margin for row in cells]
    left = margin + (longest(row_captions) + 2 * margin if row_captions else 0)
    grid = PIL.Image.new("RGB", (left + width * len(captions), sum(heights) + header + margin), "white")
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        draw.text((left + column * width, margin), caption, fill="black")
    top = header
    for row, height, caption in zip(cells, heights, row_captions or [""] * len(cells), strict=True):
        draw.multiline_text((margin, top), caption, fill="black")
        for column, cell in enumerate(row):
            grid.paste(cell, (left + column * width, top))
        top += height
    return grid


def to_picture(image: torch.Tensor) -> PIL.Image.Image:
    """An image (C, H, W) in [−1, 1], gray or RGB, as 8 bits."""
    array = ((image.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return to_eight_bit_image(np.moveaxis(array, 0, -1))
