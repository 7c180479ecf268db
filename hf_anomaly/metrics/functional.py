"""Image-level metrics as functions. The arithmetic is scikit-learn's."""

import numpy as np

from ..errors import InputError


def image_metrics(scores, labels) -> dict[str, float | None]:
    """AUROC, average precision, and the false-positive rate at a true-positive rate of 95 %. The arithmetic is scikit-learn's.

    Args:
        scores: (N,) numbers, finite; higher = more anomalous.
        labels: (N,) 0 = normal, 1 = anomalous, which is the positive class.

    Returns:
        `auroc`, `average_precision` and `fpr_at_95_tpr`, the smallest false-positive rate of any threshold whose true-positive
        rate is at least 0.95. All in [0, 1]; all None if only one class is there, as none of them is defined then.

    Raises:
        InputError: other shapes, no rows, a score that is not finite, a label that is neither 0 nor 1.
    """
    scores, labels = _column("scores", scores), _column("labels", labels)
    if len(scores) != len(labels):
        raise InputError(f"scores: {len(scores)} rows, but labels have {len(labels)}; give one label per score")
    if len(scores) == 0:
        raise InputError("scores: no rows; give at least one score and its label")
    _check_rows("scores", scores, np.isfinite(scores), "is not a finite number; look at the image or the model that gave it")
    _check_rows("labels", labels, np.isin(labels, (0, 1)), "is neither 0 (normal) nor 1 (anomalous); map the labels to these")
    if labels.min() == labels.max():
        return {"auroc": None, "average_precision": None, "fpr_at_95_tpr": None}

    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    # Every threshold: the default drops points of the curve that change no area.
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
        "fpr_at_95_tpr": float(fpr[tpr >= 0.95].min()),
    }


def _column(name: str, values) -> np.ndarray:
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}; give one number per image") from error
    if column.ndim != 1:
        raise InputError(f"{name}: shape {column.shape}; give one number per image, shape (N,)")
    return column


def _check_rows(name: str, column: np.ndarray, good: np.ndarray, problem: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(f"{name}: row {row} (counted from 0) has {column[row]:g}, which {problem}")
