"""How good a diffusion dissolver is, measured on held-out normal images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.resizing import resize
from .base import working_size
from .diffusion import DiffusionDissolver


@dataclass(frozen=True)
class DissolvingQuality:
    """What `dissolving_quality` finds at one t.

    Args:
        timestep: t.
        noise: sqrt((1−ᾱ_t)/ᾱ_t), the error of a network that predicts nothing; in units of the pixels, which span [−1, 1].
        denoising_error: root mean square of x̂_0 − x with true noise, x̂_0 from x_t = sqrt(ᾱ_t) x + sqrt(1−ᾱ_t) ε. What the network has learned.
        ringing: without noise, as dissolving works: Σ_f max(0, |X̂(f)|² − |X(f)|²) / Σ_f |X(f)|², the energy that the dissolved image has at
            frequencies where the image has less; without the mean, f = 0. An ideal dissolver takes away only: 0.
        removed: Σ_f max(0, |X(f)|² − |X̂(f)|²) / Σ_f |X(f)|², the energy that it takes away.
    """

    timestep: int
    noise: float
    denoising_error: float
    ringing: float
    removed: float


@torch.no_grad()
def dissolving_quality(dissolver: DiffusionDissolver, pixel_values: Tensor, timesteps: list[int]) -> list[DissolvingQuality]:
    """Measures a dissolver at each of some timesteps, with the same noise at all of them, on images of its own resolution.

    Args:
        pixel_values: (B, C, H, W) in [−1, 1], images that the network was not trained on; larger ones are resized down first.

    Raises:
        InputError: as `Dissolver.__call__`.
    """
    x = resize(pixel_values, working_size(*pixel_values.shape[-2:], dissolver.resolution))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    energy = _energy(x)
    rows = []
    for t in timesteps:
        at_t = torch.full((len(x),), t, device=x.device)
        gain = _energy(dissolver(x, at_t)) - energy  # first of all, as it refuses a wrong t
        alpha_bar = dissolver.alphas_cumprod[t]
        noised = dissolver.predict_original(alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * noise, at_t)
        rows.append(
            DissolvingQuality(
                timestep=t,
                noise=float(((1 - alpha_bar) / alpha_bar) ** 0.5),
                denoising_error=float((noised - x).square().mean().sqrt()),
                ringing=float(gain.clamp(min=0).sum() / energy.sum()),
                removed=float((-gain).clamp(min=0).sum() / energy.sum()),
            )
        )
    return rows


def _energy(x: Tensor) -> Tensor:
    """|X(f)|² of every image and channel, the mean taken out."""
    return torch.fft.fft2(x - x.mean((-2, -1), keepdim=True)).abs().square()
