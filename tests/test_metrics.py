import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_anomaly.errors import InputError
from hf_anomaly.metrics import ImageAnomalyMetrics, image_level, image_metrics

SCORES = [0.9, 0.8, 0.7, 0.4, 0.3, 0.1]
LABELS = [1, 0, 1, 0, 1, 0]
# By hand: of the 9 pairs (anomaly, normal), .9 wins 3, .7 wins 2, .3 wins 1. Precision at the three anomalies 1/1, 2/3, 3/5. All
# anomalies are found at the threshold .3, which flags 2 of 3 normals.
EXPECTED = {"auroc": 6 / 9, "average_precision": (1 + 2 / 3 + 3 / 5) / 3, "fpr_at_95_tpr": 2 / 3}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_values_by_hand(kind):
    assert image_metrics(kind(SCORES), kind(LABELS)) == pytest.approx(EXPECTED, rel=1e-12)


def test_higher_means_more_anomalous():
    assert image_metrics([0.1, 0.2], [0, 1]) == {"auroc": 1.0, "average_precision": 1.0, "fpr_at_95_tpr": 0.0}
    assert image_metrics([0.1, 0.2], [1, 0]) == {"auroc": 0.0, "average_precision": 0.5, "fpr_at_95_tpr": 1.0}


def test_95_percent_is_enough_and_less_is_not():
    # 20 anomalies; the lowest one is below all normals, so 19 / 20 = 95 % are found without a false positive.
    scores, labels = [*range(2, 21), -1, 0, 1], [1] * 20 + [0] * 2
    assert image_metrics(scores, labels)["fpr_at_95_tpr"] == 0.0
    assert image_metrics(scores[1:], labels[1:])["fpr_at_95_tpr"] == 1.0  # 18 / 19 < 95 %


def test_ties_count_half():
    assert image_metrics([0.5, 0.5], [0, 1]) == {"auroc": 0.5, "average_precision": 0.5, "fpr_at_95_tpr": 1.0}


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


def test_evaluate_metric_keeps_double_precision(tmp_path):
    metric = ImageAnomalyMetrics(cache_dir=tmp_path)
    assert metric.compute(predictions=SCORES, references=LABELS) == pytest.approx(EXPECTED, rel=1e-12)
    for start in (0, 3):
        metric.add_batch(predictions=np.array(SCORES[start : start + 3]), references=torch.tensor(LABELS[start : start + 3]))
    assert metric.compute() == pytest.approx(EXPECTED, rel=1e-12)
    # One ulp of float64 apart: float32 would make a tie of AUROC 0.5.
    assert metric.compute(predictions=[1.0, np.nextafter(1.0, 2.0)], references=[0, 1])["auroc"] == 1.0
    with pytest.raises(InputError, match=r"^scores: row 1 .*nan"):
        metric.compute(predictions=[0.5, float("nan")], references=[0, 1])


def run_python(program, **environment):
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=600)


def test_evaluate_loads_the_file_without_a_network(tmp_path):
    program = f"""
import evaluate
metric = evaluate.load({image_level.__file__!r})
print(metric.compute(predictions={SCORES}, references={LABELS})["auroc"])
"""
    run = run_python(program, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(EXPECTED["auroc"])


def test_importing_the_package_does_not_import_evaluate():
    run = run_python("import sys, hf_anomaly.metrics; print({'evaluate', 'datasets', 'sklearn'} & set(sys.modules))")
    assert run.stdout.strip() == "set()", run.stderr
