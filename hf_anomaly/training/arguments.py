"""Command-line arguments: every flag of `TrainingArguments`, with defaults for detectors, and where the data comes from."""

import logging
import math
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_available
from transformers.training_args import ParallelMode

from ..cards import check_dataset_id, check_licence
from ..data.formats import Reading, parse_window
from ..data.recipes import DatasetRecipe, find_recipe
from ..errors import InputError, one_line
from ..image_processing import AnomalyImageProcessor
from ..parsing import OneLineParser

logger = logging.getLogger(__name__)

_SOURCES = "A Hub id, a folder of images or of MNIST's files, a .csv file that lists images, a .parquet file, a MedMNIST-style .npz file, or 'digits'."

# Fields of numbers → the least value that they take, and the first that is too large. None passes.
_RANGES = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),  # what numpy takes
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "cpu_threads"), (1, math.inf)
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "num_train_epochs", "dataloader_num_workers"), (0, math.inf)
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay"), (0, 1)),
}

# Flags of `TrainingArguments` that are refused, and why.
_UNSUPPORTED = {
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "a lower --per_device_train_batch_size takes less memory, too"),
    "save_only_model": "no run could be resumed from such a checkpoint; --save_strategy no saves none",
    "enable_jit_checkpoint": "a run that it ends would save its half-trained detector as the result; --save_steps tells how much an interruption costs",
    **dict.fromkeys(("neftune_noise_alpha", "use_liger_kernel"), "it is of language models"),
    "label_smoothing_factor": "detectors learn without labels",
    "prediction_loss_only": "detectors have scores in evaluation, and no loss",
    "include_for_metrics": "compute_metrics gets scores and labels",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "threshold and results are those of the detector that is saved"),
}


def check_ranges(args, ranges: dict[str, tuple[float, float]]) -> None:
    """Refuses numbers below the first of their field's two bounds, and from the second on; None passes.

    Raises:
        InputError: names the flag.
    """
    for name, (least, limit) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value < limit:
            allowed = f"be at least {least}" if limit == math.inf else f"be in [{least}, {limit})"
            raise InputError(f"--{name} must {allowed}, got {value}")


def _check_parts(args: TrainingArguments) -> None:
    """Refuses a schedule without the settings that it needs, shards for one process, persistent workers without workers, a compiler that torch does not have,
    and what is not installed. Trainer would do so only after the data have been prepared."""
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise InputError(
            "--dataloader_persistent_workers keeps the processes that read images, and there are none: add --dataloader_num_workers N"
        )
    if any(setting.count("=") != 1 for setting in (args.optim_args or "=").split(",")):
        raise InputError(f"--optim_args {args.optim_args}: write name=value, and commas between several")
    if args.fsdp and not args.fsdp_config.get("xla") and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp shards the training over several processes, and this is one: add --num_processes N, or leave --fsdp out")
    try:
        get_scheduler(args.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 0, 1, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} and --lr_scheduler_kwargs do not go together: {error}"
        ) from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or "install" in str(error) or "import" in str(error):  # some also want the model
            raise InputError(f"--optim {args.optim.value}: {error}") from error
    if args.torch_compile and args.torch_compile_backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise InputError(f"--torch_compile_backend {args.torch_compile_backend}: torch has no such compiler; take one of {usual}")
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in available:
            raise InputError(f"--report_to {name}: that is not installed; take {', '.join(['none', *available])}, or install it")


