"""`hf-anomaly evaluate MODEL …`"""

import sys

HELP = """usage: hf-anomaly evaluate MODEL --dataset_name IMAGES [--normal_label NAME] [--output FILE.json] [--save_maps FOLDER] …

Scores labelled images and prints AUROC, average precision and more as JSON.

  MODEL                   folder or Hub id of a detector
  --dataset_name IMAGES   a folder test/normal, test/other, …; a Hub dataset; an .npz or .parquet file

  hf-anomaly evaluate --help all   lists all options
"""


def parse(argv: list[str]) -> list[str]:
    if not argv or argv in (["-h"], ["--help"]):
        print(HELP, end="")
        sys.exit()
    if argv == ["--help", "all"]:
        return ["--help"]
    return argv if argv[0].startswith("-") else ["--model", *argv]


def run(argv: list[str]) -> None:
    from ..training.commands.evaluate import main

    main(argv, program="hf-anomaly evaluate")
