"""Conformal calibration: what a score means, learned from held-out normal images alone, for all images alike or for each group of them; and whether
incoming images are still like these."""

import bisect
import logging
import math
import random
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import torch
from torch import nn

from .errors import InputError, NotFittedError

logger = logging.getLogger(__name__)

Scores = torch.Tensor | Sequence[float]  # or an array

_ROUNDING = 1e-5  # relative: by less do scores of one image differ between batches and devices


class Float32State(nn.Module):
    """A module of buffers that stay fp32 when the model is cast, because decisions depend on their last digits."""

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
        (B,) float64 in (0, 1], so that 1/20 compares with a rate of .05 as it should; float32 on MPS, which has no other. For a normal image
        exchangeable with the calibration images, P(p ≤ α) ≤ α.
    """
    n = calibration_scores.numel()
    calibration_scores = calibration_scores.to(torch.promote_types(calibration_scores.dtype, torch.float32))  # 1.7 is no 1 beside integers
    at_least = n - torch.searchsorted(calibration_scores, scores.to(calibration_scores).contiguous(), right=False)
    return (1 + at_least).to(torch.float32 if at_least.device.type == "mps" else torch.float64) / (n + 1)


def conformal_rank(n: int, false_positive_rate: float) -> int:
    """⌈(1 − α)(n + 1)⌉, beyond n where n values are too few for the rate α."""
    return max(1, math.ceil(round((1 - false_positive_rate) * (n + 1), 9)))  # round: (1 − .05)·100 is 95.00000000000001 in floats


def least_rate(n: int) -> float:
    """The lowest false-positive rate of three digits for which n calibration images are enough: 1/(n + 1), rounded up."""
    return float(Context(prec=3, rounding=ROUND_CEILING).divide(1, n + 1))


def check_rate(false_positive_rate: float | None) -> None:
    """Raises InputError: the rate is not in (0, 1)."""
    if false_positive_rate is None or not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate must lie strictly between 0 and 1, got {false_positive_rate}")


def conformal_threshold(calibration_scores: torch.Tensor, false_positive_rate: float, *, where: str = "") -> float:
    """The ⌈(1 − α)(n + 1)⌉-th smallest of n calibration scores; an image is flagged when its score lies strictly above.

    Args:
        calibration_scores: (n,), ascending.
        where: whose calibration images they are, for the warning.

    Returns:
        The threshold; +inf, with a warning that says how many images would do, when that rank exceeds n.

    Raises:
        InputError: the rate is not in (0, 1).
    """
    check_rate(false_positive_rate)
    n = calibration_scores.numel()
    rank = conformal_rank(n, false_positive_rate)
    if rank > n:
        needed = math.ceil(round(1 / false_positive_rate, 9)) - 1
        logger.warning(
            f"A false-positive rate of {false_positive_rate:.4g} needs at least {needed} calibration images{where}, have {n}: "
            f"the threshold is infinite and nothing will be flagged. Hold out more images, or ask for a rate of at least {least_rate(n):g}."
        )
    return _of_rank(calibration_scores, rank)


def _of_rank(calibration_scores: torch.Tensor, rank: int) -> float:
    return calibration_scores[rank - 1].item() if rank <= calibration_scores.numel() else math.inf


def mondrian_thresholds(
    groups: Sequence[Hashable], calibration_scores: Scores, calibration_groups: Sequence[Hashable], false_positive_rate: float
) -> torch.Tensor:
    """The threshold for each image, from the calibration scores of its own group (scanner, site, view, …): then the rate holds in every group, and not
    only on average over them (Vovk, Gammerman & Shafer 2005, section 4.5: Mondrian conformal prediction).

        scores, _ = detector.score(calibration_loader)  # in the order of the images, as `detector.calibration.scores` is not
        flagged = new_scores > mondrian_thresholds(new_groups, scores, groups, 0.05)

    Nothing is pooled: in a group that calibration did not see, or of fewer than 1/α − 1 images, the threshold is +inf, with a warning that names
    the group. A threshold of other groups would flag such images at a rate that nobody knows.

    Args:
        groups: B names or numbers, the group of each image in question.
        calibration_scores: (n,) scores of held-out normal images, in any order.
        calibration_groups: n, the group of each of these.
        false_positive_rate: α, in (0, 1), for every group.

    Returns:
        (B,) float32, or float64 for such calibration scores; an image is flagged when its score lies strictly above.

    Raises:
        InputError: as many groups as scores are not there, an image without group, a score that is not finite, or a rate not in (0, 1).
    """
    calibration_scores = torch.as_tensor(calibration_scores)
    by_group, members = _scores_by_group(calibration_scores, calibration_groups), _members("groups", groups)
    dtype = torch.promote_types(calibration_scores.dtype, torch.float32)  # not rounded: a score at the threshold does not lie above it
    thresholds = torch.empty(len(groups), dtype=dtype, device=calibration_scores.device)
    for group, rows in members.items():
        own = by_group.get(group, calibration_scores[:0])
        thresholds[rows] = conformal_threshold(own, false_positive_rate, where=f" in group {group!r}")
    return thresholds


def mondrian_p_values(
    scores: Scores, groups: Sequence[Hashable], calibration_scores: Scores, calibration_groups: Sequence[Hashable]
) -> torch.Tensor:
    """The conformal p-value of each score within its own group: for a normal image, P(p ≤ α) ≤ α in every group. See `mondrian_thresholds`.

    Args:
        scores: (B,), higher = more anomalous.
        groups, calibration_scores, calibration_groups: as in `mondrian_thresholds`.

    Returns:
        (B,), as of `conformal_p_values`; 1 in a group that calibration did not see: there is nothing to say against such an image.

    Raises:
        InputError: as in `mondrian_thresholds`.
    """
    scores = _checked("scores", scores) if len(scores) else torch.as_tensor(scores)
    by_group, members = _scores_by_group(calibration_scores, calibration_groups), _members("groups", groups, len(scores))
    p_values = torch.ones_like(conformal_p_values(scores, scores[:0]))
    for group in members.keys() & by_group.keys():
        rows = members[group]
        p_values[rows] = conformal_p_values(scores[rows], by_group[group]).to(p_values)
    return p_values


def _scores_by_group(scores: Scores, groups: Sequence[Hashable]) -> dict[Hashable, torch.Tensor]:
    """Group → its calibration scores, ascending."""
    scores = _checked("calibration_scores", scores)
    return {group: scores[rows].sort().values for group, rows in _members("calibration_groups", groups, len(scores)).items()}


def _members(name: str, groups: Sequence[Hashable], count: int | None = None) -> dict[Hashable, list[int]]:
    """Group → the rows of its images."""
    groups = groups.tolist() if hasattr(groups, "tolist") else groups
    if count is not None and len(groups) != count:
        raise InputError(f"{name} has {len(groups)} entries for {count} scores: give each image its group")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        if group is None or group != group:  # NaN, which a table has for an empty field
            raise InputError(f"{name}: image {row} has no group; give it one, or leave the image out")
        members.setdefault(group, []).append(row)
    return members


def without_nan(scores: Scores) -> torch.Tensor:
    """The scores as a tensor. Raises InputError for NaN, which lies above no threshold and would pass for normal."""
    scores = torch.as_tensor(scores)
    if (nan := scores.isnan()).any():
        raise InputError(
            f"scores: number {int(nan.flatten().nonzero()[0])} (counted from 0) is NaN, which is no score: score that image again"
        )
    return scores


def _checked(name: str, scores: Scores) -> torch.Tensor:
    """Scores (n,), n ≥ 1, as a tensor."""
    scores = torch.as_tensor(scores)
    if scores.ndim != 1 or scores.numel() == 0:
        raise InputError(f"{name} must be (n,) with at least one score, got shape {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise InputError(f"{name}: number {int((~torch.isfinite(scores)).nonzero()[0])} (counted from 0) is not finite")
    return scores


@dataclass(frozen=True)
class DriftCheck:
    """What `drift_check` found.

    Attributes:
        p_value: of the hypothesis that the scores of incoming normal images are exchangeable with the calibration scores: twice the smaller of the next two, at
            most 1.
        p_higher: the smaller, the surer it is that they score higher now: more false alarms than asked for.
        p_lower: the smaller, the surer it is that they score lower now: anomalies may be missed.
        num_incoming, num_calibration: how many scores were compared; without those that `max_anomalies` set aside.
        detectable_gap: how far the two distribution functions must lie apart somewhere, in [0, 1], for p_value < 0.05; the power of the test. A gap of
            .1 may mean 15 % false alarms where 5 % were asked for. Above 1: there are too few scores to find anything.
        share_known: how many of the incoming scores are calibration scores, too, up to rounding, in [0, 1]. About 1 of the images that calibrated; 0 where
            more than a quarter of the calibration scores tie up to rounding, as they may where there are thousands: then it tells nothing.
    """

    p_value: float
    p_higher: float
    p_lower: float
    num_incoming: int
    num_calibration: int
    detectable_gap: float
    share_known: float

    @property
    def are_calibration_images(self) -> bool:
        """Whether most of the incoming scores are calibration scores: then these are its images, which say nothing of how often new ones are flagged."""
        return self.share_known > 0.5

    @property
    def is_found(self) -> bool:
        """Whether p_value is below .01."""
        return self.p_value < 0.01

    @property
    def direction(self) -> str:
        """Where the incoming scores lie, should there be drift: "higher" or "lower"."""
        return "higher" if self.p_higher < self.p_lower else "lower"

    @property
    def advice(self) -> str:
        """What to do about a drift, in words."""
        if self.direction == "higher":
            return "calibrate with images like these (hf-anomaly calibrate)"
        # A detector knows the images that it was trained on: to calibrate with them would make the threshold too low for all others.
        return (
            "it may have been trained on these, and results on them say little of new images; do not calibrate with them unless you are sure that it "
            "was not, and that they are as hard as those to come"
        )


def drift_check(scores: Scores, calibration_scores: Scores, *, max_anomalies: float = 0.0) -> DriftCheck:
    """Are incoming scores still those of calibration? Two one-sided Kolmogorov–Smirnov tests of two samples.

    The hypothesis: the scores of the incoming *normal* images are exchangeable with the calibration scores. Only then do p-values and false-positive
    rates hold. Anomalies score higher and look like drift, so give normal images alone, or an upper bound of their share: so many of the
    highest scores are set aside when it is tested whether images score higher. What remains lies no higher than the normal images
    do, whichever are the anomalies, so that p_higher stays valid, at the cost of power. p_lower needs no such bound: that the incoming scores are lower
    is not what anomalies do.

    The power: n and m scores tell apart distribution functions with a gap of about √(ln(2/.05)(n + m)/(2nm)), .14 for 200 and 200; that is
    `detectable_gap`. A p-value that is not small does not say that there is no drift. The scores only see what changes the scores.

    Args:
        scores: (m,) of incoming images.
        calibration_scores: (n,) of held-out normal images, as `detector.calibration.scores`.
        max_anomalies: the largest share of the incoming images that may be anomalous, in [0, 1).

    Raises:
        InputError: no scores, one that is not finite, or a share not in [0, 1).
    """
    from scipy.stats import ks_2samp

    scores, calibration_scores = _checked("scores", scores), _checked("calibration_scores", calibration_scores)
    if not 0 <= max_anomalies < 1:
        raise InputError(f"max_anomalies must be a share in [0, 1), got {max_anomalies}")
    scores, calibration_scores = (values.detach().cpu().double().sort().values for values in (scores, calibration_scores))
    incoming, reference = scores.numpy(), calibration_scores.numpy()
    kept = incoming[: max(1, len(incoming) - math.ceil(round(max_anomalies * len(incoming), 9)))]
    n, m = len(reference), len(kept)
    with warnings.catch_warnings():  # of large samples, whose p-value is the asymptotic one
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful")
        # scipy names the distribution function: less is to the right.
        p_higher = float(ks_2samp(kept, reference, alternative="less").pvalue)
        p_lower = float(ks_2samp(incoming, reference, alternative="greater").pvalue)
    gap = math.sqrt(math.log(2 / 0.05) * (n + m) / (2 * n * m))
    return DriftCheck(min(1.0, 2 * min(p_higher, p_lower)), p_higher, p_lower, m, n, gap, _share_known(scores, calibration_scores))


def _share_known(scores: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of the scores (m,) that are among those of the ascending reference (n,), but for what other batches change of the last digits."""
    ties = reference.diff() <= 2 * _ROUNDING * reference[1:].abs()
    if ties.double().mean() > 0.25:  # others would be among them by chance
        return 0.0
    slack = _ROUNDING * scores.abs()
    known = torch.searchsorted(reference, scores + slack, right=True) > torch.searchsorted(reference, scores - slack)
    return known.double().mean().item()


