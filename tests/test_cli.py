"""`hf-anomaly` as a user runs it: within this process, but for what importing decides."""

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors import SafetensorError
from transformers import AutoModel

from hf_anomaly import (
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DiffusionDissolver,
    GaussianDissolver,
    InputError,
    MedianDissolver,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
    cli,
    overlay_anomaly_map,
)
from hf_anomaly.cli import train
from hf_anomaly.cli.running import run_script
from hf_anomaly.dissolving import build_scheduler, build_unet
from hf_anomaly.training.run_record import without_measurements

COLUMNS = ["image", "score", "p_value", "label", "threshold"]
SCRIPT = "import sys; sys.argv[0] = '/usr/bin/hf-anomaly'\nfrom hf_anomaly.cli import main\n"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """(exit status, stdout, stderr) of a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        status = 0
        try:
            cli.main([str(word) for word in argv])
        except SystemExit as exit:
            status = exit.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    def refused(argv, *words):
        status, out, err = run(*argv)
        error = err.splitlines()[-1]
        assert status == 2, err
        assert error.startswith("error: ")
        assert "Traceback" not in err
        for word in words:
            assert str(word) in error
        return out

    return refused


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shared-ae")
    model = SharedAEModel(SharedAEConfig(image_size=16, hidden_sizes=[8, 8, 8], latent_size=8, normal_label="good")).eval()
    normal = torch.rand(39, 1, 16, 16) * 2 - 1
    model.fit_reference([normal], progress=False).calibrate([normal], progress=False)
    model.save_pretrained(folder)
    AnomalyImageProcessor.for_images(16, 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_maps(tmp_path_factory):
    """Fitted, not calibrated, and of a method without maps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("csi")
    model = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).eval()
    model.fit_reference([torch.rand(4, 1, 8, 8) * 2 - 1], progress=False).save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """scans/a.png, b.png, sub/c.png, sub/a.png"""
    folder = tmp_path_factory.mktemp("scans")
    for i, name in enumerate(("a", "b", "sub/a", "sub/c")):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 20), dtype=np.uint8)).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def with_broken(scans, tmp_path):
    """The scans in the middle of which one is broken."""
    broken = tmp_path / "broken.png"
    broken.write_bytes((scans / "a.png").read_bytes()[:150])
    return [scans / "a.png", broken, scans / "b.png"]


