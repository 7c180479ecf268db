"""Anomaly maps: what is usual in them, and how they are smoothed."""

import torch
import torch.nn.functional as F

from .pieces import pieces

_WINDOW_PIXELS = 2**24  # of all windows that are held at once, of at least one row of each image


def map_levels(maps: torch.Tensor) -> torch.Tensor:
    """(B, 2): the median and the maximum of each map (B, 1, H, W)."""
    values = maps.flatten(1)
    return torch.stack([values.median(1).values, values.amax(1)], 1)


def median_filter(maps: torch.Tensor, size: int, border: str = "replicate") -> torch.Tensor:
    """The median of the size × size pixels around each pixel, in each channel on its own.

    Args:
        maps: (B, C, H, W).
        size: odd, in pixels; 1 changes nothing.
        border: what lies beyond the edges: "replicate" of the edge, or "reflect" without the edge pixel, for which size // 2 must be below H and W.

    Returns:
        (B, C, H, W).
    """
    if size == 1:
        return maps
    padded = F.pad(maps, (size // 2,) * 4, mode=border)
    windows = padded.unfold(-2, size, 1).unfold(-2, size, 1)  # (B, C, H, W, size, size), a view
    bands = pieces(maps.shape[2], _WINDOW_PIXELS, size**2 * maps[:, :, 0].numel())
    return torch.cat([windows[:, :, band].flatten(-2).median(-1).values for band in bands], dim=2)
