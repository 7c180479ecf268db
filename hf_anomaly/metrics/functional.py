"""Image-level metrics as functions. Where scikit-learn has the arithmetic, it is scikit-learn's."""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError, one_line

IMAGE_METRICS = ("auroc", "average_precision", "fpr_at_95_tpr", "f1_max")  # those that `image_metrics` gives without a threshold
INTERVALS = ("auroc", "average_precision")  # the metrics that `bootstrap_intervals` gives

_VALUES_AT_ONCE = 2**20  # scores of resamples that the bootstrap holds at once, which bounds its memory


def image_metrics(scores, labels, threshold: float | None = None) -> dict[str, float | None]:
    """AUROC, average precision, the false-positive rate at a true-positive rate of 95 %, the best F1 and the balanced accuracy at a threshold.

    Args:
        scores: (N,) numbers, finite; higher = more anomalous.
        labels: (N,) 0 = normal, 1 = anomalous, which is the positive class.
        threshold: of a calibrated detector, see `balanced_accuracy`.

    Returns:
        `auroc`; `average_precision`; `fpr_at_95_tpr`, the smallest false-positive rate of any threshold whose true-positive rate is at least
        0.95; `f1_max`, the largest F1 of any threshold: as it is chosen with the labels at hand, it says what the ranking allows and not
        what a user gets; with `threshold` also `balanced_accuracy_at_threshold`. All in [0, 1]; all None if only one class is there, as
        none of them is defined then (the F1 would be, but depends on the share of anomalies alone).

    Raises:
        InputError: other shapes, no rows, a score that is not finite, a label that is neither 0 nor 1, a threshold that is NaN.
    """
    scores, labels = _columns(scores, labels)
    metrics = dict.fromkeys(IMAGE_METRICS)
    if labels.min() != labels.max():
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

        # Every threshold: the default drops points of the curve that change no area.
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        num_anomalous = labels.sum()
        hits, false_alarms = tpr * num_anomalous, fpr * (len(labels) - num_anomalous)
        metrics = {
            "auroc": float(roc_auc_score(labels, scores)),
            "average_precision": min(float(average_precision_score(labels, scores)), 1.0),  # rounding goes beyond it
            "fpr_at_95_tpr": float(fpr[tpr >= 0.95].min()),
            "f1_max": float((2 * hits / (hits + false_alarms + num_anomalous)).max()),
        }
    if threshold is not None:
        metrics["balanced_accuracy_at_threshold"] = balanced_accuracy(scores, labels, threshold)
    return metrics


def metrics_by_class(scores, labels, classes: Sequence[str], threshold: float | None = None) -> dict[str, dict[str, float | None]]:
    """How well each class of anomalies, such as a kind of defect, is told from all normal images.

    Args:
        scores, labels, threshold: as in `image_metrics`.
        classes: (N,) every image's class; those of normal images are ignored.

    Returns:
        Class → `num_images`, `auroc` (None without normal images) and, with `threshold`, `true_positive_rate_at_threshold`.

    Raises:
        InputError: as `image_metrics`, or not one class an image.
    """
    scores, labels = _columns(scores, labels)
    if len(classes) != len(scores):
        raise InputError(f"classes: {len(classes)} rows, but scores have {len(scores)}; give one class per score")
    threshold = None if threshold is None else _checked_threshold(threshold)
    names, normal, results = np.asarray(classes, dtype=object), labels == 0, {}
    for name in sorted(set(names[~normal])):
        chosen = ~normal & (names == name)
        results[name] = {"num_images": int(chosen.sum()), "auroc": image_metrics(scores[normal | chosen], labels[normal | chosen])["auroc"]}
        if threshold is not None:
            results[name]["true_positive_rate_at_threshold"] = float((scores[chosen] > threshold).mean())
    return results


def balanced_accuracy(scores, labels, threshold: float) -> float | None:
    """The mean of the true-positive and the true-negative rate; an image is flagged when its score lies strictly above the threshold.

    Args:
        scores, labels: as in `image_metrics`. Verdicts (1 = flagged) are scores too, of which the threshold is 0.5.
        threshold: what calibration on normal images gave, not these images; +inf flags nothing, hence 0.5.

    Returns:
        In [0, 1]; None if only one class is there.

    Raises:
        InputError: as `image_metrics`.
    """
    scores, labels = _columns(scores, labels)
    threshold = _checked_threshold(threshold)
    if labels.min() == labels.max():
        return None
    flagged = scores > threshold
    return float((flagged[labels == 1].mean() + (~flagged[labels == 0]).mean()) / 2)


