"""train_shared_ae.py."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_anomaly import AnomalyTrainer

from .running import class_folders, results_of, run


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
    status, out, err = run("evaluate.py", "--model", folder, "--dataset_name", "digits")
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results_of(folder)["auroc"])


def test_figures_of_a_run(train, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    argv = ["--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--card_figures", "true"]
    folder, _ = train(tmp_path / "figures", *argv, script="train_shared_ae.py")
    assert {path.name for path in (folder / "figures").iterdir()} == {"scores.png", "roc.png", "examples.png"}
    assert (folder / "README.md").read_text().count("](figures/") == 3


def test_figures_without_test_images_are_told_of(train, tmp_path, caplog):
    images = class_folders(tmp_path / "images", {"train/good": 20})
    argv = ["--dataset_name", images, "--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--card_figures", "true"]
    folder, _ = train(tmp_path / "run", *argv, script="train_shared_ae.py")
    assert "--card_figures: there will be none" in caplog.text
    assert results_of(folder)["reason"] in caplog.text
    assert not (folder / "figures").exists()


def test_what_is_no_runs_stays(train, tmp_path, caplog):
    folder = tmp_path / "project"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "mine.png").write_bytes(b"mine")
    (folder / "README.md").write_bytes(b"# My project \xe9")
    argv = ["--hidden_sizes", 4, 4, 4, "--max_steps", 2]
    _, err = train(folder, *argv, script="train_shared_ae.py", status=2)
    assert f"{folder / 'README.md'} is not UTF-8" in err
    assert not (folder / "config.json").exists(), "it is refused before it is trained"
    (folder / "README.md").write_text("# My project\n\nOur plan.\n")
    train(folder, *argv, script="train_shared_ae.py")
    card = (folder / "README.md").read_text()
    assert "will be replaced" not in caplog.text
    assert "# My project\n\nOur plan.\n" in card
    assert f"| AUROC | {results_of(folder)['auroc']:.4f}" in card
    train(folder, *argv, script="train_shared_ae.py")
    assert "# My project\n\nOur plan.\n" in next(folder.glob("README.earlier.md")).read_text()
    assert (folder / "figures" / "mine.png").read_bytes() == b"mine"


def test_what_a_person_wrote_stays_when_a_run_goes_on(train, tmp_path, caplog):
    argv = ["--hidden_sizes", 4, 4, 4, "--save_steps", 2]
    folder, _ = train(tmp_path / "run", *argv, script="train_shared_ae.py")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("<!-- hf-anomaly: limits -->", "My words.\n\n<!-- hf-anomaly: limits -->"))
    train(folder, *argv, "--max_steps", 6, "--resume_from_checkpoint", "true", script="train_shared_ae.py")
    assert results_of(folder)["steps"] == 6
    assert "My words." in card.read_text()
    assert f"| AUROC | {results_of(folder)['auroc']:.4f}" in card.read_text()
    assert "will be replaced" not in caplog.text
    train(folder, *argv, "--omega1", 2, script="train_shared_ae.py", status=2)
    assert "will be replaced" not in caplog.text, "it is refused"
    train(folder, *argv, script="train_shared_ae.py")
    assert "will be replaced" in caplog.text
    assert "resume_from_checkpoint" not in caplog.text, "it ended"
    assert "My words." not in card.read_text(), "another run has another card"
    assert "My words." in (folder / "README.earlier.md").read_text()
    train(folder, *argv, script="train_shared_ae.py")
    assert "My words." in (folder / "README.earlier.md").read_text(), "the card between them had none"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    train(folder, *argv, script="train_shared_ae.py")
    assert "license" not in card.read_text()
    assert "license: mit" in (folder / "README.earlier.md").read_text()


def test_an_interrupted_run_says_how_to_go_on(train, tmp_path, monkeypatch, caplog):
    argv, step = ["--hidden_sizes", 4, 4, 4], AnomalyTrainer.training_step

    def until_the_third(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(AnomalyTrainer, "training_step", until_the_third)
        folder, err = train(tmp_path / "run", *argv, "--save_steps", 2, script="train_shared_ae.py", status=130)
        assert err.splitlines()[-1] == "interrupted: the same command with --resume_from_checkpoint true goes on from checkpoint-2"
        assert "Writing model shards" not in err
        _, err = train(folder, *argv, script="train_shared_ae.py", status=130)
        assert err.splitlines()[-1] == "interrupted: there is no checkpoint yet", "that one is the earlier run's"
        assert "its command with --resume_from_checkpoint true would have gone on from checkpoint-2" in caplog.text
    train(folder, *argv, "--save_steps", 2, "--resume_from_checkpoint", "true", script="train_shared_ae.py")
    assert results_of(folder)["steps"] == 4


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
