"""Whole runs, from a dataset's name to a saved folder. The scripts are thin around these functions."""

import copy
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import AutoConfig, set_seed

from ..calibration import drift_check
from ..cards import shown_command, write_card, write_figures, write_pretraining_card
from ..data import OneClassSplits, collate, decode_image, load_one_class, prepare, stream_one_class
from ..detector import AnomalyDetector
from ..detectors.addp.configuration_addp import ADDPConfig
from ..detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from ..dissolving import DenoisingModel, DiffusionDissolver, build_scheduler, build_unet, default_resolution, network_resolution
from ..errors import HubError, InputError, NotFittedError
from ..files import replacing
from ..hub import create_repository, hub_errors
from ..image_processing import AnomalyImageProcessor
from ..metrics import balanced_accuracy, bootstrap_intervals, image_metrics
from ..visualization import overlay_anomaly_map
from .arguments import AnomalyTrainingArguments, DataArguments, DenoisingTrainingArguments
from .localization import evaluate_maps
from .trainers import AnomalyTrainer, DenoisingTrainer, hub_name, push_output

logger = logging.getLogger(__name__)

# Fields of a configuration that say nothing of how the detector is trained.
_NOT_SETTINGS = (
    "bank_size",
    "search_chunk_size",
    "num_reference_images",
    "num_calibration_scores",
    "anomaly_map_range",
    "calibrated_for",
    "false_positive_rate",
    "hf_anomaly_version",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "_name_or_path",
)

PRETRAINING_NOTES = "pretraining.json"  # beside the weights of a first stage: how they were trained

INTERVAL_CONFIDENCE = 0.95  # of the intervals in the results

# What a training script prints of the results, as far as it is there.
PRINTED = (
    "auroc", "auroc_interval", "average_precision", "average_precision_interval", "fpr_at_95_tpr", "f1_max", "balanced_accuracy_at_threshold",
    "pixel_auroc", "pixel_average_precision", "aupro", "reason", "num_normal", "num_anomalous", "seconds",
)  # fmt: skip

