import errno
import io
import logging
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from torch.utils.data import DataLoader

from hf_anomaly.data import PixelTransform, check_images, check_pixels, collate, decode_image, load_one_class, load_unlabelled, prepare
from hf_anomaly.data.sources import hub_dataset
from hf_anomaly.data.transforms import decode_mask
from hf_anomaly.errors import HubError, InputError

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pixels(seed, shape=(16, 16)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(root, counts, shape=(16, 16)):
    """{"train/good": 4} -> root/train/good/0.png … 3.png"""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            PIL.Image.fromarray(pixels(i, shape)).save(root / folder / f"{i}.png")
    return root


def png(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def save_npz(path, **replaced):
    images = pixels(0, (12, 8, 8))
    labels = np.arange(12) % 2
    arrays = {f"{split}_{kind}": value for split in ("train", "val", "test") for kind, value in (("images", images), ("labels", labels))}
    np.savez(path, **{name: value for name, value in (arrays | replaced).items() if value is not None})
    return path


def save_parquet(path, labels=("healthy", "sick") * 5, name="finding", feature=None):
    columns = {"scan": [png(pixels(i)) for i in range(len(labels))], name: list(labels)}
    Dataset.from_dict(columns, Features({"scan": Image(), name: feature or Value("string")})).to_parquet(path)
    return path


def rows(split):
    return split["row"][:]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def processor(images, return_tensors):
    """What the package promises to processors: PIL images of any size in, (B, 1, 8, 8) in [-1, 1] out."""
    assert return_tensors == "pt"
    arrays = [np.asarray(image.convert("L").resize((8, 8))) for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(arrays))[:, None] / 127.5 - 1}


# Sources


def test_digits():
    splits = load_one_class("digits")
    assert (splits.normal_label, splits.num_channels, splits.native_size, splits.test_missing_reason) == ("0", 1, 8, None)
    assert len(splits.train) + len(splits.calibration) == 142
    assert len(splits.test) == 360
    assert sum(splits.test["label"][:]) == 324
    assert rows(splits.test) == list(range(360))
    image = np.asarray(decode_image(splits.train[0]["image"], ""))
    assert image.max() == 255  # 16 of 16
    assert load_one_class("digits", normal_label=3).normal_label == "3"
    other = load_one_class("digits", seed=1)
    assert [value["bytes"] for value in other.test["image"]] == [value["bytes"] for value in splits.test["image"]]
    assert "has no split 'validation'" in load_one_class("digits", eval_split="validation").test_missing_reason


def test_a_folder_called_digits(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(write(tmp_path, {"digits": 3}))
    assert len(load_one_class("digits").test) == 360
    assert "give ./digits" in caplog.text
    assert len(load_one_class("./digits", calibration_fraction=0).train) == 3


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 6, 3)])
def test_npz(tmp_path, shape, column):
    images, labels = pixels(1, (12, *shape)), np.arange(12) % 3
    labels = labels[:, None] if column else labels
    path = save_npz(tmp_path / "x.npz", train_images=images, train_labels=labels)
    splits = load_one_class(path, normal_label=2, calibration_fraction=0)
    assert rows(splits.train) == [2, 5, 8, 11]
    assert splits.calibration is None
    assert splits.num_channels == (3 if shape[2:] == (3,) else 1)
    assert np.array_equal(np.asarray(decode_image(splits.train[1]["image"], "")), images[5].squeeze())
    assert "holds no normals" in splits.test_missing_reason
    assert load_one_class(path, normal_label="1", eval_split="validation").test_missing_reason is None


def test_npz_floats_and_missing_labels(tmp_path):
    path = save_npz(tmp_path / "x.npz", train_images=np.full((4, 8, 8), 0.301, np.float32), train_labels=None).rename(tmp_path / "X.NPZ")
    splits = load_one_class(path, normal_label=0)
    assert len(splits.train) == 3
    assert len(splits.calibration) == 1
    assert np.asarray(decode_image(splits.train[0]["image"], "")).max() == 77  # 76.755, rounded


def test_class_folders(tmp_path):
    splits = load_one_class(write(tmp_path, {"Healthy": 5, "sick": 3}))
    assert splits.normal_label == "Healthy"
    assert len(splits.train) == 4
    assert splits.test is None
    assert "has no split 'test'; its splits: train" in splits.test_missing_reason
    assert load_one_class(tmp_path, normal_label="sick", calibration_fraction=0).train["row"][:] == [5, 6, 7]


@pytest.mark.parametrize(
    ("folder", "suffix"), [("ground_truth", "_mask.png"), ("ground_truth", ".png"), ("Ground_Truth", "_mask.bmp"), ("groundtruth", ".TIF")]
)
def test_masks_are_those_of_the_images(tmp_path, folder, suffix):
    write(tmp_path, {"train/good": 5, "test/broken": 3, "test/good": 1, f"{folder}/broken": 2})
    for i in (1, 0):
        (tmp_path / folder / "broken" / f"{i}.png").rename(tmp_path / folder / "broken" / f"{i + 1}{suffix}")
    masks = load_one_class(tmp_path).test["mask"][:]
    names = [None if mask is None else Path(mask["path"]).name for mask in masks]
    assert names == [None, f"1{suffix}", f"2{suffix}", None]


def test_a_damaged_mask_is_named(tmp_path, refused):
    test = load_one_class(write(tmp_path, {"train/good": 5, "test/broken": 2, "ground_truth/broken": 2})).test
    check_pixels(test, "test")
    (tmp_path / "ground_truth" / "broken" / "1.png").write_bytes(b"no image")
    with refused("ground_truth/broken/1.png", "unreadable image"):
        check_pixels(test, "test")


