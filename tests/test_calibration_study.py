"""The false-alarm rates of many divisions: theory against counting, and whether the study would see a wrong threshold."""

import gzip
import json
import math
import struct
from itertools import combinations

import numpy as np
import pytest
import torch
from commands.running import run

from hf_anomaly import ADDPConfig, ADDPModel, CSIConfig, CSIModel, DIAConfig, DIAModel, SharedAEConfig, SharedAEModel, SmallResNetConfig
from hf_anomaly.calibration import conformal_rank
from hf_anomaly.reproduction import calibration_study
from hf_anomaly.reproduction.calibration_study import divided_rates, expectation, findings

POOL = np.random.default_rng(5).lognormal(size=399).astype(np.float32)
N, M = 199, 200


def verdicts(scores, **options):
    return [found.holds for found in findings(divided_rates(scores, **options), len(scores) // 2, len(scores) - len(scores) // 2)]


@pytest.mark.parametrize(("n", "m", "rate"), [(5, 4, 0.3), (4, 4, 0.2), (7, 2, 0.5)])
def test_theory_against_all_divisions(n, m, rate):
    """Of a fixed pool, by the formula: the threshold is the ⌈(1 − α)(n + 1)⌉-th of the n smallest first."""
    pool = np.random.default_rng(n).normal(size=n + m)
    counts = []
    for rows in combinations(range(n + m), n):
        threshold = sorted(pool[list(rows)])[math.ceil((1 - rate) * (n + 1) - 1e-9) - 1]
        counts.append(np.mean(np.delete(pool, rows) > threshold))
    expected = expectation(n, m, rate)
    assert expected.mean == pytest.approx(np.mean(counts))
    assert expected.std == pytest.approx(np.std(counts))
    assert np.mean((np.asarray(counts) >= expected.low - 1e-9) & (np.asarray(counts) <= expected.high + 1e-9)) >= 0.95
    assert expected.mean <= rate


def test_the_rates_are_those_asked_for():
    measured = divided_rates(POOL)
    assert measured.shape == (200, 3)
    results = findings(measured, N, M)
    assert [found.holds for found in results] == [True] * 3
    for found in findings(divided_rates(POOL, divisions=2000), N, M):
        assert found.holds
        assert found.std == pytest.approx(found.expected.std, rel=0.1)
        assert found.inside >= 0.94
    assert np.array_equal(measured, divided_rates(POOL))
    assert not np.array_equal(measured, divided_rates(POOL, seed=1))


@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_rank_is_seen(error, monkeypatch):
    def wrong(scores, rate):
        return scores[min(conformal_rank(len(scores), rate) - 1 + error, len(scores) - 1)].item()

    monkeypatch.setattr(calibration_study, "conformal_threshold", wrong)
    assert not all(verdicts(POOL))


def test_tied_scores_are_not_flagged_more_often(monkeypatch):
    """Many equal scores: strictly above the threshold keeps the rate, at or above it would not."""
    tied = (POOL.argsort().argsort() // 20).astype(np.float32)
    assert (divided_rates(tied).mean(0) <= [0.01, 0.05, 0.1]).all()
    right = calibration_study.conformal_threshold
    monkeypatch.setattr(calibration_study, "conformal_threshold", lambda *values: right(*values) - 0.5)
    assert (divided_rates(tied).mean(0) > [0.01, 0.05, 0.1]).all()


def test_a_seed_that_cannot_be(refused, tmp_path):
    for seed in (-1, 2**32):
        with refused("--seeds", seed):
            calibration_study.CalibrationStudy(output_dir=tmp_path, seed=seed).pairs()


def test_too_few_scores(refused):
    with refused("98 calibration scores", "0.01"):
        expectation(98, 100, 0.01)
    assert expectation(99, 100, 0.01).mean == pytest.approx(0.01)


def tiny(kind, config, **settings):
    return kind(config(image_size=12, **settings))


RESNET = {"backbone_config": SmallResNetConfig(hidden_sizes=[8], depths=[1]), "projection_size": 8, "num_test_views": 2}
TINY = {
    "addp": lambda: tiny(ADDPModel, ADDPConfig, hidden_sizes=[8, 8], latent_size=2),
    "csi": lambda: tiny(CSIModel, CSIConfig, **RESNET),
    "dia": lambda: tiny(DIAModel, DIAConfig, **RESNET),
    "shared_ae": lambda: tiny(SharedAEModel, SharedAEConfig, hidden_sizes=[8, 8, 8], latent_size=8),
}


@pytest.mark.parametrize("name", TINY)
def test_with_every_detector(name):
    """Their own scores, ties and all."""
    assert set(TINY) == set(calibration_study.DETECTORS)
    torch.manual_seed(0)
    model = TINY[name]().eval()
    draw = torch.Generator().manual_seed(1)
    batches = [torch.rand(66, 1, 12, 12, generator=draw) * torch.rand(66, 1, 1, 1, generator=draw) * 2 - 1 for _ in range(7)]
    model.fit_reference(batches[:1], progress=False)
    scores = model.score(batches[1:], progress=False)[0].numpy()
    assert verdicts(scores) == [True] * 3


def test_from_the_command_line(tmp_path):
    (tmp_path / "fashion-mnist").mkdir()
    draw = np.random.default_rng(0)
    for prefix, n in (("train", 420), ("t10k", 30)):
        labels = np.repeat([0, 1], n).astype(np.uint8)
        pixels = draw.integers(0, 256, (2 * n, 8, 8), dtype=np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            (tmp_path / "fashion-mnist" / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))

    def study(*argv):
        options = ["--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--budget", "smoke", "--datasets", "fashion_mnist"]
        return run("reproduce.py", "--table", "calibration", *options, *argv)

    status, out, err = study("--methods", "shared_ae")
    assert status == 0, err
    assert out.count("| pass |") == 3
    assert "| Fashion-MNIST | SharedAE | 105 + 105 | 5 % | 4.72 %, " in out
    assert "| Fashion-MNIST | SharedAE | 210 + 30 |" in out
    (scores,) = (tmp_path / "out" / "calibration").iterdir()
    record = json.loads(scores.read_text())
    assert (len(record["held_out"]), len(record["test"]), record["train"], record["steps"]) == (210, 30, 210, 2)
    lines = (tmp_path / "out" / "calibration.csv").read_text().splitlines()
    assert lines[0] == "dataset,detector,division,rate_0.01,rate_0.05,rate_0.1"
    assert len(lines) == 201
    before = scores.stat().st_mtime_ns
    assert study("--methods", "shared_ae")[1] == out  # from the stored scores
    assert scores.stat().st_mtime_ns == before
    other = {**record["settings"], "held_out": 0.3}
    scores.write_text(json.dumps({**record, "settings": other}))
    assert study("--methods", "shared_ae")[1] == out  # trained again
    assert json.loads(scores.read_text())["settings"] == record["settings"]
    for words in (("--dry_run",), ("--shard", "1/2")):
        assert "--dry_run and --shard are of a paper's tables" in study("--methods", "shared_ae", *words)[2]
    status, _, err = study("--methods", "nope")
    assert status == 2
    assert "has no method 'nope'; it has: csi, dia, shared_ae, addp" in err.splitlines()[-1]
