"""The papers' tables on tiny data: an 8 px Fashion-MNIST, a PneumoniaMNIST and a MNIST without test split."""

import csv
import gzip
import json
import re
import shutil
import struct
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from commands.running import run
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers.utils.logging import disable_progress_bar

from hf_anomaly import AnomalyImageProcessor, MedianDissolver, reproduction
from hf_anomaly.data import decode_image
from hf_anomaly.data.recipes import RECIPES
from hf_anomaly.ops import baselines
from hf_anomaly.reproduction import METHODS, TABLES, Selection, budgets, contrastive, figures, find_table, roc, running
from hf_anomaly.reproduction.budgets import Training
from hf_anomaly.reproduction.cells import MEAN, Cell
from hf_anomaly.reproduction.contrastive import DetectorLength, Dissolving
from hf_anomaly.reproduction.costs import Cost, cost
from hf_anomaly.reproduction.report import markdown, mean_and_std, plot
from hf_anomaly.training.baselines import pixel_matrix
from hf_anomaly.training.evaluation import write_scores
from hf_anomaly.training.runs import train_detector as train

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce.py"


def reproduce(*argv):
    """(exit status, stdout, stderr)"""
    return run("reproduce.py", *argv)


def images(labels, shape, seed):
    """Noise around a brightness that is the class's."""
    noise = np.random.default_rng(seed).integers(0, 60, (len(labels), *shape))
    return (noise + 15 * np.asarray(labels)[:, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "fashion-mnist").mkdir()
    (root / "mnist").mkdir()
    for seed, (prefix, n) in enumerate((("train", 20), ("t10k", 5))):
        labels = np.repeat(np.arange(10), n).astype(np.uint8)
        for name, array in (("images-idx3", images(labels, (8, 8), seed)), ("labels-idx1", labels)):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            (root / "fashion-mnist" / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    for digit in range(10):
        (root / "mnist" / f"{digit}.json").write_text(json.dumps({"data": (images([digit] * 15, (28, 28), digit) / 255).ravel().tolist()}))
    labels = np.arange(60) % 2
    arrays = {f"{split}_images": images(10 * labels, (28, 28), seed) for seed, split in enumerate(("train", "val", "test"))}
    np.savez(root / "pneumoniamnist.npz", **arrays, **{f"{split}_labels": labels for split in ("train", "val", "test")})
    return root


@pytest.fixture(scope="module")
def first(data_dir, tmp_path_factory):
    """A finished smoke run of the first table: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("reproduce")
    status, out, err = reproduce("--table", "shared_ae/1", "--budget", "smoke", "--data_dir", data_dir, "--output_dir", folder)
    assert status == 0, err
    return folder, out, err


def test_every_table_is_sound():
    for table in TABLES.values():
        assert bool(table.sections) != bool(table.computed)
        for section in table.sections:
            titles = {row.title for row in section.rows}
            assert len(titles) == len(section.rows)
            if section.paper_of_method is not None:
                assert len(section.rows) == 1
                assert {*section.paper_of_method, *section.titles} <= set(section.methods)
            assert {cell.seed for cell in section.cells(section.methods, (3, 4), "smoke")} == {3}
            assert {row.normal_label for row in section.rows} <= set(RECIPES[section.dataset].classes)
            assert set(section.methods) <= set(METHODS)
            assert {"mean_intensity", "contrast", "pixel_knn", "pca_residual"} <= set(section.methods)
            numbers = [number for entry in (section.paper_of_method or {}).values() for number in np.atleast_1d(entry)]
            assert all(0 <= number <= 1 for number in numbers)
            for numbers in section.paper.values():
                assert set(numbers) <= titles | {MEAN}
                assert all(0 <= number <= 1 for number in numbers.values())


@pytest.mark.parametrize("table", ["shared_ae/2", "shared_ae/3", "shared_ae/4", "dia/cifar10", "dia/cifar100"])
def test_paper_numbers_agree_with_their_mean(table):
    """Typed by hand: a wrong digit would show."""
    for numbers in find_table(table).sections[0].paper.values():
        classes = [number for title, number in numbers.items() if title != MEAN]
        assert len(classes) == len(find_table(table).sections[0].rows)
        assert np.mean(classes) == pytest.approx(numbers[MEAN], abs=1.1e-3)


def test_paper_numbers_of_dia():
    def paper(table, dataset, method):
        (section,) = (section for section in find_table(f"dia/{table}").sections if section.dataset == dataset)
        return section.paper_of_method[method]

    assert paper(1, "retinal_oct", "rd4ad") == (0.996, 0.00)
    assert paper(1, "breast_mnist", "dia") == (0.750, 0.03)
    assert paper(2, "kvasir_polyp", "dia") == 0.860, "its own range is the second"
    assert paper(2, "kvasir_polyp", "dia_t30") == 0.796
    assert paper(2, "retinal_oct", "dia") == 0.919
    assert paper(2, "aptos_2019", "dia_t430") == 0.926
    assert paper(3, "kvasir_polyp", "dia_10_percent") == 0.679
    assert paper(4, "retinal_oct", "dia_perm") == (0.890, 0.02)
    assert paper(5, "sars_cov_2", "dia_128px") == (0.807, 0.02)
    assert paper(7, "kvasir_polyp", "dia_median_11") == (0.495, 0.04)
    assert paper(8, "aptos_2019", "dia_gaussian_7_perm") == (0.942, 0.00)
    assert paper(9, "kvasir_polyp", "dia_median_3_64px") == (0.575, 0.02)
    assert paper(10, "breast_mnist", "csi_larger_batch") == 0.564
    assert paper(11, "retinal_oct", "dia_b") == 0.932


def test_costs_of_networks():
    network = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(5 * 4 * 4, 7))
    expected = Cost(2 * 5 * 9 + 5 + 80 * 7 + 7, 4 * 4 * 5 * 2 * 9 + 80 * 7)
    assert cost(network, torch.zeros(1, 2, 8, 8)) == expected
    assert cost(network.to("meta"), torch.zeros(1, 2, 8, 8, device="meta")) == expected


def test_a_place_for_results_that_is_none_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = reproduce("--table", "dia/6", "--output_dir", tmp_path / "file")
    assert (status, out) == (2, "")
    assert "--output_dir" in err
    assert "it is a file; name a folder" in err


def test_table_that_is_computed(tmp_path):
    status, out, err = reproduce("--table", "dia/6", "--output_dir", tmp_path)
    assert (status, err) == (0, "")
    lines = [list(map(float, line[1:])) for line in list(csv.reader((tmp_path / "dia-6.csv").open()))[1:]]
    assert lines[0][:4] == [11.2, 1.82, 11.18, 1.81], "ResNet-18 is known"
    assert [line[-3] for line in lines] == pytest.approx([line[-5] for line in lines], rel=0.05)
    assert [line.split(" | ")[0] for line in out.splitlines() if " × " in line] == ["| 32 × 32", "| 64 × 64", "| 128 × 128"]


@pytest.fixture
def small_contrastive(monkeypatch):
    """Less of everything, for two seeds."""
    small = DetectorLength(Training(epochs=1, max_steps=2, batch_size=8), variants=2, backbone={"hidden_sizes": [8, 8], "depths": [1, 1]})
    monkeypatch.setitem(contrastive.DETECTOR_LENGTHS, "smoke", small)
    monkeypatch.setitem(budgets.BUDGETS, "smoke", replace(budgets.BUDGETS["smoke"], max_seeds=2))


def test_dissolver_is_shared(small_contrastive, data_dir, tmp_path, monkeypatch):
    trained = []
    original = contrastive.train_dissolver
    monkeypatch.setattr(contrastive, "train_dissolver", lambda *args, **options: (trained.append(1), original(*args, **options))[1])
    argv = ("--budget", "smoke", "--data_dir", data_dir, "--output_dir", tmp_path, "--seeds", 0, 1, "--datasets", "pneumonia_mnist")
    methods = ("--methods", "kdad", "csi", "dia", "contrast")
    status, out, err = reproduce("--table", "dia/1", *argv, *methods)
    assert status == 0, err
    assert len(trained) == 2, "one a seed"
    lines = {line.split(" | ")[0]: line.split(" | ") for line in out.partition("## BreastMNIST")[0].splitlines()}
    assert lines["| KDAD"][1:3] == ["0.378 ± 0.02", "not implemented"]
    results = [json.loads((tmp_path / f"cells/smoke/pneumonia_mnist-official/0/dia/seed{seed}.json").read_text()) for seed in (0, 1)]
    assert lines["| DIA"][1:3] == ["0.903 ± 0.01", mean_and_std({result["seed"]: result["auroc"] for result in results}, (0, 1))]
    assert lines["| DIA"][5] == "2"
    assert lines["| UniAD"][2] == "not implemented"
    assert lines["| pixel kNN"][2] == "not run"
    assert "Shared by the cells of a seed: diffusion model, 2 steps on 24 images" in out
    assert "No data: BreastMNIST is not there" in out
    settings = results[0]["settings"]
    assert settings["dissolving"]["t_range"] == [30, 130]
    assert settings["dissolving"]["model"]["steps"] == 2
    # Tables share what they have in common; what hangs on another diffusion model is run again.
    status, out, err = reproduce("--table", "dia/11", *argv, "--dry_run")
    assert "6 finished" not in out.splitlines()[0]
    assert sum(line.startswith("finished") for line in out.splitlines()) == 2 + 2 + 2 + 2, "CSI, DIA, contrast, diffusion model"
    status, out, err = reproduce("--table", "dia/11", *argv, "--methods", "dia_b")
    assert status == 0, err
    assert len(trained) == 2
    shutil.rmtree(tmp_path / "cells/smoke/pneumonia_mnist-official/0/dissolver/seed1")
    out = reproduce("--table", "dia/11", *argv, "--dry_run")[1]
    assert "not run         smoke/pneumonia_mnist-official/0/dissolver/seed1" in out
    monkeypatch.setitem(contrastive.DISSOLVER_LENGTHS, "smoke", replace(contrastive.DISSOLVER_LENGTHS["smoke"], steps=3))
    out = reproduce("--table", "dia/1", *argv, "--dry_run")[1]
    for method, status in (("dissolver", "not run"), ("dia", "not run"), ("csi", "finished")):
        assert f"{status:15} smoke/pneumonia_mnist-official/0/{method}/seed0" in out


@pytest.mark.parametrize("design", ["a", "b"])
def test_similarity_matrix(design):
    shifts, images = 3, 2
    block = shifts * images
    expected = -np.ones((2 * block, 3 * block))
    for anchor in range(2 * block):
        for view in range(3 * block):
            same_pair = anchor % block == view % block
            if anchor == view or (design == "b" and view >= 2 * block and same_pair):
                expected[anchor, view] = 0
            elif view < 2 * block and same_pair:
                expected[anchor, view] = 1
    np.testing.assert_array_equal(figures.pair_signs(shifts, images, design), expected)


def test_a_row_of_ones_own(small_contrastive, data_dir, tmp_path, monkeypatch, capsys):
    """The package's docstring, at the smallest budget."""
    monkeypatch.setitem(METHODS, "dia_resize", None)  # and taken out again
    code = reproduction.__doc__.split("dissolver:\n")[1]
    for full, small in (("runs/mine", tmp_path), ("path/to/data", data_dir)):
        assert full in code
        code = code.replace(full, str(small))
    exec(textwrap.dedent(code).replace("seeds=(0,)", "seeds=(0,), budget='smoke'"), {})
    table = capsys.readouterr().out
    assert re.search(r"\| DIA, resized \|.* \d\.\d{3} ", table)
    assert contrastive.DISSOLVERS["identity"]().fingerprint() == Dissolving("identity", model=None).load(None, []).fingerprint()


def test_the_papers_budget_trains_and_scores_as_the_authors_do(data_dir, tmp_path, monkeypatch):
    """LARS, ResNet-18's channels behind a stem of stride 1, all of Eq. 10, and the weights of the last step; a constant rate for the diffusion model. Here of
    fewer steps, and narrower."""
    length = contrastive.DETECTOR_LENGTHS["paper"]
    assert length.training.max_steps == 1250
    short = replace(length, training=replace(length.training, min_steps=2, max_steps=2), backbone={"hidden_sizes": [8], "depths": [1]})
    monkeypatch.setitem(contrastive.DETECTOR_LENGTHS, "paper", short)
    length = contrastive.DISSOLVER_LENGTHS["paper"]
    assert (length.steps, length.batch_sizes, length.learning_rate) == (25_000, {32: 256, 64: 128, 128: 32}, 8e-5)
    monkeypatch.setitem(contrastive.DISSOLVER_LENGTHS, "paper", replace(length, steps=2, widths=(8, 8)))
    dissolvers = []
    original = contrastive.train_dissolver
    monkeypatch.setattr(
        contrastive, "train_dissolver", lambda *args, **options: (dissolvers.append(options["args"]), original(*args, **options))[1]
    )
    trained = []
    monkeypatch.setattr(contrastive, "train_detector", lambda model, *args, **_: trained.append((model, args)) or train(model, *args, **_))
    argv = [
        "--table",
        "dia/1",
        "--budget",
        "paper",
        "--datasets",
        "pneumonia_mnist",
        "--methods",
        "csi",
        "dia",
        "--seeds",
        0,
        "--data_dir",
        data_dir,
    ]
    status, _, err = reproduce(*argv, "--output_dir", tmp_path)
    assert status == 0, err
    (model, (_, _, args)), _ = trained
    assert (args.lars, args.learning_rate, args.warmup_steps, args.weight_decay, args.ema_decay) == (True, 1.0, 0.05, 1e-6, 0)
    (stage,) = dissolvers
    assert (stage.lr_scheduler_type, stage.gradient_accumulation_steps, stage.ema_decay, stage.weight_decay) == ("constant", 2, 0.995, 0)
    config = model.config
    assert (config.score_features, config.score_whitening, config.test_crop_scale) == ("projection", False, [0.54, 0.54])
    assert config.score_cosine
    assert config.score_norm
    assert config.score_shift_logit
    assert config.backbone_config.stem_stride == 1


def test_finished_cells_of_blurs_are_found_again():
    recorded = {"kind": "median", "kernel_size": 3, "resolution": 64, "t_range": None, "model": None}
    assert METHODS["dia_median_3_64px"].dissolving.settings(None) == recorded
    assert METHODS["dia_median_3_64px"].least_image_size == 64


def test_figures(small_contrastive, data_dir, tmp_path, caplog, monkeypatch):
    grids, panels = [], []
    draw, finish = figures.image_grid, figures._picture
    monkeypatch.setattr(figures, "image_grid", lambda *parts: (grids.append(parts), draw(*parts))[1])
    monkeypatch.setattr(figures, "_picture", lambda figure: (panels.append(figure), finish(figure))[1])
    argv = ("--budget", "smoke", "--data_dir", data_dir, "--output_dir", tmp_path)
    status, out, err = reproduce("--figure", "dia/7", *argv, "--datasets", "fashion_mnist")
    assert status == 0, err
    assert f"saved: {tmp_path / 'figure-dia-7.png'}" in out
    written = [str(path.relative_to(tmp_path / "cells" / "smoke")) for path in sorted((tmp_path / "cells").rglob("*.json"))]
    assert [name for name in written if name.endswith("seed0.json")] == [
        "fashion_mnist-official/0/dissolver/seed0.json",
        "pneumonia_mnist-official/0/dissolver/seed0.json",
    ]
    with PIL.Image.open(tmp_path / "figure-dia-7.png") as picture:
        assert picture.width > 8 * 128
        assert 2 * 128 < picture.height < 3 * 150, "its own model and PneumoniaMNIST's; CIFAR-10 is not there"
    (rows, titles, captions), selection = grids.pop(), Selection(tmp_path, budget="smoke", data_dir=str(data_dir))
    assert titles == ["original", *(f"t = {t}" for t in (30, 80, 130, 230, 330, 430, 530))]
    assert captions == [f"Fashion-MNIST\nby the model of\n{model}" for model in ("Fashion-MNIST", "PneumoniaMNIST")]
    test = running.load_data(figures.dissolver_cell("fashion_mnist", selection), selection).splits.test
    first = decode_image(test[test["label"].index(1)]["image"], "the first anomaly")
    (shown,) = AnomalyImageProcessor.for_images(28, 1)(images=first, return_tensors="pt")["pixel_values"]
    for row, model in zip(rows, ("fashion_mnist", "pneumonia_mnist"), strict=True):
        assert torch.equal(row[0], shown)
        dissolver = figures.load_dissolver(model, selection)
        np.testing.assert_allclose(row[3], dissolver(row[0][None], torch.tensor([130]))[0], atol=1e-5)
    status, out, err = reproduce("--figure", "dia/5", *argv)
    assert status == 0, err
    assert "Left out: BreastMNIST is not there" in caplog.text
    rows, titles, captions = grids.pop()
    assert titles == ["original", *(f"{kind} {k}" for kind in ("gaussian", "median") for k in (3, 7, 11)), "diffusion"]
    assert captions == [f"PneumoniaMNIST\n{kind}, t = 80" for kind in ("normal", "anomalous")]
    assert rows[0][0].mean() < rows[1][0].mean(), "the anomalies of these images are brighter"
    for row in rows:
        np.testing.assert_array_equal(row[5], MedianDissolver(7)(row[0][None])[0])
    pytest.importorskip("matplotlib")
    assert reproduce("--figure", "dia/6", *argv)[0] == 0
    for panel, design in zip(panels[-1].axes, "ab", strict=True):
        assert panel.get_title() == f"design ({design})"
        np.testing.assert_array_equal(panel.images[0].get_array(), figures.pair_signs(4, 2, design))
    (legend,), colors = panels[-1].legends, panels[-1].axes[0].images[0].get_cmap()
    said = {text.get_text(): handle.get_color() for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert said == {"positive": colors(2), "negative": colors(0), "not considered": colors(1)}
    for wrong, message in (
        (("--figure", "dia/2"), "there is no figure 'dia/2'; the figures: dia/1, dia/3,"),
        (("--figure", "dia/8"), "nothing can be drawn: SARS-COV-2 CT is not there"),
        (("--figure", "dia/8", "--datasets", *2 * ["sars_cov_2"]), "nothing can be drawn: SARS-COV-2 CT is not there"),
        (("--figure", "dia/7", "--methods", "dia"), "--methods: figure dia/7 is not of methods"),
        (("--figure", "dia/7", "--dry_run"), "--dry_run and --shard are of a paper's tables"),
        (("--figure", "dia/1", "--table", "dia/1"), "give --table or --figure"),
        ((), "give --table or --figure"),
    ):
        status, _, err = reproduce(*wrong, *argv)
        assert status == 2
        assert message in err


def test_roc_against_counting():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], (40, 25))
    for scores in (draw.normal(size=65) + labels, draw.integers(0, 4, 65) + labels):
        line = roc.roc_at_grid(scores.astype(np.float32), labels)
        normal, anomalous = scores[labels == 0], scores[labels == 1]
        steps = [((normal >= t).mean(), (anomalous >= t).mean()) for t in sorted(set(scores), reverse=True)]
        for rate, (before, after) in enumerate(zip([(0.0, 0.0), *steps], steps, strict=False)):
            for x, y in zip(roc.GRID, line, strict=True):
                if before[0] < x < after[0]:  # between two thresholds, on the straight line
                    assert y == pytest.approx(before[1] + (after[1] - before[1]) * (x - before[0]) / (after[0] - before[0])), rate
        wins = (anomalous[:, None] > normal).mean() + 0.5 * (anomalous[:, None] == normal).mean()
        assert np.trapezoid(line, roc.GRID) == pytest.approx(wins, abs=2e-3)


def test_roc_curves_of_finished_cells(first, data_dir, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(first[0], folder)
    argv = ("--figure", "roc/shared_ae/1", "--budget", "smoke", "--output_dir", folder, "--data_dir", tmp_path)
    stored = folder / "cells" / "smoke" / "fashion_mnist-balanced" / "0" / "shared_ae" / "seed0"
    with np.load(stored.with_suffix(".npz")) as file:
        result = json.loads(stored.with_suffix(".json").read_text())
        assert file["labels"].tolist().count(0) == result["num_normal"]
        assert roc_auc_score(file["labels"], file["scores"]) == pytest.approx(result["auroc"])
    pytest.importorskip("matplotlib")
    status, out, err = reproduce(*argv)
    assert status == 0, err
    assert f"saved: {folder / 'figure-roc-shared_ae-1.png'}" in out
    assert "no scores" not in caplog.text
    selection = Selection(output_dir=folder, budget="smoke", seeds=(0,))
    section = find_table("shared_ae/1").sections[1]
    (curve,) = roc.curves(section, ("shared_ae",), selection)
    assert (curve.auroc, curve.cells, curve.all_cells) == ({0: result["auroc"]}, 1, 1)
    # Two seeds: their mean, and how they spread.
    with np.load(stored.with_suffix(".npz")) as file:
        np.savez(stored.with_name("seed1.npz"), scores=-file["scores"], labels=file["labels"])
    shutil.copy(stored.with_suffix(".json"), stored.with_name("seed1.json"))
    both = roc.curves(section, ("shared_ae", "contrast"), replace(selection, seeds=(0, 1), budget="smoke"))
    assert [line.cells for line in both] == [1, 1], "smoke has one seed"

    stored.with_suffix(".npz").write_bytes(b"PK broken")
    status, _, err = reproduce(*argv)
    assert status == 2
    assert f"{stored.with_suffix('.npz')} is damaged" in err
    stored.with_suffix(".npz").unlink()
    status, _, err = reproduce(*argv, "--methods", "shared_ae", "--datasets", "fashion_mnist")
    assert status == 2
    assert "1 finished cells are of an earlier version and have kept no scores" in caplog.text
    assert "no selected cell of shared_ae/1 at budget smoke has left scores" in err
    assert reproduce(*argv, "--datasets", "fashion_mnist")[0] == 0, "the baselines have theirs"


def test_mean_roc_over_seeds_and_classes(tmp_path):
    selection = Selection(output_dir=tmp_path, budget="laptop", seeds=(0, 1, 2))
    section = find_table("shared_ae/1").sections[1]
    draw = np.random.default_rng(0)
    lines = {}
    for seed in (0, 1):
        for i, row in enumerate(section.rows):
            if (seed, i) == (1, 9):
                continue  # the second seed lacks a class
            cell = section.cell(row, "contrast", seed, "laptop")
            labels, scores = np.repeat([0, 1], 20), draw.normal(size=40)
            write_scores(selection.scores_file(cell), scores, labels)
            result = {"auroc": roc_auc_score(labels, scores), "settings": METHODS["contrast"].settings(cell)}
            selection.result_file(cell).write_text(json.dumps(result))
            lines[seed, i] = roc.roc_at_grid(scores, labels)
    (curve,) = roc.curves(section, ("contrast",), selection)
    assert list(curve.auroc) == [0], "a mean over some classes would not compare"
    np.testing.assert_allclose(curve.mean, np.mean([lines[0, i] for i in range(10)], axis=0))
    assert (curve.cells, curve.all_cells, curve.std.max()) == (10, 30, 0)
    selection.result_file(section.cell(section.rows[9], "contrast", 0, "laptop")).unlink()
    (curve,) = roc.curves(section, ("contrast",), selection)  # none is whole: better than nothing, and the picture tells
    seeds = [np.mean([lines[seed, i] for i in range(9)], axis=0) for seed in (0, 1)]
    np.testing.assert_allclose(curve.mean, np.mean(seeds, axis=0))
    np.testing.assert_allclose(curve.std, np.std(seeds, axis=0, ddof=1))
    assert (curve.cells, curve.all_cells) == (18, 30)


def test_what_roc_curves_show(tmp_path):
    pytest.importorskip("matplotlib")
    table, mean, std = find_table("shared_ae/1"), roc.GRID**0.5, np.full(501, 0.1)
    section = table.sections[1]
    trained = roc.Curve("shared_ae", {0: 0.9, 1: 0.8}, mean, std, 20, 20)
    trivial = roc.Curve("contrast", {0: 0.7}, mean, std, 9, 20)
    canvas = figures._canvas()
    roc.draw(table, 4 * [(section, [trained, trivial])], Selection(tmp_path, budget="laptop"), canvas)
    panels = [panel for panel in canvas.axes if panel.axison]
    assert len(panels) == 4, "below three another row"
    one, other, chance = panels[3].lines
    assert panels[3].get_title() == "Fashion-MNIST, mean of 10 classes"
    assert [line.get_label() for line in (one, other)] == ["SharedAE: 0.850 ± 0.071", "contrast (negative pixel std): 0.700, 9 of 20 cells"]
    assert [line.get_linestyle() for line in (one, other)] == ["-", "--"]
    np.testing.assert_array_equal(one.get_xydata(), np.transpose([[0, *roc.GRID], [0, *mean]]))
    assert chance.get_xydata().tolist() == [[0, 0], [1, 1]]
    (band,) = panels[3].collections
    box = band.get_datalim(panels[3].transData).extents
    np.testing.assert_allclose(box, [0, 0, 1, 1])
    at_half = [y for x, y in band.get_paths()[0].vertices if x == 0.5]
    np.testing.assert_allclose(sorted(set(at_half)), [0.5**0.5 - 0.1, 0.5**0.5 + 0.1])


def test_what_a_small_budget_cannot_do(tmp_path, data_dir):
    (tmp_path / "sars-cov-2-ct").mkdir()
    out = reproduce(
        "--table", "dia/5", "--data_dir", tmp_path, "--output_dir", tmp_path, "--seeds", 0, "--datasets", "sars_cov_2", "--dry_run"
    )[1]
    assert "needs a larger budget laptop/sars_cov_2-stratified_70_30/non-COVID/dia_128px/seed0" in out
    assert "not run         laptop/sars_cov_2-stratified_70_30/non-COVID/dia_64px/seed0" in out


def test_shards_take_the_dissolvers_they_need(data_dir, tmp_path):
    argv = ("--table", "dia/7", "--data_dir", data_dir, "--output_dir", tmp_path, "--dry_run")
    everything = reproduce(*argv)[1].splitlines()[1:]
    shards = [reproduce(*argv, "--shard", f"{i}/4")[1].splitlines()[1:] for i in (1, 2, 3, 4)]
    assert sorted(line for shard in shards for line in shard) == sorted(everything)
    assert not any("dissolver" in line for line in everything), "blur needs none"
    argv = ("--table", "dia/2", *argv[2:], "--datasets", "pneumonia_mnist")
    everything = reproduce(*argv)[1].splitlines()[1:]
    shards = [reproduce(*argv, "--shard", f"{i}/4")[1].splitlines()[1:] for i in (1, 2, 3, 4)]
    own = [[line for line in shard if "/dissolver/" not in line] for shard in shards]
    assert sorted(line for shard in own for line in shard) == sorted(line for line in everything if "/dissolver/" not in line)
    assert {line for shard in shards for line in shard} == set(everything)
    for shard in shards:
        for line in shard:
            if "/dia" in line:
                assert any(other.endswith(f"/dissolver/{line[-5:]}") for other in shard[: shard.index(line)])


def test_shards_that_need_the_same_dissolver_leave_each_others_alone(data_dir, tmp_path):
    """The faster one's may be in use when the slower one is done."""
    table = find_table("dia/1")
    first, second = (
        Selection(tmp_path, ("pneumonia_mnist",), ("dia", "csi"), (0,), "smoke", shard, str(data_dir)) for shard in ("1/2", "2/2")
    )
    (cell,) = [cell for cell in second.cells(table) if cell.method == "dissolver"]
    running.run_cell(cell, first, ["x"])
    before = (first.folder(cell) / "unet" / "config.json").stat()
    assert first.result(cell) is not None
    running.run_cell(cell, second, ["x"])
    assert (first.folder(cell) / "unet" / "config.json").stat() == before
    assert not (tmp_path / "work").exists()


def test_bars_of_downloads_come_back():
    shown = not are_progress_bars_disabled()
    try:
        disable_progress_bar()  # transformers' own, and with them those of downloads
        enable_progress_bars()
        with running.quiet():
            assert are_progress_bars_disabled()
        assert not are_progress_bars_disabled()
    finally:
        (enable_progress_bars if shown else disable_progress_bars)()


def test_smoke_run(first):
    folder, out, err = first
    assert {path.name for path in folder.iterdir()} == {"cells", "shared_ae-1.md", "shared_ae-1.csv"}
    assert (folder / "shared_ae-1.md").read_text() in out
    assert "No data: COIL-100 is not there" in out
    assert "train_runtime" not in out + err
    assert "Writing model shards" not in err
    path = folder / "cells" / "smoke" / "fashion_mnist-balanced" / "0" / "shared_ae" / "seed0.json"
    result = json.loads(path.read_text())
    assert (result["num_train"], result["num_calibration"], result["num_normal"], result["num_anomalous"]) == (16, 4, 5, 5)
    assert (result["steps"], result["protocol"], result["seed"]) == (1, "balanced", 0)
    assert 0 <= result["auroc"] <= 1
    assert len(result["split_hash"]) == 64
    assert result["command"][0] == "scripts/reproduce.py"
    assert result["subset"] is None
    lines = {line.split(" | ")[0]: line for line in out.splitlines()}
    assert f" {result['auroc']:.3f} | " in lines["| 0 T-shirt"]
    assert result["split_hash"][:8] in lines["| 0 T-shirt"]
    assert "16 + 4 | 5 + 5" in lines["| 0 T-shirt"]
    assert lines["| 1 trouser"].count("not run") == 5
    assert "**1.000**" in lines["| mean"], "COIL-100 comes last"
    assert lines["| mean"].count("not run") == 5
    assert "the npm package's 10,000 digits" in out
    assert "Budget smoke" in out
    rows = list(csv.DictReader((folder / "shared_ae-1.csv").open()))
    assert len(rows) == (10 + 10 + 30) * 5
    assert {row["status"] for row in rows} == {"finished", "not run", "no data"}
    (row,) = (row for row in rows if row["status"] == "finished" and row["dataset"] == "fashion_mnist" and row["method"] == "shared_ae")
    assert float(row["auroc"]) == result["auroc"]
    assert row["split_hash"] == result["split_hash"]


def test_finished_cells_are_not_run_again(first, data_dir, monkeypatch):
    folder, out, _ = first
    ran = []
    original = running.run_cell
    monkeypatch.setattr(running, "run_cell", lambda cell, *rest: (ran.append(cell), original(cell, *rest)))
    path = folder / "cells" / "smoke" / "fashion_mnist-balanced" / "0" / "contrast" / "seed0.json"
    before = path.read_text()
    argv = ("--table", "shared_ae/1", "--budget", "smoke", "--data_dir", data_dir, "--output_dir", folder)
    assert reproduce(*argv)[1] == out
    assert not ran
    path.unlink()
    assert reproduce(*argv)[1] == out
    assert [cell.method for cell in ran] == ["contrast"]
    assert {**json.loads(path.read_text()), "seconds": 0} == {**json.loads(before), "seconds": 0}
    ran.clear()
    trained = path.parents[1] / "shared_ae" / "seed0.json"
    trained.write_text(json.dumps({**json.loads(trained.read_text()), "settings": {"epochs": 7}}))
    assert reproduce(*argv)[1].splitlines()[0] == out.splitlines()[0]
    assert [cell.method for cell in ran] == ["shared_ae"], "it was of other settings"
    trained.write_text("{")
    status, _, err = reproduce(*argv)
    assert status == 2
    assert f"{trained} is damaged" in err
    trained.unlink()


def test_dry_run_lists_the_cells(first, data_dir, tmp_path):
    common = ("--table", "shared_ae/5", "--data_dir", data_dir, "--output_dir", tmp_path, "--dry_run")
    status, out, _ = reproduce(*common, "--seeds", 0, 1, "--budget", "laptop")
    assert status == 0
    assert out.splitlines()[0].endswith(f"; {10 * 8 * 2} cells: 20 not implemented, 140 not run")
    assert not list(tmp_path.iterdir())
    assert "not implemented laptop/mnist-official/3/autoencoder/seed1" in out
    assert "not run         laptop/mnist-official/3/shared_ae_two/seed0" in out
    shards = [reproduce(*common, "--seeds", 0, 1, "--shard", f"{i}/3")[1].splitlines()[1:] for i in (1, 2, 3)]
    assert sorted(line for shard in shards for line in shard) == sorted(out.splitlines()[1:])
    assert all(6 <= sum("/shared_ae/" in line for line in shard) <= 7 for shard in shards), "every shard has its part of the slow ones"


def test_source_without_test_split(data_dir, tmp_path):
    status, out, err = reproduce(
        "--table", "shared_ae/2", "--budget", "smoke", "--methods", "contrast", "--data_dir", data_dir, "--output_dir", tmp_path
    )  # fmt: skip
    assert status == 0, err
    assert "## MNIST, protocol stratified" in out
    assert "protocol stratified stands in for official" in out
    assert "| 0.986 | 0.997 |" in out


def test_training_images_are_shrunk_once(data_dir, tmp_path, monkeypatch):
    recipe, small = RECIPES["pneumonia_mnist"], replace(budgets.BUDGETS["smoke"], max_image_size=14)
    monkeypatch.setitem(budgets.BUDGETS, "smoke", small)
    cell = Cell(recipe.name, recipe.normal_labels[0], "official", None, "pixel_knn", 9, "smoke")
    data = running.load_data(cell, Selection(data_dir=str(data_dir), output_dir=tmp_path))
    assert {image.size for image in data.splits.train.cast_column("image", datasets.Image())["image"]} == {(14, 14)}
    whole = recipe.load(str(data_dir), seed=9).train
    np.testing.assert_array_equal(data.train_pixels, pixel_matrix(whole, data.processor))


def test_what_the_first_stage_of_addp_leaves(data_dir, tmp_path):
    """Table addp/1's columns differ in nothing else: random weights, both networks pretrained, or an encoder of digits with either decoder."""
    cell = Cell("pneumonia_mnist", "0", "official", None, "addp_random", 0, "smoke")
    data = running.load_data(cell, Selection(data_dir=str(data_dir), output_dir=tmp_path))
    encoder, decoder = {}, {}
    for name in ("addp_random", "addp_encoder_decoder", "addp_digits", "addp_decoder"):
        column = METHODS[name]
        args = column.lengths["smoke"].arguments(len(data.splits.train), 0, tmp_path / name)
        model = column.build(cell, data.splits, data.processor, args)
        encoder[name], decoder[name] = ([p.detach().clone() for p in part.parameters()] for part in (model.encoder, model.decoder))

    def same(part, a, b):
        return all(map(torch.equal, part[a], part[b]))

    assert same(encoder, "addp_digits", "addp_decoder")
    assert same(decoder, "addp_digits", "addp_random")
    assert not same(encoder, "addp_digits", "addp_random")
    assert not same(encoder, "addp_encoder_decoder", "addp_random")
    assert not same(decoder, "addp_encoder_decoder", "addp_random")
    assert not same(decoder, "addp_decoder", "addp_random")


def test_curve(data_dir, tmp_path, monkeypatch):
    argv = ("--table", "addp/1", "--data_dir", data_dir, "--output_dir", tmp_path, "--seeds", 0, 1, "--methods", "contrast", "pixel_knn")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = reproduce(*argv, "--datasets", "pneumonia_mnist")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: the picture needs matplotlib: pip install 'hf-anomaly[plots]'")
    assert (tmp_path / "addp-1.md").is_file(), "the numbers are safe"
    assert reproduce(*argv, "--datasets", "pneumonia_mnist", "--plot", "false")[0] == 0
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    status, out, err = reproduce(*argv)
    assert status == 0, err
    assert (tmp_path / "addp-1.png").read_bytes().startswith(b"\x89PNG")
    assert "| 16 | " + 6 * "not run | " in out
    # Two panels; the points are the means over seeds, at the number of images trained on.
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kwargs: (figures.append(self), Path(path).touch()))
    selection = Selection(tmp_path, seeds=(0, 1), data_dir=str(data_dir))
    table = find_table("addp/1")
    plot(table, selection, tmp_path / "x.png")
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == ["PneumoniaMNIST", "Fashion-MNIST"]
    assert panels[0].get_xscale() == "log"
    section = table.sections[0]
    results = [selection.result(section.cell(section.rows[0], "pixel_knn", seed, "laptop")) for seed in (0, 1)]
    images, means = panels[0].lines[1].get_data()
    assert list(images) == [16, 24, 24, 24], "24 of 30 normals are left to train on"
    assert means[0] == pytest.approx(np.mean([result["auroc"] for result in results]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--table", "shared_ae/9"), "there is no table 'shared_ae/9'; the tables: dia/1, dia/2,"),
        (("--table", "shared_ae/1", "--datasets", "mnits"), "no 'mnits' among its datasets: mnist, fashion_mnist"),
        (("--table", "shared_ae/1", "--methods", "addp_decoder"), "no 'addp_decoder' among its methods: shared_ae,"),
        (("--table", "shared_ae/1", "--budget", "huge"), "the budgets: smoke, laptop, paper"),
        (("--table", "shared_ae/1", "--shard", "0/3"), "--shard takes i/n"),
        (("--table", "shared_ae/1", "--shard", "3"), "--shard takes i/n"),
        (("--table", "shared_ae/1", "--seeds", "1", "1"), "--seeds takes different numbers"),
        (("--table", "shared_ae/2"), "nothing can be run: MNIST is not there: "),
        (("--table", "shared_ae/extra", "--datasets", "pneumonia_mnist"), "get pneumoniamnist.npz from medmnist.com"),
    ],
)
def test_what_cannot_be_run(tmp_path, argv, message):
    status, out, err = reproduce(*argv, "--data_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_where_data_lies(tmp_path, monkeypatch, refused):
    monkeypatch.delenv("HF_ANOMALY_DATA_DIR", raising=False)
    assert RECIPES["mnist"].locate() == "ylecun/mnist"
    assert RECIPES["digits"].locate() == "digits"
    with refused("PneumoniaMNIST", "medmnist.com", "--data_dir", "HF_ANOMALY_DATA_DIR"):
        RECIPES["pneumonia_mnist"].locate()
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("HF_ANOMALY_DATA_DIR", str(tmp_path))
    assert RECIPES["mnist"].locate() == str(tmp_path / "mnist")
    with refused(str(tmp_path / "fashion-mnist"), "Debian"):
        RECIPES["fashion_mnist"].locate()


def test_mean_and_std():
    assert mean_and_std({0: 0.9, 1: 0.8}, (0, 1)) == "0.850 ± 0.071"
    assert mean_and_std({1: 0.8}, (0, 1)) == "0.800 (seed 1 only)"
    assert mean_and_std({0: 0.8}, (0,)) == "0.800"


def test_the_mean_needs_every_class(tmp_path, data_dir):
    table = find_table("shared_ae/extra")
    section = replace(table.sections[0], rows=table.sections[0].rows[:2], methods=("contrast",))
    small = replace(table, sections=(section,))
    selection = Selection(tmp_path, seeds=(0, 1), data_dir=str(data_dir))
    cells = selection.cells(small)
    assert len(cells) == 4
    for cell in cells[:3]:
        running.run_cell(cell, selection, ["x"])
    done = {seed for seed in (0, 1) if all(selection.result(cell) for cell in cells if cell.seed == seed)}
    means = [np.mean([selection.result(cell)["auroc"] for cell in cells if cell.seed == seed]) for seed in done]
    line = next(line for line in markdown(small, selection, ["x"]).splitlines() if line.startswith("| mean"))
    assert len(done) == 1
    assert line.split(" | ")[1] == f"{means[0]:.3f} (seed {min(done)} only)"


def test_baselines_against_loops():
    generator = np.random.default_rng(0)
    train, test = generator.uniform(-1, 1, (9, 6)).astype(np.float32), generator.uniform(-1, 1, (4, 6)).astype(np.float32)
    train[:, 3:] *= 0.1
    brightness, flatness, distances, residuals = [], [], [], []
    center = train.mean(0)
    values, vectors = np.linalg.eigh(np.cov((train - center).T.astype(np.float64)))
    shares = np.cumsum(values[::-1]) / values.sum()
    plane = vectors[:, ::-1][:, : int(np.argmax(shares > 0.9)) + 1]
    assert 1 < plane.shape[1] < 6
    for image in test:
        brightness.append(sum(image) / len(image))
        flatness.append(-np.sqrt(sum((pixel - brightness[-1]) ** 2 for pixel in image) / len(image)))
        distances.append(np.mean(sorted(np.sqrt(((image - other) ** 2).sum()) for other in train)[:5]))
        offset = image - center
        residuals.append(((offset - plane @ (plane.T @ offset)) ** 2).sum())
    for function, expected in (
        (baselines.mean_intensity, brightness),
        (baselines.contrast, flatness),
        (baselines.pixel_knn, distances),
        (baselines.pca_residual, residuals),
    ):
        np.testing.assert_allclose(function(train, test), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        baselines.pixel_knn(train[:2], test), np.linalg.norm(test[:, None] - train[None, :2], axis=2).mean(1), rtol=1e-5
    )


def test_two_processes(data_dir, tmp_path, forks):
    options = ["--table", "dia/1", "--budget", "smoke", "--datasets", "pneumonia_mnist", "--data_dir", data_dir, "--output_dir", tmp_path]
    for methods in (["contrast"], ["dia"]):  # the former without a Trainer
        statuses, output = forks.run_script(SCRIPT, *options, "--methods", *methods, processes=2)
        assert statuses == [0, 0], output
        assert output.count("# dia/1") == 1, "one process reports"
    cells = sorted((tmp_path / "cells").rglob("*.json"))
    cells = [path for path in cells if path.name == "seed0.json"]
    assert [path.parent.name for path in cells] == ["contrast", "dia", "dissolver"]
    assert [json.loads(path.read_text())["processes"] for path in cells] == [2, 2, 2]
    assert not (tmp_path / "work").exists()


def test_a_result_hangs_on_the_detectors_configuration(tmp_path):
    """Tables are of the papers' methods, whatever the defaults become: what the paper prints is fixed, and what is not fixed is another result."""
    selection = Selection(tmp_path, ("pneumonia_mnist",), ("dia",), (0,), "laptop")
    (cell,) = [cell for cell in selection.cells(find_table("dia/1")) if cell.method == "dia"]
    settings = METHODS["dia"].settings(cell)["detector"]
    assert (settings["score_features"], settings["score_whitening"], settings["test_crop_scale"]) == ("projection", False, [0.54, 0.54])
    assert settings["num_test_views"] == 10
    full, one = (METHODS[name].settings(cell)["detector"] for name in ("shared_ae", "shared_ae_one"))
    assert (full["ablation"], one["ablation"]) == ("full", "one")
    assert METHODS["addp_random"].settings(cell)["detector"]["noise_level"] == 0.4
    json.dumps([METHODS[name].settings(cell) for name in ("dia", "shared_ae", "addp_random", "csi")])
