"""Runs a table of a paper, cell by cell, and sets the results beside the paper's numbers. Run again, it goes on where it was.

python scripts/reproduce.py --table shared_ae/2 --data_dir path/to/data --budget laptop
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.hf_argparser import HfArg

from hf_anomaly.cli.running import run_script
from hf_anomaly.errors import InputError
from hf_anomaly.files import check_output
from hf_anomaly.reproduction import (
    Selection,
    calibration_study,
    describe,
    find_figure,
    find_table,
    run_table,
    write_figure,
    write_table,
)
from hf_anomaly.training import parse_arguments


@dataclass
class ReproduceArguments:
    """Which table or figure, which cells of it, and for how long."""

    table: str | None = HfArg(default=None, help="Its id, such as shared_ae/1, or calibration; an unknown one lists all.")
    figure: str | None = HfArg(
        default=None,
        help="A picture instead, such as dia/1, or roc/dia/1 for the ROC curves of a table that has run; an unknown one lists all.",
    )
    data_dir: str | None = HfArg(
        default=None,
        help="Folder with the datasets: pneumoniamnist.npz, fashion-mnist/, mnist/ and so on. Default: $HF_ANOMALY_DATA_DIR, or else the Hub "
        "where it has them.",
    )
    datasets: list[str] | None = HfArg(default=None, help="Run these of the table's datasets only; a figure shows any that there are.")
    methods: list[str] | None = HfArg(default=None, help="Run these of the table's methods only.")
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2],
        help="Seeds of initialisation, batches and random splits; calibration and galleries take the first.",
    )
    budget: str = HfArg(default="laptop", help="smoke: seconds, to see it run; laptop: up to three minutes a cell; paper.")
    shard: str = HfArg(default="1/1", help="i/n: run every n-th cell, from the i-th on. Several machines can share a folder.")
    dry_run: bool = HfArg(default=False, help="Only list the cells, and how each stands.")
    plot: bool = HfArg(default=True, help="Draw the table if it is a curve; needs matplotlib.")
    output_dir: str = HfArg(default="runs/reproduce", help="Where results and tables go.")


def main() -> None:
    (args,) = parse_arguments(ReproduceArguments, description=__doc__)
    # Asked first without the flag, each of several processes on a CPU is told that it is alone.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if (args.table is None) == (args.figure is None):
        raise InputError("give --table or --figure, such as --table dia/1")
    if (args.figure is not None or args.table == calibration_study.TABLE) and (args.dry_run or args.shard != "1/1"):
        raise InputError("--dry_run and --shard are of a paper's tables: leave them out for a figure and for calibration")
    if not args.dry_run:
        check_output("--output_dir", args.output_dir, folder=True)
    selection = Selection(
        output_dir=Path(args.output_dir),
        datasets=None if args.datasets is None else tuple(args.datasets),
        methods=None if args.methods is None else tuple(args.methods),
        seeds=tuple(args.seeds),
        budget=args.budget,
        shard=args.shard,
        data_dir=args.data_dir,
    )
    command = ["scripts/reproduce.py", *sys.argv[1:]]
    if args.table == calibration_study.TABLE:
        files = study(args).run(command)
    elif args.figure is not None:
        files = write_figure(find_figure(args.figure), selection, command)
    else:
        table = find_table(args.table)
        if args.dry_run:
            print(describe(table, selection))
            return
        run_table(table, selection, command)
        files = write_table(table, selection, command, draw=args.plot) if PartialState().is_main_process else []
    if PartialState().is_main_process:
        if args.figure is None:
            print(files[0].read_text(encoding="utf-8"))
        print(*(f"saved: {path}" for path in files), sep="\n")


def study(args: ReproduceArguments) -> calibration_study.CalibrationStudy:
    """The table that no paper has: are the false-alarm rates those that were asked for?"""
    return calibration_study.CalibrationStudy(
        output_dir=Path(args.output_dir),
        data_dir=args.data_dir,
        datasets=tuple(args.datasets or calibration_study.DATASETS),
        detectors=tuple(args.methods or calibration_study.DETECTORS),
        budget=args.budget,
        seed=args.seeds[0],
    )


if __name__ == "__main__":
    run_script(main)
