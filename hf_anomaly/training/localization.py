"""How well a detector's maps find what the masks of a dataset mark."""

import logging

import numpy as np
import torch

from ..data import decode_image
from ..data.transforms import decode_mask, file_name, pieces
from ..detector import AnomalyDetector
from ..metrics import PixelMetrics

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_maps(model: AnomalyDetector, processor, dataset, batch_size: int) -> dict:
    """Pixel-level metrics of a fitted detector, in one pass and constant memory; see `PixelMetrics`.

    The maps are stretched to the masks' size, as the pipeline stretches them to the image's. Shrinking the masks instead would lose small regions, and the
    results of detectors that take images of different sizes would not compare.

    Args:
        model: one with `supports_anomaly_maps`.
        dataset: unprepared images, with the columns `image`, `label` and `mask`: an image, above 0 where the anomaly is, or None. A normal image
            without a mask is normal everywhere; an anomalous one is left out with a warning, as where it is anomalous is not known.

    Returns:
        What `PixelMetrics.compute` gives; {} if there is no mask at all.

    Raises:
        InputError: an image or mask that cannot be decoded, or a map that is not finite.
    """
    usual = model.config.anomaly_map_range
    metrics, without, num_masks = PixelMetrics(center=usual[0] if usual else 0.0), [], 0
    model.eval()
    masks = []  # of the images that are held

    def known():
        nonlocal num_masks
        for row in dataset:
            if row["mask"] is None and row["label"] != 0:
                without.append(file_name(row["image"], f"row {row['row']}"))
                continue
            image = decode_image(row["image"], f"row {row['row']}", processor.window)
            if row["mask"] is None:
                masks.append(np.zeros(image.size[::-1], bool))
            else:
                masks.append(decode_mask(row["mask"], f"mask of row {row['row']}"))
                num_masks += 1
            yield image

    for images in pieces(known(), batch_size):
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        outputs = model(pixel_values, output_anomaly_maps=True)
        for result, mask in zip(processor.post_process_anomaly_detection(outputs, [mask.shape for mask in masks]), masks, strict=True):
            metrics.update(result["anomaly_map"], mask)
        masks.clear()
    if num_masks and without:
        what = "%d anomalous images have no mask, the first %s: the pixel-level metrics leave them out"
        logger.warning(what, len(without), without[0])
    return metrics.compute() if num_masks else {}
