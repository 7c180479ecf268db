import io

import datasets
import numpy as np
import PIL.Image
import pytest

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
