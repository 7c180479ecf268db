"""Trains ADDP: denoising pretraining, then detector, reference, calibration, evaluation, card."""

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed
from transformers.hf_argparser import HfArg

from ...backbones.pretrained import load_backbone_config
from ...data import OneClassSplits, content_digest, find_copies, load_unlabelled, shrink_images
from ...data.sources import dataset_label
from ...detectors.addp.configuration_addp import ADDPConfig
from ...detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from ...errors import InputError
from ...files import read_json
from ...image_processing import AnomalyImageProcessor
from ...ops.distributed import local_main_process_first
from .. import AnomalyTrainingArguments, DataArguments, parse_arguments
from ..arguments import check_ranges, given_fields
from ..denoising import PRETRAINING_NOTES, denoising_arguments, load_pretraining, pretrain, pretraining_run, remove_checkpoints
from ..run_record import check_same_run, describe_run, settings_of, warn_of_other_division
from ..runs import (
    check_first,
    choose_output_dir,
    load_training_images,
    print_results,
    push_result,
    replace_earlier_run,
    train_detector,
)
from ..trainers import hub_name

logger = logging.getLogger(__name__)

DEFAULT_PRETRAIN_STEPS = 200


@dataclass
class PretrainingArguments:
    """The first stage, denoising; --num_train_epochs and --max_steps are the second's."""

    pretrained: str | None = HfArg(
        default=None, help="Start from a first stage that is done, as a folder or Hub id; --pretrain_steps goes on with it."
    )
    pretrain_steps: int | None = HfArg(default=None, help=f"Its steps; 0: none. Default: {DEFAULT_PRETRAIN_STEPS}, or 0 with --pretrained.")
    pretrain_epochs: float | None = HfArg(default=None, help="Its passes over the images, in place of --pretrain_steps.")
    pretrain_batch_size: int = HfArg(default=32, help="Its images per step and device.")
    pretrain_learning_rate: float = HfArg(default=1e-3, help="Its peak learning rate.")
    pretrain_mode: str = HfArg(default="encoder_decoder", help="What it trains: encoder_decoder, or decoder with the encoder frozen.")
    pretrain_dataset_name: str | None = HfArg(
        default=None,
        help="Images to denoise, of any class, as --dataset_name; those that calibrate or test are left out. Default: the normal training images.",
    )
    pretrain_only: bool = HfArg(default=False, help="End after the first stage.")
    noise: str | None = HfArg(default=None, help="Its noise: gaussian, coarse or simplex.")
    noise_level: float | None = HfArg(default=None, help="Standard deviation of the noise, pixels being in [-1, 1].")
    noise_resolution: int | None = HfArg(default=None, help="Blobs of coarse or simplex noise along the image's side.")

    def __post_init__(self):
        if self.pretrain_steps is not None and self.pretrain_epochs is not None:
            raise InputError("--pretrain_steps and --pretrain_epochs both say how long pretraining takes: give one of them")
        least = {"pretrain_steps": 0, "pretrain_epochs": 0, "pretrain_batch_size": 1, "pretrain_learning_rate": 0}
        check_ranges(self, {name: (value, math.inf) for name, value in least.items()})
        if self.pretrain_steps is None and self.pretrain_epochs is None:
            self.pretrain_steps = DEFAULT_PRETRAIN_STEPS if self.pretrained is None else 0

    @property
    def duration(self) -> dict:
        return {"epochs": self.pretrain_epochs} if self.pretrain_epochs is not None else {"steps": self.pretrain_steps}


@dataclass
class ArchitectureArguments:
    """What the weights' shapes depend on; the configuration's docstring has details and defaults. With --pretrained these are given."""

    encoder: str | None = HfArg(default=None, help="unet, segnet, or a pretrained backbone as a Hub id or folder. Default: unet.")
    hidden_sizes: list[int] | None = HfArg(default=None, help="Channels at full, half, a quarter … of the resolution.")
    latent_size: int | None = HfArg(default=None, help="Channels of the bottleneck.")
    skip_connections: bool = HfArg(default=False, help="U-Net's skip connections, which let anomalies through.")
    attention_gates: bool = HfArg(default=False, help="Attention gates on the skip connections.")
    norm: str | None = HfArg(default=None, help="Normalisation: batch or group.")


@dataclass
class DetectorArguments:
    """The second stage."""

    freeze_encoder: bool = HfArg(default=False, help="Train the decoder alone.")
    map_filter_size: int = HfArg(default=1, help="Side of the median filter on anomaly maps; 1: none.")


