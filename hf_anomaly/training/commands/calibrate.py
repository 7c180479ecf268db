"""Calibrates a saved detector with normal images of the place where it is used, and saves it; what it has learnt stays as it is."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from ...calibration import drift_check
from ...data import OneClassSplits, image_loader
from ...data.sources import dataset_label
from ...detector import AnomalyDetector
from ...files import check_output, write_json
from ...loading import load_detector, recorded_results
from .. import EvaluationDataArguments, parse_arguments
from ..arguments import ScoringArguments
from ..run_record import without_measurements
from ..runs import load_splits, threshold_line

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CalibrationArguments(ScoringArguments):
    """What is calibrated, and how."""

    output_dir: str = HfArg(help="Where the calibrated detector goes.")
    false_positive_rate: float | None = HfArg(default=None, help="Share of normal images that may be flagged. Default: the detector's own.")


def _warn_of_unlike_training(model: AnomalyDetector, recorded: dict, splits: OneClassSplits) -> None:
    """Warns where the images may be those that trained the detector, or are of another class than it learnt.

    Args:
        recorded: the results beside the detector.
    """
    if recorded.get("dataset") == dataset_label(splits.source):
        logger.warning(
            "The detector was trained on images of the same name, %s: those that it was trained on would make the threshold too low for new ones",
            dataset_label(splits.source),
        )
    trained_on = model.config.normal_label
    if trained_on not in (None, "normal") and splits.normal_label not in (trained_on, "normal"):  # "normal" are images without labels, too
        logger.warning(
            "Normal is %r here, but the detector was trained on %r: --normal_label says otherwise", splits.normal_label, trained_on
        )


def _compare_with_former(scores: torch.Tensor, former_threshold: float, former_scores: torch.Tensor) -> None:
    """Prints what the former calibration would have made of these images, and warns if they look like those that trained the detector.

    Args:
        scores, former_scores: of the images that calibrate now, and of those that did before.
    """
    flagged = (scores > former_threshold).cpu().double().mean().item()
    print(f"before: of these images {flagged:.1%} were flagged, at the threshold {former_threshold:.6g}")
    drift = drift_check(scores, former_scores)
    if drift.is_found and drift.direction == "lower":
        logger.warning(
            "These images score lower than those that calibrated the detector before (Kolmogorov-Smirnov, p = %.2g): if it was trained on them, or they are "
            "easier than those to come, the threshold is too low for new images",
            drift.p_value,
        )


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for the help."""
    args, data_args = parse_arguments(CalibrationArguments, EvaluationDataArguments, description=__doc__, program=program, argv=argv)
    check_output("--output_dir", args.output_dir, folder=True)
    data_args.refuse_training_flags("is of the training images, and all of these calibrate")
    data_args.refuse_given(("eval_split", "protocol", "streaming"), "is of training and evaluation, and all of these images calibrate")
    data_args.calibration_fraction = 0.0
    place = Path(args.output_dir)
    if (place / "config.json").is_file() and place.resolve() != Path(args.model).resolve():
        logger.warning("The detector in %s will be replaced; to keep it, give another --output_dir", place)
    model, processor = load_detector(args.model, args.revision, args.device)
    model.require_fitted()
    data_args.read_as(processor)
    splits = load_splits(data_args)
    recorded = recorded_results(args.model, args.revision)
    _warn_of_unlike_training(model, recorded, splits)
    images = splits.train if splits.calibration is None else splits.calibration
    former = (model.calibration.threshold.item(), model.calibration.scores) if model.calibration.is_calibrated else None
    rate = model.config.false_positive_rate if args.false_positive_rate is None else args.false_positive_rate
    settings = {} if rate is None else {"false_positive_rate": rate}
    model.calibrate(image_loader(images, processor, args.batch_size), **settings)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    if of_the_training := without_measurements(recorded):
        write_json(Path(args.output_dir, "eval_results.json"), of_the_training | {"calibrated_on": dataset_label(splits.source)})
    if former is not None:
        _compare_with_former(model.calibration.scores, *former)
    print(threshold_line(model))
    if recorded.get("auroc") is not None:
        print(
            "no longer hold, and are left out of eval_results.json and card: the results measured before; hf-anomaly evaluate --record true measures anew "
            "and writes them there"
        )
    print(f"saved: {args.output_dir}")
