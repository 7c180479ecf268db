import logging

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from hf_anomaly import load_one_class
from hf_anomaly.data import find_near_copies, thumbnail
from hf_anomaly.training import DataArguments
from hf_anomaly.training.runs import load_training_images


def write(path, levels):
    """Of 40 × 40 pixels, all files of one length; one number is a flat image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(np.broadcast_to(levels, (8, 8)).astype(np.uint8))
    image.resize((40, 40), PIL.Image.Resampling.BICUBIC).save(path, "BMP")
    return str(path)


@pytest.fixture(scope="module")
def zeros():
    """178 different zeros (8, 8), levels from 40 to 200."""
    digits = load_digits()
    return digits.images[digits.target == 0] * 10 + 40


def darker(image):
    """The same scene at another exposure, one pixel of it changed."""
    other = image * 0.7 + 5
    other[0, 0] += 10
    return other


def thumbnails(images):
    return np.stack([thumbnail(PIL.Image.fromarray(image.astype(np.uint8))) for image in images])


def slow(among, images):
    """As it is defined, one image at a time."""

    def standardized(image):
        centred = image.astype(float) - image.mean()
        return centred / max(np.linalg.norm(centred), 1e-6)

    usual = max(10, round(len(among) / 20))
    found = {}
    for i, image in enumerate(images):
        distances = [np.linalg.norm(standardized(image) - standardized(other)) for other in among]
        if min(distances) < sorted(distances)[usual - 1] / 4:
            found[i] = int(np.argmin(distances))
    return found


def test_near_copies_are_found_as_they_are_defined(zeros):
    among = thumbnails(zeros[:120])
    images = thumbnails([*zeros[120:], *map(darker, zeros[:120:10])])
    found = find_near_copies(among, images)
    assert found == slow(among, images) == {58 + i: 10 * i for i in range(12)}


def test_many_near_copies(zeros, monkeypatch):
    """300 others, of which the fifteenth nearest tells what is usual: up to fourteen frames of one scene are near copies. In pieces it is the same."""
    rng = np.random.default_rng(0)
    frames = thumbnails([zeros[0] + rng.normal(0, 1, (8, 8)) for _ in range(16)])
    others = rng.integers(0, 255, (300, 16, 16), dtype=np.uint8)
    for count, is_found in ((14, True), (15, False)):
        among = np.concatenate([frames[:count], others[count:]])
        assert bool(find_near_copies(among, frames[15:])) == is_found
        assert find_near_copies(among, frames) == slow(among, frames)
    whole = find_near_copies(others, others)
    monkeypatch.setattr("hf_anomaly.data.overlaps._CHUNK_VALUES", 700)
    assert find_near_copies(others, others) == whole == {i: i for i in range(300)}


def test_images_that_are_all_alike_are_no_near_copies(zeros):
    rng = np.random.default_rng(0)
    alike = thumbnails([zeros[0] + rng.normal(0, 3, (8, 8)) for _ in range(80)])
    assert find_near_copies(alike[:60], alike[60:]) == {}
    flat = np.full((30, 16, 16), 7, np.uint8)
    assert find_near_copies(flat, flat) == {}
    assert find_near_copies(alike[:19], alike[:19]) == {}  # too few to say
    assert len(find_near_copies(alike[:20], alike[:20])) == 20
    assert find_near_copies(alike, alike[:0]) == {}


@pytest.mark.parametrize("image_size", [40, 20])  # 20: training images are shrunk, and have no files of their own
def test_near_copies_are_told(zeros, tmp_path, caplog, image_size):
    for i, image in enumerate(zeros[:60]):
        write(tmp_path / f"train/normal/{i}.bmp", image)
    for i, image in enumerate(zeros[60:80]):
        write(tmp_path / f"calibration/normal/{i}.bmp", image)
        write(tmp_path / f"test/normal/{i}.bmp", zeros[80 + i])
        write(tmp_path / f"test/bad/{i}.bmp", darker(zeros[i]))  # anomalies may look like whatever they come from
    arguments = DataArguments(dataset_name=str(tmp_path), image_size=image_size)
    with caplog.at_level(logging.WARNING):
        assert load_training_images(arguments, 0)[0].num_near_copies == 0
    assert not caplog.messages

    write(tmp_path / "calibration/normal/near.bmp", darker(zeros[27]))
    write(tmp_path / "test/normal/near.bmp", darker(zeros[28]))
    with caplog.at_level(logging.WARNING):
        assert load_training_images(arguments, 0)[0].num_near_copies == 1
    for message, split, number in zip(caplog.messages, ("calibration", "test"), (27, 28), strict=True):
        assert f"1 of 21 normal images of split {split!r} look nearly the same as one that trains" in message
        assert str(tmp_path / split / "normal" / "near.bmp") in message
        assert str(tmp_path / f"train/normal/{number}.bmp") in message


def test_copies_among_training_images_are_told(tmp_path, caplog):
    for level in range(10):
        write(tmp_path / f"train/normal/{level}.bmp", level)
    for level in (100, 200):
        write(tmp_path / f"calibration/normal/{level}.bmp", level)
    for kind, level in (("normal", 50), ("bad", 60)):
        write(tmp_path / "test" / kind / f"{level}.bmp", level)
    with caplog.at_level(logging.WARNING):
        assert load_one_class(tmp_path).num_test_copies == 0
    assert not caplog.messages

    copied = write(tmp_path / "test/bad/copied.bmp", 3)
    held_out = write(tmp_path / "calibration/normal/copied.bmp", 4)
    with caplog.at_level(logging.WARNING):
        assert load_one_class(tmp_path).num_test_copies == 1
        assert load_one_class(tmp_path, evaluation_only=True).num_test_copies is None  # there the training images are not looked at
    calibration, results = caplog.messages
    for message, split, path in ((calibration, "3 images of split 'calibration'", held_out), (results, "3 images of split 'test'", copied)):
        assert f"1 of {split}" in message
        assert path in message


def test_copies_of_images_held_out_for_calibration_are_told(tmp_path, caplog):
    """Each training image has its copy in the test split, whichever side of the division it fell on."""
    for level in range(10):
        write(tmp_path / f"train/normal/{level}.bmp", level)
        write(tmp_path / f"test/normal/{level}.bmp", level)
    write(tmp_path / "test/bad/100.bmp", 100)
    with caplog.at_level(logging.WARNING):
        assert load_one_class(tmp_path).num_test_copies == 10
    (message,) = caplog.messages
    assert message.startswith("10 of 11 images of split 'test' are byte for byte also among the training or calibration images")
