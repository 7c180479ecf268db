"""Noise to corrupt images with, of mean 0 and variance 1 at every pixel: Gaussian, coarse, and simplex.

Each takes the shape (B, C, H, W), a resolution ≥ 1 and a device, and draws from the global random state; it returns (B, C, H, W) float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OCTAVES, PERSISTENCE = 6, 0.8  # of simplex noise: at most so many, and the ratio of the amplitudes of successive ones

# Skewing x by (x + y)·SKEW maps the corners of equilateral triangles to the integers; UNSKEW maps back (Perlin 2001, in two dimensions).
SKEW, UNSKEW = (math.sqrt(3) - 1) / 2, (3 - math.sqrt(3)) / 6

# The variance of ∑ (½ − r²)⁴ (g·d) over the corners, for gradients g of length 1 in random directions, d from corner to point and r = |d|:
# √3 corners a unit area, times ∫ (½ − r²)⁸ r²/2 dA = (π/2) · ½¹⁰ · 1!·8!/10!.
_SIMPLEX_VARIANCE = math.sqrt(3) * math.pi / 2 * 0.5**10 / 90


def gaussian_noise(shape: tuple[int, int, int, int], resolution: int, device: torch.device | None = None) -> Tensor:
    """White noise N(0, 1), independent in every pixel and channel, whatever the resolution."""
    return torch.randn(shape, device=device)


def coarse_noise(shape: tuple[int, int, int, int], resolution: int, device: torch.device | None = None) -> Tensor:
    """N(0, 1) drawn at resolution × resolution, or at as many points as there are pixels, and upsampled bilinearly: blobs of 1/resolution of the image
    (Kascenas et al., Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022).

    Between the points that were drawn interpolation would lower the variance; it is brought back to 1 there.
    """
    *rows, height, width = shape
    sides = min(resolution, height), min(resolution, width)
    points = torch.randn((*rows, *sides), device=device)

    def upsampling(side: int, size: int) -> Tensor:
        """(side, size): what each of the points drawn gives to each pixel; the squares add up to 1 in every pixel."""
        weights = F.interpolate(torch.eye(side, device=device)[None], size=size, mode="linear", align_corners=False)[0]
        return weights / weights.norm(dim=0)

    return upsampling(sides[0], height).T @ points @ upsampling(sides[1], width)


def simplex_noise(shape: tuple[int, int, int, int], resolution: int, device: torch.device | None = None) -> Tensor:
    """Simplex noise of several octaves, the corruption of AnoDDPM (Wyatt et al., CVPR workshops 2022): clouds with detail at all scales.

    Each octave has twice the frequency of the one before and `PERSISTENCE` times its amplitude; those finer than two pixels a unit are left out. AnoDDPM
    cuts planes out of noise in three dimensions; here it has two. Gradients and the lattice's position are drawn anew for every image, channel and octave
    rather than from a table of permutations, so that no pattern recurs and every pixel has variance 1.

    Args:
        resolution: lattice units along the image's longer side in the first octave; 4 is AnoDDPM's frequency of 64 pixels at 256.
    """
    *rows, height, width = shape
    longer = max(height, width)
    units = [resolution * 2**octave for octave in range(OCTAVES)]
    units = [unit for unit in units if 2 * unit <= longer] or units[:1]
    total, variance = torch.zeros(shape, device=device), 0.0
    for octave, unit in enumerate(units):
        extents = height * unit / longer, width * unit / longer
        # In the skewed plane the image reaches so far, moved by less than 1; then the corner beyond.
        corners = math.ceil(max(extents) + SKEW * sum(extents)) + 2
        offsets = torch.rand((*rows, 2), device=device)
        angles = 2 * math.pi * torch.rand((*rows, corners, corners), device=device)
        axes = (torch.arange(size, device=device) * (unit / longer) for size in (height, width))
        total += PERSISTENCE**octave * simplex_octave(*axes, offsets, angles)
        variance += PERSISTENCE ** (2 * octave)
    return total / math.sqrt(variance * _SIMPLEX_VARIANCE)


def simplex_octave(y: Tensor, x: Tensor, offsets: Tensor, angles: Tensor) -> Tensor:
    """One octave: ∑ max(0, ½ − r²)⁴ (g·d) over the three corners of the triangle around each point.

    Args:
        y, x: (H,) and (W,), coordinates ≥ 0 in lattice units.
        offsets: (…, 2) in [0, 1), where the lattice's skewed cell begins.
        angles: (…, n, n) radians, the direction of the gradient of each skewed corner (row, column).

    Returns:
        (…, H, W), unnormalised.
    """
    y, x = torch.broadcast_tensors(y[:, None], x[None, :])
    corner_y, corner_x = offsets[..., 0, None, None], offsets[..., 1, None, None]
    skew = SKEW * (y + x)
    row, column = y + skew + corner_y, x + skew + corner_x  # in the skewed plane
    i, j = row.floor(), column.floor()
    row, column = row - i, column - j
    lower = (row > column).to(row.dtype)  # which of the cell's two triangles
    total = torch.zeros_like(row)
    for di, dj in ((0, 0), (lower, 1 - lower), (1, 1)):
        unskew = UNSKEW * (row - di + column - dj)
        dy, dx = row - di - unskew, column - dj - unskew
        index = ((i + di) * angles.shape[-1] + j + dj).long()
        angle = angles.flatten(-2).gather(-1, index.flatten(-2)).view_as(index)
        falloff = (0.5 - dy**2 - dx**2).clamp(min=0) ** 4
        total = total + falloff * (angle.sin() * dy + angle.cos() * dx)
    return total


NOISES = {"gaussian": gaussian_noise, "coarse": coarse_noise, "simplex": simplex_noise}
