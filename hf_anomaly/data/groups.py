"""Images that belong together, such as those of a patient or the slices of a volume: they shall not stand on both sides of a division."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .content import paths_of
from .formats import SLICES

if TYPE_CHECKING:
    import datasets


def groups_by_column(split: datasets.Dataset, column: str, where: str) -> np.ndarray:
    """(n,) str: what this column says of each row.

    Raises:
        InputError: there is no such column, or a row without a value.
    """
    if column not in split.column_names:
        raise InputError(f"{where} has no column {column!r}; its columns: {', '.join(split.column_names)}; give another group_column")
    values = split.select_columns([column])[column][:]
    if None in values:
        raise InputError(f"row {values.index(None)} of {where} says nothing in column {column!r}; fill it in, or leave group_column out")
    return np.asarray(values).astype(str)


def groups_by_volume(images: datasets.Dataset) -> np.ndarray | None:
    """(n,) str: of a slice the volume that it was cut from, of another image its row; None if there are no slices."""
    folders = [None if path is None else Path(path).parent for path in paths_of(images)]
    are_slices = [folder is not None and folder.parts[-3:-1] == SLICES for folder in folders]
    if not any(are_slices):
        return None
    return np.asarray(
        [folder.name if is_slice else f"row {i}" for i, (folder, is_slice) in enumerate(zip(folders, are_slices, strict=True))]
    )


def draw_groups(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: whole groups, drawn at random until they hold as near to a share of the n images as they can; at least one, and not all.

    Args:
        groups: (n,), two different ones at least.
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.RandomState([seed, 3]).permutation(len(names))
    held = np.cumsum(sizes[order])[:-1]  # images in the first group, in the first two, …
    number = 1 + np.abs(held - share * len(groups)).argmin()
    return np.isin(inverse, order[:number])
