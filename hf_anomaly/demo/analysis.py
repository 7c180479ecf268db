"""What the page says of an image, computed without the page: one run of the model, then verdicts at any false-alarm rate."""

import math
import os
from dataclasses import dataclass, field

import PIL.Image
import torch

from ..data.formats import Window
from ..data.transforms import decode_image
from ..detector import AnomalyDetector
from ..dissolving import Dissolver
from ..image_processing import AnomalyImageProcessor
from ..visualization import enlarge, overlay_anomaly_map, to_picture, why_no_overlay

RATE_STEP = 0.005  # of the slider
_SMALLEST, _LARGEST = 256, 1024  # px: smaller images are enlarged to be seen, larger ones shrunk to be sent


@dataclass(frozen=True)
class Analysis:
    """What one run of the model found.

    Args:
        score: higher = more anomalous.
        p_value: conformal, in (0, 1]; None for a detector that is not calibrated.
        overlay: the image with its anomaly map over it, RGB; None with a `reason`.
        reason: why there is no overlay.
        dissolved: the image as the detector sees it, and its dissolved versions, each with its caption; empty without a dissolver.
    """

    score: float
    p_value: float | None
    overlay: PIL.Image.Image | None
    reason: str = ""
    dissolved: list[tuple[PIL.Image.Image, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """Whether a score is flagged: it lies strictly above the threshold of the false-positive rate."""

    flagged: bool
    threshold: float
    false_positive_rate: float


def open_upload(path: str | os.PathLike, name: str | None = None, window: Window = None) -> PIL.Image.Image:
    """An uploaded file as an upright image.

    Args:
        name: the file's name where it came from, for errors: people never saw `path`.
        window: of the detector's processor, for more than 8 bits a channel, see `Reading`.

    Raises:
        InputError: unreadable, or more than 8 bits a channel and no window.
    """
    with open(path, "rb") as file:
        return decode_image({"bytes": file.read(), "path": name}, "the image", window)


@torch.no_grad()
def analyse(
    model: AnomalyDetector, processor: AnomalyImageProcessor, image: PIL.Image.Image, dissolver: Dissolver | None = None
) -> Analysis:
    """Runs detector and dissolver once on an image.

    Raises:
        InputError: the image has more than 8 bits a channel, or the dissolver takes other images than the detector.
    """
    shown = _displayed(image)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    reason = why_no_overlay(model)
    outputs = model(pixel_values, output_anomaly_maps=not reason)
    (result,) = processor.post_process_anomaly_detection(outputs, target_sizes=[shown.size[::-1]])
    return Analysis(
        score=result["score"],
        p_value=model.p_values(outputs.scores).item() if model.calibration.is_calibrated else None,
        overlay=None if reason else overlay_anomaly_map(shown, result["anomaly_map"], value_range=model.config.anomaly_map_range),
        reason=reason,
        dissolved=[] if dissolver is None else dissolved_versions(dissolver, pixel_values, model.config.tiles),
    )


def judge(model: AnomalyDetector, score: float, false_positive_rate: float) -> Verdict:
    """The verdict on a score; the model does not run again.

    Raises:
        NotFittedError: the detector is not calibrated.
    """
    threshold = model.calibration.threshold_at(false_positive_rate)
    return Verdict(score > threshold, threshold, false_positive_rate)


def rate_range(model: AnomalyDetector) -> tuple[float, float, float]:
    """(lowest, highest, first) false-alarm rate to choose from. A lower one than 1 / (n + 1) needs more than n calibration images and flags nothing."""
    n = model.config.num_calibration_scores
    lowest = max(1, math.ceil(round(1 / (n + 1) / RATE_STEP, 9))) * RATE_STEP
    highest = 0.5 if lowest < 0.5 else 1 - RATE_STEP
    first = min(max(model.config.false_positive_rate or 0.05, lowest), highest)
    return round(lowest, 3), highest, round(first, 3)


@torch.no_grad()
def dissolved_versions(dissolver: Dissolver, pixel_values: torch.Tensor, tiles: int = 1) -> list[tuple[PIL.Image.Image, str]]:
    """An image and its dissolved versions, to be looked at: at a few t, or the one of a deterministic dissolver.

    Args:
        pixel_values: (1, C, H, W) in [−1, 1].
        tiles: of the detector's configuration.

    Raises:
        InputError: as the dissolver.
    """
    if dissolver.is_deterministic:
        captions, drawn = [f"dissolved ({dissolver.kind})"], None
    else:
        timesteps = dissolver.spread_timesteps()
        captions, drawn = [f"{dissolver.symbol} = {t}" for t in timesteps], torch.tensor(timesteps)
    dissolver.to(pixel_values.device)
    versions = dissolver(pixel_values.expand(len(captions), -1, -1, -1), drawn, tiles)
    return [(_displayed(to_picture(one)), caption) for one, caption in zip([*pixel_values, *versions], ["input", *captions], strict=True)]


def _displayed(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image at a size to look at."""
    if max(image.size) > _LARGEST:
        image = image.convert("RGB")  # which, other than a palette, can be averaged
        image.thumbnail((_LARGEST, _LARGEST))
        return image
    return enlarge(image, _SMALLEST)
