"""train_dia.py, and evaluate.py on what it trains."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_anomaly.cli.info import describe
from hf_anomaly.data import decode_image, load_one_class
from hf_anomaly.dissolving import DISSOLVERS, Dissolver, MedianDissolver, dissolve_dataset
from hf_anomaly.training.denoising import train_dissolver

from .running import METRICS, SCRIPTS, class_folders, equal, pixels, results_of, run, weights


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
    assert results["num_test_copies"] == results["num_near_copies"] == 0
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
    assert results["bfloat16_num_images"] == 64
    assert results["bfloat16_rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=2e-3)


def test_evaluate_gives_the_same_results(digits, tmp_path):
    folder, _ = digits
    argv = ["--model", folder, "--dataset_name", "digits", "--output", tmp_path / "again.json", "--batch_size", 7]
    status, out, err = run("evaluate.py", *argv)
    assert status == 0, err
    again, results = json.loads(out), results_of(folder)
    assert again == json.loads((tmp_path / "again.json").read_text())
    assert again["by_class"] == {name: pytest.approx(found) for name, found in results["by_class"].items()}
    for name in again.keys() - {
        "seconds",
        "split_hash",
        "division",
        "by_class",
        "num_test_copies",
        "num_near_copies",
    }:  # the hash of the evaluated rows alone
        assert again[name] == pytest.approx(results[name]), name
    assert again["num_test_copies"] is again["num_near_copies"] is None  # without the training images nobody knows
    assert again["division"] == results["division"] | {"split_hash": again["split_hash"], "calibration_fraction": None}


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


def test_a_dissolver_trained_before(train, digits, tmp_path, caplog):
    folder, _ = train(tmp_path / "run", "--dissolver", digits[0] / "dissolver", "--t_min", 50, "--dissolved_variants", 0)
    assert AutoModel.from_pretrained(folder).config.dissolver_settings == {"t_min": 50, "t_max": 130}
    assert "another division" not in caplog.text
    assert "--tiles" not in caplog.text


def test_a_dissolver_trained_by_itself_is_not_written_over(train, tmp_path):
    place = tmp_path / "run" / "dissolver"
    train(place, "--t_max", 60, "--block_out_channels", 8, 8, script="train_dissolver.py")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for argv in ((), ("--dissolver", "none")):
        _, err = train(tmp_path / "run", *argv, status=2)
        assert f"{place} holds a dissolver that was trained by itself" in err.splitlines()[-1]
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    folder, _ = train(tmp_path / "run", "--dissolver", tmp_path / "run", "--t_min", 40)
    assert json.loads((folder / "config.json").read_text())["dissolver_settings"] == {"t_min": 40, "t_max": 60}
    assert json.loads((place / "dissolver_config.json").read_text())["t_min"] == 40
    assert "timesteps 40 to 60" in (place / "README.md").read_text()


def test_a_dissolver_trained_before_keeps_its_timesteps(train, digits, tmp_path):
    """Of a recipe, which has timesteps of its own."""
    shutil.copytree(digits[0] / "dissolver", tmp_path / "dissolver")
    notes = json.loads((tmp_path / "dissolver" / "dissolver_config.json").read_text())
    notes |= {"t_min": 10, "t_max": 40, "training": {"run": "last week's"}}
    (tmp_path / "dissolver" / "dissolver_config.json").write_text(json.dumps(notes))
    folder, _ = train(tmp_path / "run", "--dataset", "digits", "--normal_label", 0, "--dissolver", tmp_path / "dissolver")
    settings = json.loads((folder / "config.json").read_text())["dissolver_settings"]
    assert (settings["t_min"], settings["t_max"]) == (10, 40)


def test_a_ready_dissolver_of_any_kind(train, tmp_path):
    """With a recipe, of whose timesteps it has no use."""
    MedianDissolver(3).save_pretrained(tmp_path / "median")
    folder, _ = train(tmp_path / "run", "--dataset", "digits", "--normal_label", 0, "--dissolver", tmp_path / "median")
    config = AutoModel.from_pretrained(folder).config
    assert (config.dissolver, config.dissolver_settings) == ("median", {"kernel_size": 3, "resolution": 32})
    assert Dissolver.from_pretrained(folder).fingerprint() == MedianDissolver(3).fingerprint()
    _, err = train(tmp_path / "other", "--dissolver", tmp_path / "median", "--t_min", 50, status=2)
    assert f"--t_min is of no use to --dissolver {tmp_path / 'median'}" in err.splitlines()[-1]


def test_an_own_kind_of_dissolver(train, tmp_path, monkeypatch):
    class Darker(Dissolver):
        kind = "darker"

        def __init__(self, strength=0.5):
            self.strength = strength

        def settings(self):
            return {"strength": self.strength}

        def _dissolve(self, x, timesteps):
            return x * (1 - self.strength)

    monkeypatch.setitem(DISSOLVERS, "darker", Darker)
    folder, _ = train(tmp_path / "run", "--dissolver", "darker")
    assert AutoModel.from_pretrained(folder).config.dissolver_settings == {"strength": 0.5}
    Darker(0.2).save_pretrained(tmp_path / "darker")
    folder, _ = train(tmp_path / "other", "--dissolver", tmp_path / "darker")
    assert AutoModel.from_pretrained(folder).config.dissolver_settings == {"strength": 0.2}
    _, err = train(tmp_path / "run", "--dissolver", "darker", "--blur_kernel_size", 3, status=2)
    assert "--blur_kernel_size is of no use to --dissolver darker" in err.splitlines()[-1]
    monkeypatch.setattr(Darker.__init__, "__defaults__", None)
    _, err = train(tmp_path / "run", "--dissolver", "darker", status=2)
    assert "--dissolver darker" in err.splitlines()[-1]
    assert "strength" in err.splitlines()[-1]


def test_a_dissolver_of_another_division_or_other_tiles_is_told(train, digits, tmp_path, caplog):
    """Images that calibrate here trained it, or it never saw parts of images."""
    train(tmp_path / "run", "--dissolver", digits[0] / "dissolver", "--dissolved_variants", 0, "--seed", 7, "--tiles", 2)
    assert "was trained with seed 42 on another division of digits" in caplog.text
    assert "was trained with --tiles 1" in caplog.text


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


def test_a_pretrained_backbone_as_it_is(train, tmp_path, backbone):
    folder, out = train(tmp_path / "run", "--dissolver", "none", "--max_steps", 0, "--backbone", backbone, "--backbone_stage", "stage1")
    saved, before = load_file(folder / "model.safetensors"), load_file(backbone / "model.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(saved[f"backbone.{name}"], value, rtol=0, atol=0)
    results, model = json.loads((folder / "eval_results.json").read_text()), AutoModel.from_pretrained(folder)
    assert results["steps"] == 0
    assert "auroc: " in out
    assert model.backbone.channels == [8]
    assert "fitted to" in describe(model, results)
    assert "It was fitted, without training, to normal images only" in " ".join((folder / "README.md").read_text().split())
    assert not list(folder.glob("checkpoint-*"))


ONE_PASS = ("--max_train_images", 32)  # four steps of eight
GAUSSIAN = ("--dissolver", "gaussian", "--blur_kernel_size", 3, *ONE_PASS)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory, train):
    """A finished run, and its files."""
    folder, _ = train(tmp_path_factory.mktemp("gaussian") / "run", *GAUSSIAN)
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dissolver", [("--dissolver", "none"), GAUSSIAN])
def test_what_no_run_left_in_its_folders_stays(train, tmp_path, dissolver):
    own = tmp_path / "dissolver" / "own.bin"
    own.parent.mkdir()
    own.write_bytes(b"own")
    train(tmp_path, *dissolver)
    assert own.read_bytes() == b"own"
    assert (own.parent / "dissolver_config.json").is_file() == (dissolver is GAUSSIAN)


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--normal_label", 8], "config.normal_label was '0'"),
        (["--learning_rate", 1e-6], "optimization.learning_rate was 0.001"),
        (["--seed", 5], "seed was 42"),
        (["--data_seed", 5], "optimization.data_seed was 42"),
        (["--gradient_accumulation_steps", 2], "optimization.gradient_accumulation_steps was 1"),
        (["--adam_beta1", 0.5], "optimization.adam_beta1 was 0.9"),
        (["--dataloader_drop_last", "false"], "optimization.dataloader_drop_last was True"),
        (["--dissolved_variants", 0], "dissolving.variants was 1"),
        (["--temperature", 0.1], "config.temperature was 0.5"),
        (["--dissolver", "none"], "config.dissolver was 'gaussian'"),
    ],
)
def test_resume_refuses_the_work_of_another_run(train, gaussian, more, culprit):
    folder, before = gaussian
    argv = more if "--dissolver" in more else [*GAUSSIAN, *more]
    _, err = train(folder, *argv, "--resume_from_checkpoint", "true", status=2)
    assert f"checkpoint-4 belongs to another run ({culprit}" in err.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "nothing is lost"


def test_what_an_earlier_run_left_does_not_keep_a_new_one_from_being_resumed(train, tmp_path, monkeypatch):
    folder, _ = train(tmp_path / "run")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("hf_anomaly.training.commands.train_dia.train_dissolver", interrupt)
        train(folder, "--seed", 7, status=130)
    assert not list(folder.glob("checkpoint-*"))
    train(folder, "--seed", 7, "--resume_from_checkpoint", "true")
    assert results_of(folder)["seed"] == 7


@pytest.mark.parametrize("kind", ["diffusion", "gaussian"])
def test_a_run_killed_while_its_dissolver_was_saved_is_resumed(train, tmp_path, kind):
    argv = ["--dissolver", kind] + ([] if kind == "diffusion" else ["--blur_kernel_size", 3])
    folder, _ = train(tmp_path / "run", *argv)
    whole = weights(folder)
    names = {path.name for path in (folder / "dissolver").iterdir()}
    shutil.move(folder / "dissolver", tmp_path / "half")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "half", folder / "dissolver" / ".saving-abc")
    (folder / ".saving-def").mkdir()
    train(folder, *argv, "--resume_from_checkpoint", "true")
    assert {path.name for path in (folder / "dissolver").iterdir()} == names
    assert not list(folder.glob(".saving-*"))
    assert equal(weights(folder), whole)


def test_of_the_dissolvers_training_only_checkpoints_go(train, tmp_path, monkeypatch):
    """What a tracker writes beside them stays."""

    def train_and_log(*args, **kwargs):
        Path(kwargs["args"].output_dir, "runs").mkdir(parents=True)
        return train_dissolver(*args, **kwargs)

    monkeypatch.setattr("hf_anomaly.training.commands.train_dia.train_dissolver", train_and_log)
    folder, _ = train(tmp_path / "run", "--save_steps", 2)
    assert [path.name for path in (folder / "dissolver-training").iterdir()] == ["runs"]


def test_resume_names_the_cause_before_the_digests(train, digits):
    _, err = train(digits[0], "--seed", 7, "--resume_from_checkpoint", "true", status=2)
    assert "dissolver belongs to another run (seed was 42, now 7)" in err.splitlines()[-1]


def test_resume_refuses_other_dissolved_images(train, digits, tmp_path):
    """More steps are more passes over the images, of which each has as many variants, up to a limit."""
    argv = ["--dissolver", digits[0] / "dissolver", *ONE_PASS]
    folder, _ = train(tmp_path / "run", *argv)
    _, err = train(folder, *argv, "--max_steps", 20, "--resume_from_checkpoint", "true", status=2)
    assert "dissolving.variants was 1, now 2" in err.splitlines()[-1]
    train(folder, *argv, "--max_steps", 20, "--dissolved_variants", 1, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize(
    ("more", "variants"), [((), 0), (("--tiles", 2, "--image_size", 8, *ONE_PASS), 0), (ONE_PASS, 1), (("--max_train_images", 31), 2)]
)
def test_images_that_training_does_not_see_are_not_dissolved(train, digits, tmp_path, monkeypatch, more, variants):
    """Of less than a pass over images, or the tiles of a pass, most of what is cached would be of no use."""
    cached = []

    def count(*args, num_variants, **settings):
        cached.append(num_variants)
        return dissolve_dataset(*args, num_variants=num_variants, **settings)

    monkeypatch.setattr("hf_anomaly.training.commands.train_dia.dissolve_dataset", count)
    train(tmp_path / "run", "--dissolver", digits[0] / "dissolver", *more)
    assert cached == [variants] * (variants > 0)


def test_resume_refuses_other_images(train, tmp_path):
    """Of as many files, with the same names, in a folder of the same name."""
    for name, size in (("screws", 8), ("bolts", 12)):
        class_folders(tmp_path / name, {"normal": 10}, size)
    argv = ["--dissolver", "none", "--image_size", 8, "--dataset_name"]
    folder, _ = train(tmp_path / "run", *argv, tmp_path / "screws" / "normal")
    shutil.copytree(tmp_path / "screws" / "normal", tmp_path / "moved" / "normal")
    train(folder, *argv, tmp_path / "moved" / "normal", "--resume_from_checkpoint", "true")
    _, err = train(folder, *argv, tmp_path / "bolts" / "normal", "--resume_from_checkpoint", "true", status=2)
    assert "belongs to another run (images was" in err.splitlines()[-1]
