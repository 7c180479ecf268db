"""`hf-anomaly evaluate MODEL …`"""

from .parsing import model_first

HELP = """usage: hf-anomaly evaluate MODEL --dataset_name IMAGES [--normal_label NAME] [--output FILE.json] [--save_maps FOLDER] …

Scores labelled images and prints AUROC, average precision and more as JSON.

  MODEL                   folder or Hub id of a detector
  --dataset_name IMAGES   a folder test/normal, test/other, …; a Hub dataset; an .npz, .parquet or .csv file
  --baselines true        trivial scores beside it, and what remains of all on contrast-normalised images; needs the training images, too

  hf-anomaly evaluate --help all   lists all options
"""


def parse(argv: list[str]) -> list[str]:
    return model_first(argv, HELP)


def run(argv: list[str]) -> None:
    from ..training.commands.evaluate import main

    main(argv, program="hf-anomaly evaluate")
