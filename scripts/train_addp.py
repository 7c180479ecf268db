"""Trains ADDP: denoising pretraining, then detector, reference, calibration, evaluation, card.

accelerate launch scripts/train_addp.py --dataset_name path/to/images --output_dir runs/mine
"""

import sys

from hf_anomaly.training.commands.train_addp import main
from hf_anomaly.training.runs import run_script

if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:], program="accelerate launch scripts/train_addp.py"))
