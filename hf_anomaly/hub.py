"""To the Hub, in one commit: a reader finds the old state or the new one, never half a model."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import cached_file

from .cards.merging import address_card, merge_cards, read_card
from .errors import HubError, InputError, one_line
from .saving import is_public
from .untrusted import contained_files

logger = logging.getLogger(__name__)

# What a push deletes: files of the model that was there before, which would be read together with the new one's.
_REPLACED = (
    *("model*.safetensors", "model.safetensors.index.json", "eval_results.json", "figures/*", "dissolver/*", "pretrained/*"),
    *("dissolver_config.json", "model_index.json", "unet/*", "scheduler/*"),  # of a dissolver in a repository of its own
)

_NO_TOKEN = "the Hub does not accept the token: log in with `hf auth login`, or give a valid token"
_PUSHING: dict[int | type, str] = {
    LocalTokenNotFoundError: _NO_TOKEN,
    401: _NO_TOKEN,
    403: "the token may not write there: take one with write permission, push to a namespace of your own, or propose it with create_pr=True",
    404: "there is no such repository or revision, or it is private and the token may not see it: check the name and the token",
    409: "it exists already: choose another name",
    412: "somebody else committed at the same time: push again",
    429: "too many requests: wait a few minutes and push again",
}
_GATED = "it is gated, or the token may not read it: ask for access on its page, and log in with `hf auth login`"
_NOT_THERE = "no folder here, and no repository on the Hub, or a private one: check the name, or log in with `hf auth login`"
_READING: dict[int | type, str] = {
    LocalTokenNotFoundError: _NO_TOKEN,
    RevisionNotFoundError: "it has no such branch, tag or commit: check the revision",
    GatedRepoError: _GATED,
    RepositoryNotFoundError: _NOT_THERE,
    401: _NO_TOKEN,
    403: _GATED,
    404: _NOT_THERE,
    429: "too many requests: wait a few minutes and try again",
}
_MOST_NAMED = 10  # entries in one line of the log
_PAUSES = (1, 4)  # seconds before the second and the third attempt


@contextmanager
def hub_errors(repo_id: str, *, reading: bool = False) -> Iterator[None]:
    """Turns what goes wrong with the Hub inside the block into a `HubError` of one line with the remedy, even if a library hid it behind an `OSError`.

    Args:
        reading: whether the block loads something: the remedies are then a reader's.
    """
    try:
        yield
    except (HubError, InputError):
        raise
    except (OSError, ValueError, HTTPError) as error:  # HTTPError: of the client's library, statuses as well as failures of the network
        if isinstance(error, json.JSONDecodeError) and not reading:  # the client reads some answers before it looks at their status
            raise HubError(f"{repo_id}: the Hub is out of order (its answer is no JSON): try again later") from error
        causes = list(_causes(error))
        if not causes:
            raise
        if any(isinstance(cause, HFValidationError) for cause in causes):
            here = "no folder here and " if reading else ""
            raise InputError(f"{repo_id!r} is {here}no name of a repository: use 'name' or 'organisation/name'") from error
        raise HubError(f"{repo_id}: {_remedy(causes, _READING if reading else _PUSHING)}") from error


@contextmanager
def loading(name_or_path: str, failure: str) -> Iterator[None]:
    """Turns what goes wrong while the block loads something into one line, which begins with the name and `failure`.

    Raises:
        InputError: in place of what transformers raises for a bad name, file or configuration.
        HubError: the Hub refused or cannot be reached.
    """
    try:
        with hub_errors(name_or_path, reading=True):
            yield
    except (HubError, InputError):
        raise
    except Exception as error:  # transformers checks little of a config, and stumbles over the rest in every way
        raise InputError(f"{name_or_path!r} {failure}: {one_line(error)[:300]}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The Hub's errors among an error and those that caused it. A single missing file is none."""
    while error is not None:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not missing and isinstance(
            error, HTTPError | ConnectionError | LocalEntryNotFoundError | LocalTokenNotFoundError | HFValidationError
        ):
            yield error
        error = error.__cause__ or error.__context__


def _remedy(causes: list[BaseException], remedies: dict[int | type, str]) -> str:
    for cause in causes:
        for kind in type(cause).__mro__:  # to the client a gated repository is one that it did not find
            if kind in remedies:
                return remedies[kind]
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        here = "there is no such folder here, and " if remedies is _READING else ""
        return f"{here}{constants.ENDPOINT} cannot be reached ({one_line(causes[-1])}): check the network and that no *_OFFLINE variable is set"
    status = answer.response.status_code
    if status >= 500:
        return f"the Hub is out of order ({status}): try again later"
    return remedies.get(status, f"the Hub refused ({one_line(answer)})")


