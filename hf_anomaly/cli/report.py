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
    from ..report.command import main

    main(argv, program="hf-anomaly report")
