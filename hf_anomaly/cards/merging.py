"""Cards that both a program and a person write: the program writes between marks, everything else is the person's.

    <!-- hf-anomaly: results -->
    …
    <!-- /hf-anomaly: results -->

In the YAML these are the program's: the results of the task `TASK_NAME`, their metrics, the tag of the model type, and licence and data sets as long as
they are what it noted in the entry `hf_anomaly`. The rest is the person's.
"""

import copy
import json
import logging
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml
from huggingface_hub.utils import yaml_dump

from ..errors import InputError

logger = logging.getLogger(__name__)

TASK_NAME = "Image anomaly detection"
NOTED = "hf_anomaly"  # the YAML's entry in which the program notes which values of `FIELDS` it wrote itself
FIELDS = ("license", "datasets")
_OUR_ENTRIES = {*FIELDS, NOTED, "library_name", "pipeline_tag", "tags", "metrics", "model_name", "model-index"}
_OUR_TAGS = {"anomaly-detection", "hf-anomaly", "dissolver", "denoising"}  # and those of the methods
METRICS = {  # key in eval_results.json → metric id and name
    "auroc": ("roc_auc", "AUROC"),
    "average_precision": ("average_precision", "Average precision"),
    "fpr_at_95_tpr": ("fpr_at_95_tpr", "FPR at 95 % TPR"),
    "balanced_accuracy_at_threshold": ("balanced_accuracy", "Balanced accuracy at the threshold"),
    "pixel_auroc": ("pixel_roc_auc", "Pixel AUROC"),
    "pixel_average_precision": ("pixel_average_precision", "Pixel average precision"),
    "aupro": ("aupro", "AUPRO"),
}
OUTDATED = (
    "## Results\n\nThe detector was fitted or calibrated again after this card was written: the results no longer hold and were taken out. The images "
    "named above trained its weights; they need not be those that calibrate it now."
)

