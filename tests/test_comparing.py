"""Tables of several detectors: what is one row, what is beside it, and what does not compare."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, DIAConfig, InputError, SmallResNetConfig, cli
from hf_anomaly.report import Run, compare_runs, comparison_markdown, read_baselines, read_run

TESTED_ON = {"dataset": "scans", "normal_label": "good", "num_normal": 20, "num_anomalous": 30}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Writes what a training leaves, without the weights."""
    monkeypatch.chdir(tmp_path)

    def write(name, config_class, seed, auroc, *, division=(), optimization=(), config=None, **results):
        config_class(image_size=8, num_channels=1, **config or {}).save_pretrained(name)
        division = {"protocol": "official", "max_train_images": None, "seed": seed, "split_hash": f"hash of {seed}"} | dict(division)
        results = TESTED_ON | {"auroc": auroc, "average_precision": auroc and auroc / 2, "seed": seed, "steps": 100} | results
        results |= {
            "division": division,
            "split_hash": division["split_hash"],
            "optimization": {"learning_rate": 0.01, "data_seed": seed} | dict(optimization),
        }
        Path(name, "eval_results.json").write_text(json.dumps(results))
        return name

    return write


def test_a_detector_without_an_error_compares(trained):
    """Also by what earlier versions wrote, whose rounding went beyond 1."""
    run = read_run(trained("dia", DIAConfig, 0, 1.0, average_precision=1.0000000000000002, fpr_at_95_tpr=0.0))
    assert (run.results["auroc"], run.results["fpr_at_95_tpr"]) == (1, 0)


def test_a_row_is_a_way_of_training(trained):
    names = [trained(f"dia-{seed}", DIAConfig, seed, auroc) for seed, auroc in ((2, 0.9), (0, 0.8), (1, 0.85), (4, 0.7))]
    names.insert(1, trained("csi", CSIConfig, 0, 0.75))
    names.append(trained("slow", DIAConfig, 0, 0.6, optimization={"learning_rate": 0.001}))
    dia, csi, slow = compare_runs(map(read_run, names))
    assert dia == {
        **TESTED_ON,
        "method": "DIA",
        "settings": {"learning_rate": 0.01},
        "seeds": [0, 1, 2, 4],
        "steps": 100,
        "auroc": pytest.approx(statistics.mean([0.9, 0.8, 0.85, 0.7])),
        "auroc_std": pytest.approx(statistics.stdev([0.9, 0.8, 0.85, 0.7])),
        "average_precision": pytest.approx(0.40625),
        "average_precision_std": pytest.approx(statistics.stdev([0.9, 0.8, 0.85, 0.7]) / 2),
    }
    assert (csi["method"], csi["settings"], csi["auroc"], csi["auroc_std"]) == ("CSI", {}, 0.75, None)
    assert (slow["method"], slow["settings"], slow["seeds"]) == ("DIA", {"learning_rate": 0.001}, [0])
    lines = comparison_markdown([dia, csi, slow]).splitlines()
    assert lines[0] == "scans: normal is good; 20 normal and 30 anomalous test images"
    assert lines[2] == "| method | settings | seeds | steps | AUROC | Average precision |"
    assert lines[4] == "| DIA | learning_rate 0.01 | 0–2, 4 | 100 | 0.812 ± 0.085 | 0.406 ± 0.043 |"
    assert lines[5] == "| CSI | – | 0 | 100 | 0.750 | 0.375 |"


