"""Metrics of anomaly detection, as functions and as `evaluate.Metric` classes. Imported on first use: `evaluate` is slow to import."""

from importlib import import_module

_MODULES = {
    "image_metrics": "functional",
    "balanced_accuracy": "functional",
    "metrics_by_class": "functional",
    "bootstrap_intervals": "functional",
    "PixelMetrics": "pixels",
    "ImageAnomalyMetrics": "image_level",
    "PixelAnomalyMetrics": "pixel_level",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
