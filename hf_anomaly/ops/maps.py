"""Anomaly maps: what is usual in them, and how they are smoothed."""

import torch
import torch.nn.functional as F

_WINDOW_PIXELS = 2**24  # of all windows that are held at once, of at least one image's


def map_levels(maps: torch.Tensor) -> torch.Tensor:
    """(B, 2): the median and the maximum of each map (B, 1, H, W)."""
    values = maps.flatten(1)
    return torch.stack([values.median(1).values, values.amax(1)], 1)


def median_filter(maps: torch.Tensor, size: int) -> torch.Tensor:
    """The median of the size × size pixels around each pixel; edges are replicated.

    Args:
        maps: (B, 1, H, W).
        size: odd, in pixels; 1 changes nothing.

    Returns:
        (B, 1, H, W).
    """
    if size == 1:
        return maps
    padded = F.pad(maps, (size // 2,) * 4, mode="replicate")
    images = max(1, _WINDOW_PIXELS // (size**2 * maps.shape[-2:].numel()))  # at once
    windows = (F.unfold(part, size) for part in padded.split(images))  # (b, size², H·W)
    return torch.cat([part.median(dim=1).values for part in windows]).view_as(maps)
