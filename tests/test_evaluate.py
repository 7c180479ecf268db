"""scripts/evaluate.py: which class is normal, and data without a training split."""

import csv
import json
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SmallResNetConfig, image_metrics, load_one_class
from hf_anomaly.training import evaluation
from hf_anomaly.training.evaluation import draw_figures, evaluate_detector


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A fitted one, trained on images that were called "fine"."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    model = CSIModel(CSIConfig(image_size=8, normal_label="fine", backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).eval()
    model.fit_reference([{"pixel_values": torch.rand(4, 1, 8, 8) * 2 - 1}])
    model.save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(detector, tmp_path, run_evaluation):
    """Evaluates folders of these names with as many images; gives the exit status, the results and the log."""

    def evaluate(counts, *argv, model=detector, dataset=tmp_path, **options):
        for name, count in counts.items():
            (tmp_path / name).mkdir(parents=True)
            for i in range(count):
                array = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
                PIL.Image.fromarray(array).save(tmp_path / name / f"{i}.png")
        return run_evaluation(model, dataset, *argv, *(word for name, value in options.items() for word in (f"--{name}", str(value))))

    return evaluate


@pytest.mark.parametrize("parent", ["test", "."])  # a test split alone, and a source without splits
def test_the_class_that_the_detector_was_trained_on_is_normal(evaluate, parent, caplog):
    status, results, err = evaluate({f"{parent}/fine": 3, f"{parent}/good": 2})  # by itself "good" would be taken
    assert status == 0, err
    assert (results["normal_label"], results["num_normal"], results["num_anomalous"]) == ("fine", 3, 2)
    assert results["auroc"] is not None
    assert "trained on 'fine'" not in caplog.text


def test_another_normal_class_is_warned_of(evaluate, caplog):
    status, results, err = evaluate({"test/fine": 3, "test/good": 2}, "--normal_label", "good")
    assert status == 0, err
    assert (results["normal_label"], results["num_normal"], results["num_anomalous"]) == ("good", 2, 3)
    assert "Normal is 'good' here, but the detector was trained on 'fine'" in caplog.text


def test_without_that_class_one_that_is_normal_by_its_name_is_taken(evaluate, caplog):
    status, results, err = evaluate({"test/Good": 2, "test/hole": 3})
    assert status == 0, err
    assert (results["normal_label"], results["num_normal"], results["num_anomalous"]) == ("Good", 2, 3)
    assert "Normal is 'Good' here, but the detector was trained on 'fine'" in caplog.text


@pytest.mark.parametrize("names", [("ok", "hole"), ("good", "normal")])
def test_without_that_class_a_choice_is_left_to_the_user(evaluate, names):
    status, results, err = evaluate({f"test/{name}": 1 for name in names})
    assert (status, results) == (2, None)
    first, second = sorted(names)
    assert "error: normal_label='fine' is no label of" in err.splitlines()[-1]
    assert f"its labels: {first!r} (1), {second!r} (1); say with --normal_label which" in err.splitlines()[-1]


def test_a_class_that_was_asked_for_is_not_replaced(evaluate):
    status, results, err = evaluate({"test/good": 1, "test/hole": 1}, "--normal_label", "nice")
    assert (status, results) == (2, None)
    assert "error: normal_label='nice' is no label of" in err.splitlines()[-1]