def test_the_class_of_every_evaluated_image_is_kept(tmp_path):
    splits = load_one_class(write(tmp_path, {"train/good": 5, "test/broken": 2, "test/good": 1, "test/bent": 1}))
    assert dict(zip(splits.test["class_name"][:], splits.test["label"][:], strict=True)) == {"bent": 1, "broken": 1, "good": 0}
    assert "class_name" not in {*splits.train.column_names, *splits.calibration.column_names}


def test_masks_are_those_of_the_split(tmp_path):
    write(tmp_path, {"train/good": 5, "test/broken": 2, "val/broken": 2, "val/good": 1, "test/good": 1, "ground_truth/broken": 2})
    assert "mask" not in load_one_class(tmp_path, eval_split="validation").test.column_names
    write(tmp_path, {"ground_truth/val/broken": 1})
    masks = load_one_class(tmp_path, eval_split="validation").test["mask"][:]
    assert [mask and mask["path"] for mask in masks] == [str(tmp_path / "ground_truth" / "val" / "broken" / "0.png"), None, None]
    masks = load_one_class(tmp_path).test["mask"][:]
    assert [mask and Path(mask["path"]).parent for mask in masks] == [tmp_path / "ground_truth" / "broken"] * 2 + [None]


def test_mask_folders_hold_no_images(tmp_path, caplog):
    write(
        tmp_path,
        {
            "train/good": 5,
            "test/broken": 2,
            "test/good": 3,
            "test/scratched": 1,
            "ground_truth/other": 2,
            "test/ground_truth": 4,
            "test/scratched/masks": 1,
            "masks": 1,
        },
    )
    splits = load_one_class(tmp_path)
    assert splits.normal_label == "good"
    assert splits.test["label"][:] == [1, 1, 0, 0, 0, 1]
    assert not any("ground_truth" in value["path"] for value in splits.test["image"])
    assert caplog.text.count("all other masks there are left out") == 1
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["normal", "anomaly"]), "row": Value("int64")})
    assert splits.train.features == splits.calibration.features == features
    assert splits.test.features == {**features, "class_name": Value("string")}
    assert set(splits.train["label"][:] + splits.calibration["label"][:]) == {0}


def test_a_class_called_masks(tmp_path, caplog):
    write(tmp_path / "faces", {"train/without": 3, "test/without": 1, "test/masks": 2})
    splits = load_one_class(tmp_path / "faces")
    assert splits.test["label"][:] == [1, 1, 0]
    assert "'masks' is read as a class; if it marks pixels, call it ground_truth" in caplog.text
    write(tmp_path / "polyps", {"images": 3, "masks": 3})
    assert len(load_one_class(tmp_path / "polyps", calibration_fraction=0).train) == 3


@pytest.mark.parametrize("folder", [".", "anomaly"])
def test_images_in_no_split_are_counted(tmp_path, caplog, folder):
    write(tmp_path / "x", {"train": 3, "test/good": 1, "test/bad": 1, "masks": 1})
    load_one_class(tmp_path / "x")
    assert "left out" not in caplog.text
    (tmp_path / "x" / folder).mkdir(exist_ok=True)
    for i in range(2):
        PIL.Image.fromarray(pixels(i)).save(tmp_path / "x" / folder / f"{i}.png")
    load_one_class(tmp_path / "x")
    assert f"2 images are left out, as they lie in no split's folder, the first {Path(folder, '0.png')}" in caplog.text


def test_only_class_of_train_is_normal(tmp_path):
    splits = load_one_class(write(tmp_path, {"train/ok": 3, "val/ok": 1, "val/ko": 1}), eval_split="validation")
    assert splits.normal_label == "ok"
    assert splits.test["label"][:] == [1, 0]


@pytest.mark.parametrize("folder", [".", "train", "images"])
def test_folder_of_normals_needs_no_labels(tmp_path, folder):
    root = write(tmp_path / "data", {"aside": 0})
    (root / folder).mkdir(exist_ok=True)
    for i, name in enumerate(("a", "test_1", "[b] *", "val")):  # names from which imagefolder would infer splits
        PIL.Image.fromarray(pixels(i, (16, 24))).save(root / folder / f"{name}.png")
    splits = load_one_class(root, calibration_fraction=0.5)
    assert len(splits.train) == len(splits.calibration) == 2
    assert (splits.num_channels, splits.native_size) == (1, 24)


def test_flat_train_beside_a_labelled_test(tmp_path):
    splits = load_one_class(write(tmp_path, {"train": 3, "test/good": 1, "test/hole": 2}))
    assert splits.test["label"][:] == [0, 1, 1]
    assert splits.test_missing_reason is None


def test_unlabelled_test_is_not_called_normal(tmp_path):
    splits = load_one_class(write(tmp_path, {"train": 3, "test": 2}))
    assert splits.test is None
    assert "has no labels" in splits.test_missing_reason
    features = Features({"image": Image(), "label": ClassLabel(names=["good", "hole"])})
    parts = {"train": 0, "test": -1}  # as on the Hub, where labels are held back
    hidden = {
        name: Dataset.from_dict({"image": [PIL.Image.fromarray(pixels(0))] * 2, "label": [label] * 2}, features)
        for name, label in parts.items()
    }
    assert "has no labels" in load_one_class(hidden).test_missing_reason


