"""Images of many kinds, to train on: folders, arrays, modes, few of them."""

import math
import re

import numpy as np
import PIL.Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from .running import METRICS, class_folders, pixels, resnet, results_of, training_arguments


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
