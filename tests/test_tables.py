"""A CSV file that lists images."""

import numpy as np
import PIL.Image
import pytest

from hf_anomaly import load_one_class
from hf_anomaly.data import decode_image
from hf_anomaly.data.formats import Reading
from hf_anomaly.data.tables import read_table
from hf_anomaly.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """scans/0.png … scans/9.png, all of whose pixels have their number's value, and masks/8.png"""
    (tmp_path / "scans").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(10):
        PIL.Image.fromarray(np.full((12, 8), i, np.uint8)).save(tmp_path / f"scans/{i}.png")
    PIL.Image.fromarray(np.full((12, 8), 255, np.uint8)).save(tmp_path / "masks/8.png")
    return tmp_path


def values(dataset):
    return [int(np.asarray(decode_image(image, "")).max()) for image in dataset["image"]]


@pytest.mark.parametrize(("delimiter", "newline", "encoding"), [(",", "\n", "utf-8"), (";", "\r\n", "utf-8-sig"), ("\t", "\n", "utf-8")])
def test_splits_labels_and_masks(folder, delimiter, newline, encoding):
    rows = ["patient,file_name,mask,label,split"]
    rows += [f'"Müller, {i}",scans/{i}.png,,ok,train' for i in range(6)]
    rows += [
        "A,scans/9.png,,scratch,train",
        "B,scans/6.png,,ok,test",
        f"C,{folder}/scans/7.png,,ok,test",
        "D,scans/8.png,masks/8.png,scratch,test",
    ]
    table = newline.join(rows).replace(",", delimiter).replace(f"Müller{delimiter} ", "Müller, ")
    (folder / "list.csv").write_bytes(f"{table}{newline}{newline}".encode(encoding))

    raw = read_table(folder / "list.csv", None, Reading())
    assert raw["train"]["patient"][0] == "Müller, 0"
    splits = load_one_class(folder / "list.csv", normal_label="ok")
    assert sorted(values(splits.train) + values(splits.calibration)) == [0, 1, 2, 3, 4, 5]
    assert values(splits.test) == [6, 7, 8]
    assert splits.test["label"][:] == [0, 0, 1]
    assert [mask is None for mask in splits.test["mask"]] == [True, True, False]
    assert splits.test_missing_reason is None


def test_names_of_columns_and_splits_in_any_case(folder):
    """Else the images marked Test would train, as a spreadsheet wrote `Split`. So may backslashes in paths be, from Windows."""
    rows = ["File_Name; Label;Split;MASK"]
    rows += [f"scans/{i}.png;Good;{('Train', 'TRAINING')[i % 2]};" for i in range(6)]
    rows += ["scans/6.png;Good;Test;", "scans\\7.png;Good;testing;", "scans/8.png;Scratch;Test;masks\\8.png", "scans/9.png;Good;Val;"]
    (folder / "list.csv").write_text("\r\n".join(rows), encoding="utf-8-sig")
    assert read_table(folder / "list.csv", None, None).keys() == {"train", "test", "validation"}
    for asked in ({}, {"label_column": "Label"}):
        splits = load_one_class(folder / "list.csv", **asked)
        assert sorted(values(splits.train) + values(splits.calibration)) == [0, 1, 2, 3, 4, 5]
        assert (values(splits.test), splits.test["label"][:], splits.normal_label) == ([6, 7, 8], [0, 0, 1], "Good")
        assert [mask is None for mask in splits.test["mask"]] == [True, True, False]
    (folder / "list.csv").write_text("Image,File_Name\nscans/3.png,scans/4.png\n")
    assert values(load_one_class(folder / "list.csv", image_column="Image", calibration_fraction=0).train) == [3]


@pytest.mark.parametrize(("column", "asked"), [("file_name", None), ("image", None), ("path", "path")])
def test_without_labels_and_splits_all_train(folder, column, asked):
    lines = [column, *(f"scans/{i}.png" for i in range(5))]
    (folder / "LIST.CSV").write_text("\n".join(lines))
    splits = load_one_class(folder / "LIST.CSV", image_column=asked, calibration_fraction=0)
    assert values(splits.train) == [0, 1, 2, 3, 4]


def test_rows_without_values_are_left_out(folder):
    """As spreadsheets write them, where something was deleted."""
    (folder / "list.csv").write_text("file_name,label\nscans/0.png,a\n,\nscans/1.png,a\n,\n , \n")
    assert values(load_one_class(folder / "list.csv", calibration_fraction=0).train) == [0, 1]


def test_volumes_are_sliced(folder):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(4, 5, 3), np.eye(4)), folder / "head.nii")
    (folder / "list.csv").write_text("file_name,label\nhead.nii,healthy\nscans/1.png,healthy\n")
    raw = read_table(folder / "list.csv", None, Reading((0, 60)))
    assert values(raw["train"].rename_column("file_name", "image")) == pytest.approx([226, 238, 251, 1], abs=18)
    assert raw["train"]["label"][:] == ["healthy"] * 4
    assert len(read_table(folder / "list.csv", None, None)["train"]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,label\nscans/0.png,a\n\nscans/99.png,a\n", ["line 4", "scans/99.png"]),
        ('file_name,note\nscans/0.png,"two\nlines"\nscans/98.png,a\n', ["line 4", "scans/98.png"]),
        ("file_name,label\nscans/0.png,a,b\n", ["line 2", "3 values for 2 columns"]),
        ("file_name,label\nscans/0.png\n", ["line 2", "1 values for 2 columns"]),
        ("file_name,label\nscans/0.png,a\n ,b\n", ["line 3", "'file_name' is empty"]),
        ("file_name,split\nscans/0.png,train\nscans/1.png,\n", ["line 3", "'split' is empty", "train or test"]),
        ("file_name,mask\nscans/0.png,masks/0.png\n", ["line 2", "masks/0.png"]),
        ("path,label\nscans/0.png,a\n", ["'file_name' or 'image'", "path, label", "image_column"]),
        ("path;label\nscans/0.png;a\n", ["path, label"]),
        ("file_name,file_name\na,b\n", ["same name"]),
        ("file_name,split,Split\na,b,c\n", ["differ in case alone"]),
        ("file_name,label,Label\na,b,c\n", ["differ in case alone"]),
        ("file_name,label\n", ["no rows"]),
        (f"file_name\n{'a' * 300}.png\n", ["line 2", "there is no file"]),
        ("", ["'file_name'", "none"]),
        (b"file_name\n\xff\xfe\n", ["UTF-8"]),
    ],
)
def test_what_is_no_list_of_images(folder, content, words):
    (folder / "list.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load_one_class(folder / "list.csv")
    for word in ["list.csv", *words]:
        assert word in str(caught.value)
