"""Lists of image files: a CSV file with a row an image."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import check_name
from .formats import Reading, is_medical, slice_files

if TYPE_CHECKING:
    import datasets

FILE_COLUMNS = ("file_name", "image")  # the first as in an imagefolder's metadata.csv
SPLIT_COLUMN, MASK_COLUMN = "split", "mask"
SPLIT_NAMES = {  # ours -> the names under which a source may have it, compared in lower case
    "train": ("train", "training"),
    "calibration": ("calibration",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
DELIMITERS = ",;\t"


def our_split_name(name: str) -> str:
    """What we call a split of this name; itself, if it is none of ours."""
    return next((ours for ours, names in SPLIT_NAMES.items() if name.lower() in names), name)


def read_table(path: Path, image_column: str | None, reading: Reading | None, *, must_exist: bool = True) -> dict[str, datasets.Dataset]:
    """The splits of a CSV file, its columns as strings but for images and masks.

    Args:
        path: of a table with a header, separated by commas, semicolons or tabs. Its column `split`, if there is one, tells the splits (train or Training,
            test, val …) and is empty nowhere, else all train; its column `mask`, if there is one, names files, too. The case of these columns' names does
            not matter.
        image_column: with the images' files, absolute or from the table's folder on, with slashes or Windows' backslashes; None: `file_name`, or else `image`,
            in any case.
        reading: how DICOM and NIfTI files are cut into images, each with what the row says of the file; None: they are not.
        must_exist: whether a file that is not there is refused now, or when it is read.

    Raises:
        InputError: no such column, no rows, a row that does not fit the header or names a file that is not there; names the line.
    """
    import datasets

    header, rows = _rows(path, image_column)
    wanted = image_column or next(name for name in FILE_COLUMNS if name in header)
    files = [name for name in (wanted, MASK_COLUMN) if name in header]
    splits: dict[str, dict[str, list]] = {}
    for line, row in rows:
        if row[wanted] is None:
            raise InputError(f"{path}, line {line}: column {wanted!r} is empty; name the image's file")
        if row.get(SPLIT_COLUMN, "train") is None:  # not meant to train for that: it may be a test image
            raise InputError(f"{path}, line {line}: column {SPLIT_COLUMN!r} is empty; write train or test, or remove the column")
        row |= {name: _located(path, line, row[name], must_exist) for name in files if row[name] is not None}
        columns = splits.setdefault(our_split_name(row.get(SPLIT_COLUMN, "train")), {name: [] for name in header})
        for image in slice_files(Path(row[wanted]), reading) if reading is not None and is_medical(row[wanted]) else [row[wanted]]:
            for name, value in (row | {wanted: str(image)}).items():
                columns[name].append(value)
    kinds = {name: datasets.Image(decode=False) if name in files else datasets.Value("string") for name in header}
    return {split: datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)) for split, columns in splits.items()}


def _located(table: Path, line: int, file: str, must_exist: bool) -> str:
    """The path of a file that a line of a table names. Raises InputError: it must exist, and there is no such file."""
    located = str(table.parent / file)
    check_name(located)
    for path in (located, str(table.parent / file.replace("\\", "/"))):  # the latter where Windows wrote the table
        if os.path.isfile(path):
            return path
    if not must_exist:
        return located
    raise InputError(f"{table}, line {line}: there is no file {located}; paths are absolute, or begin in the table's folder")


def _rows(path: Path, image_column: str | None) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """The header, which has a column of files, and the rows with their line numbers; an empty entry is None. Columns that mean something have their name in
    lower case, except for labels, which are found in any case."""
    wanted = FILE_COLUMNS if image_column is None else (image_column,)
    ours = {*FILE_COLUMNS, SPLIT_COLUMN, MASK_COLUMN}

    def known(name: str) -> str:
        name = name.strip()
        return name.lower() if name != image_column and name.lower() in ours else name

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            names = {mark: list(map(known, next(csv.reader([first], delimiter=mark), []))) for mark in DELIMITERS}
            mark = next((mark for mark in DELIMITERS if any(name in names[mark] for name in wanted)), None)
            if mark is None:
                there = ", ".join(max(names.values(), key=len)) or "none"
                named = " or ".join(map(repr, wanted))
                raise InputError(f"{path} has no column {named} with the images' files; its columns: {there}; say which with image_column")
            header = names[mark]
            if len({name.lower() for name in header}) < len(header):
                raise InputError(f"{path}: two columns have the same name, or differ in case alone, of {', '.join(header)}; rename one")
            rows, reader = [], csv.reader(file, delimiter=mark)
            for values in reader:
                line = 1 + reader.line_num
                if len(values) not in (0, len(header)):
                    raise InputError(f"{path}, line {line}: {len(values)} values for {len(header)} columns; mend it")
                if any(filled := [value.strip() or None for value in values]):  # spreadsheets leave rows of nothing but commas
                    rows.append((line, dict(zip(header, filled, strict=True))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from error
    if not rows:
        raise InputError(f"{path} has no rows below its header")
    return header, rows