@dataclass
class ReproducibleArguments(TrainingArguments):
    """`TrainingArguments` with defaults for small from-scratch training, and an average of the weights."""

    output_dir: str | None = HfArg(default=None, help="Where the result and the checkpoints go. Default: under runs/.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps. Default: as many as the method needs, unless --num_train_epochs is given.")
    num_train_epochs: float = HfArg(default=0.0, help="Passes over the training images, unless --max_steps is given; 0: the default steps.")
    per_device_train_batch_size: int = HfArg(default=32, help="Images per step and device.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images scored at once on a device.")
    learning_rate: float = HfArg(default=1e-3, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(default="cosine", help="The learning rate's schedule.")
    logging_steps: float = HfArg(default=50, help="Steps between two reports of the losses.")
    save_strategy: str = HfArg(default="steps", help="When a checkpoint is saved: no, steps or epoch.")
    save_steps: float = HfArg(default=200, help="Steps between two checkpoints.")
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints to keep.")
    remove_unused_columns: bool = HfArg(default=False, help="Leave False: images become pixel_values when they are read.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="true: go on from the last checkpoint in --output_dir, if there is one; or a checkpoint's folder."
    )
    push_to_hub: bool = HfArg(
        default=False,
        help="Push the result to the Hub, to --hub_model_id or a repository named like the output folder; see --hub_strategy.",
    )
    hub_strategy: str = HfArg(
        default="end",
        help="With --push_to_hub: end, the finished detector alone. In mid-training, to branch 'training': every_save, the weights; checkpoint, the "
        "last checkpoint as last-checkpoint/, to resume from; all_checkpoints, all of them.",
    )
    dataloader_drop_last: bool = HfArg(default=True, help="Leave out a last incomplete batch of an epoch.")
    ema_decay: float = HfArg(default=0.99, help="Decay of the exponential moving average of the weights, which is what is saved; 0: none.")

    lars: bool = HfArg(
        default=False,
        help="Train by LARS, the optimizer of CSI's and DIA's authors, in place of --optim; they have --learning_rate 1 --warmup_steps 0.05 "
        "--weight_decay 1e-6.",
    )

    cpu_threads: int | None = HfArg(
        default=None,
        help="CPU threads of a process. Default: under `accelerate launch` without a GPU all cores that the process may use, else torch's.",
    )

    default_max_steps = 400
    least_max_steps = 1
    unsupported = _UNSUPPORTED

    def __post_init__(self):
        check_ranges(self, _RANGES)
        if self.max_steps != -1:
            check_ranges(self, {"max_steps": (self.least_max_steps, math.inf)})
        elif self.num_train_epochs == 0:
            self.max_steps = self.default_max_steps
        for name, why in self.unsupported.items():
            if getattr(self, name, None) not in (None, False, 0, "no", []):  # not every version has them all
                raise InputError(f"--{name} is not supported: {why}")
        if isinstance(self.resume_from_checkpoint, str) and self.resume_from_checkpoint.lower() in ("true", "false"):
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower() == "true"
        if self.data_seed is None:  # else the images' order depends on the global random state, too
            self.data_seed = self.seed
        if (self.metric_for_best_model or "").endswith("fpr_at_95_tpr") and self.greater_is_better is None:
            self.greater_is_better = False
        if self.deepspeed and not is_deepspeed_available():
            raise InputError("--deepspeed: that is not installed; pip install deepspeed, or leave it out")
        super().__post_init__()
        _check_parts(self)
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        # Without an accelerator torch warns about pinning, once for every loader.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"

    @property
    def images_per_step(self) -> int:
        """Images of all processes that an optimizer step sees."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps


@dataclass
class AnomalyTrainingArguments(ReproducibleArguments):
    """Arguments of `AnomalyTrainer`."""

    false_positive_rate: float = HfArg(
        default=0.05, help="Share of normal images that may be flagged: sets the threshold on the calibration images."
    )
    card_figures: bool = HfArg(
        default=False,
        help="Put score histogram, ROC curve and six images of the evaluation split into the card; who gets the card sees them.",
    )

    license: str | None = HfArg(
        default=None, help="For the card: licence of the weights, as the Hub spells it, such as apache-2.0 or cc-by-4.0."
    )
    dataset_id: str | None = HfArg(
        default=None, help="For the card: the images' id on the Hub, where --dataset_name is a local copy of them."
    )

    def __post_init__(self):
        if not 0 < self.false_positive_rate < 1:
            raise InputError(f"--false_positive_rate must lie strictly between 0 and 1, got {self.false_positive_rate}")
        check_licence(self.license)  # the card, which is written last, would refuse them
        check_dataset_id(self.dataset_id)
        super().__post_init__()


@dataclass
class DenoisingTrainingArguments(ReproducibleArguments):
    """Arguments of `DenoisingTrainer`."""

    ema_decay: float = HfArg(default=0.995, help="Decay of the moving average of the weights, which is what is saved; 0: none.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this norm.")

    default_max_steps = 600
    unsupported = {
        **_UNSUPPORTED,
        **dict.fromkeys(
            ("eval_strategy", "eval_on_start", "load_best_model_at_end"), "what is trained by denoising is not evaluated meanwhile"
        ),
    }


def given_fields(args) -> dict[str, Any]:
    """The flags of a dataclass that were given, with their values: those that differ from the defaults, as nothing else tells."""
    return {field.name: value for field in fields(args) if (value := getattr(args, field.name)) != field.default}


@dataclass
class DataArguments:
    """Where the images come from."""

    dataset_name: str = HfArg(default="digits", help=_SOURCES)
    dataset: str | None = HfArg(
        default=None,
        help="Instead of --dataset_name: one of the papers' datasets, such as pneumonia_mnist or kvasir_polyp, with its normal class, protocol, "
        "image size and steps as the paper has them, unless other flags say otherwise.",
    )
    data_dir: str | None = HfArg(
        default=None, help="The folder in which --dataset lies. Default: the environment variable HF_ANOMALY_DATA_DIR, else the Hub."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a Hub dataset.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a Hub dataset.")
    normal_label: str | None = HfArg(
        default=None, help="Name or number of the normal class. Default: 'normal', 'good' or 'healthy', the only class, or digit 0."
    )
    image_column: str | None = HfArg(default=None, help="Column with the images. Default: 'image', or the only image column.")
    label_column: str | None = HfArg(default=None, help="Column with the labels. Default: 'label', 'labels' or the only class column.")
    group_column: str | None = HfArg(
        default=None,
        help="Column with what belongs together, such as the patient: no group both trains and calibrates, nor with --protocol balanced does it train "
        "and test; else test images of groups that train are warned of. Default: slices of one volume belong together.",
    )
    image_size: int | None = HfArg(default=None, help="Images are resized to this. Default: their own size up to 64, or up to 64 a tile.")
    tiles: int = HfArg(
        default=1,
        help="Cut images into so many squares along each side, such as 4 for 16 of 64 pixels: for small anomalies in large images. The most anomalous "
        "square gives the score, and scoring takes as long as for so many images.",
    )
    num_channels: int | None = HfArg(
        default=None, help="1: gray, 3: RGB; images are converted. Default: gray if all training images are gray."
    )
    calibration_fraction: float = HfArg(
        default=0.2, help="Share of the normal training images held out for calibration if there is no calibration split."
    )
    eval_split: str = HfArg(default="test", help="The split to evaluate on: test or validation.")
    protocol: str | None = HfArg(
        default=None,
        help="official, the default: the source's own splits; balanced: of all images 80%% of the normal class train, 20%% test with as many "
        "random anomalies; stratified, stratified_70_30: a fixed split of every class, 80 to 20%% or 70 to 30%%.",
    )
    max_train_images: int | None = HfArg(default=None, help="Train on this many normal images, drawn with the seed.")
    window: list[str] | None = HfArg(
        default=None,
        help="Images of more than 8 bits: LOW HIGH, the values (of DICOM after rescaling, such as Hounsfield units) that become black and white, or "
        "full, the whole range. Default: the window in a DICOM file's header; other such images are refused.",
    )
    slice_axis: int | None = HfArg(
        default=None, help="NIfTI volumes are sliced along it: 0 sagittal, 1 coronal, 2 axial. Default: 2, or as in the training."
    )
    central_slices: int | None = HfArg(
        default=None,
        help="So many slices around the middle of a NIfTI volume or a DICOM file of several frames. Default: all, or as in the training.",
    )
    streaming: bool = HfArg(
        default=False,
        help="Read the images as a stream, for more than fit into memory or onto the disk: parquet files and Hub datasets. The first normals, "
        "see --stream_head, calibrate and are compared with.",
    )
    stream_head: int = HfArg(default=1000, help="With --streaming: normal images read at once, of which --calibration_fraction calibrate.")
    shuffle_buffer: int = HfArg(default=1000, help="With --streaming: rows among which the next training image is drawn.")
    contamination: float = HfArg(
        default=0.0, help="Share of the training images that are anomalies taken for normal ones, added with the seed."
    )

    def __post_init__(self):
        self.given = given_fields(self)
        if not self.streaming:
            self.refuse_given(("stream_head", "shuffle_buffer"), "is of --streaming alone")
        self._take_recipe()
        self.reading = Reading(parse_window(self.window), 2 if self.slice_axis is None else self.slice_axis, self.central_slices)
        if self.streaming:
            self.refuse_given(("group_column",), "does not go with --streaming, which holds out image by image")
        if self.streaming and (self.protocol != "official" or self.contamination):
            raise InputError(f"--streaming knows the source's own splits alone, not --protocol {self.protocol} or --contamination")

    def refuse_given(self, names: Iterable[str], why: str) -> None:
        """Refuses these flags if they were given, as nothing would come of them.

        Raises:
            InputError: names the flag.
        """
        for name in names:
            if name in self.given:
                raise InputError(f"--{name} {why}: leave it out")

    def _take_recipe(self):
        if self.dataset is None:
            if self.data_dir is not None:
                raise InputError("--data_dir is where --dataset lies: name the dataset, or give the folder itself as --dataset_name")
            self.protocol = self.protocol or "official"
            return
        if self.dataset_name != type(self).dataset_name:
            raise InputError(
                f"--dataset {self.dataset} and --dataset_name {self.dataset_name} both say where the images come from: give one"
            )
        recipe = self.recipe
        self.dataset_name = recipe.locate(self.data_dir)
        self.protocol = self.protocol or recipe.protocol
        self.image_size = self.image_size or recipe.image_size
        self.label_column = self.label_column or recipe.label_column
        if self.normal_label is None and len(recipe.normal_labels) == 1:
            self.normal_label = recipe.normal_labels[0]

    @property
    def recipe(self) -> DatasetRecipe | None:
        """The recipe that `--dataset` names."""
        return None if self.dataset is None else find_recipe(self.dataset)

    def timesteps(self, t_min: int | None, t_max: int | None) -> tuple[int, int]:
        """The range of timesteps to dissolve with: as given, else that of `--dataset`, else that of most datasets."""
        lowest, highest = (self.recipe or DatasetRecipe).timesteps
        return lowest if t_min is None else t_min, highest if t_max is None else t_max


@dataclass
class EvaluationDataArguments(DataArguments):
    """Where the images come from."""

    dataset_name: str | None = HfArg(default=None, help=_SOURCES)
    image_size: int | None = HfArg(default=None, help=SUPPRESS)  # these three are refused below
    tiles: int = HfArg(default=1, help=SUPPRESS)
    num_channels: int | None = HfArg(default=None, help=SUPPRESS)

    def __post_init__(self):
        if self.dataset_name is None and self.dataset is None:
            raise InputError("--dataset_name is missing: name the images that the detector is to judge")
        super().__post_init__()
        self.refuse_given(("image_size", "num_channels", "tiles"), "is the detector's own")

    def refuse_training_flags(self, why: str) -> None:
        """Refuses flags that choose training images, where none are read."""
        self.refuse_given(("max_train_images", "contamination", "calibration_fraction"), why)
        if self.protocol != "balanced":  # which draws the test images, too, by groups
            self.refuse_given(("group_column",), why)

    def read_as(self, processor: AnomalyImageProcessor) -> None:
        """Windows and slices that no flag sets are as in the detector's training; the processor takes over the window."""
        given = {"window": self.reading.window, "slice_axis": self.slice_axis, "central_slices": self.central_slices}
        self.reading = replace(processor.reading, **{name: value for name, value in given.items() if value is not None})
        processor.window = self.reading.window


@dataclass(kw_only=True)
class ScoringArguments:
    """Which detector scores, and how; for subclasses."""

    model: str = HfArg(help="Folder or Hub id of a saved detector.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit of a Hub model.")
    batch_size: int = HfArg(default=64, help="Images scored at once.")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="Device to score on.")

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, math.inf)})


