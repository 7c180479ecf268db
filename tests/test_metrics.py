import math

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from hf_anomaly.errors import InputError
from hf_anomaly.metrics import balanced_accuracy, bootstrap_intervals, functional, image_level, image_metrics, metrics_by_class, pixel_level

SCORES = [0.9, 0.8, 0.7, 0.4, 0.3, 0.1]
LABELS = [1, 0, 1, 0, 1, 0]
# By hand: of the 9 pairs (anomaly, normal), .9 wins 3, .7 wins 2, .3 wins 1. Precision at the three anomalies 1/1, 2/3, 3/5. All
# anomalies are found at the threshold .3, which flags 2 of 3 normals. F1 at .3: precision 3/5, recall 1; at .7 it is 2/3.
EXPECTED = {"auroc": 6 / 9, "average_precision": (1 + 2 / 3 + 3 / 5) / 3, "fpr_at_95_tpr": 2 / 3, "f1_max": 6 / 8}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_values_by_hand(kind):
    assert image_metrics(kind(SCORES), kind(LABELS)) == pytest.approx(EXPECTED, rel=1e-12)


def test_scores_of_a_model_in_training_and_in_half_and_double_precision():
    scores = torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16, requires_grad=True)
    assert image_metrics(scores, torch.tensor([0, 1, 0, 1]))["auroc"] == 0.75
    assert image_metrics(1 + 1e-12 * scores.double(), torch.tensor([0, 1, 0, 1]))["auroc"] == 0.75


def test_higher_means_more_anomalous():
    assert image_metrics([0.1, 0.2], [0, 1]) == {"auroc": 1, "average_precision": 1, "fpr_at_95_tpr": 0, "f1_max": 1}
    assert image_metrics([0.1, 0.2], [1, 0]) == {"auroc": 0, "average_precision": 0.5, "fpr_at_95_tpr": 1, "f1_max": 2 / 3}


def test_no_error_is_1_and_not_more():
    for num_anomalous in range(1, 60):
        labels = np.array([0] * 12 + [1] * num_anomalous)
        metrics = image_metrics(np.arange(len(labels)), labels)
        assert metrics == pytest.approx({"auroc": 1, "average_precision": 1, "fpr_at_95_tpr": 0, "f1_max": 1}, rel=1e-12)
        assert max(metrics.values()) <= 1


def test_95_percent_is_enough_and_less_is_not():
    # 20 anomalies; the lowest one is below all normals, so 19 / 20 = 95 % are found without a false positive.
    scores, labels = [*range(2, 21), -1, 0, 1], [1] * 20 + [0] * 2
    assert image_metrics(scores, labels)["fpr_at_95_tpr"] == 0.0
    assert image_metrics(scores[1:], labels[1:])["fpr_at_95_tpr"] == 1.0  # 18 / 19 < 95 %
    # An anomaly and a normal at each of 20 scores: the curve is a straight line, and 19 of them lie within it.
    assert image_metrics([*range(20)] * 2, [0] * 20 + [1] * 20)["fpr_at_95_tpr"] == 0.95


def test_by_class():
    classes = ["dent", "good", "scratch", "good", "dent", "fine"]
    results = metrics_by_class(SCORES, LABELS, classes, threshold=0.7)
    # Of the 3 normals (.8, .4, .1) the dent of .9 beats 3 and that of .3 one; the scratch of .7 beats two. Above .7 lies one dent.
    assert results == {
        "dent": {"num_images": 2, "auroc": pytest.approx(4 / 6), "true_positive_rate_at_threshold": 0.5},
        "scratch": {"num_images": 1, "auroc": pytest.approx(2 / 3), "true_positive_rate_at_threshold": 0.0},
    }
    assert list(results) == ["dent", "scratch"]
    with pytest.raises(InputError, match=r"^threshold: NaN"):
        metrics_by_class(SCORES, LABELS, classes, math.nan)
    assert metrics_by_class([0.1, 0.2], [1, 1], ["a", "b"]) == {name: {"num_images": 1, "auroc": None} for name in "ab"}
    assert metrics_by_class([0.1, 0.2], [0, 0], ["a", "b"]) == {}
    with pytest.raises(InputError, match="classes: 1 rows, but scores have 2"):
        metrics_by_class([0.1, 0.2], [0, 1], ["a"])


