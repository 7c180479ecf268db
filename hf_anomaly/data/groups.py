"""Images that belong together, such as those of a patient or the slices of a volume: they shall not stand on both sides of a division."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .content import paths_of
from .formats import SLICES
from .sources import class_name

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def groups_by_column(split: datasets.Dataset, column: str, where: str) -> np.ndarray:
    """(n,) str: what this column says of each row.

    Raises:
        InputError: there is no such column, it holds no names or numbers, or nothing in a row.
    """
    import datasets

    if column not in split.column_names:
        raise InputError(f"{where} has no column {column!r}; its columns: {', '.join(split.column_names)}; give another group_column")
    feature = split.features[column]
    if not isinstance(feature, datasets.Value | datasets.ClassLabel):
        raise InputError(f"column {column!r} of {where} holds {feature}, not one name or number an image; give another group_column")
    names = [class_name(value, feature) for value in split.select_columns([column])[column][:]]
    if (missing := next((i for i, name in enumerate(names) if not name), None)) is not None:
        raise InputError(
            f"row {missing} (counted from 0) of {where} says nothing in column {column!r}; fill it in, or leave group_column out"
        )
    return np.asarray(names)


def groups_by_volume(split: datasets.Dataset, image_column: str, name: str | None) -> np.ndarray | None:
    """(n,) str: of a slice the volume that it was cut from, of another image its row in the split `name`; None if there are no slices, which are files."""
    import datasets

    if not isinstance(split.features.get(image_column), datasets.Image):
        return None
    folders = [None if path is None else Path(path).parent for path in paths_of(split, image_column)]
    are_slices = [folder is not None and folder.parts[-3:-1] == SLICES for folder in folders]
    if not any(are_slices):
        return None
    pairs = zip(folders, are_slices, strict=True)
    return np.asarray([folder.name if is_slice else f"row {i} of {name}" for i, (folder, is_slice) in enumerate(pairs)])


def draw_groups(groups: np.ndarray, share: float, seed: int, what: str) -> np.ndarray:
    """(n,) bool: whole groups in random order, each taken if that brings their images nearer to a share of the n; at least one, and not all. Warns if they
    have more than twice as many.

    Args:
        groups: (n,), two different ones at least.
        what: the images are and those drawn do, for the warning: "normal images test".
    """
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    taken, missing = [], share * len(groups)
    for group in np.random.RandomState([seed, 3]).permutation(len(names)):
        if abs(missing - sizes[group]) < abs(missing) and len(taken) < len(names) - 1:
            taken.append(group)
            missing -= sizes[group]
    drawn = np.isin(inverse, taken or [sizes.argmin()])
    if drawn.sum() > 2 * share * len(groups):
        logger.warning("%d of %d %s: they belong to one another", drawn.sum(), len(groups), what)
    return drawn
