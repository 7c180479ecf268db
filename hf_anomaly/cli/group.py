"""`hf-anomaly group IMAGES`"""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_output, csv_text, write_file
from ..parsing import Parser

COLUMN = "group"


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly group",
        "Writes a list of image files in which those that look nearly the same, such as frames of one sequence or one part under two lights, have one number, "
        f"for training with --group_column {COLUMN}: they then stay on one side where images are held out. A patient's name is better, where it is known.",
    )
    parser.add_argument("images", help="a folder, or a .csv file with a row an image")
    parser.option("output", "the .csv file to write (default: %(default)s)", default="images.csv")
    parser.option("image_column", "of a .csv file: the column with the images' files. Default: file_name, or image")
    parser.window_option("none: they are refused")
    args = parser.parse(argv)
    check_output("--output", args.output, suffixes=(".csv",), apart_from=[args.images])
    return args


def run(args: Namespace) -> None:
    import numpy as np

    from ..data import check_pixels, group_near_copies
    from ..data.formats import parse_window
    from ..data.loading import image_column_of
    from ..data.sources import as_images, read_source

    if not os.path.exists(args.images):
        raise InputError(f"there is no {args.images}: give a folder or a .csv file")
    rows, thumbnails = [], []
    for name, split in read_source(args.images, None, None, None, image_column=args.image_column).items():
        column = args.image_column or image_column_of(split)
        if COLUMN in split.column_names:
            raise InputError(f"{args.images} has a column {COLUMN!r} already: train on it with --group_column {COLUMN}, or rename it")
        split = split if column == "image" else split.rename_column(column, "image")
        split = as_images(split, "image", f"column {column!r} of split {name!r}")
        rows += [_listed(row, split.features, name, args) for row in split]
        thumbnails.append(check_pixels(split, name, parse_window(args.window)))
    groups = group_near_copies(np.concatenate(thumbnails))
    write_file(args.output, csv_text(row | {COLUMN: group} for row, group in zip(rows, groups.tolist(), strict=True)))
    sizes = np.bincount(groups)
    print(f"{len(rows)} images in {len(sizes)} groups, of which {(sizes > 1).sum()} hold several, the largest {sizes.max()}")
    print(
        f"saved: {args.output}; train with --dataset_name {args.output} --group_column {COLUMN}, and with --protocol balanced to draw test images, too"
    )


def _listed(row: dict[str, Any], features: Mapping[str, Any], split: str, args: Namespace) -> dict[str, Any]:
    """A row of the list, of a row of a split whose images are not decoded."""
    from datasets import ClassLabel, Value

    from ..data.formats import SLICES
    from ..data.sources import class_name

    image = row["image"]
    if image["path"] is None or image["bytes"] is not None:
        raise InputError(
            f"the images of {args.images} are no files of their own: give a folder of image files, or a .csv file that lists them"
        )
    if Path(image["path"]).parts[-4:-2] == SLICES:
        raise InputError(
            f"{args.images} holds DICOM or NIfTI files, which a list cannot give slice by slice: slices of one stay together anyhow"
        )
    folder = os.path.dirname(os.path.abspath(args.output))
    files = {column: row[column] and os.path.relpath(row[column]["path"], folder) for column in ("image", "mask") if column in row}
    known = (Value, ClassLabel)  # a list has no place in a table
    others = {name: class_name(value, features[name]) for name, value in row.items() if isinstance(features[name], known)}
    return {
        "file_name": files.pop("image"),
        **{name: value for name, value in others.items() if name != "file_name"},
        **files,
        "split": split,
    }
