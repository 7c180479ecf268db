"""`hf-anomaly calibrate MODEL …`"""

from ..parsing import model_first

HELP = """usage: hf-anomaly calibrate MODEL --dataset_name IMAGES --output_dir FOLDER [--false_positive_rate RATE] …

Calibrates a detector with normal images of the place where it is used, and saves it: threshold and p-values then hold for images like these. What it
has learnt stays as it is.

  MODEL                   folder or Hub id of a detector
  --dataset_name IMAGES   normal images that it was not trained on: a folder; a Hub dataset; an .npz, .parquet or .csv file. Of labelled ones the
                          normal images are taken: of the split 'calibration', or else of the training split
  --output_dir FOLDER     where the calibrated detector goes. It may be MODEL: results there no longer hold and are taken out

  hf-anomaly calibrate --help all   lists all options
"""


def parse(argv: list[str]) -> list[str]:
    return model_first(argv, HELP)


def run(argv: list[str]) -> None:
    from ..training.commands.calibrate import main

    main(argv, program="hf-anomaly calibrate")
