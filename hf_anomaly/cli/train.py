"""`hf-anomaly train METHOD …`"""

import os
import subprocess
import sys
from importlib import import_module

from ..errors import InputError

METHODS = {  # name -> (module in training.commands, what it is)
    "dia": ("train_dia", "DIA: contrastive, against a dissolved twin of each image (or CSI: --dissolver none); scores"),
    "shared_ae": ("train_shared_ae", "SharedAE: two decoders that share two encoders; scores and maps"),
    "addp": ("train_addp", "ADDP: pretrained by denoising, then reconstructs; scores and maps"),
    "dissolver": ("train_dissolver", "only the diffusion model that DIA dissolves with"),
}

HELP = f"""usage: hf-anomaly train METHOD [--dataset_name IMAGES] [--output_dir FOLDER] [--num_processes N] …

Learns from normal images. The folder that it writes holds all that scoring needs, and a card.

{"".join(f"  {name:11}{what}{chr(10)}" for name, (_, what) in METHODS.items())}
  --dataset_name IMAGES   a folder of normal images, a Hub dataset, an .npz, .parquet or .csv file; by default scikit-learn's digits
  --output_dir FOLDER     where the detector goes; by default under runs/
  --num_processes N       train in N processes, one a GPU, through accelerate

  hf-anomaly train METHOD --help   lists all options of a method

For what accelerate alone can do (several machines, DeepSpeed, …): accelerate launch -m hf_anomaly.cli train METHOD …
"""


def parse(argv: list[str]) -> tuple[str, list[str], int]:
    """(method, its arguments, number of processes)"""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        sys.exit()
    method, rest = argv[0], list(argv[1:])
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: the methods are {', '.join(METHODS)}; give it first, before the options")
    processes = "1"
    for i, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag in ("--num_processes", "--num-processes"):
            processes = value if equals else "".join(rest[i + 1 : i + 2])
            del rest[i : i + (1 if equals else 2)]
            break
    if not processes.isdecimal() or int(processes) < 1:
        raise InputError(f"--num_processes must be a whole number of at least 1, got {processes!r}")
    return method, rest, int(processes)


def run(arguments: tuple[str, list[str], int]) -> None:
    method, argv, processes = arguments
    if processes > 1:
        command, variables = launcher(processes)
        sys.exit(subprocess.run([*command, "train", method, *argv], env={**os.environ, **variables}).returncode)
    import_module(f"...training.commands.{METHODS[method][0]}", __name__).main(argv, program=f"hf-anomaly train {method}")


def launcher(processes: int) -> tuple[list[str], dict[str, str]]:
    """What comes before this program's arguments to run it in several processes, and further environment variables."""
    import torch

    # --multi_gpu also without GPUs: with --cpu accelerate would start a single process there.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_anomaly.cli"]
    return command, {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
