"""Where images come from: each source gives {split name: Dataset}, with the names and columns that it has."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..errors import HubError, InputError, one_line
from ..files import files_below
from ..hub import hub_errors
from ..names import is_hub_id
from .assembling import from_arrays, from_files, uint8_images
from .formats import Reading, is_image, is_medical, is_raster, slice_files
from .originals import ORIGINALS
from .tables import SPLIT_NAMES, read_table

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

T = TypeVar("T")

NORMAL_NAMES = ("normal", "good", "healthy")
IN_MEMORY = "in-memory dataset"  # the name of a source that has none
MASK_FOLDERS = ("ground_truth", "groundtruth")  # pixel annotation: no images to score; see `without_masks`, too
MASK_NAMES = ("{name}_mask", "{name}")  # of the mask of an image {name}: MVTec AD's name, and a plain one
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")  # protocols of fsspec that read what lies within another file
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # where imagefolder finds further columns


class UnknownClassError(InputError):
    """The normal class that was asked for is none of the labels.

    Attributes:
        labels: those there are.
    """

    def __init__(self, message: str, labels: Iterable[str]):
        super().__init__(message)
        self.labels = list(labels)


def default_normal_class(source: str, classes: Iterable[str], training_classes: Iterable[str]) -> str | None:
    """The class that is normal if nobody says which: zero of scikit-learn's digits, else the class called normal, good or healthy, else the only class that
    trains; None if that leaves a choice."""
    if source == "digits":
        return "0"
    found = [label for label in classes if label.lower() in NORMAL_NAMES] or list(training_classes)
    return found[0] if len(found) == 1 else None


def given_splits(source: Any) -> dict[str, datasets.Dataset] | None:
    """The splits of a source that is a `datasets.Dataset`, which is a training split, or several of them by name; None if the source is a name.

    Raises:
        InputError: it is neither.
    """
    import datasets

    if isinstance(source, str | os.PathLike):
        return None
    splits = {"train": source} if isinstance(source, datasets.Dataset) else source
    if isinstance(splits, Mapping) and splits and all(isinstance(split, datasets.Dataset) for split in splits.values()):
        return plain_splits(splits)
    found = type(source).__name__ if not isinstance(source, Mapping) else ", ".join(type(split).__name__ for split in source.values())
    raise InputError(
        f"images come from a name, a datasets.Dataset or a DatasetDict, not from {found or 'nothing'}; stream_one_class takes streams"
    )


def plain_splits(splits: Mapping[str, T]) -> dict[str, T]:
    """The splits as they are stored, without a transform or a format, which would make labels tensors or hide columns; their names are plain text."""
    import datasets

    for name, split in splits.items():
        if isinstance(split, datasets.Dataset) and split.format["type"] == "custom":
            logger.warning(
                "The transform of split %r is left out, as images are read as they are stored; to keep it, apply it with map", str(name)
            )
    return {str(name): split.with_format(None) for name, split in splits.items()}


def read_source(
    source: str,
    label_column: str | None,
    config_name: str | None,
    revision: str | None,
    *,
    image_column: str | None = None,
    reading: Reading = Reading(),
    streaming: bool = False,
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits of a source; `load_one_class` lists the sources.

    Args:
        image_column: of a CSV file, see `read_table`.
        reading: how the DICOM and NIfTI files of a folder or a CSV file are cut into images.
        streaming: read Hub datasets, which are downloaded meanwhile, and parquet files as `IterableDataset`s; other local sources are files anyhow.

    Raises:
        InputError: nothing readable under that name; names the file and, where it can, the row.
        HubError: the Hub refused or cannot be reached.
    """
    import datasets

    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    local = source == "digits" or (source != "" and path.exists())  # Path("") is the working directory
    if local and (config_name or revision):
        raise InputError(f"{source!r} is local, and config_name and revision choose among a Hub dataset's versions; leave them out")
    if streaming and local and _is_parquet(path):
        files = {"data_dir": str(path)} if path.is_dir() else {"data_files": {"train": str(path)}}
        return dict(load_or_refuse(source, datasets.load_dataset, "parquet", streaming=True, **files))
    if source == "digits":
        if path.exists():
            logger.warning("'digits' are scikit-learn's, not what is called so in this folder; to read that, give ./digits")
        return _read_digits()
    if local and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):  # of `save_to_disk`
        saved = load_or_refuse(source, datasets.load_from_disk, str(path))
        return plain_splits({"train": saved} if isinstance(saved, datasets.Dataset) else saved)
    if local and path.is_dir():
        return _read_folder(path, label_column, reading)
    if path.is_file() and suffix == ".npz":
        return _read_npz(path)
    if path.is_file() and suffix == ".parquet":
        return {"train": load_or_refuse(source, datasets.Dataset.from_parquet, str(path))}
    if path.is_file() and suffix == ".csv":
        return read_table(path, image_column, reading)
    if path.is_file():
        check_unpacked(path)
        if is_image(path):
            raise InputError(f"{source!r} is a single file of images; give the folder that it lies in")
        raise InputError(f"{source!r}: not a kind of file to load images from; give an .npz, .parquet or .csv file, a folder or a Hub id")
    if suffix in (".npz", ".parquet", ".zip", ".csv") or not is_hub_id(source):
        raise InputError(f"{source!r} is neither an existing file or folder nor the id of a Hub dataset; check the spelling")
    try:
        with hub_errors(source, reading=True):
            return dict(datasets.load_dataset(source, config_name, revision=revision, streaming=streaming))
    except (HubError, InputError):
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        where = source if revision is None else f"{source} with the revision {revision!r}"
        raise HubError(
            f"{where}: no folder here, and no dataset on the Hub, or a private one: check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # names, formats, damaged files
        raise InputError(f"the Hub dataset {source!r} cannot be loaded: {_with_kind(error)}") from error


def check_unpacked(path: str | os.PathLike[str]) -> None:
    """Refuses an archive, by its name.

    Raises:
        InputError: it is one.
    """
    if Path(path).suffix.lower() in ARCHIVE_SUFFIXES and not is_medical(path):
        raise InputError(f"{os.fspath(path)!r} is an archive; unpack it, and give the folder")


def with_bytes(value: Any, source: str) -> Any:
    """An undecoded image of a streamed dataset, fetched if it is a file of its own on the Hub.

    Args:
        value: `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it; anything else comes back as it is.

    Raises:
        InputError: a row of a Hub dataset names a file from elsewhere, see `check_place`.
        HubError: the Hub refused or cannot be reached.
    """
    if not isinstance(value, dict) or value.get("bytes") is not None or value.get("path") is None:
        return value
    check_place(value["path"], source)
    if "://" not in value["path"]:
        return value
    import fsspec

    with hub_errors(source, reading=True), fsspec.open(value["path"]) as file:
        return value | {"bytes": file.read()}


def check_place(path: str, source: str) -> None:
    """Refuses the path of an image, in a row of a Hub dataset, that is neither on the Hub nor in the cache of what was downloaded: whoever wrote the dataset
    could have any file of this machine opened. Those of other sources may lie anywhere.

    Raises:
        InputError: it is elsewhere.
    """
    if hub_dataset(source) is None:
        return
    import datasets
    from huggingface_hub import constants

    *archives, place = path.split("::")  # as fsspec chains them: zip://x.png::hf://…
    if "://" in place:
        on_hub = place.startswith(("hf://", "https://huggingface.co/", f"{constants.ENDPOINT}/"))
    else:
        caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
        on_hub = any(Path(place).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)
    if not on_hub or any(archive.partition("://")[0] not in ARCHIVES for archive in archives):
        raise InputError(
            f"a row of the Hub dataset {source!r} names {path!r}, which is no file of the Hub's: it is not opened; remove the row"
        )


def _is_parquet(path: Path) -> bool:
    """Whether it is a parquet file, or a folder with such files and no others."""
    if not path.is_dir():
        return path.suffix.lower() == ".parquet"
    suffixes = {file.suffix for file in files_below(path)}
    return ".parquet" in suffixes and suffixes <= {".parquet", ".md", ".json", ".txt", ""}


def load_or_refuse(what: str, load: Any, *args: Any, **options: Any) -> Any:
    """`load(*args, **options)`; whatever goes wrong in there (network, names, formats) becomes one line."""
    try:
        return load(*args, **options)
    except Exception as error:
        raise InputError(f"{what} cannot be loaded: {_with_kind(error)}") from error


def as_images(split: T, column: str, where: str) -> T:
    """The split with the column as `Image(decode=False)`. Arrays and lists of uint8 are encoded here, as the cast makes gray ones of 32 bits.

    Raises:
        InputError: it holds no images; `where` names it.
    """
    import datasets

    image = datasets.Image(decode=False)
    if split.features is not None and are_arrays(split.features[column]):  # of a stream they may be unknown
        features = datasets.Features({**split.features, column: image})
        split = split.map(partial(_encoded, column=column, where=where), input_columns=[column], features=features)
    return load_or_refuse(where, split.cast_column, column, image)


def are_arrays(feature: Any) -> bool:
    """Whether a column with this feature holds arrays or lists of uint8."""
    import datasets

    kind = feature
    while isinstance(kind, datasets.List | datasets.LargeList):
        kind = kind.feature
    is_array = kind is not feature or isinstance(feature, datasets.Array2D | datasets.Array3D)
    return is_array and getattr(kind, "dtype", None) == "uint8"


def _encoded(value: Any, column: str, where: str) -> dict[str, Any]:
    return {column: None if value is None else load_or_refuse(where, _encode, value)}


def _encode(value: Any) -> dict[str, Any]:
    import datasets

    image = np.asarray(value, np.uint8)
    return datasets.Image().encode_example(image[..., 0] if image.shape[2:] == (1,) else image)


def _with_kind(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"[:400]


def _read_digits() -> dict[str, datasets.Dataset]:
    import datasets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0 … 16 to 0 … 255
    parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    label = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    return {name: from_arrays(images[rows], digits.target[rows], label) for name, rows in zip(("train", "test"), parts, strict=True)}


def _read_npz(path: Path) -> dict[str, datasets.Dataset]:
    try:
        with np.load(path, allow_pickle=False) as archive:  # a pickled array could run code
            arrays = {name: archive[name] for name in archive.files if name.endswith(("_images", "_labels"))}
    except Exception as error:  # BadZipFile, ValueError (pickled arrays), AttributeError (a bare .npy) …
        raise InputError(f"{path}: not an .npz file of plain arrays ({one_line(error)}); save it with numpy.savez") from error
    if not any(name.endswith("_images") for name in arrays):
        raise InputError(f"{path} has no array of images; name them <split>_images and <split>_labels, such as 'train_images'")
    splits = {}
    for key in [name for name in arrays if name.endswith("_images")]:
        split = key.removesuffix("_images")
        labels = arrays.get(f"{split}_labels")
        images = uint8_images(arrays.pop(key), f"{path}, array {key!r}")
        if labels is not None:
            labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
            if labels.shape != (len(images),):
                shape = tuple(arrays[f"{split}_labels"].shape)
                raise InputError(f"{path}, array '{split}_labels' has shape {shape}; ({len(images)},) or ({len(images)}, 1) is needed")
        splits[split] = from_arrays(images, labels)
    return splits


def _mask_files(root: Path) -> dict[Path, Path]:
    """All masks in a folder's `MASK_FOLDERS`, of any image format, by their path in there without the suffix."""
    folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name.lower() in MASK_FOLDERS]
    return {
        file.relative_to(folder).with_suffix(""): file
        for folder in sorted(folders, reverse=True)
        for file in files_below(folder)
        if is_raster(file)
    }


def _mask(masks: dict[Path, Path], split: str, folder: Path, path: Path) -> Path | None:
    """The mask of the image `path` in a split's `folder`, which is relative to the root; None if it has none. In `masks` it is called <class>/<name>_mask
    for the test split's <class>/<name>, as in MVTec AD, or <split>/<class>/<name>_mask for any split; see `MASK_NAMES`."""
    if path.parent == Path():
        return None
    prefixes = [folder, Path()] if split == "test" else [folder]
    names = (prefix / path.with_name(name.format(name=path.stem)) for prefix in prefixes for name in MASK_NAMES)
    return next((masks[name] for name in names if name in masks), None)


def without_masks(paths: list[Path]) -> list[Path]:
    """Of the images in a folder, relative to it, all but those that mark pixels, in a folder `masks`.

    Beside class folders alone, not beside images, a folder `images` or folders of splits, `masks` is a class: faces with and without.
    """
    first = {path.parts[0].lower(): path for path in paths}
    is_class = all(len(path.parts) > 1 for path in paths) and "images" not in first and not by_our_names(first)
    return [path for path in paths if "masks" not in map(str.lower, path.parts[is_class:-1])]


def _dicom_without_suffix(files: list[Path]) -> Path | None:
    """The first of the files without a suffix, if it is DICOM, as many scanners name them."""
    first = next(
        (file for file in files if not file.suffix and file.name != "DICOMDIR" and file.is_file() and os.access(file, os.R_OK)), None
    )
    if first is None:
        return None
    with open(first, "rb") as file:
        return first if file.read(132)[128:] == b"DICM" else None


class _Listed(NamedTuple):
    """The images of one split."""

    folder: Path
    paths: list[Path]  # of the images, below the folder
    labels: list[str | None]  # the class folder that each lies in


def _read_folder(root: Path, label_column: str | None, reading: Reading) -> dict[str, datasets.Dataset]:
    """Class folders are read here, not by imagefolder, which infers splits from file names too, and labels from the splits read so far."""
    import datasets

    files = list(files_below(root, MASK_FOLDERS))
    if splits := next(filter(None, (read(root) for read in ORIGINALS)), None):
        return splits
    images = [file for file in files if is_image(file)]
    tables, further = {}, []
    if any(file.name in METADATA_FILES for file in files):
        tables = dict(load_or_refuse(f"{root}", datasets.load_dataset, "imagefolder", data_dir=str(root)))
        further = [name for name in next(iter(tables.values())).column_names if name != "image"]
        if further and (label_column is not None or any(label_columns(split, None) for split in tables.values())):
            return tables
    elif any(file.suffix == ".parquet" for file in files) and not images:
        return dict(load_or_refuse(f"{root}", datasets.load_dataset, "parquet", data_dir=str(root)))
    _tell_of_other_files(root, files, images)
    listed = _list_folders(root, images)
    classes = {label for _, _, labels in listed.values() for label in labels if label is not None}
    if any(label.lower() == "masks" for label in classes):
        logger.warning("%s: the folder 'masks' is read as a class; if it marks pixels, call it ground_truth", root)
    if further:
        if len(classes) < 2 and not any(label.lower() in NORMAL_NAMES for label in classes):
            return tables
        logger.warning(
            "%s: its folders are the classes, not a column of its metadata (%s); else give label_column", root, ", ".join(further)
        )
    _check_class_folders(listed.values(), classes)
    return _with_masks(root, listed, reading)


def _tell_of_other_files(root: Path, files: list[Path], images: list[Path]) -> None:
    """Says which files of a folder are left out.

    Raises:
        InputError: all of them.
    """
    unnamed = _dicom_without_suffix(files)
    if not images:
        remedy = "check the path" if unnamed is None else f"{unnamed} is DICOM: rename such files to end in .dcm"
        raise InputError(f"{root} holds neither images nor parquet files; {remedy}")
    if unnamed is not None:
        logger.warning("%s is DICOM, but left out, and so are others like it: rename them to end in .dcm", unnamed)
    if others := Counter(file.suffix.lower() for file in set(files).difference(images)):
        logger.info("%s: left out, as no images: %s", root, ", ".join(f"{suffix} ({n})" for suffix, n in sorted(others.items())))


def _list_folders(root: Path, images: list[Path]) -> dict[str, _Listed]:
    """The images of a folder by split; all are of the training split if no folder in it has a split's name."""
    folders = {folder.name: folder for folder in root.iterdir() if folder.is_dir()}
    named = by_our_names(folders)
    listed = {}
    for split, folder in (named or {"train": root}).items():
        paths = without_masks([path.relative_to(folder) for path in images if path.is_relative_to(folder)])
        if paths:
            listed[split] = _Listed(folder, paths, [path.parts[0] if len(path.parts) > 1 else None for path in paths])
    inside = [folder.name for folder in named.values()]
    outside = [path for path in without_masks([image.relative_to(root) for image in images]) if inside and path.parts[0] not in inside]
    if outside:
        what = "%s: %d images are left out, as they lie in no split's folder, the first %s; the splits: %s"
        logger.warning(what, root, len(outside), outside[0], ", ".join(inside))
    return listed


def _check_class_folders(listed: Iterable[_Listed], classes: set[str]) -> None:
    """Refuses images beside class folders, and what is most likely the folder above the dataset's own, as its anomalies would train as one class."""
    for folder, paths, labels in listed:
        if None in labels and any(labels):
            raise InputError(f"{folder / paths[labels.index(None)]} lies beside class folders; move it into one of them")
        nested = next((path for path in paths if len(path.parts) > 2), None)
        if nested and len(classes) == 1 and min(classes).lower() not in NORMAL_NAMES:
            inner = folder / nested.parts[0]
            raise InputError(f"{inner} is the only class folder and holds folders of its own; give {str(inner)!r} instead")


def _with_masks(root: Path, listed: dict[str, _Listed], reading: Reading) -> dict[str, datasets.Dataset]:
    """The listed images with their classes and masks; of a volume its slices."""
    masks = _mask_files(root)
    splits = {}
    for split, (folder, paths, labels) in listed.items():
        found = [_mask(masks, split, folder.relative_to(root), path) for path in paths]
        if split == "test" and masks and not any(found):
            what = "%s and all other masks there are left out, as no test image is called so; the mask of test/a/b.png is a/b_mask.png"
            logger.warning(what, min(masks.values()))
        rows = [
            (image, label, mask)
            for path, label, mask in zip(paths, labels, found, strict=True)
            for image in (slice_files(folder / path, reading) if is_medical(path) else [folder / path])
        ]
        splits[split] = from_files(*map(list, zip(*rows, strict=True)))
    return splits


# Names


def by_our_names(splits: dict[str, T]) -> dict[str, T]:
    lower = {name.lower(): split for name, split in splits.items()}
    return {ours: lower[next(n for n in names if n in lower)] for ours, names in SPLIT_NAMES.items() if not lower.keys().isdisjoint(names)}


def all_evaluated(source: str, splits: dict[str, T], eval_split: str) -> dict[str, T]:
    """The splits, by our names; a training split that is the only one, as the one to evaluate on, with a warning."""
    if splits.keys() != {"train"}:
        return splits
    logger.warning("%r has no split %r: all of it is evaluated; the detector must not have been trained on it", source, eval_split)
    return {eval_split: splits["train"]}


def label_columns(split: datasets.Dataset | datasets.IterableDataset, label_column: str | None) -> list[str]:
    """The columns that may hold the labels, best first: `label`, `labels`, the only `ClassLabel`, or else `Label` and the like."""
    import datasets

    if label_column is not None:
        return [label_column] if label_column in split.column_names else []
    named = [name for name in ("label", "labels") if name in split.column_names]
    classes = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    return named or (classes if len(classes) == 1 else [name for name in split.column_names if name.lower() in ("label", "labels")])


def class_name(value: Any, feature: Any) -> str | None:
    """The name of a class from its value in a column; None for a missing value, which a ClassLabel writes as -1."""
    import datasets

    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.names[value] if 0 <= value < feature.num_classes else None
    if feature.dtype == "bool":
        return str(bool(value))
    if isinstance(value, bytes):  # text of parquet files that do not say so, or of NumPy's type S
        return value.decode(errors="backslashreplace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def dataset_label(source: str) -> str:
    """A dataset's name for others to read: of a local path only the last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def hub_dataset(source: str) -> str | None:
    """A source's id on the Hub, if that is where it came from."""
    is_id = is_hub_id(source) and source != "digits" and not Path(source).expanduser().exists()
    return source if is_id else None
