"""Whole runs, from a dataset's name to a saved folder. The scripts are thin around these functions."""

import logging
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import SchedulerType
from transformers.trainer_utils import get_last_checkpoint

from ..cards import shown_command, write_card
from ..cards.merging import has_own_words, is_generated, read_card
from ..data import OneClassSplits, check_pixels, load_one_class, prepare, shrink_images, stream_one_class
from ..data.near_copies import FEWEST
from ..data.overlaps import RESULTS_TOO_GOOD, THRESHOLD_TOO_LOW, warn_of_near_copies
from ..data.sources import hub_dataset
from ..detector import AnomalyDetector
from ..errors import InputError
from ..files import write_json
from ..hub import create_repository
from ..image_processing import AnomalyImageProcessor
from ..ops.distributed import local_main_process_first
from .arguments import AnomalyTrainingArguments, DataArguments
from .evaluation import bfloat16_agreement, draw_figures, evaluate_detector, write_scores
from .run_record import describe_run, optimization_of, settings_of
from .trainers import AnomalyTrainer, find_checkpoint, hub_name, push_output

logger = logging.getLogger(__name__)

_FOLLOWING_RESULTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that look at the evaluation split

# What a training script prints of the results, as far as it is there.
PRINTED = (
    "auroc", "auroc_interval", "average_precision", "average_precision_interval", "fpr_at_95_tpr", "f1_max", "balanced_accuracy_at_threshold",
    "pixel_auroc", "pixel_average_precision", "aupro", "num_normal", "num_anomalous", "seconds",
)  # fmt: skip

# What a run leaves in its folder, found by one file each: checkpoints, finished first stages, and its result, a detector or a dissolver.
_CHECKPOINTS = ("checkpoint-*/run.json", "dissolver-training/checkpoint-*/run.json", "pretrained-training/checkpoint-*/run.json")
_STAGES = ("dissolver/dissolver_config.json", "pretrained/pretraining.json")
_RESULTS = ("config.json", "model_index.json")
_EARLIER_CARD = "README.earlier.md"

LARGEST_DEFAULT_SIZE = 64  # px: larger images are shrunk to this unless --image_size says otherwise


def load_splits(data: DataArguments, seed: int = 0, *, normal_label: str | None = None, evaluation_only: bool = False) -> OneClassSplits:
    """The splits that the data arguments name; what is drawn at random is drawn with this seed. See `load_one_class` and `stream_one_class`.

    Args:
        normal_label: in place of that of the data arguments.
    """
    recipe, normal_label, classes = data.recipe, normal_label or data.normal_label, None
    if recipe is not None:
        normal_label = normal_label or recipe.normal_class()
        classes = recipe.classes_beside(normal_label)
    common = {
        "normal_label": normal_label,
        "classes": classes,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "calibration_fraction": data.calibration_fraction,
        "eval_split": data.eval_split,
        "max_train_images": data.max_train_images,
        "seed": seed,
        "evaluation_only": evaluation_only,
        "config_name": data.dataset_config_name,
        "revision": data.dataset_revision,
        "reading": data.reading,
        "recipe": data.dataset,
    }
    if data.streaming:
        return stream_one_class(data.dataset_name, head=data.stream_head, shuffle_buffer=data.shuffle_buffer, **common)
    return load_one_class(
        data.dataset_name, protocol=data.protocol, contamination=data.contamination, group_column=data.group_column, **common
    )


