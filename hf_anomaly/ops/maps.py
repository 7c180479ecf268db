"""Anomaly maps: their size, and what is usual in them."""

import torch
import torch.nn.functional as F


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stretches maps to another height and width, as the image processor stretched the image.

    Args:
        maps: (B, 1, h, w) float.
        size: (H, W) in pixels.

    Returns:
        (B, 1, H, W), bilinear between the pixels' centres; smaller sizes average, so that no peak falls between the pixels.
    """
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def map_levels(maps: torch.Tensor) -> torch.Tensor:
    """(B, 2): the median and the maximum of each map (B, 1, H, W)."""
    values = maps.flatten(1)
    return torch.stack([values.median(1).values, values.amax(1)], 1)
