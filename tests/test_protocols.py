"""Protocols that pool a source's splits, and fewer training images."""

import runpy
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_anomaly import InputError
from hf_anomaly.data import load_one_class
from hf_anomaly.data.protocols import PROTOCOLS, balanced, stratified

datasets.disable_progress_bars()

PER_CLASS = {"train": 10, "val": 2, "test": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three classes of 20 images in three splits; the grey level of an image is its number in the pool."""
    path, start, arrays = tmp_path_factory.mktemp("protocols") / "x.npz", 0, {}
    for split, count in PER_CLASS.items():
        n = 3 * count
        arrays[f"{split}_images"] = np.broadcast_to(np.arange(start, start + n, dtype=np.uint8)[:, None, None], (n, 8, 8))
        arrays[f"{split}_labels"] = np.arange(n) % 3
        start += n
    np.savez(path, **arrays)
    return path


def rows(split):
    return split["row"][:]


def load(source, **options):
    return load_one_class(source, **{"normal_label": 1, "calibration_fraction": 0.25} | options)


def test_balanced(source):
    splits = load(source, protocol="balanced")
    normals = set(range(1, 60, 3))  # all splits have a multiple of three images
    train, calibration, test = (rows(split) for split in (splits.train, splits.calibration, splits.test))
    assert (len(train), len(calibration), len(test)) == (12, 4, 8)
    assert set(train) | set(calibration) | (set(test) & normals) == normals
    assert not set(train) & set(calibration)
    assert not (set(train) | set(calibration)) & set(test)
    assert [int(row not in normals) for row in test] == splits.test["label"][:]
    assert sum(splits.test["label"][:]) == 4
    assert {row % 3 for seed in range(5) for row in rows(load(source, protocol="balanced", seed=seed).test)} == {0, 1, 2}
    for split in (splits.train, splits.calibration, splits.test):  # the row is the image's number in the pool
        assert [value["bytes"][-1] for value in split["image"]] == rows(split)


def test_stratified_is_the_same_for_all(source):
    first, other = (load(source, protocol="stratified", seed=seed, normal_label=label) for seed, label in ((0, 1), (3, 2)))
    assert rows(first.test) == rows(other.test)
    assert np.bincount(np.asarray(rows(first.test)) % 3).tolist() == [4, 4, 4]
    assert sum(first.test["label"][:]) == 8
    assert len(first.train) + len(first.calibration) == 16
    assert not set(rows(first.train) + rows(first.calibration)) & set(rows(first.test))


def test_draws_follow_the_seed(source):
    hashes = {}
    for protocol in ("official", "balanced", "stratified"):
        first, again, other = (load(source, protocol=protocol, seed=seed) for seed in (0, 0, 1))
        assert first.split_hash == again.split_hash != other.split_hash
        hashes[protocol] = first.split_hash
    assert len(set(hashes.values())) == 3
    assert rows(load(source, protocol="balanced", seed=0).test) != rows(load(source, protocol="balanced", seed=1).test)
    assert rows(load(source, seed=0).test) == rows(load(source, seed=1).test) == list(range(24))
    few = {"max_train_images": 3, "calibration_fraction": 0}  # of the same images
    assert len({tuple(rows(load(source, seed=seed, **few).train)) for seed in range(3)}) > 1


@pytest.mark.parametrize("protocol", ["official", "balanced"])
def test_fewer_training_images_are_nested(source, protocol):
    whole = load(source, protocol=protocol)
    numbers = (1, 3, 5, 100)
    few = {n: load(source, protocol=protocol, max_train_images=n) for n in numbers}
    assert [len(few[n].train) for n in numbers] == [1, 3, 5, len(whole.train)]
    for less, more in pairwise(numbers):
        assert set(rows(few[less].train)) < set(rows(few[more].train)) <= set(rows(whole.train))
    for splits in few.values():
        assert rows(splits.calibration) == rows(whole.calibration)
        assert rows(splits.test) == rows(whole.test)
    assert len({splits.split_hash for splits in few.values()}) == 4
    assert few[100].split_hash == whole.split_hash
    assert len({tuple(rows(load(source, protocol=protocol, max_train_images=3, seed=seed).train)) for seed in range(5)}) > 1


def test_evaluation_takes_the_test_images_of_the_training_run(source):
    for protocol in PROTOCOLS:
        trained, evaluated = load(source, protocol=protocol, seed=2), load(source, protocol=protocol, seed=2, evaluation_only=True)
        assert evaluated.train is evaluated.calibration is None
        assert rows(evaluated.test) == rows(trained.test)


def test_only_arrays_that_are_taken_are_encoded():
    """An array with rows of different lengths, which is no image: nobody notices unless it is among those that test."""
    labels = ["normal"] * 20 + ["bad"] * 4
    found = []
    for broken in range(20):
        pixels = [[[i, 1], [1] if i == broken else [1, 1]] for i in range(24)]
        features = datasets.Features({"image": datasets.List(datasets.List(datasets.Value("uint8"))), "label": datasets.Value("string")})
        pool = datasets.Dataset.from_dict({"image": pixels, "label": labels}, features=features)
        try:
            load_one_class(pool, protocol="balanced", evaluation_only=True)
        except InputError:
            found.append(broken)
    assert found == [
        row for row in rows(load_one_class(pool.select([*range(19), 0, *range(20, 24)]), protocol="balanced").test) if row < 20
    ]


def test_pooled_rows_are_pinned():
    labels = np.array(list("aab") * 10)
    test = balanced(labels, "b", 0)
    train = np.setdiff1d(np.flatnonzero(labels == "b"), test)
    assert [part.tolist() for part in (train, test)] == [[2, 5, 11, 14, 17, 20, 23, 29], [1, 8, 26, 27]]
    assert stratified(labels, "b", 0).tolist() == [0, 4, 18, 20, 22, 23]


def test_fewer_anomalies_than_normals(caplog):
    test = balanced(np.array(["normal"] * 20 + ["odd"] * 2), "normal", 0)
    train = np.setdiff1d(np.arange(20), test)
    assert (len(train), len(test)) == (16, 6)
    assert "2 anomalies for 4 normal" in caplog.text
    caplog.clear()
    assert len(balanced(np.array(["normal"] * 20 + ["odd"] * 4), "normal", 0)) == 8
    assert not caplog.records, "as many as are wanted"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "blanced"}, ("'blanced'", "official", "balanced", "stratified")),
        ({"max_train_images": 0}, ("max_train_images", "at least 1")),
        ({"protocol": "balanced", "normal_label": 7}, ("normal_label=7",)),
    ],
)
def test_bad_options(source, refused, options, words):
    with refused(*words):
        load(source, **options)


def test_sources_that_cannot_be_pooled(tmp_path, refused):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "unlabelled.npz", train_images=images, test_images=images, test_labels=[0, 0, 1, 1])
    with refused("row 0 (counted from 0) of all splits of", "unlabelled.npz", "no label"):
        load_one_class(tmp_path / "unlabelled.npz", protocol="balanced", normal_label=0)
    np.savez(tmp_path / "bare.npz", train_images=images)
    with refused("bare.npz", "label_column", "'balanced'"):
        load_one_class(tmp_path / "bare.npz", protocol="balanced")
    np.savez(tmp_path / "few.npz", train_images=images, train_labels=[0, 1, 1, 1])
    for protocol in PROTOCOLS:
        with refused("few.npz", "too few images", protocol):
            load_one_class(tmp_path / "few.npz", protocol=protocol, normal_label=0)


def test_evaluate_asks_for_the_seed_of_drawn_test_images(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "scripts" / "evaluate.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--model", "none", "--dataset_name", "digits", "--protocol", "balanced"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 2
    assert "--protocol balanced" in capsys.readouterr().err
