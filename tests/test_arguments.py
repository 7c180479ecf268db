"""How many CPU threads a training has, how many steps, and where its result goes."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import pytest
import torch

from hf_anomaly.errors import InputError
from hf_anomaly.training import AnomalyTrainingArguments, DataArguments, DenoisingTrainingArguments, parse_arguments
from hf_anomaly.training.commands.train_addp import PretrainingArguments
from hf_anomaly.training.commands.train_dia import ContrastiveTrainingArguments, DetectorArguments, DissolverArguments
from hf_anomaly.training.denoising import denoising_arguments
from hf_anomaly.training.runs import choose_output_dir, lower_batch_size, replace_earlier_run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_stepz", "1"], "unknown argument '--max_stepz': did you mean --max_steps?"),
        (["--xyzzy"], "unknown argument '--xyzzy'; see --help"),
        (["--max_steps", "x"], "argument --max_steps/--max-steps: invalid int value: 'x'; see --help"),
    ],
)
def test_what_an_error_says_of_flags(words, message):
    """Whatever the program was called by: `python scripts/…`, from another folder too, `accelerate launch`, or `hf-anomaly`, whose --help may be short."""
    with pytest.raises(InputError) as caught:
        parse_arguments(AnomalyTrainingArguments, description="", argv=words)
    assert str(caught.value) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize(
    ("launched", "threads", "words", "then"),
    [
        (True, 1, [], 4),
        (True, 3, [], 3),  # as was asked of accelerate
        (True, 1, ["--cpu_threads", "2"], 2),
        (False, 1, [], 1),  # OMP_NUM_THREADS or the machine
        (False, 1, ["--cpu_threads", "2"], 2),
    ],
)
def test_accelerate_launch_uses_all_cores(monkeypatch, tmp_path, launched, threads, words, then):
    number = [threads]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parse_arguments(AnomalyTrainingArguments, description="", argv=["--output_dir", str(tmp_path), *words])
    assert number == [then]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
def test_accelerate_launch_marks_what_it_starts(tmp_path):
    """The environment variable by which it is recognised is accelerate's own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from hf_anomaly.training import AnomalyTrainingArguments, parse_arguments\n"
        "parse_arguments(AnomalyTrainingArguments, description='')\n"
        "print('threads:', torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"threads: {joblib.cpu_count()}\n" in done.stdout


def test_a_negative_number_is_no_flag():
    (data,) = parse_arguments(DataArguments, description="", argv=["--dataset_name", "x", "--window", "-1e3", "1e3"])
    assert data.reading.window == (-1000, 1000)


def test_threads_below_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="--cpu_threads must be at least 1"):
        parse_arguments(AnomalyTrainingArguments, description="", argv=["--output_dir", str(tmp_path), "--cpu_threads", "0"])