def bootstrap_intervals(
    scores, labels, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of AUROC and average precision: how far they may be off because the test images are few.

    The bootstrap is stratified: every resample draws as many normal and as many anomalous images as there are, with replacement (Efron & Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13). It knows the test images alone: another training run differs in other ways. Classes that the
    scores separate completely give [1, 1], however few they are.

    Args:
        scores, labels: as in `image_metrics`.
        confidence: the share of resamples inside the interval, in (0, 1).
        resamples: at least 1.
        seed: of the draws.

    Returns:
        Of each of `INTERVALS` (low, high), or None if only one class is there.

    Raises:
        InputError: as `image_metrics`, or another argument out of range.
    """
    scores, labels = _columns(scores, labels)
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    if labels.min() == labels.max():
        return dict.fromkeys(INTERVALS)
    distinct, level = np.unique(-scores, return_inverse=True)  # level 0 has the highest score; ties share one
    rng, drawn = np.random.default_rng(seed), []
    at_once = max(1, _VALUES_AT_ONCE // len(scores))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        parts = (_resampled(level[labels == label], len(distinct), count, rng) for label in (0, 1))
        drawn.append(_metrics_of_counts(*parts))
    ends = np.quantile(np.concatenate(drawn, axis=1), [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return {name: (float(low), float(high)) for name, low, high in zip(INTERVALS, *ends, strict=True)}


def _resampled(levels: np.ndarray, num_levels: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, num_levels): how many images of each level each of the resamples of `levels` (n,) has."""
    picked = levels[rng.integers(len(levels), size=(count, len(levels)))] + num_levels * np.arange(count)[:, None]
    return np.bincount(picked.ravel(), minlength=count * num_levels).reshape(count, num_levels)


def _metrics_of_counts(normal: np.ndarray, anomalous: np.ndarray) -> np.ndarray:
    """(2, B): AUROC and average precision of B samples, given as numbers of images at each score, (B, L) each, the highest score first."""
    false_alarms, hits = normal.cumsum(1), anomalous.cumsum(1)
    num_normal, num_anomalous = false_alarms[:, -1], hits[:, -1]
    # Mann-Whitney: each anomalous image wins over the normal ones below it, and half over those of its own score.
    wins = (anomalous * (num_normal[:, None] - false_alarms + normal / 2)).sum(1)
    precision = hits / np.maximum(hits + false_alarms, 1)
    return np.stack([wins / (num_normal * num_anomalous), (anomalous * precision).sum(1) / num_anomalous])


def _columns(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    """Both as checked float64 columns of one length."""
    scores, labels = _column("scores", scores), _column("labels", labels)
    if len(scores) != len(labels):
        raise InputError(f"scores: {len(scores)} rows, but labels have {len(labels)}; give one label per score")
    if len(scores) == 0:
        raise InputError("scores: no rows; give at least one score and its label")
    _check_rows("scores", scores, np.isfinite(scores), "is not a finite number; look at the image or the model that gave it")
    _check_rows("labels", labels, np.isin(labels, (0, 1)), "is neither 0 (normal) nor 1 (anomalous); map the labels to these")
    return scores, labels


def _column(name: str, values) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()  # NumPy knows no bfloat16
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {one_line(error)}; give one number per image") from error
    if column.ndim != 1:
        raise InputError(f"{name}: shape {column.shape}; give one number per image, shape (N,)")
    return column


def _checked_threshold(threshold) -> float:
    threshold = float(threshold)  # a detector's own is a tensor
    if np.isnan(threshold):
        raise InputError("threshold: NaN; give the threshold of a calibrated detector, or +inf to flag nothing")
    return threshold


def _check_rows(name: str, column: np.ndarray, good: np.ndarray, problem: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{name}: row {row} (counted from 0) has {column[row]:g}, which {problem}")
