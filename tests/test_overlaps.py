import logging

import numpy as np
import PIL.Image

from hf_anomaly import load_one_class


def write(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 8), level, dtype=np.uint8)).save(path, "BMP")  # all of one length
    return str(path)


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

    write(tmp_path / "calibration/normal/too.bmp", 3)
    assert load_one_class(tmp_path).num_test_copies == 1, "what trains and calibrates is counted once"


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
