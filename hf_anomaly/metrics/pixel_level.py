"""The pixel-level metrics for the evaluate library, also by path: `evaluate.load("…/hf_anomaly/metrics/pixel_level.py")`; see image_level.py."""

import datasets
import evaluate

from hf_anomaly.errors import InputError
from hf_anomaly.metrics.pixels import PixelMetrics


class PixelAnomalyMetrics(evaluate.Metric):
    """`PixelMetrics` as a metric of the evaluate library: `compute(predictions=maps, references=masks)`, or by `add_batch`.

    Batches go into the histograms at once: nothing is kept in memory or in files that grows with the images. `compute` also takes `max_fpr`.

    Args:
        center: see `PixelMetrics`; `evaluate.load` hands it on.
        others: see `evaluate.Metric`.

    Raises:
        InputError: several processes, whose histograms would have to meet: let one of them have all maps.
    """

    def __init__(self, *others, center: float = 0.0, **more_others):
        super().__init__(*others, **more_others)
        if self.num_process > 1:
            raise InputError(f"num_process={self.num_process}: pixel metrics are computed by one process, which must see all maps")
        self._pixels = PixelMetrics(center)

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.List(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description="Pixel-level anomaly detection: AUROC, average precision and AUPRO up to a false-positive rate of 0.3.",
            citation="",
            inputs_description="predictions: anomaly maps, higher = more anomalous. references: masks of their size, 0 = normal, above 0 = anomalous.",
            features=datasets.Features({"predictions": rows, "references": rows}),
            reference_urls=["https://www.mvtec.com/company/research/datasets/mvtec-ad"],
        )

    def add(self, *, prediction, reference) -> None:
        """Adds a map (H, W) and its mask."""
        self._pixels.update(prediction, reference)

    def add_batch(self, *, predictions, references) -> None:
        """Adds maps and masks; see `PixelMetrics.update`."""
        self._pixels.update(predictions, references)

    def compute(self, *, predictions=None, references=None, max_fpr: float = 0.3) -> dict:
        """The metrics of all maps since the last call; see `PixelMetrics.compute`."""
        if (predictions is None) != (references is None):
            raise InputError("give predictions (maps) and references (masks) together")
        if predictions is not None:
            self._pixels.update(predictions, references)
        try:
            return self._pixels.compute(max_fpr)
        finally:
            self._pixels.reset()