def drift_martingale(scores: Scores, calibration_scores: Scores, *, seed: int = 0, jump_rate: float = 0.01) -> torch.Tensor:
    """The evidence against exchangeability after each image of a stream: a conformal test martingale, the Simple Jumper (Vovk, Petej, Nouretdinov,
    Ahlberg, Carlsson & Gammerman 2021, "Retrain or not retrain", Algorithm 1).

    It may be looked at after every image: while the stream is exchangeable with the calibration images, the probability that M ever reaches 1/α
    is at most α (Ville's inequality). So alarm when the result reaches ln(1/α), such as ln 100 = 4.6. Every image is ranked among the calibration
    images and all images before it, ties at random, which makes the p-values independent and uniform. Anomalies in the stream are a change too: for a
    set with a known share of them take `drift_check`.

    Args:
        scores: (m,) in the order of the stream.
        calibration_scores: (n,) of held-out normal images.
        seed: of the ties.
        jump_rate: J, how fast the bets change; in [0, 1].

    Returns:
        (m,) float64, ln M after each image; 0 is no evidence.

    Raises:
        InputError: no scores, one that is not finite, or a rate not in [0, 1].
    """
    scores, calibration_scores = _checked("scores", scores), _checked("calibration_scores", calibration_scores)
    if not 0 <= jump_rate <= 1:
        raise InputError(f"jump_rate must be in [0, 1], got {jump_rate}")
    bets = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)  # on small p-values, on nothing, on large ones
    capital, logarithm, path = torch.full((3,), 1 / 3, dtype=torch.float64), 0.0, []
    for p in _online_p_values(scores, calibration_scores, seed):
        capital = ((1 - jump_rate) * capital + jump_rate * capital.mean()) * (1 + bets * (p - 0.5))
        logarithm += math.log(total := capital.sum().item())
        capital = capital / total  # so that it never leaves the range of floats
        path.append(logarithm)
    return torch.tensor(path, dtype=torch.float64)


