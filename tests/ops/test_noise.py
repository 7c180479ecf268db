"""Noises: slow oracles, mean and variance at every pixel, and where their power lies."""

import math

import numpy as np
import pytest
import torch

from hf_anomaly.ops import noise as module
from hf_anomaly.ops.noise import NOISES, simplex_octave

RESOLUTION = {"gaussian": 1, "coarse": 16, "simplex": 4}


def seeded(name, shape, resolution=None, seed=0):
    torch.manual_seed(seed)
    return NOISES[name](shape, resolution or RESOLUTION[name])


# Oracles ----------------------------------------------------------------------------------------------------------------------


def simplex_oracle(y, x, offset, angles):
    """Gustavson's "Simplex noise demystified", 2D, a point at a time: the lattice's corner is moved by an offset, gradients point anywhere."""
    f, g = 0.5 * (math.sqrt(3) - 1), (3 - math.sqrt(3)) / 6
    # The offset of the skewed cell, as a shift of the plane.
    y, x = y + offset[0] - (offset[0] + offset[1]) * g, x + offset[1] - (offset[0] + offset[1]) * g
    s = (x + y) * f
    j, i = math.floor(x + s), math.floor(y + s)
    t = (i + j) * g
    x0, y0 = x - (j - t), y - (i - t)
    j1, i1 = (1, 0) if x0 >= y0 else (0, 1)
    corners = [(0, 0, x0, y0), (i1, j1, x0 - j1 + g, y0 - i1 + g), (1, 1, x0 - 1 + 2 * g, y0 - 1 + 2 * g)]
    total = 0.0
    for di, dj, dx, dy in corners:
        fade = 0.5 - dx * dx - dy * dy
        if fade > 0:
            angle = angles[i + di, j + dj]
            total += fade**4 * (math.cos(angle) * dx + math.sin(angle) * dy)
    return total


def test_one_octave_of_simplex_noise():
    torch.manual_seed(0)
    y, x = torch.linspace(0, 2.7, 7, dtype=torch.double), torch.linspace(0, 3.9, 11, dtype=torch.double)
    offsets = torch.rand(2, 1, 2, dtype=torch.double)
    angles = 6.2831853 * torch.rand(2, 1, 9, 9, dtype=torch.double)
    noise = simplex_octave(y, x, offsets, angles).numpy()
    assert noise.shape == (2, 1, 7, 11)
    for b in range(2):
        expected = [[simplex_oracle(v, h, offsets[b, 0].tolist(), angles[b, 0].numpy()) for h in x.tolist()] for v in y.tolist()]
        np.testing.assert_allclose(noise[b, 0], expected, rtol=1e-9, atol=1e-12)


def bilinear(points, row, column):
    """The value at pixel-space (row, column) of a small image, coordinates clamped to it."""
    h, w = points.shape
    row, column = min(max(row, 0), h - 1), min(max(column, 0), w - 1)
    i, j = int(row), int(column)
    p, q = row - i, column - j
    weights = {(i, j): (1 - p) * (1 - q), (i + 1, j): p * (1 - q), (i, j + 1): (1 - p) * q, (i + 1, j + 1): p * q}
    weights = {place: weight for place, weight in weights.items() if weight > 0}
    scale = math.sqrt(sum(weight**2 for weight in weights.values()))
    return sum(weight * points[place] for place, weight in weights.items()) / scale


@pytest.mark.parametrize(("height", "width", "resolution"), [(12, 12, 4), (13, 9, 5), (8, 8, 8), (6, 20, 16), (5, 7, 1)])
def test_coarse_noise(height, width, resolution):
    noise = seeded("coarse", (2, 3, height, width), resolution, seed=3).numpy()
    h, w = min(resolution, height), min(resolution, width)
    torch.manual_seed(3)
    points = torch.randn(2, 3, h, w).numpy()
    for b in range(2):
        for c in range(3):
            for i in range(height):
                for j in range(width):
                    expected = bilinear(points[b, c], (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5)
                    assert noise[b, c, i, j] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_octaves_of_simplex_noise_double_down_to_two_pixels(monkeypatch):
    units, octave = [], module.simplex_octave

    def watched(y, x, *drawn):
        units.append(40 * x[1].item())
        return octave(y, x, *drawn)

    monkeypatch.setattr(module, "simplex_octave", watched)
    seeded("simplex", (1, 1, 24, 40), 5)
    assert units == pytest.approx([5, 10, 20])


# Statistics -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4000, 1, 16, 16), (1500, 3, 9, 20)])
@pytest.mark.parametrize("name", NOISES)
def test_every_pixel_has_mean_0_and_variance_1(name, shape):
    noise = seeded(name, shape)
    assert noise.shape == shape
    assert noise.dtype == torch.float32
    count = shape[0]
    assert noise.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (noise.std(0) - 1).abs().max() < 5 / math.sqrt(2 * count) * (1 if name == "gaussian" else 1.5)
    # Images and channels are independent.
    flat = noise.flatten(0, 1)
    assert (flat[1:] * flat[:-1]).mean().abs() < 0.02


def low_share(noise, below=4):
    """The share of the power in frequencies of at most `below` cycles an image, along both axes."""
    power = torch.fft.fft2(noise - noise.mean((-2, -1), keepdim=True)).abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(noise.shape[-1]).mul(noise.shape[-1]).abs()
    return (power[frequency <= below][:, frequency <= below].sum() / power.sum()).item()


def test_coarse_and_simplex_are_low_frequency(monkeypatch):
    shape = (100, 1, 64, 64)
    assert low_share(seeded("gaussian", shape)) < 0.03  # 81 of 4096
    assert low_share(seeded("coarse", shape, 4)) > 0.85
    usual = low_share(seeded("simplex", shape, 2))
    assert usual > 0.5
    monkeypatch.setattr(module, "PERSISTENCE", 1.0)
    assert low_share(seeded("simplex", shape, 2)) < usual
    monkeypatch.setattr(module, "OCTAVES", 1)
    assert low_share(seeded("simplex", shape, 2)) > max(usual, 0.9)


@pytest.mark.parametrize("name", NOISES)
def test_the_global_state_alone_decides(name):
    shape = (2, 1, 8, 8)
    first = seeded(name, shape, seed=5)
    assert not torch.equal(NOISES[name](shape, RESOLUTION[name]), first)
    assert not torch.equal(seeded(name, shape, seed=2), first)
    assert torch.equal(seeded(name, shape, seed=5), first)


@pytest.mark.parametrize("name", NOISES)
def test_any_size(name):
    for size in (1, 2, 3, 28, 131):
        assert NOISES[name]((2, 1, size, size + 1), RESOLUTION[name]).isfinite().all(), size


def test_simplex_needs_no_corner_that_was_not_drawn():
    """Extents and offsets at their largest."""
    for seed in range(50):
        for shape, resolution in (((1, 1, 31, 7), 3), ((1, 1, 5, 64), 32), ((1, 1, 16, 16), 8)):
            seeded("simplex", shape, resolution, seed)
