"""Trains DIA (or CSI, with --dissolver none): dissolver, detector, reference, calibration, evaluation, card."""

import difflib
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed
from transformers.hf_argparser import HfArg

from ...backbones.pretrained import load_backbone_config
from ...detectors.csi.modeling_csi import CSIModel
from ...detectors.dia.modeling_dia import DIAModel
from ...dissolving import DISSOLVERS, DiffusionDissolver, Dissolver, dissolve_dataset
from ...dissolving.base import CONFIG_NAME, locate, read_config
from ...errors import InputError
from ...files import remove_staged
from ...image_processing import AnomalyImageProcessor
from ...ops.distributed import local_main_process_first
from ...ops.views import NUM_CROPS
from .. import AnomalyTrainingArguments, DataArguments, parse_arguments
from ..arguments import check_ranges, given_fields
from ..denoising import denoising_arguments, remove_checkpoints, train_dissolver
from ..run_record import check_same_run, describe_run, warn_of_other_division
from ..runs import (
    LARGEST_DEFAULT_SIZE,
    check_first,
    choose_output_dir,
    load_training_images,
    lower_batch_size,
    num_images,
    print_results,
    replace_earlier_run,
    train_detector,
)

logger = logging.getLogger(__name__)

_TRAINED = ("dissolver_steps", "dissolver_batch_size", "dissolver_learning_rate", "dissolver_max_timestep")
USES = {  # dissolver -> the arguments that it has a use for; "" stands for one that is ready in a folder or on the Hub
    "diffusion": ("t_min", "t_max", "dissolving_resolution", "dissolved_variants", *_TRAINED),
    **dict.fromkeys(("gaussian", "median"), ("blur_kernel_size", "dissolving_resolution", "dissolved_variants")),
    "resize": ("dissolving_resolution", "dissolved_variants"),
    "identity": ("dissolved_variants",),
    "none": (),
    "": ("t_min", "t_max", "dissolved_variants"),
}
_ANY_USES = ("dissolved_variants",)  # of a kind that is entered in DISSOLVERS, or a ready one that is no diffusion model


@dataclass
class DissolverArguments:
    """What makes branch D."""

    dissolver: str = HfArg(
        default="diffusion",
        help=f"{', '.join(DISSOLVERS)}; none (CSI: no branch D); or a ready dissolver of any kind, as a folder or Hub id.",
    )
    t_min: int | None = HfArg(
        default=None, help="Smallest diffusion timestep to dissolve at. Default: a ready dissolver's own, else that of --dataset, else 30."
    )
    t_max: int | None = HfArg(default=None, help="Largest one. Default: a ready dissolver's own, else that of --dataset, else 130.")
    blur_kernel_size: list[int] | None = HfArg(
        default=None,
        help="Kernel of the gaussian and median dissolvers, odd, in pixels; of several, each image gets a dissolved variant of each. "
        "Default: gaussian, 11; median, 7 11 15.",
    )
    dissolving_resolution: int | None = HfArg(
        default=None,
        help="Larger images, or tiles, are dissolved at this size and resized back. Default: diffusion, the largest power of two within a third of "
        "their size, 8 to 32; others, 32.",
    )
    dissolved_variants: int = HfArg(
        default=8,
        help="Dissolved variants cached for each image, at most as many as training passes over it, none for less than a pass; 0 dissolves on the fly.",
    )
    dissolver_steps: int = HfArg(default=600, help="Training steps of the diffusion model.")
    dissolver_batch_size: int | None = HfArg(
        default=None, help="Images per step and device of its training. Default: 32, for a diffusion model at 32 px or more 16."
    )
    dissolver_learning_rate: float = HfArg(default=1e-3, help="Its peak learning rate.")
    dissolver_max_timestep: int | None = HfArg(
        default=None, help="Train it on noise levels below this only. Default: twice t_max; the paper takes 1000."
    )

    def __post_init__(self):
        least = {"dissolved_variants": 0, "dissolver_steps": 1, "dissolver_batch_size": 1, "dissolver_learning_rate": 0}
        check_ranges(self, {name: (value, math.inf) for name, value in least.items()})
        self.refuse_useless(USES.get(self.dissolver, _ANY_USES if self.dissolver in DISSOLVERS else USES[""]))

    def refuse_useless(self, uses: tuple[str, ...]) -> None:
        """Raises InputError where a flag was given that is not one of these."""
        if useless := sorted(given_fields(self).keys() - {"dissolver", *uses}):
            raise InputError(f"--{useless[0]} is of no use to --dissolver {self.dissolver}: leave it out")


