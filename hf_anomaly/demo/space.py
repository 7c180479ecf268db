"""The page as a Space of the Hub: three small files."""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id, yaml_dump
from packaging.requirements import Requirement

from ..errors import InputError
from ..files import write_file
from ..hub import hub_errors, push_folder
from ..version import __version__
from .page import GRADIO, WARNING

APP = '''\
"""Serves the detector; README.md says which versions."""

from hf_anomaly.demo import run_demo

run_demo({arguments})
'''
REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
hf-anomaly[demo]>={version}
"""
README = """\
# {title}

Drop an image: the anomaly detector [{model}](https://huggingface.co/{model}) gives its score, p-value and verdict.
The images are processed on the Space's machine.

{warning}

If the detector is private, give the Space a secret `HF_TOKEN` that may read it.
On hardware with a GPU take the first line out of `requirements.txt`: it chooses torch's build for CPUs.
"""


def make_space(
    model_name: str,
    space_id: str,
    *,
    revision: str | None = None,
    folder: str | os.PathLike | None = None,
    push: bool = True,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Makes a Space that serves the page of a detector on the Hub, in one commit; made again, its three files are written anew.

    Args:
        model_name: Hub id of the detector.
        space_id: "name" or "organisation/name".
        revision: branch, tag or commit of the detector; default main, as it is whenever the Space starts.
        folder: also write the files there.
        push: False only writes them.
        private: whether a new Space is private.
        token: Hub token.

    Returns:
        The commit's URL, or the folder if nothing was pushed.

    Raises:
        InputError: the detector is a local folder, a name that is none, or a folder with files that would be overwritten.
        HubError: there is no such detector, or the Hub refused or cannot be reached.
    """
    if Path(model_name).is_dir():
        raise InputError(
            f"{model_name} is a folder of this machine, which a Space cannot read: push it first (model.push_to_hub) and name its repository"
        )
    for name in (model_name, space_id):
        with hub_errors(name):
            validate_repo_id(name)
    if folder is None and not push:
        raise InputError("nothing to do: give a folder to write the Space to, or push it")
    if push:
        with hub_errors(model_name, reading=True):
            HfApi(token=token).model_info(model_name, revision=revision)
    files = space_files(model_name, space_id, revision)
    if folder is not None:
        _write(Path(folder), files)
    if not push:
        return os.fspath(folder)
    with tempfile.TemporaryDirectory() as temporary:
        _write(Path(temporary), files)
        message = f"Demo of {model_name}"
        return str(push_folder(temporary, space_id, repo_type="space", private=private, token=token, message=message))


def space_files(model_name: str, space_id: str, revision: str | None = None) -> dict[str, str]:
    """The Space's files: name → text."""
    title = space_id.split("/")[-1]
    arguments = repr(model_name) if revision is None else f"{model_name!r}, revision={revision!r}"
    front = {
        "title": title,
        "emoji": "🔍",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "app_file": "app.py",
        "models": [model_name],
        "tags": ["anomaly-detection", "hf-anomaly"],
        "short_description": "Image anomaly detection: score, p-value and verdict",
    }
    body = README.format(title=title, model=model_name, warning=WARNING)
    return {
        "app.py": APP.format(arguments=arguments),
        "requirements.txt": REQUIREMENTS.format(version=__version__),
        "README.md": f"---\n{yaml_dump(front, sort_keys=False)}---\n\n{body}",
    }


def _write(folder: Path, files: dict[str, str]) -> None:
    for name in files:
        if (folder / name).exists():
            raise InputError(f"{folder / name} is there already and would be overwritten: delete it, or name another folder")
    for name, text in files.items():
        write_file(folder / name, text)


def _gradio_version() -> str:
    """The installed gradio if it is one that the page works with, else the oldest such."""
    works = Requirement(GRADIO).specifier
    oldest = next(bound.version for bound in works if bound.operator == ">=")
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        return oldest
    return installed if works.contains(installed) else oldest
