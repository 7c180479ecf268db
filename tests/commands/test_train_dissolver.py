"""train_dissolver.py."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from .running import run


def test_train_dissolver(train, tmp_path):
    from diffusers import DDPMPipeline, UNet2DModel

    options = ["--block_out_channels", 8, 8, "--save_steps", 2, "--save_total_limit", 3, "--t_max", 99]
    folder, out = train(tmp_path / "dissolver", *options, script="train_dissolver.py")
    assert f"saved: {folder}\n" in out
    assert re.search(
        r"on \d+ held-out images:\n  timestep 30, noise \S+, denoising_error \S+, ringing \S+, removed \S+\n(  timestep .*\n){4}", out
    )
    assert UNet2DModel.from_pretrained(folder, subfolder="unet").config.sample_size == 8
    assert DDPMPipeline.from_pretrained(folder).scheduler.config.beta_schedule == "squaredcos_cap_v2"
    config = json.loads((folder / "dissolver_config.json").read_text())
    assert (config["t_max"], config["training"]["steps"], config["training"]["num_images"]) == (99, 4, 114)

    resumed, _ = train(tmp_path / "resumed", *options, "--resume_from_checkpoint", folder / "checkpoint-2", script="train_dissolver.py")
    weights = [load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (folder, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("resolution", "batch_size"), [(16, 32), (32, 16)])
def test_larger_images_are_fewer_a_step(tmp_path, resolution, batch_size):
    options = ["--image_size", 32, "--resolution", resolution, "--block_out_channels", 8, 8, "--max_steps", 1, "--save_strategy", "no"]
    status, _, err = run("train_dissolver.py", "--output_dir", tmp_path, *options, "--report_to", "none", "--use_cpu", "true")
    assert status == 0, err
    assert json.loads((tmp_path / "dissolver_config.json").read_text())["training"]["batch_size"] == batch_size


def test_a_training_that_diverges_saves_nothing(train, tmp_path):
    options = ["--block_out_channels", 8, 8, "--learning_rate", 1e30]
    folder, err = train(tmp_path / "run", *options, script="train_dissolver.py", status=2)
    assert re.fullmatch(r"error: .* not finite: take a lower learning rate than 1e\+30", err.splitlines()[-1])
    assert not (folder / "dissolver_config.json").exists()


@pytest.mark.parametrize(("flag", "value"), [("learning_rate", 0.01), ("gradient_accumulation_steps", 2), ("data_seed", 5)])
def test_resume_refuses_another_optimization(train, tmp_path, flag, value):
    """The optimizer of the checkpoint would not take it up, but the card would tell it."""
    options = ["--block_out_channels", 8, 8]
    folder, _ = train(tmp_path / "run", *options, script="train_dissolver.py")
    more = [f"--{flag}", value, "--max_steps", 6, "--resume_from_checkpoint", "true"]
    _, err = train(folder, *options, *more, script="train_dissolver.py", status=2)
    assert f"checkpoint-4 belongs to another run (optimization.{flag} was " in err.splitlines()[-1]
