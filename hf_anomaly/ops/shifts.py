"""Shifting transformations S_k of CSI and DIA: what a model has to tell apart, and so pushes apart. S_0 is the identity."""

import torch
from torch import Tensor

from hf_anomaly.errors import InputError


def rotate(x: Tensor) -> Tensor:
    """Rotations by k · 90° counter-clockwise, k = 0 … 3 (the default shifts of DIA, arXiv 2302.14696, and CSI, arXiv 2007.08176).

    Args:
        x: (B, C, H, H) images.

    Returns:
        (4, B, C, H, H); entry 0 is `x`.

    Raises:
        InputError: `x` is not a batch of square images.
    """
    _check_images(x)
    if x.shape[-2] != x.shape[-1]:
        raise InputError(f"images: {x.shape[-2]}×{x.shape[-1]} cannot be rotated by 90°; resize them to a square or use the shifts 'perm'")
    return torch.stack([x.rot90(k, dims=(-2, -1)) for k in range(4)])


def perm(x: Tensor) -> Tensor:
    """Swapped halves, k = 2h + v: left and right if h, upper and lower if v (DIA's "perm", arXiv 2302.14696).

    Args:
        x: (B, C, H, W) images; an odd side is cut at H // 2.

    Returns:
        (4, B, C, H, W); entry 0 is `x`.

    Raises:
        InputError: `x` is not a batch of images.
    """
    _check_images(x)
    height, width = x.shape[-2:]
    # Rolling back by half a side puts the second half first.
    return torch.stack([x.roll((-v * (height // 2), -h * (width // 2)), dims=(-2, -1)) for h in (0, 1) for v in (0, 1)])


SHIFTS = {"rotate": rotate, "perm": perm}


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"images: shape {tuple(x.shape)}; pass a batch of shape (images, channels, height, width)")
