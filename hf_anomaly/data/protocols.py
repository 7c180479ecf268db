"""Protocols other than a source's own splits: who trains and who tests, out of all the images that a source has."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

logger = logging.getLogger(__name__)

TEST_FRACTION = 0.2
Rows = tuple[np.ndarray, np.ndarray]  # of the images to train on and to test on, in the source's order


def balanced(labels: np.ndarray, normal_label: str, seed: int) -> Rows:
    """80 % of the normal class trains; the other 20 % and as many anomalies, drawn at random from all other classes, test.

    Protocol 1 of Jia & Liu 2023, section 4.2 (after Pidhorskyi et al. 2018), in which test normals come from any split of the source. Both draws follow
    the seed. Where there are fewer anomalies than that, all of them test.

    Args:
        labels: (n,) class names of all images.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.flatnonzero(labels == normal_label), test_size=TEST_FRACTION, random_state=seed)
    anomalies = np.flatnonzero(labels != normal_label)
    if len(anomalies) < len(test):
        logger.warning("There are %d anomalies for %d normal test images: the test is not balanced", len(anomalies), len(test))
    drawn = np.random.RandomState(seed).permutation(anomalies)[: len(test)]  # NumPy's frozen generator: the same rows everywhere
    return np.sort(train), np.sort(np.concatenate([test, drawn]))


def stratified(labels: np.ndarray, normal_label: str, seed: int) -> Rows:
    """A fixed split of every class, 80 % and 20 %, the same for any seed and normal class: stands in for a source's own splits where it has none."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0)
    return np.sort(train), np.sort(test)


PROTOCOLS: dict[str, Callable[[np.ndarray, str, int], Rows]] = {"balanced": balanced, "stratified": stratified}
