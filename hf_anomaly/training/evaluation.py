"""A detector's results: metrics, intervals and figures of an evaluation."""

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..calibration import drift_check
from ..cards import write_figures
from ..data import OneClassSplits, collate, decode_image, prepare
from ..data.sources import dataset_label
from ..detector import AnomalyDetector
from ..files import replacing
from ..metrics import IMAGE_METRICS, balanced_accuracy, bootstrap_intervals, image_metrics, metrics_by_class
from ..visualization import paint, why_no_overlay
from .localization import evaluate_maps

logger = logging.getLogger(__name__)

INTERVAL_CONFIDENCE = 0.95  # of the intervals in the results


def evaluate_detector(
    model: AnomalyDetector, processor, splits: OneClassSplits, score: Callable, *, batch_size: int
) -> tuple[dict, tuple | None]:
    """Results of a fitted detector, as `eval_results.json` holds them.

    Args:
        score: prepared dataset → (scores, labels).
        batch_size: images whose maps are computed at once, where there are masks.

    Returns:
        `auroc`, `average_precision`, `fpr_at_95_tpr` and `f1_max` (None with `reason` where there is nothing to measure on); `auroc_interval` and
        `average_precision_interval`, [low, high] with `interval_confidence` (see `bootstrap_intervals`); `num_normal`, `num_anomalous`, and of both
        `num_test_copies` and `num_near_copies` (see `OneClassSplits`); `division` (see `Division`); for a calibrated detector the rates and the
        balanced accuracy at its threshold, and `drift_p_value`, of the normal images' scores against those of calibration (see `drift_check`); where
        there are several classes of anomalies, `by_class`, see `metrics_by_class`; and, where the test split has a column `mask` and the detector
        gives maps, what `evaluate_maps` finds. The second element is what `score` gave, None without a test split.
    """
    results = dict.fromkeys(IMAGE_METRICS)
    results |= {
        "num_normal": 0,
        "num_anomalous": 0,
        "num_test_copies": splits.num_test_copies,
        "num_near_copies": splits.num_near_copies,
        "split_hash": splits.split_hash,
        "dataset": dataset_label(splits.source),
        "normal_label": splits.normal_label,
        "division": asdict(splits.division),
    }
    if splits.test is None:
        return results | {"reason": splits.test_missing_reason}, None
    scores, labels = score(prepare(splits.test, processor))
    results |= {"num_normal": int((labels == 0).sum()), "num_anomalous": int((labels == 1).sum())}
    if splits.test_missing_reason:
        results["reason"] = splits.test_missing_reason
    elif len(labels.unique()) < 2:  # of a stream it is not known before
        results["reason"] = f"all {len(labels)} images of the evaluation split are {'anomalies' if len(labels) and labels[0] else 'normal'}"
    else:
        results |= image_metrics(scores.numpy(), labels.numpy())
        intervals = bootstrap_intervals(scores.numpy(), labels.numpy(), confidence=INTERVAL_CONFIDENCE)
        results |= {f"{name}_interval": list(interval) for name, interval in intervals.items()}
        results["interval_confidence"] = INTERVAL_CONFIDENCE
    if model.calibration.is_calibrated:
        flagged = model.is_anomalous(scores)
        for name, label in (("false_positive_rate", 0), ("true_positive_rate", 1)):
            rate = flagged[labels == label].double().mean().item()
            results[f"{name}_at_threshold"] = rate if (labels == label).any() else None
        threshold = model.calibration.threshold.item()
        results["balanced_accuracy_at_threshold"] = balanced_accuracy(scores.numpy(), labels.numpy(), threshold)
        if (labels == 0).any():
            results["drift_p_value"] = _check_drift(model, scores[labels == 0], results["false_positive_rate_at_threshold"])
    if by_class := results_by_class(model, splits.test, scores, labels):
        results["by_class"] = by_class
    if "mask" in (splits.test.column_names or ()):  # a stream's may be unknown
        if model.supports_anomaly_maps:
            results |= evaluate_maps(model, processor, splits.test, batch_size)
        else:
            logger.info("No pixel-level metrics, though there are masks: %s", model.unsupported_maps_reason)
    return results, (scores, labels)


