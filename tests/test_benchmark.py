import datetime
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, argv)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def test_benchmark(monkeypatch, capsys, tmp_path):
    rows = [name for name in runpy.run_path(str(SCRIPT))["ROWS"] if name not in ("compiled", "two_processes")]  # which take a minute
    small = ("--image_size=8", "--batch_size=2", "--bank_size=50", "--num_images=300", "--num_maps=32", "--repeats=1")
    run(monkeypatch, *small, f"--output={tmp_path / 'speed.md'}", "--rows", *rows)
    table = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() == table
    header, rule, *rows, blank, facts = table.splitlines()
    assert header == "| what | A | B | ratio A/B |"
    assert rule == "|---|---|---|---|"
    assert blank == ""
    units = [("ms", "training step"), ("ms", "AnomalyTrainer"), ("ms", "channels_last"), ("ms", "bf16"), ("ms", "contrastive loss")]
    units += [("images/s", "scoring"), *[("images/s", "pipeline")] * 2, ("ms", "bank"), ("MiB", "300"), ("ms", "pixels"), ("s", "import")]
    for row, (unit, what) in zip(rows, units, strict=True):
        match = re.fullmatch(rf"\| (.*) \| ([\d.]+) {unit} \| ([\d.]+) {unit} \| ([\d.]+) \|", row)
        assert match, row
        assert what in match[1]
        assert float(match[4]) > 0
    command = f"python scripts/benchmark.py {small[0]}"
    for fact in (f"torch {torch.__version__}", f"threads: {torch.get_num_threads()}", command, str(datetime.date.today()), "8×8 pixels"):
        assert fact in facts


def test_ways_take_turns():
    alternately = runpy.run_path(str(SCRIPT))["alternately"]
    calls, clock = [], iter([9, 9, 1, 10, 3, 30, 2, 20])  # warm-up, then three pairs
    take = lambda name: lambda: (calls.append(name), next(clock))[1]  # noqa: E731
    assert alternately(take("a"), take("b"), 3) == (2, 20)
    assert "".join(calls) == "ab" * 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats=0"], "--repeats must be at least 1, got 0"),
        (["--rows", "scoring", "speed"], "--rows speed is unknown; there are training_step,"),
        (["--rows", "pixel_metrics", "--output", str(SCRIPT.parent)], f"--output {SCRIPT.parent}: it is a folder"),
    ],
)
def test_bad_input(monkeypatch, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