def _online_p_values(scores: torch.Tensor, calibration_scores: torch.Tensor, seed: int) -> list[float]:
    """p_i = (#{s_j > s_i} + θ_i·#{s_j = s_i}) / (n + i) over calibration and the stream up to and with i, θ_i uniform."""
    draw, seen, p_values = random.Random(seed), sorted(calibration_scores.tolist()), []
    for score in scores.tolist():
        at, after = bisect.bisect_left(seen, score), bisect.bisect_right(seen, score)
        above, ties = len(seen) - after, after - at + 1
        p_values.append((above + draw.random() * ties) / (len(seen) + 1))
        seen.insert(after, score)
    return p_values


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

    def check(self, name: str) -> None:
        """Refuses what `fit` cannot have left.

        Raises:
            InputError: scores that are not finite or not ascending, or a threshold that is NaN.
        """
        scores = self.scores
        if not torch.isfinite(scores).all() or bool((scores[1:] < scores[:-1]).any()) or bool(self.threshold.isnan()):
            raise InputError(
                f"{name}: calibration.scores or calibration.threshold are damaged (NaN, or out of order); calibrate it again and save it"
            )

    def move_to(self, false_positive_rate: float) -> bool:
        """Sets the threshold that belongs to this rate. Returns whether it was another one."""
        if self.threshold.item() == _of_rank(self.scores, conformal_rank(self.scores.numel(), false_positive_rate)):
            return False
        self.threshold = torch.full_like(self.threshold, conformal_threshold(self.scores, false_positive_rate))  # which warns of infinity
        return True

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