def test_imagefolder_metadata(tmp_path):
    write(tmp_path, {"train": 4})
    (tmp_path / "train" / "metadata.csv").write_text("file_name,finding\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4)))
    splits = load_one_class(tmp_path, label_column="finding", normal_label=1, calibration_fraction=0)
    assert rows(splits.train) == [1, 3]


@pytest.mark.parametrize("folder", [".", "images", "train"])
def test_metadata_without_a_column_called_label(tmp_path, refused, caplog, folder):
    write(tmp_path, {f"x/{folder}": 4})
    (tmp_path / "x" / folder / "metadata.csv").write_text("file_name,diagnosis\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4)))
    load_one_class(tmp_path / "x")
    assert "no label column among image, diagnosis" in caplog.text
    with refused("no column 'diagnose'", "image, diagnosis"):
        load_one_class(tmp_path / "x", label_column="diagnose")
    with refused("columns: image, diagnosis", "give label_column"):
        load_one_class(tmp_path / "x", normal_label=1)


def test_class_folders_come_before_metadata_without_labels(tmp_path, caplog):
    write(tmp_path, {"good": 4, "bad": 2})
    (tmp_path / "good" / "metadata.csv").write_text("file_name,age\n" + "".join(f"{i}.png,7\n" for i in range(4)))
    (tmp_path / "bad" / "metadata.csv").write_text("file_name,age\n" + "".join(f"{i}.png,7\n" for i in range(2)))
    assert len(load_one_class(tmp_path, calibration_fraction=0).train) == 4
    assert "not a column of its metadata (age)" in caplog.text


def test_parquet_file_and_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    save_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    save_parquet(tmp_path / "folder" / "validation-00000-of-00001.parquet", ["sick", "healthy", "healthy"])
    splits = load_one_class(tmp_path / "folder", label_column="finding", eval_split="validation", calibration_fraction=0)
    assert rows(splits.train) == [0, 2, 4, 6, 8]
    assert splits.test["label"][:] == [1, 0, 0]
    splits = load_one_class(save_parquet(tmp_path / "X.PARQUET"), image_column="scan", label_column="finding")
    assert len(splits.train) == 4
    assert splits.test is None


def test_masks_are_not_taken_for_the_images(tmp_path, refused):
    def save(*names):
        columns = {name: [png(pixels(i + 10 * number)) for i in range(4)] for number, name in enumerate(names)}
        Dataset.from_dict(columns | {"label": [0] * 4}, Features(dict.fromkeys(names, Image()) | {"label": Value("int64")})).to_parquet(
            tmp_path / "x.parquet"
        )
        return tmp_path / "x.parquet"

    for names in (("mask", "image"), ("annotation", "image"), ("mask", "scan")):
        train = load_one_class(save(*names), calibration_fraction=0).train
        assert np.array_equal(np.asarray(decode_image(train[0]["image"], "")), pixels(10)), names
    with refused("annotation, scan", "image_column"):
        load_one_class(save("mask", "annotation", "scan"))
    assert len(load_one_class(save("annotation", "scan"), image_column="scan").train) == 3


@pytest.mark.parametrize(
    ("values", "feature", "normal_label", "expected"),
    [
        ([True, False, True], Value("bool"), True, [0, 2]),
        ([True, False, True], Value("bool"), 0, [1]),
        ([1, 0, 1], Value("int8"), "1", [0, 2]),
        ([1.0, 0.0, 1.0], Value("float32"), 1, [0, 2]),
        ([1, 0, 1], ClassLabel(names=["bad", "fine"]), 1, [0, 2]),
        ([1, 0, 1], ClassLabel(names=["bad", "fine"]), "0", [1]),
        ([1, 0, 1], ClassLabel(names=["1", "0"]), "0", [0, 2]),  # a class of that name comes before the index
        (["1", "0", "1"], Value("string"), 1, [0, 2]),
        (["1.0", "0.0", "1.0"], Value("string"), 1, [0, 2]),  # as a table has them
        (["1.0", "0.0", "1.0"], Value("string"), "0", [1]),
        (["0.0", "0", "0.0"], Value("string"), 0, [1]),
        (["-1.0", "1.0", "-1.0"], Value("string"), -1, [0, 2]),
        ([1.0, 0.0, 1.0], Value("float32"), "0.0", [1]),
        ([True, False, True], Value("bool"), "false", [1]),
        (["TRUE", "FALSE", "TRUE"], Value("string"), True, [0, 2]),
        (["\u00e9", "e\u0301", "\u00e9"], Value("string"), "e\u0301", [1]),
        (["e\u0301", "b", "e\u0301"], Value("string"), "\u00e9", [0, 2]),
        ([b"ok", b"bad", b"ok"], Value("binary"), "ok", [0, 2]),
        ([b"1", b"0", b"1"], Value("binary"), 1, [0, 2]),
        ([1, 0, 1], Value("int64"), np.int64(1), [0, 2]),
        ([True, False, True], Value("bool"), np.False_, [1]),
    ],
)
def test_kinds_of_labels(tmp_path, values, feature, normal_label, expected):
    path = save_parquet(tmp_path / "x.parquet", values, "label", feature)
    assert rows(load_one_class(path, normal_label=normal_label, calibration_fraction=0).train) == expected


def test_classes_that_are_alike_are_not_confused(tmp_path, refused):
    path = save_parquet(tmp_path / "x.parquet", ["1.0", "1.00", "2"], "label")
    with refused("normal_label=1", "'1.00'"):
        load_one_class(path, normal_label=1)
    with refused("'ok'"):
        load_one_class(save_parquet(tmp_path / "y.parquet", ["OK", "bad"] * 3, "label"), normal_label="ok")


def test_no_label_column_warns(tmp_path, caplog):
    splits = load_one_class(save_parquet(tmp_path / "x.parquet"))
    assert (len(splits.train), len(splits.calibration)) == (8, 2)
    assert "no label column among scan, finding" in caplog.text


# Splits


def test_calibration_is_disjoint_and_follows_the_seed(tmp_path):
    write(tmp_path, {"train/good": 20, "train/bad": 3, "test/good": 1, "test/bad": 1})
    first, again, other = (load_one_class(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert len(first.calibration) == 4
    assert sorted(rows(first.train) + rows(first.calibration)) == list(range(3, 23))
    assert rows(first.calibration) == rows(again.calibration) != rows(other.calibration)
    assert first.split_hash == again.split_hash != other.split_hash
    assert load_one_class(tmp_path, seed=0, normal_label="bad").split_hash != first.split_hash


def test_split_hash_is_pinned():
    assert load_one_class("digits").split_hash == "898f176814147300ef4c2ecda4fc768fb97089962bf1878829ab5deb47b5cc15"


def test_calibration_split_of_the_source_comes_first(tmp_path):
    splits = load_one_class(write(tmp_path, {"train/good": 4, "calibration/good": 2, "calibration/bad": 1}))
    assert len(splits.train) == 4
    assert rows(splits.calibration) == [1, 2]
    assert all("calibration" in value["path"] for value in splits.calibration["image"])


def test_calibration_leaves_one_image_on_each_side(tmp_path):
    write(tmp_path, {"good": 2})
    for fraction in (0.01, 0.99):
        splits = load_one_class(tmp_path, calibration_fraction=fraction)
        assert len(splits.train) == len(splits.calibration) == 1


def test_test_without_anomalies(tmp_path):
    splits = load_one_class(write(tmp_path, {"train/good": 3, "test/good": 2}))
    assert len(splits.test) == 2
    assert "holds no anomalies" in splits.test_missing_reason


def test_channels_and_size_of_mixed_images(tmp_path):
    write(tmp_path, {"train/good": 2, "train/bad": 1}, (16, 20))
    PIL.Image.fromarray(pixels(0, (32, 32, 3))).save(tmp_path / "train" / "bad" / "colour.png")
    assert load_one_class(tmp_path).num_channels == 1  # colour among the anomalies does not count
    PIL.Image.fromarray(pixels(0, (32, 32, 3))).save(tmp_path / "train" / "good" / "colour.png")
    splits = load_one_class(tmp_path)
    assert (splits.num_channels, splits.native_size) == (3, 20)


def test_size_of_images_that_all_differ(tmp_path):
    for i, side in enumerate([9, 60, 45, 70, 52]):
        PIL.Image.fromarray(pixels(i, (side - 2, side) if i % 2 else (side, side - 2))).save(tmp_path / f"{i}.png")
    splits = load_one_class(tmp_path)
    assert (splits.native_size, splits.largest_size) == (52, 70), "not that of the first file"
    (tmp_path / "0.png").unlink()
    assert load_one_class(tmp_path).native_size == 60, "the upper of two in the middle"


def test_a_folder_linked_into_itself_is_read_once(tmp_path):
    write(tmp_path, {"normal": 5})
    (tmp_path / "normal" / "again").symlink_to(tmp_path / "normal", target_is_directory=True)
    assert len(load_one_class(tmp_path, calibration_fraction=0).train) == 5


def test_files_that_are_no_images_are_named(tmp_path, caplog):
    folder = write(tmp_path, {"x": 3}) / "x"
    (folder / "notes.heic").write_bytes(b"")
    with caplog.at_level(logging.INFO, "hf_anomaly"):
        load_one_class(folder)
    assert f"{folder}: left out, as no images: .heic (1)" in caplog.messages


@pytest.mark.parametrize("suffix", ["tiff", "gif", "webp", "png", "avif"])
def test_pages_and_frames_of_a_file(tmp_path, caplog, suffix):
    pages = [PIL.Image.fromarray(pixels(i)) for i in range(3)]
    pages[0].save(tmp_path / f"0.{suffix}", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / f"1.{suffix}")
    load_one_class(tmp_path)
    assert "1 images of split 'train' have several pages or frames, of which only the first is read" in caplog.text


@pytest.mark.parametrize("folder", ["x", "x/images"])
def test_annotations_beside_images_are_no_digits(tmp_path, folder):
    write(tmp_path, {folder: 3})
    folder = tmp_path / "x"
    for i in range(3):
        (folder / f"{i}.json").write_text('{"shapes": []}')
    assert len(load_one_class(folder, calibration_fraction=0).train) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_is_no_text(tmp_path, refused):
    folder = write(tmp_path, {"x": 3}) / "x"
    os.rename(folder / "0.png", os.fsencode(folder) + b"/M\xe4rz.png")
    with refused("rz.png", "rename it"):
        load_one_class(folder)


def test_anomalies_that_are_left_out_are_counted(tmp_path, caplog):
    write(tmp_path, {"train/good": 4, "train/bad": 3, "calibration/good": 2, "calibration/bad": 1, "test/good": 1, "test/bad": 1})
    with caplog.at_level(logging.INFO, "hf_anomaly"):
        load_one_class(tmp_path)
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [
        f"{count} anomalies of split {split!r} of {str(tmp_path)!r} are left out" for split, count in (("train", 3), ("calibration", 1))
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_anomaly"):
        load_one_class(write(tmp_path / "normals", {"good": 4}))
    assert not caplog.records


def test_anomalies_without_a_test_split_are_told_how_to_test(tmp_path, caplog):
    write(tmp_path, {"good": 4, "scratch": 2, "spot": 1})
    remedy = "protocol 'balanced' or 'stratified', or a split 'test', would test with"
    with caplog.at_level(logging.INFO, "hf_anomaly"):
        splits = load_one_class(tmp_path)
    assert caplog.messages == [f"3 anomalies of split 'train' of {str(tmp_path)!r} are left out ({remedy} them)"]
    assert splits.test_missing_reason == f"{str(tmp_path)!r} has no split 'test'; its splits: train; {remedy} the anomalies there"
    assert load_one_class(tmp_path, protocol="balanced").test_missing_reason is None
    assert load_one_class(tmp_path / "good").test_missing_reason.endswith("its splits: train")


def test_swapped_splits_are_warned_of(tmp_path, caplog):
    write(tmp_path, {"train/good": 4, "train/crack": 3, "train/stain": 2, "test/good": 4})
    load_one_class(tmp_path)
    assert f"5 anomalies of split 'train' of {str(tmp_path)!r} are left out, more than half of it: are the splits swapped" in caplog.text
    caplog.clear()
    load_one_class(tmp_path, normal_label="good")  # one class against the rest
    load_one_class("digits")
    write(tmp_path / "pool", {"good": 6, "crack": 20})
    load_one_class(tmp_path / "pool", protocol="balanced")  # there is one split, and as many cracks test as good ones
    assert "more than half" not in caplog.text


# Evaluation only


def test_evaluation_takes_the_same_rows_and_nothing_else(tmp_path):
    write(tmp_path, {"train/ok": 4, "calibration/ok": 2, "test/ok": 1, "test/ko": 2})
    splits = load_one_class(tmp_path, evaluation_only=True)
    assert splits.normal_label == "ok", "the only class of the training split"
    assert splits.train is splits.calibration is splits.test_missing_reason is None
    assert splits.test["label"][:] == load_one_class(tmp_path).test["label"][:] == [1, 1, 0]
    for path in (tmp_path / "train" / "ok").iterdir():  # neither the training images nor the seed matter
        path.write_bytes(b"no image")
    assert load_one_class(tmp_path, evaluation_only=True, seed=1).split_hash == splits.split_hash
    (tmp_path / "test" / "ok" / "0.png").unlink()
    assert load_one_class(tmp_path, evaluation_only=True, normal_label="ok").split_hash != splits.split_hash


def test_evaluation_needs_no_training_split(tmp_path):
    splits = load_one_class(write(tmp_path / "folder", {"test/good": 2, "test/bad": 1}, (16, 20)), evaluation_only=True)
    assert splits.test["label"][:] == [1, 0, 0]
    assert (splits.num_channels, splits.native_size) == (1, 20)
    path = save_npz(tmp_path / "x.npz", train_images=None, train_labels=None, val_images=None)
    assert load_one_class(path, evaluation_only=True, normal_label=0).test["label"][:] == [0, 1] * 6


def test_evaluation_of_a_source_without_splits(tmp_path, caplog):
    for source, labels in [
        (write(tmp_path / "folder", {"good": 2, "bad": 1}), [1, 0, 0]),
        (save_parquet(tmp_path / "x.parquet", name="label"), [0, 1] * 5),
    ]:
        caplog.clear()
        splits = load_one_class(source, evaluation_only=True)
        assert splits.test["label"][:] == labels
        assert splits.train is splits.calibration is splits.test_missing_reason is None
        assert "must not have been trained on it" in caplog.text


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/good": 1, "val/good": 1}, "has no split 'test'; its splits: train, validation; choose with eval_split"),
        ({"val/good": 1}, "has no split 'test'; its splits: validation"),
        ({"train/good": 1, "test": 1}, "split 'test' .* has no labels to evaluate against; give label_column"),
        ({".": 2}, "has no labels to evaluate against"),
    ],
)
def test_nothing_to_evaluate(tmp_path, counts, message):
    with pytest.raises(InputError, match=message) as error:
        load_one_class(write(tmp_path / "x", counts), evaluation_only=True)
    one_line(error)


# Errors


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"train_images": None}, {}, "has no split 'train'; its splits: val, test"),
        ({f"{split}_images": None for split in ("train", "val", "test")}, {}, "has no array of images; name them <split>_images"),
        ({"train_images": pixels(0, (12, 8, 8, 4))}, {}, r"'train_images' has shape \(12, 8, 8, 4\)"),
        ({"train_images": np.zeros((12, 8, 8), np.int64)}, {}, "'train_images' is of type int64; save uint8"),
        ({"train_images": np.full((12, 8, 8), 7.0)}, {}, "'train_images', row 0: floats outside"),
        ({"train_labels": np.zeros(5)}, {}, r"'train_labels' has shape \(5,\); \(12,\)"),
        ({"train_labels": np.zeros((12, 2))}, {}, r"'train_labels' has shape \(12, 2\)"),
        ({"train_labels": np.array([None] * 12)}, {}, "not an .npz file of plain arrays .*allow_pickle"),
        (
            {"train_labels": np.array([0.0] * 11 + [np.nan])},
            {"normal_label": 0},
            r"row 11 \(counted from 0\) of split 'train' .* has no label",
        ),
        ({}, {}, r"which class .* is normal\? Give normal_label; its labels: '0' \(12\), '1' \(12\)"),
        ({}, {"normal_label": 7}, "normal_label=7 is no label of .*'0'"),
        ({"train_labels": np.ones(12)}, {"normal_label": 0}, r"no image of split 'train' .* is '0'; its labels: '1' \(12\)"),
        ({}, {"label_column": "grade"}, "has no column 'grade'; its columns: image, label"),
        ({}, {"image_column": "scan", "normal_label": 0}, "has no column 'scan'; its columns: image, label"),
        ({}, {"image_column": "label", "normal_label": 0}, "column 'label' of split 'train' of '.*x.npz' as images cannot be loaded"),
        ({}, {"calibration_fraction": 1.0}, r"calibration_fraction=1.0 is outside \[0, 1\)"),
        ({}, {"eval_split": "tset"}, "eval_split='tset'"),
        ({}, {"revision": "main"}, "is local"),
    ],
)
def test_errors_of_arrays_and_options(tmp_path, arrays, options, message):
    with pytest.raises(InputError, match=message) as error:
        load_one_class(save_npz(tmp_path / "x.npz", **arrays), **options)
    one_line(error)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_floats_name_array_and_row(tmp_path, value):
    images = np.zeros((12, 8, 8))
    images[4, 1, 1] = value
    with pytest.raises(InputError, match="array 'test_images', row 4: NaN or infinite"):
        load_one_class(save_npz(tmp_path / "x.npz", test_images=images), normal_label=0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"empty": 0}, "holds neither images nor parquet"),
        ({"test/good": 1}, "has no split 'train'; its splits: test"),
        ({"good": 1}, "single normal training image"),
        ({"train/ok": 1, "train/ko": 1}, r"which class .* '(ok|ko)' \(1\), '(ok|ko)' \(1\)"),
        ({"train": 2, "train/good": 2}, "0.png lies beside class folders"),
        ({"bottle/train/good": 2, "bottle/test/hole": 2}, "bottle is the only class folder .* give '.*bottle'"),
    ],
)
def test_errors_of_folders(tmp_path, counts, message):
    for folder, count in counts.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            PIL.Image.fromarray(pixels(i)).save(tmp_path / folder / f"{i}.png")
    with pytest.raises(InputError, match=message) as error:
        load_one_class(tmp_path)
    one_line(error)


