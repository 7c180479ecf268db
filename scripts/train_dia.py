"""Trains DIA (or CSI, with --dissolver none): dissolver, detector, reference, calibration, evaluation, card.

accelerate launch scripts/train_dia.py --dataset_name path/to/images --output_dir runs/mine
"""

import sys

from hf_anomaly.cli.running import run_script
from hf_anomaly.training.commands.train_dia import main

if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:], program="accelerate launch scripts/train_dia.py"))
