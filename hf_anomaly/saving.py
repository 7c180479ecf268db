"""A detector's folder: written whole or not at all, with what belongs to the detector beside its weights, and loadable without importing this package."""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from .cards.figures import keep_other_files
from .cards.merging import outdate_card, read_card
from .errors import one_line
from .untrusted import contained_files, is_ours

logger = logging.getLogger(__name__)

# Files that belong to a detector beside its weights and config; they follow it from folder to folder.
COMPANIONS = ("preprocessor_config.json", "README.md", "eval_results.json", "figures", "dissolver")
_COMPANION_FILES = (
    *COMPANIONS[:-2],
    "figures/*.png",
    *(f"dissolver/{name}" for name in ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")),
)
_REPORTS = ("eval_results.json", "figures")  # companions that a new reference or calibration makes untrue, as it does results in a card

REMOTE_CODE_FILE = "modeling_hf_anomaly.py"
REMOTE_CODE = '''\
"""The code of this detector is the package hf-anomaly (pip install hf-anomaly). Through this file transformers' Auto classes find it there."""

import hf_anomaly


def __getattr__(name):
    return getattr(hf_anomaly, name)
'''

# Of a dissolver in a folder of its own; a plain DDPMPipeline has them but the first.
DISSOLVER_FILES = ("dissolver_config.json", "model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json")
_MODEL_FILES = ("config.json", "model[.-]*safetensors", "model.safetensors.index*.json", REMOTE_CODE_FILE)
_FIRST_STAGE_FILES = (*_MODEL_FILES, "preprocessor_config.json", "README.md", "pretraining.json")
_OWNERS_FILES = ("LICENSE*", "modeling_*.py", "configuration_*.py")  # what a person may add to them; code is of a class of one's own
_PUBLIC_FILES = (
    *_FIRST_STAGE_FILES,
    *_COMPANION_FILES,
    *DISSOLVER_FILES,
    *_OWNERS_FILES,
    *(f"pretrained/{name}" for name in _FIRST_STAGE_FILES),
)


def holds_dissolver(folder: Path) -> bool:
    """Whether a dissolver, or a plain DDPMPipeline, lies in a folder by itself."""
    return any((folder / name).is_file() for name in DISSOLVER_FILES[:2])


def is_public(path: Path) -> bool:
    """Whether a file, named relative to its folder, is part of the detector, first stage or dissolver there. All else in the folder is its owner's alone."""
    return _is_one_of(path, _PUBLIC_FILES)


def auto_map(**classes: type) -> dict[str, str] | None:
    """The entry `auto_map` of a config: Auto class → the package's class, by way of `REMOTE_CODE_FILE`. None for classes from elsewhere."""
    if not all(map(is_ours, classes.values())):
        return None
    return {auto: f"{Path(REMOTE_CODE_FILE).stem}.{class_.__name__}" for auto, class_ in classes.items()}


def write_remote_code(folder: str | os.PathLike) -> None:
    Path(folder, REMOTE_CODE_FILE).write_text(REMOTE_CODE, encoding="utf-8")


@dataclass
class Home:
    """Where a detector lies, in a folder or on the Hub, and with it its companions.

    Args:
        name: the absolute path of a folder, or the id of a repository.
        revision: its branch, tag or commit.
        subfolder: where in it.
        cache_dir: of the Hub's client.
        reports_hold: whether card and results still tell of the detector: until it is fitted or calibrated anew.
        was_loaded: whether the detector was loaded from there, rather than saved there.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    reports_hold: bool = True
    was_loaded: bool = False
    _snapshot: Path | None = None

    @classmethod
    def of(cls, name_or_path: str | os.PathLike, revision: str | None, subfolder: str, cache_dir: str | None) -> "Home":
        """The home of a detector loaded from there. Of a resolved `revision` it keeps the commit, as the branch may move on."""
        name = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else os.fspath(name_or_path)
        return cls(name, getattr(revision, "resolved", revision), subfolder, cache_dir, was_loaded=True)

    @property
    def is_folder(self) -> bool:
        """Whether it is or was one of this machine, also if one that is named like a repository has come to lie here since."""
        return os.path.isabs(self.name)

    @property
    def path(self) -> Path:
        """Of a folder."""
        return Path(self.name, self.subfolder)

    def lies_in(self, target: Path) -> bool:
        return self.is_folder and self.path.resolve() == target.resolve()

    @property
    def is_gone(self) -> bool:
        """Whether it was a folder, and there is none any more."""
        return self.is_folder and not self.path.is_dir()

    def folder(self, token: str | bool | None = None) -> Path | None:
        """The local folder with the companions, downloaded if need be; None if there is none any more.

        Raises:
            OSError: the Hub refused or cannot be reached.
        """
        if self.is_folder:
            return None if self.is_gone else self.path
        if self._snapshot is None or not self._snapshot.is_dir():
            from huggingface_hub import snapshot_download

            patterns = [Path(self.subfolder, name).as_posix() for name in _COMPANION_FILES]
            snapshot = snapshot_download(self.name, revision=self.revision, cache_dir=self.cache_dir, token=token, allow_patterns=patterns)
            self._snapshot = Path(snapshot, self.subfolder)
        return self._snapshot


def warn_of_lost_companions(homes: list[Home]) -> None:
    """Warns if the place that a detector was loaded from is gone, and so is each place that it was saved to since: such as checkpoints, which come and go."""
    if all(home.is_gone for home in homes) and (lost := [home.path for home in homes if home.was_loaded]):
        logger.warning(
            "%s is gone: saved without the processor, the card and the results that lay there; save a processor beside it", lost[-1]
        )


def bring_companions(homes: list[Home], target: Path, staging: Path, token: str | bool | None = None, *, whole: bool = False) -> None:
    """Copies to `staging` what a detector saved in `target` brings along. This and `outdated_files` decide what then lies beside its weights:

        what lies in `target`       processor      dissolver             card                 results, figures
        -----------------------------------------------------------------------------------------------------------
        no detector, or this one    stays          stays                 stays                stay
        this one, before it was     stays          stays                 loses its results    go
        fitted or calibrated anew
        another detector            is replaced,   is replaced, else     is replaced, else    are replaced, else go
                                    else stays     another method's goes loses its results

    What is missing or replaced comes from the first home that has it. A home whose reports no longer hold gives no results, and its card without them. A
    card in which nothing separates a program's words from a person's cannot lose its results: it stays as it is, or is not copied. What a person laid
    beside the card's figures in `target` stays in any case.

    Args:
        whole: a home on the Hub that cannot be reached is an error; otherwise it is warned of and passed over.

    Raises:
        InputError: a companion is a link that leads out of its folder.
        OSError: a file cannot be copied, or see `whole`.
    """
    another = _holds_another(target, homes)
    # Another detector's place counts as a last home, of its card without the results.
    for home in [*homes, Home(os.fspath(target), reports_hold=False)] if another else homes:
        try:
            folder = home.folder(token)
        except OSError as error:
            if whole:
                raise
            logger.warning("Saved without what lies beside %s on the Hub: %s", home.name, one_line(error))
            continue
        if folder is None or not folder.is_dir():
            continue
        if home.lies_in(target):
            wanted = set() if home.reports_hold else {"README.md"}
        else:
            offered = (name for name in COMPANIONS if home.reports_hold or name not in _REPORTS)
            wanted = {name for name in offered if another or not (target / name).exists()}
        wanted -= {path.name for path in staging.iterdir()}
        for path in contained_files(folder, lambda path, wanted=wanted: path.parts[0] in wanted):
            if path == Path("README.md") and not home.reports_hold:
                if card := outdate_card(read_card(folder / path)):
                    (staging / path).write_text(card, encoding="utf-8")
            elif _is_one_of(path, _COMPANION_FILES):
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, staging / path)
    if _reports_go(homes, target):
        keep_other_files(target, staging)


def outdated_files(homes: list[Home], target: Path, config: PreTrainedConfig, variant: str | None = None) -> re.Pattern:
    """The names of what is deleted from `target` when a detector is saved there, unless it is written anew: companions, see the table of
    `bring_companions`, and all weights of this `variant`, such as "fp16": those of an earlier save in other shards would be loaded instead."""
    of_variant = re.escape(f".{variant}" if variant else "")
    names = [rf"model{of_variant}(-\d+-of-\d+)?\.safetensors", rf"model\.safetensors\.index{of_variant}\.json"]
    if _reports_go(homes, target):
        names += map(re.escape, _REPORTS)
    # Training saves a dissolver before the detector that goes with it.
    if _holds_another(target, homes) and _method_in(target) != config.model_type and getattr(config, "dissolver", None) is None:
        names.append("dissolver")
    return re.compile("|".join(names))


def _holds_another(target: Path, homes: list[Home]) -> bool:
    """Whether a detector lies in `target` which is not this one, as far as its homes tell."""
    return (target / "config.json").is_file() and not any(home.lies_in(target) for home in homes)


def _reports_go(homes: list[Home], target: Path) -> bool:
    """Whether results and figures in `target` tell of another detector, or of this one before it was fitted or calibrated anew."""
    return _holds_another(target, homes) or any(not home.reports_hold and home.lies_in(target) for home in homes)


def _method_in(target: Path) -> str | None:
    try:
        return json.loads((target / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):  # it is about to be replaced
        return None


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    # By parts: fnmatch's * spans folders, and Path.match looks at the end only.
    return any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns)
