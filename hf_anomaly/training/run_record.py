"""What identifies a run: it is written into checkpoints and results, compared before a run is resumed, and shown where runs differ."""

import json
import logging
import os
from typing import Any

from ..data import OneClassSplits
from ..data.sources import dataset_label
from ..errors import InputError
from ..image_processing import AnomalyImageProcessor

logger = logging.getLogger(__name__)

# Fields that do not change how a detector is trained: two of scoring, and where the configuration came from.
_NOT_OF_TRAINING = ("search_chunk_size", "false_positive_rate", "_name_or_path")

# Arguments that a resumed optimizer would not take up, or that change what comes of a run. Steps may be added.
_OPTIMIZATION = (
    "learning_rate", "weight_decay", "optim", "optim_args", "lars", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "max_grad_norm", "ema_decay", "bf16", "fp16", "images_per_step", "gradient_accumulation_steps", "data_seed",
    "dataloader_drop_last",
)  # fmt: skip

# What results tell of the training, and of a calibration since, which stays true if the detector is evaluated again.
_OF_THE_TRAINING = (
    "dataset", "dataset_id", "normal_label", "division", "split_hash", "seed", "steps", "num_processes", "optimization", "num_train", "num_calibration",
    "command", "calibrated_on",
)  # fmt: skip

# What an evaluation tells of its images, under names by which a training tells of its own.
_OF_THE_IMAGES = ("dataset", "normal_label", "split_hash", "division")


def of_the_training(results: dict) -> dict:
    """What a detector's results tell of its training and calibration, without what was measured."""
    return {name: results[name] for name in _OF_THE_TRAINING if name in results}


def without_measurements(results: dict) -> dict:
    """The results of a detector that is calibrated anew: `of_the_training`, and the `reason` why there are no others; {} if they told nothing of it."""
    kept = of_the_training(results)
    return kept and {"reason": results.get("reason") or "the detector was calibrated again since it was evaluated", **kept}


def with_measurements(results: dict, measured: dict) -> dict:
    """The results of a detector that is evaluated anew: `of_the_training`, what was `measured`, and on which images as `evaluated_on`."""
    images = {name: measured[name] for name in _OF_THE_IMAGES}
    return of_the_training(results) | {name: value for name, value in measured.items() if name not in images} | {"evaluated_on": images}


def describe_run(splits: OneClassSplits, processor: AnomalyImageProcessor, seed: int, **settings) -> dict:
    """What identifies a run: its images, seed and settings. A checkpoint of another run is not resumed."""
    data = {
        "dataset": dataset_label(splits.source),
        "normal_label": splits.normal_label,
        "split_hash": splits.split_hash,
        "images": splits.train_digest,
    }
    return {**data, **processor.image_shape, "window": processor.window, "seed": seed, **settings}


def warn_of_other_division(trained: dict, splits: OneClassSplits, name: str) -> None:
    """Warns if images that calibrate or test now may have trained an earlier stage: it had the same dataset, but divided it otherwise.

    Args:
        trained: the stage's `dataset`, `split_hash` and, if known, `seed`, as `describe_run` gives them; {} if nothing is known.
        name: what the stage is called.
    """
    if trained.get("dataset") == dataset_label(splits.source) and trained.get("split_hash") != splits.split_hash:
        seed = "" if trained.get("seed") is None else f" with seed {trained['seed']}"
        logger.warning(
            "%s was trained%s on another division of %s: images that calibrate or test now may be among its own, and would look more normal than new ones; "
            "give the same --seed and limits, or train it anew",
            name,
            seed,
            dataset_label(splits.source),
        )


def settings_of(config) -> dict:
    """What a configuration says of how its model is trained, for `describe_run`."""
    hidden = {*config.recorded_fields, *_NOT_OF_TRAINING}
    return {name: value for name, value in config.to_dict().items() if name not in hidden}


def saved_settings(config) -> dict:
    """`settings_of` a saved detector, without what is written there when it is loaded and saved again, as by `hf-anomaly calibrate`: its backbone's dtype."""
    settings = settings_of(config)
    parts = {name: {**settings[name], "dtype": None} for name in config.sub_configs if settings.get(name)}
    return settings | parts


def optimization_of(args) -> dict:
    """What the optimizer is told, for `describe_run` and the results."""
    return {name: getattr(args, name) for name in _OPTIMIZATION}


def check_same_run(theirs: dict | None, ours: dict | None, where: str | os.PathLike) -> None:
    """Refuses to continue work that was begun with other data or settings.

    Args:
        theirs, ours: what describes each run, JSON values; nothing is compared where either is None.

    Raises:
        InputError: they differ; names the first field that does.
    """
    if theirs is not None and ours is not None and (different := first_difference(theirs, ours)) is not None:
        name, was, now = different
        raise InputError(
            f"{where} belongs to another run ({name} was {was!r}, now {now!r}): resume with the same arguments, or take another --output_dir"
        )


def first_difference(first: dict, second: dict) -> tuple[str, Any, Any] | None:
    """The first field in which two runs differ as JSON, with both values; "a.b" is `b` in `a`. By name, but the method first and what follows from others
    last. None if they do not differ."""
    first, second = (flat(json.loads(json.dumps(run))) for run in (first, second))
    pairs = ((name, first.get(name), second.get(name)) for name in sorted(first.keys() | second.keys(), key=_as_causes))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _as_causes(name: str) -> tuple[int, str]:
    """Sorts the method first, of which the other fields are, and last what follows from fields that tell a person more, such as the seed."""
    own = name.rsplit(".", 1)[-1]
    return (name != "model_type") + (own in ("fingerprint", "images", "split_hash", "data_seed")), name


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    flattened = {}
    for name, value in values.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flattened