def find_file(
    name_or_path: str | os.PathLike | None,
    file: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> str | None:
    """The path of a model's file, downloaded if need be; None if there is none. The arguments are those of `from_pretrained`.

    Raises:
        HubError: the Hub refused.
    """
    if name_or_path is None:
        return None
    with hub_errors(str(name_or_path), reading=True):
        return cached_file(
            name_or_path,
            file,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


def create_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model") -> str:
    """Makes a repository if it is not there yet; its full id.

    Raises:
        HubError: the Hub refused or cannot be reached.
    """
    with hub_errors(repo_id):
        sdk = "gradio" if repo_type == "space" else None
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk).repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload model",
    description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    git_tag: str | None = None,
    repo_type: str = "model",
) -> CommitInfo:
    """Uploads a saved detector or dissolver in one commit, and takes away what is left there of an earlier one.

    Of a model's folder goes what is part of the model, see `saving.is_public`; one line of the log names what else lies there. A Space's goes whole.
    A model's card keeps what a person wrote in the repository's, see `cards.merging`. Trouble of the Hub or the network is met with two more attempts.

    Args:
        repo_id: "name" or "organisation/name"; created if it does not exist.
        private: whether a new repository is private.
        revision: branch to push to, made if it does not exist; with `create_pr` the one that the pull request is for.
        create_pr: propose it in a pull request.
        git_tag: also gives the commit this tag.
        repo_type: "model", or "space" for gradio's.

    Returns:
        The commit; as a string its URL.

    Raises:
        HubError: the Hub refused or cannot be reached; one line, with the remedy.
        InputError: a symbolic link leads out of the folder.
    """
    folder = Path(folder)
    files = list(contained_files(folder, is_public if repo_type == "model" else lambda path: True))
    if left_out := _left_out(folder, files):
        more = f" and {len(left_out) - _MOST_NAMED} more" if len(left_out) > _MOST_NAMED else ""
        logger.info("%s: not pushed, as no part of the model: %s%s", repo_id, ", ".join(left_out[:_MOST_NAMED]), more)
    api, repo_id = HfApi(token=token), create_repository(repo_id, private=private, token=token, repo_type=repo_type)
    with hub_errors(repo_id):
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        for pause in (*_PAUSES, None):
            try:
                commit = _commit(api, repo_id, folder, files, message, description, revision, create_pr, repo_type)
                break
            except (HTTPError, ConnectionError, json.JSONDecodeError) as error:
                # Harmless to repeat, as the next attempt starts from what is there now; but a pull request would be opened twice.
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if pause is None or create_pr or refused:
                    raise
                logger.warning("%s: %s; trying again in %d s", repo_id, one_line(error), pause)
                time.sleep(pause)
        if git_tag is not None:
            api.create_tag(repo_id, tag=git_tag, revision=commit.oid, repo_type=repo_type)
    return commit


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    branch: str,
    path_in_repo: str,
    token: str | None = None,
    message: str,
    ignore: list[str] | None = None,
) -> CommitInfo:
    """Uploads a training checkpoint to a branch of its own, away from those who load the model.

    Args:
        path_in_repo: the folder there, which is replaced; "" for the branch's root.
        ignore: patterns of files that stay here.

    Raises:
        HubError: as `push_folder`.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            revision=branch,
            commit_message=message,
            ignore_patterns=ignore,
            delete_patterns="*" if path_in_repo else list(_REPLACED),
        )


def _left_out(folder: Path, files: list[Path]) -> list[str]:
    """What else lies in a folder than these files; a subfolder without any of them is one entry."""
    kept = {Path(), *files, *(parent for file in files for parent in file.parents)}
    entries = (entry for place in kept - {*files} for entry in (folder / place).iterdir())
    return sorted(
        f"{entry.relative_to(folder).as_posix()}{'/' * entry.is_dir()}" for entry in entries if entry.relative_to(folder) not in kept
    )


def _commit(api, repo_id, folder, files, message, description, revision, create_pr, repo_type) -> CommitInfo:
    head = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
    there = {sibling.rfilename for sibling in head.siblings}
    contents: dict[str, Path | bytes] = {path.as_posix(): folder / path for path in files}
    if "README.md" in contents and repo_type == "model":
        card = address_card(read_card(contents["README.md"]), repo_id)
        if "README.md" in there:
            path = api.hf_hub_download(repo_id, "README.md", revision=head.sha)
            card = merge_cards(card, read_card(path, f"README.md of {repo_id}"))
        contents["README.md"] = card.encode()
    replaced = _REPLACED if repo_type == "model" else ()
    gone = {name for name in there - contents.keys() if any(_fits(name, pattern) for pattern in replaced)}
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in sorted(gone)),
        ],
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
        repo_type=repo_type,
        parent_commit=head.sha,
    )


def _fits(name: str, pattern: str) -> bool:
    """As `fnmatch`, but where the pattern names no folder the file is in none: fnmatch's * spans folders."""
    return fnmatch(name, pattern) and ("/" in pattern or "/" not in name)
