"""Training images kept at the processor's size."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from hf_anomaly import AnomalyImageProcessor, load_one_class, prepare
from hf_anomaly.data import Reading, shrink_images, transforms
from hf_anomaly.training.runs import shrink_training_images

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_dia.py"
RNG = np.random.default_rng(0)


def picture(mode, size):
    image = PIL.Image.fromarray(RNG.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


@pytest.fixture
def folder(tmp_path):
    """Normal images of several modes, sizes and formats, one of them turned by its EXIF orientation."""
    normal = tmp_path / "images" / "train" / "normal"
    normal.mkdir(parents=True)
    for i, (mode, size) in enumerate([("RGB", (40, 30)), ("L", (40, 30)), ("P", (40, 30)), ("RGBA", (25, 33)), ("LA", (40, 30))]):
        picture(mode, size).save(normal / f"{i}.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture("RGB", (40, 30)).save(normal / "5.jpg", exif=exif)
    return tmp_path / "images"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 30, 64])
def test_what_the_processor_makes_of_them_stays(folder, tmp_path, channels, size):
    train = load_one_class(folder, calibration_fraction=0).train
    processor = AnomalyImageProcessor.for_images(size, channels)
    shrunk = shrink_images(train, processor, cache_dir=tmp_path / "cache", batch_size=4)
    assert shrunk.column_names == train.column_names
    assert shrunk.features == train.features
    before, after = prepare(train, processor), prepare(shrunk, processor)
    assert len(after) == 6
    for i in range(6):
        assert torch.equal(after[i]["pixel_values"], before[i]["pixel_values"])
    sizes = {image.size for image in shrunk.cast_column("image", datasets.Image())["image"]}
    assert sizes == {(size, size)}


def test_found_again_until_a_file_changes(folder, tmp_path, monkeypatch):
    train = load_one_class(folder, calibration_fraction=0).train
    processor = AnomalyImageProcessor.for_images(8, 1)
    first = shrink_images(train, processor, cache_dir=tmp_path / "cache")
    assert shrink_images(train, processor, cache_dir=tmp_path / "cache")._fingerprint == first._fingerprint
    (file,) = (tmp_path / "cache").glob("shrunk-*.arrow")
    shrink_images(train.select(range(2)), processor, cache_dir=tmp_path / "two")
    shutil.copy(next((tmp_path / "two").iterdir()), file)  # as a file that is cut off between two batches
    assert len(shrink_images(train, processor, cache_dir=tmp_path / "cache")) == len(train)
    for other in (AnomalyImageProcessor.for_images(8, 3), AnomalyImageProcessor.for_images(8, 1, window="full")):
        assert shrink_images(train, other, cache_dir=tmp_path / "cache")._fingerprint != first._fingerprint
    with monkeypatch.context() as patched:
        patched.setattr("hf_anomaly.data.caching._FORMAT", "later")
        assert shrink_images(train, processor, cache_dir=tmp_path / "cache")._fingerprint != first._fingerprint
    picture("L", (50, 50)).save(folder / "train" / "normal" / "0.png")
    assert shrink_images(train, processor, cache_dir=tmp_path / "cache")._fingerprint != first._fingerprint


def test_a_broken_image_is_named_and_nothing_is_left(folder, tmp_path, refused):
    train = load_one_class(folder, calibration_fraction=0).train
    file = folder / "train" / "normal" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    with refused("3.png", "unreadable"):
        shrink_images(train, AnomalyImageProcessor.for_images(8, 1), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.arrow"))


def test_two_processes_report_a_broken_image(folder, tmp_path, forks):
    file = folder / "train" / "normal" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    options = ["--dataset_name", folder, "--image_size", 8, "--dissolver", "none", "--max_steps", 1, "--calibration_fraction", 0]
    statuses, output = forks.run_script(SCRIPT, *options, "--output_dir", tmp_path / "run", processes=2)
    assert 0 not in statuses
    assert "3.png: unreadable" in output
    assert "Connection closed" not in output, "the second process waited for one that was gone"


def test_training_shrinks_larger_images_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = load_one_class(folder, calibration_fraction=0)  # 40 pixels wide, most of them
    assert shrink_training_images(splits, AnomalyImageProcessor.for_images(40, 3)) is splits
    shrunk = shrink_training_images(splits, AnomalyImageProcessor.for_images(16, 3))
    assert shrunk.train is shrunk.reference
    assert shrunk.split_hash == splits.split_hash
    assert {image.size for image in shrunk.train.cast_column("image", datasets.Image())["image"]} == {(16, 16)}


def test_a_few_large_images_among_many_small_ones_are_shrunk(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i, side in enumerate([16] * 5 + [90]):
        PIL.Image.fromarray(RNG.integers(0, 256, (side, side), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    splits = load_one_class(tmp_path, calibration_fraction=0)
    shrunk = shrink_training_images(splits, AnomalyImageProcessor.for_images(16, 1))
    assert {image.size for image in shrunk.train.cast_column("image", datasets.Image())["image"]} == {(16, 16)}


def test_large_images_are_decoded_a_few_at_a_time(folder, monkeypatch):
    train, processor = load_one_class(folder, calibration_fraction=0).train, AnomalyImageProcessor.for_images(12, 3)
    whole, counts = prepare(train, processor)[:]["pixel_values"], []

    def counting(images, **options):
        counts.append(len(images))
        return processor(images=images, **options)

    monkeypatch.setattr(transforms, "_MAX_DECODED_PIXELS", 2 * 40 * 40)
    pieces = prepare(train, counting)[:]["pixel_values"]
    assert counts == [3, 3]  # of 40 × 30 px
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


def test_more_than_eight_bits(tmp_path):
    normal = tmp_path / "images"
    normal.mkdir()
    for i in range(3):
        PIL.Image.fromarray(RNG.integers(0, 4096, (20, 20), dtype=np.uint16)).save(normal / f"{i}.png")
    window = (100.0, 3000.0)
    train = load_one_class(normal, calibration_fraction=0, reading=Reading(window=window)).train
    processor = AnomalyImageProcessor.for_images(10, 1, window)
    before, after = prepare(train, processor), prepare(shrink_images(train, processor, cache_dir=tmp_path / "cache"), processor)
    for i in range(3):
        assert before[i]["pixel_values"].std() > 0.1
        assert torch.equal(after[i]["pixel_values"], before[i]["pixel_values"])
