"""p-values and thresholds against brute force, and the promise that they keep."""

import json
import math
import random
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_anomaly import CSIConfig, CSIModel, NotFittedError, SmallResNetConfig
from hf_anomaly.calibration import (
    Calibration,
    DriftCheck,
    Float32State,
    conformal_p_values,
    conformal_threshold,
    drift_check,
    drift_martingale,
    least_rate,
    mondrian_p_values,
    mondrian_thresholds,
    normal_map_range,
)


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
    assert p_values.tolist() == expected
    assert p_values[-1] == 1
    assert p_values[-2] == p_values[-3] == 1 / (n + 1)


def test_threshold_rank_is_exact():
    """⌈(1 − α)(n + 1)⌉ in rational numbers: in floats (1 − .05)·100 is 95.00000000000001."""
    rates = [
        "0.001", "0.01", "0.03", "0.05", "0.07", "0.1", "0.15", "0.2", "0.29", "0.3", "1/3", "0.5", "0.7", "0.9", "0.99", "0.99999999999",
    ]  # fmt: skip
    for rate, n in product(map(Fraction, rates), [*range(1, 130), 299, 999, 1999]):
        rank = math.ceil((1 - rate) * (n + 1))
        expected = math.inf if rank > n else float(rank)
        assert conformal_threshold(torch.arange(1.0, n + 1), float(rate)) == expected, (rate, n)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("n", [19, 39, 57, 99])  # 1/20 = .05: rates are met exactly
def test_flagged_means_a_p_value_of_at_most_the_rate(levels, n):
    calibration = scores(n, 1, levels).sort().values
    queries = torch.cat([scores(200, 2, levels), calibration])
    for rate in (0.03, 0.05, 0.1, 0.2, 0.25, 0.5):
        flagged = queries > conformal_threshold(calibration, rate)
        p_values = conformal_p_values(queries, calibration).tolist()
        assert flagged.tolist() == [p_value <= rate for p_value in p_values]


@pytest.mark.parametrize(("rate", "n", "needed"), [(0.01, 28, 99), (0.05, 18, 19), (0.1, 8, 9), (0.3, 2, 3), (0.07, 5, 14)])
def test_too_few_calibration_images(rate, n, needed, caplog):
    assert conformal_threshold(scores(n).sort().values, rate) == math.inf
    assert f"needs at least {needed} calibration images, have {n}" in caplog.text
    assert conformal_threshold(scores(n).sort().values, float(caplog.text.split()[-1].rstrip("."))) < math.inf
    caplog.clear()
    assert conformal_threshold(scores(needed).sort().values, rate) < math.inf
    assert conformal_threshold(scores(needed - 1).sort().values, rate) == math.inf
    assert len(caplog.records) == 1
    assert 1 / (n + 1) <= least_rate(n) < 1.01 / (n + 1)  # three digits


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


def test_what_maps_say_is_normal():
    levels = torch.tensor([[0.0, 1.0], [0.5, 4.0], [0.9, 2.0], [0.5, 3.0]])
    assert normal_map_range(levels, 0.4) == [0.5, 3]  # exceeded by one of four
    assert normal_map_range(levels, 0.05) == [0.5, 4]  # they are too few
    assert normal_map_range(torch.ones(3, 2), 0.4) == [1, 2]  # of flat maps


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


# Groups ---------------------------------------------------------------------------------------------------------------------------


def grouped(count, names, seed):
    """Scores that lie elsewhere in each group, in no order, and the groups."""
    groups = [names[i] for i in torch.randint(len(names), (count,), generator=torch.Generator().manual_seed(seed))]
    return scores(count, seed) + torch.tensor([3.0 * names.index(group) for group in groups]), groups


