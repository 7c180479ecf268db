"""The heuristic dissolvers of DIA's appendix B, and two controls. Blurs of one kernel size and the controls are deterministic."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.maps import median_filter
from .base import Dissolver, check_integer, draw_integers


class IdentityDissolver(Dissolver):
    """Dissolves nothing: the control in which only the third branch of DIA is added to CSI."""

    kind = "identity"

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        return x


class ResizeDissolver(Dissolver):
    """Resizes down to `resolution` and back, nothing else: the control that the DIA paper names in section 5.4.

    Images of at most `resolution` pixels go down to half of their own height and width, so that the control has an effect on them too.

    Args:
        resolution: the dissolving resolution, in pixels.

    Raises:
        InputError: an argument out of range.
    """

    kind = "resize"

    def __init__(self, resolution: int = 32):
        self.resolution = check_integer("resolution", resolution, 1)

    def settings(self) -> dict:
        return {"resolution": self.resolution}

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        size = super()._working_size(height, width)
        return size if size != (height, width) else (max(1, height // 2), max(1, width // 2))

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        return x


class _BlurDissolver(Dissolver):
    """Blurs with a k×k kernel and reflected borders. Of several k each image gets one at random: k then stands where a diffusion model has its timestep."""

    symbol = "k"

    def __init__(self, kernel_size: int | Sequence[int], resolution: int):
        kernel_sizes = kernel_size if isinstance(kernel_size, Sequence) else [kernel_size]
        if not kernel_sizes:
            raise InputError("kernel_size is empty: give at least one")
        for size in kernel_sizes:
            _check_kernel_size(size)
        self.kernel_sizes = sorted(set(kernel_sizes))
        self.is_deterministic = len(self.kernel_sizes) == 1
        self.choices = None if self.is_deterministic else self.kernel_sizes
        self.resolution = check_integer("resolution", resolution, 1)

    def settings(self) -> dict:
        return {"kernel_size": self.kernel_sizes[0] if self.is_deterministic else self.kernel_sizes, "resolution": self.resolution}

    def spread_timesteps(self, count: int = 5) -> list[int]:
        """`count` of the kernel sizes, or fewer, from the smallest to the largest: to show what dissolving does."""
        positions = torch.linspace(0, len(self.kernel_sizes) - 1, min(count, len(self.kernel_sizes)))
        return [self.kernel_sizes[i] for i in positions.round().long()]

    def sample_timesteps(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor | None:
        """(B,) long, k of each image, drawn uniformly; None for one kernel size. With a generator the draw is made on the generator's device."""
        if self.is_deterministic:
            return None
        return torch.tensor(self.kernel_sizes, device=device)[draw_integers(0, len(self.kernel_sizes), batch_size, device, generator)]

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        if self.is_deterministic:
            return self._checked_blur(x, self.kernel_sizes[0])
        blurred = torch.empty_like(x)
        for size in timesteps.unique().tolist():
            rows = timesteps == size
            blurred[rows] = self._checked_blur(x[rows], _check_kernel_size(size))
        return blurred

    def _checked_blur(self, x: Tensor, kernel_size: int) -> Tensor:
        # Reflection without the edge pixel needs a border narrower than the image.
        height, width = x.shape[-2:]
        if kernel_size // 2 >= min(height, width):
            largest = 2 * min(height, width) - 1
            raise InputError(f"kernel_size {kernel_size} is too large for images of {height}×{width} pixels: use at most {largest}")
        return self._blur(x, kernel_size)

    @abstractmethod
    def _blur(self, x: Tensor, kernel_size: int) -> Tensor:
        """Blurs images (B, C, h, w) of more than k // 2 pixels."""


def _check_kernel_size(kernel_size: int) -> int:
    check_integer("kernel_size", kernel_size, 3)
    if kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd, got {kernel_size}: use {kernel_size - 1} or {kernel_size + 1}")
    return kernel_size


class GaussianDissolver(_BlurDissolver):
    """Gaussian blur (DIA, appendix B), at native size for images of at most `resolution` pixels.

    Args:
        kernel_size: k, odd, in pixels; the paper tries 3, 7 and 11. Of several, each image gets one at random.
        sigma: standard deviation in pixels; None gives 0.3((k − 1)/2 − 1) + 0.8.
        resolution: the dissolving resolution, in pixels.

    Raises:
        InputError: an argument out of range, or a sigma for several kernel sizes.
    """

    kind = "gaussian"

    def __init__(self, kernel_size: int | Sequence[int] = 11, sigma: float | None = None, resolution: int = 32):
        super().__init__(kernel_size, resolution)
        if sigma is not None and not (isinstance(sigma, Real) and 0 < sigma < math.inf):
            raise InputError(f"sigma must be a positive number of pixels, got {sigma!r}")
        if sigma is not None and not self.is_deterministic:
            raise InputError(f"sigma {sigma} would make kernel sizes {self.kernel_sizes} blur alike: leave it out, or give one kernel size")
        self.sigma = None if sigma is None else float(sigma)

    def settings(self) -> dict:
        return {**super().settings(), "sigma": self._sigma(self.kernel_sizes[0]) if self.is_deterministic else None}

    def _sigma(self, kernel_size: int) -> float:
        return 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8 if self.sigma is None else self.sigma

    def _blur(self, x: Tensor, kernel_size: int) -> Tensor:
        from kornia.filters import gaussian_blur2d

        return gaussian_blur2d(x, (kernel_size,) * 2, (self._sigma(kernel_size),) * 2, border_type="reflect")


class MedianDissolver(_BlurDissolver):
    """Median blur (DIA, appendix B), at native size for images of at most `resolution` pixels.

    Args:
        kernel_size: k, odd, in pixels; the paper tries 3, 7 and 11. Of several, each image gets one at random, which teaches a detector more than
            one size for all (model_cards/results/dia_ablation.md).
        resolution: the dissolving resolution, in pixels.

    Raises:
        InputError: an argument out of range.
    """

    kind = "median"

    def __init__(self, kernel_size: int | Sequence[int] = (7, 11, 15), resolution: int = 32):
        super().__init__(kernel_size, resolution)

    def _blur(self, x: Tensor, kernel_size: int) -> Tensor:
        return median_filter(x, kernel_size, border="reflect")
