"""What was saved, loaded again: detectors, their configurations, and the results beside them."""

import os
from pathlib import Path

import torch

from .detector import AnomalyDetector, AnomalyDetectorConfig
from .errors import InputError, one_line
from .files import read_json
from .hub import find_file, loading
from .image_processing import AnomalyImageProcessor
from .saving import holds_dissolver
from .untrusted import load_without_code


def _check_place(name_or_path: str) -> None:
    """Refuses a file, and a folder that holds no model: transformers would speak of configs.

    Raises:
        InputError: also says how to go on with a training of which there are checkpoints alone.
    """
    place = Path(name_or_path)
    if place.is_file():
        raise InputError(f"{name_or_path!r} is a file: a detector is a folder that training wrote, or a Hub id")
    if place.is_dir() and not (place / "config.json").is_file():
        if holds_dissolver(place):
            raise InputError(
                f"{name_or_path!r} holds a dissolver and no detector: hf-anomaly dissolve shows what it does, --dissolver trains with it"
            )
        checkpoints = any(place.glob("checkpoint-*")) or any(place.glob("*-training/checkpoint-*"))
        unfinished = "the training there is not finished; the same command with --resume_from_checkpoint true goes on with it"
        raise InputError(f"{name_or_path!r} holds no detector: {unfinished if checkpoints else 'give the folder that training wrote'}")


def load_detector(
    name_or_path: str, revision: str | None = None, device: str | None = None
) -> tuple[AnomalyDetector, AnomalyImageProcessor]:
    """A saved detector in eval mode, and its processor.

    Args:
        device: where the detector goes; None leaves it where it is loaded.

    Raises:
        InputError: there is none, it is something else, or names code that is not the package's; or there is no such device.
        HubError: the Hub refused or cannot be reached; one line, with the remedy.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what no device is called, and what torch was not built for
        raise InputError(f"--device {device}: {one_line(error)[:200]}; leave it out, or give cpu or cuda") from error
    _check_place(name_or_path)
    for path in Path(name_or_path).glob("*.safetensors"):
        if not os.access(path, os.R_OK):  # of which safetensors says that there is no such file
            raise InputError(f"{path}: the file cannot be read; change its permissions")
    with loading(name_or_path, "cannot be loaded as a detector"):
        model = load_without_code(AutoModel, name_or_path, revision=revision)
        processor = load_without_code(AutoImageProcessor, name_or_path, revision=revision)
    if not isinstance(model, AnomalyDetector):
        raise InputError(f"{name_or_path!r} holds a {type(model).__name__}, which is no anomaly detector")
    if not isinstance(processor, AnomalyImageProcessor):
        raise InputError(
            f"{name_or_path!r} has a {type(processor).__name__} in place of an AnomalyImageProcessor: save or download it again"
        )
    processor.check_fits(model.config)
    return model.eval().to(device), processor


def load_config(name_or_path: str) -> AnomalyDetectorConfig:
    """A saved detector's configuration.

    Raises:
        InputError: there is none, or it is something else's.
        HubError: the Hub refused or cannot be reached; one line, with the remedy.
    """
    from transformers import AutoConfig

    _check_place(name_or_path)
    with loading(name_or_path, "holds no detector"):
        config = load_without_code(AutoConfig, name_or_path)
    if not isinstance(config, AnomalyDetectorConfig):
        raise InputError(f"{name_or_path!r} holds a {type(config).__name__}, which is no anomaly detector's")
    return config


def recorded_results(name_or_path: str, revision: str | None = None) -> dict:
    """The results beside a saved detector, what its `eval_results.json` holds; {} if there are none.

    Raises:
        InputError: they are no JSON object, or its `seed`, `division` or `evaluated_on` are none.
        HubError: the Hub refused.
    """
    path = find_file(name_or_path, "eval_results.json", revision=revision)
    return {} if path is None else read_results(path)


def read_results(path: str | os.PathLike) -> dict:
    """What a file of results holds, `eval_results.json` or what an evaluation wrote elsewhere.

    Raises:
        InputError: as `recorded_results`.
    """
    results = read_json(path)
    for field, kind in (("seed", int), ("division", dict), ("evaluated_on", dict)):
        if not isinstance(results.get(field), kind | None):
            raise InputError(f"{path}: {field} must be of type {kind.__name__}, got {results[field]!r}: restore or delete it")
    return results
