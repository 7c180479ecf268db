"""Metrics of anomaly detection as functions. As `evaluate.Metric` classes they are in image_level.py and pixel_level.py: `evaluate` is slow to import."""

from .functional import IMAGE_METRICS, balanced_accuracy, bootstrap_intervals, image_metrics, metrics_by_class
from .pixels import PixelMetrics

__all__ = ["IMAGE_METRICS", "PixelMetrics", "balanced_accuracy", "bootstrap_intervals", "image_metrics", "metrics_by_class"]
