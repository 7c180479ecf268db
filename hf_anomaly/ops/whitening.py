"""Whitening: coordinates in which training features vary alike in every direction."""

import torch
from torch import Tensor


def fit_whitening(vectors: Tensor, shrinkage: float = 0.3) -> tuple[Tensor, Tensor]:
    """The affine map x → W (x − μ) after which vectors have no correlations, and a mean squared length of about 1.

    W Σ Wᵀ = I/d with the covariance shrunk towards the sphere of the same total variance, Σ = (1 − α) S + α (tr S / d) I, so that directions which the
    vectors hardly use, of which there are many if the vectors are few, do not drown the others.

    Args:
        vectors: (M, K, d), M vectors of each of K groups; each group has a map of its own.
        shrinkage: α in (0, 1].

    Returns:
        μ (K, d) and W (K, d, d), lower triangular, float32; computed in float64.
    """
    # One group at a time: float64 copies of all at once would take several times the vectors' own memory.
    centers, maps = zip(*(_fit_group(group, shrinkage) for group in vectors.unbind(1)), strict=True)
    return torch.stack(centers).to(vectors.device), torch.stack(maps).to(vectors.device)


def leave_out_change(maps: Tensor, changes: Tensor) -> Tensor:
    """The maps W without the direction in which a change moves whitened vectors most: (I − v vᵀ) W, so that distances no longer see it.

    This is a nuisance attribute projection (Solomonoff, Quillen and Campbell 2004) of one dimension: v is the first right singular vector of the rows W Δ.

    Args:
        maps: (K, d, d), as from `fit_whitening`.
        changes: (M, K, d), Δ: the vectors after the change less those before.

    Returns:
        (K, d, d) float32, computed in float64.
    """
    return torch.stack([_leave_out(w, group) for w, group in zip(maps, changes.unbind(1), strict=True)]).to(maps.device)


def _double(x: Tensor) -> Tensor:
    """In float64; on the CPU where it lies on MPS, which has none."""
    return (x.cpu() if x.is_mps else x).double()


def _leave_out(whitening: Tensor, changes: Tensor) -> Tensor:
    w = _double(whitening)
    moved = _double(changes) @ w.T
    v = torch.linalg.eigh(moved.T @ moved).eigenvectors[:, -1:]
    return (w - v @ (v.T @ w)).float()


def _fit_group(vectors: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """μ (d,) and W (d, d) of vectors (M, d)."""
    x = _double(vectors)
    center = x.mean(0)
    x = x - center
    covariance = x.T @ x / len(x)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    variance = covariance.diagonal().mean().clamp(min=1e-12)  # equal vectors have none, but for rounding
    covariance = (1 - shrinkage) * covariance + shrinkage * variance * identity
    root = torch.linalg.cholesky(covariance)
    whitening = torch.linalg.solve_triangular(root, identity, upper=False) * x.shape[-1] ** -0.5
    return center.float(), whitening.float()