LARGEST_DEFAULT_SIZE = 64  # px: larger images are shrunk to this unless --image_size says otherwise


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function; what the user can mend is printed as one line, with exit status 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("hf_anomaly").setLevel(logging.INFO)
    try:
        main()
    except (HubError, InputError, NotFittedError, StrictDataclassError, HfHubHTTPError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
        sys.exit(2)


def load_splits(data: DataArguments, seed: int = 0, *, evaluation_only: bool = False) -> OneClassSplits:
    """The splits that the data arguments name; what is drawn at random is drawn with this seed. See `load_one_class` and `stream_one_class`."""
    recipe, normal_label, classes = data.recipe, data.normal_label, None
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
    return load_one_class(data.dataset_name, protocol=data.protocol, contamination=data.contamination, **common)


def processor_for(splits: OneClassSplits, data: DataArguments) -> AnomalyImageProcessor:
    """A processor for the size and channels that the data arguments give; by default the images' own, of at most 64 pixels."""
    if data.image_size is not None and data.image_size < 4:
        raise InputError(f"--image_size must be at least 4 pixels, got {data.image_size}")
    image_size = min(splits.native_size, LARGEST_DEFAULT_SIZE) if data.image_size is None else data.image_size
    return AnomalyImageProcessor.for_images(image_size, data.num_channels or splits.num_channels, data.reading.window)


def default_output_dir(args, name: str) -> None:
    """Fills in `--output_dir` where none was given: runs/<name>."""
    if args.output_dir is None or args.output_dir == "trainer_output":
        args.output_dir = os.path.join("runs", name)


def num_images(dataset) -> int | None:
    """How many rows; None of a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def fit_batch_size(args, num_images: int | None) -> None:
    """Lowers the training batch to the number of images where there are fewer: a folder of 20 normals trains too.

    Args:
        num_images: None of a stream.

    Raises:
        InputError: a stream, but no number of steps.
    """
    if num_images is None:
        if args.max_steps <= 0:
            raise InputError("a stream has no length to count --num_train_epochs by: give --max_steps")
        return
    largest = max(1, num_images // max(1, args.world_size))
    if args.dataloader_drop_last and args.per_device_train_batch_size > largest:
        logger.warning(
            "There are %d training images: the batch is lowered from %d to %d", num_images, args.per_device_train_batch_size, largest
        )
        args.per_device_train_batch_size = largest


def write_json(path: Path, content: dict) -> None:
    """Writes strict JSON (no NaN), whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_scores(path: Path, scores: np.ndarray, labels: np.ndarray) -> None:
    """Writes scores (N,) and labels (N,) as `.npz`, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, scores=np.asarray(scores, dtype=np.float32), labels=np.asarray(labels, dtype=np.uint8))


def check_push(args) -> None:
    """Makes the repository that `--push_to_hub` asks for: where that is not allowed, better now than after the training."""
    if args.push_to_hub and args.process_index == 0:
        create_repository(hub_name(args), private=args.hub_private_repo, token=args.hub_token)


def push_result(args, folder: str | os.PathLike | None = None) -> None:
    """Pushes `folder`, by default `args.output_dir`, where `--push_to_hub` asks for it; to `--hub_model_id`, or to a repository named like the run's folder."""
    if args.push_to_hub and args.process_index == 0:
        logger.info("Pushed: %s", push_output(args, folder))


def load_detector(name_or_path: str, revision: str | None = None) -> tuple[AnomalyDetector, AnomalyImageProcessor]:
    """A saved detector in eval mode, and its processor.

    Raises:
        InputError: there is none, or it is something else.
        HubError: the Hub refused or cannot be reached; one line, with the remedy.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        with hub_errors(name_or_path, reading=True):
            model = AutoModel.from_pretrained(name_or_path, revision=revision)
            processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision)
    except (HubError, InputError):
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{name_or_path!r} cannot be loaded as a detector: {' '.join(str(error).split())}") from error
    if not isinstance(model, AnomalyDetector):
        raise InputError(f"{name_or_path!r} holds a {type(model).__name__}, which is no anomaly detector")
    return model.eval(), processor


def train_dissolver(
    train_dataset,
    *,
    processor: AnomalyImageProcessor,
    args: DenoisingTrainingArguments,
    resolution: int | None = None,
    block_out_channels: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 1,
    max_timestep: int | None = None,
    t_min: int = 30,
    t_max: int = 130,
    resume_from_checkpoint: str | bool | None = None,
    target: str | os.PathLike | None = None,
    run: dict | None = None,
) -> DiffusionDissolver:
    """Trains a DDPM on normal images and saves its averaged weights as a `DDPMPipeline` folder, with a card unless it is a detector's part.

    Args:
        train_dataset: normal images, unprepared.
        resolution: the dissolving resolution in pixels; smaller images are padded to the next power of two. Default: `default_resolution`.
        block_out_channels, layers_per_block: as in `build_unet`.
        max_timestep: noise levels t < max_timestep are trained; None: up to twice `t_max`, since dissolving uses no others. The paper takes all 1000.
        t_min, t_max: the range that the dissolver will draw from by default.
        target: where it is saved; default `args.output_dir`.
        run: what describes the run, see `describe_run`.
    """
    image_size = processor.size["height"]
    resolution = network_resolution(image_size, default_resolution(image_size) if resolution is None else resolution)
    set_seed(args.seed)
    unet, scheduler = build_unet(resolution, processor.num_channels, block_out_channels, layers_per_block), build_scheduler()
    DiffusionDissolver(unet, scheduler, t_min, t_max)  # refuses a bad range now, not after the training
    max_timestep = min(2 * t_max, scheduler.config.num_train_timesteps) if max_timestep is None else max_timestep
    if t_max >= max_timestep:
        raise InputError(f"t_max {t_max} is beyond the noise levels that would be trained: max_timestep must be larger, got {max_timestep}")
    model = DenoisingModel(unet, scheduler, max_timestep=max_timestep)
    logger.info("Training the dissolver at %d px", resolution)
    trainer, notes = _train_denoiser(
        model, train_dataset, processor=processor, args=args, resume_from_checkpoint=resume_from_checkpoint, run=run
    )
    dissolver = DiffusionDissolver(unet.eval().requires_grad_(False), scheduler, t_min, t_max)
    if trainer.is_world_process_zero():
        dissolver.training_notes = {**notes, "max_timestep": max_timestep}
        dissolver.save_pretrained(target or args.output_dir)
        if target is None:  # a folder of its own, not a detector's part
            dissolver.write_card(args.output_dir, hub_name(args) if args.push_to_hub else None)
        push_result(args)
    trainer.accelerator.wait_for_everyone()
    return dissolver


def pretrain(
    model: ADDPForPreTraining,
    train_dataset,
    *,
    processor: AnomalyImageProcessor,
    args: DenoisingTrainingArguments,
    resume_from_checkpoint: str | bool | None = None,
    target: str | os.PathLike | None = None,
    run: dict | None = None,
    dataset: str | None = None,
    repo_id: str | None = None,
) -> ADDPModel:
    """Runs ADDP's first stage and gives the detector that the second begins with: the averaged weights of denoising, unfitted.

    Args:
        model: a new one, or a pretrained one to go on with.
        train_dataset: unprepared images; their labels are ignored.
        args: its `output_dir` takes checkpoints only.
        target: the folder to save model, processor and notes in; None: nothing is saved.
        run: what describes the run, see `describe_run`.
        dataset, repo_id: for the card, the name of the images' source and where the folder will be pushed.
    """
    trainer, notes = _train_denoiser(
        model, train_dataset, processor=processor, args=args, resume_from_checkpoint=resume_from_checkpoint, run=run
    )
    if target is not None and trainer.is_world_process_zero():
        target = Path(target)
        staging = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        write_json(staging / PRETRAINING_NOTES, notes)
        write_pretraining_card(staging, model, notes, dataset=dataset, repo_id=repo_id or target.name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    trainer.accelerator.wait_for_everyone()
    return ADDPModel.from_pretraining(model)


def load_pretraining(name_or_path: str | os.PathLike, *, image_size: int, num_channels: int, **changes) -> ADDPForPreTraining:
    """What `pretrain` saved, for images of another size too.

    Args:
        name_or_path: a folder or Hub id; that of an ADDP detector serves as well.
        changes: further fields of the configuration that shall differ, none that changes the weights' shapes.

    Raises:
        InputError: there is none, it is something else, or it takes images of other channels.
        HubError: as `load_detector`.
    """
    try:
        with hub_errors(str(name_or_path), reading=True):
            config = AutoConfig.from_pretrained(name_or_path)
        if not isinstance(config, ADDPConfig):
            raise InputError(f"{str(name_or_path)!r} holds a {type(config).__name__}: only ADDP's own weights can be gone on with")
        if config.num_channels != num_channels:
            raise InputError(
                f"{str(name_or_path)!r} was pretrained on images of {config.num_channels} channels, these have {num_channels}: "
                f"--num_channels {config.num_channels} converts them"
            )
        config = ADDPConfig.from_dict({**config.to_dict(), "image_size": image_size, **changes})
        return ADDPForPreTraining.from_pretrained(name_or_path, config=config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, HubError | InputError):
            raise
        raise InputError(f"{str(name_or_path)!r} cannot be loaded as pretrained weights: {' '.join(str(error).split())}") from error


def _train_denoiser(model, train_dataset, *, processor, args, resume_from_checkpoint, run) -> tuple[DenoisingTrainer, dict]:
    """Trains, and tells how in JSON values. Afterwards the model holds the averaged weights."""
    fit_batch_size(args, num_images(train_dataset))
    trainer = DenoisingTrainer(model, args, train_dataset=prepare(train_dataset, processor), run=run)
    logger.info("Training to denoise on %s images", num_images(train_dataset) or "streamed")
    trainer.train(resume_from_checkpoint)
    return trainer, {
        "steps": trainer.state.global_step,
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "ema_decay": args.ema_decay,
        "num_images": num_images(train_dataset),
        "seed": args.seed,
        "run": run,
    }


def describe_run(splits: OneClassSplits, seed: int, **settings) -> dict:
    """What makes a run this run: its data, seed and settings. A checkpoint of another is not resumed."""
    data = {"dataset": dataset_label(splits.source), "normal_label": splits.normal_label, "split_hash": splits.split_hash}
    return {**data, "seed": seed, **settings}


def settings_of(config) -> dict:
    """What a configuration says of how its model is trained, for `describe_run`."""
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_SETTINGS}


def dataset_label(source: str) -> str:
    """A dataset's name for others to read: of a local path only the last part."""
    return Path(source).resolve().name if Path(source).exists() else source


def hub_dataset(source: str) -> str | None:
    """A source's id on the Hub, if that is where it came from."""
    return None if source == "digits" or Path(source).exists() else source


@torch.no_grad()
def bfloat16_agreement(model: AnomalyDetector, dataset, batch_size: int, num_images: int = 256) -> dict:
    """How well a fitted detector cast to bfloat16 ranks images as it does in float32.

    Args:
        dataset: prepared images; `num_images` evenly spaced ones are taken, of a stream the first ones.

    Returns:
        `bfloat16_rank_correlation`, Spearman's, None where all scores are equal, and `bfloat16_num_images`.
    """
    from scipy.stats import spearmanr

    if hasattr(dataset, "__len__"):
        images = dataset.select(np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), num_images)).round().astype(int)))
    else:
        images = list(islice(dataset, num_images))
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collate)
    scores = [detector.eval().score(loader, progress=False)[0] for detector in (model, copy.deepcopy(model).to(torch.bfloat16))]
    varied = all(values.min() < values.max() for values in scores)
    return {
        "bfloat16_rank_correlation": float(spearmanr(*scores).statistic) if varied else None,
        "bfloat16_num_images": len(images),
    }


