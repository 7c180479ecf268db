"""Writes a page on how a saved detector does on a dataset."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..data import load_unlabelled
from ..data.sources import dataset_label
from ..errors import InputError
from ..files import check_output
from ..loading import load_detector
from ..training import EvaluationDataArguments, parse_arguments
from ..training.arguments import ScoringArguments
from ..training.commands.evaluate import load_for_evaluation
from .writing import write_report


@dataclass(kw_only=True)
class ReportArguments(ScoringArguments):
    """What the page is on."""

    output: str = HfArg(default="report.html", help="The page.")
    unlabelled: bool = HfArg(default=False, help="Take the labels of the images, if any, for unknown.")
    num_examples: int = HfArg(default=6, help="Images in each row of examples.")
    seed: int | None = HfArg(default=None, help="Seed of the training run, for --protocol balanced. Default: as recorded beside the model.")


def _load_unlabelled(args: ReportArguments, data_args: EvaluationDataArguments) -> tuple:
    """The detector, its processor, and images whose labels nobody looks at."""
    model, processor = load_detector(args.model, args.revision, args.device)
    data_args.read_as(processor)
    dataset = load_unlabelled(
        data_args.dataset_name,
        image_column=data_args.image_column,
        config_name=data_args.dataset_config_name,
        revision=data_args.dataset_revision,
        reading=data_args.reading,
        split=data_args.eval_split,
    )
    return model, processor, dataset


def main(argv: list[str], program: str) -> None:
    """Runs the command line `argv`; `program` is what comes before it, for the help."""
    args, data_args = parse_arguments(ReportArguments, EvaluationDataArguments, description=__doc__, program=program, argv=argv)
    if data_args.streaming:
        raise InputError("the page shows images out of the dataset, which --streaming does not keep: leave it out")
    check_output("--output", args.output, apart_from=[data_args.dataset_name])
    data_args.refuse_training_flags("is of the training images, which the page does not show")
    split_hash = None
    if args.unlabelled:
        data_args.refuse_given(("protocol", "label_column", "normal_label"), "says who is normal, which --unlabelled takes for unknown")
        model, processor, dataset = _load_unlabelled(args, data_args)
    else:
        model, processor, splits, *_ = load_for_evaluation(args, data_args)
        dataset, split_hash = splits.test, splits.split_hash
    path = write_report(
        model,
        processor,
        dataset,
        args.output,
        has_labels=not args.unlabelled,
        title=dataset_label(args.model),
        data_name=dataset_label(data_args.dataset_name),
        split_hash=split_hash,
        num_examples=args.num_examples,
        batch_size=args.batch_size,
    )
    print(f"saved: {path}")
