"""`hf-anomaly evaluate MODEL …`"""

from ..parsing import model_first

HELP = """usage: hf-anomaly evaluate MODEL --dataset_name IMAGES [--normal_label NAME] [--output FILE.json] [--scores FILE.csv] [--record true] …

Scores labelled images and prints AUROC, average precision and more as JSON.

  MODEL                   folder or Hub id of a detector
  --dataset_name IMAGES   a folder test/normal, test/other, …; a Hub dataset; an .npz, .parquet or .csv file
  --scores FILE.csv       a table of the images: file, class, label, score, p-value, flagged
  --record true           write the results into MODEL, a folder: its eval_results.json and card, in place of those there
  --save_maps FOLDER      the highest-scoring images with their maps over them
  --baselines true        trivial scores beside it, and what remains of all on contrast-normalised images; needs the training images, too

  hf-anomaly evaluate --help all   lists all options
"""


def parse(argv: list[str]) -> list[str]:
    return model_first(argv, HELP)


def run(argv: list[str]) -> None:
    from ..training.commands.evaluate import main

    main(argv, program="hf-anomaly evaluate")