_BLOCK = re.compile(r"^<!-- hf-anomaly: (\w+) -->\n(.*?)^<!-- /hf-anomaly: \1 -->$", re.DOTALL | re.MULTILINE)
_FRONT_MATTER = re.compile(r"\s*^---[ \t]*\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
_ADDRESS = re.compile(r'(?<=from_pretrained\()"(?:[^"\\\n]|\\.)*"')
_BOOLEAN, _TEXT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str"
_BASE_60 = re.compile(r"[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?\Z")


class _Loader(yaml.SafeLoader):
    """With what YAML 1.2, which the Hub reads, takes for text: `language: no` is Norwegian, not false, and `time: 12:30` is not 750, in base 60."""

    yaml_implicit_resolvers = {
        letter: [(_TEXT, _BASE_60), *((tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN)]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), [*"tTfF"])


def read_card(path: str | os.PathLike, name: str | None = None) -> str:
    """A card's text, also if an editor put a byte order mark before it.

    Args:
        name: how an error calls the file; by default its path.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name or path} is not UTF-8: save it as UTF-8") from error


def split_card(text: str) -> tuple[dict, str]:
    """The YAML at the head of a card, and the rest. YAML that cannot be read counts as text."""
    text = text.replace("\r\n", "\n")
    if match := _FRONT_MATTER.match(text):
        try:
            data = yaml.load(match[1], _Loader) or {}
        except Exception:  # PyYAML's own, and what it stumbles over: a date that is none, a value that is not of its tag, too deep lists
            data = None
        if isinstance(data, dict):
            return data, text[match.end() :]
    return {}, text


def join_card(data: dict, body: str) -> str:
    data = {name: copy.deepcopy(value) for name, value in data.items()}  # one list in two entries would be written as an alias
    front = f"---\n{yaml_dump(data, sort_keys=False)}---\n\n" if data else ""
    return front + body.strip() + "\n"


def merge_cards(ours: str, theirs: str, given: Collection[str] | None = None) -> str:
    """A new generated card, with all that a person wrote in the card that it replaces.

    A block that the person deleted stays away. If both cards have text of a person, that in `theirs` is kept.

    Args:
        given: those of `FIELDS` that the caller asked for: they come from `ours`, the others from `theirs`. None: it is not known which; then all come
            from `ours` except those that a person wrote in `theirs`.
    """
    (our_data, our_body), (their_data, their_body) = split_card(ours), split_card(theirs)
    data = _merge_data(our_data, their_data, given)
    if not _BLOCK.search(their_body) and not _own_text(their_body):
        return join_card(data, our_body)
    if _own_text(our_body) and _own_text(our_body) != _own_text(their_body):
        logger.warning("The card that is replaced has text of its own, which is kept instead of that in the new card")
    blocks = {match[1]: match[0] for match in _BLOCK.finditer(our_body)}
    their_blocks = {match[1] for match in _BLOCK.finditer(their_body)}
    body = _BLOCK.sub(lambda match: blocks.get(match[1], ""), their_body)
    # If a card of the same kind lacks a block, somebody deleted it; a card of another kind never had it.
    same = their_blocks and _kind(our_data) == _kind(their_data)
    missing = [] if same else [block for name, block in blocks.items() if name not in their_blocks]
    return join_card(data, "\n\n".join([body.strip(), *missing]))


def is_generated(text: str) -> bool:
    """Whether marks tell that words of a card are a program's."""
    return _BLOCK.search(split_card(text)[1]) is not None


def has_own_words(text: str) -> bool:
    """Whether a person wrote more in a card than its title: text, a tag, or an entry of the YAML."""
    data, body = split_card(text)
    tags = {str(tag) for tag in _list(data.get("tags")) if not str(tag).endswith("_anomaly")}
    entries = {name for name in FIELDS if data.get(name) != _notes(data).get(name)} | (data.keys() - _OUR_ENTRIES)
    return bool(_own_text(body) or tags - _OUR_TAGS or entries)


def outdate_card(text: str) -> str | None:
    """The card, without its results, of a detector that was fitted or calibrated again since; None if no marks tell which words are a program's."""
    data, body = split_card(text)
    if not _BLOCK.search(body):
        return None
    replacement = f"<!-- hf-anomaly: results -->\n{OUTDATED}\n<!-- /hf-anomaly: results -->"
    body = _BLOCK.sub(lambda match: replacement if match[1] == "results" else match[0], body)
    return join_card(_without_results(data), body)


def address_card(text: str, repo_id: str) -> str:
    """The card with `repo_id` in the generated code that loads the detector."""
    return _BLOCK.sub(lambda match: _ADDRESS.sub(lambda _: json.dumps(repo_id), match[0]) if match[1] == "usage" else match[0], text)


def tag_card(text: str, tags: Iterable[str] | str) -> str:
    """The card with these tags, or this one, too."""
    data, body = split_card(text)
    return join_card(data | {"tags": _unique([*_list(data.get("tags")), *([tags] if isinstance(tags, str) else tags)])}, body)


def _kind(data: dict) -> set:
    """The tags that distinguish cards of dissolvers, of pretrained weights, and of each method's detectors."""
    return {tag for tag in _list(data.get("tags")) if tag in ("denoising", "dissolver") or str(tag).endswith("_anomaly")}


def _own_text(body: str) -> str:
    """What a person wrote, beyond the blocks and the title."""
    return re.sub(r"^# .*\n?", "", _BLOCK.sub("", body).strip()).strip()


def _merge_data(ours: dict, theirs: dict, given: Collection[str] | None) -> dict:
    kept = _without_results(theirs)
    our_notes, their_notes = _notes(ours), _notes(theirs)
    for name in FIELDS:
        if ours.get(name) and (theirs.get(name) == their_notes.get(name) if given is None else name in given):
            kept.pop(name, None)
        elif given is None and ours.get(name) and theirs.get(name) not in (None, ours[name]):
            logger.warning(
                "The card that is replaced has %s %s, which somebody wrote there: it is kept in place of %s", name, theirs[name], ours[name]
            )
    tags = _list(ours.get("tags"))
    kept["tags"] = [tag for tag in _list(theirs.get("tags")) if tag in tags or not str(tag).endswith("_anomaly")]
    merged = {**ours, **kept}
    for name in ("tags", "metrics"):
        merged[name] = _unique([*_list(kept.get(name)), *_list(ours.get(name))])
    entries = [entry for entry in (*_list(kept.get("model-index")), *_list(ours.get("model-index"))) if isinstance(entry, dict)]
    if entries:
        merged["model-index"] = [{**entries[-1], "results": [result for entry in entries for result in _list(entry.get("results"))]}]
    merged[NOTED] = {
        name: merged[name] for name in FIELDS if merged.get(name) and merged[name] in (our_notes.get(name), their_notes.get(name))
    }
    order = dict.fromkeys([*theirs, *merged])  # theirs, so that a card with nothing new stays as it is
    return {name: merged[name] for name in order if merged.get(name) not in (None, [], {})}


def _notes(data: dict) -> dict:
    notes = data.get(NOTED)
    return notes if isinstance(notes, dict) else {}


def _without_results(data: dict) -> dict:
    """The YAML without the program's results and their metrics."""
    data = dict(data)
    index = []
    for entry in _list(data.pop("model-index", None)):
        results = [] if not isinstance(entry, dict) else [result for result in _list(entry.get("results")) if not _is_ours(result)]
        index += [{**entry, "results": results}] if results else []
    metrics = [metric for metric in _list(data.pop("metrics", None)) if metric not in [id_ for id_, _ in METRICS.values()]]
    return data | ({"model-index": index} if index else {}) | ({"metrics": metrics} if metrics else {})


def _is_ours(result) -> bool:
    """Whether an entry of the model index, which anybody may have written, is a program's result."""
    task = result.get("task") if isinstance(result, dict) else None
    return isinstance(task, dict) and task.get("name") == TASK_NAME


def _unique(values: list) -> list:
    """The first of equal values, which need not be hashable."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