def test_a_detector_of_images_without_labels_has_no_other_class(evaluate, detector, tmp_path, caplog):
    model = CSIModel.from_pretrained(detector)
    model.config.normal_label = "normal"
    model.save_pretrained(tmp_path / "model")
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(tmp_path / "model")
    status, results, err = evaluate({"images/test/good": 2, "images/test/hole": 1}, model=tmp_path / "model", dataset=tmp_path / "images")
    assert status == 0, err
    assert results["normal_label"] == "good"
    assert "was trained on" not in caplog.text


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_table_of_scores(evaluate, detector, tmp_path, calibrated):
    model = CSIModel.from_pretrained(detector)
    if calibrated:
        model.calibrate([{"pixel_values": torch.rand(30, 1, 8, 8) * 2 - 1}])
    model.save_pretrained(tmp_path / "model")
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(tmp_path / "model")
    images, scores = tmp_path / "images", tmp_path / "new" / "scores.csv"
    status, results, err = evaluate({"images/test/fine": 3, "images/test/hole": 2}, model=tmp_path / "model", dataset=images, scores=scores)
    assert status == 0, err
    rows = read_table(scores)
    assert list(rows[0]) == ["image", "row", "class_name", "label", "score", *(["p_value", "flagged"] if calibrated else [])]
    names = [f"fine/{i}" for i in range(3)] + [f"hole/{i}" for i in range(2)]
    assert [row["image"] for row in rows] == [str(images / "test" / f"{name}.png") for name in names]
    assert [(row["row"], row["class_name"]) for row in rows] == [(str(i), name.split("/")[0]) for i, name in enumerate(names)]
    assert [row["label"] for row in rows] == ["normal"] * 3 + ["anomaly"] * 2
    numbers = torch.tensor([float(row["score"]) for row in rows])
    assert image_metrics(numbers.numpy(), np.array([0, 0, 0, 1, 1]))["auroc"] == results["auroc"]
    if calibrated:
        assert [float(row["p_value"]) for row in rows] == model.p_values(numbers).tolist()
        assert [row["flagged"] for row in rows] == [str(flag) for flag in model.is_anomalous(numbers).tolist()]


def test_a_table_of_scores_without_files_or_rows(run_evaluation, detector, tmp_path):
    """Embedded images, and a stream of them."""
    labels = [0, 0, 0, 1, 1]
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    columns = {"image": list(map(PIL.Image.fromarray, array)), "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["fine", "hole"])})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / "test-0.parquet")
    for name, more in (("rows.csv", []), ("stream.csv", ["--streaming", "true"])):
        status, _, err = run_evaluation(detector, tmp_path / "data", "--scores", str(tmp_path / name), *more)
        assert status == 0, err
    rows, streamed = (read_table(tmp_path / name) for name in ("rows.csv", "stream.csv"))
    assert [row["image"] for row in rows] == [row["row"] for row in rows] == list("01234")
    assert [{name: value for name, value in row.items() if name != "class_name"} for row in rows] == streamed


def test_a_table_that_cannot_be_written_is_refused_first(run_evaluation, detector, tmp_path):
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "scores.json", "the name must end in .csv")):
        status, results, err = run_evaluation(detector, "digits", "--scores", str(path))
        assert (status, results) == (2, None)
        assert f"--scores {path}: {words}" in err.splitlines()[-1]


@pytest.mark.parametrize(("trained", "warned"), [("balanced", True), ("official", False), ("stream", False)])
def test_another_protocol_than_in_training_is_warned_of(evaluate, detector, tmp_path, caplog, trained, warned):
    path = detector / "eval_results.json"
    path.write_text(json.dumps({"dataset": tmp_path.name, "division": {"protocol": trained}}))
    status, _, err = evaluate({"test/fine": 3, "test/good": 2})
    path.unlink()
    assert status == 0, err
    assert ("may be among those it was trained on" in caplog.text) == warned


@pytest.mark.parametrize("recorded", [{"seed": 3}, {"seed": 42, "division": {"protocol": "balanced", "seed": 3}}])
def test_images_that_the_training_drew_are_drawn_again(evaluate, detector, recorded):
    """Another seed would draw test images that the detector was trained on."""
    status, _, err = evaluate({"fine": 10, "good": 10}, "--protocol", "balanced")
    assert status == 2
    assert "give --seed" in err.splitlines()[-1]
    (detector / "eval_results.json").write_text(json.dumps(recorded))
    try:
        status, recorded, err = evaluate({}, "--protocol", "balanced")
        assert status == 0, err
        assert evaluate({}, "--protocol", "balanced", "--seed", "3")[1]["split_hash"] == recorded["split_hash"]
        status, _, err = evaluate({}, "--protocol", "balanced", "--seed", "4")
        assert status == 2
        assert "was trained with --seed 3: with 4" in err.splitlines()[-1]
        assert "seed must be" in evaluate({}, "--seed", "-1")[-1].splitlines()[-1]
    finally:
        (detector / "eval_results.json").unlink()