def test_detectors_compare_on_the_images_that_their_results_are_of(trained):
    """Trained on the same images, and one evaluated on others since."""
    elsewhere = {"dataset": "ward", "normal_label": "good", "split_hash": "b", "division": {"protocol": "official", "seed": 0}}
    trained("here", DIAConfig, 0, 0.9)
    trained("there", DIAConfig, 0, 0.7, evaluated_on=elsewhere)
    trained("csi", CSIConfig, 0, 0.6, evaluated_on=elsewhere)
    trained("changed", CSIConfig, 1, 0.6, evaluated_on={**elsewhere, "split_hash": "c"})
    here, *there = compare_runs(map(read_run, ["here", "there", "csi"]))
    assert (here["dataset"], here["auroc"]) == ("scans", 0.9)
    assert [(row["dataset"], row["method"], row["auroc"]) for row in there] == [("ward", "DIA", 0.7), ("ward", "CSI", 0.6)]
    with pytest.raises(InputError, match="csi and changed do not compare: their data have the same name, ward, and other images"):
        compare_runs(map(read_run, ["csi", "changed"]))
    trivial = {"as_they_are": dict.fromkeys(("contrast", "pixel_knn", "mean_intensity", "pca_residual"), 0.5)}
    there = read_run(trained("there", DIAConfig, 0, 0.7, evaluated_on=elsewhere, baselines=trivial))
    assert {run.tested_on for run in read_baselines("there/eval_results.json")} == {there.tested_on}
    Path("csi/eval_results.json").write_text('{"auroc": 0.9, "evaluated_on": "ward"}')
    with pytest.raises(InputError, match=r"evaluated_on must be of type dict, got 'ward': restore or delete it"):
        read_run("csi")


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"config": {"num_encoders": 2}}, {"num_encoders": 2}),
        ({"config": {"dissolver": "median", "dissolver_settings": {"kernel_size": 7}}}, {"dissolver_settings.kernel_size": 7}),
        ({"division": {"max_train_images": 16}}, {"max_train_images": 16}),
        ({"optimization": {"data_seed": 7}}, {"data_seed": 7}),
        ({"config": {"false_positive_rate": 0.1}}, {"false_positive_rate": 0.1}),
        ({"steps": 50}, {}),
    ],
)
def test_what_makes_another_row(trained, other, shown):
    names = [trained("one", DIAConfig, 0, 0.9), trained("other", DIAConfig, 0, 0.8, **other)]
    first, second = compare_runs(map(read_run, names))
    assert shown.items() <= second["settings"].items()
    assert second["steps"] == other.get("steps", 100)
    assert "seed" not in first["settings"]


def test_a_detector_that_was_loaded_and_saved_again_is_in_the_row_of_its_seeds(trained):
    """As `hf-anomaly calibrate` does into the same folder; `card` takes it as a repetition, too."""
    config = {"backbone_config": SmallResNetConfig(hidden_sizes=[8], depths=[1]), "projection_size": 4}
    for seed in (0, 1):
        results = Path(trained(f"csi-{seed}", CSIConfig, seed, 0.9), "eval_results.json")
        measured = results.read_text()
        CSIModel(CSIConfig(image_size=8, **config)).fit_reference([torch.zeros(2, 1, 8, 8)], progress=False).save_pretrained(f"csi-{seed}")
        AnomalyImageProcessor.for_images(8, 1).save_pretrained(f"csi-{seed}")
        results.write_text(measured)
    CSIModel.from_pretrained("csi-1").save_pretrained("csi-1")
    assert [row["seeds"] for row in compare_runs(map(read_run, ["csi-0", "csi-1"]))] == [[0, 1]]
    cli.main(["card", "csi-0", "--runs", "csi-1"])
    assert "| mean ± std | 0.9000 ± 0.0000 |" in Path("csi-0/README.md").read_text()


def test_what_is_no_other_row(trained):
    """On which speed, saving and logging hang, and not how a detector is trained."""
    command = "train_dia.py --dissolver_steps 5 --seed 0 --output_dir 'my run' --learning_rate 1e-2 --max_steps 100 --use_cpu true"
    names = [trained("one", DIAConfig, 0, 0.9, config={"false_positive_rate": 0.1}, command=command)]
    config = {"search_chunk_size": 7, "num_calibration_scores": 3, "false_positive_rate": 0.1}
    command = "train_dia.py --seed 1 --output_dir other --dissolver-steps=5 --logging_steps 5 --disable_tqdm true --save_strategy no"
    command += " --license mit --push_to_hub true --hub_private_repo true --log_level info --dataloader_num_workers 2 --num_processes 1"
    names.append(trained("other", DIAConfig, 1, 0.8, config=config, num_train=99, seconds=5, command=command))
    assert [row["seeds"] for row in compare_runs(map(read_run, names))] == [[0, 1]]


def test_what_only_the_command_tells(trained):
    """Such as how long a first stage was trained."""
    names = [trained(f"run{n}", DIAConfig, n, 0.9, command=f"train_dia.py --seed {n} --dissolver_steps {n}") for n in (2, 3)]
    names.append(trained("default", DIAConfig, 4, 0.9, command="train_dia.py --seed 4"))
    names.append(trained("by hand", DIAConfig, 5, 0.9, command="train_dia.py '--dissolver_steps 7"))  # no shell would take it
    assert [row["settings"] for row in compare_runs(map(read_run, names))] == [{"dissolver_steps": "2"}, {"dissolver_steps": "3"}, {}]


