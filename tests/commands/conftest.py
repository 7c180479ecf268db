"""A tiny detector, trained by the scripts."""

import pytest
import torch

from hf_anomaly import SmallResNetBackbone, SmallResNetConfig

from .running import run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A narrow encoder, for speed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    SmallResNetBackbone(SmallResNetConfig(hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(backbone):
    """Trains a tiny detector and returns its folder and what was printed; the errors where another exit status is expected."""

    def train(folder, *argv, script="train_dia.py", status=0):
        options = [
            "--max_steps",
            4,
            "--per_device_train_batch_size",
            8,
            "--report_to",
            "none",
            "--use_cpu",
            "true",
            "--disable_tqdm",
            "true",
        ]
        if script == "train_dia.py":
            dissolver = argv[argv.index("--dissolver") + 1] if "--dissolver" in argv else "diffusion"
            options += [] if dissolver == "none" else ["--dissolved_variants", 2]
            if dissolver == "diffusion":
                options += ["--dissolver_steps", 4, "--dissolver_batch_size", 8, "--dissolver_max_timestep", 300]
            options += [] if "--backbone" in argv or any("colour" in str(value) for value in argv) else ["--backbone", backbone]
        found, out, err = run(script, "--output_dir", folder, *options, *argv)
        assert found == status, err
        return folder, err if status else out

    return train
