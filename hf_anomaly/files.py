"""Folders of files, files that appear whole or not at all, tables as text, and the bytes that fingerprints are made of."""

import csv
import io
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

logger = logging.getLogger(__name__)


def files_below(root: str | os.PathLike, leave_out: Collection[str] = ()) -> Iterator[Path]:
    """Every file of a folder and those in it, sorted, but for hidden ones and folders named __…. Links are followed, unless to a folder that holds them.
    Folders in it that cannot be read are warned of.

    Args:
        leave_out: names of folders to leave out, in lower case.

    Raises:
        InputError: the folder itself cannot be read.
    """

    def refused(error: OSError) -> None:
        if error.filename == os.fspath(root):
            raise InputError(f"{root}: the folder cannot be read ({error.strerror}); change its permissions") from error
        logger.warning("%s is left out, as it cannot be read (%s)", error.filename, error.strerror)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refused):
        here = Path(folder).absolute()
        above = {os.path.realpath(path) for path in (here, *here.parents)}  # where a link would lead round and round
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith((".", "__")) and name.lower() not in leave_out and os.path.realpath(here / name) not in above
        )
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def shortened(name: str) -> str:
    """A name, or its beginning, to be part of a file's: that may have 255 bytes, and on Windows not every character."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).encode()[:200].decode(errors="ignore")


def check_name(path: str | os.PathLike) -> None:
    """Refuses a file's name that no table could hold.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fspath(path)!a}: the file's name is not UTF-8; rename it") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends well and is removed if it does not. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # another process may be writing the same file
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """As `replacing`, for a path that a user names: of a link the file that it leads to is replaced, and a device or pipe is written to.

    A folder that was downloaded takes `replacing`: links in it may lead anywhere.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    with replacing(path.resolve()) as temporary:
        yield temporary


def write_output(path: str | os.PathLike, text: str) -> None:
    """Writes a file in UTF-8 to a path that a user names; see `writing`."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_STAGING = ".saving-"


@contextmanager
def staged(target: str | os.PathLike, outdated: re.Pattern | None = None) -> Iterator[Path]:
    """A temporary folder inside `target`, whose entries are renamed into it at the end, configs last; after an error, none.

    Args:
        outdated: names in `target` that are deleted at the end unless the block wrote them anew.

    Raises:
        InputError: `target` is a file.
    """
    target = Path(target)
    if target.is_file():
        raise InputError(f"cannot save to {target}: it is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
    try:
        yield staging
        let_others_read(staging)
        names = {path.name for path in staging.iterdir()}
        for name in sorted(names, key=lambda name: name.endswith("config.json")):
            if (target / name).is_dir():  # os.replace cannot overwrite a folder
                delete(target / name)
            os.replace(staging / name, target / name)
        for path in list(target.iterdir()):
            if path.name not in names and outdated is not None and outdated.fullmatch(path.name):
                delete(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def let_others_read(folder: Path) -> None:
    """Gives weights, which safetensors writes for their owner alone, the permissions that any other new file has."""
    (probe := folder / ".probe").touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def remove_staged(target: str | os.PathLike) -> None:
    """Removes what a process that was killed was writing to `target` with `staged`."""
    for path in Path(target).glob(f"{_STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def delete(path: Path) -> None:
    """Deletes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# What a detector's folder tells of it, read by these names.
_OF_A_DETECTOR = ("config.json", "preprocessor_config.json", "eval_results.json", "README.md")


def check_output(
    flag: str,
    path: str | os.PathLike | None,
    *,
    folder: bool = False,
    suffixes: Sequence[str] = (),
    apart_from: Iterable[str | os.PathLike | None] = (),
) -> None:
    """Refuses a path to write to, if one was given, before anything long runs: where a folder lies in place of a file (with `folder` a file in place of
    a folder), where it would be taken for what a detector's folder tells of the detector, or where nothing can be written.

    Args:
        suffixes: those that its name may end in, in lower case; none: any.
        apart_from: inputs and other outputs, which it may not overwrite.

    Raises:
        InputError: names the flag.
    """
    if path is None:
        return
    place = Path(path).resolve()
    if place.is_file() if folder else place.is_dir():
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise InputError(f"{flag} {path}: it is a {there}; name a {wanted}")
    if suffixes and Path(path).suffix.lower() not in suffixes:
        choice = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise InputError(f"{flag} {path}: the name must end in {choice}")
    if place in {Path(other).resolve() for other in apart_from if other is not None}:
        raise InputError(f"{flag} {path}: it is an input or another output, which would be overwritten; name another file")
    if place.name in _OF_A_DETECTOR and (place.parent / "config.json").is_file():
        raise InputError(f"{flag} {path}: there it would be taken for the detector's own, of its training; choose another name")
    if folder or place.is_file() or not place.exists():  # else a device or pipe
        try:
            with tempfile.TemporaryFile(dir=next(above for above in (place, *place.parents) if above.is_dir())):
                pass
        except OSError as error:
            raise InputError(f"{flag} {path}: nothing can be written there ({error.strerror}); name another place") from error


def read_json(path: str | os.PathLike) -> dict:
    """The object that a JSON file holds.

    Raises:
        InputError: it holds none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise InputError(f"{path} is not valid JSON ({error}): restore or delete it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}: restore or delete it")
    return content


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Writes strict JSON (no NaN), whole or not at all."""
    write_file(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(entries)} |" for entries in (titles, ["---"] * len(titles), *rows)]


def csv_text(rows: Iterable[dict]) -> str:
    """Rows as CSV, with the columns that any of them has, in the order in which they come."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def canonical_json(value: dict) -> bytes:
    """The same bytes for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, default=str).encode()
