"""Nearest neighbours in a bank of training features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_anomaly.errors import InputError

from .pieces import pieces

# Elements that a CPU's caches hold, 4 MiB in float32: pieces of this size are searched in two thirds of the time of sixteen times larger ones.
_CACHED = 2**20


def max_cosine(queries: Tensor, bank: Tensor, chunk_size: int = 2**24) -> Tensor:
    """Cosine similarity to the nearest row of the bank, max_m cos(z_k(x), z_k(x_m)): the first factor of s_sim in DIA's Eq. 10.

    Args:
        queries: (B, K, d) features, one per image and shift.
        bank: (K, M, d) training features of every shift; its rows need no normalisation.
        chunk_size: elements that may be held at once beside the inputs: the bank is taken in pieces of m rows with
            K·m·(B + d) ≤ chunk_size (but at least one row), and a running maximum is kept. 2**24 are 64 MiB in float32. A CPU takes
            2**20 at most, which is faster.

    Returns:
        (B, K) in [−1, 1] up to rounding, float32, or float64 for float64 features; a zero vector has similarity 0.

    Raises:
        InputError: an empty bank, shapes that do not fit, or chunk_size < 1.
    """
    dtype = _check(queries, bank, chunk_size)

    def cosine(products, piece):
        lengths = piece.norm(dim=-1).clamp(min=1e-12)  # dividing by them afterwards spares a copy of the piece
        return products.div_(lengths[:, None])

    with torch.autocast(queries.device.type, enabled=False):
        return _largest(F.normalize(queries.to(dtype), dim=-1), bank, chunk_size, cosine)[0]


def min_distance(queries: Tensor, bank: Tensor, chunk_size: int = 2**24) -> Tensor:
    """Euclidean distance to the nearest row of the bank, min_m ‖q − b_m‖.

    Args and raises as `max_cosine`.

    Returns:
        (B, K), ≥ 0, float32, or float64 for float64 features.
    """
    dtype = _check(queries, bank, chunk_size)
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.to(dtype)
        # ‖q − b‖² = ‖q‖² − 2 (q·b − ‖b‖²/2): good enough to find the nearest row, but a difference of large numbers near zero.
        _, nearest = _largest(queries, bank, chunk_size, lambda products, piece: products.sub_(piece.square().sum(-1)[:, None] / 2))
        return (queries - bank[torch.arange(bank.shape[0], device=bank.device), nearest]).norm(dim=-1)


def _check(queries: Tensor, bank: Tensor, chunk_size: int) -> torch.dtype:
    """The type to compute in."""
    if queries.ndim != 3 or bank.ndim != 3 or (bank.shape[0], bank.shape[2]) != tuple(queries.shape[1:]):
        raise InputError(f"bank: shape {tuple(bank.shape)} does not fit queries {tuple(queries.shape)}; pass (K, M, d) and (B, K, d)")
    if bank.shape[1] == 0:
        raise InputError("bank: no rows to compare with; fill it from training images first (fit_reference)")
    if chunk_size < 1:
        raise InputError(f"chunk_size: {chunk_size} is not positive; leave the default or pass a number of elements")
    return torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)


def _largest(queries: Tensor, bank: Tensor, chunk_size: int, adjust: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """max_m adjust(q·b_m) and that m, each (B, K), of queries (B, K, d) and bank (K, M, d), a piece of the bank after the other.

    Args:
        adjust: gets the products (K, B, m) with a piece of the bank, and the piece (K, m, d).
    """
    images, shifts, features = queries.shape
    if queries.device.type == "cpu":
        chunk_size = min(chunk_size, _CACHED)
    queries = queries.transpose(0, 1)
    largest = queries.new_full((shifts, images), float("-inf"))
    index = torch.zeros_like(largest, dtype=torch.long)
    for rows in pieces(bank.shape[1], chunk_size, shifts * (images + features)):
        piece = bank[:, rows].to(queries.dtype)
        value, where = adjust(queries @ piece.transpose(1, 2), piece).max(dim=2)
        index = torch.where(value > largest, rows.start + where, index)
        largest = torch.maximum(largest, value)
    return largest.T, index.T