@pytest.mark.parametrize(
    ("flag", "value", "range"),
    [
        ("seed", -1, "in [0, 4294967296)"),
        ("seed", 5_000_000_000, "in [0, 4294967296)"),
        ("data_seed", -1, "in [0, 4294967296)"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_eval_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("max_steps", 0, "at least 1"),
        ("max_steps", -2, "at least 1"),
        ("num_train_epochs", -1.0, "at least 0"),
        ("learning_rate", -0.1, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("adam_beta1", 2.0, "in [0, 1)"),
        ("adam_epsilon", -1.0, "at least 0"),
        ("max_grad_norm", float("nan"), "at least 0"),
        ("dataloader_num_workers", -1, "at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, refused, flag, value, range):
    for arguments in (AnomalyTrainingArguments, DenoisingTrainingArguments):
        with refused(f"--{flag} must be {range}, got {value}"):
            arguments(output_dir=str(tmp_path), report_to=[], **{flag: value})


def test_a_detector_without_training(tmp_path, refused):
    common = {"output_dir": str(tmp_path), "report_to": []}
    assert ContrastiveTrainingArguments(max_steps=0, **common).max_steps == 0
    with refused("--max_steps must be at least 0, got -2"):
        ContrastiveTrainingArguments(max_steps=-2, **common)


def test_numbers_of_a_stage_out_of_range_are_refused(refused):
    with refused("--dissolver_learning_rate must be at least 0, got -1"):
        DissolverArguments(dissolver_learning_rate=-1)
    with refused("--pretrain_learning_rate must be at least 0, got -1"):
        PretrainingArguments(pretrain_learning_rate=-1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"save_only_model": True}, "--save_only_model is not supported"),
        ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint is not supported"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing is not supported"),
        ({"activation_checkpointing": True}, "--activation_checkpointing is not supported"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha is not supported"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor is not supported"),
        ({"prediction_loss_only": True}, "--prediction_loss_only is not supported"),
        ({"include_for_metrics": ["inputs"]}, "--include_for_metrics is not supported"),
        ({"bf16_full_eval": True}, "--bf16_full_eval is not supported"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": "x"}, "--lr_scheduler_kwargs"),
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: You need to install"),
        ({"optim": "grokadamw"}, "--optim grokadamw: Please install"),
        ({"optim_args": "eps"}, "--optim_args eps: write name=value"),
        ({"dataloader_persistent_workers": True}, "--dataloader_num_workers"),
        ({"torch_compile_backend": "inductr"}, "--torch_compile_backend inductr: torch has no such compiler; take one of"),
        ({"report_to": ["wandb"]}, "--report_to wandb: that is not installed; take none"),
        ({"report_to": ["paper"]}, "--report_to paper"),
        ({"fsdp": "full_shard"}, "--fsdp shards the training over several processes, and this is one: add --num_processes N"),
        ({"deepspeed": "x.json"}, "--deepspeed: that is not installed"),
    ],
)
def test_flags_that_would_end_the_run_or_do_nothing_are_refused_at_once(monkeypatch, tmp_path, refused, arguments, words):
    monkeypatch.setattr("hf_anomaly.training.arguments.get_available_reporting_integrations", list)
    monkeypatch.setattr("hf_anomaly.training.arguments.is_deepspeed_available", lambda: False)
    for name in ("bitsandbytes", "grokadamw"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused(words):
        AnomalyTrainingArguments(**{"output_dir": str(tmp_path), "report_to": [], "use_cpu": True} | arguments)


@pytest.mark.parametrize("arguments", [{"eval_strategy": "steps"}, {"eval_on_start": True}, {"load_best_model_at_end": True}])
def test_denoising_is_not_evaluated_meanwhile(tmp_path, refused, arguments):
    with refused(f"--{next(iter(arguments))} is not supported"):
        DenoisingTrainingArguments(output_dir=str(tmp_path), report_to=[], **arguments)


def test_a_schedule_with_its_settings_passes(tmp_path):
    words = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "--report_to", "none"]
    (args,) = parse_arguments(AnomalyTrainingArguments, description="", argv=["--output_dir", str(tmp_path), *words])
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_unknown_settings_of_accelerate_are_one_line(tmp_path, refused):
    with refused("unexpected keyword argument 'split'"):
        parse_arguments(
            AnomalyTrainingArguments, description="", argv=["--output_dir", str(tmp_path), "--accelerator_config", '{"split": 1}']
        )


@pytest.mark.parametrize("words", [["--license", "MIT"], ["--dataset_id", "my images"]])
def test_what_the_card_would_refuse_is_refused_before_the_training(tmp_path, refused, words):
    with refused(repr(words[1])):
        parse_arguments(AnomalyTrainingArguments, description="", argv=["--output_dir", str(tmp_path), *words])


@pytest.mark.parametrize(
    ("words", "image_size", "steps"),
    [
        ([], 28, 1600),
        ([], 64, 1600),
        ([], 128, 800),
        ([], 224, 457),  # 1600 · 64 / 224
        (["--max_steps", "900"], 224, 900),
        (["--num_train_epochs", "2"], 224, -1),
    ],
)
def test_larger_images_take_fewer_steps_by_default(tmp_path, words, image_size, steps):
    (args,) = parse_arguments(
        ContrastiveTrainingArguments, description="", argv=["--output_dir", str(tmp_path), "--use_cpu", "true", *words]
    )
    args.fit_images(image_size, None)
    assert args.max_steps == steps
    args.fit_images(image_size, 10_000)
    assert args.max_steps == steps


@pytest.mark.parametrize(
    ("words", "num_images", "steps"),
    [
        ([], 205, 1600),
        ([], 204, 1594),  # 250 passes in batches of 32
        ([], 100, 782),
        (["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "4"], 100, 391),
        (["--max_steps", "900"], 100, 900),
        (["--num_train_epochs", "300"], 100, -1),
    ],
)
def test_few_images_take_fewer_steps_by_default(tmp_path, words, num_images, steps):
    (args,) = parse_arguments(
        ContrastiveTrainingArguments, description="", argv=["--output_dir", str(tmp_path), "--use_cpu", "true", *words]
    )
    args.fit_images(64, num_images)
    assert args.max_steps == steps


@pytest.mark.parametrize(("image_size", "views"), [(28, 10), (64, 10), (128, 5), (224, 4), (512, 4)])
def test_larger_images_take_fewer_test_time_views_by_default(image_size, views):
    args, given = DetectorArguments(), DetectorArguments(num_test_views=12)
    for one in (args, given):
        one.fit_image_size(image_size)
    assert (args.num_test_views, given.num_test_views) == (views, 12)


@pytest.mark.parametrize(("image_size", "views"), [(28, 5), (128, 5), (224, 4)])
def test_there_are_five_crops(image_size, views, refused):
    args = DetectorArguments(test_views="crops")
    args.fit_image_size(image_size)
    assert args.num_test_views == views
    with refused("--num_test_views 6", "crops", "5"):
        DetectorArguments(test_views="crops", num_test_views=6)


@pytest.mark.parametrize(
    ("words", "passes"), [(["--max_steps", "50", "--gradient_accumulation_steps", "2"], 16), (["--num_train_epochs", "3"], 3)]
)
def test_passes_over_the_images(tmp_path, words, passes):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--per_device_train_batch_size", "32", *words]
    (args,) = parse_arguments(ContrastiveTrainingArguments, description="", argv=words)
    assert args.passes(num_images=200) == passes


def test_processes_share_the_images_of_a_step():
    args = SimpleNamespace(max_steps=-1, world_size=2, dataloader_drop_last=True, per_device_train_batch_size=8)
    lower_batch_size(args, 7)
    assert args.per_device_train_batch_size == 3


@pytest.mark.parametrize("result", ["config.json", "model_index.json"])
def test_what_lies_in_the_folder_is_not_replaced_without_a_word(monkeypatch, tmp_path, caplog, result):
    monkeypatch.chdir(tmp_path)

    def warned(**arguments):
        caplog.clear()
        args = AnomalyTrainingArguments(report_to=[], **arguments)
        with caplog.at_level(logging.WARNING, "hf_anomaly"):
            choose_output_dir(args, "dia", "images.npz")
            assert not caplog.text, "nothing is replaced before the training begins"
            replace_earlier_run(args)
        return args.output_dir, "dia-images will be replaced" in caplog.text

    folder = str(Path("runs", "dia-images"))
    assert warned() == (folder, False)
    Path(folder).mkdir(parents=True)
    assert warned() == (folder, False)
    Path(folder, "checkpoint-4").mkdir()
    Path(folder, "checkpoint-4", "run.json").touch()
    assert warned() == (folder, True)
    assert "--resume_from_checkpoint true would have gone on from checkpoint-4" in caplog.text
    Path(folder, result).write_text("{}")
    assert warned() == (folder, True)
    assert warned(resume_from_checkpoint="true") == (folder, False)
    assert warned(output_dir=folder) == (folder, True)
    assert "--resume_from_checkpoint" not in caplog.text
    Path(folder, result).unlink()
    shutil.rmtree(Path(folder, "checkpoint-4"), ignore_errors=True)
    Path(folder, "README.md").write_text("# Ours\n\nA plan.\n")
    assert warned() == (folder, False)
    Path(folder, "README.md").write_text("<!-- hf-anomaly: about -->\nA card.\n<!-- /hf-anomaly: about -->\n")
    assert warned() == (folder, True)
    Path(folder, "README.md").unlink()
    Path(folder, result).write_text("{}")
    for stage in ("", "dissolver-training"):  # of a later run that was killed
        run = Path(folder, stage, "checkpoint-4", "run.json")
        run.parent.mkdir(parents=True)
        run.touch()
        older = Path(folder, "pretrained-training", "checkpoint-4", "run.json")
        older.parent.mkdir(parents=True)
        older.touch()
        os.utime(older, (1, 1))
        os.utime(Path(folder, result), (0, 0))
        assert warned() == (folder, True)
        assert f"--resume_from_checkpoint true would have gone on from {Path(stage, 'checkpoint-4')}" in caplog.text


def test_of_an_earlier_run_stays_what_is_used_or_none_of_its_own(tmp_path, monkeypatch):
    ours = [
        "checkpoint-4/run.json",
        "dissolver-training/checkpoint-4/run.json",
        "pretrained-training/checkpoint-4/run.json",
        "dissolver/dissolver_config.json",
        "pretrained/pretraining.json",
    ]
    others = ["checkpoint-notes/notes.txt", "images/1.png", "config.json"]

    def left(used=None, **arguments):
        for file in (*ours, *others):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        replace_earlier_run(AnomalyTrainingArguments(report_to=[], output_dir=str(tmp_path), **arguments), used)
        return {file for file in ours if (tmp_path / file).exists()} if all((tmp_path / file).exists() for file in others) else "too little"

    assert left() == set()
    assert left(str(tmp_path / "images" / ".." / "pretrained")) == {"pretrained/pretraining.json"}
    assert left(str(tmp_path / "dissolver-training" / "checkpoint-4")) == {"dissolver-training/checkpoint-4/run.json"}
    assert left("org/dissolver") == set()
    assert left(resume_from_checkpoint="true") == set(ours)
    for stage in ("dissolver", "pretrained"):
        (tmp_path / stage / "README.md").touch()
    assert left() == {"dissolver/dissolver_config.json"}, "which train_dissolver wrote into a folder of its own"
    monkeypatch.setattr(AnomalyTrainingArguments, "should_save", False)  # another process
    assert left() == set(ours)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # a superuser may write anywhere
    with pytest.raises(PermissionError):
        choose_output_dir(AnomalyTrainingArguments(report_to=[], output_dir=str(tmp_path)), "dia", "images")


@pytest.mark.parametrize("name", [".", "../scans", "org/scans", "~/scans.npz"])
def test_a_run_is_named_after_its_images(monkeypatch, tmp_path, name):
    (tmp_path / "scans").mkdir()
    monkeypatch.chdir(tmp_path / "scans")
    args = AnomalyTrainingArguments(report_to=[])
    choose_output_dir(args, "dia", name)
    assert args.output_dir == str(Path("runs", "dia-scans"))


def test_a_first_stage_takes_over_what_is_of_the_whole_run(tmp_path):
    shared = {
        "seed": 7,
        "full_determinism": True,
        "use_cpu": True,
        "bf16": True,
        "save_strategy": "epoch",
        "save_steps": 3,
        "disable_tqdm": True,
        "logging_steps": 3,
        "logging_strategy": "epoch",
        "logging_first_step": True,
        "run_name": "third",
        "project": "screws",
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "spawn",
    }
    args = AnomalyTrainingArguments(output_dir=str(tmp_path), report_to="none", **shared)
    stage = denoising_arguments(args, "dissolver", learning_rate=1e-3, batch_size=4, steps=2)
    assert {name: getattr(stage, name) for name in shared} == shared
