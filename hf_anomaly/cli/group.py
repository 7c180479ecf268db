"""`hf-anomaly group IMAGES`"""

import logging
import os
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_output, csv_text, write_output
from ..parsing import Parser

logger = logging.getLogger(__name__)

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
    from ..data.formats import Reading, parse_window
    from ..data.loading import image_column_of
    from ..data.near_copies import FEWEST
    from ..data.sources import as_images, read_source

    if not os.path.exists(args.images):
        raise InputError(f"there is no {args.images}: give a folder or a .csv file")
    window = parse_window(args.window)
    rows, thumbnails = [], []
    for name, split in read_source(args.images, None, None, None, image_column=args.image_column, reading=Reading(window)).items():
        column = args.image_column or image_column_of(split)
        if column not in split.column_names:
            raise InputError(f"{args.images} has no column {column!r}; its columns: {', '.join(split.column_names)}; give image_column")
        split = as_images(_kept_columns(split, column, args.images), column, f"column {column!r} of split {name!r}")
        rows += _listed(split, column, name, args)
        images = split.select_columns([column])
        thumbnails.append(check_pixels(images if column == "image" else images.rename_column(column, "image"), name, window))
    groups = group_near_copies(np.concatenate(thumbnails))
    write_output(args.output, csv_text(row | {COLUMN: group} for row, group in zip(rows, groups.tolist(), strict=True)))
    sizes = np.bincount(groups)
    if len(rows) <= FEWEST:
        logger.warning("among %d images nothing but identical ones can be told to belong together: give at least %d", len(rows), FEWEST + 1)
    print(f"{len(rows)} images in {len(sizes)} groups, of which {(sizes > 1).sum()} hold several, the largest {sizes.max()}")
    how = f"--dataset_name {shlex.quote(args.output)} --group_column {COLUMN}"
    print(f"saved: {args.output}; train with {how}, and with --protocol balanced to draw test images, too")


def _kept_columns(split: Any, column: str, source: str) -> Any:
    """The split with the columns that the list takes over: images, undecoded masks, names and numbers. Tells of others.

    Args:
        column: that of the images.
    """
    from datasets import ClassLabel, Image, Value

    from ..data.tables import MASK_COLUMN, SPLIT_COLUMN

    if groups := [name for name in split.column_names if name.lower() == COLUMN]:
        raise InputError(f"{source} has a column {groups[0]!r} already: train on it with --group_column {groups[0]}, or rename it")
    masks = [MASK_COLUMN] if column != MASK_COLUMN and isinstance(split.features.get(MASK_COLUMN), Image) else []
    taken = {"file_name", SPLIT_COLUMN, MASK_COLUMN}  # what these mean in a list, in any case
    others = [
        name
        for name, feature in split.features.items()
        if name != column and name.lower() not in taken and isinstance(feature, Value | ClassLabel)
    ]
    if left_out := [name for name in split.column_names if name not in (column, SPLIT_COLUMN, *masks, *others)]:
        logger.warning("%s: a list has no place for the columns %s, which are left out", source, ", ".join(left_out))
    split = split.select_columns([column, *masks, *others])
    return split.cast_column(MASK_COLUMN, Image(decode=False)) if masks else split


def _listed(split: Any, column: str, name: str, args: Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the list, of a split as `_kept_columns` gives it, whose images, in this column, are not decoded."""
    from datasets import Image

    from ..data.formats import SLICES
    from ..data.sources import class_name

    folder = os.path.realpath(os.path.dirname(args.output))  # ".." in a path leads up from where a link leads
    features = split.features
    for row in split:
        image = row[column]
        if image["path"] is None or image["bytes"] is not None:
            raise InputError(
                f"the images of {args.images} are no files of their own: give a folder of image files, or a .csv file that lists them"
            )
        if Path(image["path"]).parts[-4:-2] == SLICES:
            raise InputError(
                f"{args.images} holds DICOM or NIfTI files, which a list cannot give slice by slice: slices of one stay together anyhow"
            )
        files = {key: value and os.path.relpath(value["path"], folder) for key, value in row.items() if isinstance(features[key], Image)}
        others = {key: class_name(value, features[key]) for key, value in row.items() if key not in files}
        yield {"file_name": files.pop(column), **others, **files, "split": name}