def evaluate_detector(model: AnomalyDetector, processor, splits: OneClassSplits, score: Callable, *, batch_size: int) -> dict:
    """Results of a fitted detector, as `eval_results.json` holds them.

    Args:
        score: prepared dataset → (scores, labels).
        batch_size: images whose maps are computed at once, where there are masks.

    Returns:
        `auroc`, `average_precision`, `fpr_at_95_tpr` and `f1_max` (None with `reason` where there is nothing to measure on); `auroc_interval` and
        `average_precision_interval`, [low, high] with `interval_confidence` (see `bootstrap_intervals`); `num_normal`, `num_anomalous`; `division` (see
        `Division`); for a calibrated detector the rates and the balanced accuracy at its threshold, and `drift_p_value`, of the normal images' scores
        against those of calibration (see `drift_check`); and, where the test split has a column `mask` and the detector gives maps, what `evaluate_maps` finds.
    """
    results = dict.fromkeys(("auroc", "average_precision", "fpr_at_95_tpr", "f1_max"))
    results |= {
        "num_normal": 0,
        "num_anomalous": 0,
        "split_hash": splits.split_hash,
        "dataset": dataset_label(splits.source),
        "normal_label": splits.normal_label,
        "division": splits.division.to_dict(),
    }
    if splits.test is None:
        return results | {"reason": splits.test_missing_reason}
    scores, labels = score(prepare(splits.test, processor))
    results |= {"num_normal": int((labels == 0).sum()), "num_anomalous": int((labels == 1).sum())}
    if splits.test_missing_reason:
        results["reason"] = splits.test_missing_reason
    elif len(labels.unique()) < 2:  # of a stream it is not known before
        results["reason"] = f"all {len(labels)} images of the evaluation split are {'anomalies' if len(labels) and labels[0] else 'normal'}"
    else:
        results |= image_metrics(scores.numpy(), labels.numpy())
        intervals = bootstrap_intervals(scores.numpy(), labels.numpy(), confidence=INTERVAL_CONFIDENCE)
        results |= {f"{name}_interval": list(interval) for name, interval in intervals.items()}
        results["interval_confidence"] = INTERVAL_CONFIDENCE
    if model.calibration.is_calibrated:
        flagged = model.is_anomalous(scores.to(model.device)).cpu()
        for name, label in (("false_positive_rate", 0), ("true_positive_rate", 1)):
            rate = flagged[labels == label].float().mean().item()
            results[f"{name}_at_threshold"] = rate if (labels == label).any() else None
        threshold = model.calibration.threshold.item()
        results["balanced_accuracy_at_threshold"] = balanced_accuracy(scores.numpy(), labels.numpy(), threshold)
        if (labels == 0).any():
            results["drift_p_value"] = _check_drift(model, scores[labels == 0], results["false_positive_rate_at_threshold"])
    if "mask" in (splits.test.column_names or ()):  # a stream's may be unknown
        if model.supports_anomaly_maps:
            results |= evaluate_maps(model, processor, splits.test, batch_size)
        else:
            logger.info("No pixel-level metrics, though there are masks: %s", model.unsupported_maps_reason)
    return results