@pytest.mark.parametrize(("mode", "name"), [("I;16", "deep.png"), ("F", "deep.tiff"), ("I", "deep.tiff")])
@pytest.mark.parametrize("folder", ["train", "test"])
def test_more_than_8_bits_are_refused(tmp_path, mode, name, folder):
    write(tmp_path, {"train/good": 3, "test/good": 1, "test/bad": 1})
    PIL.Image.new(mode, (16, 16)).save(tmp_path / folder / "good" / name)
    with pytest.raises(InputError, match=f"{name}: 16-bit, 32-bit, float or signed image .*8 bits") as error:
        load_one_class(tmp_path)
    one_line(error)


def test_unreadable_images_are_named(tmp_path):
    write(tmp_path, {"good": 3})
    (tmp_path / "good" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"good/1\.png: unreadable image \(unknown image format\)") as error:
        load_one_class(tmp_path)
    one_line(error)
    (tmp_path / "good" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"good/1\.png: unreadable image \(the file is empty\)"):
        load_one_class(tmp_path)
    broken = Dataset.from_dict(
        {"image": [png(pixels(0)), {"bytes": b"no image", "path": None}], "row": [3, 17]},
        Features({"image": Image(decode=False), "row": Value("int64")}),
    )
    with pytest.raises(InputError, match=r"^row 17 of split 'train': unreadable"):
        check_images(broken, "train")
    assert check_images(broken.select([0]), "train") == [("L", (16, 16))]


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "missing.npz", "", "what is this?"])
def test_names_that_are_no_source(name):
    with pytest.raises(InputError, match="neither an existing file or folder nor the id"):
        load_one_class(name)