def test_runs_of_earlier_versions(trained):
    """Whose optimizer nobody recorded: what it was is not known, and not that it was another one."""
    new, old, other = (trained(name, DIAConfig, seed, 0.9) for seed, name in enumerate(("new", "old", "other")))
    results = json.loads(Path(old, "eval_results.json").read_text())
    del results["optimization"]
    Path(old, "eval_results.json").write_text(json.dumps(results))
    assert [row["settings"] for row in compare_runs(map(read_run, (new, old, other)))] == [{}, {"optimization": "not recorded"}]
    config = json.loads(Path(old, "config.json").read_text())
    Path(old, "config.json").write_text(json.dumps({**config, "num_encoders": 2}))
    settings = [row["settings"] for row in compare_runs(map(read_run, (new, old, other)))]
    assert settings == [{"num_encoders": 1}, {"num_encoders": 2, "optimization": "not recorded"}]


def test_what_takes_no_part_in_the_table(trained, capsys, caplog):
    one, two = trained("one", DIAConfig, 0, 0.9), trained("two", DIAConfig, 0, None, reason="no test images")
    Path("empty").mkdir()
    Path("table.csv").touch()
    cli.main(["compare", one, two, "empty", "table.csv"])
    assert "| DIA | – | 0 | 100 | 0.900 | 0.450 |" in capsys.readouterr().out
    assert "two has no AUROC: no test images" in caplog.text
    assert "'empty' holds no detector" in caplog.text
    assert "Left out: 'table.csv' is a file" in caplog.text
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", two, "empty"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("auroc", value) for value in (float("nan"), 1.01, -0.01, "x", [1])),
        ("average_precision", "x"),
        ("optimization", "x"),
        ("dataset", ["a"]),
        ("num_normal", {}),
        ("steps", "many"),
        ("command", ["train_dia.py"]),
        ("by_class", {"dent": 0.5}),
    ],
)
def test_damaged_results(trained, field, value):
    name = trained("one", DIAConfig, 0, 0.9)
    results = json.loads(Path(name, "eval_results.json").read_text())
    Path(name, "eval_results.json").write_text(json.dumps({**results, field: value}))
    with pytest.raises(InputError, match=f"one: {field} is .*: restore or delete its eval_results.json"):
        read_run(name)


def test_names_say_nothing_to_a_terminal(trained):
    (row,) = compare_runs([read_run(trained("one", DIAConfig, 0, 0.9, dataset="\x1b[31m|scans", normal_label="<b>"))])
    table = comparison_markdown([row | {"settings": {"kernel_size": [3, 5], "note": "a|b"}}]).splitlines()
    assert table[0].startswith("31m scans: normal is b;")
    assert table[4].startswith("| DIA | kernel_size 3, 5, note a b | 0 | 100 |")


def test_other_test_images_make_another_table(trained):
    names = [trained(f"run-{n}", DIAConfig, 0, 0.9, num_normal=n, config={"num_encoders": n}) for n in (1, 2)]
    rows = compare_runs(map(read_run, names))
    assert [row["settings"] for row in rows] == [{}, {}]  # those of another table are nothing to differ from
    assert comparison_markdown(rows).count("| method |") == 2


def test_a_metric_that_one_run_lacks(trained):
    names = [
        trained("one", DIAConfig, 0, 0.9, aupro=0.5),
        trained("two", DIAConfig, 1, 0.9),
        trained("three", CSIConfig, 0, 0.9, aupro=0.4),
    ]
    dia, csi = compare_runs(map(read_run, names))
    assert "aupro" not in dia
    assert csi["aupro"] == 0.4
    assert comparison_markdown([dia, csi]).splitlines()[4].endswith("| 0.900 ± 0.000 | 0.450 ± 0.000 | – |")