def scores_of(folder, paths):
    model = AutoModel.from_pretrained(folder)
    processor = AnomalyImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(processor(images=[PIL.Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]).scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 3000, "width": 3000}}, ("3000×3000", "16×16", "preprocessor_config.json")),
        ({"size": None}, ("preprocessor_config.json",)),
        ({"do_convert_rgb": True}, ("3 channels", "preprocessor_config.json")),
        ({"do_resize": False}, ("do_resize", "preprocessor_config.json")),
        ({"do_pad": True, "pad_size": {"height": 3000, "width": 3000}}, ("do_pad", "preprocessor_config.json")),
        ({"do_center_crop": True, "crop_size": 3000}, ("do_center_crop", "preprocessor_config.json")),
        ({"window": [0, "x"]}, ("window=[0, 'x']",)),
        ({"image_mean": [0.5, 0.5]}, ("image_mean", "0.5, 0.5", "preprocessor_config.json")),
        ({"image_mean": "x"}, ("image_mean", "'x'", "preprocessor_config.json")),
        ({"image_std": [0]}, ("image_std", "0", "preprocessor_config.json")),
        ({"image_std": [None]}, ("image_std", "None", "preprocessor_config.json")),
        ({"rescale_factor": "x"}, ("rescale_factor", "'x'", "preprocessor_config.json")),
        ({"resample": 99}, ("resample", "99", "preprocessor_config.json")),
        ({"resample": "x"}, ("resample", "'x'", "preprocessor_config.json")),
        ({"image_processor_type": "ViTImageProcessor"}, ("ViTImageProcessor", "AnomalyImageProcessor")),
    ],
)
def test_a_processor_that_does_not_fit_the_detector(refused, detector, scans, change, words):
    shutil.copytree(detector, "model")
    path = Path("model/preprocessor_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(["predict", "model", scans], *words)


# The program itself ---------------------------------------------------------------------------------------------------------------


def fresh(code):
    return subprocess.run([sys.executable, "-c", SCRIPT + code], capture_output=True, text=True)


def test_help_waits_for_nothing():
    code = """
import contextlib, io
commands = ("train", "evaluate", "calibrate", "predict", "report", "dissolve", "info", "push")
for argv in (["--help"], [], ["--version"], *([name, "--help"] for name in commands)):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(argv)
    assert "hf-anomaly" in text.getvalue(), argv
sys.modules["gradio"] = None  # as where it is not installed
text = io.StringIO()
with contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
    main(["demo", "model"])
assert text.getvalue() == "error: the demo needs gradio, which is not installed: pip install 'hf-anomaly[demo]'\\n"
heavy = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    result = fresh(code)
    assert result.returncode == 0, result.stderr


def test_who_asks_the_console_script_for_a_name_gets_it_registered():
    result = fresh("import hf_anomaly\nhf_anomaly.DIAModel\nfrom transformers import AutoConfig\nAutoConfig.for_model('dia_anomaly')")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("argv", [[], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_that_the_terminal_cannot_show(run, argv, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(*argv)[0] == 0
    terminal.flush()
    assert b"usage: hf-anomaly" in terminal.buffer.getvalue()


def test_the_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out
        assert (Path(cli.__file__).parent / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["predct"], ["'predct'", "did you mean 'predict'"]),
        (["xyzzy"], ["'xyzzy'", "train, evaluate"]),
        (["predict", "model"], ["images", "--help"]),
        (["predict", "model", "a.png", "--treshold", "1"], ["'--treshold'", "did you mean --threshold"]),
        (["predict", "model", "a.png", "--threshold", "high"], ["--threshold", "'high'"]),
        (["dissolve", "model", "a.png", "--output", "d.jpg"], ["--output d.jpg", ".png"]),
        (["predict", "model", "a.png", "--on-error", "cry"], ["cry"]),
        (["predict", "model", "a.png", "--output", "x.xlsx"], ["x.xlsx", ".csv", ".jsonl"]),
        (["predict", "model", "a.png", "--threshold", "1", "--false-positive-rate", ".1"], ["--threshold", "--false_positive_rate"]),
        (["predict", "model", "a.png", "--batch_size", "0"], ["--batch_size", "0"]),
        (["train", "resnet"], ["'resnet'", "dia, shared_ae"]),
        (["train", "dia", "--num_processes", "two"], ["--num_processes", "'two'"]),
        (["train", "dia", "--num_processes", "0"], ["--num_processes", "'0'"]),
        (["train", "shared_ae", "--dataset_nam", "x"], ["--dataset_nam", "--dataset_name"]),
    ],
)
def test_what_is_not_understood(refused, argv, words):
    refused(argv, *words)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt("go on with --resume_from_checkpoint"), 130, "interrupted: go on with --resume_from_checkpoint"),
        (InputError("two\n  lines"), 2, "error: two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "; make room, or choose another disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "; make room, or choose another disk"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 2, "; make room, or choose another disk"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "; choose an output and a cache (HF_HOME) that can be written to"),
        (
            OSError(errno.EACCES, "Permission denied"),
            2,
            "; check its permissions, or choose an output and a cache (HF_HOME) that can be written to",
        ),
    ],
)
def test_what_ends_a_command_is_one_line(error, status, said, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_script(fails)
    assert exit.value.code == status
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_interruption_while_a_command_is_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit:
        cli.main(["info", "model"])
    assert exit.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_fault_of_the_program_is_not_called_one_of_the_users():
    for error in (OSError(errno.EBADF, "Bad file descriptor"), ValueError("a bug"), SafetensorError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            run_script(Mock(side_effect=error))


# train and evaluate ----------------------------------------------------------------------------------------------------------------


def test_train_evaluate_info(run):
    tiny = ["--max_steps", 2, "--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--disable_tqdm", "true", "--use_cpu", "true"]
    status, out, err = run("train", "shared_ae", "--output_dir", "my-detector", *tiny)
    assert status == 0, err
    assert "saved: my-detector" in out
    trained = json.loads(Path("my-detector/eval_results.json").read_text())
    card = Path("my-detector/README.md")
    assert "hf-anomaly train shared_ae --output_dir my-detector" in card.read_text()
    assert f"(Spearman) of {trained['bfloat16_rank_correlation']:.4f}, measured on 64 of them" in card.read_text()
    shutil.copytree("my-detector", "other-seed")
    Path("other-seed/eval_results.json").write_text(json.dumps({**trained, "seed": 1, "auroc": 0.5}))
    card.write_text(card.read_text() + "\nOur own words.\n")
    options = ["--license", "mit", "--repo", "org/ours", "--dataset_id", "org/digits"]
    status, out, err = run("card", "my-detector", "--runs", "other-seed", *options)
    assert (status, out) == (0, "written: my-detector/README.md\n"), err
    for words in (
        "license: mit",
        "datasets:\n- org/digits",
        "| 1 | 0.5000 |",
        "| 42 |",
        "| mean ± std |",
        'from_pretrained("org/ours")',
        "Our own words.",
    ):
        assert words in card.read_text()
    config = json.loads(Path("other-seed/config.json").read_text())
    Path("other-seed/config.json").write_text(json.dumps({**config, "omega1": 0.7, "omega2": 0.3}))
    status, _, err = run("card", "my-detector", "--runs", "other-seed")
    assert status == 2
    assert "other-seed is another training than my-detector (omega1 is 0.7, not 0.9)" in err
    CSIConfig(image_size=8).save_pretrained("other-seed")
    assert "(model_type is 'csi_anomaly', not 'shared_ae_anomaly')" in run("card", "my-detector", "--runs", "other-seed")[2]
    status, out, err = run("evaluate", "my-detector", "--dataset_name", "digits")
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(trained["auroc"])
    status, out, _ = run("info", "my-detector")
    assert status == 0
    for fact in (
        "SharedAEModel",
        "8×8 px, gray",
        "digits, 114 images",
        "on 28 held-out normal images",
        f"{trained['auroc']:.4f}",
        "0.0345",
    ):
        assert fact in out
    assert f"{AutoModel.from_pretrained('my-detector').calibration.threshold.item():g}" in out


def test_card_of_other_seeds(run, without_maps):
    """Of a method with a backbone, whose config knows more once it is loaded."""
    results = {"dataset": "x", "normal_label": "0", "steps": 1, "num_normal": 1, "num_anomalous": 1, "num_train": 4, "num_calibration": 0}
    for seed in range(2):
        shutil.copytree(without_maps, f"seed{seed}")
        Path(f"seed{seed}", "eval_results.json").write_text(
            json.dumps({**results, "seed": seed, "auroc": 0.5 + seed / 4, "split_hash": "a"})
        )
    status, _, err = run("card", "seed0", "--runs", "seed1")
    assert status == 0, err
    assert "| mean ± std | 0.6250 ± 0.1768 |" in Path("seed0/README.md").read_text()


@pytest.mark.parametrize("method", train.METHODS)
def test_methods_have_their_options(run, method):
    status, out, _ = run("train", method, "--help")
    assert status == 0
    assert out.startswith(f"usage: hf-anomaly train {method} ")
    assert "--dataset_name" in out


@pytest.mark.parametrize("spelling", [["--num_processes", "3"], ["--num-processes=3"]])
def test_several_processes(spelling, monkeypatch):
    parsed = train.parse(["dia", "--seed", "1", *spelling, "--bf16"])
    assert parsed == ("dia", ["--seed", "1", "--bf16"], 3)
    started = []
    monkeypatch.setenv("HF_TEST", "kept")
    environment = {}

    def start(command, env):
        started.append(command)
        environment.update(env)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(SystemExit) as exit:
        train.run(parsed)
    assert exit.value.code == 7
    words = " ".join(started[0])
    assert "accelerate.commands.launch --multi_gpu --num_processes 3 " in words
    assert words.endswith("-m hf_anomaly.cli train dia --seed 1 --bf16")
    assert environment["HF_TEST"] == "kept"
    assert torch.cuda.is_available() or environment["ACCELERATE_USE_CPU"] == "true"


def test_two_processes_train(tmp_path):
    """As many images a process and step: two processes need half the steps of one for an epoch of 114 images."""
    tiny = "--num_train_epochs 1 --per_device_train_batch_size 8 --hidden_sizes 4 4 4 --latent_size 4 --disable_tqdm true --report_to none"
    command = [
        sys.executable,
        "-m",
        "hf_anomaly.cli",
        "train",
        "shared_ae",
        "--num_processes",
        "2",
        *tiny.split(),
        "--output_dir",
        str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert (results["num_processes"], results["num_train"], results["steps"]) == (2, 114, 114 // 16)
    assert ended.stdout.count("saved: ") == 1


# calibrate -------------------------------------------------------------------------------------------------------------------------


def random_images(folder, number, seed=1):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 16, 16), dtype=np.uint8)
    paths = [folder / f"{i:02}.png" for i in range(number)]
    for path, image in zip(paths, pixels, strict=True):
        PIL.Image.fromarray(image).save(path)
    return paths


def test_calibrate_by_other_images(run, detector, tmp_path, caplog):
    paths = random_images(tmp_path / "site", 24)
    scores = scores_of(detector, paths)
    former = AutoModel.from_pretrained(detector).calibration.threshold.item()
    before = {path.name: path.read_bytes() for path in detector.iterdir() if path.is_file()}
    status, out, err = run("calibrate", detector, "--dataset_name", "site", "--output_dir", "here", "--false_positive_rate", ".2")
    assert status == 0, err
    threshold = scores.sort().values[19].item()  # the ⌈.8 · 25⌉-th smallest of 24
    flagged = (scores > former).double().mean().item()
    assert out.splitlines() == [
        f"before: of these images {flagged:.1%} were flagged, at the threshold {former:.6g}",
        f"threshold: {threshold:.6g}, for a false-positive rate of 0.2, from 24 held-out normal images",
        "saved: here",
    ]
    assert (scores_of("here", paths) == scores).all()
    loaded = AutoModel.from_pretrained("here")
    assert loaded.is_anomalous(scores).sum() == 4
    assert loaded.p_values(scores.max()[None]).item() == 1 / 25 * 2
    assert {path.name: path.read_bytes() for path in detector.iterdir() if path.is_file()} == before
    assert not any(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize(("shift", "warned"), [(5, True), (-5, False)])
def test_calibrate_by_images_that_trained_the_detector_is_told(run, detector, tmp_path, caplog, shift, warned):
    """They score lower than those that were held out."""
    scores = scores_of(detector, random_images(tmp_path / "site", 24))
    model = AutoModel.from_pretrained(detector)
    model.calibration.fit(scores + shift, 0.05)
    model.config.num_calibration_scores = 24
    shutil.copytree(detector, "model")
    model.save_pretrained("model")
    assert run("calibrate", "model", "--dataset_name", "site", "--output_dir", "here")[0] == 0
    assert ("if it was trained on them" in caplog.text) == warned


def test_calibrate_in_place_by_the_normal_ones_of_labelled_images(run, refused, detector, tmp_path, caplog):
    shutil.copytree(detector, "model")
    Path("model/eval_results.json").write_text('{"dataset": "site", "num_train": 30, "seed": 1, "auroc": 0.5, "num_normal": 9}')
    normal = random_images(tmp_path / "site/train/fine", 20)
    random_images(tmp_path / "site/train/dent", 5, seed=2)
    refused(["calibrate", "model", "--dataset_name", "site", "--output_dir", "model"], "normal_label", "dent")
    assert Path("model/eval_results.json").is_file()
    status, out, err = run("calibrate", "model", "--dataset_name", "site", "--normal_label", "fine", "--output_dir", "model")
    assert status == 0, err
    assert "for a false-positive rate of 0.05, from 20 held-out normal images" in out  # the rate is the detector's own
    assert "left out of eval_results.json and card: the results measured before" in out
    assert (
        "measured before" not in run("calibrate", "model", "--dataset_name", "site", "--normal_label", "fine", "--output_dir", "model")[1]
    )
    assert (AutoModel.from_pretrained("model").calibration.scores == scores_of("model", normal).sort().values).all()
    told = json.loads(Path("model/eval_results.json").read_text())
    reason = "the detector was calibrated again since it was evaluated"
    assert told == {"dataset": "site", "num_train": 30, "seed": 1, "reason": reason, "calibrated_on": "site"}
    assert without_measurements({"seed": 1, "reason": "no anomalies", "auroc": None}) == {"seed": 1, "reason": "no anomalies"}
    assert without_measurements({"auroc": 0.9}) == {}
    assert any("trained on images of the same name, site" in record.getMessage() for record in caplog.records)


def test_what_trained_a_detector_is_told_after_it_is_calibrated_elsewhere(run, refused, tmp_path):
    tiny = ["--max_steps", 2, "--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--disable_tqdm", "true", "--use_cpu", "true"]
    status, _, err = run("train", "shared_ae", "--output_dir", "trained", *tiny)
    assert status == 0, err
    random_images(tmp_path / "site", 20)
    assert run("calibrate", "trained", "--dataset_name", "site", "--output_dir", "here")[0] == 0
    out = run("info", "here")[1]
    assert "digits, 114 images" in out
    assert " the detector was calibrated again since it was evaluated" in out
    assert "AUROC" not in out
    refused(["compare", "here"], "here has no AUROC: the detector was calibrated again")

    def data(card):
        return card.partition("<!-- hf-anomaly: data -->")[2].partition("<!-- /hf-anomaly: data -->")[0]

    before = Path("trained/README.md").read_text()
    assert data(Path("here/README.md").read_text()) == data(before)
    status, _, err = run("card", "here")
    assert status == 0, err
    card = Path("here/README.md").read_text()
    assert data(card) == data(before)
    assert "Not measured: the detector was calibrated again" in card
    assert "| AUROC |" not in card
    status, out, err = run("evaluate", "here", "--dataset_name", "digits")
    assert status == 0, err
    assert json.loads(out)["auroc"] == json.loads(Path("trained/eval_results.json").read_text())["auroc"]


# evaluate --record -------------------------------------------------------------------------------------------------------------


def labelled_images(folder):
    random_images(folder / "test" / "good", 12)
    random_images(folder / "test" / "dent", 8, seed=2)
    random_images(folder / "test" / "hole", 6, seed=3)


def test_an_evaluation_is_recorded_beside_what_was_known_of_the_training(run, refused, detector, tmp_path):
    shutil.copytree(detector, "model")
    of_the_training = {
        "dataset": "home", "normal_label": "good", "split_hash": "a1b2", "num_train": 30, "num_calibration": 39, "seed": 1, "steps": 7,
        "division": {"protocol": "official", "seed": 1},
    }  # fmt: skip
    Path("model/eval_results.json").write_text(json.dumps({**of_the_training, "auroc": 0.123, "pixel_auroc": 0.456, "num_normal": 99}))
    assert run("card", "model")[0] == 0
    with Path("model/README.md").open("a") as card:
        card.write("\nKeep it dry.\n")
    random_images(tmp_path / "site", 20)
    status, _, err = run("calibrate", "model", "--dataset_name", "site", "--output_dir", "model")
    assert status == 0, err
    labelled_images(tmp_path / "ward")
    status, out, err = run("evaluate", "model", "--dataset_name", "ward", "--record", "true", "--card_figures", "true")
    assert status == 0, err
    printed, recorded = json.loads(out), json.loads(Path("model/eval_results.json").read_text())
    images = {name: printed[name] for name in ("dataset", "normal_label", "split_hash", "division")}
    assert (images["dataset"], images["normal_label"]) == ("ward", "good")
    measured = {name: value for name, value in printed.items() if name not in (*images, "seconds")}
    bfloat16 = {name: recorded.pop(name) for name in ("bfloat16_rank_correlation", "bfloat16_num_images")}
    assert bfloat16["bfloat16_num_images"] == 26
    assert recorded == {**of_the_training, "calibrated_on": "site", **measured, "evaluated_on": images}
    card = Path("model/README.md").read_text()
    assert "Dataset `home`, normal class `good`: 30 normal images" in card
    assert f"On 12 normal and 14 anomalous images of `ward`, normal class `good`, split hash `{printed['split_hash']}`:" in card
    assert f"| AUROC | {printed['auroc']:.4f} (95% interval" in card
    assert "| hole | 6 |" in card
    assert "on images like the 20 of `site` that calibrated it after the training. On the images measured it flagged" in card
    assert "0.123" not in card
    assert "Pixel AUROC" not in card
    assert "![ROC curve" in card
    assert "name: ward" in card
    assert card.count("Keep it dry.") == 1
    out = run("info", "model")[1]
    assert "home, 30 images" in out
    assert "on 20 held-out normal images of site, for" in out
    assert f"on 12 normal and 14 anomalous images of ward (split {printed['split_hash'][:12]})" in out
    assert run("compare", "model")[1].startswith("ward: normal is good; 12 normal and 14 anomalous test images")
    # Another evaluation takes its place, and its figures go.
    (tmp_path / "ward" / "test" / "dent" / "07.png").unlink()
    assert run("evaluate", "model", "--dataset_name", "ward", "--record", "true")[0] == 0
    card = Path("model/README.md").read_text()
    assert "On 12 normal and 13 anomalous images" in card
    assert "![" not in card
    assert not Path("model/figures").exists()
    assert card.count("Keep it dry.") == 1


def test_an_interrupted_record_leaves_no_figures_of_other_results(run, detector, tmp_path, monkeypatch):
    shutil.copytree(detector, "model")
    labelled_images(tmp_path / "ward")
    command = ["evaluate", "model", "--dataset_name", "ward", "--record", "true"]
    assert run(*command, "--card_figures", "true")[0] == 0
    monkeypatch.setattr("hf_anomaly.training.commands.evaluate.write_json", Mock(side_effect=KeyboardInterrupt))
    assert run(*command)[0] == 130
    assert not Path("model/figures").exists()


def test_an_evaluation_on_the_images_that_calibrated_is_told(run, detector, tmp_path, caplog):
    labelled_images(tmp_path / "ward")
    warning = "100 % of these normal images have the scores of images that calibrated the detector"
    assert run("evaluate", detector, "--dataset_name", "ward")[0] == 0
    assert warning not in caplog.text
    assert run("calibrate", detector, "--dataset_name", "ward/test/good", "--output_dir", "here")[0] == 0
    assert run("evaluate", "here", "--dataset_name", "ward", "--batch_size", "5")[0] == 0
    assert warning in caplog.text
    assert run("report", "here", "--dataset_name", "ward")[0] == 0
    assert "100 % of the normal images here have the scores of images that calibrated" in Path("report.html").read_text()


def test_an_evaluation_is_recorded_where_nothing_is_known_of_the_training(run, detector, tmp_path):
    shutil.copytree(detector, "model")
    labelled_images(tmp_path / "ward")
    status, out, err = run("evaluate", "model", "--dataset_name", "ward", "--record", "true")
    assert status == 0, err
    assert "## Training data\n\nNot recorded." in (card := Path("model/README.md").read_text())
    assert f"| AUROC | {json.loads(out)['auroc']:.4f} (" in card


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--record", "true", "--model", "org/model"], ["--record", "'org/model' is none", "push it afterwards"]),
        (["--card_figures", "true"], ["--card_figures", "--record true"]),
        (["--record", "true", "--window", "0", "9"], ["--window", "--record", "leave it out"]),
        (["--record", "true", "--dataset_name", "normal"], ["--record", "nothing to measure on"]),
        (["--record", "true", "--streaming", "true", "--dataset_name", "normal"], ["--record", "nothing was measured", "all 3 images"]),
        (["--record", "true", "--streaming", "true", "--card_figures", "true"], ["--card_figures", "--streaming"]),
    ],
)
def test_what_is_not_recorded(refused, detector, tmp_path, argv, words):
    shutil.copytree(detector, "model")
    random_images(tmp_path / "normal" / "test" / "good", 3)
    labelled_images(tmp_path / "ward")
    before = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    refused(["evaluate", "model", "--dataset_name", "ward", *argv], *words)
    assert {path.name: path.read_bytes() for path in Path("model").iterdir()} == before


def test_a_detector_that_calibrating_replaces_is_told(run, detector, tmp_path, caplog):
    random_images(tmp_path / "site", 20)
    assert run("calibrate", detector, "--dataset_name", "site", "--output_dir", "here")[0] == 0
    assert "will be replaced" not in caplog.text
    assert run("calibrate", detector, "--dataset_name", "site", "--output_dir", "here")[0] == 0
    assert "The detector in here will be replaced" in caplog.text
    caplog.clear()
    assert run("calibrate", "here", "--dataset_name", "site", "--output_dir", "here")[0] == 0
    assert "will be replaced" not in caplog.text


def test_unlabelled_images_have_no_other_class(run, detector, tmp_path, caplog):
    random_images(tmp_path / "site/train/fine", 3)
    shutil.copytree(detector, "unlabelled")
    config = json.loads(Path("unlabelled/config.json").read_text())
    Path("unlabelled/config.json").write_text(json.dumps({**config, "normal_label": "normal"}))
    status, _, err = run("calibrate", "unlabelled", "--dataset_name", "site", "--output_dir", "here", "--false_positive_rate", ".3")
    assert status == 0, err
    assert "Normal is" not in caplog.text


def test_calibrate_by_another_class_is_told(run, detector, tmp_path, caplog):
    random_images(tmp_path / "site/train/fine", 3)
    status, _, err = run("calibrate", detector, "--dataset_name", "site", "--output_dir", "here", "--false_positive_rate", ".3")
    assert status == 0, err
    assert any("Normal is 'fine' here, but the detector was trained on 'good'" in record.getMessage() for record in caplog.records)


def test_calibrate_takes_a_split_of_that_name(run, without_maps, tmp_path):
    random_images(tmp_path / "site/train", 9)
    random_images(tmp_path / "site/calibration", 6, seed=2)
    status, out, err = run("calibrate", without_maps, "--dataset_name", "site", "--output_dir", "here", "--false_positive_rate", ".3")
    assert status == 0, err
    assert out.startswith("threshold: ")  # there was none before
    assert "from 6 held-out" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset_name", "site"], ["--output_dir"]),
        (["--output_dir", "here"], ["--dataset_name"]),
        (["--dataset_name", "site", "--output_dir", "here", "--false_positive_rate", "0"], ["false_positive_rate", "0"]),
        (["--dataset_name", "site", "--output_dir", "site/00.png"], ["--output_dir", "site/00.png"]),
        (["--dataset_name", "site", "--output_dir", "here", "--calibration_fraction", ".5"], ["--calibration_fraction"]),
        (["--dataset_name", "site", "--output_dir", "here", "--protocol", "balanced"], ["--protocol"]),
        (["--dataset_name", "site", "--output_dir", "here", "--batch_size", "0"], ["--batch_size"]),
        (["--dataset_name", "nowhere/at/all", "--output_dir", "here"], ["nowhere/at/all"]),
    ],
)
def test_what_does_not_calibrate(refused, detector, tmp_path, argv, words):
    random_images(tmp_path / "site", 3)
    refused(["calibrate", detector, *argv], *words)
    assert not Path("here").exists()


# predict --------------------------------------------------------------------------------------------------------------------------


def test_a_table(run, detector, scans):
    paths = [scans / name for name in ("a.png", "b.png", "sub/a.png", "sub/c.png")]
    scores = scores_of(detector, paths)
    model = AutoModel.from_pretrained(detector)
    for sources in ([scans], paths, [f"{scans}/*.png", f"{scans}/sub/*.png"], [f"{scans}/**/*.png"]):
        status, out, err = run("predict", detector, *sources, "--batch_size", 3)
        assert status == 0, err
        rows = list(csv.DictReader(out.splitlines()))
        assert list(rows[0]) == COLUMNS
        found = {row["image"]: row for row in rows}
        assert found.keys() == {str(path) for path in paths}
        for path, score, p_value, flagged in zip(paths, scores, model.p_values(scores), model.is_anomalous(scores), strict=True):
            row = found[str(path)]
            assert float(row["score"]) == pytest.approx(score.item(), rel=1e-5)
            assert float(row["p_value"]) == p_value.item()
            assert row["label"] == ("anomaly" if flagged else "normal")
    assert "4 scored" in err
    err = run("predict", detector, scans, "--threshold", scores.min().item() + 1e-6)[2]
    assert err.splitlines()[-1] == "4 scored, 3 flagged"
    assert "Loading weights" not in err
    assert not are_progress_bars_disabled(), "a download takes its time"


def test_files_and_maps(run, detector, scans, caplog):
    status, out, err = run("predict", detector, scans, "--output", "out/scores.jsonl", "--save_maps", "maps", "--false_positive_rate", 0.5)
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].endswith(" flagged: out/scores.jsonl")
    rows = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    model = AutoModel.from_pretrained(detector)
    assert {row["threshold"] for row in rows} == {model.calibration.threshold_at(0.5)}
    assert [row["overlay"] for row in rows] == ["000000_a.png", "000001_b.png", "000002_a.png", "000003_c.png"]
    assert sorted(path.name for path in Path("maps").iterdir()) == [row["overlay"] for row in rows]
    assert [path.name for path in Path("out").iterdir()] == ["scores.jsonl"]
    processor = AnomalyImageProcessor.from_pretrained(detector)
    for row in rows:
        image = PIL.Image.open(row["image"])
        output = model(**processor(images=image, return_tensors="pt"), output_anomaly_maps=True)
        (result,) = processor.post_process_anomaly_detection(output, [image.size[::-1]])
        painted = overlay_anomaly_map(image, result["anomaly_map"], value_range=model.config.anomaly_map_range, least_size=224)
        assert np.abs(np.asarray(PIL.Image.open(Path("maps", row["overlay"]))).astype(int) - np.asarray(painted)).max() <= 1
    assert "there are pictures already" not in caplog.text
    Path("maps/mine.png").touch()
    assert run("predict", detector, scans / "b.png", "--save_maps", "maps")[0] == 0
    assert caplog.text.count("--save_maps maps: there are pictures already") == 1
    assert len(list(Path("maps").iterdir())) == len(rows) + 2
    assert "lies in" not in caplog.text
    shutil.copytree(scans, "here")
    assert run("predict", detector, "here", "--save_maps", "here/new/maps")[0] == 0
    assert caplog.text.count("--save_maps here/new/maps lies in here") == 1
    # Too few calibration images for the rate: an infinite threshold, which JSON does not know.
    status, _, err = run("predict", detector, scans / "a.png", "--output", "x.jsonl", "--false-positive-rate", 0.001)
    assert status == 0, err
    assert json.loads(Path("x.jsonl").read_text())["threshold"] is None


def test_datasets(run, refused, detector, scans):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    np.savez("images.npz", train_images=images[:2], test_images=images)
    refused(["predict", detector, "images.npz"], "train, test", "--split")
    refused(["predict", detector, "images.npz", "--split", "dev"], "'dev'", "train, test")
    status, out, err = run("predict", detector, "images.npz", "--split", "test")
    assert status == 0, err
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["image"] for row in rows] == [f"test/{i}" for i in range(5)]
    pixel_values = torch.from_numpy(images)[:, None] / 127.5 - 1
    with torch.no_grad():
        scores = AutoModel.from_pretrained(detector)(pixel_values).scores
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    rows = csv.DictReader(run("predict", detector, scans / "a.png", "images.npz", "--split", "test")[1].splitlines())
    assert [row["image"] for row in rows] == [str(scans / "a.png"), *(f"test/{i}" for i in range(5))]


def test_the_files_that_a_table_lists(run, refused, detector, scans):
    Path("list.csv").write_text(f"path,split\n{scans}/a.png,old\n{scans}/sub/c.png,new\n{scans}/b.png,new\n")
    refused(["predict", detector, "list.csv"], "'file_name'", "path, split", "image_column")
    refused(["predict", detector, "list.csv", "--image_column", "path"], "old, new", "--split")
    status, out, err = run("predict", detector, "list.csv", "--image_column", "path", "--split", "new")
    assert status == 0, err
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["image"] for row in rows] == [f"{scans}/sub/c.png", f"{scans}/b.png"]
    assert [float(row["score"]) for row in rows] == pytest.approx(scores_of(detector, [row["image"] for row in rows]).tolist(), rel=1e-5)
    Path("LIST.CSV").write_text(f"image;Split\n{scans}/a.png;Train\n{scans}/b.png;Val\n")
    status, out, err = run("predict", detector, "LIST.CSV", "--split", "Val")
    assert status == 0, err
    assert [row["image"] for row in csv.DictReader(out.splitlines())] == [f"{scans}/b.png"]
    Path("list.csv").write_text(f"file_name\n{scans}/a.png\n{scans}/gone.png\n{scans}/b.png\n")
    refused(["predict", detector, "list.csv"], "list.csv, line 3: there is no file", "gone.png")
    status, out, err = run("predict", detector, "list.csv", "--on_error", "skip")
    assert status == 1, err
    assert [row["image"] for row in csv.DictReader(out.splitlines())] == [f"{scans}/a.png", f"{scans}/b.png"]
    assert any(line.startswith("skipped: ") and "gone.png" in line for line in err.splitlines())


def test_an_archive_is_to_be_unpacked(refused, detector):
    Path("scans.zip").write_bytes(b"PK")
    refused(["predict", detector, "scans.zip"], "'scans.zip' is an archive; unpack it")


def test_folders_that_hold_datasets(run, refused, detector, scans):
    images = datasets.Dataset.from_dict({"image": [str(scans / f"{name}.png") for name in "ab"]}).cast_column("image", datasets.Image())
    Path("parquet").mkdir()
    images.to_parquet("parquet/train-00000-of-00001.parquet")
    images.save_to_disk("saved")
    datasets.DatasetDict({"train": images.select([0]), "test": images}).save_to_disk("splits")
    expected = [line.split(",")[1:] for line in run("predict", detector, scans / "a.png", scans / "b.png")[1].splitlines()[1:]]
    for folder, split in (("parquet", "train"), ("saved", "train"), ("splits", "test")):
        status, out, err = run("predict", detector, folder, *(["--split", split] if folder == "splits" else []))
        assert status == 0, err
        assert [line.split(",") for line in out.splitlines()[1:]] == [[f"{split}/{i}", *values] for i, values in enumerate(expected)]
    refused(["predict", detector, "splits"], "train, test", "--split")


def test_a_parquet_file_as_pandas_writes_it(run, detector, scans):
    """Its images are structures of bytes and path, of which nothing says that they are images."""
    pandas = pytest.importorskip("pandas")
    content = [{"bytes": (scans / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    pandas.DataFrame({"image": content, "label": [0, 1]}).to_parquet("scans.parquet")
    status, out, err = run("predict", detector, "scans.parquet")
    assert status == 0, err
    scores = [float(row["score"]) for row in csv.DictReader(out.splitlines())]
    assert scores == pytest.approx(scores_of(detector, [scans / "a.png", scans / "b.png"]).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_a_parquet_file_of_bytes_alone(run, detector, scans, kind):
    content = {"image": [(scans / name).read_bytes() for name in ("a.png", "b.png")]}
    datasets.Dataset.from_dict(content, datasets.Features({"image": datasets.Value(kind)})).to_parquet("scans.parquet")
    status, out, err = run("predict", detector, "scans.parquet")
    assert status == 0, err
    scores = [float(row["score"]) for row in csv.DictReader(out.splitlines())]
    assert scores == pytest.approx(scores_of(detector, [scans / "a.png", scans / "b.png"]).tolist(), rel=1e-5)


@pytest.mark.parametrize("source", ["scans.parquet", "saved"])
def test_columns_of_arrays(run, refused, detector, scans, source):
    names = [scans / "a.png", scans / "b.png"]
    arrays = [np.asarray(PIL.Image.open(name)).tolist() for name in names]
    features = datasets.Features({"image": datasets.List(datasets.List(datasets.Value("uint8")))})
    for images in (arrays, [*arrays, [[0, 1], [2]]]):
        images = datasets.Dataset.from_dict({"image": images}, features=features)
        images.to_parquet(source) if source == "scans.parquet" else images.save_to_disk(source)
        if len(images) > 2:
            refused(["predict", detector, source], "column 'image'", "inhomogeneous shape")
            continue
        status, out, err = run("predict", detector, source)
        assert status == 0, err
        scores = [float(row["score"]) for row in csv.DictReader(out.splitlines())]
        assert scores == pytest.approx(scores_of(detector, names).tolist(), rel=1e-5)


def test_what_of_a_folder_is_scored(run, refused, detector, scans):
    refused(["predict", detector, scans, "--split", "test"], "--split is of datasets")
    (scans / "ground_truth").mkdir()
    shutil.copy(scans / "a.png", scans / "ground_truth" / "a_mask.png")
    assert "ground_truth" not in run("predict", detector, scans)[1]
    for name in ("images/A.PNG", "masks/A.PNG"):
        Path("lungs", name).parent.mkdir(parents=True)
        shutil.copy(scans / "a.png", Path("lungs", name))
    assert [line.split(",")[0] for line in run("predict", detector, "lungs")[1].splitlines()[1:]] == ["lungs/images/A.PNG"]
    for folder in ("faces/with", "faces/masks"):
        shutil.copytree(scans, folder, ignore=shutil.ignore_patterns("ground_truth"))
    assert "masks" in run("predict", detector, "faces")[1], "a class"


def test_pages_that_are_not_scored_are_told_of(run, detector, tmp_path, caplog):
    pages = [PIL.Image.new("L", (16, 16), level) for level in (10, 200)]
    for name in ("scan.tif", "scan.gif", "scan.webp", "scan.png"):
        pages[0].save(name, save_all=True, append_images=pages[1:])
        assert run("predict", detector, name)[0] == 0
        assert f"{name} has 2 pages or frames, of which only the first is scored" in caplog.text


def test_broken_later_pages_do_not_end_it(run, detector, tmp_path):
    pages = [PIL.Image.new("L", (16, 16), level) for level in (10, 100, 200)]
    pages[0].save("scan.tif", save_all=True, append_images=pages[1:])
    Path("scan.tif").write_bytes(Path("scan.tif").read_bytes()[:-450])  # in the directory of the second page
    status, _, err = run("predict", detector, "scan.tif")
    assert status == 0, err


def test_a_threshold_that_flags_nothing_is_told_of(run, detector, scans, caplog):
    model = AutoModel.from_pretrained(detector)
    model.calibration.fit(model.calibration.scores[:4], 0.05)
    model.config.num_calibration_scores = 4
    model.save_pretrained("few")
    caplog.clear()
    assert run("predict", "few", scans)[0] == 0
    assert "4 calibration images are too few for its rate of 0.05" in caplog.text
    assert "false_positive_rate of at least 0.2" in caplog.text


def test_who_reads_the_table_may_stop(detector, scans):
    """The table of the console script, which registers the detectors before the command."""
    command = [sys.executable, "-c", f"{SCRIPT}main()", "predict", str(detector), *[str(scans / "a.png")] * 20_000]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "image,score,p_value,label,threshold\n"
    process.stdout.close()
    err = process.stderr.read()
    assert "Traceback" not in err
    assert process.wait() == 141


def test_names_that_cannot_be(refused, detector, scans):
    refused(["predict", detector, scans, "--output", "x" * 300 + ".csv"], "File name too long")


def test_names_that_are_not_utf_8_are_refused_first(refused, detector, scans):
    name = os.fsdecode(b"\xff.png")
    try:
        shutil.copy(scans / "a.png", name)
    except OSError:
        pytest.skip("this file system has no such names")
    refused(["predict", detector, scans, ".", "--output", "scores.csv"], r"'\udcff.png'", "not UTF-8; rename it")


def test_names_that_the_terminal_cannot_show(run, detector, scans, monkeypatch):
    shutil.copy(scans / "a.png", "肺.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("predict", detector, "肺.png")[0] == 0
    terminal.flush()
    assert rb"\u80ba.png," in terminal.buffer.getvalue()


def test_overlays_of_images_with_long_names(run, detector, scans):
    shutil.copy(scans / "a.png", "肺" * 82 + ".png")
    status, out, err = run("predict", detector, ".", "--save_maps", "maps")
    assert status == 0, err
    (overlay,) = Path("maps").iterdir()
    assert overlay.name == "000000_" + "肺" * 66 + ".png"
    assert f",{overlay.name}\n" in out


def test_a_broken_image_ends_it(refused, detector, with_broken):
    Path("scores.csv").write_text("an earlier table")
    refused(["predict", detector, *with_broken, "--output", "scores.csv"], with_broken[1], "unreadable")
    assert Path("scores.csv").read_text() == "an earlier table"
    assert not list(Path().glob(".*.tmp"))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_broken_image_is_skipped(run, detector, with_broken, batch_size):
    argv = ["predict", detector, *with_broken, "--output", "scores.csv", "--on-error", "skip", "--save_maps", "maps"]
    status, _, err = run(*argv, "--batch_size", batch_size)
    assert status == 1
    assert f"skipped: {with_broken[1]}: unreadable" in err
    assert err.splitlines()[-1].startswith("2 scored")
    assert "1 skipped" in err.splitlines()[-1]
    rows = list(csv.DictReader(Path("scores.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [str(with_broken[0]), str(with_broken[2])]
    assert [float(row["score"]) for row in rows] == pytest.approx(scores_of(detector, with_broken[::2]).tolist(), rel=1e-5)
    assert [row["overlay"] for row in rows] == ["000000_a.png", "000001_b.png"]


def test_memory_is_constant(detector, scans, monkeypatch, run):
    """However many images, no more than one is held at its own size; with maps, no more than a batch and the next."""
    from hf_anomaly import data

    decode, alive, most = data.decode_image, set(), [0]

    def counting(value, where, window):
        image = decode(value, where, window)
        alive.add(id(image))
        weakref.finalize(image, alive.remove, id(image))
        most[0] = max(most[0], len(alive))
        return image

    monkeypatch.setattr(data, "decode_image", counting)
    for flags, limit in (([], 2), (["--save_maps", "maps"], 9)):
        most[0] = 0
        status, out, _ = run("predict", detector, *[scans / "a.png"] * 50, "--batch_size", 4, *flags)
        assert (status, len(out.splitlines())) == (0, 51)
        assert most[0] <= limit


def test_without_calibration_and_maps(run, refused, without_maps, scans):
    status, out, err = run("predict", without_maps, scans / "a.png")
    assert status == 0
    (row,) = csv.DictReader(out.splitlines())
    assert (row["p_value"], row["label"], row["threshold"]) == ("", "", "")
    assert "flagged" not in err
    for threshold in ("-100", "-1e2"):
        status, out, err = run("predict", without_maps, scans / "a.png", "--threshold", threshold)
        assert err.splitlines()[-1] == "1 scored, 1 flagged"
        assert [row["label"] for row in csv.DictReader(out.splitlines())] == ["anomaly"]
    refused(["predict", without_maps, scans, "--save_maps", "maps"], "--save_maps", "maps")
    assert not Path("maps").exists()


def test_links_that_lead_round_and_round(run, detector, tmp_path):
    (tmp_path / "scans" / "sub").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for name in ("scans/a", "scans/sub/b", "more/c"):
        PIL.Image.new("L", (16, 16)).save(tmp_path / f"{name}.png")
    for link, target in (("scans/self", "scans"), ("scans/sub/up", "scans"), ("scans/more", "more"), ("more/back", "scans")):
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    for folder in ("scans", tmp_path / "scans"):
        status, out, err = run("predict", detector, folder)
        assert status == 0, err
        assert [Path(row["image"]).name for row in csv.DictReader(out.splitlines())] == ["a.png", "c.png", "b.png"]


def test_where_predict_cannot_write_or_compute(refused, detector, scans):
    Path("table.csv").mkdir()
    Path("maps").write_text("")
    refused(["predict", detector, scans, "--output", "table.csv"], "--output table.csv", "folder")
    refused(["predict", detector, scans, "--save_maps", "maps"], "--save_maps maps", "file")
    refused(["predict", detector, scans, "--output", "new.csv", "--save_maps", "new.csv"], "--save_maps new.csv", "another output")
    on_digits = ("--dataset_name", "digits")
    for command in (["predict", detector, scans], ["evaluate", detector, *on_digits], ["report", detector, *on_digits]):
        refused([*command, "--device", "foo"], "--device foo", "cpu or cuda")
    for command in ("evaluate", "report"):
        refused([command, detector], "--dataset_name is missing")
        refused([command, detector, *on_digits, "--output", "table.csv"], "--output table.csv", "folder")
    refused(["evaluate", detector, *on_digits, "--save_maps", "maps"], "--save_maps maps", "file")
    refused(["evaluate", detector, *on_digits, "--scores", "new.csv", "--save_maps", "new.csv"], "--save_maps new.csv", "another output")


def test_no_command_writes_over_its_input(refused, detector, scans):
    Path("list.csv").write_text(f"file_name\n{scans / 'a.png'}\n")
    Path("link.csv").symlink_to("list.csv")
    shutil.copy(scans / "a.png", "a.png")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    refused(["predict", detector, scans, "list.csv", "--output", "./link.csv"], "--output ./link.csv", "input")
    refused(["dissolve", detector, "a.png", "--output", "a.png"], "--output a.png", "input")
    for command, flag in (("evaluate", "--output"), ("evaluate", "--scores"), ("report", "--output")):
        refused([command, detector, "--dataset_name", "list.csv", flag, "list.csv"], f"{flag} list.csv", "input")
    refused(["evaluate", detector, "--dataset_name", "digits", "--output", "x.csv", "--scores", "x.csv"], "--output x.csv", "output")
    assert before == {path: path.read_bytes() for path in Path().iterdir()}


def test_what_predict_does_not_find(refused, detector, scans):
    refused(["predict", detector, "none.png"], "none.png", "no such file")
    refused(["predict", detector, "none/*.png"], "none/*.png", "matches no file")
    refused(["predict", detector, f"{scans}/su*"], f"{scans}/su*", "matches no file")  # but a folder
    refused(["predict", "no-model", scans], "no-model")
    Path("empty").mkdir()
    refused(["predict", detector, "empty"], "empty holds neither images nor parquet files")


def test_predict_with_a_window(run, refused, detector, tmp_path):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    PIL.Image.fromarray(levels).save("plain.png")
    PIL.Image.fromarray(levels.astype(np.uint16) * 100).save("deep.png")
    refused(["predict", detector, "deep.png"], "deep.png", "--window LOW HIGH")
    scores = [run("predict", detector, "deep.png", "--window", *window)[1].split(",")[5] for window in ((0, 25500), ("full",))]
    assert scores[0] == run("predict", detector, "plain.png")[1].split(",")[5]
    assert scores[1] != scores[0]
    refused(["predict", detector, "deep.png", "--window", "half"], "--window takes two numbers")


# dissolve -------------------------------------------------------------------------------------------------------------------------


def test_dissolve(run, refused, scans, detector, tmp_path):
    torch.manual_seed(0)
    DiffusionDissolver(build_unet(8, 1, (8, 8)), build_scheduler(), t_min=10, t_max=90).save_pretrained("dissolver")
    status, out, err = run("dissolve", "dissolver", scans / "a.png", scans / "b.png", "--timesteps", 20, 80, "--output", "out/row.png")
    assert status == 0, err
    assert "saved: out/row.png" in out
    grid = np.asarray(PIL.Image.open("out/row.png").convert("L"))
    # 12×20 pixels, enlarged 7 times: three columns of 140 and two rows of 84, with margins of 4 and 20 above for the captions.
    assert grid.shape == (20 + 2 * 88 + 4, 3 * 144 + 4)
    original = np.asarray(PIL.Image.open(scans / "a.png"))
    assert np.array_equal(grid[20 : 20 + 84 : 7, 4 : 4 + 140 : 7], original)
    first, second = (grid[20 : 20 + 84, 4 + 144 * i : 144 + 144 * i].astype(int) for i in (1, 2))
    assert np.abs(first - second).max() > 0
    status, _, err = run("dissolve", "dissolver", scans / "a.png")
    assert status == 0, err
    assert PIL.Image.open("dissolved.png").width == 6 * 144 + 4  # itself and five timesteps
    refused(["dissolve", "dissolver", scans / "a.png", "--timesteps", 5000], "5000")
    refused(["dissolve", "dissolver", "none.png"], "none.png")
    PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 100).save("deep.png")
    refused(["dissolve", "dissolver", "deep.png"], "deep.png", "--window LOW HIGH")
    assert run("dissolve", "dissolver", "deep.png", "--window", 0, 6300)[0] == 0
    refused(["dissolve", "dissolver", "deep.png", "--window", 5, 1], "--window takes two numbers")
    refused(["dissolve", detector, scans / "a.png"], detector, "no dissolver")


def test_timesteps_of_a_blur_are_kernel_sizes(run, refused, scans):
    MedianDissolver([3, 5]).save_pretrained("median")
    assert run("dissolve", "median", scans / "a.png", "--timesteps", 7)[0] == 0
    refused(
        ["dissolve", "median", scans / "a.png", "--timesteps", 30], "--timesteps are the kernel sizes of a median dissolver", "use 29 or 31"
    )
    refused(
        ["dissolve", "median", scans / "a.png", "--timesteps", 31],
        "--timesteps are the kernel sizes of a median dissolver",
        "use at most 23",
    )


def test_an_image_too_small_for_a_blur_is_named(run, refused, scans):
    GaussianDissolver(3).save_pretrained("blur")
    PIL.Image.new("L", (1, 1)).save("dot.png")
    refused(["dissolve", "blur", scans / "a.png", "dot.png"], "dot.png: kernel_size 3 is too large")


def test_a_blur_beside_a_detector(run, refused, scans, detector):
    shutil.copytree(detector, "model")
    GaussianDissolver(3).save_pretrained("model/dissolver")
    status, _, err = run("dissolve", "model", scans / "a.png")
    assert status == 0, err
    assert PIL.Image.open("dissolved.png").size == (2 * 132 + 4, 20 + 132 + 4)  # 16 pixels, as the detector sees it, 8 times
    refused(["dissolve", "model", scans / "a.png", "--timesteps", 20], "--timesteps", "gaussian")


def test_a_dissolver_sees_images_as_its_detector_does(run, scans, detector, monkeypatch):
    grids = []
    monkeypatch.setattr("hf_anomaly.visualization.image_grid", lambda *parts: grids.append(parts) or PIL.Image.new("L", (1, 1)))
    shutil.copytree(detector, "model")
    AnomalyImageProcessor.for_images(16, 1, window=(0, 6300)).save_pretrained("model")
    MedianDissolver([3, 5]).save_pretrained("model/dissolver")
    PIL.Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 30).save("deep.png")
    assert run("dissolve", "model", "deep.png")[0] == 0
    ((shown, *blurred),), captions = grids.pop()
    assert captions == ["original", "k = 3", "k = 5"]
    levels = (np.arange(256.0).reshape(16, 16) * 30 * 255 / 6300).round().clip(0, 255)
    np.testing.assert_allclose(shown[0], levels / 127.5 - 1, atol=1e-6)
    for k, image in zip((3, 5), blurred, strict=True):
        assert torch.equal(image, MedianDissolver(k)(shown[None])[0])
    GaussianDissolver(3).save_pretrained("blur")
    for mode, channels in (("1", 1), ("LA", 1), ("P", 3), ("RGB", 3)):
        PIL.Image.new(mode, (9, 9)).save("picture.png")
        assert run("dissolve", "blur", "picture.png")[0] == 0
        ((shown, _),), captions = grids.pop()
        assert (tuple(shown.shape), captions) == ((channels, 9, 9), ["original", "dissolved"])
    torch.manual_seed(0)
    DiffusionDissolver(build_unet(8, 3, (8, 8)), build_scheduler()).save_pretrained("colour")
    assert run("dissolve", "colour", scans / "a.png", "--timesteps", 20)[0] == 0
    assert grids.pop()[0][0][0].shape == (3, 12, 20)


# info and push --------------------------------------------------------------------------------------------------------------------


def test_info_of_a_detector(run, detector):
    shutil.copytree(detector, "model")
    results = {"dataset": "scans", "num_train": 39, "num_normal": 7, "num_anomalous": 9, "split_hash": "0123456789abcdef"}
    results |= {"auroc": 0.87654, "average_precision": 0.75, "fpr_at_95_tpr": 0.25, "f1_max": 0.5}
    Path("model/eval_results.json").write_text(json.dumps(results))
    model = AutoModel.from_pretrained("model")

    def told():
        return dict(line.split("  ", 1) for line in run("info", "model")[1].splitlines())

    facts = {name: value.strip() for name, value in told().items()}
    assert facts["images"].startswith("16×16 px, gray")
    assert facts["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}, in float32"
    assert (facts["anomaly maps"], facts["normal"]) == ("yes", "good")
    assert facts["smallest rate"].startswith("0.025;")  # 1 / (39 + 1)
    measured = "AUROC 0.8765, average precision 0.7500, FPR at 95 % TPR 0.2500"
    assert facts["results"] == f"{measured}, on 7 normal and 9 anomalous images of scans (split 0123456789ab)"
    model.calibration.fit(model.calibration.scores[:4], 0.05)
    model.config.num_calibration_scores = 4
    model.save_pretrained("model")
    assert "infinite: too few calibration images, nothing is flagged" in told()["threshold"]
    model.reset_reference()
    model.save_pretrained("model")
    assert "not fitted" in told()["reference"]


def test_info_without_results_and_calibration(run, refused, without_maps):
    status, out, _ = run("info", without_maps)
    assert status == 0
    for fact in ("CSIModel", "no p-values", "unknown: not recorded", "none recorded", "Not a medical device"):
        assert fact in out
    refused(["info", "no-model"], "no-model")


def test_folders_without_a_detector(refused, detector, scans):
    folder = Path("half")
    for command in (["info", folder], ["predict", folder, scans]):
        folder.mkdir()
        refused(command, "'half' holds no detector: give the folder")
        Path("half/pretrained-training/checkpoint-4").mkdir(parents=True)
        refused(command, "'half' holds no detector", "not finished", "--resume_from_checkpoint true")
        for name in ("dissolver_config.json", "model_index.json"):  # of train dissolver, whose own checkpoints stay, and of plain diffusers
            Path("half", name).touch()
            refused(command, "'half' holds a dissolver and no detector", "--dissolver")
            Path("half", name).unlink()
        shutil.rmtree(folder)
    refused(["info", detector / "config.json"], "config.json' is a file")


def test_a_folder_with_odd_results(run, refused, detector, tmp_path):
    AutoModel.from_pretrained(detector).save_pretrained("model")
    AnomalyImageProcessor.for_images(16, 1).save_pretrained("model")
    Path("model/eval_results.json").write_text(json.dumps({"auroc": 0.5, "dataset": "x\x1b[2Jy\n", "split_hash": 3, "fpr_at_95_tpr": "?"}))
    status, out, err = run("info", "model")
    assert status == 0, err
    assert "AUROC 0.5000" in out
    assert "\x1b" not in out
    Path("model/eval_results.json").write_text(json.dumps({"eval_auroc": 0.5}))  # as `trainer.save_metrics` writes it
    out = run("info", "model")[1]
    assert "unknown: not recorded in eval_results.json" in out
    assert "none recorded in eval_results.json" in out
    Path("model/eval_results.json").write_text(json.dumps({"dataset": "scans", "num_train": None}))
    assert "scans, a stream of images" in run("info", "model")[1]
    Path("model/eval_results.json").write_text(json.dumps({"dataset": "scans", "num_train": 21, "division": {"contamination": 0.05}}))
    assert "scans, 21 images, 1 of them anomalies taken for normal" in run("info", "model")[1]

    for odd in ({"seed": "x"}, {"division": []}):
        Path("model/eval_results.json").write_text(json.dumps(odd))
        refused(["evaluate", "model", "--dataset_name", "digits"], "eval_results.json", next(iter(odd)), "restore or delete")
    Path("model/eval_results.json").write_text("{")
    for command in (["info", "model"], ["evaluate", "model", "--dataset_name", "digits"], ["card", "model"]):
        refused(command, "eval_results.json", "not valid JSON")


def test_code_of_a_repository_is_neither_run_nor_asked_for(run, refused, detector, scans, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    shutil.copytree(detector, "own")
    assert run("predict", "own", scans / "a.png")[0] == 0  # it names the package's code
    entries = dict.fromkeys(("AutoConfig", "AutoModel", "AutoBackbone", "AutoImageProcessor"), "evil.Evil")
    for folder in ("evil", "processor"):
        shutil.copytree(detector, folder)
        Path(folder, "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Evil: pass\n")
    Path("evil/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": entries}))
    Path("processor/preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Evil", "auto_map": entries}))
    for name in ("evil", "processor"):
        refused(["predict", name, scans / "a.png"], name, "code", "never run")
    Path("own/eval_results.json").write_text("{}")
    Path("evil/eval_results.json").write_text("{}")
    refused(["card", "own", "--runs", "evil"], "evil", "never run")
    refused(["train", "dia", "--dataset_name", "digits", "--backbone", "evil", "--output_dir", "out"], "evil", "never run")
    refused(["train", "addp", "--dataset_name", "digits", "--pretrained", "evil", "--output_dir", "out"], "evil", "never run")
    assert not Path("ran").exists()


def test_what_is_not_pushed(refused, detector):
    refused(["push", "none", "org/x"], "none is no folder")
    Path("empty").mkdir()
    refused(["push", "empty", "org/x"], "empty", "no detector")
    model = AutoModel.from_pretrained(detector)
    model.reset_reference()
    model.save_pretrained("unfitted")
    AnomalyImageProcessor.for_images(16, 1).save_pretrained("unfitted")
    refused(["push", "unfitted", "org/x"], "fit_reference")


@pytest.mark.parametrize("given", [False, True])
def test_push_and_space_hand_on_what_they_are_told(run, refused, detector, monkeypatch, given):
    pushed = []
    monkeypatch.setattr("hf_anomaly.hub.push_folder", lambda *names, **options: pushed.append((names, options)) or "the commit")
    monkeypatch.setattr("hf_anomaly.demo.make_space", lambda *names, **options: pushed.append((names, options)) or "the commit")
    shutil.copytree(detector, "model")
    options = ["--private", "--revision", "dev", "--create_pr", "--git_tag", "v1", "--message", "Better"] if given else []
    assert run("push", "model", "org/x", *options)[:2] == (0, "pushed: the commit\n")
    told = {"private": True, "revision": "dev", "create_pr": True, "git_tag": "v1", "message": "Better"}
    default = {"private": None, "revision": None, "create_pr": False, "git_tag": None, "message": "Upload model"}
    assert pushed.pop() == ((Path("model"), "org/x"), told if given else default)
    assert Path("model/README.md").is_file(), "a detector without a card gets one"
    Path("model/README.md").write_text("My own.")
    assert run("push", "model", "org/x")[0] == 0
    assert Path("model/README.md").read_text() == "My own."
    assert run("space", "org/x", "org/page", *options[:3])[:2] == (0, "pushed: the commit\n")
    told = {"revision": "dev", "private": True} if given else {"revision": None, "private": None}
    assert pushed.pop() == (("org/x", "org/page"), {**told, "folder": None, "push": True})
    GaussianDissolver(3).save_pretrained("blur")
    Path("blur/dissolver_config.json").write_text('{"kind": "gaussian", "kernel_size": 4}')
    refused(["push", "blur", "org/x"], "kernel_size must be odd")


def test_what_gets_no_card(refused, detector, tmp_path):
    refused(["card", "none"], "none", "no detector")
    refused(["card", detector, "--license", "MIT License"], "'MIT License'", "apache-2.0")
    refused(["card", detector, "--runs", "none"], detector, "no eval_results.json")
    shutil.copytree(detector, "model")
    Path("model/eval_results.json").write_text("{}")
    refused(["card", "model", "--runs", detector], detector, "eval_results.json is not there")
    model = AutoModel.from_pretrained("model")
    model.reset_reference()
    model.save_pretrained("model")
    refused(["card", "model"], "fit_reference")


def test_space(run, refused, tmp_path, detector):
    _, out, _ = run("space", "org/detector", "org/page", "--local", tmp_path / "space")
    assert out == f"written: {tmp_path / 'space'}\n"
    assert {path.name for path in (tmp_path / "space").iterdir()} == {"app.py", "requirements.txt", "README.md"}
    assert "org/detector" in (tmp_path / "space" / "app.py").read_text()
    refused(["space", detector, "org/page", "--local", tmp_path / "other"], "a Space cannot read")


def test_demo_takes_a_window(run, monkeypatch):
    served = []
    monkeypatch.setattr("hf_anomaly.cli.demo.find_spec", lambda name: name)
    monkeypatch.setattr("hf_anomaly.demo.run_demo", lambda model, **settings: served.append((model, settings["window"])))
    for words in ([], ["--window", "0", "4095"], ["--window", "full"]):
        assert run("demo", "scans", *words)[0] == 0
    assert served == [("scans", None), ("scans", (0.0, 4095.0)), ("scans", "full")]


def test_demo_needs_a_detector(refused):
    pytest.importorskip("gradio")
    refused(["demo", "./no-such-detector"], "no-such-detector")