def test_other_files_and_an_unreachable_hub(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(InputError, match="not a kind of file"):
        load_one_class(tmp_path / "x.txt")
    (tmp_path / "x.parquet").write_text("text")
    with pytest.raises(InputError, match=r"x\.parquet cannot be loaded") as error:
        load_one_class(tmp_path / "x.parquet")
    one_line(error)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"someone/no-such-dataset: there is no such folder here, and .* cannot be reached") as error:
        load_one_class("someone/no-such-dataset")
    one_line(error)


def test_lists_are_no_labels(tmp_path):
    path = save_parquet(tmp_path / "x.parquet", [[0, 1], [1]], "labels", List(Value("int64")))
    with pytest.raises(InputError, match=r"column 'labels' .* holds List"):
        load_one_class(path)


# Transforms


def test_decode_image_turns_it_upright(tmp_path):
    image = PIL.Image.fromarray(pixels(0, (8, 16)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90° clockwise
    image.save(tmp_path / "x.png", exif=exif)
    for value in ({"bytes": None, "path": str(tmp_path / "x.png")}, PIL.Image.open(tmp_path / "x.png")):
        assert np.array_equal(np.asarray(decode_image(value, "")), np.rot90(pixels(0, (8, 16)), -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "YCbCr", "CMYK", "LAB", "La"])
def test_decode_image_takes_8_bit_modes(mode):
    expected = {"CMYK": "RGB", "LAB": "RGB", "La": "LA"}.get(mode, mode)  # of which Pillow makes gray and RGB
    assert decode_image(PIL.Image.new(mode, (8, 8)), "x").mode == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_decode_mask_takes_every_mode(tmp_path, mode):
    marked = pixels(0, (8, 16)) > 200
    if mode in ("1", "L", "I;16", "I", "F"):
        image = PIL.Image.fromarray(marked if mode == "1" else marked.astype({"L": "u1", "I;16": "u2", "I": "i4", "F": "f4"}[mode]))
    elif mode in ("P", "PA"):
        image = PIL.Image.fromarray(marked.astype(np.uint8))
        image.putpalette([0, 0, 0, 0, 0, 3])
        image = image.convert(mode)
    else:
        image = PIL.Image.fromarray(marked.astype(np.uint8) * (255 if mode == "CMYK" else 3))
        blue = PIL.Image.merge("RGB", [PIL.Image.new("L", image.size)] * 2 + [image])
        image = image.convert(mode) if mode == "LA" else blue.convert(mode)
    assert image.mode == mode
    path = tmp_path / "mask.tif"
    image.save(path, tiffinfo={274: 6})
    assert np.array_equal(decode_mask({"path": str(path), "bytes": None}, "mask of row 3"), np.rot90(marked, -1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_mask_of_lossy_levels(tmp_path, mode):
    """As Kvasir-SEG has them."""
    y, x = np.mgrid[:64, :64]
    for radius in (20, 0):
        marked = (y - 30) ** 2 + (x - 33) ** 2 < radius**2
        PIL.Image.fromarray(marked).convert(mode).save(tmp_path / "mask.jpg", quality=90)
        assert np.array_equal(decode_mask({"path": str(tmp_path / "mask.jpg"), "bytes": None}, "mask of row 3"), marked)


def test_decode_image_errors(tmp_path, monkeypatch):
    data = png(pixels(0, (32, 32)))["bytes"]
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for value, message in [
        ({"bytes": data[: len(data) // 2], "path": "a.png"}, r"^row 3 \(a\.png\): unreadable image"),
        ({"bytes": b"none", "path": "/a.dcm"}, r"^row 3 \(/a\.dcm\): unreadable image \(unknown"),  # not a file of this machine
        ({"bytes": None, "path": str(tmp_path / "cut.png")}, r"cut\.png: unreadable image"),
        ({"bytes": None, "path": str(tmp_path / "none.png")}, r"none\.png: unreadable image \(No such file.*restore"),
        ({"bytes": None, "path": str(tmp_path)}, r"unreadable image \(Is a directory\); name the images in it"),  # not: remove it
        (None, "^row 3: the image is missing"),
        ("a/path.png", r"^row 3: a str is no image; .*cast_column\('image', datasets.Image\(\)\)"),
        (PIL.Image.new("I;16", (8, 8)), "^row 3: 16-bit"),
        (np.zeros((8, 8), np.float32), "^row 3: an array must be uint8"),
        *((np.zeros(shape, np.uint8), "^row 3: an array must be uint8") for shape in ((8,), (8, 8, 2), (8, 8, 4), (8, 8, 3, 1))),
    ]:
        with pytest.raises(InputError, match=message) as error:
            decode_image(value, "row 3")
        one_line(error)
    with monkeypatch.context() as patch:  # a superuser may read anything
        patch.setattr("PIL.Image.open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InputError, match=r"cut\.png: unreadable image \(Permission denied\); change its permissions"):
            decode_image({"bytes": None, "path": str(tmp_path / "cut.png")}, "row 3")
    assert [decode_image(np.zeros((8, 8, *channels), np.uint8), "").mode for channels in ((), (1,), (3,))] == ["L", "L", "RGB"]


def test_prepare_and_collate(tmp_path):
    write(tmp_path, {"train/good": 4, "test/good": 1, "test/bad": 2})
    test = prepare(load_one_class(tmp_path).test, processor, extra_columns=["row"])
    batch = next(iter(DataLoader(test, batch_size=3, collate_fn=collate)))
    assert batch["pixel_values"].shape == (3, 1, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 1, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["row"].tolist() == [0, 1, 2]
    expected = processor([PIL.Image.open(tmp_path / "test" / "bad" / "1.png")], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(test[1]["pixel_values"], expected)


def test_prepare_takes_one_split(refused):
    for other in (DatasetDict(train=Dataset.from_dict({"image": []})), [pixels(0)], processor):
        with refused("one split", type(other).__name__):
            prepare(other, processor)


def test_labels_of_either_name_are_kept():
    rows = Dataset.from_dict(
        {"image": [png(pixels(i)) for i in range(3)], "labels": [1, 0, 1]}, Features({"image": Image(), "labels": Value("int64")})
    )
    stream = rows.to_iterable_dataset()
    for dataset in (rows, rows.rename_column("labels", "label"), stream, stream.map(lambda row: row)):  # which knows no features
        prepared = list(prepare(dataset, processor))
        assert [row["labels"] for row in prepared] == [1, 0, 1]
        assert set(prepared[0]) == {"pixel_values", "labels"}
    both = rows.add_column("label", [0, 0, 0])
    assert [row["labels"] for row in prepare(both, processor)] == [0, 0, 0]


@pytest.mark.parametrize("kind", [int, np.int64, bool, float, torch.tensor, lambda label: torch.tensor(float(label))])
def test_a_column_label_becomes_labels(kind):
    """As of `datasets.map(processor)`, which keeps its name; transformers' own collators do so, too."""
    rows = [{"pixel_values": torch.zeros(1, 2, 2), "label": kind(label)} for label in (0, 1)]
    batch = collate(rows)
    assert set(batch) == {"pixel_values", "labels"}
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([0, 1], torch.int64)
    both = collate([{**row, "labels": 0} for row in rows])
    assert (both["labels"].tolist(), both["label"].tolist()) == ([0, 0], [0, 1])


@pytest.mark.parametrize("label", ["bad", None, 0.9, np.nan, [1, 0], np.eye(9), torch.tensor(0.9), torch.tensor([1, 0])])
@pytest.mark.parametrize("alone", [True, False])
def test_labels_that_are_no_whole_numbers(label, alone, refused):
    with refused("labels must be whole numbers", "0 for normal images"):
        collate([{"pixel_values": torch.zeros(1, 2, 2), "labels": value} for value in ([] if alone else [0]) + [label]])


@pytest.mark.parametrize("row", [(torch.zeros(1, 2, 2), 0), torch.zeros(1, 2, 2)])
def test_rows_that_are_no_dicts(row, refused):
    with refused(f"is a {type(row).__name__}", "pixel_values", "data_collator"):
        collate([row, row])


@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist])
def test_pixel_values_that_are_no_tensors(kind):
    rows = np.random.default_rng(0).random((3, 1, 8, 8))
    batch = collate([{"pixel_values": kind(row), "labels": 0} for row in rows])
    assert torch.equal(batch["pixel_values"], torch.from_numpy(rows).float())
    assert not collate([{"pixel_values": kind(np.zeros((1, 8, 8), np.int64))}])["pixel_values"].is_floating_point()


def test_collate_leaves_what_is_no_number():
    rows = [{"pixel_values": torch.zeros(1, 2, 2), "site": site, "age": age, "dose": 0.5} for site, age in (("A", 40), ("B", None))]
    batch = collate(rows)
    assert batch["site"] == ["A", "B"]
    assert batch["age"] == [40, None]
    assert batch["dose"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((8, 8, 3), 3)])
def test_dissolved_images_stay_levels(shape, channels):
    views = [[pixels(2 * i, shape), pixels(2 * i + 1, shape)] for i in range(3)]
    columns = {"image": [png(pixels(i)) for i in range(3)], "dissolved_images": [[png(view) for view in row] for row in views]}
    dataset = Dataset.from_dict(columns, Features({"image": Image(), "dissolved_images": List(Image())}))
    prepared = prepare(dataset, processor)
    batch = collate([prepared[i] for i in range(3)])
    with pytest.raises(InputError, match=r"image, label.*prepare\(dataset, processor\)"):
        collate([{"image": None, "label": 0}])
    assert set(batch) == {"pixel_values", "dissolved_pixel_values"}  # no labels, none invented
    dissolved = batch["dissolved_pixel_values"]
    assert dissolved.shape == (3, 2, channels, 8, 8)
    assert dissolved.dtype == torch.uint8
    assert torch.equal(dissolved, torch.from_numpy(np.array(views)).reshape(3, 2, 8, 8, channels).permute(0, 1, 4, 2, 3))


def test_transform_errors():
    with pytest.raises(InputError, match=r"no column 'image' in the batch; its columns: label; .*remove_unused_columns"):
        PixelTransform(processor)({"label": [0]})
    with pytest.raises(InputError, match="no column 'mask'"):
        PixelTransform(processor, ["mask"])({"image": [pixels(0)]})
    with pytest.raises(InputError, match=r"^row 5: the image is missing"):
        PixelTransform(processor)({"image": [pixels(0), None], "row": [4, 5]})
    with pytest.raises(InputError, match=r"^dissolved views of image 0 of the batch: .* one size"):
        PixelTransform(processor)({"image": [pixels(0)], "dissolved_images": [[pixels(0), pixels(0, (8, 8))]]})
    with pytest.raises(InputError, match="L or RGB images"):
        PixelTransform(processor)({"image": [pixels(0)], "dissolved_images": [[PIL.Image.new("P", (8, 8))]]})
    broken = {"bytes": b"no image", "path": None}
    for image, view, name in ((broken, png(pixels(0)), "image"), (png(pixels(0)), broken, "dissolved views of image")):
        columns = {"image": [image], "dissolved_images": [[view]]}
        rows = Dataset.from_dict(columns, Features({"image": Image(), "dissolved_images": List(Image(), length=1)}))
        for dataset in (rows, rows.to_iterable_dataset()):
            with pytest.raises(InputError, match=f"^{name} 0 of the batch: unreadable"):
                next(iter(prepare(dataset, processor)))


# Images of any class


def test_load_unlabelled(tmp_path, refused):
    write(tmp_path / "pets", {"train/cats": 3, "train/dogs": 2, "test/cats": 4})
    images = load_unlabelled(tmp_path / "pets")
    assert (len(images), images.column_names, images["label"][:]) == (5, ["image", "label", "row"], [0] * 5)
    assert len(load_unlabelled("digits")) == 1437
    write(tmp_path / "flat", {".": 3})
    assert len(load_unlabelled(tmp_path / "flat")) == 3
    np.savez(tmp_path / "scans.npz", val_images=pixels(0, (4, 8, 8)), test_images=pixels(1, (2, 8, 8)))
    with refused("no split 'train'", "val, test"):
        load_unlabelled(tmp_path / "scans.npz")
    with refused("no-such-data"):
        load_unlabelled(str(tmp_path / "no-such-data.npz"))


def test_an_image_that_is_too_large_to_open(tmp_path):
    PIL.Image.new("1", (14_000, 14_000)).save(tmp_path / "line-scan.png")
    with pytest.raises(InputError, match=r"line-scan\.png: .*shrink it or cut it up"):
        decode_image({"path": str(tmp_path / "line-scan.png")}, "")


def test_datasets_at_hand(tmp_path, refused):
    """From Python, and as `save_to_disk` writes them."""
    write(tmp_path / "folder", {"train/normal": 10, "test/normal": 3, "test/sick": 4})
    splits = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"))
    splits.save_to_disk(tmp_path / "saved")
    splits["train"].save_to_disk(tmp_path / "train")
    from_folder = load_one_class(tmp_path / "folder", seed=1)
    for source in (splits, dict(splits), tmp_path / "saved"):
        found = load_one_class(source, normal_label="normal", seed=1)
        assert (found.split_hash, found.train_digest) == (from_folder.split_hash, from_folder.train_digest)
        assert (len(found.train), len(found.calibration), len(found.test)) == (8, 2, 7)
    for source in (splits["train"].remove_columns("label"), tmp_path / "train"):
        found = load_one_class(source)
        assert (len(found.train), len(found.calibration), found.test) == (8, 2, None)
        assert len(load_unlabelled(source)) == 10
    assert hub_dataset(load_one_class(splits, normal_label="normal").source) is None
    with refused("a datasets.Dataset", "IterableDataset", "stream_one_class"):
        load_one_class(splits["train"].to_iterable_dataset())
    with refused("a datasets.Dataset", "list"):
        load_one_class([1, 2])


@pytest.mark.parametrize(
    "format", [{"type": "torch"}, {"type": "numpy"}, {"type": "arrow"}, {"type": "torch", "columns": ["scan"]}], ids=str
)
def test_a_format_changes_no_label(tmp_path, format):
    """A label that is a tensor would be of another class than the same number in the other split."""
    train, test = (
        Dataset.from_parquet(str(save_parquet(tmp_path / f"{name}.parquet", labels, "label", Value("float32"))))
        for name, labels in (("train", [0.0] * 10), ("test", [0.0, 1.0, 1.0]))
    )
    formatted = train.with_format(**format)
    formatted.save_to_disk(tmp_path / "saved")  # which keeps the format
    for source in ({"train": formatted, "test": test}, {datasets.Split.TRAIN: formatted, datasets.Split.TEST: test}):
        found = load_one_class(source)
        assert (found.normal_label, len(found.train), found.test["label"][:]) == ("0", 8, [0, 1, 1])
    assert load_one_class(tmp_path / "saved").normal_label == "0"
    assert formatted.format["type"] == format["type"]  # the caller's dataset stays as it is


def test_a_transform_is_left_out(tmp_path, caplog):
    write(tmp_path / "normals", {"normal": 10})
    split = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "normals"), split="train")
    assert len(load_one_class(split.with_transform(lambda batch: {"pixel_values": batch["image"]})).train) == 8
    assert "The transform of split 'train' is left out" in caplog.text
