"""Scores a dataset with a saved detector and writes the same JSON as training does, but for the facts of the training.

The split hash covers the evaluated rows alone: no training data is needed, but for --baselines.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from ...cards import remove_figures, write_card
from ...cards.merging import read_card
from ...data import OneClassSplits, collate, decode_image, file_name, prepare
from ...data.sources import UnknownClassError, dataset_label, default_normal_class
from ...errors import InputError
from ...files import check_output, csv_text, shortened, write_json, write_output
from ...loading import load_detector, recorded_results
from ...visualization import check_overlay, paint, write_image
from .. import DataArguments, EvaluationDataArguments, parse_arguments
from ..arguments import ScoringArguments, check_ranges
from ..baselines import compare_with_baselines
from ..evaluation import bfloat16_agreement, draw_figures, evaluate_detector
from ..run_record import with_measurements
from ..runs import load_splits

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationArguments(ScoringArguments):
    """What is evaluated, and how."""

    seed: int | None = HfArg(
        default=None,
        help="Seed of the training run, which drew the test images of --protocol balanced, and the training images that --baselines takes. Default: "
        "as recorded beside the model.",
    )
    output: str | None = HfArg(default=None, help="Also write the JSON to this file.")
    scores: str | None = HfArg(
        default=None,
        help="Also write a table of the images in their order, .csv: image (its file, else its row), row, class_name (not of a stream), label, score, "
        "and of a calibrated detector p_value and flagged.",
    )
    save_maps: str | None = HfArg(default=None, help="Also write the highest-scoring images to this folder, anomaly maps over them.")
    record: bool = HfArg(
        default=False, help="Also write the results into the model, a folder: its eval_results.json and its card, in place of those there."
    )
    card_figures: bool = HfArg(default=False, help="With --record, draw the card's figures: score histogram, ROC curve and example images.")
    num_maps: int = HfArg(default=20, help="How many images --save_maps writes.")
    baselines: bool = HfArg(
        default=False,
        help="Also the AUROC of mean intensity, contrast, pixel kNN and PCA residual, which a detector should beat (where one is far below .5, its "
        "opposite is above), and what remains of all when images are standardized or equalized (CLAHE) one by one. Takes the training images, too: "
        "give the data arguments of the training.",
    )


def load_for_evaluation(args, data_args: EvaluationDataArguments) -> tuple:
    """Loads what `args.model` and the data arguments name: the detector, its processor, the splits with `test` alone, and the seed and normal class that
    these were loaded with.

    Args:
        args: with `model`, `revision`, `seed` and `device`; the seed is by default the one recorded beside the model.
        data_args: normal class, window and slices are by default those that the detector was trained on, as is the group column where the test images of
            its training are drawn again; if that class is none of the labels, `default_normal_class` chooses one. Its `reading` becomes the one in use.

    Raises:
        InputError: what `load_detector` and `load_one_class` refuse, or a seed or group column that does not say which images the detector was not trained on.
    """
    check_ranges(args, {"seed": (0, 2**32)})
    results = recorded_results(args.model, args.revision)
    seed = _seed_of_draws(args, data_args.protocol, results)
    data_args.group_column = _group_column_of_draws(args, data_args, results)
    model, processor = load_detector(args.model, args.revision, args.device)
    data_args.read_as(processor)
    splits, normal_label = _load_test(data_args, seed, model.config.normal_label)
    _warn_of_other_training(splits, results, model.config.normal_label)
    return model, processor, splits, seed, normal_label


def _seed_of_draws(args, protocol: str, results: dict) -> int | None:
    """The seed that draws the images: as given, else the one that drew those of the training; None if nobody knows."""
    drawn = (results.get("division") or {}).get("seed")  # from Python the images may be drawn with another seed than the training's
    recorded = drawn if isinstance(drawn, int) else results.get("seed")
    seed = recorded if args.seed is None else args.seed
    if protocol == "balanced" and seed is None:
        raise InputError(
            "--protocol balanced drew the test images with the training run's seed, else they overlap with its own: give --seed"
        )
    if protocol == "balanced" and recorded not in (None, seed):
        raise InputError(
            f"{args.model} was trained with --seed {recorded}: with {seed} it would be tested on images that it was trained on"
        )
    return seed


def _group_column_of_draws(args, data_args: EvaluationDataArguments, results: dict) -> str | None:
    """The column by which the images are drawn: as given, else the one by which those of the training were drawn."""
    division, given = results.get("division") or {}, data_args.group_column
    if data_args.protocol != "balanced" or division.get("protocol") != "balanced":
        return given
    recorded = division.get("group_column")
    if given not in (None, recorded) and results.get("dataset") == dataset_label(data_args.dataset_name):
        how = "without --group_column" if recorded is None else f"with --group_column {recorded}"
        raise InputError(f"{args.model} was trained {how}: with {given} it would be tested on images that it was trained on")
    return given or recorded  # also of a list that goes by another name now


def _load_test(data_args: EvaluationDataArguments, seed: int | None, trained_on: str | None) -> tuple[OneClassSplits, str | None]:
    """The splits, and the normal class that they were loaded with: as given, else the detector's, or what stands in for it."""
    normal_label = data_args.normal_label or trained_on
    try:
        return load_splits(data_args, seed or 0, normal_label=normal_label, evaluation_only=True), normal_label
    except UnknownClassError as error:
        if data_args.normal_label:
            raise
        normal_label = default_normal_class(data_args.dataset_name, error.labels, ())
        if normal_label is None:
            raise InputError(f"{error}; say with --normal_label which of them is normal") from error
    return load_splits(data_args, seed or 0, normal_label=normal_label, evaluation_only=True), normal_label


