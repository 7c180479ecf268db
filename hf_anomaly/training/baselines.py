"""How much better a detector is than trivial baselines, and what remains of both once all images have the same contrast."""

import copy
import logging
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from ..data import image_loader
from ..data.protocols import subset
from ..detector import AnomalyDetector
from ..errors import InputError
from ..metrics import image_metrics
from ..ops.baselines import BASELINES

logger = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]
WITHOUT_CONTRAST = ("pixel_knn", "pca_residual")  # the baselines that tell standardized images apart


def pixel_matrix(dataset, processor, batch_size: int = 64) -> np.ndarray:
    """(n, C·H·W) float32: what `processor` makes of a dataset's images, `batch_size` at a time; the result is in memory as a whole."""
    return np.concatenate([batch["pixel_values"].flatten(1).numpy() for batch in image_loader(dataset, processor, batch_size)])


def standardize(pixel_values: Tensor, mean: float = 0.0, std: float = 0.5) -> Tensor:
    """Every image (B, C, H, W) to this mean and standard deviation over its pixels and channels, and clipped to [−1, 1]. A flat image becomes `mean`."""
    dims = (1, 2, 3)
    centred = pixel_values - pixel_values.mean(dims, keepdim=True)
    scale = centred.square().mean(dims, keepdim=True).sqrt().clamp_min(1e-3)  # an eighth of an 8-bit level
    return (mean + std * centred / scale).clamp(-1, 1)


def equalize(pixel_values: Tensor) -> Tensor:
    """CLAHE, contrast-limited adaptive histogram equalization, of images (B, C, H, W) in [−1, 1]: 4 × 4 tiles, clip limit 2, each channel by itself.

    Raises:
        InputError: images of less than 8 px, too small for the tiles.
    """
    if min(pixel_values.shape[-2:]) < 8:
        raise InputError(f"images of {pixel_values.shape[-2]}×{pixel_values.shape[-1]} px are too small for CLAHE, which needs 8 px")
    from kornia.enhance import equalize_clahe

    return equalize_clahe((pixel_values + 1) / 2, clip_limit=2.0, grid_size=(4, 4)) * 2 - 1


class _ChangedImages:
    """A processor whose `pixel_values` are changed."""

    def __init__(self, processor, change: Change):
        self.processor, self.change, self.window = processor, change, processor.window

    def __call__(self, images, return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": self.change(self.processor(images=images, return_tensors=return_tensors)["pixel_values"])}


def compare_with_baselines(model: AnomalyDetector, processor, train, test, *, batch_size: int = 64) -> dict[str, dict[str, float | None]]:
    """AUROC of a fitted detector and of the trivial baselines, on images as they are, standardized, and equalized.

    The detector's weights stay as they are. It and the baselines compare with the training images, which are changed as the test images are.

    Args:
        train: normal images, unprepared: those that the detector was trained on.
        test: labelled images (0 normal, 1 anomaly), unprepared. All pixels of both are held in memory.
        batch_size: images that are changed or scored at once.

    Returns:
        "as_they_are", "standardized" (`standardize`, to the training images' average mean and standard deviation) and "equalized" (`equalize`) →
        "detector" and the names in `BASELINES` → AUROC. Standardized images have no mean and contrast of their own: these two are left out there.

    Raises:
        InputError: images of less than 8 px.
    """
    reference = train.select(subset(len(train), model.max_reference_images or len(train), seed=0))  # those that `AnomalyTrainer` draws
    pixels = pixel_matrix(train, processor, batch_size)
    mean, std = float(pixels.mean()), float(pixels.std(axis=1).mean())
    changes: dict[str, tuple[Change, Iterable[str]]] = {
        "standardized": (lambda x: standardize(x, mean, std), WITHOUT_CONTRAST),
        "equalized": (equalize, BASELINES),
    }
    logger.info("Trivial baselines: images as they are")
    results = {"as_they_are": _aurocs(model, pixels, test, processor, batch_size, BASELINES)}
    for name, (change, baselines) in changes.items():
        logger.info("Trivial baselines: images %s", name)
        changed = _ChangedImages(processor, change)
        pixels = pixel_matrix(train, changed, batch_size)
        detector = copy.deepcopy(model).fit_reference(image_loader(reference, changed, batch_size), num_images=len(reference))
        results[name] = _aurocs(detector, pixels, test, changed, batch_size, baselines)
    return results


def _aurocs(detector: AnomalyDetector, train_pixels, test, processor, batch_size: int, baselines: Iterable[str]) -> dict[str, float | None]:
    scores, labels = detector.score(image_loader(test, processor, batch_size))
    test_pixels = pixel_matrix(test, processor, batch_size)
    all_scores = {"detector": scores.numpy(), **{name: BASELINES[name](train_pixels, test_pixels) for name in baselines}}
    return {name: image_metrics(values, labels.numpy())["auroc"] for name, values in all_scores.items()}
