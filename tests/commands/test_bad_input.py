"""Bad input: exit status 2, one line that names the culprit, nothing half-written."""

import io

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SmallResNetConfig

from .running import class_folders, pixels, refused, resnet, run, save


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


def truncated_test_file(folder):
    path = class_folders(folder / "data", {"train/good": 12, "test/good": 3, "test/hole": 3}, size=64) / "test" / "hole" / "1.png"
    path.write_bytes(path.read_bytes()[:-2000])
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


def unfinished_checkpoint(folder):
    (folder / "checkpoint-6").mkdir()
    return folder / "checkpoint-6"


BAD = {  # the culprit → arguments; a function makes its file or folder
    "no column 'nope'": ["--label_column", "nope"],
    "no column 'pixels'": ["--image_column", "pixels"],
    "row 3 (counted from 0) of split 'train'": [
        "--normal_label",
        "healthy",
        "--dataset_name",
        lambda folder: parquet(folder, ["healthy"] * 3 + [None] * 5),
    ],
    "torn.png: unreadable image": ["--dataset_name", broken_file],
    "good/3.png: unreadable image": ["--dataset_name", truncated_file],
    "hole/1.png: unreadable image": ["--dataset_name", truncated_test_file],
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
    "--blur_kernel_size is of no use to --dissolver none": ["--dissolver", "none", "--blur_kernel_size", "3"],
    "--blur_kernel_size is of no use to --dissolver diffusion": ["--dissolver", "diffusion", "--blur_kernel_size", "3"],
    "--dissolver_learning_rate is of no use to --dissolver gaussian": ["--dissolver", "gaussian", "--dissolver_learning_rate", "3"],
    "--t_max is of no use to --dissolver median": ["--dissolver", "median", "--t_max", "3"],
    "--dissolver_steps is of no use to --dissolver": ["--dissolver", lambda folder: folder / "trained-before", "--dissolver_steps", "3"],
    "--stream_head is of --streaming alone": ["--stream_head", "5"],
    "--shuffle_buffer is of --streaming alone": ["--shuffle_buffer", "5"],
    "calibration_fraction=1": ["--calibration_fraction", "1"],
    "eval_split='both'": ["--eval_split", "both"],
    "num_channels": ["--backbone", resnet],
    "no-such-backbone": ["--backbone", lambda folder: folder / "no-such-backbone"],
    "--dissolver medain: did you mean median?": ["--dissolver", "medain"],
    "--num_channels must be 1": ["--num_channels", "2"],
    "no-such-dissolver": ["--dissolver", lambda folder: folder / "no-such-dissolver"],
    "no-such-data": ["--dataset_name", lambda folder: folder / "no-such-data"],
    "checkpoint-6 is not a complete checkpoint": ["--resume_from_checkpoint", unfinished_checkpoint],
    "--load_best_model_at_end and --save_strategy best would choose": ["--save_strategy", "best"],
    "--lr_scheduler_type reduce_lr_on_plateau would choose": ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
    "--gradient_checkpointing is not supported": ["--gradient_checkpointing", "true"],
    "t_max 130 is beyond": ["--dissolver", "diffusion", "--dissolver_max_timestep", "100"],
    "--dissolver_steps": ["--dissolver", "diffusion", "--dissolver_steps", "-3"],
    "--dissolved_variants": ["--dissolved_variants", "-1"],
    "add --dissolver none": ["--max_steps", "0"],
    "--backbone_stage is of no use without --backbone": ["--backbone_stage", "stage2"],
    "one of fp16 and bf16": ["--fp16", "true", "--bf16", "true"],
    "max_timestep 5000": ["--dissolver", "diffusion", "--dissolver_max_timestep", "5000"],
}


@pytest.mark.parametrize("culprit", BAD)
def test_bad_input(culprit, tmp_path):
    argv = [value(tmp_path) if callable(value) else value for value in BAD[culprit]]
    argv += [] if "--dissolver" in argv else ["--dissolver", "gaussian", "--blur_kernel_size", "3"]
    common = ["--max_steps", 2, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    if "diffusion" in argv:
        common += ["--dissolver_batch_size", 8, "--dissolver_steps", 2]
    refused("train_dia.py", ["--output_dir", tmp_path / "run", *common, *argv], culprit, tmp_path / "run")


def test_half_a_checkpoint_is_refused_before_the_dissolver_is_trained(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-6").mkdir(parents=True)
    argv = [
        "--output_dir",
        run,
        "--resume_from_checkpoint",
        "true",
        "--dissolver_steps",
        2,
        "--dissolver_batch_size",
        8,
        "--use_cpu",
        "true",
    ]
    refused("train_dia.py", argv, "checkpoint-6 is not a complete checkpoint", run / "dissolver")


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["--output_dir", tmp_path / "file" / "run", "--dissolver", "none", "--max_steps", 1, "--use_cpu", "true", "--report_to", "none"]
    refused("train_dia.py", argv, "file/run'; a file lies where a folder is to be", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("culprit", "argv"),
    [
        ("t range 200…100", ["--t_min", "200", "--t_max", "100"]),
        ("max_timestep 2000", ["--max_timestep", "2000"]),
        ("did you mean --block_out_channels", ["--block_out_channel", "8"]),
        ("each of block_out_channels must be a whole number of at least 1", ["--block_out_channels", "8", "0"]),
        ("--eval_strategy is not supported", ["--eval_strategy", "steps"]),
        ("--save_strategy best would choose", ["--save_strategy", "best"]),
        ("resolution 9 cannot be halved", ["--resolution", "9", "--image_size", "16", "--block_out_channels", "8", "8"]),
    ],
)
def test_bad_input_of_train_dissolver(culprit, argv, tmp_path):
    common = ["--output_dir", tmp_path / "run", "--max_steps", 2, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    refused("train_dissolver.py", [*common, *argv], culprit, tmp_path / "run")


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
        (
            "CSIModel is not fitted: call fit_reference(dataloader) with normal training images first; of a checkpoint, finish its run",
            unfitted,
        ),
        ("--model", None),
    ],
)
def test_evaluating_what_is_no_detector(culprit, model, tmp_path):
    argv = [] if model is None else ["--model", model(tmp_path)]
    refused("evaluate.py", [*argv, "--dataset_name", "digits", "--output", tmp_path / "results.json"], culprit, tmp_path / "results.json")


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--image_size", "9"], "--image_size is the detector's own"),
        (["--num_channels", "3"], "--num_channels is the detector's own"),
        (["--max_train_images", "9"], "--max_train_images is of the training images"),
        (["--contamination", "0.1"], "--contamination is of the training images"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
    ],
)
def test_evaluating_with_flags_of_no_use(tmp_path, argv, culprit):
    refused("evaluate.py", ["--model", "any", "--dataset_name", "digits", *argv], culprit, tmp_path / "nowhere")


def test_what_evaluating_never_takes_is_not_in_its_help():
    status, usage, _ = run("evaluate.py", "--help")
    assert status == 0
    assert "--max_train_images" in usage  # with --baselines
    assert not any(flag in usage for flag in ("--image_size", "--tiles", "--num_channels"))


def test_evaluating_on_nothing(tmp_path):
    refused(
        "evaluate.py", ["--model", "any", "--output", tmp_path / "results.json"], "--dataset_name is missing", tmp_path / "results.json"
    )