def make_model(pretraining_args, architecture_args, detector_args, processor: AnomalyImageProcessor, tiles: int) -> ADDPForPreTraining:
    """The network before the first stage: new, or from --pretrained."""
    settings = {name: value for name, value in given_fields(pretraining_args).items() if name.startswith("noise")}
    settings |= {
        **processor.image_shape,
        "tiles": tiles,
        "pretraining_mode": pretraining_args.pretrain_mode,
        **asdict(detector_args),
    }
    architecture = given_fields(architecture_args)
    if pretraining_args.pretrained is not None:
        if architecture:
            raise InputError(f"--{next(iter(architecture))} comes with the weights of --pretrained: leave it out")
        return load_pretraining(pretraining_args.pretrained, **settings)
    backbone = architecture.get("encoder", "unet")
    backbone = None if backbone in ("unet", "segnet") else backbone
    if backbone is not None:
        architecture |= {"encoder": "backbone", "backbone_config": load_backbone_config(backbone)}
    model = ADDPForPreTraining(ADDPConfig(**settings, **architecture))
    if backbone is not None:
        model.load_backbone(backbone)
    elif model.encoder_is_frozen:
        logger.warning("--pretrain_mode decoder freezes an encoder of random weights: give --pretrained, or a backbone as --encoder")
    return model


def without_held_out(images, splits: OneClassSplits):
    """A `datasets.Dataset` without copies, byte for byte, of images that calibrate or test the detector. A streamed test split is not looked at.

    Raises:
        InputError: all are such copies.
    """
    held_out = {row for split in (splits.calibration, splits.test) if hasattr(split, "select") for row in find_copies(split, images)[0]}
    if not held_out:
        return images
    if len(held_out) == len(images):
        raise InputError("all images of --pretrain_dataset_name are among those that calibrate or test the detector: name others")
    logger.info("%d of %d images to denoise calibrate or test the detector and are left out", len(held_out), len(images))
    return images.select([row for row in range(len(images)) if row not in held_out])


def first_stage(model: ADDPForPreTraining, args: PretrainingArguments, data_args, training_args, splits, processor) -> ADDPModel:
    """The detector that the second stage begins with. If it is pretrained now, the result is saved in the run's folder pretrained/."""
    folder = Path(training_args.output_dir, "pretrained")
    if not any(args.duration.values()):
        PartialState().wait_for_everyone()
        replace_earlier_run(training_args, args.pretrained)
        return ADDPModel.from_pretraining(model)
    if folder.is_dir() and not (folder / PRETRAINING_NOTES).is_file():
        raise InputError(f"{folder} holds something else than a first stage, which would take its place: give another --output_dir")
    run = describe_run(splits, processor, training_args.seed, config=settings_of(model.config), pretraining=asdict(args))
    for name in ("pretrained", "pretrain_dataset_name"):
        if run["pretraining"][name] is not None:
            run["pretraining"][name] = dataset_label(run["pretraining"][name])
    images = splits.train
    if args.pretrain_dataset_name is not None:
        with local_main_process_first():
            images = without_held_out(load_unlabelled(args.pretrain_dataset_name, reading=data_args.reading), splits)
            images = shrink_images(images, processor)
        run["pretraining"]["images"] = content_digest(images)
    if training_args.resume_from_checkpoint and folder.is_dir():
        check_same_run(read_json(folder / PRETRAINING_NOTES).get("run"), run, folder)
        config = model.config
        return ADDPModel.from_pretraining(load_pretraining(folder, image_size=config.image_size, num_channels=config.num_channels))
    arguments = denoising_arguments(
        training_args,
        "pretrained",
        **args.duration,
        learning_rate=args.pretrain_learning_rate,
        batch_size=args.pretrain_batch_size,
    )
    replace_earlier_run(training_args, args.pretrained)
    detector = pretrain(
        model,
        images,
        processor=processor,
        args=arguments,
        resume_from_checkpoint=bool(training_args.resume_from_checkpoint),
        target=folder,
        run=run,
        dataset=dataset_label(args.pretrain_dataset_name or data_args.dataset_name),
        repo_id=hub_name(training_args) if args.pretrain_only and training_args.push_to_hub else None,
    )
    remove_checkpoints(arguments)
    return detector


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for help and card."""
    started = time.time()
    pretraining_args, architecture_args, detector_args, data_args, training_args = parse_arguments(
        PretrainingArguments,
        ArchitectureArguments,
        DetectorArguments,
        DataArguments,
        AnomalyTrainingArguments,
        description=__doc__,
        program=program,
        argv=argv,
    )
    choose_output_dir(training_args, "addp", data_args.dataset_name)
    check_first(training_args)
    splits, processor = load_training_images(data_args, training_args.seed)
    set_seed(training_args.seed)
    model = make_model(pretraining_args, architecture_args, detector_args, processor, data_args.tiles)
    if pretraining_args.pretrained is not None:
        warn_of_other_division(pretraining_run(pretraining_args.pretrained), splits, pretraining_args.pretrained)
    detector = first_stage(model, pretraining_args, data_args, training_args, splits, processor)
    if pretraining_args.pretrain_only:
        folder = Path(training_args.output_dir, "pretrained")
        push_result(training_args, folder)
        if training_args.process_index == 0:
            print(f"saved: {folder}")
        return
    results = train_detector(
        detector,
        processor,
        splits,
        training_args,
        started=started,
        command=[*program.split(), *argv],
    )
    print_results(results, detector, training_args)