class _DataclassParser(OneLineParser, HfArgumentParser):
    pass


def parse_arguments(*classes: type, description: str, argv: list[str] | None = None, program: str | None = None) -> tuple:
    """Parses the command line into dataclasses, one of each class, and lets a training use all cores under `accelerate launch`.

    Args:
        argv: its words; by default those of this process.
        program: what comes before them, for the help.

    Raises:
        InputError: an unknown flag (with the nearest known one), a missing one, a value out of range, or values that do not go together.
    """
    parser = _DataclassParser(classes, prog=program, description=description)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(args=sys.argv[1:] if argv is None else argv, return_remaining_strings=True)
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # transformers' own, of arguments that do not go together
        raise InputError(one_line(error)) from error
    parser.refuse_unknown(rest)
    for args in parsed:
        if isinstance(args, ReproducibleArguments):
            _use_idle_cores(args)
    return tuple(parsed)


def _use_idle_cores(args: ReproducibleArguments) -> None:
    """`accelerate launch` gives a process one CPU thread unless told otherwise: on a laptop, one of its cores."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch`, and by nothing else
    if args.cpu_threads is None and launched and args.device.type == "cpu" and args.world_size == 1 and torch.get_num_threads() == 1:
        import joblib

        cores = joblib.cpu_count()  # of those that affinity and a container's quota leave to this process
        logger.info("Training in %d CPU threads; --cpu_threads says otherwise", cores)
        torch.set_num_threads(cores)