def results_by_class(model: AnomalyDetector, dataset, scores: torch.Tensor, labels: torch.Tensor) -> dict[str, dict]:
    """See `metrics_by_class`; empty if there is a single class of anomalies, or the dataset, such as a stream, has no column `class_name`."""
    if "class_name" not in (dataset.column_names or ()):
        return {}
    threshold = model.calibration.threshold.item() if model.calibration.is_calibrated else None
    found = metrics_by_class(scores.numpy(), labels.numpy(), dataset["class_name"][:], threshold)
    return found if len(found) > 1 else {}


def _check_drift(model: AnomalyDetector, scores: torch.Tensor, flagged: float) -> float:
    """Warns if normal images with these scores are not like those that calibrated the detector."""
    drift = drift_check(scores, model.calibration.scores)
    if drift.are_calibration_images:
        logger.warning(
            "%.0f %% of these normal images have the scores of images that calibrated the detector, and probably are these: how often they are flagged says "
            "nothing of new images",
            100 * drift.share_known,
        )
    if drift.is_found:
        logger.warning(
            "These normal images score %s on the whole than those that calibrated the detector (Kolmogorov-Smirnov, p = %.2g); %.1f %% of them are flagged "
            "where %.3g %% were asked for: %s",
            drift.direction,
            drift.p_value,
            100 * flagged,
            100 * model.config.false_positive_rate,
            drift.advice,
        )
    return drift.p_value


@torch.no_grad()
def bfloat16_agreement(model: AnomalyDetector, dataset, batch_size: int, num_images: int = 64) -> dict:
    """How well a fitted detector cast to bfloat16 ranks images as it does in float32.

    Args:
        dataset: prepared images; `num_images` evenly spaced ones are taken, of a stream the first ones.

    Returns:
        `bfloat16_rank_correlation`, Spearman's, None where all scores are equal, and `bfloat16_num_images`.
    """
    from scipy.stats import spearmanr

    if hasattr(dataset, "__len__"):
        images = dataset.select(np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), num_images)).round().astype(int)))
    else:
        images = list(islice(dataset, num_images))
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collate)
    scores = [detector.eval().score(loader, progress=False)[0] for detector in (model, copy.deepcopy(model).to(torch.bfloat16))]
    varied = all(values.min() < values.max() for values in scores)
    return {
        "bfloat16_rank_correlation": float(spearmanr(*scores).statistic) if varied else None,
        "bfloat16_num_images": len(images),
    }


def write_scores(path: Path, scores: np.ndarray, labels: np.ndarray) -> None:
    """Writes scores (N,) and labels (N,) as `.npz`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, scores=np.asarray(scores, dtype=np.float32), labels=np.asarray(labels, dtype=np.uint8))


def draw_figures(folder: str | os.PathLike, model: AnomalyDetector, processor, dataset, scores: torch.Tensor, labels: torch.Tensor) -> None:
    """The card's figures of an evaluation, see `write_figures`; of each class the images with the lowest, the median and the highest score.

    Args:
        dataset: the evaluated images, unprepared, in the order of scores (N,) and labels (N,).
    """
    examples = []
    for label in (0, 1):
        rows = (labels == label).nonzero().flatten()
        ranked = rows[scores[rows].argsort()].tolist()
        for row in dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]]):
            image = decode_image(dataset[row]["image"], f"row {row}", processor.window)
            overlay = None if why_no_overlay(model) else paint(model, processor, image)
            examples.append((image, overlay, f"{('normal', 'anomalous')[label]}\nscore {scores[row]:.3g}"))
    threshold = model.calibration.threshold.item() if model.calibration.is_calibrated else None
    write_figures(folder, scores.numpy(), labels.numpy(), threshold=threshold, examples=examples)
