"""Whole runs of the two models that are trained by denoising: DIA's dissolver, and ADDP's first stage."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from transformers import AutoConfig, set_seed

from ..cards import write_pretraining_card
from ..data import prepare
from ..detectors.addp.configuration_addp import ADDPConfig
from ..detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from ..dissolving import (
    DenoisingModel,
    DiffusionDissolver,
    build_scheduler,
    build_unet,
    default_batch_size,
    default_resolution,
    network_resolution,
)
from ..dissolving.diffusion import T_MAX, T_MIN
from ..errors import InputError
from ..files import read_json, write_json
from ..hub import find_file, loading
from ..image_processing import AnomalyImageProcessor
from ..untrusted import load_without_code
from .arguments import AnomalyTrainingArguments, DenoisingTrainingArguments
from .run_record import optimization_of
from .runs import lower_batch_size, num_images, push_result
from .trainers import DenoisingTrainer, hub_name

logger = logging.getLogger(__name__)

# Arguments that a stage before the detector's own training takes from the run.
_OF_THE_RUN = (
    "seed", "full_determinism", "use_cpu",
    "bf16", "fp16",  # accelerate allows one precision a process
    "save_strategy", "save_steps",
    "disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "report_to", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_persistent_workers",  # where processes are not forked, to start some takes seconds an epoch
)  # fmt: skip

PRETRAINING_NOTES = "pretraining.json"  # beside the weights of a first stage: how they were trained


def train_dissolver(
    train_dataset,
    *,
    processor: AnomalyImageProcessor,
    args: DenoisingTrainingArguments,
    resolution: int | None = None,
    block_out_channels: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 1,
    max_timestep: int | None = None,
    tiles: int = 1,
    t_min: int = T_MIN,
    t_max: int = T_MAX,
    resume_from_checkpoint: str | bool | None = None,
    target: str | os.PathLike | None = None,
    run: dict | None = None,
) -> DiffusionDissolver:
    """Trains a DDPM on normal images and saves its averaged weights as a `DDPMPipeline` folder, with a card unless it is a detector's part.

    Args:
        train_dataset: normal images, unprepared.
        args: where its `per_device_train_batch_size` is None, `default_batch_size` fills it in.
        resolution: the dissolving resolution in pixels; smaller images are padded to the next power of two. Default: `default_resolution`.
        block_out_channels, layers_per_block: as in `build_unet`.
        max_timestep: noise levels t < max_timestep are trained; None: up to twice `t_max`, since dissolving uses no others. The paper takes all 1000.
        tiles: of the detector that it is for, which cuts its images: the network learns their parts.
        t_min, t_max: the range that the dissolver will draw from by default.
        target: where it is saved; default `args.output_dir`.
        run: what describes the run, see `describe_run`.
    """
    image_size = processor.size["height"] // tiles
    resolution = network_resolution(image_size, default_resolution(image_size) if resolution is None else resolution)
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = default_batch_size(resolution)
    set_seed(args.seed)
    unet, scheduler = build_unet(resolution, processor.num_channels, block_out_channels, layers_per_block), build_scheduler()
    DiffusionDissolver(unet, scheduler, t_min, t_max)  # refuses a bad range now, not after the training
    max_timestep = min(2 * t_max, scheduler.config.num_train_timesteps) if max_timestep is None else max_timestep
    if t_max >= max_timestep:
        raise InputError(f"t_max {t_max} is beyond the noise levels that would be trained: max_timestep must be larger, got {max_timestep}")
    model = DenoisingModel(unet, scheduler, max_timestep=max_timestep, tiles=tiles)
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
        os.replace(staging, target)  # by one rename, not `staged`: where this folder is, the stage is done
    trainer.accelerator.wait_for_everyone()
    return ADDPModel.from_pretraining(model)


def load_pretraining(name_or_path: str | os.PathLike, *, image_size: int, num_channels: int, **changes) -> ADDPForPreTraining:
    """Loads what `pretrain` saved, also for images of another size.

    Args:
        name_or_path: a folder or Hub id; that of an ADDP detector serves as well.
        changes: new values of further fields of the configuration; none may change the weights' shapes.

    Raises:
        InputError: there is none, it is something else, or it takes images of other channels.
        HubError: as `load_detector`.
    """
    with loading(str(name_or_path), "cannot be loaded as pretrained weights"):
        config = load_without_code(AutoConfig, name_or_path)
        if not isinstance(config, ADDPConfig):
            raise InputError(f"{str(name_or_path)!r} holds a {type(config).__name__}: only ADDP's own weights can be gone on with")
        if config.num_channels != num_channels:
            raise InputError(
                f"{str(name_or_path)!r} was pretrained on images of {config.num_channels} channels, these have {num_channels}: "
                f"--num_channels {config.num_channels} converts them"
            )
        config = ADDPConfig.from_dict({**config.to_dict(), "image_size": image_size, **changes})
        return ADDPForPreTraining.from_pretrained(name_or_path, config=config)


def pretraining_run(name_or_path: str | os.PathLike) -> dict:
    """The dataset, and its division, that trained what `load_pretraining` loads, for `warn_of_other_division`; {} if they are not known."""
    for file in (PRETRAINING_NOTES, "eval_results.json"):
        if (path := find_file(name_or_path, file)) is not None:
            content = read_json(path)
            run = content.get("run") if file == PRETRAINING_NOTES else content
            return run if isinstance(run, dict) else {}
    return {}


def _train_denoiser(model, train_dataset, *, processor, args, resume_from_checkpoint, run) -> tuple[DenoisingTrainer, dict]:
    """Trains a model, which then holds the averaged weights. Returns the trainer, and notes on the training as JSON values."""
    lower_batch_size(args, num_images(train_dataset))
    described = {**(run or {}), "optimization": optimization_of(args)}
    trainer = DenoisingTrainer(model, args, train_dataset=prepare(train_dataset, processor), run=described)
    logger.info("Training to denoise on %s images", num_images(train_dataset) or "streamed")
    trainer.train(resume_from_checkpoint)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):  # what it gives would train a detector all the same
        raise InputError(
            f"training to denoise diverged, the weights are not finite: take a lower learning rate than {args.learning_rate:g}"
        )
    return trainer, {
        "steps": trainer.state.global_step,
        "batch_size": args.images_per_step,
        "learning_rate": args.learning_rate,
        "ema_decay": args.ema_decay,
        "num_images": num_images(train_dataset),
        "seed": args.seed,
        "run": run,
    }


def denoising_arguments(
    args: AnomalyTrainingArguments, stage: str, *, learning_rate: float, batch_size: int | None, steps: int = -1, epochs: float = 0.0
) -> DenoisingTrainingArguments:
    """Arguments for a stage before the detector's own training: the run's device, precision, seed and logging, its own schedule and folder.

    Args:
        stage: its checkpoints go to the folder <stage>-training of the run.
        batch_size: None leaves it to `train_dissolver`.
    """
    return DenoisingTrainingArguments(
        output_dir=os.path.join(args.output_dir, f"{stage}-training"),
        max_steps=steps,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        **{name: getattr(args, name) for name in _OF_THE_RUN},
    )


def remove_checkpoints(args: DenoisingTrainingArguments) -> None:
    """Removes the checkpoints of a stage that is done; what trackers wrote beside them stays."""
    folder = Path(args.output_dir)
    with suppress(OSError):  # another process was first, or the folder holds something else
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        folder.rmdir()