def _warn_of_other_training(splits: OneClassSplits, results: dict, trained_on: str | None) -> None:
    """Warns of images that may have trained the detector, and of another normal class than its own."""
    here, there = splits.division.protocol, (results.get("division") or {}).get("protocol")
    same_test = there in (None, here) or {there, here} <= {"official", "stream"}
    if results.get("dataset") == dataset_label(splits.source) and not same_test:
        logger.warning(
            "The detector was trained on this dataset with --protocol %s: the test images of --protocol %s may be among those it was trained on",
            there,
            here,
        )
    if trained_on not in (None, "normal", splits.normal_label):  # "normal" are images without labels, too
        logger.warning("Normal is %r here, but the detector was trained on %r", splits.normal_label, trained_on)


def save_maps(model, processor, dataset, rows: list[int], folder: Path) -> None:
    """Writes these images with their maps over them as PNG files, named by rank, file (else row) and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(rows, 1):
        record = dataset[row]
        image = decode_image(record["image"], f"row {record['row']}", processor.window)
        found = Path(file_name(record["image"], f"row{record['row']}")).with_suffix("").as_posix()
        name = f"{rank:04d}_{shortened(found)}_{dataset.features['label'].int2str(record['label'])}.png"
        write_image(paint(model, processor, image), folder / name)


def rows_of_scores(model, dataset, scores: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    """The rows that `--scores` writes, one an image; `dataset` (unless it is a stream), scores (N,) and labels (N,) have the same order."""
    columns = {"image": range(len(scores)), "row": range(len(scores))}
    if hasattr(dataset, "__len__"):
        files = (value["path"] or row for value, row in zip(dataset["image"], dataset["row"], strict=True))
        columns = {"image": files, **{name: dataset[name] for name in ("row", "class_name") if name in dataset.column_names}}
    columns |= {"label": (("normal", "anomaly")[label] for label in labels.tolist()), "score": scores.tolist()}
    if model.calibration.is_calibrated:
        columns |= {"p_value": model.p_values(scores).tolist(), "flagged": model.is_anomalous(scores).tolist()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load_for_baselines(args, data_args: DataArguments, seed: int | None, normal_label: str | None) -> OneClassSplits:
    """The splits with the images that the detector's run trained on, as far as its record tells which.

    Args:
        seed, normal_label: as `load_for_evaluation` gives them.

    Raises:
        InputError: there are none, or no other images to test on.
    """
    if data_args.streaming:
        raise InputError("--baselines holds all images in memory, which --streaming is there to avoid: leave one of them out")
    try:
        splits = load_splits(data_args, seed or 0, normal_label=normal_label)
    except InputError as error:
        raise InputError(f"--baselines takes the training images, too: {error}") from error
    if splits.test_missing_reason:
        raise InputError(f"--baselines: besides the training images there is nothing to test on, {splits.test_missing_reason}")
    recorded, division = recorded_results(args.model, args.revision), splits.division
    there = {**recorded, **{name: value for name, value in (recorded.get("division") or {}).items() if value is not None}}
    here = {"dataset": dataset_label(splits.source), "num_train": len(splits.train), "seed": seed, "protocol": division.protocol}
    if not recorded:
        logger.warning("%s does not tell which images it was trained on: --baselines takes those of --seed %d", args.model, seed or 0)
    elif differing := [name for name in here if there.get(name) != here[name]]:
        told = ", ".join(f"{name} {here[name]} in place of {there.get(name)}" for name in differing)
        logger.warning("--baselines takes other images than the detector was trained on: %s", told)
    return splits


def _refuse_stream(flag: str, data_args: EvaluationDataArguments) -> None:
    if data_args.streaming:
        raise InputError(f"{flag} picks images out of the dataset, which --streaming does not keep: leave one of them out")


def _check_record(args: EvaluationArguments, data_args: EvaluationDataArguments) -> None:
    """Refuses before anything is scored what `--record` could not write.

    Raises:
        InputError: the model is no folder that can be written to, or its README is not UTF-8; or figures are asked for which cannot be drawn.
    """
    if args.card_figures and not args.record:
        raise InputError("--card_figures are the card's, which --record true alone writes: give it too, or leave them out")
    if args.card_figures:
        _refuse_stream("--card_figures", data_args)
    if args.record:
        data_args.refuse_given(
            ("window", "slice_axis", "central_slices"), "reads images otherwise than the detector's folder says, which --record writes into"
        )
        folder = Path(args.model)
        if not folder.is_dir():
            raise InputError(
                f"--record writes into the detector's folder, and {args.model!r} is none: give the folder, and push it afterwards"
            )
        check_output("--record", folder, folder=True)
        if (card := folder / "README.md").is_file():
            read_card(card)


def _record(args: EvaluationArguments, model, processor, splits: OneClassSplits, results: dict, scored: tuple) -> None:
    """Writes what was measured into the model's folder, in place of an earlier evaluation's results, figures and part of the card."""
    folder = Path(args.model)
    results = with_measurements(recorded_results(args.model), results)
    results |= bfloat16_agreement(model, prepare(splits.test, processor), args.batch_size)
    remove_figures(folder)  # first: an interruption must not leave them beside other results
    write_json(folder / "eval_results.json", results)
    if args.card_figures:
        draw_figures(folder, model, processor, splits.test, *scored)
    write_card(folder, model, results)
    logger.info("Recorded in %s: eval_results.json and README.md", folder)


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for help and card."""
    started = time.time()
    args, data_args = parse_arguments(EvaluationArguments, EvaluationDataArguments, description=__doc__, program=program, argv=argv)
    check_output("--output", args.output, apart_from=[data_args.dataset_name, args.scores])
    check_output("--scores", args.scores, suffixes=(".csv",), apart_from=[data_args.dataset_name])
    check_output("--save_maps", args.save_maps, folder=True, apart_from=[args.output, args.scores])
    _check_record(args, data_args)
    if not args.baselines:
        data_args.refuse_training_flags("is of the training images, which --baselines alone takes")
    model, processor, splits, seed, normal_label = load_for_evaluation(args, data_args)
    if args.save_maps is not None:
        check_overlay(model, "--save_maps", args.save_maps, [data_args.dataset_name])
        _refuse_stream("--save_maps", data_args)
        if args.num_maps < 1:
            raise InputError(f"--num_maps must be at least 1, got {args.num_maps}")

    if args.record and splits.test_missing_reason:
        raise InputError(f"--record: there is nothing to measure on, {splits.test_missing_reason}")
    whole = load_for_baselines(args, data_args, seed, normal_label) if args.baselines else None  # refused before anything is scored

    def score(dataset):
        return model.score(DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate))

    results, scored = evaluate_detector(model, processor, splits, score, batch_size=args.batch_size)
    if whole is not None:
        results["baselines"] = compare_with_baselines(model, processor, whole.train, whole.test, batch_size=args.batch_size)
    text = json.dumps({**results, "seconds": round(time.time() - started, 1)}, indent=2, sort_keys=True, allow_nan=False)
    if args.output is not None:
        write_output(args.output, f"{text}\n")
    print(text)
    if args.scores is not None and scored is not None:  # what follows comes last, so that a full disk costs no results
        write_output(args.scores, csv_text(rows_of_scores(model, splits.test, *scored)))
    if args.save_maps is not None and scored is not None:
        scores = scored[0]
        save_maps(model, processor, splits.test, scores.topk(min(args.num_maps, len(scores))).indices.tolist(), Path(args.save_maps))
    if args.record:
        if results["auroc"] is None:  # of a stream it is not known before
            raise InputError(f"--record: nothing was measured, {results['reason']}")
        _record(args, model, processor, splits, results, scored)
