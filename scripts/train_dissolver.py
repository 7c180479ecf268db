"""Trains a diffusion model on normal images, to dissolve with: a DDPMPipeline folder that diffusers loads.

accelerate launch scripts/train_dissolver.py --dataset_name path/to/images --output_dir runs/dissolver
"""

import sys

from hf_anomaly.cli.running import run_script
from hf_anomaly.training.commands.train_dissolver import main

if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:], program="accelerate launch scripts/train_dissolver.py"))
