"""`hf-anomaly predict MODEL IMAGES`"""

from __future__ import annotations

import csv
import glob
import json
import logging
import math
import os
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import check_name, check_output, files_below, shortened, writing
from ..parsing import Parser

if TYPE_CHECKING:
    import PIL.Image

    from ..data.formats import Reading
    from ..pipeline import AnomalyDetectionPipeline

logger = logging.getLogger(__name__)

DATASET_FILES = (".npz", ".parquet")
OF_DATASETS = ("split", "image_column", "dataset_config_name", "dataset_revision")  # options that do not apply to image files


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly predict",
        "Scores images. Prints a table, or writes it to --output: score (higher = more anomalous), p_value (the share of normal images that "
        "score at least so high), label (normal or anomaly) and threshold. Exit status: 0, all were scored; 1, some were skipped; 2, an error.",
    )
    parser.add_argument("model", help="folder or Hub id of a detector")
    parser.add_argument(
        "images",
        nargs="+",
        help="image files, volumes (slice by slice), folders, patterns such as 'scans/*.png', a Hub dataset (scored while it is downloaded), .npz, "
        ".parquet or .csv file, a folder of parquet files or what save_to_disk wrote",
    )
    parser.option("output", "the table to write, .csv or .jsonl (default: printed as CSV)")
    parser.option("save_maps", "folder for a PNG of each image with its anomaly map over it")
    parser.option("false_positive_rate", "flag this share of normal images, instead of the detector's own", type=float)
    parser.option("threshold", "flag scores above this one", type=float)
    parser.option(
        "on_error", "stop or skip: what to do at an unreadable image (default: %(default)s)", choices=("stop", "skip"), default="stop"
    )
    parser.option("batch_size", "images scored at once (default: %(default)s)", type=int, default=64)
    parser.option("device", "cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.option("revision", "branch, tag or commit of a Hub model")
    parser.option("split", "of a dataset (default: its only one)")
    parser.option("dataset_config_name", "configuration of a Hub dataset")
    parser.option("dataset_revision", "branch, tag or commit of a Hub dataset")
    parser.option("image_column", "of a dataset (default: image, or its only image column)")
    parser.window_option("as in training")
    args = parser.parse(argv)
    check_output("--output", args.output, suffixes=(".csv", ".jsonl"), apart_from=args.images)
    check_output("--save_maps", args.save_maps, folder=True, apart_from=[args.output])
    if args.threshold is not None and args.false_positive_rate is not None:
        raise InputError("--threshold and --false_positive_rate both say what is flagged: give one of them")
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {args.batch_size}")
    return args


def run(args: Namespace) -> None:
    from ..data.formats import parse_window
    from ..loading import load_detector
    from ..pipeline import AnomalyDetectionPipeline
    from ..visualization import check_overlay

    window = parse_window(args.window)
    sources = _sources(args)  # before the model: a misspelt path is told at once
    model, processor = load_detector(args.model, args.revision, args.device)
    model.require_fitted()
    processor.window = window or processor.window
    if args.save_maps is not None:
        check_overlay(model, "--save_maps", args.save_maps, args.images)
        Path(args.save_maps).mkdir(parents=True, exist_ok=True)
    counts = [source.count for source in sources]
    total = None if None in counts else sum(counts)
    skipped: list[str] = []
    results = _score(sources, AnomalyDetectionPipeline(model, processor, device=args.device), args, skipped)
    scored, flagged = _write(results, total, args, model.config.anomaly_map_range)
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    verdict = f", {flagged} flagged" if model.calibration.is_calibrated or args.threshold is not None else ""
    lost = f", {len(skipped)} skipped" if skipped else ""
    print(f"{scored} scored{verdict}{lost}{'' if args.output is None else f': {args.output}'}", file=sys.stderr)
    if skipped:
        sys.exit(1)


def _score(
    sources: list[Source], pipe: AnomalyDetectionPipeline, args: Namespace, skipped: list[str]
) -> Iterator[tuple[str, PIL.Image.Image, dict]]:
    """Name, image and result of each image. Without --save_maps images are shrunk to the detector's size. Errors of unreadable ones go to `skipped`."""
    ahead: deque = deque()  # the pipeline reads a batch ahead: its names and images wait here until their results come
    processor = pipe.image_processor

    def images() -> Iterator[PIL.Image.Image]:
        for name, read in (pair for source in sources for pair in source.images):
            try:
                found = read(processor.reading)
            except InputError as error:
                if args.on_error == "stop":
                    raise
                skipped.append(str(error))
                continue
            for image in found:
                title = name if len(found) == 1 else f"{name}/{image.info['slice']:04d}"
                if args.save_maps is None:  # of large photos a batch would take gigabytes
                    image = processor.resized(image)
                ahead.append((title, image))
                yield image

    results = pipe(
        images(),
        batch_size=args.batch_size,
        threshold=args.threshold,
        false_positive_rate=args.false_positive_rate,
        output_anomaly_maps=args.save_maps is not None,
    )
    return ((*ahead.popleft(), result) for result in results)


def _write(results: Iterable, total: int | None, args: Namespace, map_range: tuple[float, float] | None) -> tuple[int, int]:
    """Writes table and maps. Returns how many images there were, and how many of them are flagged."""
    from tqdm.auto import tqdm

    from ..visualization import VISIBLE, overlay_anomaly_map, write_image

    columns = ["image", "score", "p_value", "label", "threshold", *(["overlay"] if args.save_maps is not None else [])]
    scored = flagged = 0
    with _table(args.output, columns) as write:
        for name, image, result in tqdm(results, total=total, desc="Scoring", unit="image", disable=None):
            row = {"image": name, **{column: result[column] for column in columns[1:5]}}
            if args.save_maps is not None:
                row["overlay"] = f"{scored:06d}_{shortened(Path(name).stem)}.png"
                overlay = overlay_anomaly_map(image, result["anomaly_map"], value_range=map_range, least_size=VISIBLE)
                write_image(overlay, Path(args.save_maps, row["overlay"]))
            write(row)
            scored += 1
            flagged += result["label"] == "anomaly"
    return scored, flagged


# Where the images come from ------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Where images come from.

    Args:
        images: pairs of a name and a function that reads its image, or the slices of a volume.
        count: how many images there are; None if that is not known.
        is_dataset: whether the options `OF_DATASETS` apply to it.
    """

    images: Iterable[tuple[str, Callable]]
    count: int | None
    is_dataset: bool = False


def _files(paths: list[str], is_dataset: bool = False) -> Source:
    from ..data.formats import is_medical

    for path in paths:
        check_name(path)
    return Source([(path, partial(_read_file, path)) for path in paths], None if any(map(is_medical, paths)) else len(paths), is_dataset)


def _read_file(path: str, reading: Reading) -> list[PIL.Image.Image]:
    from ..data import decode_image
    from ..data.formats import is_medical, read_slices
    from ..data.transforms import num_pages, open_image

    if is_medical(path):
        return read_slices(path, reading)
    image = decode_image({"path": path}, path, reading.window)
    with open_image({"path": path}, path, reading.window) as file:
        if (count := num_pages(file)) > 1:
            logger.warning("%s has %d pages or frames, of which only the first is scored: cut it up", path, count)
    return [image]


def _read_rows(images, source: str, split: str, column: str) -> Iterator[tuple[str, Callable]]:
    """The undecoded images of a dataset's split, read from the disk or the Hub one by one."""
    from ..data import decode_image
    from ..data.sources import with_bytes
    from ..hub import hub_errors

    with hub_errors(source, reading=True):
        for i, row in enumerate(images):
            name = f"row {i} of split {split!r}"
            yield (
                f"{split}/{i}",
                lambda reading, value=row[column], name=name: [decode_image(with_bytes(value, source), name, reading.window)],
            )


def _sources(args: Namespace) -> list[Source]:
    sources = [_source(word, args) for word in args.images]
    given = next((name for name in OF_DATASETS if getattr(args, name) is not None), None)
    if given is not None and not any(source.is_dataset for source in sources):
        raise InputError(f"--{given} is of datasets, and of folders all images are scored: leave it out, or name a folder in the folder")
    return sources


def _source(word: str, args: Namespace) -> Source:
    from ..data.formats import is_raster
    from ..data.sources import check_unpacked

    if os.path.isdir(word):
        paths = _in_folder(word)
        return _files(paths) if paths else _rows(word, args)  # parquet files, what `save_to_disk` wrote, an original download
    if os.path.isfile(word) and word.lower().endswith(".csv"):
        return _listed(word, args)
    if os.path.isfile(word) and not word.lower().endswith(DATASET_FILES):
        check_unpacked(word)
        return _files([word])
    if not os.path.exists(word) and glob.has_magic(word):
        paths = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not paths:
            raise InputError(f"{word!r} matches no file; check the pattern, and quote it")
        return _files(paths)
    if not os.path.exists(word) and is_raster(word):
        raise InputError(f"{word}: there is no such file; check the spelling")
    return _rows(word, args)


def _in_folder(folder: str) -> list[str]:
    from ..data.formats import is_image
    from ..data.sources import MASK_FOLDERS, without_masks

    images = [path for path in files_below(folder, MASK_FOLDERS) if is_image(path)]
    return [str(Path(folder, path)) for path in without_masks([image.relative_to(folder) for image in images])]


def _listed(table: str, args: Namespace) -> Source:
    from ..data.loading import image_column_of
    from ..data.tables import read_table

    splits = read_table(Path(table), args.image_column, None, must_exist=args.on_error == "stop")
    dataset = splits[_chosen_split(splits, table, args)]
    return _files([value["path"] for value in dataset[args.image_column or image_column_of(dataset)]], is_dataset=True)


def _chosen_split(splits: Mapping, source: str, args: Namespace) -> str:
    from ..data.tables import our_split_name

    if args.split is None and len(splits) > 1:
        raise InputError(f"{source!r} has the splits {', '.join(splits)}: say which with --split")
    split = args.split or next(iter(splits))
    split = split if split in splits else our_split_name(split)
    if split not in splits:
        raise InputError(f"{source!r} has no split {args.split!r}; its splits: {', '.join(splits)}")
    return split


def _rows(source: str, args: Namespace) -> Source:
    import datasets

    from ..data.loading import image_column_of
    from ..data.sources import as_images, read_source

    splits = read_source(source, None, args.dataset_config_name, args.dataset_revision, streaming=True)
    split = _chosen_split(splits, source, args)
    dataset = splits[split]
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream of rows without a schema tells them only so
    features = dataset.features or {}
    column = args.image_column or (image_column_of(dataset) if features else "image")
    if column not in columns:
        what = f"column {column!r}" if args.image_column else "column of images"
        raise InputError(f"split {split!r} of {source!r} has no {what}; its columns: {', '.join(columns)}; give --image_column")
    if isinstance(dataset, datasets.Dataset):
        count = len(dataset)
    else:
        known = (dataset.info.splits or {}).get(split)
        count = known.num_examples if known else None
        if column in features and not _may_hold_images(features[column]):
            raise InputError(f"column {column!r} of {source!r} holds no images but {features[column]}; give another --image_column")
        dataset = dataset.decode(False) if features else dataset
    images = dataset.select_columns([column])
    images = as_images(images, column, f"column {column!r} of {source!r} as images")
    return Source(_read_rows(images, source, split, column), count, is_dataset=True)


def _may_hold_images(feature) -> bool:
    import datasets

    from ..data.sources import are_arrays

    encoded = isinstance(feature, dict) and "bytes" in feature  # as pandas writes them
    encoded = encoded or feature in (datasets.Value("binary"), datasets.Value("large_binary"))  # the latter of Arrow tables
    return encoded or isinstance(feature, datasets.Image) or are_arrays(feature)


# Where the table goes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _table(output: str | None, columns: list[str]) -> Iterator[Callable[[dict], None]]:
    """Gives a function that writes a row, to the terminal or to a file that appears when all rows are written."""
    if output is None:
        yield _csv(sys.stdout, columns)
        return
    with writing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield _csv(file, columns) if Path(output).suffix.lower() == ".csv" else _jsonl(file)


def _csv(file, columns: list[str]) -> Callable[[dict], None]:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    return writer.writerow


def _jsonl(file) -> Callable[[dict], None]:
    def write(row: dict) -> None:
        if row["threshold"] is not None and math.isinf(row["threshold"]):
            row = row | {"threshold": None}  # JSON has no infinity
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    return write