def test_ties_count_half():
    assert image_metrics([0.5, 0.5], [0, 1]) == {"auroc": 0.5, "average_precision": 0.5, "fpr_at_95_tpr": 1, "f1_max": 2 / 3}


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_values(label):
    assert image_metrics([0.1, 0.2], [label, label]) == dict.fromkeys(EXPECTED)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, float("nan"), 0.3], [0, 1, 1], "^scores: row 1 .*nan"),
        ([0.1, 0.2, float("inf")], [0, 1, 1], "^scores: row 2 .*inf"),
        ([0.1, None], [0, 1], "^scores: row 1"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "^labels: row 2 .*has 2"),
        ([0.1, 0.2], [-1, 1], "^labels: row 0 .*has -1"),
        ([0.1, 0.2], [0.5, 1], "^labels: row 0 .*has 0.5"),
        ([0.1, 0.2], ["normal", "anomaly"], "^labels: .*normal"),
        ([0.1, 0.2], [0], "^scores: 2 rows, but labels have 1"),
        ([[0.1], [0.2]], [0, 1], r"^scores: shape \(2, 1\)"),
        ([0.1, 0.2], [[0], [1]], r"^labels: shape \(2, 1\)"),
        ([], [], "^scores: no rows"),
    ],
)
def test_errors_name_the_row(scores, labels, message):
    with pytest.raises(InputError, match=message) as error:
        image_metrics(scores, labels)
    assert "\n" not in str(error.value)