@dataclass
class DetectorArguments:
    """The detector; the configuration's docstring has the details."""

    backbone: str | None = HfArg(default=None, help="A pretrained backbone, as a Hub id or folder. Default: a small ResNet from scratch.")
    backbone_stage: str | None = HfArg(
        default=None,
        help="The stage of that backbone whose map is the encoder's features, such as stage3: earlier ones see finer things. Default: the last.",
    )
    num_encoders: int | None = HfArg(
        default=None,
        help="Encoders trained side by side, whose scores are averaged: steadier over seeds, at the time of as many. Default: 3; 1 with --backbone.",
    )
    shift: str = HfArg(default="rotate", help="Shifting transformations: rotate or perm.")
    similarity_design: str = HfArg(default="a", help="a, or b: leave an anchor's own dissolved twin out of the denominator.")
    temperature: float = HfArg(default=0.5, help="Temperature of the contrastive loss.")
    loss_divisor: str = HfArg(default="anchors", help="anchors, or views as in the authors' code.")
    crop_scale_min: float = HfArg(default=0.54, help="Smallest area of a random crop.")
    test_views: str = HfArg(default="augmentations", help="Fixed views at test time: augmentations or crops.")
    num_test_views: int | None = HfArg(
        default=None,
        help="How many; of crops 5 at most. Default: 10, or 5 crops, for images of up to 64 pixels, for larger ones fewer in proportion, but 4 at "
        "least: each costs time.",
    )
    test_crop_scale: list[float] = HfArg(
        default_factory=lambda: [0.54, 0.7], help="Areas between which their crops are drawn; the authors have 0.54 alone."
    )
    score_features: str | None = HfArg(
        default=None,
        help="What Eq. 10 compares: projection, the head's features; penultimate, the encoder's; both; or all, these and how unevenly the encoder's "
        "are spread over the image. Default: all; both with --backbone, whose features are many.",
    )
    score_whitening: bool = HfArg(
        default=True, help="Compare by the distance between whitened features; false: by their cosine, as printed."
    )
    score_ignores_detail: bool = HfArg(
        default=False,
        help="Leave out of that distance how features move as training images lose fine detail, which those of another device may lack.",
    )
    score_cosine: bool = HfArg(default=True, help="Eq. 10: the cosine to the nearest training image.")
    score_norm: bool = HfArg(default=False, help="Eq. 10: the norm of these features.")
    score_shift_logit: bool = HfArg(default=False, help="Eq. 10: the logit of the true shift.")

    def __post_init__(self):
        if self.backbone_stage is not None and self.backbone is None:
            raise InputError("--backbone_stage is of no use without --backbone: leave it out")
        if self.num_encoders is None:
            self.num_encoders = 3 if self.backbone is None else 1
        if self.score_features is None:  # whitening takes the square of their number
            self.score_features = "all" if self.backbone is None else "both"
        if self.test_views == "crops" and (self.num_test_views or 0) > NUM_CROPS:
            raise InputError(
                f"--num_test_views {self.num_test_views}: --test_views crops are {NUM_CROPS}, more would be the same ones again"
            )

    def fit_image_size(self, image_size: int) -> None:
        """Fills in the number of test-time views where none was given."""
        if self.num_test_views is None:
            self.num_test_views = min(NUM_CROPS if self.test_views == "crops" else 10, max(4, 10 * LARGEST_DEFAULT_SIZE // image_size))


@dataclass
class ContrastiveTrainingArguments(AnomalyTrainingArguments):
    """The detector's training."""

    max_steps: int = HfArg(
        default=-1,
        help="Optimizer steps. Default: 1,600 for images, or tiles, of up to 64 pixels, for larger ones fewer in proportion, which takes about as "
        "long, and at most 250 passes over them; unless --num_train_epochs is given. 0 trains nothing, and compares by the encoder as it is, such as a "
        "pretrained one.",
    )
    learning_rate: float | None = HfArg(default=None, help="Peak learning rate. Default: 0.01; 0.001 with --backbone.")

    default_max_steps = 1600
    least_max_steps = 0
    default_max_passes = 250  # with a hundred images more make it worse, most likely because the encoder knows them by heart

    def __post_init__(self):
        self._takes_default_steps = self.max_steps == -1 and self.num_train_epochs == 0
        super().__post_init__()

    def fit_images(self, image_size: int, num_images: int | None) -> None:
        """Lowers the default number of steps for images, or tiles, of more than 64 pixels a side, and for few of them. Of a stream there are None."""
        if not self._takes_default_steps:
            return
        steps = self.default_max_steps * LARGEST_DEFAULT_SIZE // max(image_size, LARGEST_DEFAULT_SIZE)
        if num_images is not None:
            steps = min(steps, math.ceil(self.default_max_passes * num_images / self.images_per_step))
        self.max_steps = max(1, steps)
        if steps < self.default_max_steps:
            logger.info(
                "%s images or tiles of %d pixels: %d steps in place of %d; --max_steps says otherwise",
                "A stream's" if num_images is None else num_images,
                image_size,
                self.max_steps,
                self.default_max_steps,
            )

    def passes(self, num_images: int) -> float:
        """How often training sees each of so many images."""
        if self.max_steps <= 0:
            return self.num_train_epochs
        return self.max_steps * self.images_per_step / num_images


def make_model(args: DetectorArguments, model_class: type[CSIModel], processor: AnomalyImageProcessor, tiles: int) -> CSIModel:
    """A new detector, whose backbone may be a pretrained one."""
    settings = asdict(args) | processor.image_shape | {"tiles": tiles}
    settings["crop_scale"] = (settings.pop("crop_scale_min"), 1.0)
    if model_class is CSIModel:
        del settings["similarity_design"]  # of branch D
    del settings["backbone"], settings["backbone_stage"]
    if args.backbone is not None:
        settings["backbone_config"] = load_backbone_config(args.backbone, args.backbone_stage)
    model = model_class(model_class.config_class(**settings))
    if args.backbone is not None:
        model.load_backbone(args.backbone)
    return model


def find_dissolver(name: str, folder: Path) -> Path | None:
    """The local folder of a dissolver that exists already; None if it is yet to be made, or if there is to be none. In `folder`, where the run's own
    dissolver goes, it refuses to replace one that was trained by itself."""
    ready, kinds = None, [*DISSOLVERS, "none"]
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        if close and not Path(name).exists():
            raise InputError(f"--dissolver {name}: did you mean {close[0]}? A folder is written ./{name}, a Hub id org/name")
        ready = locate(name)
    if (folder / "README.md").is_file() and not _same_folder(ready, folder):
        raise InputError(
            f"{folder} holds a dissolver that was trained by itself: take another --output_dir, or use it, --dissolver {folder}"
        )
    return ready


def _same_folder(ready: Path | None, folder: Path) -> bool:
    return ready is not None and folder.is_dir() and ready.samefile(folder)


def make_dissolver(args: DissolverArguments, ready: Path | None, data_args, splits) -> Dissolver | None:
    """The dissolver that the arguments name; None if there is to be none, or if it is yet to be trained."""
    if args.dissolver in ("none", "diffusion"):
        return None
    if ready is None:
        settings = {"kernel_size": args.blur_kernel_size, "resolution": args.dissolving_resolution}
        try:
            return DISSOLVERS[args.dissolver](**{name: value for name, value in settings.items() if value is not None})
        except TypeError as error:  # of an own class
            raise InputError(f"--dissolver {args.dissolver}: {error}; save one with save_pretrained, and give its folder") from error
    if read_config(ready)["kind"] != "diffusion":
        args.refuse_useless(_ANY_USES)
        return Dissolver.from_pretrained(ready)
    dissolver = DiffusionDissolver.from_pretrained(ready, t_min=args.t_min, t_max=args.t_max)
    run = dissolver.training_run or {}
    warn_of_other_division(run, splits, args.dissolver)
    if run and (trained := run.get("tiles", 1)) != data_args.tiles:
        logger.warning(
            "%s was trained with --tiles %s and dissolves other parts of images here than it learnt: train one with --tiles %d",
            args.dissolver,
            trained,
            data_args.tiles,
        )
    return dissolver


def _was_saved(folder: Path, training_args) -> bool:
    """Whether a resumed run had saved its dissolver: the config, which is written last, is there."""
    return bool(training_args.resume_from_checkpoint) and (folder / CONFIG_NAME).is_file()


def train_diffusion(args: DissolverArguments, folder: Path, data_args, training_args, splits, processor) -> DiffusionDissolver:
    """A dissolver trained on these images and saved in `folder`; a resumed run that had trained it loads it from there."""
    t_range = dict(zip(("t_min", "t_max"), data_args.timesteps(args.t_min, args.t_max), strict=True))
    recorded = {} if data_args.recipe is None else t_range  # the default range is recorded as none
    run = describe_run(splits, processor, training_args.seed, tiles=data_args.tiles, dissolver=asdict(args) | recorded)
    if _was_saved(folder, training_args):
        dissolver = DiffusionDissolver.from_pretrained(folder, **t_range)
        check_same_run(dissolver.training_run, run, folder)
        return dissolver
    arguments = denoising_arguments(
        training_args,
        "dissolver",
        steps=args.dissolver_steps,
        learning_rate=args.dissolver_learning_rate,
        batch_size=args.dissolver_batch_size,
    )
    dissolver = train_dissolver(
        splits.train,
        processor=processor,
        args=arguments,
        resolution=args.dissolving_resolution,
        max_timestep=args.dissolver_max_timestep,
        tiles=data_args.tiles,
        **t_range,
        resume_from_checkpoint=bool(training_args.resume_from_checkpoint),
        target=folder,
        run=run,
    )
    remove_checkpoints(arguments)
    return dissolver


def place_dissolver(args: DissolverArguments, ready: Path | None, data_args, training_args, splits, processor) -> Dissolver | None:
    """The dissolver that the arguments ask for, made, loaded or trained, and saved in the run's folder dissolver/ in place of an earlier run's."""
    folder = Path(training_args.output_dir, "dissolver")
    dissolver = make_dissolver(args, ready, data_args, splits)  # before anything is replaced: it may refuse the arguments
    PartialState().wait_for_everyone()
    replace_earlier_run(training_args, ready)
    if training_args.should_save:
        remove_staged(folder)
    if args.dissolver == "diffusion":
        return train_diffusion(args, folder, data_args, training_args, splits, processor)
    if training_args.should_save and not _was_saved(folder, training_args):  # of another run it is not ours to remove
        if dissolver is not None:
            dissolver.save_pretrained(folder)
        if (folder / "README.md").is_file():  # of the one that is used, whose timesteps may be others now
            dissolver.write_card(folder)
    return dissolver


def dissolve(model: DIAModel, dissolver: Dissolver, variants: int, training_args, splits, processor) -> tuple:
    """Gives the detector its dissolver, and caches at most so many dissolved variants of each image, none if training does not see all of it; returns
    `train_dataset` and `dissolving` for `train_detector`."""
    dissolver.to(training_args.device)
    model.config.dissolver, model.config.dissolver_settings = dissolver.kind, dissolver.settings()
    model.dissolver = dissolver
    images = splits.train
    if variants > 0:
        passes = training_args.passes(len(images)) / model.config.tiles**2  # a step sees one tile
        variants = min(variants, math.ceil(passes)) if passes >= 1 else 0
    if variants > 0:
        with local_main_process_first():
            images = dissolve_dataset(
                images, dissolver, processor, num_variants=variants, tiles=model.config.tiles, seed=training_args.seed
            )
        variants = len(images[0]["dissolved_images"])  # with more steps there may be more, and others
    return images, {"fingerprint": dissolver.fingerprint(), "variants": variants}


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for help and card."""
    started = time.time()
    dissolver_args, detector_args, data_args, training_args = parse_arguments(
        DissolverArguments, DetectorArguments, DataArguments, ContrastiveTrainingArguments, description=__doc__, program=program, argv=argv
    )
    method, model_class = ("csi", CSIModel) if dissolver_args.dissolver == "none" else ("dia", DIAModel)
    if training_args.learning_rate is None:  # what is pretrained shall not be unlearnt
        training_args.learning_rate = 1e-2 if detector_args.backbone is None else 1e-3
    if training_args.max_steps == 0 and model_class is DIAModel:
        raise InputError("--max_steps 0 trains nothing, and dissolved images are of use in training alone: add --dissolver none")
    choose_output_dir(training_args, method, data_args.dataset_name)
    check_first(training_args)
    ready = find_dissolver(dissolver_args.dissolver, Path(training_args.output_dir, "dissolver"))
    splits, processor = load_training_images(data_args, training_args.seed)
    lower_batch_size(training_args, num_images(splits.train))
    tiles, count = data_args.tiles, num_images(splits.train)
    training_args.fit_images(processor.size["height"] // tiles, None if count is None else count * tiles**2)
    detector_args.fit_image_size(processor.size["height"])
    set_seed(training_args.seed)
    model = make_model(detector_args, model_class, processor, tiles)  # before anything long runs, so that a wrong value is refused at once
    dissolver = place_dissolver(dissolver_args, ready, data_args, training_args, splits, processor)
    train_dataset, dissolving = None, None
    if dissolver is not None:
        variants = 0 if data_args.streaming else dissolver_args.dissolved_variants  # of a stream there is nothing to keep
        train_dataset, dissolving = dissolve(model, dissolver, variants, training_args, splits, processor)
    results = train_detector(
        model,
        processor,
        splits,
        training_args,
        train_dataset=train_dataset,
        dissolving=dissolving,
        started=started,
        command=[*program.split(), *argv],
    )
    print_results(results, model, training_args)
