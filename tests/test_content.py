import io
import logging

import datasets
import numpy as np
import PIL.Image
import pytest

from hf_anomaly import load_one_class
from hf_anomaly.data.content import content_digest, find_copies


def write(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 8), level, dtype=np.uint8)).save(path, "BMP")  # all of one length
    return str(path)


def images(values):
    return datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": datasets.Image(decode=False)}))


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{level}.bmp", level) for level in (10, 20, 30)]


def embedded(path):
    return {"bytes": open(path, "rb").read(), "path": None}


def test_copies_in_files_and_embedded(files):
    among = images([files[2], embedded(files[0])])
    assert find_copies(among, images([files[0], files[1], embedded(files[2])])) == [[0, 2]]
    assert find_copies(among, images([files[1]]), among) == [[], [0, 1]]
    assert find_copies(among, images([])) == find_copies(images([]), among) == [[]]


def test_images_of_a_length_of_their_own_are_not_read(files, monkeypatch):
    buffer = io.BytesIO()
    PIL.Image.new("L", (9, 9)).save(buffer, "BMP")
    monkeypatch.setattr("hf_anomaly.data.content._digest", lambda *image: pytest.fail("read"))
    assert find_copies(images([{"bytes": buffer.getvalue(), "path": None}]), images(files)) == [[]]


def test_the_digest_tells_content_and_order_but_not_where_it_lies(files):
    digest = content_digest(images(files))
    assert digest == content_digest(images([embedded(path) for path in files]))
    assert digest != content_digest(images(files[::-1])) != content_digest(images(files[:2]))


def test_a_file_that_is_gone_is_named(files, refused):
    among = images(files)
    for lost in (find_copies, lambda dataset, _: content_digest(dataset)):
        with refused("gone.bmp"):
            lost(images([files[0].replace("10", "gone")]), among)


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
