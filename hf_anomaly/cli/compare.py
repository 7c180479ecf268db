"""`hf-anomaly compare MODEL …`"""

import json
import logging
from argparse import Namespace
from pathlib import Path

from ..errors import InputError
from ..files import check_output, csv_text, write_output
from ..parsing import Parser

logger = logging.getLogger(__name__)


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly compare",
        "Puts the results of trained detectors into one table: a row for each method and its settings, mean ± standard deviation over the seeds.",
    )
    parser.add_argument("models", nargs="+", metavar="model", help="folders that training wrote, or Hub ids")
    parser.option(
        "baselines", "what evaluate --baselines true --output wrote: the trivial scores' rows", nargs="+", default=[], metavar="FILE.json"
    )
    parser.option("output", "also write the table to this file: .md, or .csv or .json for all digits")
    args = parser.parse(argv)
    check_output("--output", args.output, suffixes=(".md", ".csv", ".json"), apart_from=args.baselines)
    return args


def run(args: Namespace) -> None:
    from ..report import compare_runs, comparison_markdown, read_baselines, read_run

    baselines = [run for file in args.baselines for run in read_baselines(file)]
    runs = []
    for model in args.models:
        try:
            runs.append(read_run(model))
        except InputError as error:  # runs/* may hold other things
            if len(args.models) == 1:
                raise
            logger.warning("Left out: %s", error)
    if not runs:
        raise InputError("none of these was evaluated: give folders that training with labelled test images wrote")
    rows = compare_runs([*runs, *baselines])
    text = comparison_markdown(rows)
    if args.output is not None:
        content = {".md": lambda: f"{text}\n", ".csv": lambda: _csv(rows), ".json": lambda: f"{json.dumps(rows, indent=2)}\n"}
        write_output(args.output, content[Path(args.output).suffix.lower()]())
    print(text)


def _csv(rows: list[dict]) -> str:
    return csv_text(
        {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}
        | {"seeds": " ".join(map(str, row["seeds"]))}
        for row in rows
    )
