"""Images cut into tiles, and maps of tiles put together again."""

import torch

from ..errors import InputError
from .distributed import draw_rows


def cut_tiles(images: torch.Tensor, tiles: int, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Images (B, C, H, W) cut into tiles × tiles each, row by row: (B·tiles², C, H / tiles, W / tiles). InputError if a side is no multiple of `tiles`.

    Args:
        chosen: (B, n), of each image only the tiles of these numbers: (B·n, C, H / tiles, W / tiles).
    """
    cut = _grid(images, tiles).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, tiles², C, h, w)
    if chosen is not None:
        cut = cut[torch.arange(len(images))[:, None], chosen]
    return cut.flatten(0, 1)


def join_tiles(images: torch.Tensor, tiles: int) -> torch.Tensor:
    """The inverse of `cut_tiles`: (B·tiles², C, h, w) → (B, C, tiles·h, tiles·w)."""
    return images.unflatten(0, (-1, tiles, tiles)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def draw_tiles(tiles: int, *images: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A tile at random of each image, the same in all tensors (B, ..., H, W): (B, ..., H / tiles, W / tiles) each. What is None stays so.

    Drawn for the global batch from the global random state, of which nothing is taken if there is one tile, the image itself. Raises as `cut_tiles`.
    """
    if tiles == 1:
        return images
    batch_size = images[0].shape[0]
    rows, columns = draw_rows(lambda n: torch.randint(tiles, (n, 2)), batch_size).unbind(1)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        grid = _grid(x, tiles).movedim((-4, -2), (1, 2))  # (B, tiles, tiles, ..., h, w)
        return grid[torch.arange(batch_size), rows, columns]

    return tuple(None if x is None else drawn(x) for x in images)


def _grid(images: torch.Tensor, tiles: int) -> torch.Tensor:
    """(..., H, W) → (..., tiles, H / tiles, tiles, W / tiles)"""
    height, width = images.shape[-2:]
    if height % tiles or width % tiles:
        raise InputError(
            f"images of {height}×{width} pixels cannot be cut into {tiles}×{tiles} tiles: both sides must be multiples of {tiles}"
        )
    return images.unflatten(-2, (tiles, -1)).unflatten(-1, (tiles, -1))