def test_classes_of_anomalies(trained, capsys):
    """Each with its mean over the seeds; one that not all runs have a number for is left out."""
    for seed, dent, crack in ((0, 0.9, 0.5), (1, 0.7, None)):
        trained(
            f"dia-{seed}",
            DIAConfig,
            seed,
            0.8,
            by_class={"dent": {"num_images": 3, "auroc": dent}, "a|b": {"num_images": 2, "auroc": crack}},
        )
    trained("csi", CSIConfig, 0, 0.75, by_class={"dent": {"num_images": 3, "auroc": 0.6}, "a|b": {"num_images": 2, "auroc": 0.4}})
    trained("one kind", CSIConfig, 1, 0.75, config={"num_encoders": 2})
    dia, csi, one = rows = compare_runs(map(read_run, ("dia-0", "dia-1", "csi", "one kind")))
    assert dia["by_class"] == {"dent": {"auroc": pytest.approx(0.8), "auroc_std": pytest.approx(statistics.stdev([0.9, 0.7]))}}
    assert csi["by_class"] == {"dent": {"auroc": 0.6, "auroc_std": None}, "a|b": {"auroc": 0.4, "auroc_std": None}}
    assert "by_class" not in one
    assert comparison_markdown(rows).split("\n\n")[2].splitlines() == [
        "| AUROC | DIA | CSI · num_encoders 1 |",
        "| --- | --- | --- |",
        "| a b | – | 0.400 |",
        "| dent | 0.800 ± 0.141 | 0.600 |",
    ]
    cli.main(["compare", "csi", "--output", "table.csv"])
    with open("table.csv", newline="") as file:
        assert [json.loads(row["by_class"]) for row in csv.DictReader(file)] == [csi["by_class"]]


def test_what_does_not_compare(trained):
    one = read_run(trained("one", DIAConfig, 0, 0.9))
    again = read_run(trained("again", DIAConfig, 0, 0.8))
    with pytest.raises(InputError, match="one and again were trained in the same way with the same seed, 0"):
        compare_runs([one, again])
    moved = read_run(trained("moved", CSIConfig, 0, 0.8, division={"split_hash": "another"}))
    with pytest.raises(InputError, match="one and moved do not compare: their data have the same name, scans, and other images"):
        compare_runs([one, moved])
    trained("unlabelled", DIAConfig, 0, None, reason="all images are normal")
    with pytest.raises(InputError, match="unlabelled has no AUROC: all images are normal"):
        read_run("unlabelled")
    Path("one", "eval_results.json").unlink()
    with pytest.raises(InputError, match="one has no AUROC: its eval_results"):
        read_run("one")


def test_command(trained, capsys):
    names = [trained("one", DIAConfig, 0, 0.9), trained("two", DIAConfig, 1, 0.8), trained("csi", CSIConfig, 0, 0.7)]
    measured = {"detector": 0.9, "contrast": 0.5, "pixel_knn": 0.6, "mean_intensity": 0.4, "pca_residual": 0.3}
    Path("trivial.json").write_text(json.dumps({**TESTED_ON, "baselines": {"as_they_are": measured, "standardized": {"detector": 0.8}}}))
    cli.main(["compare", *names, "--baselines", "trivial.json", "--output", "table.csv"])
    table = capsys.readouterr().out
    assert "| DIA | – | 0–1 | 100 | 0.850 ± 0.071 | 0.425 ± 0.035 |" in table
    assert "| pixel kNN | – | – | – | 0.600 | – |" in table
    assert "detector" not in table
    with open("table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seeds"], float(row["auroc"])) for row in rows] == [
        ("DIA", "0 1", pytest.approx(0.85)),
        ("CSI", "0", 0.7),
        ("mean intensity", "", 0.4),
        ("contrast (negative pixel std)", "", 0.5),
        ("pixel kNN", "", 0.6),
        ("PCA residual", "", 0.3),
    ]
    cli.main(["compare", *names, "--output", "table.md"])
    assert Path("table.md").read_text() == capsys.readouterr().out
    cli.main(["compare", *names, "--output", "table.json"])
    assert json.loads(Path("table.json").read_text()) == compare_runs(map(read_run, names))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["one", "--output", "table.pdf"], "--output table.pdf: the name must end in .md, .csv or .json"),
        (["one", "--baselines", "one/eval_results.json"], "one/eval_results.json holds no baselines"),
        (["empty"], "'empty' holds no detector"),
        (["resnet"], "'resnet' holds a ResNetConfig, which is no anomaly detector's"),
    ],
)
def test_what_is_refused(trained, capsys, argv, words):
    from transformers import ResNetConfig

    trained("one", DIAConfig, 0, 0.9)
    Path("empty").mkdir()
    ResNetConfig().save_pretrained("resnet")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", *argv])
    assert words in capsys.readouterr().err


def test_baselines_over_several_divisions():
    results = [Run("a", "contrast", TESTED_ON | {"auroc": 0.5}), Run("b", "contrast", TESTED_ON | {"auroc": 0.7})]
    assert compare_runs(results)[0]["auroc"] == pytest.approx(0.6)
