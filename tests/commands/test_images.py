"""Images of many kinds, to train on: folders, arrays, modes, few of them."""

import math
import re

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_anomaly.cli.info import describe
from hf_anomaly.data import PixelTransform, decode_image, load_one_class
from hf_anomaly.dissolving import Dissolver, MedianDissolver, dissolve_dataset

from .running import METRICS, class_folders, pixels, refused, resnet, results_of, save, training_arguments


def test_a_flat_folder_without_labels(train, tmp_path):
    data = class_folders(tmp_path / "scans", {".": 30})
    folder, out = train(tmp_path / "run", "--dataset_name", data, "--dissolver", "none")
    results = results_of(folder)
    assert [results[name] for name in METRICS] == [None] * 3
    assert "has no split 'test'" in results["reason"]
    assert f"no AUROC, which takes labelled test images: {results['reason']}\n" in out
    assert not {"None", "num_normal"} & set(re.findall(r"\w+", out))
    threshold = AutoModel.from_pretrained(folder).calibration.threshold.item()
    assert f"threshold: {threshold:.6g}, for a false-positive rate of 0.05, from 6 held-out normal images\n" in out
    assert f"Not measured: {results['reason'].replace('|', ' ')}" in (folder / "README.md").read_text()
    assert AutoModel.from_pretrained(folder).calibration.scores.shape == (6,)
    assert results["num_calibration"] == 6


def test_npz_with_labels_in_a_column(train, tmp_path):
    arrays = {}
    for split, count in (("train", 24), ("val", 6), ("test", 10)):
        arrays[f"{split}_images"] = pixels(count, count, 8, 8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "scans.npz", **arrays)
    argv = ["--dataset_name", tmp_path / "scans.npz", "--normal_label", 0, "--dissolver", "none"]
    results = results_of(train(tmp_path / "run", *argv)[0])
    assert (results["num_train"], results["num_calibration"], results["num_normal"], results["num_anomalous"]) == (10, 2, 5, 5)
    results = results_of(train(tmp_path / "validation", *argv, "--eval_split", "validation")[0])
    assert (results["num_normal"], results["num_anomalous"]) == (3, 3)


def test_too_few_calibration_images(train, tmp_path, caplog):
    folder, _ = train(tmp_path / "run", "--dissolver", "none", "--false_positive_rate", 0.01)
    assert "needs at least 99 calibration images, have 28: the threshold is infinite" in caplog.text
    assert AutoModel.from_pretrained(folder).calibration.threshold.item() == math.inf
    results = results_of(folder)
    assert (results["true_positive_rate_at_threshold"], results["false_positive_rate_at_threshold"]) == (0, 0)


def test_bf16_trains_the_dissolver_too(train, tmp_path):
    """In one process accelerate knows one precision, which both trainings must therefore have."""
    folder, _ = train(tmp_path / "run", "--dissolver", "diffusion", "--bf16", "true")
    assert training_arguments(folder)["bf16"]
    assert load_file(folder / "dissolver" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].isfinite().all()


def test_fewer_images_than_a_batch_lower_it(train, tmp_path, caplog):
    folder, _ = train(tmp_path / "run", "--dissolver", "none", "--max_steps", 1, "--per_device_train_batch_size", 500)
    assert "the batch is lowered from 500 to 114" in caplog.text
    arguments = training_arguments(folder)
    assert arguments["per_device_train_batch_size"] == 114
    # From a pretrained encoder, as everywhere here that is not said otherwise.
    config = AutoModel.from_pretrained(folder).config
    assert (config.num_encoders, config.score_features, arguments["learning_rate"]) == (1, "both", 1e-3)


