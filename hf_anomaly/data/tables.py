"""Lists of image files: a CSV file with a row an image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import check_name
from .formats import Reading, is_medical, slice_files

if TYPE_CHECKING:
    import datasets

FILE_COLUMNS = ("file_name", "image")  # the first as in an imagefolder's metadata.csv
SPLIT_COLUMN, MASK_COLUMN = "split", "mask"
DELIMITERS = ",;\t"


def read_table(path: Path, image_column: str | None, reading: Reading | None) -> dict[str, datasets.Dataset]:
    """The splits of a CSV file, its columns as strings but for images and masks.

    Args:
        path: of a table with a header, separated by commas, semicolons or tabs. Its column `split`, if there is one, tells the splits, else all train;
            its column `mask`, if there is one, names files, too.
        image_column: with the images' files, absolute or from the table's folder on; None: `file_name`, or else `image`.
        reading: how DICOM and NIfTI files are cut into images, each with what the row says of the file; None: they are not.

    Raises:
        InputError: no such column, no rows, a row that does not fit the header or names a file that is not there; names the line.
    """
    import datasets

    candidates = FILE_COLUMNS if image_column is None else (image_column,)
    header, rows = _rows(path, candidates)
    wanted = next(name for name in candidates if name in header)
    files = [name for name in (wanted, MASK_COLUMN) if name in header]
    splits: dict[str, dict[str, list]] = {}
    for line, row in rows:
        for name in files:
            if row[name] is None and name == wanted:
                raise InputError(f"{path}, line {line}: column {name!r} is empty; name the image's file")
            if row[name] is not None:
                row[name] = str(path.parent / row[name])
                check_name(row[name])
                if not Path(row[name]).is_file():
                    raise InputError(
                        f"{path}, line {line}: there is no file {row[name]}; paths are absolute, or begin in the table's folder"
                    )
        columns = splits.setdefault(row.get(SPLIT_COLUMN) or "train", {name: [] for name in header})
        for image in slice_files(Path(row[wanted]), reading) if reading is not None and is_medical(row[wanted]) else [row[wanted]]:
            for name, value in (row | {wanted: str(image)}).items():
                columns[name].append(value)
    kinds = {name: datasets.Image(decode=False) if name in files else datasets.Value("string") for name in header}
    return {split: datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)) for split, columns in splits.items()}


def _rows(path: Path, wanted: tuple[str, ...]) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Header, in which one of the columns that are `wanted` is, and the rows with their lines; what is empty is None."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            names = {mark: next(csv.reader([first], delimiter=mark), []) for mark in DELIMITERS}
            mark = next((mark for mark in DELIMITERS if any(name in names[mark] for name in wanted)), None)
            if mark is None:
                there = ", ".join(max(names.values(), key=len)) or "none"
                named = " or ".join(map(repr, wanted))
                raise InputError(f"{path} has no column {named} with the images' files; its columns: {there}; say which with image_column")
            header = names[mark]
            if len(set(header)) < len(header):
                raise InputError(f"{path}: two columns have the same name, of {', '.join(header)}; rename one")
            rows, reader = [], csv.reader(file, delimiter=mark)
            for values in reader:
                line = 1 + reader.line_num
                if len(values) not in (0, len(header)):
                    raise InputError(f"{path}, line {line}: {len(values)} values for {len(header)} columns; mend it")
                if values:
                    rows.append((line, dict(zip(header, (value.strip() or None for value in values), strict=True))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from error
    if not rows:
        raise InputError(f"{path} has no rows below its header")
    return header, rows
