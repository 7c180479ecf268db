"""Protocols: who trains and who tests, out of the images that a source has. All draws come from NumPy's frozen RandomState: the same rows everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import InputError
from .groups import draw_groups

logger = logging.getLogger(__name__)

TEST_FRACTION = 0.2


def balanced(labels: np.ndarray, normal_label: str, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """80 % of the normal class trains; the other 20 % and as many anomalies, drawn at random from all other classes, test.

    Protocol 1 of Jia & Liu 2023, section 4.2 (after Pidhorskyi et al. 2018), in which test normals come from any split of the source. Both draws follow
    the seed. Where there are fewer anomalies than that, all of them test.

    Args:
        labels: (n,) class names of all images.
        groups: (n,) what they belong to, such as patients. Then no group both trains and tests: whole groups of normals are drawn, and anomalies from the
            groups that do not train.

    Raises:
        InputError: all normals are of one group.
    """
    from sklearn.model_selection import train_test_split

    normals, anomalies = np.flatnonzero(labels == normal_label), np.flatnonzero(labels != normal_label)
    if groups is None or len(np.unique(groups[normals])) == len(normals):
        train, test = train_test_split(normals, test_size=TEST_FRACTION, random_state=seed)
    elif len(np.unique(groups[normals])) == 1:
        raise InputError(
            f"all images of {normal_label!r} belong together, to {str(groups[normals[0]])!r}: with 'balanced' none could test apart from those that train"
        )
    else:
        drawn = draw_groups(groups[normals], TEST_FRACTION, seed, "normal images test")
        train, test = normals[~drawn], normals[drawn]
    apart = anomalies if groups is None else anomalies[~np.isin(groups[anomalies], groups[train])]
    if len(apart) < len(test):
        hint = f"; {others} others belong to what trains, another seed may leave more" if (others := len(anomalies) - len(apart)) else ""
        logger.warning("There are %d anomalies for %d normal test images: the test is not balanced%s", len(apart), len(test), hint)
    drawn = np.random.RandomState(seed).permutation(apart)[: len(test)]  # NumPy's frozen generator: the same rows everywhere
    return np.sort(np.concatenate([test, drawn]))


def stratified(
    labels: np.ndarray, normal_label: str, seed: int, groups: np.ndarray | None = None, test_fraction: float = TEST_FRACTION
) -> np.ndarray:
    """A fixed split of every class, the same for any seed, normal class and groups: stands in for a source's own splits where it has none."""
    from sklearn.model_selection import train_test_split

    _, test = train_test_split(np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=0)
    return np.sort(test)


# Each gives the positions of the images that test, in order; of the others the normal ones train.
PROTOCOLS: dict[str, Callable[[np.ndarray, str, int, np.ndarray | None], np.ndarray]] = {
    "balanced": balanced,
    "stratified": stratified,
    "stratified_70_30": partial(stratified, test_fraction=0.3),  # Kvasir and APTOS in DIA, appendix A
}


# Which classes there are


def subclass_vs_superclass(superclasses: Mapping[str, Sequence[str]], normal_label: str) -> dict[str, str]:
    """One subclass is normal, the others of its superclass are anomalies, all other images are left out (Jia & Liu 2023, section 4.3, Table 4).

    Args:
        superclasses: superclass → its subclasses.

    Returns:
        The `classes` of `load_one_class`.

    Raises:
        InputError: no superclass has such a subclass.
    """
    for subclasses in superclasses.values():
        if normal_label in subclasses:
            return {name: name for name in subclasses}
    known = ", ".join(name for subclasses in superclasses.values() for name in subclasses)
    raise InputError(f"normal_label={normal_label!r} is no subclass; the subclasses: {known}")


# Which of the images train


def subset(num_images: int, size: int, seed: int) -> np.ndarray:
    """(min(size, num_images),) sorted positions among `num_images`; of one seed the smaller subsets are parts of the larger."""
    return np.sort(np.random.RandomState([seed, 1]).permutation(num_images)[:size])


def contaminate(num_normals: int, num_anomalies: int, share: float, seed: int) -> np.ndarray:
    """Which anomalies are added to the normal training images, so that they make up this share of the resulting set.

    Args:
        num_anomalies: how many there are to draw from; none of them tests.
        share: r, in [0, 1).

    Returns:
        (round(r / (1 − r) · num_normals),) sorted positions among the anomalies; of one seed those of a smaller share are among those of a larger.

    Raises:
        InputError: there are too few, or so few normal images that no anomaly is such a share of them.
    """
    size = round(share / (1 - share) * num_normals)
    if size == 0 and share > 0:
        raise InputError(
            f"contamination={share} of {num_normals} normal training images is less than one anomaly: raise it, or train on more images"
        )
    if size > num_anomalies:
        raise InputError(
            f"contamination={share} of {num_normals} normal training images takes {size} anomalies, but only {num_anomalies} do not test: "
            "lower it, or take a protocol that leaves more"
        )
    return np.sort(np.random.RandomState([seed, 2]).permutation(num_anomalies)[:size])


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a dataset was divided: enough to do it again, and the hash to see that it came out the same. JSON values only.

    Attributes:
        recipe: name of the recipe; None without one.
        protocol: as in `load_one_class`; "stream" where nothing but a head was looked at.
        seed: of the draws.
        normal_label: the class taken as normal.
        classes: source's class → what it counts as, if not all count as themselves.
        contamination: r, the anomalies' share of the training set.
        max_train_images: n, the limit of normal training images; None: all.
        split_hash: see `OneClassSplits`.
        group_column: what kept images together; None: nothing, or the volumes that slices come from.
        calibration_fraction: the share of the training normals that is held out if the source has no split for it; None if nothing was to train.
    """

    recipe: str | None
    protocol: str
    seed: int
    normal_label: str
    classes: dict[str, str] | None
    contamination: float
    max_train_images: int | None
    split_hash: str
    group_column: str | None = None
    calibration_fraction: float | None = None