@pytest.mark.parametrize("names", [["a", "b", "c"], [0, 1, 2]])
def test_groups_against_brute_force(names):
    (calibration, calibration_groups), (queries, groups) = grouped(90, names, 1), grouped(40, names, 2)
    by_group = {name: sorted(s for s, g in zip(calibration.tolist(), calibration_groups, strict=True) if g == name) for name in names}
    thresholds = [by_group[g][math.ceil(Fraction(9, 10) * (len(by_group[g]) + 1)) - 1] for g in groups]
    p_values = [(1 + sum(c >= s for c in by_group[g])) / (len(by_group[g]) + 1) for s, g in zip(queries.tolist(), groups, strict=True)]
    if names[0] == 0:  # a column of numbers may come as a tensor, or an array
        groups, calibration_groups = torch.tensor(groups), np.asarray(calibration_groups)
    torch.testing.assert_close(mondrian_thresholds(groups, calibration, calibration_groups, 0.1), torch.tensor(thresholds), rtol=0, atol=0)
    torch.testing.assert_close(
        mondrian_p_values(queries, groups, calibration, calibration_groups), torch.tensor(p_values, dtype=torch.float64)
    )


def test_the_rate_holds_in_every_group():
    """One threshold for all keeps the rate on average only: the group with the higher scores pays for the other."""
    names, rate, per_group, pooled = ["scanner a", "scanner b"], 0.1, [], []
    for seed in range(300):
        (calibration, calibration_groups), (normal, groups) = grouped(118, names, 2 * seed), grouped(40, names, 2 * seed + 1)
        b = torch.tensor([group == "scanner b" for group in groups])
        per_group.append((normal > mondrian_thresholds(groups, calibration, calibration_groups, rate))[b].double().mean())
        pooled.append((normal > conformal_threshold(calibration.sort().values, rate))[b].double().mean())
    mean, error = torch.stack(per_group).mean(), torch.stack(per_group).std() / 300**0.5
    assert rate - 1 / 40 - 3 * error <= mean <= rate + 3 * error
    assert torch.stack(pooled).mean() > rate + 10 * error


def test_an_unseen_or_small_group_is_never_flagged(caplog):
    calibration, groups = torch.arange(23.0), ["seen"] * 19 + ["small"] * 4
    thresholds = mondrian_thresholds(["seen", "new", "small"], calibration, groups, 0.05)
    assert thresholds.tolist() == [18, math.inf, math.inf]
    assert "needs at least 19 calibration images in group 'new', have 0" in caplog.text
    assert "needs at least 19 calibration images in group 'small', have 4" in caplog.text
    p_values = mondrian_p_values(torch.full((3,), 99.0), ["seen", "new", "small"], calibration, groups)
    assert p_values.tolist() == pytest.approx([1 / 20, 1, 1 / 5])


def test_groups_that_do_not_fit(refused):
    with refused("calibration_groups", "2 entries for 3 scores"):
        mondrian_thresholds(["a"], torch.zeros(3), ["a", "b"], 0.1)
    with refused("groups has 1 entries for 2 scores"):
        mondrian_p_values(torch.zeros(2), ["a"], torch.zeros(1), ["a"])
    with refused("scores: number 0"):
        mondrian_p_values(torch.tensor([math.nan]), ["a"], torch.zeros(1), ["a"])
    with refused("groups: image 1 has no group"):
        mondrian_thresholds(["a", math.nan], torch.zeros(1), ["a"], 0.1)
    with refused("calibration_scores", "number 1", "not finite"):
        mondrian_thresholds(["a"], torch.tensor([0, math.nan]), ["a", "a"], 0.1)


# Drift ----------------------------------------------------------------------------------------------------------------------------


def gap(higher, lower):
    """sup (F_lower − F_higher)"""
    return max(np.mean(lower <= x) - np.mean(higher <= x) for x in (*higher, *lower))


def test_drift_against_all_divisions():
    """The p-value of a permutation test by counting: the share of all divisions of the pool with a gap at least as large."""
    incoming, calibration = scores(4, 3) + 1, scores(6, 4)
    pool = np.concatenate([incoming, calibration])
    divisions = [(pool[list(rows)], np.delete(pool, rows)) for rows in combinations(range(10), 4)]
    found = drift_check(incoming, calibration)
    for p_value, measured, gaps in (
        (found.p_higher, gap(incoming.numpy(), calibration.numpy()), [gap(a, b) for a, b in divisions]),
        (found.p_lower, gap(calibration.numpy(), incoming.numpy()), [gap(b, a) for a, b in divisions]),
    ):
        assert p_value == pytest.approx(np.mean(np.asarray(gaps) >= measured - 1e-9))
    assert found.p_value == min(1, 2 * found.p_higher)
    assert found.p_higher < found.p_lower


