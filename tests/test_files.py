"""Files appear whole or not at all, where the user said."""

import errno
import os
import re
import threading
from pathlib import Path

import pytest

from hf_anomaly.files import check_output, files_below, read_json, replacing, shortened, staged, writing


@pytest.mark.parametrize("open_", [replacing, writing])
def test_a_file_is_replaced_when_all_went_well(tmp_path, open_):
    path = tmp_path / "folder" / "x"
    with open_(path) as temporary:
        temporary.write_text("old")

    def fail():
        with open_(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("open_", [replacing, writing])
def test_two_who_write_the_same_file_do_not_mix(tmp_path, open_):
    path = tmp_path / "x"
    with open_(path) as slow:
        slow.write_text("slow")
        with open_(path) as fast:
            fast.write_text("fast")
        assert (path.read_text(), slow.read_text()) == ("fast", "slow")
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["x"]


def test_of_a_link_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "target").write_text("old")
    for name in ("target", "none-yet"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "there" / name)
        with writing(link) as temporary:
            temporary.write_text("new")
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text() == "new"
    with replacing(link) as temporary:
        temporary.write_text("own")
    assert (link.is_symlink(), link.read_text(), (tmp_path / "there" / name).read_text()) == (False, "own", "new")


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    with writing(tmp_path / "pipe") as path:
        path.write_text("all")
    reader.join()
    assert read == ["all"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("suffixes", "words"),
    [
        ((".png",), "must end in .png"),
        ((".csv", ".jsonl"), "must end in .csv or .jsonl"),
        ((".md", ".csv", ".json"), "must end in .md, .csv or .json"),
    ],
)
def test_names_of_outputs(tmp_path, suffixes, words, refused):
    for suffix in suffixes:
        check_output("--output", tmp_path / f"a{suffix}", suffixes=suffixes)
        check_output("--output", tmp_path / f"A{suffix.upper()}", suffixes=suffixes)
    with refused("--output", "a.pdf", words):
        check_output("--output", tmp_path / "a.pdf", suffixes=suffixes)
    check_output("--output", None, suffixes=suffixes)
    check_output("--output", tmp_path / "a.pdf")


def test_no_output_takes_the_place_of_what_a_folder_tells_of_its_detector(tmp_path, refused):
    names = ("config.json", "preprocessor_config.json", "eval_results.json", "README.md")
    for name in names:
        check_output("--output", tmp_path / name)
    (tmp_path / "config.json").touch()
    for name in names:
        with refused("--output", name, "the detector's own"):
            check_output("--output", tmp_path / name)
    check_output("--output", tmp_path / "here.json")


def test_outputs_where_nothing_can_be_written_are_refused_at_once(tmp_path, monkeypatch, refused):
    tried = []

    def refuse(dir):
        tried.append(dir)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # a superuser may write anywhere
    (tmp_path / "there.csv").touch()
    for path, folder in (("there.csv", False), ("new.csv", False), ("new/folder", True), ("", True)):
        with refused("--output", path, "Permission denied"):
            check_output("--output", tmp_path / path, folder=folder)
    assert tried == [tmp_path.resolve()] * 4
    check_output("--output", os.devnull)


def test_a_staged_folder_comes_with_its_config_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr("os.replace", lambda source, place: moved.append(Path(place).name) or replace(source, place))
    (tmp_path / "mine").mkdir()
    target = tmp_path / "target"
    (target / "figures-of-mine").mkdir(parents=True)
    (target / "figures").symlink_to(tmp_path / "mine")
    with staged(target, re.compile("figures|weights")) as folder:
        for name in ("config.json", "weights", "x"):
            (folder / name).touch()
    assert moved[-1] == "config.json"
    assert {path.name for path in target.iterdir()} == {"config.json", "weights", "x", "figures-of-mine"}
    assert (tmp_path / "mine").is_dir()


def test_names_that_every_file_system_has():
    """A row of a dataset names its image as its author's machine did."""
    assert shortened("C:\\scans/12:30 <a>?\n") == "C__scans_12_30 _a___"
    assert shortened("肺" * 100) == "肺" * 66


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5])
def test_json_that_is_no_object(tmp_path, text, refused):
    (tmp_path / "x.json").write_text(text)
    with refused(tmp_path / "x.json", "restore or delete it"):
        read_json(tmp_path / "x.json")


def test_a_folder_that_cannot_be_read_is_told_of(tmp_path, monkeypatch, caplog, refused):
    for name in ("a/b/x.png", "c/y.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def refuse(path):  # a superuser may read everything
        if os.fspath(path).endswith("a"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert list(files_below(tmp_path)) == [tmp_path / "c" / "y.png"]
    assert f"{tmp_path / 'a'} is left out, as it cannot be read (Permission denied)" in caplog.text
    with refused(tmp_path / "a", "cannot be read (Permission denied)"):
        list(files_below(tmp_path / "a"))