def _check_drift(model: AnomalyDetector, scores: torch.Tensor, flagged: float) -> float:
    """Warns if normal images with these scores are not like those that calibrated the detector."""
    drift = drift_check(scores, model.calibration.scores)
    if drift.p_value < 0.01:
        logger.warning(
            "These normal images score %s than those that calibrated the detector (Kolmogorov-Smirnov, p = %.2g), and %.1f %% of them are flagged "
            "where %.3g %% were asked for: calibrate with images like these",
            "higher" if drift.p_higher < drift.p_lower else "lower",
            drift.p_value,
            100 * flagged,
            100 * model.config.false_positive_rate,
        )
    return drift.p_value


def train_detector(
    model: AnomalyDetector,
    processor: AnomalyImageProcessor,
    splits: OneClassSplits,
    args: AnomalyTrainingArguments,
    *,
    train_dataset=None,
    started: float,
    command: list[str] | None = None,
    scores_file: Path | None = None,
) -> dict:
    """Trains, fits, calibrates, evaluates and saves a detector with its processor, card and results in `args.output_dir`.

    Args:
        model: a new detector.
        train_dataset: the training images if they have more columns than `splits.train`, such as dissolved ones.
        started: `time.time()` at the start of the run.
        command: the command line, for the card.
        scores_file: where the scores and labels of the test images go, see `write_scores`; None: nowhere.

    Returns:
        What `eval_results.json` holds.
    """
    if args.card_figures and num_images(splits.train) is None:
        raise InputError("--card_figures picks images out of the evaluation split, which --streaming does not keep: leave one of them out")
    fit_batch_size(args, num_images(splits.train))
    if args.load_best_model_at_end or args.save_strategy == "best":
        raise InputError(
            "--load_best_model_at_end and --save_strategy best would choose the checkpoint on the split that the results are reported on"
        )
    if splits.test_missing_reason and args.eval_strategy != "no":
        logger.warning("No evaluation during training: %s", splits.test_missing_reason)
        args.eval_strategy = "no"
    model.config.normal_label = splits.normal_label
    trainer = AnomalyTrainer(
        model,
        args,
        train_dataset=prepare(splits.train if train_dataset is None else train_dataset, processor),
        reference_dataset=prepare(splits.reference, processor),
        calibration_dataset=None if splits.calibration is None else prepare(splits.calibration, processor),
        eval_dataset=None if splits.test_missing_reason else prepare(splits.test, processor),
        processing_class=processor,
        run=describe_run(splits, args.seed, config=settings_of(model.config)),
    )
    trainer.train(args.resume_from_checkpoint)
    trainer.fit_reference()
    if splits.calibration is not None:
        trainer.calibrate()
    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():  # before the evaluation, which a broken test image may end
        for outdated in ("README.md", "eval_results.json"):
            (folder / outdated).unlink(missing_ok=True)
        shutil.rmtree(folder / "figures", ignore_errors=True)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    scored = []

    def score(dataset):
        prediction = trainer.predict(dataset)
        scored[:] = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        return tuple(scored)

    results = evaluate_detector(model, processor, splits, score, batch_size=args.eval_batch_size)
    results |= {
        "seconds": round(time.time() - started, 1),
        "command": shown_command(command or []),
        "dataset_id": args.dataset_id or hub_dataset(splits.source),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "num_processes": args.world_size,
        "num_train": num_images(splits.train),
        "num_calibration": 0 if splits.calibration is None else len(splits.calibration),
    }
    if trainer.is_world_process_zero():
        images = splits.calibration if splits.test is None else splits.test
        if images is not None:
            results |= bfloat16_agreement(model, prepare(images, processor), args.eval_batch_size)
        write_json(folder / "eval_results.json", results)
        if scores_file is not None and scored:
            write_scores(scores_file, *scored)
        if args.card_figures and splits.test_missing_reason is None:
            draw_figures(folder, model, processor, splits.test, *scored)
        repo_id = args.hub_model_id if args.push_to_hub else None
        write_card(folder, model, results, repo_id=repo_id, license=args.license, dataset_id=args.dataset_id)
        push_result(args)
    trainer.accelerator.wait_for_everyone()
    return results


