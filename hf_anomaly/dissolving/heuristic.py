"""The heuristic dissolvers of DIA's appendix B, and two controls. All of them are deterministic."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import Dissolver, check_integer


class IdentityDissolver(Dissolver):
    """Dissolves nothing: the control in which only the third branch of DIA is added to CSI."""

    kind = "identity"

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        return x


class ResizeDissolver(Dissolver):
    """Resizes down to `resolution` and back, nothing else: the control that the DIA paper names in appendix B.

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
    """Blurs with a k×k kernel and reflected borders."""

    def __init__(self, kernel_size: int, resolution: int):
        self.kernel_size = check_integer("kernel_size", kernel_size, 3)
        self.resolution = check_integer("resolution", resolution, 1)
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {kernel_size}: use {kernel_size - 1} or {kernel_size + 1}")

    def settings(self) -> dict:
        return {"kernel_size": self.kernel_size, "resolution": self.resolution}

    def _check_fit(self, x: Tensor) -> None:
        # Reflection without the edge pixel needs a border narrower than the image.
        height, width = x.shape[-2:]
        if self.kernel_size // 2 >= min(height, width):
            largest = 2 * min(height, width) - 1
            raise InputError(f"kernel_size {self.kernel_size} is too large for images of {height}×{width} pixels: use at most {largest}")


class GaussianDissolver(_BlurDissolver):
    """Gaussian blur (DIA, appendix B), at native size for images of at most `resolution` pixels.

    Args:
        kernel_size: k, odd, in pixels; the paper tries 3, 7 and 11.
        sigma: standard deviation in pixels; None gives 0.3((k − 1)/2 − 1) + 0.8.
        resolution: the dissolving resolution, in pixels.

    Raises:
        InputError: an argument out of range.
    """

    kind = "gaussian"

    def __init__(self, kernel_size: int = 11, sigma: float | None = None, resolution: int = 32):
        super().__init__(kernel_size, resolution)
        if sigma is not None and not 0 < sigma < math.inf:
            raise InputError(f"sigma must be a positive number of pixels, got {sigma}")
        self.sigma = 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8 if sigma is None else float(sigma)

    def settings(self) -> dict:
        return {**super().settings(), "sigma": self.sigma}

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        from kornia.filters import gaussian_blur2d

        self._check_fit(x)
        return gaussian_blur2d(x, (self.kernel_size,) * 2, (self.sigma,) * 2, border_type="reflect")


class MedianDissolver(_BlurDissolver):
    """Median blur (DIA, appendix B), at native size for images of at most `resolution` pixels.

    Args:
        kernel_size: k, odd, in pixels; the paper tries 3, 7 and 11.
        resolution: the dissolving resolution, in pixels.

    Raises:
        InputError: an argument out of range.
    """

    kind = "median"

    def __init__(self, kernel_size: int = 7, resolution: int = 32):
        super().__init__(kernel_size, resolution)

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        from kornia.filters import median_blur

        self._check_fit(x)
        border = self.kernel_size // 2
        # Padded here because kornia before 0.9 pads with zeros, and zero is mid-gray.
        padded = F.pad(x, (border,) * 4, mode="reflect")
        return median_blur(padded, (self.kernel_size,) * 2)[..., border:-border, border:-border]
