"""Trains a diffusion model on normal images, to dissolve with: a DDPMPipeline folder that diffusers loads."""

from dataclasses import asdict, dataclass

import torch
from transformers.hf_argparser import HfArg

from ...data import prepare
from ...dissolving import dissolving_quality
from ...ops.tiles import draw_tiles
from .. import DataArguments, DenoisingTrainingArguments, parse_arguments
from ..denoising import train_dissolver
from ..run_record import describe_run
from ..runs import check_first, choose_output_dir, load_training_images, replace_earlier_run

MEASURED_IMAGES = 128  # held-out images on which the result is measured


@dataclass
class DiffusionArguments:
    """The diffusion model."""

    resolution: int | None = HfArg(
        default=None,
        help="Dissolving resolution in pixels. Default: the largest power of two within a third of the size of the images, or tiles, 8 to 32.",
    )
    block_out_channels: list[int] = HfArg(default_factory=lambda: [32, 64, 64], help="Widths of the UNet's blocks.")
    max_timestep: int | None = HfArg(
        default=None, help="Train on noise levels below this only. Default: twice t_max; the paper takes 1000."
    )
    t_min: int | None = HfArg(
        default=None, help="Smallest timestep that the dissolver draws by default. Default: 30, or that of --dataset."
    )
    t_max: int | None = HfArg(default=None, help="Largest one. Default: 130, or that of --dataset.")


@dataclass
class DissolverTrainingArguments(DenoisingTrainingArguments):
    """Its training."""

    per_device_train_batch_size: int | None = HfArg(
        default=None, help="Images per step and device. Default: 32, for a diffusion model at 32 px or more 16."
    )


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for help and card."""
    diffusion_args, data_args, training_args = parse_arguments(
        DiffusionArguments, DataArguments, DissolverTrainingArguments, description=__doc__, program=program, argv=argv
    )
    diffusion_args.t_min, diffusion_args.t_max = data_args.timesteps(diffusion_args.t_min, diffusion_args.t_max)
    choose_output_dir(training_args, "dissolver", data_args.dataset_name)
    check_first(training_args)
    splits, processor = load_training_images(data_args, training_args.seed)
    replace_earlier_run(training_args)
    dissolver = train_dissolver(
        splits.train,
        processor=processor,
        args=training_args,
        resolution=diffusion_args.resolution,
        block_out_channels=tuple(diffusion_args.block_out_channels),
        max_timestep=diffusion_args.max_timestep,
        tiles=data_args.tiles,
        t_min=diffusion_args.t_min,
        t_max=diffusion_args.t_max,
        resume_from_checkpoint=training_args.resume_from_checkpoint,
        run=describe_run(splits, processor, training_args.seed, tiles=data_args.tiles, **asdict(diffusion_args)),
    )
    if training_args.process_index == 0:
        if splits.calibration is not None:  # normal images that the network has not seen
            images = torch.stack(prepare(splits.calibration, processor)[:MEASURED_IMAGES]["pixel_values"]).to(dissolver.device)
            print(f"on {len(images)} held-out images:")
            (images,) = draw_tiles(data_args.tiles, images)
            for quality in dissolving_quality(dissolver, images, dissolver.spread_timesteps()):
                print("  " + ", ".join(f"{name} {value:.4g}" for name, value in asdict(quality).items()))
        print(f"saved: {training_args.output_dir}")