@torch.no_grad()
def draw_figures(folder: str | os.PathLike, model: AnomalyDetector, processor, dataset, scores: torch.Tensor, labels: torch.Tensor) -> None:
    """The card's figures of an evaluation, see `write_figures`; of each class the images with the lowest, the median and the highest score.

    Args:
        dataset: the evaluated images, unprepared, in the order of scores (N,) and labels (N,).
    """
    examples = []
    for label in (0, 1):
        rows = (labels == label).nonzero().flatten()
        ranked = rows[scores[rows].argsort()].tolist()
        for row in dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]]):
            image, overlay = decode_image(dataset[row]["image"], f"row {row}", processor.window), None
            if model.supports_anomaly_maps and model.config.anomaly_map_range is not None:
                pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
                maps = model.eval()(pixel_values, output_anomaly_maps=True).anomaly_maps
                overlay = overlay_anomaly_map(image, maps[0], value_range=model.config.anomaly_map_range)
            examples.append((image, overlay, f"{('normal', 'anomalous')[label]}\nscore {scores[row]:.3g}"))
    threshold = model.calibration.threshold.item() if model.calibration.is_calibrated else None
    write_figures(folder, scores.numpy(), labels.numpy(), threshold=threshold, examples=examples)


def print_results(results: dict, args: AnomalyTrainingArguments) -> None:
    """What a training script prints at its end, once: the results of `train_detector`, and where they are."""
    if args.process_index == 0:
        for name in PRINTED:
            if name in results:
                print(f"{name}: {results[name]}")
        print(f"saved: {args.output_dir}")


def denoising_arguments(
    args: AnomalyTrainingArguments, stage: str, *, learning_rate: float, batch_size: int, steps: int = -1, epochs: float = 0.0
) -> DenoisingTrainingArguments:
    """Arguments for a stage before the detector's own training: the run's device, precision, seed and logging, its own schedule and folder.

    Args:
        stage: its checkpoints go to the folder <stage>-training of the run.
    """
    return DenoisingTrainingArguments(
        output_dir=os.path.join(args.output_dir, f"{stage}-training"),
        max_steps=steps,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_strategy=args.save_strategy,
        disable_tqdm=args.disable_tqdm,
        use_cpu=args.use_cpu,
        bf16=args.bf16,  # accelerate allows one precision a process
        fp16=args.fp16,
        report_to=args.report_to,
        dataloader_num_workers=args.dataloader_num_workers,
    )
