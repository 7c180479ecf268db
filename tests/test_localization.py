"""What masks say of a detector's maps: through a dataset, batch by batch, into the results."""

import json
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SharedAEConfig, SharedAEModel, SmallResNetConfig, load_one_class
from hf_anomaly.data import check_pixels
from hf_anomaly.data.transforms import decode_mask
from hf_anomaly.metrics import bootstrap_intervals
from hf_anomaly.training.evaluation import evaluate_detector
from hf_anomaly.training.localization import evaluate_maps

SIZE = 16
SIZES = [(20, 30), (20, 30), (24, 18), (20, 30), (16, 16), (30, 20)]  # of the test images; the last three are anomalous


@pytest.fixture(scope="module")
def processor():
    return AnomalyImageProcessor.for_images(SIZE, 1)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=SIZE, hidden_sizes=[4, 8, 8], latent_size=4)).eval()
    images = torch.rand(12, 1, SIZE, SIZE) - 0.5
    return model.fit_reference([images], progress=False).calibrate([images], progress=False, false_positive_rate=0.2)


@pytest.fixture
def splits(tmp_path):
    """A folder of images, and the masks of the anomalous ones: white squares on gray noise."""
    rng, masks = np.random.default_rng(0), []
    for i, size in enumerate(SIZES):
        image, mask = rng.integers(60, 120, size, dtype=np.uint8), np.zeros(size, np.uint8)
        if i > 2:
            mask[3 : 6 + i, 4 : 5 + i] = 255
            image[mask > 0] = 250
        path = tmp_path / "test" / ("good" if i <= 2 else "scratch") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
        masks.append(PIL.Image.fromarray(mask) if i > 2 else None)
    splits = load_one_class(tmp_path / "test", normal_label="good", evaluation_only=True)
    return replace(splits, test=splits.test.add_column("mask", encoded(masks), feature=datasets.Image(decode=False)))


def encoded(masks):
    return [None if mask is None else datasets.Image().encode_example(mask) for mask in masks]


def pixels(detector, processor, splits, rows):
    """Scores and labels of all pixels of these rows, image by image, at the size of the images."""
    scores, labels = [], []
    for row in rows:
        record = splits.test.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())[row]
        size = record["image"].size[::-1]
        with torch.no_grad():
            maps = detector(**processor(images=[record["image"]], return_tensors="pt"), output_anomaly_maps=True).anomaly_maps
        scores.append(F.interpolate(maps, size=size, mode="bilinear", antialias=True).flatten().numpy())
        labels.append(np.zeros(size).ravel() if record["mask"] is None else np.asarray(record["mask"]).ravel() > 0)
    return np.concatenate(scores), np.concatenate(labels)


def test_maps_are_compared_at_the_size_of_the_masks(detector, processor, splits):
    results = evaluate_maps(detector, processor, splits.test, batch_size=4)
    scores, labels = pixels(detector, processor, splits, range(6))
    assert (results["num_mask_images"], results["num_regions"]) == (6, 3)
    assert (results["num_pixels"], results["num_anomalous_pixels"]) == (len(labels), labels.sum())
    assert 0 < results["pixel_auroc_error"] < 1e-3
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=results["pixel_auroc_error"] + 1e-5)
    error = results["pixel_average_precision_error"] + 1e-5  # one by one, maps differ in their last digits
    assert results["pixel_average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=error)
    for batch_size in (1, 6):
        assert evaluate_maps(detector, processor, splits.test, batch_size) == pytest.approx(results, abs=1e-4)


def test_an_anomaly_without_a_mask_is_left_out(detector, processor, splits, caplog):
    masks = [*splits.test["mask"][:5], None]
    test = splits.test.remove_columns("mask").add_column("mask", masks, feature=datasets.Image(decode=False))
    results = evaluate_maps(detector, processor, test, batch_size=4)
    scores, labels = pixels(detector, processor, splits, range(5))
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=results["pixel_auroc_error"] + 1e-5)
    assert "1 anomalous images have no mask, the first scratch/5.png: the" in caplog.text
    nothing = splits.test.remove_columns("mask").add_column("mask", [None] * 6, feature=datasets.Image(decode=False))
    assert evaluate_maps(detector, processor, nothing, batch_size=4) == {}


def test_a_stream_serves_as_well(detector, processor, splits):
    expected = evaluate_maps(detector, processor, splits.test, batch_size=4)
    assert evaluate_maps(detector.train(), processor, splits.test.to_iterable_dataset(), batch_size=4) == expected


def test_masks_of_16_bits(detector, processor, splits):
    values = [None if mask is None else decode_mask(mask, "").astype(np.uint16) for mask in splits.test["mask"]]
    wide = encoded([None if mask is None else PIL.Image.fromarray(mask) for mask in values])
    test = splits.test.remove_columns("mask").add_column("mask", wide, feature=datasets.Image(decode=False))
    check_pixels(test, "test")
    assert evaluate_maps(detector, processor, test, batch_size=4) == evaluate_maps(detector, processor, splits.test, batch_size=4)


def test_an_unreadable_mask_is_named(detector, processor, splits, refused):
    masks = [*splits.test["mask"][:5], {"bytes": b"no image", "path": None}]
    test = splits.test.remove_columns("mask").add_column("mask", masks, feature=datasets.Image(decode=False))
    with refused("mask of row 5", "unreadable"):
        evaluate_maps(detector, processor, test, batch_size=4)


def test_the_results_have_all_of_it(detector, processor, splits):
    scored = {}

    def score(dataset):
        batches = [{name: torch.as_tensor(np.stack(column)) for name, column in dataset[:].items()}]
        scored["scores"], scored["labels"] = detector.score(batches, progress=False)
        return scored["scores"], scored["labels"]

    results, _ = evaluate_detector(detector, processor, splits, score, batch_size=4)
    scores, labels = scored["scores"].numpy(), scored["labels"].numpy()
    assert results["auroc"] == roc_auc_score(labels, scores)
    intervals = bootstrap_intervals(scores, labels, confidence=0.95)
    assert (results["auroc_interval"], results["interval_confidence"]) == (list(intervals["auroc"]), 0.95)
    assert results["average_precision_interval"] == list(intervals["average_precision"])
    flagged = detector.is_anomalous(scored["scores"]).numpy()
    assert results["balanced_accuracy_at_threshold"] == pytest.approx(balanced_accuracy_score(labels, flagged))
    maps = evaluate_maps(detector, processor, splits.test, batch_size=4)
    assert maps.items() <= results.items()
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_a_method_without_maps_says_so(processor, splits, caplog):
    caplog.set_level("INFO", "hf_anomaly")
    model = CSIModel(CSIConfig(image_size=SIZE, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).eval()
    model.fit_reference([torch.rand(4, 1, SIZE, SIZE) * 2 - 1], progress=False)
    results, _ = evaluate_detector(model, processor, splits, lambda dataset: (torch.arange(6.0), torch.arange(6) // 3), batch_size=4)
    assert results["auroc"] == 1
    assert "pixel_auroc" not in results
    assert model.unsupported_maps_reason in caplog.text
