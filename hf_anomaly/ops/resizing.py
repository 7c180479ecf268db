"""Resizing images."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images or anomaly maps (B, C, H, W) at another height and width: bilinear between the pixels' centres, an average where they shrink."""
    if tuple(x.shape[-2:]) == size:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # CPUs do not interpolate half precision
    return F.interpolate(wide, size, mode="bilinear", antialias=True, align_corners=False).to(x.dtype)
