"""The scripts as a user runs them: mostly within this process, as another takes seconds to import everything."""

import contextlib
import io
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, ResNetBackbone, ResNetConfig

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SmallResNetBackbone, SmallResNetConfig
from hf_anomaly.data import decode_image, load_one_class

SCRIPTS = Path(__file__).parents[1] / "scripts"
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


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A narrow encoder, for speed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    SmallResNetBackbone(SmallResNetConfig(hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(backbone):
    """Trains a tiny detector and returns its folder."""

    def train(folder, *argv, script="train_dia.py"):
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
            options += ["--dissolver_steps", 4, "--dissolved_variants", 2, "--dissolver_batch_size", 8, "--dissolver_max_timestep", 300]
            options += [] if "--backbone" in argv or any("colour" in str(value) for value in argv) else ["--backbone", backbone]
        status, out, err = run(script, "--output_dir", folder, *options, *argv)
        assert status == 0, err
        return folder, out

    return train


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


# train_dia.py and evaluate.py


@pytest.fixture(scope="module")
def digits(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("digits") / "dia")


def test_digits_gives_all_that_is_promised(digits):
    folder, out = digits
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {
        "config.json", "model.safetensors", "modeling_hf_anomaly.py", "preprocessor_config.json", "README.md", "eval_results.json", "dissolver",
    }  # fmt: skip
    assert {"model_index.json", "unet", "scheduler"} <= {path.name for path in (folder / "dissolver").iterdir()}
    results = results_of(folder)
    assert all(0 <= results[name] <= 1 for name in METRICS)
    assert (results["num_normal"], results["num_anomalous"], results["num_train"], results["num_calibration"]) == (36, 324, 114, 28)
    assert results["steps"] == 4
    assert results["seconds"] > 0
    for name in (*METRICS, "num_normal", "num_anomalous", "seconds"):
        assert f"{name}: {results[name]}\n" in out
    assert f"saved: {folder}\n" in out
    card = (folder / "README.md").read_text()
    assert f"| AUROC | {results['auroc']:.4f} (95% interval " in card
    assert "use_cache" not in card + (folder / "config.json").read_text()  # what Trainer puts into every config


def test_a_trained_folder_scores_by_itself(digits):
    folder, _ = digits
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    assert (type(model).__name__, model.config.image_size, model.config.dissolver) == ("DIAModel", 8, "diffusion")
    assert model.config.dissolver_settings == {"t_min": 30, "t_max": 130}
    scores = model(**processor(images=[PIL.Image.fromarray(pixels(0, 20, 20))], return_tensors="pt")).scores
    assert scores.isfinite().all()
    assert model.calibration.scores.shape == (28,)


def test_the_rank_correlation_is_that_of_the_detector_loaded_as_bfloat16(digits):
    folder, _ = digits
    results, test = results_of(folder), load_one_class("digits", evaluation_only=True).test
    rows = [round(i * 359 / 255) for i in range(256)]
    pixel_values = AutoImageProcessor.from_pretrained(folder)(
        images=[decode_image(test[row]["image"], "") for row in rows], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        scores = [AutoModel.from_pretrained(folder, dtype=dtype).eval()(pixel_values).scores for dtype in (torch.float32, torch.bfloat16)]
    ranks = [values.argsort().argsort().double().numpy() for values in scores]
    assert results["bfloat16_num_images"] == 256
    assert results["bfloat16_rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=2e-3)


def test_evaluate_gives_the_same_results(digits, tmp_path):
    folder, _ = digits
    status, out, err = run("evaluate.py", "--model", folder, "--output", tmp_path / "again.json", "--batch_size", 7)
    assert status == 0, err
    again, results = json.loads(out), results_of(folder)
    assert again == json.loads((tmp_path / "again.json").read_text())
    for name in again.keys() - {"seconds", "split_hash", "division"}:  # the hash of the evaluated rows alone
        assert again[name] == pytest.approx(results[name]), name
    assert again["division"] == results["division"] | {"split_hash": again["split_hash"]}


def test_a_real_process(digits, tmp_path):
    """The statuses and streams that a shell sees."""
    folder, _ = digits
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--model", str(folder), "--dataset_name"]
    done = subprocess.run([*command, "digits"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["auroc"] == pytest.approx(results_of(folder)["auroc"])
    failed = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith(f"error: '{tmp_path / 'nowhere'}' is neither an existing file or folder")
    assert "Traceback" not in failed.stderr


def test_a_run_is_repeatable(digits, train, tmp_path):
    again, _ = train(tmp_path / "again")
    first, second = (results_of(folder) for folder in (digits[0], again))
    assert {**first, "seconds": 0, "command": ""} == {**second, "seconds": 0, "command": ""}
    tensors = load_file(digits[0] / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in load_file(again / "model.safetensors").items())


def test_none_gives_csi(train, tmp_path):
    folder, _ = train(tmp_path / "csi", "--dissolver", "none")
    assert type(AutoModel.from_pretrained(folder)).__name__ == "CSIModel"
    assert not (folder / "dissolver").exists()
    assert "use_cache" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("dissolver", "more", "settings"),
    [
        ("gaussian", ["--blur_kernel_size", 3], {"kernel_size": 3, "resolution": 32, "sigma": 0.8}),
        ("median", ["--blur_kernel_size", 3, "--dissolved_variants", 0], {"kernel_size": 3, "resolution": 32}),
        ("median", ["--blur_kernel_size", 5, 3], {"kernel_size": [3, 5], "resolution": 32}),
        ("resize", ["--dissolving_resolution", 4], {"resolution": 4}),
        ("identity", [], {}),
    ],
)
def test_heuristic_dissolvers(train, tmp_path, dissolver, more, settings):
    folder, _ = train(tmp_path / "run", "--dissolver", dissolver, *more)
    config = json.loads((folder / "config.json").read_text())
    assert (config["dissolver"], config["dissolver_settings"]) == (dissolver, settings)
    assert json.loads((folder / "dissolver" / "dissolver_config.json").read_text()) == {"kind": dissolver, **settings}
    assert results_of(folder)["auroc"] is not None


def test_a_dissolver_trained_before(train, digits, tmp_path):
    folder, _ = train(tmp_path / "run", "--dissolver", digits[0] / "dissolver", "--t_min", 50, "--dissolved_variants", 0)
    assert AutoModel.from_pretrained(folder).config.dissolver_settings == {"t_min": 50, "t_max": 130}


def test_arguments_reach_the_detector(train, tmp_path):
    argv = ["--dissolver", "gaussian", "--blur_kernel_size", 3, "--shift", "perm", "--temperature", 0.2, "--similarity_design", "b"]
    argv += [
        "--crop_scale_min",
        0.08,
        "--num_test_views",
        3,
        "--test_crop_scale",
        0.6,
        "--score_features",
        "projection",
        "--score_whitening",
        "false",
        "--score_norm",
        "--loss_divisor",
        "views",
        "--false_positive_rate",
        0.1,
        "--num_encoders",
        2,
    ]
    folder, _ = train(tmp_path / "run", *argv)
    config = AutoModel.from_pretrained(folder).config
    assert config.num_encoders == 2
    assert (config.shift, config.temperature, config.similarity_design, config.loss_divisor) == ("perm", 0.2, "b", "views")
    assert (config.crop_scale, config.num_test_views, config.score_norm) == ([0.08, 1.0], 3, True)
    assert config.test_crop_scale == [0.6, 0.6]
    assert config.false_positive_rate == 0.1


def test_a_pretrained_backbone_is_where_training_starts(train, tmp_path, backbone):
    folder, _ = train(tmp_path / "run", "--dissolver", "none", "--learning_rate", 1e-9, "--ema_decay", 0, "--backbone", backbone)
    trained, before = load_file(folder / "model.safetensors"), load_file(backbone / "model.safetensors")
    for name, value in before.items():
        if name.endswith("weight"):
            torch.testing.assert_close(trained[f"backbone.{name}"], value, rtol=1e-4, atol=1e-6)


# train_shared_ae.py


def test_train_shared_ae(train, tmp_path):
    argv = [
        "--hidden_sizes",
        4,
        8,
        8,
        "--latent_size",
        6,
        "--alpha",
        2,
        "--beta",
        0.5,
        "--max_adversarial_weight",
        0.2,
        "--adversarial_margin",
        3,
    ]
    argv += ["--omega1", 0.25]
    folder, out = train(tmp_path / "shared-ae", *argv, script="train_shared_ae.py")
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {
        "config.json", "model.safetensors", "modeling_hf_anomaly.py", "preprocessor_config.json", "README.md", "eval_results.json",
    }  # fmt: skip
    assert f"auroc: {results_of(folder)['auroc']}\n" in out
    model = AutoModel.from_pretrained(folder)
    config = model.config
    assert (type(model).__name__, config.hidden_sizes, config.latent_size) == ("SharedAEModel", [4, 8, 8], 6)
    assert (config.alpha, config.beta, config.max_adversarial_weight, config.adversarial_margin) == (2, 0.5, 0.2, 3)
    assert (config.omega1, config.omega2, config.num_reference_images, config.ablation) == (0.25, 0.75, 114, "full")
    assert "num_reference_images" not in (folder / "README.md").read_text()
    status, out, err = run("evaluate.py", "--model", folder)
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results_of(folder)["auroc"])


def test_figures_of_a_run(train, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    argv = ["--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--card_figures", "true"]
    folder, _ = train(tmp_path / "figures", *argv, script="train_shared_ae.py")
    assert {path.name for path in (folder / "figures").iterdir()} == {"scores.png", "roc.png", "examples.png"}
    assert (folder / "README.md").read_text().count("](figures/") == 3


def test_shared_ae_resumes_and_refuses(train, tmp_path):
    argv = ["--hidden_sizes", 4, 4, 4, "--save_steps", 2, "--save_total_limit", 2]
    whole, _ = train(tmp_path / "whole", *argv, script="train_shared_ae.py")
    resumed, _ = train(tmp_path / "resumed", *argv, "--resume_from_checkpoint", whole / "checkpoint-2", script="train_shared_ae.py")
    states = [load_file(path / "model.safetensors") for path in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for wrong, word in ((["--omega1", 1.5], "omega1"), (["--ablation", "three"], "three"), (["--hidden_sizes", 4], "hidden_sizes")):
        status, _, err = run("train_shared_ae.py", "--output_dir", tmp_path / "refused", "--use_cpu", "true", *wrong)
        assert status == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert word in err.splitlines()[-1]


# train_addp.py

ADDP = ["--hidden_sizes", 4, 6, "--pretrain_steps", 4, "--pretrain_batch_size", 8]


@pytest.fixture(scope="module")
def addp(tmp_path_factory, train):
    argv = ["--latent_size", 3, "--noise", "simplex", "--noise_level", 0.3, "--noise_resolution", 2, "--map_filter_size", 3]
    folder = tmp_path_factory.mktemp("addp") / "run"
    return train(folder, *ADDP, *argv, "--save_steps", 2, "--save_total_limit", 2, script="train_addp.py")


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    status, out, err = run("evaluate.py", "--model", folder)
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results_of(folder)["auroc"])


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


# train_dissolver.py


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


# Data


def test_a_flat_folder_without_labels(train, tmp_path):
    data = class_folders(tmp_path / "scans", {".": 30})
    folder, out = train(tmp_path / "run", "--dataset_name", data, "--dissolver", "none")
    results = results_of(folder)
    assert [results[name] for name in METRICS] == [None] * 3
    assert "has no split 'test'" in results["reason"]
    assert f"reason: {results['reason']}" in out
    assert f"Not measured: {results['reason'].replace('|', ' ')}" in (folder / "README.md").read_text()
    assert AutoModel.from_pretrained(folder).calibration.scores.shape == (6,)
    assert results["num_calibration"] == 6


def test_npz_with_labels_in_a_column(train, tmp_path):
    arrays = {}
    for split, count in (("train", 24), ("val", 6), ("test", 10)):
        arrays[f"{split}_images"] = pixels(count, count, 8, 8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "scans.npz", **arrays)
    argv = ["--dataset_name", tmp_path / "scans.npz", "--normal_label", 0, "--dissolver", "none"]
    results = results_of(train(tmp_path / "run", *argv)[0])
    assert (results["num_train"], results["num_calibration"], results["num_normal"], results["num_anomalous"]) == (10, 2, 5, 5)
    results = results_of(train(tmp_path / "validation", *argv, "--eval_split", "validation")[0])
    assert (results["num_normal"], results["num_anomalous"]) == (3, 3)


def test_too_few_calibration_images(train, tmp_path, caplog):
    folder, _ = train(tmp_path / "run", "--dissolver", "none", "--false_positive_rate", 0.01)
    assert "needs at least 99 calibration images, have 28: the threshold is infinite" in caplog.text
    assert AutoModel.from_pretrained(folder).calibration.threshold.item() == math.inf
    results = results_of(folder)
    assert (results["true_positive_rate_at_threshold"], results["false_positive_rate_at_threshold"]) == (0, 0)


def test_bf16_trains_the_dissolver_too(train, tmp_path):
    """In one process accelerate knows one precision, which both trainings must therefore have."""
    folder, _ = train(tmp_path / "run", "--dissolver", "diffusion", "--bf16", "true")
    assert training_arguments(folder)["bf16"]
    assert load_file(folder / "dissolver" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].isfinite().all()


def test_fewer_images_than_a_batch_lower_it(train, tmp_path, caplog):
    folder, _ = train(tmp_path / "run", "--dissolver", "none", "--max_steps", 1, "--per_device_train_batch_size", 500)
    assert "the batch is lowered from 500 to 114" in caplog.text
    arguments = training_arguments(folder)
    assert arguments["per_device_train_batch_size"] == 114
    # From a pretrained encoder, as everywhere here that is not said otherwise.
    config = AutoModel.from_pretrained(folder).config
    assert (config.num_encoders, config.score_features, arguments["learning_rate"]) == (1, "both", 1e-3)


def test_colour_images_of_mixed_sizes_and_modes(train, tmp_path):
    modes = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"]
    for split, count in (("train/good", 14), ("test/good", 4), ("test/crack", 4)):
        for i in range(count):
            image = PIL.Image.fromarray(pixels(i, 12 + i % 3, 10 + i % 5, 3)).convert(modes[i % len(modes)])
            path = tmp_path / "colour" / split / f"{i}{'.tiff' if image.mode in ('CMYK', 'LA') else '.png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    # 11 images to train on are fewer than a batch of the dissolver.
    folder, _ = train(tmp_path / "run", "--dataset_name", tmp_path / "colour", "--image_size", 12, "--dissolver_batch_size", 32)
    config = AutoModel.from_pretrained(folder).config
    assert (config.num_channels, config.image_size) == (3, 12)
    chosen = (config.num_encoders, config.score_features, training_arguments(folder)["learning_rate"])
    assert chosen == (3, "all", 1e-2)  # trained from scratch
    assert (results_of(folder)["num_normal"], results_of(folder)["num_anomalous"]) == (4, 4)


# Bad input: exit status 2, one line that names the culprit, nothing half-written


def parquet(folder, labels):
    image = io.BytesIO()
    PIL.Image.fromarray(pixels(0, 8, 8)).save(image, "PNG")
    columns = {"image": [{"bytes": image.getvalue(), "path": None}] * len(labels), "label": labels}
    Dataset.from_dict(columns, Features({"image": Image(), "label": Value("string")})).to_parquet(folder / "scans.parquet")
    return folder / "scans.parquet"


def broken_file(folder):
    class_folders(folder / "data", {"train/good": 12})
    (folder / "data" / "train" / "good" / "torn.png").write_bytes(b"no image")
    return folder / "data"


def truncated_file(folder):
    path = class_folders(folder / "data", {"train/good": 12}, size=64) / "train" / "good" / "3.png"
    path.write_bytes(path.read_bytes()[:-2000])  # the header is whole
    return folder / "data"


def sixteen_bits(folder):
    class_folders(folder / "data", {"train/good": 12})
    save(folder / "data" / "train" / "good" / "deep.png", pixels(0, 8, 8).astype(np.uint16) * 257)
    return folder / "data"


def nan_pixels(folder):
    images = np.zeros((12, 8, 8), np.float32)
    images[5, 2, 2] = np.nan
    np.savez(folder / "scans.npz", train_images=images)
    return folder / "scans.npz"


def resnet(folder):
    ResNetBackbone(ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")).save_pretrained(
        folder / "resnet"
    )
    return folder / "resnet"


def unfinished_checkpoint(folder):
    (folder / "checkpoint-6").mkdir()
    return folder / "checkpoint-6"


BAD = {  # the culprit → arguments; a function makes its file or folder
    "no column 'nope'": ["--label_column", "nope"],
    "no column 'pixels'": ["--image_column", "pixels"],
    "row 3 of split 'train'": ["--normal_label", "healthy", "--dataset_name", lambda folder: parquet(folder, ["healthy"] * 3 + [None] * 5)],
    "torn.png: unreadable image": ["--dataset_name", broken_file],
    "good/3.png: unreadable image": ["--dataset_name", truncated_file],
    "normal_label='zebra'": ["--normal_label", "zebra"],
    "deep.png: 16-bit": ["--dataset_name", sixteen_bits],
    "array 'train_images', row 5: NaN": ["--dataset_name", nan_pixels],
    "'--temperatur': did you mean --temperature": ["--temperatur", "0.5"],
    "'--nothing_like_it'": ["--nothing_like_it"],
    "--image_size must be at least 4": ["--image_size", "0"],
    "invalid int value: 'big'": ["--image_size", "big"],
    "--false_positive_rate must": ["--false_positive_rate", "2"],
    "--ema_decay must": ["--ema_decay", "2"],
    "got spin": ["--shift", "spin"],
    "temperature must": ["--temperature", "-1"],
    "t range 200…100": ["--t_min", "200", "--t_max", "100", "--dissolver", "diffusion"],
    "kernel_size must be odd, got 4": ["--dissolver", "gaussian", "--blur_kernel_size", "4"],
    "--blur_kernel_size belongs": ["--dissolver", "none", "--blur_kernel_size", "3"],
    "calibration_fraction=1": ["--calibration_fraction", "1"],
    "eval_split='both'": ["--eval_split", "both"],
    "num_channels": ["--backbone", resnet],
    "no-such-backbone": ["--backbone", lambda folder: folder / "no-such-backbone"],
    "no-such-dissolver": ["--dissolver", lambda folder: folder / "no-such-dissolver"],
    "no-such-data": ["--dataset_name", lambda folder: folder / "no-such-data"],
    "checkpoint-6 is not a complete checkpoint": ["--resume_from_checkpoint", unfinished_checkpoint],
    "--load_best_model_at_end and --save_strategy best would choose": ["--save_strategy", "best"],
    "t_max 130 is beyond": ["--dissolver", "diffusion", "--dissolver_max_timestep", "100"],
    "--dissolver_steps": ["--dissolver", "diffusion", "--dissolver_steps", "-3"],
    "--dissolved_variants": ["--dissolved_variants", "-1"],
    "one of fp16 and bf16": ["--fp16", "true", "--bf16", "true"],
    "max_timestep 5000": ["--dissolver", "diffusion", "--dissolver_max_timestep", "5000"],
}


def test_resume_refuses_the_work_of_another_run(train, tmp_path):
    folder, _ = train(tmp_path / "run", "--dissolver", "none")
    options = ["--output_dir", folder, "--dissolver", "none", "--max_steps", 4, "--use_cpu", "true", "--disable_tqdm", "true"]
    before = (folder / "eval_results.json").read_text()
    status, _, err = run("train_dia.py", *options, "--normal_label", "8", "--resume_from_checkpoint", "true")
    assert status == 2
    assert "checkpoint-4 belongs to another run" in err.splitlines()[-1]
    assert (folder / "eval_results.json").read_text() == before


def refused(script, argv, culprit, output_dir):
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


@pytest.mark.parametrize("culprit", BAD)
def test_bad_input(culprit, tmp_path):
    argv = [value(tmp_path) if callable(value) else value for value in BAD[culprit]]
    argv += [] if "--dissolver" in argv else ["--dissolver", "gaussian", "--blur_kernel_size", "3"]
    common = ["--max_steps", 2, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--dissolver_batch_size", 8]
    steps = [] if "--dissolver_steps" in argv else ["--dissolver_steps", 2]
    refused("train_dia.py", ["--output_dir", tmp_path / "run", *common, *steps, *argv], culprit, tmp_path / "run")


@pytest.mark.parametrize(
    ("culprit", "argv"),
    [
        ("t range 200…100", ["--t_min", "200", "--t_max", "100"]),
        ("max_timestep 2000", ["--max_timestep", "2000"]),
        ("did you mean --block_out_channels", ["--block_out_channel", "8"]),
        ("resolution 9 cannot be halved", ["--resolution", "9", "--image_size", "16", "--block_out_channels", "8", "8"]),
    ],
)
def test_bad_input_of_train_dissolver(culprit, argv, tmp_path):
    common = ["--output_dir", tmp_path / "run", "--max_steps", 2, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    refused("train_dissolver.py", [*common, *argv], culprit, tmp_path / "run")


def test_gray_images_for_an_rgb_backbone(train, tmp_path):
    folder, _ = train(tmp_path / "run", "--num_channels", 3, "--dissolver", "none", "--backbone", resnet(tmp_path))
    assert AutoModel.from_pretrained(folder).config.num_channels == 3
    assert AutoImageProcessor.from_pretrained(folder).do_convert_rgb


def unfitted(folder):
    CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).save_pretrained(folder / "bare")
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder / "bare")
    return folder / "bare"


def empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize(
    ("culprit", "model"),
    [
        ("empty", empty),
        ("resnet", resnet),
        ("nowhere", lambda folder: folder / "nowhere"),
        ("CSIModel is not fitted", unfitted),
        ("--model", None),
    ],
)
def test_evaluating_what_is_no_detector(culprit, model, tmp_path):
    argv = [] if model is None else ["--model", model(tmp_path)]
    refused("evaluate.py", [*argv, "--output", tmp_path / "results.json"], culprit, tmp_path / "results.json")
