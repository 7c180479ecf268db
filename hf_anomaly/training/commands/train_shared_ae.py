"""Trains SharedAE: detector, reference, calibration, evaluation, card."""

import time
from dataclasses import asdict, dataclass

from transformers import set_seed
from transformers.hf_argparser import HfArg

from ...detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from ...detectors.shared_ae.modeling_shared_ae import SharedAEModel
from .. import AnomalyTrainingArguments, DataArguments, parse_arguments
from ..runs import check_first, choose_output_dir, load_training_images, print_results, replace_earlier_run, train_detector


@dataclass
class DetectorArguments:
    """The detector; the configuration's docstring has the details."""

    hidden_sizes: list[int] = HfArg(default_factory=lambda: [16, 32, 64], help="Channels of the first three convolutions.")
    latent_size: int = HfArg(default=64, help="Width of the latents.")
    alpha: float = HfArg(default=1.0, help="Weight of the image's error in the losses.")
    beta: float = HfArg(default=0.1, help="Weight of the latent's error in the losses.")
    max_adversarial_weight: float = HfArg(
        default=0.1, help="Bound of the adversarial term's weight 1 - 1/epoch; 1 is the schedule as printed."
    )
    adversarial_margin: float = HfArg(
        default=1.5, help="Bounds what the first part gains by it, as a multiple of its reconstruction error; 0: no bound."
    )
    omega1: float = HfArg(default=0.9, help="Weight of the score's first term; the second has the rest.")
    score_from: str = HfArg(
        default="latents", help="latents, the paper's score; map: the anomaly map's highest value, for small anomalies."
    )
    ablation: str = HfArg(default="full", help="full; two: without adversarial training; one: a single decoder too.")


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for help and card."""
    started = time.time()
    detector_args, data_args, training_args = parse_arguments(
        DetectorArguments, DataArguments, AnomalyTrainingArguments, description=__doc__, program=program, argv=argv
    )
    choose_output_dir(training_args, "shared-ae", data_args.dataset_name)
    check_first(training_args)
    splits, processor = load_training_images(data_args, training_args.seed)
    set_seed(training_args.seed)
    settings = asdict(detector_args) | {
        "adversarial_margin": detector_args.adversarial_margin or None,
        "omega2": round(1 - detector_args.omega1, 9),
    }
    model = SharedAEModel(SharedAEConfig(**processor.image_shape, tiles=data_args.tiles, **settings))
    replace_earlier_run(training_args)
    results = train_detector(
        model,
        processor,
        splits,
        training_args,
        started=started,
        command=[*program.split(), *argv],
    )
    print_results(results, model, training_args)
