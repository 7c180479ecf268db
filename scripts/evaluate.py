"""Scores a dataset with a saved detector and writes the same JSON as training does, but for the facts of the training.

The split hash covers the evaluated rows alone: no training data is needed, but for --baselines.

python scripts/evaluate.py --model runs/dia-digits --dataset_name digits
"""

import sys

from hf_anomaly.cli.running import run_script
from hf_anomaly.training.commands.evaluate import main

if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:], program="scripts/evaluate.py"))
