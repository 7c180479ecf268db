"""Checks of files from elsewhere: a repository's config must not make the loader read or write outside its folder, exhaust the memory, or run code."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoBackbone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .errors import InputError

LARGEST_NUMBER = 2**20  # no width, image or kernel size comes near it
LARGEST_DEPTH = 1000  # layers; each costs time even where its weights cost nothing
LARGEST_LIST = 1000  # a schedule has so many β, a network fewer stages
MOST_LABELS = 2**15  # ImageNet-21k has two thirds of it; transformers names each of them as it reads the config
_FREE_BYTES = 64 * 2**20  # a model may always take so much more than its files


def is_ours(class_: type) -> bool:
    """Whether a class is the package's, not from elsewhere."""
    return class_.__module__.startswith("hf_anomaly.")


def load_without_code(auto_class: type, name_or_path: str | os.PathLike, **options: Any) -> Any:
    """`auto_class.from_pretrained(name_or_path, …)` that never runs a repository's code, nor asks on standard input whether to.

    The package's own detectors name code too, but are registered: what transformers and the package know is loaded from there.

    Raises:
        InputError: the architecture is known to neither, but by code beside the config.
    """
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):  # of `resolve_trust_remote_code`, which has no error of its own
            raise
        raise InputError(
            f"{str(name_or_path)!r} names code of its own, which is never run; give one whose architecture transformers or hf_anomaly has"
        ) from error


def check_plausible(config: dict, where: str) -> None:
    """Refuses numbers and lists in a network's config, at any depth, that would exhaust memory or time before the weights are looked at.

    Raises:
        InputError: names the entry.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_plausible(value, f"{where}.{name}")
            continue
        values = list(_leaves(value))
        # Floats, too: 1e10 steps are as many. Only infinity, which nothing allocates, may be a schedule's bound.
        numbers = [abs(number) for number in values if isinstance(number, int | float) and abs(number) < math.inf]
        if len(values) > LARGEST_LIST:
            raise InputError(f"{where}.{name} is a list of {len(values)}: more than {LARGEST_LIST} is no network's; correct the config")
        if any(number > LARGEST_NUMBER for number in numbers):
            raise InputError(f"{where}.{name} is {value}: more than {LARGEST_NUMBER} is no network's; correct the config")
        if name == "num_labels" and sum(numbers) > MOST_LABELS:
            raise InputError(f"{where}.{name} is {value}: more than {MOST_LABELS} classes are no network's; correct the config")
        if any(word in str(name) for word in ("depth", "layers", "blocks")) and sum(numbers) > LARGEST_DEPTH:
            raise InputError(f"{where}.{name} is {value}: more than {LARGEST_DEPTH} layers are no network's; correct the config")


def _leaves(value: Any) -> Iterator[Any]:
    """What a list holds, also in lists within it, however deep; of anything else the value itself."""
    entries = [value]
    for entry in entries:  # which grows meanwhile
        if isinstance(entry, list | tuple):
            entries += entry
        else:
            yield entry


def check_backbone_config(backbone_config: dict) -> None:
    """Refuses a nested config whose architecture transformers does not have as a backbone, or that names code.

    Raises:
        InputError: also for implausible numbers, see `check_plausible`.
    """
    model_type = backbone_config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("backbone_config has no 'model_type': name the backbone's architecture, for instance 'small_resnet' or 'resnet'")
    if backbone_config.get("auto_map") is not None:
        raise InputError("backbone_config has an auto_map: code from a repository is never run for a backbone; take the entry out")
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in AutoBackbone._model_mapping:
        raise InputError(f"backbone_config.model_type {model_type!r} is no backbone: transformers' AutoBackbone does not know it")
    check_plausible(backbone_config, "backbone_config")


def check_attention(implementation: str | None) -> None:
    """Refuses a config's `attn_implementation` that names a repository, whose code transformers would fetch and run.

    Raises:
        InputError: also for what is no name.
    """
    if implementation is not None and (not isinstance(implementation, str) or "/" in implementation):
        raise InputError(f"attn_implementation {implementation!r}: code of a repository is never run; take the entry out of config.json")


def check_shard_names(index: str | os.PathLike) -> None:
    """Refuses the index of a sharded checkpoint (`*.safetensors.index.json`) that names files outside its folder, or pickles.

    Raises:
        InputError: also if it is damaged.
    """
    try:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of a sharded checkpoint ({error!r}): save or download the weights again") from error
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}: only .safetensors files beside it are read; save or download the weights again")


def check_memory(model: torch.nn.Module, checkpoint_files: list[str], where: str) -> None:
    """Refuses a config that promises tensors far larger than the files: loading would allocate them, only to find that they are not there.

    Args:
        model: built from the config, on the meta device.

    Raises:
        InputError: names the largest of them.
    """
    stored, size = {}, 0
    for file in checkpoint_files:
        size += os.path.getsize(file)
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    absent = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if stored.get(name) != tuple(tensor.shape)
    }
    if sum(absent.values()) > _FREE_BYTES + 4 * size:
        name = max(absent, key=absent.get)
        raise InputError(
            f"{where}: config.json promises {absent[name] / 2**30:.1f} GiB of {name}, which the weights of {size / 2**30:.3f} GiB do not hold; "
            "save or download the detector again"
        )


def contained_files(folder: str | os.PathLike, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """The wanted files of a folder, at any depth, as paths relative to it.

    Symbolic links may lead within the folder or, in a snapshot of the Hub's cache, to the cache's own blobs.

    Raises:
        InputError: a link leads elsewhere; what lies there must not be copied or published.
    """
    root = Path(folder).resolve()
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            allowed += [parent, parent.parent.parent / "blobs"]
    for path in sorted(root.rglob("*")):
        if wanted(path.relative_to(root)):
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise InputError(f"{path} is a link to {target}, outside of its folder: replace it by the file itself, or delete it")
            if target.is_file():
                yield path.relative_to(root)