def tied_scores(seed, count):
    """Scores on a grid, so that many are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) < count // 3).astype(int)
    return np.round(rng.normal(size=count) + labels, 1), labels


def test_best_f1_is_that_of_a_loop_over_thresholds():
    scores, labels = tied_scores(0, 80)
    by_threshold = [f1_score(labels, scores >= threshold) for threshold in np.unique(scores)]
    assert image_metrics(scores, labels)["f1_max"] == pytest.approx(max(by_threshold), rel=1e-12)


# Decisions at a threshold


def test_balanced_accuracy_is_scikit_learns():
    scores, labels = tied_scores(1, 60)
    for threshold in (scores[0], scores[labels == 1].max(), 0.123):  # strictly above: a score at the threshold is not flagged
        expected = balanced_accuracy_score(labels, scores > threshold)
        assert balanced_accuracy(scores, labels, threshold) == pytest.approx(expected, rel=1e-12)
        assert image_metrics(scores, labels, threshold)["balanced_accuracy_at_threshold"] == pytest.approx(expected, rel=1e-12)
    assert balanced_accuracy([0, 1, 1], [0, 0, 1], 0.5) == 0.75  # verdicts
    assert balanced_accuracy([0, 1, 1], [0, 0, 1], torch.tensor(0.5)) == 0.75  # as a detector has its own


def test_a_threshold_that_flags_nothing_or_all_is_a_coin():
    assert balanced_accuracy(SCORES, LABELS, math.inf) == balanced_accuracy(SCORES, LABELS, -math.inf) == 0.5


def test_balanced_accuracy_without_a_value():
    assert balanced_accuracy([0.1, 0.2], [0, 0], 0.5) is None
    assert image_metrics([0.1, 0.2], [0, 0], 0.5)["balanced_accuracy_at_threshold"] is None
    with pytest.raises(InputError, match=r"^threshold: NaN"):
        balanced_accuracy(SCORES, LABELS, math.nan)


# Intervals


def test_the_bootstraps_arithmetic_is_scikit_learns():
    """Metrics from numbers of images at each score, against the same images written out."""
    scores, labels = tied_scores(2, 40)
    distinct, level = np.unique(-scores, return_inverse=True)
    rng = np.random.default_rng(3)
    counts = [functional._resampled(level[labels == label], len(distinct), 20, rng) for label in (0, 1)]
    values = functional._metrics_of_counts(*counts)
    for row in range(20):
        assert [count[row].sum() for count in counts] == [(labels == 0).sum(), (labels == 1).sum()]
        drawn_scores = np.concatenate([np.repeat(-distinct, count[row]) for count in counts])
        drawn_labels = np.repeat([0, 1], [count[row].sum() for count in counts])
        expected = roc_auc_score(drawn_labels, drawn_scores), average_precision_score(drawn_labels, drawn_scores)
        assert tuple(values[:, row]) == pytest.approx(expected, rel=1e-12)


def test_intervals_are_those_of_a_loop(monkeypatch):
    scores, labels = tied_scores(4, 60)
    rng, slow = np.random.default_rng(5), []
    for _ in range(400):
        rows = np.concatenate([rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)])
        slow.append([roc_auc_score(labels[rows], scores[rows]), average_precision_score(labels[rows], scores[rows])])
    expected = np.quantile(slow, [0.05, 0.95], axis=0).T  # its own error is about .006
    monkeypatch.setattr(functional, "_VALUES_AT_ONCE", 60 * 700)  # several parts
    intervals = bootstrap_intervals(scores, labels, confidence=0.9, resamples=5000)
    for name, ends in zip(("auroc", "average_precision"), expected, strict=True):
        assert intervals[name] == pytest.approx(ends, abs=0.03)
        assert intervals[name][0] < image_metrics(scores, labels)[name] < intervals[name][1]


@pytest.mark.parametrize("confidence", [0.6, 0.9])
def test_intervals_hold_that_share_of_other_draws(confidence):
    scores, labels = tied_scores(4, 60)
    intervals = bootstrap_intervals(scores, labels, confidence=confidence, resamples=4000)
    distinct, level = np.unique(-scores, return_inverse=True)
    rng = np.random.default_rng(7)
    counts = [functional._resampled(level[labels == label], len(distinct), 4000, rng) for label in (0, 1)]
    for values, (low, high) in zip(functional._metrics_of_counts(*counts), intervals.values(), strict=True):
        assert np.mean(values < low) == pytest.approx((1 - confidence) / 2, abs=0.02)
        assert np.mean(values > high) == pytest.approx((1 - confidence) / 2, abs=0.02)


def test_intervals_cover_the_true_value():
    """Of 200 test sets about 95 % have the true AUROC, Φ(1/√2) = .760, in the interval; percentiles fall a little short."""
    rng, labels = np.random.default_rng(6), np.repeat([0, 1], [60, 40])
    covered = []
    for _ in range(200):
        low, high = bootstrap_intervals(rng.normal(size=100) + labels, labels, resamples=400)["auroc"]
        covered.append(low <= 0.7602 <= high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_intervals_follow_the_seed():
    first = bootstrap_intervals(SCORES, LABELS, resamples=50, seed=1)
    assert first == bootstrap_intervals(SCORES, LABELS, resamples=50, seed=1) != bootstrap_intervals(SCORES, LABELS, resamples=50, seed=2)


def test_intervals_at_the_edges():
    assert bootstrap_intervals([0.1, 0.2], [0, 0]) == {"auroc": None, "average_precision": None}
    assert bootstrap_intervals([0.5, 0.5], [0, 1]) == {"auroc": (0.5, 0.5), "average_precision": (0.5, 0.5)}
    assert bootstrap_intervals([0, 1, 2, 3], [0, 0, 1, 1])["auroc"] == (1, 1)
    low, high = bootstrap_intervals(SCORES, LABELS, resamples=1)["auroc"]
    assert low == high
    for wrong, message in (({"confidence": 1}, "confidence"), ({"resamples": 0}, "resamples")):
        with pytest.raises(InputError, match=message):
            bootstrap_intervals(SCORES, LABELS, **wrong)
    with pytest.raises(InputError, match=r"^scores: row 1"):
        bootstrap_intervals([0.1, math.nan], [0, 1])


# The evaluate library


def test_evaluate_metric_keeps_double_precision(tmp_path):
    metric = image_level.ImageAnomalyMetrics(cache_dir=tmp_path)
    assert metric.compute(predictions=SCORES, references=LABELS) == pytest.approx(EXPECTED, rel=1e-12)
    for start in (0, 3):
        metric.add_batch(predictions=np.array(SCORES[start : start + 3]), references=torch.tensor(LABELS[start : start + 3]))
    assert metric.compute() == pytest.approx(EXPECTED, rel=1e-12)
    # One ulp of float64 apart: float32 would make a tie of AUROC 0.5.
    assert metric.compute(predictions=[1.0, np.nextafter(1.0, 2.0)], references=[0, 1])["auroc"] == 1.0
    with pytest.raises(InputError, match=r"^scores: row 1 .*nan"):
        metric.compute(predictions=[0.5, float("nan")], references=[0, 1])
    with pytest.raises(InputError, match=r"^labels: row 1 .*0\.7"):  # not cut down to 0
        metric.compute(predictions=[0.1, 0.2, 0.3], references=[0, 0.7, 1])


def test_evaluate_metric_takes_threshold_and_confidence(tmp_path):
    metrics = image_level.ImageAnomalyMetrics(cache_dir=tmp_path).compute(
        predictions=SCORES, references=LABELS, threshold=0.5, confidence=0.9, resamples=100, seed=1
    )
    intervals = bootstrap_intervals(SCORES, LABELS, confidence=0.9, resamples=100, seed=1)
    expected = image_metrics(SCORES, LABELS, 0.5) | {f"{name}_interval": interval for name, interval in intervals.items()}
    assert metrics == expected


def test_evaluate_loads_the_files_without_a_network(tmp_path):
    metric = evaluate.load(image_level.__file__, cache_dir=tmp_path)
    assert metric.compute(predictions=SCORES, references=LABELS)["auroc"] == pytest.approx(EXPECTED["auroc"])
    metric = evaluate.load(pixel_level.__file__, cache_dir=tmp_path, center=0.5)
    halves = {"predictions": [SCORES[:3], SCORES[3:]], "references": [LABELS[:3], LABELS[3:]]}
    assert metric.compute(**halves)["pixel_auroc"] == pytest.approx(EXPECTED["auroc"])
