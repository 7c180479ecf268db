"""Trivial baselines beside a detector, and images of one contrast."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SmallResNetConfig, load_one_class
from hf_anomaly.data import collate, prepare
from hf_anomaly.ops.baselines import BASELINES
from hf_anomaly.training import AnomalyTrainer, AnomalyTrainingArguments
from hf_anomaly.training.baselines import compare_with_baselines, equalize, standardize


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize("count", [1, 5])
def test_training_images_that_do_not_vary_are_a_plane_of_no_dimension(count):
    train, test = np.zeros((count, 3), np.float32), np.array([[0, 0, 0], [1, 2, 0]], np.float32)
    assert BASELINES["pca_residual"](train, test).tolist() == [0, 5]


def test_baselines_by_hand():
    train, test = np.split(np.random.default_rng(0).normal(scale=(4, 2, 1, 0.5), size=(30, 4)).astype(np.float32), [25])
    distances = np.sort(np.linalg.norm(test[:, None] - train, axis=2))
    variances, axes = np.linalg.eigh(np.cov(train.T))
    assert variances[3] < 0.9 * variances.sum() < variances[2:].sum()  # two components
    expected = {
        "mean_intensity": test.mean(1),
        "contrast": -test.std(1),
        "pixel_knn": distances[:, :5].mean(1),
        "pca_residual": np.square((test - train.mean(0)) @ axes[:, :2]).sum(1),
    }
    for name, baseline in BASELINES.items():
        np.testing.assert_allclose(baseline(train, test), expected[name], rtol=1e-4)
    np.testing.assert_allclose(
        BASELINES["pixel_knn"](train[:3], test), np.linalg.norm(test[:, None] - train[:3], axis=2).mean(1), rtol=1e-4
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_standardized_images_have_one_mean_and_deviation(channels):
    x = images(5, channels, 16, 16)
    result = standardize(x, 0.1, 0.2)
    np.testing.assert_allclose(result.numpy().reshape(5, -1).mean(1), 0.1, atol=1e-5)
    np.testing.assert_allclose(result.numpy().reshape(5, -1).std(1), 0.2, atol=1e-5)
    torch.testing.assert_close(standardize(0.5 * x + 0.3, 0.1, 0.2), result)
    assert standardize(x, 0.0, 5.0).abs().max() == 1
    torch.testing.assert_close(standardize(torch.full((1, 1, 4, 4), 0.7)), torch.zeros(1, 1, 4, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [8, 13, 28])
def test_equalized_images_hardly_depend_on_contrast(size):
    x = images(2, 3, size, size)
    result = equalize(x)
    assert result.shape == x.shape
    assert result.min() >= -1
    assert result.max() <= 1
    assert equalize(0.5 * x).std() > 0.7 * result.std()  # of the images themselves half


@pytest.fixture(scope="module")
def brighter(tmp_path_factory):
    """Noise, whose anomalies are brighter and nothing else."""
    folder = tmp_path_factory.mktemp("brighter")
    for i, name in enumerate(["train/normal"] * 20 + ["test/normal"] * 12 + ["test/bright"] * 12):
        levels = np.random.default_rng(i).integers(0, 100, (8, 8)) + (80 if "bright" in name else 0)
        (folder / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(levels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def detector(brighter, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    splits, processor = load_one_class(brighter), AnomalyImageProcessor.for_images(8, 1)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    model = CSIModel(CSIConfig(image_size=8, normal_label="normal", num_test_views=2, backbone_config=backbone)).eval()
    train = prepare(splits.train, processor)
    model.fit_reference([collate([train[i] for i in range(len(train))])], progress=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    record = {"seed": 0, "num_train": len(train), "dataset": brighter.name, "division": {"protocol": "official"}}
    (folder / "eval_results.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def evaluate(detector, run_evaluation):
    return lambda dataset, *argv: run_evaluation(detector, dataset, "--baselines", "true", *argv)


def test_what_lives_on_brightness_shows(evaluate, brighter, caplog):
    status, results, err = evaluate(brighter)
    assert status == 0, err
    as_they_are, standardized, equalized = (results["baselines"][name] for name in ("as_they_are", "standardized", "equalized"))
    assert set(as_they_are) == set(equalized) == {"detector", *BASELINES}
    assert set(standardized) == {"detector", "pixel_knn", "pca_residual"}
    assert as_they_are["detector"] == results["auroc"]
    assert as_they_are["mean_intensity"] == as_they_are["pixel_knn"] == 1
    assert abs(standardized["pixel_knn"] - 0.5) < 0.3
    assert "--baselines" not in caplog.text


def test_bank_and_images_are_changed_alike(brighter, detector):
    """By hand: a detector whose bank was filled with standardized images, on standardized images."""
    splits, processor = load_one_class(brighter), AnomalyImageProcessor.for_images(8, 1)
    model = CSIModel.from_pretrained(detector).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare_with_baselines(model, processor, splits.train, splits.test, batch_size=7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train, test = (prepare(part, processor)[:]["pixel_values"] for part in (splits.train, splits.test))
    train, test = torch.stack(train), torch.stack(test)
    level = train.mean().item(), np.mean([image.numpy().std() for image in train])
    model.fit_reference([standardize(train, *level)], progress=False)
    with torch.no_grad():
        scores = model(standardize(test, *level)).scores
    labels = np.asarray(splits.test["label"][:])
    assert found["standardized"]["detector"] == pytest.approx(roc_auc_score(labels, scores.numpy()), abs=0.02)


@pytest.mark.parametrize(("tiles", "bank_size"), [(1, 5), (2, 20)])
def test_changed_images_are_those_of_the_bank(brighter, tmp_path, monkeypatch, tiles, bank_size):
    """Of more training images, or tiles, than it keeps the detector draws some; compared with others, it would change though the images did not."""
    splits = load_one_class(brighter)
    processor = AnomalyImageProcessor.for_images(8, 1)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    model = CSIModel(CSIConfig(image_size=8, tiles=tiles, max_bank_size=bank_size, backbone_config=backbone))
    args = AnomalyTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    AnomalyTrainer(model, args, train_dataset=prepare(splits.train, processor)).fit_reference()
    banks = []
    monkeypatch.setattr("hf_anomaly.training.baselines._aurocs", lambda detector, *rest: banks.append(detector.reference.bank))
    monkeypatch.setattr("hf_anomaly.training.baselines.equalize", lambda pixel_values: pixel_values)
    compare_with_baselines(model, processor, splits.train, splits.test)
    assert len(splits.train) * tiles**2 > bank_size == model.config.bank_size
    torch.testing.assert_close(banks[2], banks[0])
    assert not torch.allclose(banks[1], banks[0])  # standardized


def test_other_training_images_are_warned_of(evaluate, brighter, detector, caplog):
    assert evaluate(brighter, "--max_train_images", "5")[0] == 0
    assert "num_train 5 in place of 16" in caplog.text
    caplog.clear()
    record = detector / "eval_results.json"
    kept = record.read_text()
    record.unlink()
    assert evaluate(brighter)[0] == 0
    record.write_text(kept)
    assert "does not tell which images it was trained on" in caplog.text


def test_images_that_are_trained_on_do_not_test(evaluate, brighter):
    """Class folders alone are evaluated as a whole, and would train as well."""
    status, results, err = evaluate(brighter / "test")
    assert (status, results) == (2, None)
    assert "--baselines: besides the training images there is nothing to test on" in err.splitlines()[-1]


@pytest.mark.parametrize(("argv", "words"), [((), "--baselines takes the training images, too"), (("--streaming", "true"), "--streaming")])
def test_training_images_are_needed(evaluate, brighter, tmp_path, argv, words):
    (tmp_path / "test").symlink_to(brighter / "test")
    status, results, err = evaluate(tmp_path if not argv else brighter, *argv)
    assert (status, results) == (2, None)
    assert words in err.splitlines()[-1]


def test_images_too_small_for_tiles(refused):
    with refused("6×7 px", "8 px"):
        equalize(images(1, 1, 6, 7))
