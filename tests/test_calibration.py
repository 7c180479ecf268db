"""p-values and thresholds against brute force, and the promise that they keep."""

import json
import math
from fractions import Fraction

import pytest
import torch
from transformers import AutoModel

from hf_anomaly import CSIConfig, CSIModel, NotFittedError, SmallResNetConfig
from hf_anomaly.calibration import Calibration, Float32State, conformal_p_values, conformal_threshold


def scores(count, seed=0, levels=None):
    """Normal deviates; with `levels`, rounded so that many are tied."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return x if levels is None else (x * levels).round() / levels


@pytest.mark.parametrize("n", [1, 2, 19, 100])
@pytest.mark.parametrize("levels", [None, 1])
def test_p_values_against_brute_force(n, levels):
    calibration = scores(n, 1, levels).sort().values
    queries = torch.cat([scores(50, 2, levels), calibration, torch.tensor([-100.0, 100.0, math.inf, -math.inf])])
    expected = [(1 + sum(c >= s for c in calibration.tolist())) / (n + 1) for s in queries.tolist()]
    p_values = conformal_p_values(queries, calibration)
    assert p_values.dtype == torch.float32
    torch.testing.assert_close(p_values, torch.tensor(expected), rtol=1e-6, atol=0)
    assert p_values[-1] == 1
    assert p_values[-2] == p_values[-3] == torch.tensor(1 / (n + 1))


@pytest.mark.parametrize(
    "rate", ["0.001", "0.01", "0.03", "0.05", "0.07", "0.1", "0.15", "0.2", "0.29", "0.3", "1/3", "0.5", "0.7", "0.9", "0.99"]
)
def test_threshold_rank_is_exact(rate):
    """⌈(1 − α)(n + 1)⌉ in rational numbers: in floats (1 − .05)·100 is 95.00000000000001."""
    exact = Fraction(rate)
    for n in [*range(1, 130), 299, 999, 1999]:
        rank = math.ceil((1 - exact) * (n + 1))
        expected = math.inf if rank > n else float(rank)
        assert conformal_threshold(torch.arange(1.0, n + 1), float(exact)) == expected, n


@pytest.mark.parametrize("levels", [None, 1])
def test_flagged_means_a_p_value_of_at_most_the_rate(levels):
    calibration = scores(57, 1, levels).sort().values
    queries = torch.cat([scores(200, 2, levels), calibration])
    for rate in (0.03, 0.1, 0.25, 0.5):
        flagged = queries > conformal_threshold(calibration, rate)
        below = conformal_p_values(queries, calibration).double() <= rate
        assert torch.equal(flagged, below)


@pytest.mark.parametrize(("rate", "n", "needed"), [(0.01, 28, 99), (0.05, 18, 19), (0.1, 8, 9), (0.3, 2, 3), (0.07, 5, 14)])
def test_too_few_calibration_images(rate, n, needed, caplog):
    assert conformal_threshold(scores(n).sort().values, rate) == math.inf
    assert f"needs at least {needed} calibration images, have {n}" in caplog.text
    caplog.clear()
    assert conformal_threshold(scores(needed).sort().values, rate) < math.inf
    assert conformal_threshold(scores(needed - 1).sort().values, rate) == math.inf
    assert len(caplog.records) == 1


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [19, 20, 50])
@pytest.mark.parametrize("levels", [None, 2])
def test_normal_images_are_flagged_at_most_at_the_rate(rate, n, levels):
    """On average over draws of the calibration images: the guarantee of conformal prediction, ties or not."""
    draws, queries = 3000, 10
    everything = scores(draws * (n + queries), 11, levels).view(draws, -1)
    calibration, normal = everything[:, :n].sort(dim=1).values, everything[:, n:]
    flagged = torch.stack([x > conformal_threshold(c, rate) for c, x in zip(calibration, normal, strict=True)]).float().mean(1)
    mean, error = flagged.mean().item(), flagged.std().item() / draws**0.5
    assert mean <= rate + 3 * error
    if levels is None:
        assert mean >= math.floor(rate * (n + 1)) / (n + 1) - 3 * error  # and not needlessly rarely


def test_fit_sorts_and_keeps_float32():
    calibration = Calibration()
    assert not calibration.is_calibrated
    calibration.fit(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64), 0.5)
    assert calibration.scores.tolist() == [1, 2, 3]
    assert calibration.scores.dtype == torch.float32
    assert calibration.threshold.item() == 2
    assert calibration.threshold_at(None) == 2
    assert calibration.threshold_at(0.25) == 3
    calibration.reset()
    assert not calibration.is_calibrated
    with pytest.raises(NotFittedError, match="calibrate"):
        calibration.threshold_at(None)


@pytest.mark.parametrize(
    ("values", "words"), [([], ["at least one"]), ([1.0, math.nan], ["image 1", "finite"]), ([math.inf], ["image 0", "finite"])]
)
def test_scores_that_cannot_calibrate(values, words, refused):
    with refused(*words):
        Calibration().fit(torch.tensor(values), 0.1)


def test_casts_and_moves_of_the_state():
    class State(Float32State):
        def __init__(self):
            super().__init__()
            self.register_buffer("exact", torch.tensor([0.1, 1e-30]))
            self.register_buffer("count", torch.tensor([3]))

    state = State()
    torch.nn.Sequential(torch.nn.Linear(1, 1), state).to(torch.bfloat16)
    assert torch.equal(state.exact, torch.tensor([0.1, 1e-30]))
    assert state.count.dtype == torch.int64
    assert state.to("meta", torch.float16).exact.is_meta
    assert state.exact.dtype == torch.float32


def test_an_infinite_threshold_survives_saving(tmp_path):
    config = CSIConfig(image_size=8, projection_size=4, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))
    model = CSIModel(config).eval()
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    model.fit_reference([x], progress=False)
    model.calibrate([x], false_positive_rate=0.01, progress=False)
    assert model.calibration.threshold.item() == math.inf
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # no Infinity
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.calibration.threshold.item() == math.inf
    assert loaded.config.false_positive_rate == 0.01
    assert not loaded.is_anomalous(torch.tensor([1e30])).any()
    assert loaded.is_anomalous(torch.tensor([1e30]), 0.5).all()
    assert loaded.p_values(torch.tensor([1e30])).item() == pytest.approx(1 / 6)