def of_no_kind(splits):
    """Without the classes, which say nothing of made-up scores."""
    return replace(splits, test=splits.test.remove_columns("class_name"))


@pytest.mark.parametrize(("shift", "direction"), [(0.0, None), (0.7, "higher"), (-0.7, "lower")])
def test_normal_images_unlike_those_of_calibration_are_warned_of(shift, direction, caplog):
    splits, processor = of_no_kind(load_one_class("digits", evaluation_only=True)), AnomalyImageProcessor.for_images(8, 1)
    model = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    generator = torch.Generator().manual_seed(0)
    model.calibration.fit(torch.randn(300, generator=generator), 0.05)
    model.config.false_positive_rate = 0.05
    labels = torch.arange(600) % 2
    scores = torch.randn(600, generator=generator) + shift + 9 * labels  # the anomalies' scores say nothing of drift
    results, _ = evaluate_detector(model, processor, splits, lambda dataset: (scores, labels), batch_size=64)
    if direction is None:
        assert results["drift_p_value"] > 0.01
        assert "calibrated" not in caplog.text
    else:
        assert results["drift_p_value"] < 1e-6
        assert f"score {direction} on the whole than those that calibrated" in caplog.text
        assert "where 5 % were asked for" in caplog.text
        assert ("calibrate with images like these" in caplog.text) == (direction == "higher")
        assert ("it may have been trained on these" in caplog.text) == (direction == "lower")
        assert f"{100 * results['false_positive_rate_at_threshold']:.1f} % of them are flagged" in caplog.text


def test_rates_at_the_threshold(detector):
    """One of four normal images lies above it, and two of three anomalies."""
    model = CSIModel.from_pretrained(detector)
    model.calibration.fit(torch.arange(1.0, 20.0), 0.5)
    scores, labels = torch.tensor([1.0, 2, 3, 30, 40, 50, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    splits, processor = of_no_kind(load_one_class("digits")), AnomalyImageProcessor.for_images(8, 1)
    results, _ = evaluate_detector(model, processor, splits, lambda dataset: (scores, labels), batch_size=4)
    assert (results["num_normal"], results["num_anomalous"]) == (4, 3)
    assert results["false_positive_rate_at_threshold"] == pytest.approx(1 / 4)
    assert results["true_positive_rate_at_threshold"] == pytest.approx(2 / 3)
    assert results["balanced_accuracy_at_threshold"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    for only, what, missing in (
        (labels == 0, "4 images of the evaluation split are normal", "true_positive_rate_at_threshold"),
        (labels == 1, "3 images of the evaluation split are anomalies", "false_positive_rate_at_threshold"),
    ):
        results, _ = evaluate_detector(model, processor, splits, lambda dataset, only=only: (scores[only], labels[only]), batch_size=4)
        assert results["reason"] == f"all {what}"
        assert results["auroc"] is results[missing] is None
        assert ("drift_p_value" in results) == ("normal" in what)


def test_figures_show_the_lowest_the_median_and_the_highest_score_of_each_class(detector, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(evaluation, "write_figures", lambda folder, scores, labels, **settings: drawn.update(settings))
    dataset = [{"image": PIL.Image.new("L", (8, 8), row)} for row in range(9)]
    scores, labels = torch.tensor([5.0, 1, 4, 2, 3, 30, 10, 8, 20]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 1])
    draw_figures(tmp_path, CSIModel.from_pretrained(detector), AnomalyImageProcessor.for_images(8, 1), dataset, scores, labels)
    shown = [(image.getpixel((0, 0)), *caption.split("\nscore ")) for image, _, caption in drawn["examples"]]
    normal, anomalous = [(1, "1"), (2, "4"), (7, "8")], [(6, "10"), (8, "20"), (5, "30")]
    assert shown == [(row, name, score) for name, rows in (("normal", normal), ("anomalous", anomalous)) for row, score in rows]