@pytest.mark.parametrize(("share", "allowed"), [(0, 0), (0.1, 0.1), (0.1, 0.2)])
def test_normal_images_are_seldom_called_drift(share, allowed):
    """Anomalies within their bound do not make a drift, whatever their scores."""
    p_values = []
    for seed in range(400):
        incoming = scores(50, 2 * seed)
        incoming[: int(50 * share)] = 100.0
        p_values.append(drift_check(incoming, scores(80, 2 * seed + 1), max_anomalies=allowed).p_value)
    assert np.mean(np.asarray(p_values) <= 0.1) <= 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5
    if not share:
        assert np.mean(np.asarray(p_values) <= 0.1) > 0.03  # and it is no test that never rejects


def test_drift_is_seen():
    calibration = scores(200, 1)
    anomalies = torch.full((40,), 100.0)
    higher, lower = drift_check(scores(200, 2) + 0.5, calibration), drift_check(scores(200, 2) - 0.5, calibration)
    assert higher.p_higher < 0.001 < 0.5 < higher.p_lower
    assert lower.p_lower < 0.001 < 0.5 < lower.p_higher
    assert drift_check(calibration, calibration).p_value == 1
    contaminated = torch.cat([scores(160, 2), anomalies])
    assert drift_check(contaminated, calibration).p_higher < 0.01
    allowed = drift_check(contaminated, calibration, max_anomalies=0.2)
    assert allowed.p_value > 0.05
    assert (allowed.num_incoming, allowed.num_calibration) == (160, 200)
    assert drift_check(torch.cat([scores(160, 2) - 1, anomalies]), calibration, max_anomalies=0.2).p_lower < 0.001
    for count, share, kept in ((10, 0.25, 7), (100, 0.07, 93), (1, 0.5, 1)):  # .07 · 100 is 7.000000000000001 in floats
        assert drift_check(scores(count), calibration, max_anomalies=share).num_incoming == kept
    found = [DriftCheck(p_value, p_value / 2, 1, 9, 9, 0.5, share_known=0) for p_value in (0.009, 0.01)]
    assert [check.is_found for check in found] == [True, False]


@pytest.mark.parametrize("sign", [1, -1])  # a negative similarity is a score, too
def test_the_images_that_calibrated_are_known_again(sign):
    calibration = sign * scores(200, 1)
    rounded = calibration[torch.randperm(200)] * (1 + 1e-6 * scores(200, 3).clamp(-3, 3))
    assert drift_check(rounded, calibration).share_known == 1
    assert drift_check(rounded, calibration).are_calibration_images
    for count in (80, 120):
        part = drift_check(torch.cat([rounded[:count], sign * scores(200 - count, 2)]), calibration)
        assert part.share_known == pytest.approx(count / 200, abs=0.02)
        assert part.are_calibration_images == (count == 120)
    assert not drift_check(scores(5000, 2), scores(5000, 3)).are_calibration_images  # of so many some are alike by chance
    dense = [sign * (1 + 0.03 * scores(5000, seed)) for seed in (2, 3)]
    assert drift_check(*dense).share_known == 0  # so close do these lie that half are
    assert drift_check(sign * torch.ones(9), sign * torch.ones(9)).share_known == 0  # and a detector that gives one score to all knows none
    assert drift_check(torch.ones(1), torch.ones(1)).are_calibration_images


def test_the_gap_that_can_be_seen():
    """Two samples whose distribution functions lie just so far apart are just significant."""
    n = 400
    limit = drift_check(scores(n, 1), scores(n, 2)).detectable_gap
    shifted = torch.arange(n) + round(limit * n)  # against 0 … n − 1, the gap is the shift over n
    assert drift_check(shifted.double(), torch.arange(n).double()).p_value == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("kind", [list, np.array])
