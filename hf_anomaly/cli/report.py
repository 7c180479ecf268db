"""`hf-anomaly report MODEL …`"""

from ..parsing import model_first

HELP = """usage: hf-anomaly report MODEL --dataset_name IMAGES [--normal_label NAME] [--output report.html] [--unlabelled true] …

Writes one HTML page on how a detector does: metrics, ROC and precision-recall curves, score histogram, thresholds for several false-positive
rates, and the images that it is surest and most wrong about, with their anomaly maps. The page shows images: look whether you may pass them on.

  MODEL                   folder or Hub id of a detector
  --dataset_name IMAGES   a folder test/normal, test/other, …; a Hub dataset; an .npz, .parquet or .csv file
  --unlabelled true       nobody knows which of the images are normal: scores and examples alone

  hf-anomaly report --help all   lists all options
"""


def parse(argv: list[str]) -> list[str]:
    return model_first(argv, HELP)


def run(argv: list[str]) -> None:
    from dataclasses import dataclass, field

    from ..data import load_unlabelled
    from ..data.sources import dataset_label
    from ..errors import InputError
    from ..files import check_output
    from ..loading import load_detector
    from ..report import write_report
    from ..training import EvaluationDataArguments, parse_arguments
    from ..training.arguments import ScoringArguments
    from ..training.commands.evaluate import load_for_evaluation

    @dataclass(kw_only=True)
    class ReportArguments(ScoringArguments):
        """What the page is on."""

        output: str = field(default="report.html", metadata={"help": "The page."})
        unlabelled: bool = field(default=False, metadata={"help": "Take the labels of the images, if any, for unknown."})
        num_examples: int = field(default=6, metadata={"help": "Images in each row of examples."})
        seed: int | None = field(
            default=None, metadata={"help": "Seed of the training run, for --protocol balanced. Default: as recorded beside the model."}
        )

    args, data_args = parse_arguments(ReportArguments, EvaluationDataArguments, description=HELP, program="hf-anomaly report", argv=argv)
    if data_args.streaming:
        raise InputError("the page shows images out of the dataset, which --streaming does not keep: leave it out")
    check_output("--output", args.output, apart_from=[data_args.dataset_name])
    data_args.refuse_training_flags("is of the training images, which the page does not show")
    if args.unlabelled:
        data_args.refuse_given(("protocol", "label_column", "normal_label"), "says who is normal, which --unlabelled takes for unknown")
    about = {"data_name": dataset_label(data_args.dataset_name), "has_labels": not args.unlabelled}
    if args.unlabelled:
        model, processor = load_detector(args.model, args.revision, args.device)
        data_args.read_as(processor)
        options = {"reading": data_args.reading, "image_column": data_args.image_column, "config_name": data_args.dataset_config_name}
        options["split"] = data_args.eval_split
        dataset = load_unlabelled(data_args.dataset_name, revision=data_args.dataset_revision, **options)
    else:
        model, processor, splits, *_ = load_for_evaluation(args, data_args)
        dataset, about["split_hash"] = splits.test, splits.split_hash
    path = write_report(
        model,
        processor,
        dataset,
        args.output,
        num_examples=args.num_examples,
        batch_size=args.batch_size,
        title=dataset_label(args.model),
        **about,
    )
    print(f"saved: {path}")
