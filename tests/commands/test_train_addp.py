"""train_addp.py: both stages."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from .running import class_folders, equal, pixels, refused, results_of, run, save, weights

ADDP = ["--hidden_sizes", 4, 6, "--pretrain_steps", 4, "--pretrain_batch_size", 8]


@pytest.fixture(scope="module")
def addp(tmp_path_factory, train):
    argv = ["--latent_size", 3, "--noise", "simplex", "--noise_level", 0.3, "--noise_resolution", 2, "--map_filter_size", 3]
    folder = tmp_path_factory.mktemp("addp") / "run"
    return train(folder, *ADDP, *argv, "--save_steps", 2, "--save_total_limit", 2, script="train_addp.py")


def test_train_addp(addp):
    folder, out = addp
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "modeling_hf_anomaly.py", "README.md", "eval_results.json", "pretrained",
    }  # fmt: skip
    assert f"auroc: {results_of(folder)['auroc']}\n" in out
    model = AutoModel.from_pretrained(folder)
    config = model.config
    assert (type(model).__name__, config.encoder, config.hidden_sizes, config.latent_size) == ("ADDPModel", "unet", [4, 6], 3)
    assert (config.noise, config.noise_level, config.noise_resolution, config.map_filter_size) == ("simplex", 0.3, 2, 3)
    assert config.num_reference_images == 114
    status, out, err = run("evaluate.py", "--model", folder, "--dataset_name", "digits")
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results_of(folder)["auroc"])


def test_zero_is_a_value(train, tmp_path):
    train(tmp_path / "run", *ADDP, "--noise_level", 0, "--max_steps", 1, script="train_addp.py")
    assert AutoModel.from_pretrained(tmp_path / "run").config.noise_level == 0
    _, err = train(tmp_path / "other", *ADDP, "--latent_size", 0, script="train_addp.py", status=2)
    assert "latent_size" in err.splitlines()[-1]


def test_the_first_stage_of_addp_stands_alone(addp, train, tmp_path):
    folder = addp[0] / "pretrained"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "modeling_hf_anomaly.py", "README.md", "pretraining.json",
    }  # fmt: skip
    assert "114 images of `digits`" in (folder / "README.md").read_text()
    notes = json.loads((folder / "pretraining.json").read_text())
    assert (notes["steps"], notes["num_images"], notes["run"]["config"]["noise"]) == (4, 114, "simplex")
    assert type(AutoModelForPreTraining.from_pretrained(folder)).__name__ == "ADDPForPreTraining"
    assert not AutoModel.from_pretrained(folder).is_fitted
    # The second stage starts there: it hardly moves. Other data, another size.
    argv = ["--pretrained", folder, "--learning_rate", 1e-9, "--ema_decay", 0, "--image_size", 12, "--freeze_encoder"]
    again, _ = train(tmp_path / "again", *argv, script="train_addp.py")
    assert not (again / "pretrained").exists()
    trained, before = weights(again), weights(folder)
    assert all(torch.equal(trained[name], value) for name, value in before.items() if name.startswith("encoder."))
    torch.testing.assert_close(trained["decoder.head.weight"], before["decoder.head.weight"], rtol=1e-4, atol=1e-6)
    assert not equal(before, {name: value for name, value in weights(addp[0]).items() if name in before})


@pytest.mark.parametrize("trained_before", ["", "pretrained"])
def test_a_first_stage_of_another_division_is_told(addp, train, tmp_path, caplog, trained_before):
    argv = ["--pretrained", addp[0] / trained_before]
    train(tmp_path / "same", *argv, script="train_addp.py")
    assert "another division" not in caplog.text
    train(tmp_path / "other", *argv, "--seed", 7, script="train_addp.py")
    assert "on another division of digits" in caplog.text


def test_addp_goes_on_with_the_decoder_alone(addp, train, tmp_path):
    data = class_folders(tmp_path / "others", {"train/cats": 8, "train/dogs": 9})
    argv = ["--pretrained", addp[0] / "pretrained", "--pretrain_mode", "decoder", "--pretrain_epochs", 2, "--pretrain_batch_size", 8]
    folder, out = train(tmp_path / "run", *argv, "--pretrain_only", "--pretrain_dataset_name", data, script="train_addp.py")
    assert out.splitlines()[-1] == f"saved: {folder / 'pretrained'}"
    assert [path.name for path in folder.iterdir()] == ["pretrained"]
    notes = json.loads((folder / "pretrained" / "pretraining.json").read_text())
    assert (notes["steps"], notes["num_images"], notes["run"]["pretraining"]["pretrain_dataset_name"]) == (4, 17, "others")
    after, before = weights(folder / "pretrained"), weights(addp[0] / "pretrained")
    assert {name.split(".")[0] for name in before if torch.equal(before[name], after[name])} == {"encoder"}
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))


def test_images_of_many_bits_and_any_size_pretrain(train, tmp_path):
    for i in range(10):
        save(tmp_path / "deep" / f"{i}.png", pixels(i, 24, 24).astype(np.uint16) * 257)
    argv = ["--dataset_name", tmp_path / "deep", "--pretrain_dataset_name", tmp_path / "deep", "--image_size", 8]
    _, err = train(tmp_path / "refused", *ADDP, *argv, script="train_addp.py", status=2)
    assert "16-bit" in err.splitlines()[-1]
    folder, _ = train(tmp_path / "run", *ADDP, *argv, "--window", 0, 65535, "--pretrain_only", script="train_addp.py")
    assert json.loads((folder / "pretrained" / "pretraining.json").read_text())["num_images"] == 8, "two calibrate"


def test_addp_resumes_either_stage(addp, train, tmp_path):
    argv = [*ADDP, "--latent_size", 3, "--noise", "simplex", "--noise_level", 0.3, "--noise_resolution", 2, "--map_filter_size", 3]
    whole = weights(addp[0])
    shutil.copytree(addp[0], tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "checkpoint-4")
    pretrained = (tmp_path / "second" / "pretrained" / "pretraining.json").stat().st_mtime_ns
    folder, _ = train(tmp_path / "second", *argv, "--resume_from_checkpoint", "true", script="train_addp.py")
    assert equal(weights(folder), whole)
    assert (folder / "pretrained" / "pretraining.json").stat().st_mtime_ns == pretrained
    folder, _ = train(tmp_path / "nothing yet", *argv, "--resume_from_checkpoint", "true", script="train_addp.py")
    assert equal(weights(folder), whole)
    status, _, err = run("train_addp.py", "--output_dir", folder, *argv, "--pretrain_learning_rate", 1, "--resume_from_checkpoint", "true")
    assert status == 2
    assert "belongs to another run" in err.splitlines()[-1]


@pytest.mark.parametrize("encoder", ["segnet", "backbone"])
def test_encoders_of_addp(train, tmp_path, backbone, encoder):
    argv = ["--encoder", backbone if encoder == "backbone" else encoder, "--hidden_sizes", 4, 6, "--pretrain_steps", 0]
    argv += ["--learning_rate", 1e-9, "--ema_decay", 0, "--freeze_encoder"]
    folder, _ = train(tmp_path / "run", *argv, script="train_addp.py")
    assert AutoModel.from_pretrained(folder).config.encoder == encoder
    assert not (folder / "pretrained").exists()
    if encoder == "backbone":
        trained, before = weights(folder), load_file(backbone / "model.safetensors")
        assert all(torch.equal(trained[f"encoder.backbone.{name}"], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--pretrain_steps", 3, "--pretrain_epochs", 1], "--pretrain_steps and --pretrain_epochs"),
        (["--pretrain_steps", -1], "--pretrain_steps must"),
        (["--pretrain_mode", "encoder"], "encoder"),
        (["--noise", "salt"], "salt"),
        (["--encoder", "no-such-encoder"], "no-such-encoder"),
        (["--pretrained", "no-such-folder"], "no-such-folder"),
        (["--pretrained", "{addp}", "--latent_size", 5], "--latent_size comes with"),
        (["--pretrained", "{addp}", "--num_channels", 3], "--num_channels 1"),
        (["--pretrained", "{backbone}"], "SmallResNetConfig"),
        (["--attention_gates"], "skip_connections"),
    ],
)
def test_what_train_addp_refuses(addp, backbone, tmp_path, wrong, words):
    wrong = [str(word).format(addp=addp[0] / "pretrained", backbone=backbone) for word in wrong]
    refused("train_addp.py", ["--output_dir", tmp_path / "run", "--use_cpu", "true", *wrong], words, tmp_path / "run")


def test_a_folder_that_is_no_first_stage_stays(train, tmp_path):
    own = tmp_path / "pretrained" / "own.bin"
    own.parent.mkdir()
    own.write_bytes(b"own")
    _, err = train(tmp_path, "--pretrain_steps", 2, script="train_addp.py", status=2)
    assert f"{own.parent} holds something else" in err
    train(tmp_path, "--pretrain_steps", 0, script="train_addp.py")
    assert own.read_bytes() == b"own"
