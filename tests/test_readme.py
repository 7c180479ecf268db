"""The README's commands parse and its code runs, in the order in which a reader meets them."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from commands.running import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def script_commands() -> list[list[str]]:
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if "scripts/" in part]
    words = [shlex.split(command) for command in commands]
    return [command[next(i for i, word in enumerate(command) if word.startswith("scripts/")) :] for command in words]


def console_commands() -> list[list[str]]:
    """The words after `hf-anomaly`."""
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("hf-anomaly ")]


def test_the_readme_has_its_commands():
    assert any(command == ["scripts/train_dia.py"] for command in script_commands())
    assert len(blocks("python")) >= 3


@pytest.mark.parametrize("script", sorted({command[0] for command in script_commands()}))
def test_flags_exist(script):
    usage = run(script.removeprefix("scripts/"), "--help")[1]
    for word in {word for command in script_commands() if command[0] == script for word in command[1:] if word.startswith("--")}:
        assert re.search(rf"^\s+{word}\b", usage, re.MULTILINE), f"{script} has no {word}"


def test_console_commands_are_understood(monkeypatch):
    monkeypatch.setattr("hf_anomaly.cli.demo.find_spec", lambda name: name)  # as where gradio is installed
    commands = console_commands()
    assert {command[0] for command in commands} >= {"train", "predict", "info", "dissolve", "push"}
    for name, *argv in commands:
        if name == "train":  # whose options are the scripts'
            usage = run(f"train_{argv[0]}.py", "--help")[1]
            assert all(f"{word} " in usage for word in argv if word.startswith("--"))
        else:
            import_module(f"hf_anomaly.cli.{name}").parse(argv)  # an InputError, if not


def test_python_blocks_run(tmp_path, monkeypatch):
    """After the commands that train their detectors, cut to a few steps and an encoder."""
    monkeypatch.chdir(tmp_path)
    few = ["--max_steps", "4", "--disable_tqdm", "true"]
    small = ["--dissolver_steps", "4", "--dissolved_variants", "1", "--num_encoders", "1"]
    for command in (["train_dia.py", *small], ["train_shared_ae.py"]):
        status, _, err = run(*command, *few)
        assert status == 0, err
    code = "\n".join(blocks("python"))
    check = "\nassert scores.shape == p_values.shape == flagged.shape == (4,)\n"
    check += "assert not scores.requires_grad\n"
    check += "torch.testing.assert_close(exported, scores, rtol=1e-5, atol=0)\n"
    check += "assert [verdict['score'] for verdict in verdicts] == pytest.approx(scores.tolist(), rel=1e-5)\n"
    result = subprocess.run([sys.executable, "-c", "import pytest\n" + code + check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("overlay?.png"))) == 4
    saved = tmp_path / "runs" / "python"
    assert {"model.safetensors", "eval_results.json", "README.md"} <= {path.name for path in saved.iterdir()}
    assert (tmp_path / "runs" / "by-steps" / "model.safetensors").is_file()
    config, dissolver = (json.loads((saved / name).read_text()) for name in ("config.json", "dissolver/dissolver_config.json"))
    assert {"kind": config["dissolver"], **config["dissolver_settings"]} == dissolver


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"^command=\$\(grep -m 1 '(.*)' README\.md\)$", script, re.MULTILINE)[1]
    assert re.search(r'^eval "\$command"$', script, re.MULTILINE)
    command = next(line for line in README.splitlines() if re.search(pattern, line))
    assert command in "".join(blocks("bash"))
    assert re.search(r"&& (python -m )?pytest( |$)", command)
