"""Conformal calibration: what a score means, learned from held-out normal images alone."""

import logging
import math

import torch
from torch import nn

from .errors import InputError, NotFittedError

logger = logging.getLogger(__name__)


class Float32State(nn.Module):
    """A module of buffers that stay fp32 when the model is cast, because decisions hang on their last digits."""

    def _apply(self, fn, recurse=True):
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self


def conformal_p_values(scores: torch.Tensor, calibration_scores: torch.Tensor) -> torch.Tensor:
    """p = (1 + #{calibration ≥ s}) / (n + 1) for each score s.

    Args:
        scores: (B,), higher = more anomalous.
        calibration_scores: (n,), ascending, of held-out normal images.

    Returns:
        (B,) float32 in (0, 1]. For a normal image exchangeable with the calibration images, P(p ≤ α) ≤ α.
    """
    n = calibration_scores.numel()
    at_least = n - torch.searchsorted(calibration_scores, scores.to(calibration_scores).contiguous(), right=False)
    return (1 + at_least).float() / (n + 1)


def conformal_rank(n: int, false_positive_rate: float) -> int:
    """⌈(1 − α)(n + 1)⌉, beyond n where n values are too few for the rate α."""
    return math.ceil(round((1 - false_positive_rate) * (n + 1), 9))  # round: (1 − .05)·100 is 95.00000000000001 in floats


def conformal_threshold(calibration_scores: torch.Tensor, false_positive_rate: float) -> float:
    """The ⌈(1 − α)(n + 1)⌉-th smallest of n calibration scores; an image is flagged when its score lies strictly above.

    Returns +inf, with a warning that says how many images would do, when that rank exceeds n.

    Raises:
        InputError: the rate is not in (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate must lie strictly between 0 and 1, got {false_positive_rate}")
    n = calibration_scores.numel()
    rank = conformal_rank(n, false_positive_rate)
    if rank > n:
        needed = math.ceil(round(1 / false_positive_rate, 9)) - 1
        logger.warning(
            f"A false-positive rate of {false_positive_rate:.4g} needs at least {needed} calibration images, have {n}: "
            "the threshold is infinite and nothing will be flagged."
        )
        return math.inf
    return calibration_scores[rank - 1].item()


def normal_map_range(levels: torch.Tensor, false_positive_rate: float) -> list[float]:
    """[low, high]: a usual pixel of normal images' maps, and what at most a share α of these images exceeds anywhere.

    Args:
        levels: (n, 2), the median and the maximum of the map of each held-out normal image.
        false_positive_rate: α. Where n images are too few for it, high is their maximum.
    """
    low, peaks = levels[:, 0].median().item(), levels[:, 1].sort().values
    rank = conformal_rank(len(peaks), false_positive_rate)
    high = peaks[min(rank, len(peaks)) - 1].item()
    return [low, high] if high > low else [low, low + 1]


class Calibration(Float32State):
    """Sorted scores of held-out normal images and the threshold at the target false-positive rate, as persistent buffers.

    Args:
        num_scores: how many calibration scores there are; 0 before calibration. Kept in the config, so that the shapes survive a round trip.
    """

    def __init__(self, num_scores: int = 0):
        super().__init__()
        self.register_buffer("scores", torch.zeros(num_scores, dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    @property
    def is_calibrated(self) -> bool:
        return self.scores.numel() > 0

    def fit(self, scores: torch.Tensor, false_positive_rate: float) -> None:
        """Stores the calibration scores (n,) and the threshold.

        Raises:
            InputError: no scores, or non-finite ones.
        """
        if scores.numel() == 0:
            raise InputError("calibration needs at least one normal image, got none")
        if not torch.isfinite(scores).all():
            raise InputError(f"calibration image {int((~torch.isfinite(scores)).nonzero()[0])} has a score that is not finite")
        ordered = scores.to(device=self.threshold.device, dtype=torch.float32).sort().values
        threshold = conformal_threshold(ordered, false_positive_rate)
        self.scores = ordered
        self.threshold = torch.full_like(self.threshold, threshold)

    def reset(self) -> None:
        self.scores = self.scores.new_zeros(0)
        self.threshold = torch.zeros_like(self.threshold)

    def require(self) -> None:
        if not self.is_calibrated:
            raise NotFittedError("the detector is not calibrated: call calibrate(dataloader) with held-out normal images first")

    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        self.require()
        return conformal_p_values(scores, self.scores)

    def threshold_at(self, false_positive_rate: float | None) -> float:
        """The stored threshold, or the one for another false-positive rate."""
        self.require()
        return self.threshold.item() if false_positive_rate is None else conformal_threshold(self.scores, false_positive_rate)
