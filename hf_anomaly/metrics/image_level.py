"""The image-level metrics for the evaluate library, also by path: `evaluate.load("…/hf_anomaly/metrics/image_level.py")`.

It looks for the class at the top level of the file, which is why evaluate is imported here and not on first use. The functions stand in
another file: a script called evaluate.py, run by its path, hides the library.
"""

import datasets
import evaluate

from hf_anomaly.metrics.functional import bootstrap_intervals, image_metrics


class ImageAnomalyMetrics(evaluate.Metric):
    """`image_metrics` as a metric of the evaluate library: `compute(predictions=scores, references=labels)`, or by `add_batch`.

    `compute` also takes `threshold`, see `image_metrics`, and `confidence`: then each metric of `bootstrap_intervals` comes with an interval,
    `auroc_interval` and so on, of as many `resamples` with this `seed`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Image-level anomaly detection: AUROC, average precision, false-positive rate at 95 % true-positive rate, best F1, "
            "and balanced accuracy at a threshold.",
            citation="",
            inputs_description="predictions: anomaly scores, higher = more anomalous. references: labels, 0 = normal, 1 = anomalous.",
            # float64: float32 would tie scores that differ, and integers would round labels that are none.
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}),
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )

    def _compute(
        self,
        predictions,
        references,
        threshold: float | None = None,
        confidence: float | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict:
        metrics = image_metrics(predictions, references, threshold)
        if confidence is not None:
            intervals = bootstrap_intervals(predictions, references, confidence=confidence, resamples=resamples, seed=seed)
            metrics |= {f"{name}_interval": interval for name, interval in intervals.items()}
        return metrics
