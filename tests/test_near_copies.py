"""Near copies among images: found, told of, and listed by `hf-anomaly group`."""

import csv
import logging
import os

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from hf_anomaly import cli, load_one_class
from hf_anomaly.data import find_near_copies, group_near_copies, thumbnail
from hf_anomaly.training import DataArguments
from hf_anomaly.training.runs import load_training_images


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
    monkeypatch.setattr("hf_anomaly.data.near_copies._CHUNK_VALUES", 700)
    assert find_near_copies(others, others) == whole == {i: i for i in range(300)}


def test_images_that_are_all_alike_are_no_near_copies(zeros):
    rng = np.random.default_rng(0)
    alike = thumbnails([zeros[0] + rng.normal(0, 3, (8, 8)) for _ in range(80)])
    assert find_near_copies(alike[:60], alike[60:]) == {}
    flat = np.full((30, 16, 16), 7, np.uint8)
    assert find_near_copies(flat, flat) == {}
    assert find_near_copies(alike[:19], alike[:19]) == {}  # too few to say
    assert len(find_near_copies(alike[:20], alike[:20])) == 20
    checked = np.indices((30, 16, 16))[1:].sum(0).astype(np.uint8) % 2  # of which the distance is 0 without rounding
    assert find_near_copies(checked, checked) == {}
    assert find_near_copies(alike, alike[:0]) == {}


def test_near_copies_of_near_copies_belong_together(zeros, monkeypatch):
    """Frames of a sequence, of which the first and the last are not near copies of one another."""
    first, last = zeros[0], zeros[1]
    frames = [first + share * (last - first) for share in np.linspace(0, 1, 9)]
    images = thumbnails([*zeros[2:40], *frames, *map(darker, zeros[2:5])])
    assert 46 not in slow(images[[*range(38), 38]], images[[46]])
    expected = [*range(38), *[38] * 9, 0, 1, 2]
    assert group_near_copies(images).tolist() == expected
    monkeypatch.setattr("hf_anomaly.data.near_copies._CHUNK_VALUES", 200)
    assert group_near_copies(images).tolist() == expected
    assert group_near_copies(images[[*range(18), 38, 39]]).tolist() == list(range(20))  # of 19 others nothing can be said
    assert group_near_copies(images[[*range(19), 38, 39]]).tolist() == [*range(19), 19, 19]
    rng = np.random.default_rng(0)
    ten = thumbnails([zeros[0] + rng.normal(0, 1, (8, 8)) for _ in range(10)])  # each has nine others, and the tenth nearest is far
    assert group_near_copies(np.concatenate([images[:30], ten])).tolist() == [*range(30), *[30] * 10]
    assert group_near_copies(images[:0]).tolist() == []


def test_equal_images_belong_together_however_many_there_are(zeros):
    """Of more than a twentieth of all the usual distance is 0, which no distance is less than; and few or flat images have none."""
    images = thumbnails(zeros[:60])
    images[[3, *range(20, 50)]] = images[3]
    assert group_near_copies(images)[[3, *range(20, 50)]].tolist() == [3] * 31
    assert group_near_copies(images[[0, 1, 0]]).tolist() == [0, 1, 0]
    flat = np.repeat(np.array([7, 9, 7], np.uint8), 256).reshape(3, 16, 16)
    assert group_near_copies(flat).tolist() == [0, 1, 0]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image.astype(np.uint8)).resize((40, 40), PIL.Image.Resampling.BICUBIC).save(path)


@pytest.mark.parametrize("image_size", [40, 20])  # 20: training images are shrunk, and have no files of their own
def test_near_copies_are_told(zeros, tmp_path, caplog, image_size):
    for i, image in enumerate(zeros[:60]):
        save(tmp_path / f"train/normal/{i}.png", image)
    for i, image in enumerate(zeros[60:80]):
        save(tmp_path / f"calibration/normal/{i}.png", image)
        save(tmp_path / f"test/normal/{i}.png", zeros[80 + i])
        save(tmp_path / f"test/bad/{i}.png", darker(zeros[i]))  # anomalies may look like whatever they come from
    arguments = DataArguments(dataset_name=str(tmp_path), image_size=image_size)
    with caplog.at_level(logging.WARNING):
        assert load_training_images(arguments, 0)[0].num_near_copies == 0
    assert not caplog.messages

    few = DataArguments(dataset_name=str(tmp_path), image_size=image_size, max_train_images=19)
    assert load_training_images(few, 0)[0].num_near_copies is None  # too few to say, which is not none

    save(tmp_path / "calibration/normal/near.png", darker(zeros[27]))
    save(tmp_path / "test/normal/near.png", darker(zeros[28]))
    with caplog.at_level(logging.WARNING):
        assert load_training_images(arguments, 0)[0].num_near_copies == 1
    for message, split, number in zip(caplog.messages, ("calibration", "test"), (27, 28), strict=True):
        assert f"1 of 21 normal images of split {split!r} look nearly the same as one that trains" in message
        assert str(tmp_path / split / "normal" / "near.png") in message
        assert str(tmp_path / f"train/normal/{number}.png") in message


@pytest.fixture
def scans(zeros, tmp_path):
    """30 normal images, of 6 of them a second one, and 10 others."""
    for i in range(30):
        save(tmp_path / f"scans/normal/{i:02d}.png", zeros[i])
    for i in range(6):
        save(tmp_path / f"scans/normal/{i:02d}-again.png", darker(zeros[i]))
    for i in range(10):
        save(tmp_path / f"scans/tumour/{i:02d}.png", zeros[40 + i])
    return tmp_path / "scans"


