"""What images that calibrate or test have in common with those that train: the same files, the same patient, nearly the same picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .content import find_copies
from .near_copies import find_near_copies

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_TOLERATED = 0.02  # of the images; by chance a few may look like another one

THRESHOLD_TOO_LOW = "the threshold will be too low for new images"
RESULTS_TOO_GOOD = "the results will not tell how new images are scored"


def warn_of_near_copies(
    train: datasets.Dataset, among: np.ndarray, split: datasets.Dataset, images: np.ndarray, split_name: str, consequence: str
) -> int:
    """Warns of images of a split that have a near copy among the training images, if they are more than a few; how many they are.

    Args:
        among, images: thumbnails of all of `train` and of all of `split`.
        consequence: what follows from near copies there.
    """
    pairs = find_near_copies(among, images)
    if len(pairs) > _TOLERATED * len(split):
        first, theirs = next(iter(pairs.items()))
        logger.warning(
            "%d of %d normal images of split %r look nearly the same as one that trains, the first, %s, like %s: %s; keep images of one patient, part or "
            "series on one side, by --group_column (hf-anomaly group lists near copies) or a column 'split'",
            len(pairs),
            len(split),
            split_name,
            _place(split[first]),
            _place(train[theirs]),
            consequence,
        )
    return len(pairs)


def warn_of_copies(
    train: datasets.Dataset, calibration: datasets.Dataset | None, test: datasets.Dataset | None, eval_split: str
) -> int | None:
    """Warns of calibration images that also train, and of test images that also train or calibrate, byte for byte; how many the latter are, None without
    test images."""
    cases = [
        ("calibration", calibration, "training images", THRESHOLD_TOO_LOW),
        (eval_split, test, "training or calibration images", RESULTS_TOO_GOOD),
    ]
    cases = [case for case in cases if case[1] is not None]
    found = find_copies(train, *(split for _, split, *_ in cases))  # at once: the training images may be many
    if len(cases) == 2:
        found[1] = sorted({*found[1], *find_copies(calibration, test)[0]})
    for (name, split, others, consequence), copies in zip(cases, found, strict=True):
        if copies:
            logger.warning(
                "%d of %d images of split %r are byte for byte also among the %s, the first %s: %s; leave them out on one side",
                len(copies),
                len(split),
                name,
                others,
                _place(split[copies[0]]),
                consequence,
            )
    return None if test is None else len(found[-1])


def _place(row: dict) -> str:
    return row["image"]["path"] or f"row {row['row']}"


def warn_of_shared_groups(groups: Mapping[str, np.ndarray | None], what: str) -> None:
    """Warns of images in other splits whose group also trains; images held out of the training split have been divided by groups already.

    Args:
        groups: for each split that of each of its images, None if there are none.
        what: a group is.
    """
    for name, theirs in groups.items():
        if name != "train" and groups["train"] is not None and theirs is not None and (shared := np.isin(theirs, groups["train"]).sum()):
            logger.warning(
                "%d of %d images of split %r are of a %s that trains, too: new ones may score higher; divide by %s",
                shared,
                len(theirs),
                name,
                what,
                what,
            )