def test_colour_images_of_mixed_sizes_and_modes(train, tmp_path):
    modes = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"]
    for split, count in (("train/good", 14), ("test/good", 4), ("test/crack", 4)):
        for i in range(count):
            image = PIL.Image.fromarray(pixels(i, 12 + i % 3, 10 + i % 5, 3)).convert(modes[i % len(modes)])
            path = tmp_path / "colour" / split / f"{i}{'.tiff' if image.mode in ('CMYK', 'LA') else '.png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    # 11 images to train on are fewer than a batch of the dissolver.
    folder, _ = train(tmp_path / "run", "--dataset_name", tmp_path / "colour", "--image_size", 12, "--dissolver_batch_size", 32)
    config = AutoModel.from_pretrained(folder).config
    assert (config.num_channels, config.image_size) == (3, 12)
    chosen = (config.num_encoders, config.score_features, training_arguments(folder)["learning_rate"])
    assert chosen == (3, "all", 1e-2)  # trained from scratch
    assert (results_of(folder)["num_normal"], results_of(folder)["num_anomalous"]) == (4, 4)


def test_gray_images_for_an_rgb_backbone(train, tmp_path):
    folder, _ = train(tmp_path / "run", "--num_channels", 3, "--dissolver", "none", "--backbone", resnet(tmp_path))
    assert AutoModel.from_pretrained(folder).config.num_channels == 3
    assert AutoImageProcessor.from_pretrained(folder).do_convert_rgb


@pytest.mark.parametrize("method", ["dia", "shared_ae", "addp"])
def test_tiles(method, train, tmp_path):
    images = class_folders(tmp_path / "images", {"train/good": 24, "test/good": 3, "test/hole": 3}, size=25)
    for i in range(3):
        mask = np.zeros((25, 25), np.uint8)
        mask[:9, :9] = 255
        save(images / "ground_truth" / "hole" / f"{i}_mask.png", mask)
    tiny = {
        "dia": ["--num_test_views", 1],
        "shared_ae": ["--hidden_sizes", 4, 4, 4],
        "addp": ["--hidden_sizes", 4, 4, "--pretrain_steps", 1],
    }
    folder, _ = train(tmp_path / "run", "--dataset_name", images, "--tiles", 2, *tiny[method], script=f"train_{method}.py")
    model, results = AutoModel.from_pretrained(folder), results_of(folder)
    assert (model.config.image_size, model.config.tiles, model.config.tile_size) == (24, 2, 12)
    assert (results["num_train"], results["num_calibration"]) == (19, 5)
    assert 0 <= results["pixel_auroc"] <= 1
    assert "24×24 pixels, which it cuts into 2×2 squares" in (folder / "README.md").read_text()
    assert describe(model, results)["images"].startswith("24×24 px in 2×2 tiles, gray")
    if method == "dia":
        assert Dissolver.from_pretrained(folder).resolution == 8  # of a tile of 12 px
        processor = AutoImageProcessor.from_pretrained(folder)
        pixel_values = processor(images=PIL.Image.open(images / "test" / "hole" / "0.png"), return_tensors="pt")["pixel_values"]
        dissolver = MedianDissolver(3, resolution=12)
        whole, corner = dissolver(pixel_values, tiles=2), dissolver(pixel_values[..., 12:, :12])
        assert torch.equal(whole[..., 12:, :12], corner)
        cached = dissolve_dataset(load_one_class(images).train, dissolver, processor, tiles=2, cache_dir=tmp_path)[0]
        levels = PixelTransform._dissolved(cached["dissolved_images"], "")
        row = processor(images=decode_image(cached["image"], ""), return_tensors="pt")["pixel_values"]
        assert torch.equal(levels, ((dissolver(row, tiles=2) + 1) * 127.5).round().to(torch.uint8))


def test_tiles_that_do_not_fit(tmp_path):
    images = class_folders(tmp_path / "images", {"train/good": 12}, size=9)
    for argv, culprit in {
        ("--tiles", 0): "--tiles",
        ("--tiles", 2, "--image_size", 9): "of 9 pixels",
        ("--tiles", 3): "of 9 pixels",
    }.items():
        argv = ["--dataset_name", images, "--output_dir", tmp_path / "run", *argv]
        refused("train_shared_ae.py", argv, culprit, tmp_path / "run")