def test_scores_may_be_lists_and_arrays(kind):
    x, c, groups = scores(20, 1), scores(30, 2), ["a", "b"] * 15

    def of(values):
        return kind(values.tolist())

    assert drift_check(of(x), of(c)) == drift_check(x, c)
    assert torch.equal(drift_martingale(of(x), of(c)), drift_martingale(x, c))
    assert torch.equal(mondrian_p_values(of(x), groups[:20], of(c), groups), mondrian_p_values(x, groups[:20], c, groups))
    assert torch.equal(mondrian_thresholds(groups, of(c), groups, 0.2), mondrian_thresholds(groups, c, groups, 0.2))
    for numbers in (kind([1, 2, 3]), torch.tensor([1, 2, 3]).half()):  # which the scores are not rounded to
        assert mondrian_p_values([0.9999, 1.0001], "aa", numbers, "aaa").tolist() == [1, 0.75]


def test_drift_of_nothing(refused):
    with refused("scores must be (n,) with at least one score"):
        drift_check(torch.zeros(0), torch.zeros(2))
    with refused("calibration_scores: number 0", "not finite"):
        drift_martingale(torch.zeros(2), torch.tensor([math.inf]))
    with refused("max_anomalies", "1"):
        drift_check(torch.zeros(1), torch.zeros(2), max_anomalies=1)
    with refused("jump_rate", "1.1"):
        drift_martingale(torch.zeros(1), torch.zeros(2), jump_rate=1.1)


@pytest.mark.parametrize("jump", [0, 0.1, 1])
def test_martingale_against_its_formula(jump):
    """All paths of bets of the Simple Jumper, by the sum over them."""
    incoming, calibration = [2.0, -1.0, 0.3, 4.0], [0.0, 1.0, 3.0]
    seen, p_values = list(calibration), []
    for s in incoming:  # no ties but with itself: p lies between #above/(n + 1) and that plus 1/(n + 1)
        p_values.append((sum(c > s for c in seen) / (len(seen) + 1), 1 / (len(seen) + 1)))
        seen.append(s)
    draw = random.Random(7)
    p_values = [low + draw.random() * width for low, width in p_values]

    def value(i, bet):
        """Of all that follows, from a unit of capital on `bet` before image i."""
        if i == len(p_values):
            return 1.0
        staying = [(1 - jump) * (bet == other) + jump / 3 for other in (-1, 0, 1)]
        return sum(
            share * (1 + other * (p_values[i] - 0.5)) * value(i + 1, other) for share, other in zip(staying, (-1, 0, 1), strict=True)
        )

    path = drift_martingale(torch.tensor(incoming), torch.tensor(calibration), seed=7, jump_rate=jump)
    assert path.shape == (4,)
    assert path[-1].exp().item() == pytest.approx(sum(value(0, bet) / 3 for bet in (-1, 0, 1)))


@pytest.mark.parametrize("levels", [None, 1])
def test_martingale_of_an_exchangeable_stream(levels):
    """Ville: at any time at most 10 % of them have ever reached 10."""
    reached = [
        drift_martingale(scores(150, 2 * seed, levels), scores(30, 2 * seed + 1, levels), seed=seed).max().item() >= math.log(10)
        for seed in range(200)
    ]
    assert np.mean(reached) <= 0.1


def test_martingale_sees_a_change():
    stream = torch.cat([scores(200, 1), scores(200, 2) + 1])
    path = drift_martingale(stream, scores(200, 3))
    assert path[:200].max() < math.log(20)
    assert path.max() > math.log(1000)
    assert drift_martingale(scores(3000, 1) + 9, scores(20, 2)).isfinite().all()


def test_scores_at_the_threshold_of_a_group_are_not_flagged_in_double_precision():
    scores = torch.tensor([0.7] * 40 + [0.1] * 60, dtype=torch.float64)  # rounded to float32, .7 would lie above itself
    groups = ["a"] * 100
    assert not (scores > mondrian_thresholds(groups, scores, groups, 0.05)).any()
