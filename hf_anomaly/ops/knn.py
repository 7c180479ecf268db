"""Nearest neighbours in a bank of training features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_anomaly.errors import InputError

from .pieces import pieces

# Elements that a CPU's caches hold, 2 MiB in float32: pieces of this size are searched in half to two thirds of the time of 32 times larger ones.
_CACHED = 2**19


def max_cosine(queries: Tensor, bank: Tensor, chunk_size: int = 2**24) -> Tensor:
    """Cosine similarity to the nearest row of the bank, max_m cos(z_k(x), z_k(x_m)): the first factor of s_sim in DIA's Eq. 10.

    Args:
        queries: (B, K, d) features, one per image and shift.
        bank: (K, M, d) training features of every shift; its rows need no normalisation.
        chunk_size: elements that may be held at once beside the inputs: the bank is taken in pieces of m rows with
            K·m·(B + d) ≤ chunk_size (but at least one row), and a running maximum is kept. 2**24 are 64 MiB in float32. A CPU takes
            2**19 at most, which is faster.

    Returns:
        (B, K) in [−1, 1] up to rounding, float32, or float64 for float64 features; a zero vector has similarity 0.

    Raises:
        InputError: an empty bank, shapes that do not fit, or chunk_size < 1.
    """
    dtype = _check(queries, bank, chunk_size)
    with torch.autocast(queries.device.type, enabled=False):
        directions = F.normalize(queries.to(dtype), dim=-1).transpose(0, 1)
        largest = directions.new_full(directions.shape[:2], float("-inf"))
        for rows in _pieces(queries, bank, chunk_size):
            piece = bank[:, rows].to(dtype)
            lengths = piece.norm(dim=-1).clamp(min=1e-12)  # dividing by them afterwards spares a copy of the piece
            products = (directions @ piece.transpose(1, 2)).div_(lengths[:, None])
            largest = torch.maximum(largest, products.amax(dim=2))  # max(dim) also finds the row, in a fifth more time
        return largest.T


def min_distance(queries: Tensor, bank: Tensor, chunk_size: int = 2**24) -> Tensor:
    """Euclidean distance to the nearest row of the bank, min_m ‖q − b_m‖.

    Args and raises as `max_cosine`.

    Returns:
        (B, K), ≥ 0, float32, or float64 for float64 features.
    """
    dtype = _check(queries, bank, chunk_size)
    with torch.autocast(queries.device.type, enabled=False):
        points = queries.to(dtype).transpose(0, 1)
        largest = points.new_full(points.shape[:2], float("-inf"))
        nearest = torch.zeros_like(largest, dtype=torch.long)
        for rows in _pieces(queries, bank, chunk_size):
            piece = bank[:, rows].to(dtype)
            # ‖q − b‖² = ‖q‖² − 2 (q·b − ‖b‖²/2): good enough to find the nearest row, but a difference of large numbers near zero.
            value, where = (points @ piece.transpose(1, 2)).sub_(piece.square().sum(-1)[:, None] / 2).max(dim=2)
            nearest = torch.where(value > largest, rows.start + where, nearest)
            largest = torch.maximum(largest, value)
        return (queries.to(dtype) - bank[torch.arange(bank.shape[0], device=bank.device), nearest.T]).norm(dim=-1)


def _check(queries: Tensor, bank: Tensor, chunk_size: int) -> torch.dtype:
    """The type to compute in."""
    if queries.ndim != 3 or bank.ndim != 3 or (bank.shape[0], bank.shape[2]) != tuple(queries.shape[1:]):
        raise InputError(f"bank: shape {tuple(bank.shape)} does not fit queries {tuple(queries.shape)}; pass (K, M, d) and (B, K, d)")
    if bank.shape[1] == 0:
        raise InputError("bank: no rows to compare with; fill it from training images first (fit_reference)")
    if chunk_size < 1:
        raise InputError(f"chunk_size: {chunk_size} is not positive; leave the default or pass a number of elements")
    return torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)


def _pieces(queries: Tensor, bank: Tensor, chunk_size: int) -> list[slice]:
    """Rows m of the bank to search at a time: a piece (K, m, d) and its products (K, B, m) have `chunk_size` elements at most."""
    images, shifts, features = queries.shape
    if queries.device.type == "cpu":
        chunk_size = min(chunk_size, _CACHED)
    return pieces(bank.shape[1], chunk_size, shifts * (images + features))
