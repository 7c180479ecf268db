"""The scripts as a user runs them, mostly within this process, as another takes seconds to import everything; images and folders for them."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file
from transformers import ResNetBackbone, ResNetConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"
METRICS = ("auroc", "average_precision", "fpr_at_95_tpr")


def run(script, *argv):
    """(exit status, stdout, stderr) of a script."""
    out, err = io.StringIO(), io.StringIO()
    status, before = 0, sys.argv
    sys.argv = [script, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as exit:
        status = exit.code or 0
    finally:
        sys.argv = before
    return status, out.getvalue(), err.getvalue()


def refused(script, argv, culprit, output_dir):
    """Exit status 2, one line that names the culprit, nothing half-written."""
    status, out, err = run(script, *argv)
    assert status == 2, (status, out, err)
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert culprit in last
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1
    assert "Traceback" not in err
    assert "usage:" not in err
    assert out == ""
    if output_dir.exists():  # Trainer makes it at once; a dissolver in it is whole
        assert not {path.name for path in output_dir.iterdir()} - {"dissolver"}


def results_of(folder):
    return json.loads((folder / "eval_results.json").read_text())


def training_arguments(folder):
    return json.loads(next(folder.glob("checkpoint-*/training_args.json")).read_text())


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def class_folders(root, counts, size=8):
    """{"train/good": 12} → root/train/good/0.png …"""
    for seed, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / name / f"{i}.png", pixels(100 * seed + i, size, size))
    return root


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resnet(folder):
    ResNetBackbone(ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")).save_pretrained(
        folder / "resnet"
    )
    return folder / "resnet"