def listed(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_list_that_keeps_near_copies_together(scans, tmp_path, capsys):
    cli.main(["group", str(scans), "--output", str(tmp_path / "lists.csv")])
    out = capsys.readouterr().out
    assert "46 images in 40 groups, of which 6 hold several, the largest 2\n" in out
    assert f"--dataset_name {tmp_path / 'lists.csv'} --group_column group" in out
    rows = listed(tmp_path / "lists.csv")
    assert list(rows[0]) == ["file_name", "label", "split", "group"]
    group = {row["file_name"]: row["group"] for row in rows}
    assert set(group) == {str(path.relative_to(tmp_path)) for path in scans.rglob("*.png")}
    assert all(group[f"scans/normal/{i:02d}.png"] == group[f"scans/normal/{i:02d}-again.png"] for i in range(6))
    assert {row["label"] for row in rows if "tumour" in row["file_name"]} == {"tumour"}
    splits = load_one_class(tmp_path / "lists.csv", group_column="group", protocol="balanced", normal_label="normal")
    sides = [
        {group[os.path.relpath(image["path"], tmp_path)] for image in split["image"]}
        for split in (splits.train, splits.calibration, splits.test)
    ]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_what_a_list_says_already_is_kept(scans, tmp_path, capsys):
    """Splits, further columns, and masks; files are found from the new list's folder on."""
    names = sorted(path.relative_to(tmp_path) for path in scans.rglob("*.png"))
    masks = [names[0] if "tumour" in str(name) else "" for name in names]
    lines = [f"{name},{i % 3},{mask},{'test' if i % 2 else 'train'}" for i, (name, mask) in enumerate(zip(names, masks, strict=True))]
    (tmp_path / "mine.csv").write_text("\n".join(["scan,scanner,mask,split", *lines]))
    (tmp_path / "deep").mkdir()
    output = str(tmp_path / "deep" / "my list.csv")
    cli.main(["group", str(tmp_path / "mine.csv"), "--image_column", "scan", "--output", output])
    assert f"--dataset_name '{output}' --group_column group" in capsys.readouterr().out  # a shell takes it as it is
    rows = {row["file_name"]: row for row in listed(output)}
    for i, (name, mask) in enumerate(zip(names, masks, strict=True)):
        row = rows[f"../{name}"]
        assert (row["scanner"], row["split"]) == (str(i % 3), "test" if i % 2 else "train")
        assert row["mask"] == (f"../{mask}" if mask else "")
    assert len({row["group"] for row in rows.values()}) == 40


def test_columns_that_a_list_has_itself(scans, tmp_path, caplog):
    """Beside the images' column one called `image` or `file_name`; in metadata, text called `mask` or a split that is none."""
    names = sorted(path.relative_to(tmp_path) for path in scans.rglob("*.png"))
    lines = [f"{name},{i},{i}.tif" for i, name in enumerate(names)]
    output = tmp_path / "new.csv"

    def first_row(source, *further):
        caplog.clear()
        cli.main(["group", str(source), "--output", str(output), *further])
        return next(iter(listed(output)))

    (tmp_path / "list.csv").write_text("\n".join(["file_name,image,note", *lines]))
    expected = {"file_name": str(names[0]), "image": "0", "note": "0.tif", "split": "train", "group": "0"}
    assert first_row(tmp_path / "list.csv") == expected
    assert not caplog.messages
    (tmp_path / "list.csv").write_text("\n".join(["scan,image,file_name", *lines]))
    assert first_row(tmp_path / "list.csv", "--image_column", "scan") == {key: expected[key] for key in expected if key != "note"}
    assert "a list has no place for the columns file_name" in caplog.text
    lines = [f"{name.relative_to('scans')},normal,no,Test,{name.relative_to('scans')}" for name in names]
    (scans / "metadata.csv").write_text("\n".join(["file_name,label,mask,Split,other_file_name", *lines]))
    assert first_row(scans) == {"file_name": str(names[0]), "label": "normal", "split": "train", "group": "0"}
    assert "a list has no place for the columns mask, Split, other" in caplog.text
    (scans / "metadata.csv").write_text("\n".join(["file_name,label,mask_file_name", *(line.replace("no,Test,", "") for line in lines)]))
    assert first_row(scans)["mask"] == str(names[0])


def test_lists_behind_links(scans, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    cli.main(["group", str(scans), "--output", str(tmp_path / "link" / "list.csv")])
    assert len(load_one_class(tmp_path / "link" / "list.csv", normal_label="normal").train)
    (tmp_path / "link.csv").symlink_to(tmp_path / "linked.csv")
    cli.main(["group", str(scans), "--output", str(tmp_path / "link.csv")])
    assert len(listed(tmp_path / "linked.csv")) == 46


def test_few_images_tell_nothing(scans, tmp_path, caplog):
    for path in sorted((scans / "normal").glob("*.png"))[20:]:
        path.unlink()
    cli.main(["group", str(scans / "normal"), "--output", str(tmp_path / "list.csv")])
    assert "give at least 21" in caplog.text


def test_lists_that_cannot_be_written(scans, tmp_path, capsys):
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "scans.npz", train_images=pixels)
    (tmp_path / "grouped.csv").write_text(f"file_name,Group\n{scans}/normal/00.png,1\n")
    for argv, words in (
        ([tmp_path / "scans.npz"], "are no files of their own"),
        ([tmp_path / "grouped.csv"], "has a column 'Group' already"),
        ([scans, "--image_column", "scan"], "has no column 'scan'"),
        ([tmp_path / "gone"], "there is no"),
        ([scans, "--output", tmp_path / "list.txt"], "the name must end in .csv"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["group", *map(str, argv), *([] if "--output" in argv else ["--output", str(tmp_path / "new.csv")])])
        assert exit.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new.csv").exists()