def processor_for(splits: OneClassSplits, data: DataArguments) -> AnomalyImageProcessor:
    """A processor for the size and channels that the data arguments give; by default the images' own, of at most 64 pixels, or so many a tile."""
    if data.image_size is not None and data.image_size < 4:
        raise InputError(f"--image_size must be at least 4 pixels, got {data.image_size}")
    if data.tiles < 1:
        raise InputError(f"--tiles must be at least 1, got {data.tiles}")
    if data.num_channels not in (None, 1, 3):
        raise InputError(f"--num_channels must be 1 (gray) or 3 (RGB), got {data.num_channels}")
    image_size = data.image_size or min(splits.native_size // data.tiles, LARGEST_DEFAULT_SIZE) * data.tiles
    if data.tiles > 1 and (image_size % data.tiles or image_size < 4 * data.tiles):
        raise InputError(
            f"--tiles {data.tiles}: images of {data.image_size or splits.native_size} pixels cannot be cut into so many whole squares of at least 4 pixels "
            "along a side: take fewer, or an --image_size that is a multiple of them"
        )
    slicing = {"slice_axis": data.slice_axis, "central_slices": data.central_slices}
    return AnomalyImageProcessor.for_images(image_size, data.num_channels or splits.num_channels, data.reading.window, **slicing)


def shrink_training_images(splits: OneClassSplits, processor: AnomalyImageProcessor) -> OneClassSplits:
    """The splits with training images of the processor's size, cached, where one is larger: every epoch would decode and resize it again.

    A stream stays as it is. The first process of a machine shrinks, the others wait for it.
    """
    if num_images(splits.train) is None or splits.largest_size <= processor.size["height"]:
        return splits
    with local_main_process_first():
        train = shrink_images(splits.train, processor)
    return replace(splits, train=train, reference=train)


def load_training_images(data: DataArguments, seed: int) -> tuple[OneClassSplits, AnomalyImageProcessor]:
    """What a training command begins with: the splits that the data arguments name, and a processor for them.

    What comes after the training is decoded now, so that a damaged image does not end the run then, and compared with the training images, which should
    have no near copies there; streams are not, nor are fewer than `FEWEST`.
    """
    splits = load_splits(data, seed)
    processor = processor_for(splits, data)
    thumbnails = {}
    if PartialState().is_local_main_process:
        held_out = (
            (name, split) for name, split in (("calibration", splits.calibration), (data.eval_split, splits.test)) if num_images(split)
        )
        thumbnails = {name: check_pixels(split, name, processor.window) for name, split in held_out}
    shrunk = shrink_training_images(splits, processor)
    if thumbnails and (num_images(splits.train) or 0) >= FEWEST:
        among = check_pixels(shrunk.train, "train", processor.window)
        shrunk = replace(shrunk, num_near_copies=_look_for_near_copies(splits, among, thumbnails, data.eval_split))
    return shrunk, processor


def _look_for_near_copies(splits: OneClassSplits, among: np.ndarray, thumbnails: dict[str, np.ndarray], eval_split: str) -> int | None:
    """Warns of calibration and of normal test images with near copies among the training images, and counts the latter; None if there are no test images.

    Args:
        among: thumbnails of the training images.
        thumbnails: those of the splits that were looked at.
    """
    if "calibration" in thumbnails:
        warn_of_near_copies(splits.train, among, splits.calibration, thumbnails["calibration"], "calibration", THRESHOLD_TOO_LOW)
    if eval_split not in thumbnails:
        return None
    normal = np.flatnonzero(np.asarray(splits.test["label"][:]) == 0)
    return warn_of_near_copies(
        splits.train, among, splits.test.select(normal), thumbnails[eval_split][normal], eval_split, RESULTS_TOO_GOOD
    )


def choose_output_dir(args, method: str, dataset_name: str) -> None:
    """Fills in `--output_dir` where none was given: runs/<method>-<name of the images>. Tries whether it can be written to, before anything long runs.

    Raises:
        OSError: it cannot.
    """
    if args.output_dir in (None, "trainer_output"):
        images = Path(os.path.abspath(os.path.expanduser(dataset_name))).stem  # "." has no name of its own
        args.output_dir = os.path.join("runs", f"{method}-{images}")
    if args.process_index == 0 and os.path.isdir(args.output_dir):
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass


def replace_earlier_run(args, used: str | os.PathLike | None = None) -> None:
    """Before a training begins: warns that it replaces what an earlier run, perhaps on other images, left in its folder, and removes that run's
    checkpoints and first stages. A dissolver that was trained by itself, which has a card, stays.

    Args:
        used: the folder or Hub id of an earlier stage that the training begins with; it stays.
    """
    if not args.should_save or args.resume_from_checkpoint:
        return
    folder = Path(args.output_dir)
    checkpoints, stages, results = (
        [path for pattern in patterns for path in folder.glob(pattern)] for patterns in (_CHECKPOINTS, _STAGES, _RESULTS)
    )
    if _earlier_card(folder):
        results.append(folder / "README.md")
    if checkpoints or stages or results:
        hint, last = "", max(checkpoints, key=os.path.getmtime, default=None)
        if last is not None and all(os.path.getmtime(result) < os.path.getmtime(last) for result in results):
            unfinished = last.parent.relative_to(folder)
            hint = f". It had not ended: its command with --resume_from_checkpoint true would have gone on from {unfinished}"
        logger.warning("What an earlier run left in %s will be replaced; to keep both, give another --output_dir%s", folder, hint)
    # A resumed run would take these for its own.
    for part in sorted({folder / path.relative_to(folder).parts[0] for path in (*checkpoints, *stages)}):
        kept = used is not None and Path(used).resolve().is_relative_to(part.resolve())
        if not kept and not (part.name == "dissolver" and (part / "README.md").is_file()):
            shutil.rmtree(part, ignore_errors=True)


def _earlier_card(folder: Path) -> str | None:
    """The card that a run left in the folder; None if there is none, or a README of a person's own.

    Raises:
        InputError: the README is not UTF-8.
    """
    path = folder / "README.md"
    text = read_card(path) if path.is_file() else ""
    return text if is_generated(text) else None


def _set_card_aside(folder: Path) -> None:
    """Removes the card that a run left in the folder. One in which a person wrote is renamed, as what it says need not hold for another run."""
    text = _earlier_card(folder)
    if text is None:
        return
    if has_own_words(text):
        os.replace(folder / "README.md", folder / _EARLIER_CARD)
        logger.warning("Somebody wrote in the card of the earlier run: it is %s now", folder / _EARLIER_CARD)
    else:
        (folder / "README.md").unlink()


def num_images(dataset) -> int | None:
    """How many rows; None of a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def lower_batch_size(args, num_images: int | None) -> None:
    """Lowers the training batch to the number of images where there are fewer: a folder of 20 normals trains too.

    Args:
        num_images: None of a stream.

    Raises:
        InputError: a stream, but no number of steps.
    """
    if num_images is None:
        if args.max_steps <= 0:
            raise InputError("a stream has no length to count --num_train_epochs by: give --max_steps, at least 1")
        return
    largest = max(1, num_images // max(1, args.world_size))
    if args.dataloader_drop_last and args.per_device_train_batch_size > largest:
        logger.warning(
            "There are %d training images: the batch is lowered from %d to %d", num_images, args.per_device_train_batch_size, largest
        )
        args.per_device_train_batch_size = largest


def check_first(args) -> None:
    """Refuses now what would otherwise end the run hours later, and makes the repository of `--push_to_hub`."""
    find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    _refuse_choices(args)
    if args.push_to_hub and args.process_index == 0:
        create_repository(hub_name(args), private=args.hub_private_repo, token=args.hub_token)


def _refuse_choices(args) -> None:
    """Refuses arguments that would choose a detector by the images that its results are reported on."""
    refused = None
    if args.load_best_model_at_end or args.save_strategy == "best":
        refused = "--load_best_model_at_end and --save_strategy best would choose the checkpoint"
    elif args.lr_scheduler_type in _FOLLOWING_RESULTS:
        refused = f"--lr_scheduler_type {args.lr_scheduler_type.value} would choose the learning rates"
    if refused is not None:
        raise InputError(f"{refused} on the split that the results are reported on")


def push_result(args, folder: str | os.PathLike | None = None) -> None:
    """Pushes `folder`, by default `args.output_dir`, where `--push_to_hub` asks for it; to `--hub_model_id`, or to a repository named like the run's folder."""
    if args.push_to_hub and args.process_index == 0:
        logger.info("Pushed: %s", push_output(args, folder))


def train_detector(
    model: AnomalyDetector,
    processor: AnomalyImageProcessor,
    splits: OneClassSplits,
    args: AnomalyTrainingArguments,
    *,
    train_dataset=None,
    dissolving: dict | None = None,
    started: float | None = None,
    command: list[str] | None = None,
    scores_file: Path | None = None,
) -> dict:
    """Trains, fits, calibrates, evaluates and saves a detector with its processor, card and results in `args.output_dir`.

    Args:
        model: a new detector; it holds the result.
        splits: of `load_one_class` or `stream_one_class`.
        train_dataset: the training images if they have more columns than `splits.train`, such as dissolved ones.
        dissolving: what these columns depend on, for `describe_run`. Default: the columns themselves, or the model's dissolver.
        started: `time.time()` at the start of the run, for `seconds` in the results; None: now.
        command: the command line, for the card.
        scores_file: where the scores and labels of the test images go, see `write_scores`; None: nowhere.

    Returns:
        What `eval_results.json` holds.

    Raises:
        InputError: arguments that would choose by the images that are evaluated, or what `AnomalyTrainer` refuses.
    """
    started = time.time() if started is None else started
    _check_task(splits, args)
    trainer = _make_trainer(model, processor, splits, args, train_dataset, dissolving)
    try:
        trainer.train(args.resume_from_checkpoint)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(_how_to_go_on(args, started)) from interruption
    trainer.fit_reference()
    if splits.calibration is not None:
        trainer.calibrate()
    if trainer.is_world_process_zero():  # before the evaluation, which a broken test image may end
        _save_unevaluated(model, processor, args)
    results, scored = evaluate_detector(model, processor, splits, trainer.score, batch_size=args.eval_batch_size)
    results |= {
        "seconds": round(time.time() - started, 1),
        "command": shown_command(command or []),
        "dataset_id": args.dataset_id or hub_dataset(splits.source),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "num_processes": args.world_size,
        "optimization": trainer.run["optimization"],
        "num_train": num_images(splits.train),
        "num_calibration": 0 if splits.calibration is None else len(splits.calibration),
    }
    if trainer.is_world_process_zero():
        images = splits.calibration if splits.test is None else splits.test
        if images is not None:
            results |= bfloat16_agreement(model, prepare(images, processor), args.eval_batch_size)
        folder = Path(args.output_dir)
        write_json(folder / "eval_results.json", results)
        if scores_file is not None and scored is not None:
            write_scores(scores_file, *scored)
        if args.card_figures and splits.test_missing_reason is None:
            draw_figures(folder, model, processor, splits.test, *scored)
        repo_id = args.hub_model_id if args.push_to_hub else None
        write_card(folder, model, results, repo_id=repo_id, license=args.license, dataset_id=args.dataset_id)
        push_result(args)
    trainer.accelerator.wait_for_everyone()
    return results


def _check_task(splits: OneClassSplits, args: AnomalyTrainingArguments) -> None:
    """Refuses what cannot be trained or evaluated; fits the batch size and the evaluations during training to the images there are."""
    if not isinstance(args, AnomalyTrainingArguments):
        raise InputError(f"args must be AnomalyTrainingArguments, got {type(args).__name__}")
    if not isinstance(splits, OneClassSplits):
        raise InputError(f"splits must be OneClassSplits, as load_one_class gives them, got {type(splits).__name__}")
    _earlier_card(Path(args.output_dir))  # one that cannot be read would end the run when it is trained
    if splits.train is None:
        raise InputError("the splits hold no images to train on: load them without evaluation_only")
    if args.card_figures and num_images(splits.train) is None:
        raise InputError("--card_figures picks images out of the evaluation split, which --streaming does not keep: leave one of them out")
    if args.card_figures and splits.test_missing_reason:
        logger.warning("--card_figures: there will be none, which show labelled test images: %s", splits.test_missing_reason)
    lower_batch_size(args, num_images(splits.train))
    _refuse_choices(args)
    if splits.test_missing_reason and args.eval_strategy != "no":
        logger.warning("No evaluation during training: %s", splits.test_missing_reason)
        args.eval_strategy = "no"


def _make_trainer(model, processor, splits: OneClassSplits, args, train_dataset, dissolving: dict | None) -> AnomalyTrainer:
    """Args: as in `train_detector`."""
    model.config.normal_label = splits.normal_label
    if dissolving is None:
        dissolving = _what_dissolves(model, train_dataset)
    settings = {"config": settings_of(model.config), "optimization": optimization_of(args)}
    if dissolving is not None:
        settings["dissolving"] = dissolving
    return AnomalyTrainer(
        model,
        args,
        train_dataset=prepare(splits.train if train_dataset is None else train_dataset, processor),
        reference_dataset=prepare(splits.reference, processor),
        calibration_dataset=None if splits.calibration is None else prepare(splits.calibration, processor),
        eval_dataset=None if splits.test_missing_reason else prepare(splits.test, processor),
        processing_class=processor,
        run=describe_run(splits, processor, args.seed, **settings),
    )


def _save_unevaluated(model, processor, args) -> None:
    """Saves a trained detector with its processor. An earlier one's results, card and figures go, but a resumed run keeps what a person wrote in its card."""
    folder = Path(args.output_dir)
    if not args.resume_from_checkpoint:
        _set_card_aside(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _what_dissolves(model: AnomalyDetector, train_dataset) -> dict | None:
    """What `describe_run` says of the dissolved images if the caller does not say it: of the cached column, else of the dissolver; None without either."""
    if train_dataset is not None and "dissolved_images" in (train_dataset.column_names or ()):
        return {"dataset": train_dataset._fingerprint}
    fingerprint = getattr(getattr(model, "dissolver", None), "fingerprint", None)
    return None if fingerprint is None else {"fingerprint": fingerprint()}


def _how_to_go_on(args: AnomalyTrainingArguments, started: float) -> str:
    checkpoint = get_last_checkpoint(args.output_dir)
    if checkpoint is None or not (args.resume_from_checkpoint or os.path.getmtime(checkpoint) >= started):  # else it is an earlier run's
        return "there is no checkpoint yet"
    return f"the same command with --resume_from_checkpoint true goes on from {Path(checkpoint).name}"


def print_results(results: dict, model: AnomalyDetector, args: AnomalyTrainingArguments) -> None:
    """What a training script prints at its end, on one process: the results of `train_detector`, the threshold, and where the detector is saved."""
    if args.process_index != 0:
        return
    if "reason" in results:
        print(f"no AUROC, which takes labelled test images: {results['reason']}")
    tested = results["num_normal"] + results["num_anomalous"] > 0
    for name in PRINTED:
        if results.get(name) is not None and (tested or not name.startswith("num_")):
            print(f"{name}: {results[name]}")
    if model.calibration.is_calibrated:
        print(threshold_line(model))
    print(f"saved: {args.output_dir}")


def threshold_line(model: AnomalyDetector) -> str:
    """The threshold of a calibrated detector, and where it comes from, in words."""
    threshold, config = model.calibration.threshold.item(), model.config
    held_out = f"{config.num_calibration_scores} held-out normal images"
    return f"threshold: {threshold:.6g}, for a false-positive rate of {config.false_positive_rate:g}, from {held_out}"
