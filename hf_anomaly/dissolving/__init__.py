"""Dissolvers: they take the fine features from an image and keep the coarse ones, so that the difference can be learned.

DIA, "Dissolving Is Amplifying: Towards Fine-Grained Anomaly Detection" (ECCV 2024, arXiv 2302.14696), Section 3.1 and appendix B.
"""

from .base import Dissolver, draw_integers
from .caching import dissolve_dataset
from .diffusion import (
    DenoisingModel,
    DiffusionDissolver,
    build_scheduler,
    build_unet,
    default_batch_size,
    default_resolution,
    network_resolution,
)
from .heuristic import GaussianDissolver, IdentityDissolver, MedianDissolver, ResizeDissolver
from .quality import DissolvingQuality, dissolving_quality

# kind -> class; own ones are entered here. `Dissolver.from_pretrained` finds them by it.
DISSOLVERS: dict[str, type[Dissolver]] = {
    "diffusion": DiffusionDissolver,
    "gaussian": GaussianDissolver,
    "median": MedianDissolver,
    "resize": ResizeDissolver,
    "identity": IdentityDissolver,
}

__all__ = [
    "DISSOLVERS",
    "DenoisingModel",
    "Dissolver",
    "DiffusionDissolver",
    "DissolvingQuality",
    "GaussianDissolver",
    "IdentityDissolver",
    "MedianDissolver",
    "ResizeDissolver",
    "build_scheduler",
    "build_unet",
    "default_batch_size",
    "default_resolution",
    "dissolve_dataset",
    "dissolving_quality",
    "draw_integers",
    "network_resolution",
]
