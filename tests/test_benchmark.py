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
    run(
        monkeypatch,
        "--image_size=8",
        "--batch_size=2",
        "--bank_size=50",
        "--repeats=1",
        "--num_maps=32",
        f"--output={tmp_path / 'speed.md'}",
    )
    table = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() == table
    header, rule, *rows, blank, facts = table.splitlines()
    assert header == "| what | A | B | ratio A/B |"
    assert rule == "|---|---|---|---|"
    assert blank == ""
    units = [
        ("ms", "training step"),
        ("images/s", "scoring"),
        *[("images/s", "pipeline")] * 2,
        ("ms", "bank"),
        ("ms", "pixels"),
        ("s", "import"),
    ]
    for row, (unit, what) in zip(rows, units, strict=True):
        match = re.fullmatch(rf"\| (.*) \| ([\d.]+) {unit} \| ([\d.]+) {unit} \| ([\d.]+) \|", row)
        assert match, row
        assert what in match[1]
        assert float(match[4]) > 0
    for fact in (f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", str(datetime.date.today()), "8×8 pixels"):
        assert fact in facts


def test_ways_take_turns():
    alternately = runpy.run_path(str(SCRIPT))["alternately"]
    calls, clock = [], iter([9, 9, 1, 10, 3, 30, 2, 20])  # warm-up, then three pairs
    take = lambda name: lambda: (calls.append(name), next(clock))[1]  # noqa: E731
    assert alternately(take("a"), take("b"), 3) == (2, 20)
    assert "".join(calls) == "ab" * 4


def test_bad_input(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--repeats=0")
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --repeats must be at least 1, got 0"
