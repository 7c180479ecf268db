"""Rendered cards: the numbers are in, nothing is left over, and a user's text is only text."""

import copy
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel

from hf_anomaly import (
    DETECTORS,
    ADDPConfig,
    ADDPForPreTraining,
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DIAConfig,
    DIAModel,
    DiffusionDissolver,
    GaussianDissolver,
    InputError,
    SharedAEConfig,
    SmallResNetConfig,
)
from hf_anomaly.cards import shown_command, write_card, write_dissolver_card, write_figures, write_pretraining_card
from hf_anomaly.cards.figures import draw_precision_recall, draw_roc, draw_scores, new_figure
from hf_anomaly.cards.merging import address_card, has_own_words, merge_cards, outdate_card, read_card, split_card, tag_card
from hf_anomaly.dissolving import build_scheduler, build_unet

MEASURED = {"auroc": 0.87654321, "average_precision": 0.7654321, "fpr_at_95_tpr": 0.4321}
RESULTS = {
    **MEASURED,
    "num_normal": 234,
    "num_anomalous": 390,
    "split_hash": "0123abcd",
    "dataset": "some/where/chest.npz",
    "normal_label": "healthy",
    "false_positive_rate_at_threshold": 0.0625,
    "true_positive_rate_at_threshold": 0.5125,
    "seconds": 12.5,
    "seed": 43,
    "steps": 321,
    "num_train": 1093,
    "num_calibration": 121,
}
NO_TEST = {
    **RESULTS,
    **dict.fromkeys(MEASURED),
    "num_normal": 0,
    "num_anomalous": 0,
    "reason": "the dataset has no anomalous images",
}
for _name in ("false_positive_rate_at_threshold", "true_positive_rate_at_threshold"):
    NO_TEST.pop(_name)


def detector(calibrated=True, **settings):
    return copy.deepcopy(fitted_once(calibrated, json.dumps(settings)))


@functools.cache
def fitted_once(calibrated, settings):
    torch.manual_seed(0)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    model = DIAModel(DIAConfig(image_size=8, projection_size=4, backbone_config=backbone, **json.loads(settings))).eval()
    model.fit_reference([torch.rand(6, 1, 8, 8) * 2 - 1], progress=False)
    return model.calibrate([torch.rand(39, 1, 8, 8) * 2 - 1], progress=False) if calibrated else model


def card(folder, results=RESULTS, calibrated=True, repo_id=None, **settings):
    """The card's text, and its YAML."""
    folder.mkdir(exist_ok=True)
    model = detector(calibrated, **settings)
    model.save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    write_card(folder, model, results, repo_id=repo_id)
    assert not list(folder.glob(".README*"))
    text = (folder / "README.md").read_text()
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return body, yaml.safe_load(front)


def check_whole(body):
    """Nothing undefined, None or empty where something belongs."""
    for leftover in ("{{", "{%", "%}", "None", "nan", "Undefined", "``,", " , ", " .", ": ."):
        assert leftover not in body, leftover
    assert len(re.findall("^```", body, flags=re.MULTILINE)) % 2 == 0
    assert "\n\n\n\n" not in body


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "dia-chest"


def test_the_numbers_are_in(folder):
    body, data = card(folder, {**RESULTS, "command": "scripts/train_dia.py --seed 43"})
    threshold = AutoModel.from_pretrained(folder).calibration.threshold.item()
    check_whole(body)
    assert body.lstrip().startswith("# dia-chest\n")
    for line in ("| AUROC | 0.8765 |", "| Average precision | 0.7654 |", "| FPR at 95 % TPR | 0.4321 |"):
        assert f"{line}\n" in body
    for fact in ("234 normal", "390 anomalous", "1093 normal", "121 held out", "0123abcd", "seed 43", "321 steps", "healthy", "chest.npz"):
        assert fact in body
    for fact in (
        "scripts/train_dia.py --seed 43",
        "0.0625",
        "0.5125",
        "8×8",
        "gray",
        "DIAModel",
        f"threshold {threshold:.6g} aims at a false-positive rate of 0.05",
    ):
        assert fact in body
    (entry,) = data["model-index"]
    assert entry["name"] == "dia-chest"
    metrics = entry["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics} == {"roc_auc": 0.8765, "average_precision": 0.7654, "fpr_at_95_tpr": 0.4321}
    assert (data["library_name"], data["pipeline_tag"]) == ("hf-anomaly", "image-classification")
    assert data["tags"] == ["anomaly-detection", "dia_anomaly"]


@pytest.mark.parametrize(("copies", "told"), [(0, False), (None, False), (58, True)])
def test_test_images_that_also_train_are_told(folder, copies, told):
    body, _ = card(folder, {**RESULTS, "num_test_copies": copies})
    check_whole(body)
    assert ("58 of which are byte for byte also among the training or calibration images" in body) == told
    assert ("took no part in training" in body) != told


@pytest.mark.parametrize("copies", [0, 1])
def test_near_copies_of_training_images_are_told(folder, copies):
    body, _ = card(folder, {**RESULTS, "num_test_copies": copies, "num_near_copies": 3})
    check_whole(body)
    assert ", with 3 near copies of training images among the normal ones:\n" in body


@pytest.mark.parametrize(
    ("protocol", "held_out"), [("official", "splits, calibration images"), ("balanced", "balanced, test and calibration images")]
)
def test_what_kept_patients_together_is_told(folder, protocol, held_out):
    body, _ = card(folder, {**RESULTS, "division": {"protocol": protocol, "group_column": "patient"}})
    assert f"{held_out} held out by patient" in body


@pytest.mark.parametrize("damaged", [None, [1], {"a": "x"}, {"a": {"auroc": 0.5}}, {"a": {"num_images": 3, "auroc": "x"}}])
def test_damaged_kinds_are_refused(folder, damaged):
    with pytest.raises(InputError, match=r"by_class in eval_results.json"):
        card(folder, {**RESULTS, "by_class": damaged})


@pytest.mark.parametrize("calibrated", [True, False])
def test_kinds_of_anomalies_are_told(folder, calibrated):
    found = {"auroc": 0.75, "num_images": 3} | ({"true_positive_rate_at_threshold": 0.5} if calibrated else {})
    body, _ = card(folder, {**RESULTS, "by_class": {"a|b": found, "dent": {**found, "auroc": None}}}, calibrated)
    check_whole(body)
    flagged = " 0.5000 |" if calibrated else ""
    assert f"| a b | 3 | 0.7500 |{flagged}\n| dent | 3 | – |{flagged}\n" in body
    assert "By kind" not in card(folder)[0]


def test_licence_and_dataset_are_in_the_yaml(folder):
    folder.mkdir()
    write_card(folder, detector(), RESULTS, license="cc-by-4.0", dataset_id="org/chest")
    data = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (data["license"], data["datasets"]) == ("cc-by-4.0", ["org/chest"])
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "org/chest"
    _, data = card(folder, {**RESULTS, "dataset_id": "org/other"})
    assert (data["license"], data["datasets"]) == ("cc-by-4.0", ["org/chest"])  # what is there stays
    write_card(folder, detector(), RESULTS, license="mit")
    text = (folder / "README.md").read_text()
    assert "license: mit\n" in text
    assert "&id" not in text  # an alias of YAML, for what is noted twice


@pytest.mark.parametrize("facts", [{"license": "MIT License"}, {"license": "a\nb: c"}, {"dataset_id": "a/b/c"}, {"dataset_id": "<b>"}])
def test_no_such_licence_or_dataset(folder, facts):
    folder.mkdir()
    with pytest.raises(InputError, match=r"such as|organisation/name"):
        write_card(folder, detector(), RESULTS, **facts)
    assert not list(folder.iterdir())


def test_another_seed_of_the_division_is_told(folder):
    assert "seed 43 (of the division 5), 321 steps" in card(folder, {**RESULTS, "division": {"protocol": "official", "seed": 5}})[0]
    assert "seed 43, 321 steps" in card(folder, {**RESULTS, "division": {"protocol": "official", "seed": 43}})[0]


def test_the_protocol_is_told(folder):
    assert "Protocol" not in card(folder)[0]
    division = {"protocol": "official", "classes": None, "max_train_images": None, "contamination": 0.0}
    assert "Protocol: the source's own splits. Split hash" in card(folder, {**RESULTS, "division": division})[0]
    division = {"protocol": "balanced", "classes": {"1": "oak", "2": "<b>"}, "max_train_images": 16, "contamination": 0.05}
    body, _ = card(folder, {**RESULTS, "division": division})
    check_whole(body)
    for words in ("Protocol: balanced", "classes b, oak only", "at most 16 normal images", "a contamination of 0.05"):
        assert words in body


def test_anomalies_in_the_training_are_told(folder):
    assert "trained on normal images only" in card(folder)[0]
    body, _ = card(folder, {**RESULTS, "num_train": 21, "division": {"protocol": "official", "contamination": 0.05}})
    check_whole(body)
    assert "normal images only" not in body
    assert "trained on images taken for normal, 1 of which are anomalies, and" in body
    assert "21 images to train on, 1 of them anomalies taken for normal, and 121 held out" in body


def test_intervals_and_further_metrics_are_told_where_they_were_measured(folder):
    more = {"auroc_interval": [0.81, 0.92], "interval_confidence": 0.95, "balanced_accuracy_at_threshold": 0.7, "aupro": 0.6}
    body, data = card(folder, {**RESULTS, **more})
    check_whole(body)
    assert "| AUROC | 0.8765 (95% interval 0.8100 to 0.9200) |\n" in body
    assert "| AUPRO | 0.6000 |\n" in body
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics}.items() >= {"aupro": 0.6, "balanced_accuracy": 0.7, "roc_auc": 0.8765}.items()


def test_results_of_other_seeds_join_in_a_table(folder):
    folder.mkdir()
    others = [{**RESULTS, "seed": seed, "auroc": auroc, "split_hash": "f" * 64} for seed, auroc in ((5, 0.9), (44, 0.8))]
    write_card(folder, detector(), RESULTS, other_runs=others)
    body = (folder / "README.md").read_text()
    check_whole(body.split("---\n", 2)[2])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    start = rows.index(["seed", "AUROC", "Average precision", "FPR at 95 % TPR", "split hash"])
    assert [row[0] for row in rows[start + 2 :]] == ["5", "43", "44", "mean ± std"]
    assert [row[1] for row in rows[start + 2 :]] == ["0.9000", "0.8765", "0.8000", "0.8588 ± 0.0523"]
    assert rows[start + 2][4] == "f" * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 43}, "43, 43"),
        ({"seed": 1, "steps": 5}, "steps are 321, 5"),
        ({"seed": 1, "evaluated_on": {"dataset": "ward"}}, "evaluated_on are some/where/chest.npz, ward"),
        ({"seed": 1, "evaluated_on": {**RESULTS, "normal_label": "other"}}, "evaluated_normal_label are healthy, other"),
    ],
)
def test_runs_that_differ_in_more_than_their_seed(folder, change, message):
    folder.mkdir()
    with pytest.raises(InputError, match=message):
        write_card(folder, detector(), RESULTS, other_runs=[{**RESULTS, **change}])
    assert not list(folder.iterdir())


def test_what_a_person_wrote_stays(folder):
    card(folder)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("<!-- hf-anomaly: limits -->", "My words.\n\n<!-- hf-anomaly: limits -->"))
    body, _ = card(folder, {**RESULTS, "auroc": 0.5})
    assert "My words." in body
    assert "| AUROC | 0.5000 |" in body
    assert "0.8765" not in body


def generated(folder, **facts):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").unlink(missing_ok=True)
    write_card(folder, detector(), RESULTS, **facts)
    return (folder / "README.md").read_text()


def test_what_a_program_wrote_in_the_yaml_gives_way_and_a_persons_stays(folder, caplog):
    def merged(ours, theirs):
        data, _ = split_card(merge_cards(ours, theirs))
        return data.get("license"), data.get("datasets")

    old, new = ({"license": name, "dataset_id": f"org/{name}"} for name in ("mit", "other"))
    assert merged(generated(folder, **new), generated(folder, **old)) == ("other", ["org/other"])
    assert merged(generated(folder), generated(folder, **old)) == ("mit", ["org/mit"])
    twice = merge_cards(generated(folder), generated(folder, **old))  # still known as a program's
    assert merged(generated(folder, **new), twice) == ("other", ["org/other"])
    replaced = merge_cards(generated(folder, **new), generated(folder, **old))  # and so is what took its place
    assert merged(generated(folder, **old), replaced) == ("mit", ["org/mit"])
    assert not caplog.records
    by_hand = generated(folder, **old).replace("license: mit", "license: cc0-1.0", 1)
    assert merged(generated(folder, **new), by_hand) == ("cc0-1.0", ["org/other"])
    assert "license cc0-1.0, which somebody wrote there: it is kept in place of other" in caplog.text
    caplog.clear()
    again = merge_cards(generated(folder), by_hand)
    merge_cards(generated(folder, **new), again, given=())
    merge_cards(generated(folder, license="cc0-1.0"), again)
    assert not caplog.records
    assert merged(generated(folder, **new), again) == ("cc0-1.0", ["org/other"])  # still known as a person's


def test_a_person_needs_to_write_nothing_to_be_heard(folder, caplog):
    ours = generated(folder)
    block = re.search(r"<!-- hf-anomaly: settings -->.*?<!-- /hf-anomaly: settings -->\n", ours, re.DOTALL)[0]
    theirs = ours.replace(block, "").replace("# dia-chest", "# Chests")
    assert merge_cards(ours, theirs).replace("\n", "") == theirs.replace("\n", "")
    for mine, warned in (("", False), ("\nTheirs.", False), ("\nMine.", True)):
        merged = merge_cards(ours + mine, theirs + "\nTheirs.")
        assert ("Theirs." in merged, "Mine." in merged) == (True, False)
        assert ("kept instead of that in the new card" in caplog.text) == warned
    assert merge_cards(ours, ours) == ours
    title_alone = "---\ntags: [x]\n---\n\n# Chests\n"
    assert split_card(merge_cards(ours, title_alone))[1] == split_card(ours)[1]
    for kind, another in (("dia_anomaly", "dissolver"), ("dia_anomaly", "csi_anomaly"), ("dissolver", "denoising")):
        of_another_kind = re.sub("<!-- hf-anomaly: results -->.*", "", theirs, flags=re.DOTALL).replace("dia_anomaly", another)
        merged = merge_cards(ours.replace("dia_anomaly", kind), of_another_kind)
        assert "# Chests" in merged
        assert "| AUROC | 0.8765 |" in merged  # its card never had results
        assert "csi_anomaly" not in split_card(merged)[0]["tags"]


def test_cards_of_other_editors(folder, refused):
    path = folder / "README.md"
    path.write_text(generated(folder).replace("# dia-chest", "# Meine Brustkörbe"), encoding="utf-8-sig")
    write_card(folder, detector(), RESULTS)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert text.count("library_name") == 1
    assert "# Meine Brustkörbe" in text
    path.write_text(text, encoding="latin-1", errors="replace")
    with refused(path, "save it as UTF-8"):
        write_card(folder, detector(), RESULTS)
    with refused("README.md of org/chests is not"):
        read_card(path, "README.md of org/chests")


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("language: no", "language: 'no'"),  # Norwegian, which YAML 1.1 takes for false
        ("inference: false", "inference: false"),
        ("duration: 12:30", "duration: '12:30'"),  # text, which YAML 1.1 takes for 750
        ("tags: [{a: b}, [c]]", "a: b"),
        ("metrics: [{d: e}]", "d: e"),
        ("model-index: text", ""),
        ("", ""),
        ("model-index: [{name: x, results: text}]", "- text"),
        ("model-index: [{name: x, results: [{task: text}]}]", "task: text"),
    ],
)
def test_the_yaml_of_a_person_may_hold_anything(folder, front, kept):
    written = f"---\n{front}\n---\n\n# Chests\n\nMine.\n"
    merged = merge_cards(generated(folder), written)
    for text in (merged, tag_card(merged, ("new",)), outdate_card(merged), merge_cards(written, merged)):
        assert kept in text
        assert "Mine." in text
        assert "!!" not in text  # a tag of Python's own, which nothing else reads
        assert len(re.findall("^---$", text, re.MULTILINE)) == 2
    assert "roc_auc" in merged
    assert not {"roc_auc", "0.8765"} & set(outdate_card(merged).split())
    assert outdate_card(merged).count("no longer hold") == 1
    assert outdate_card(written) is None
    for text in (merged, written):
        assert tag_card(tag_card(text, "new"), ["new"]).count("- new") == 1


@pytest.mark.parametrize("front", ["date: 2020-13-45", "x: !!bool perhaps", f"x: {'[' * 2000}"])
def test_yaml_that_cannot_be_read_is_text(folder, front):
    assert front in merge_cards(generated(folder), f"---\n{front}\n---\n\n# Chests\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("---\n", "---\nlanguage: en\n"),
        ("license: cc-by-4.0", "license: mit"),
        ("datasets:\n", "datasets:\n- mine/scans\n"),
        ("tags:\n", "tags:\n- ours\n"),
        ("\n<!-- hf-anomaly: usage", "\nKeep it dry.\n\n<!-- hf-anomaly: usage"),
    ],
)
def test_what_are_words_of_a_person(folder, before, after):
    folder.mkdir()
    write_card(folder, detector(), RESULTS, license="cc-by-4.0", dataset_id="org/chests")
    written = (folder / "README.md").read_text()
    assert not has_own_words(written)
    assert before in written
    assert has_own_words(written.replace(before, after, 1))


def test_a_first_stage_that_is_written_again_is_told_anew(tmp_path):
    def body(steps, noise):
        model = ADDPForPreTraining(ADDPConfig(image_size=8, hidden_sizes=[4, 4], noise=noise))
        notes = {"num_images": 9, "steps": steps, "batch_size": 4, "seed": 0}
        write_pretraining_card(tmp_path, model, notes, dataset="scans")
        return (tmp_path / "README.md").read_text()

    assert "200 steps" in body(200, "gaussian")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nMy words.\n")
    again = body(5000, "simplex")
    assert "5000 steps" in again
    assert "simplex noise" in again
    assert "My words." in again
    assert "200 steps" not in again


def test_stages_before_a_detector_that_cuts_its_images_tell_so(tmp_path):
    notes = {"num_images": 9, "steps": 1, "batch_size": 4, "seed": 0}
    for tiles in (1, 2):
        model = ADDPForPreTraining(ADDPConfig(image_size=16, tiles=tiles, hidden_sizes=[4, 4]))
        write_pretraining_card(tmp_path / str(tiles), model, notes)
        run = {"run": {"tiles": tiles}} if tiles > 1 else {}
        write_dissolver_card(tmp_path / f"dissolver{tiles}", "diffusion", {}, resolution=8, num_channels=1, notes={**notes, **run})
    read = {name: (tmp_path / name / "README.md").read_text() for name in ("1", "2", "dissolver1", "dissolver2")}
    assert "16×16 pixels. No" in read["1"]
    assert "16×16 pixels cut into 2×2 squares. No" in read["2"]
    assert "gray images at 8×8 pixels, of" in read["dissolver1"]
    assert "gray images, cut into 2×2 squares, at 8×8 pixels each, of" in read["dissolver2"]
    assert ["--tiles 2" in read[name] for name in ("dissolver1", "dissolver2")] == [False, True]


def test_bfloat16_is_told_where_it_was_measured(folder):
    body, _ = card(folder, {**RESULTS, "bfloat16_rank_correlation": 0.98765, "bfloat16_num_images": 99})
    check_whole(body)
    assert "0.9877, measured on 99" in body
    assert "bfloat16" not in card(folder, {**RESULTS, "bfloat16_rank_correlation": None, "bfloat16_num_images": 99})[0]


def test_settings_are_those_that_differ_from_the_defaults(folder):
    body, _ = card(folder, score_whitening=False, dissolver="gaussian", dissolver_settings={"kernel_size": 3})
    settings = json.loads(re.search(r"```json\n(.*?)```", body, re.DOTALL)[1])
    assert settings["score_whitening"] is False
    assert settings["projection_size"] == 4
    assert settings["dissolver_settings"] == {"kernel_size": 3}
    assert not settings.keys() & {"temperature", "shift", "bank_size", "num_calibration_scores", "hf_anomaly_version", "backbone_config"}


def test_without_a_test_split(folder):
    body, data = card(folder, NO_TEST)
    check_whole(body)
    assert "Not measured: the dataset has no anomalous images." in body
    assert "| metric |" not in body
    assert "model-index" not in data
    assert "metrics" not in data
    assert "On the evaluation split" not in body


@pytest.mark.parametrize("results", [{}, {"seed": 3}, {"eval_auroc": 0.9}])
def test_without_known_results(tmp_path, results):
    write_card(tmp_path, detector(), results)
    text = (tmp_path / "README.md").read_text()
    assert "## Training data\n\nNot recorded.\n" in text
    assert "## Results\n\nNot recorded in this card.\n" in text
    assert "Not measured" not in text  # which nobody knows


def test_without_calibration(folder):
    results = {key: value for key, value in RESULTS.items() if not key.endswith("_at_threshold")} | {"num_calibration": 0}
    body, _ = card(folder, results, calibrated=False)
    check_whole(body)
    assert "not calibrated" in body
    assert "The threshold" not in body
    assert "p_values" not in body


def test_rates_of_a_single_class(folder):
    body, _ = card(folder, {**NO_TEST, "num_normal": 5, "false_positive_rate_at_threshold": 0.2, "true_positive_rate_at_threshold": None})
    check_whole(body)
    assert "0.2000 of the normal images." in body
    assert "of the anomalous ones" not in body


def test_an_infinite_threshold_is_told(folder):
    model = detector()
    model.calibrate([torch.rand(3, 1, 8, 8)], false_positive_rate=0.01, progress=False)
    folder.mkdir()
    write_card(folder, model, RESULTS)
    body = (folder / "README.md").read_text()
    assert "infinite" in body
    assert "3." in body
    assert "threshold inf " not in body


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", ["dia-chest", 'it\'s a "name" {{ 7 * 7 }}'])
def test_the_python_block_runs(tmp_path, calibrated, name, monkeypatch):
    body, _ = card(tmp_path / name, calibrated=calibrated)
    monkeypatch.chdir(tmp_path)  # so that the name is the folder
    Image.new("RGB", (30, 20), (9, 99, 199)).save("image.png")
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    variables = {}
    exec(code, variables)
    assert variables["scores"].shape == (1,)
    assert not variables["scores"].requires_grad
    assert ("flagged" in variables) is calibrated


def test_the_dissolver_is_named_where_there_is_one(folder):
    GaussianDissolver(3).save_pretrained(folder / "dissolver")
    assert "UNet2DModel" not in card(folder)[0]  # which could not load a blur
    DiffusionDissolver(build_unet(8, 1, (8, 16)), build_scheduler()).save_pretrained(folder / "dissolver")
    assert 'UNet2DModel.from_pretrained("dia-chest", subfolder="dissolver/unet")' in card(folder)[0]


def test_figures_are_drawn_and_shown(folder, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    assert "figures/" not in card(folder)[0]
    image = Image.new("L", (8, 8), 99)
    scores, labels = np.linspace(0, 1, 20), np.arange(20) % 2
    write_figures(folder, scores, labels, threshold=float("inf"), examples=[(image, image, "$a$"), (image, None, "b")])
    assert {path.name for path in (folder / "figures").iterdir()} == {"scores.png", "roc.png", "examples.png"}
    for path in (folder / "figures").iterdir():
        assert np.ptp(np.asarray(Image.open(path).convert("L"))) > 100, path
        assert path.stat().st_size < 60_000
    write_card(folder, detector(), RESULTS)
    body = split_card((folder / "README.md").read_text())[1]
    check_whole(body)
    links = re.findall(r"^!\[[^\]\n]+\]\((.*?)\)$", body, re.MULTILINE)
    assert links == ["figures/scores.png", "figures/roc.png", "figures/examples.png"]
    shown = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **settings: (shown.append(self), Path(path).touch()))
    write_figures(folder, scores, labels, examples=[(image, image.point(lambda level: 7), "$a$"), (image, None, "b")])
    levels = [[int(picture.get_array().max()) for picture in axes.images] for axes in shown[-1].axes]
    assert levels == [[99], [99], [7], []], "the images above their maps"
    assert [axes.get_title() for axes in shown[-1].axes[:2]] == [r"\$a\$", "b"], "no formula"
    monkeypatch.undo()
    write_figures(folder, scores, labels)  # replaces all of them
    assert "examples.png" not in card(folder)[0]


def test_what_the_curves_show():
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    normal, anomalous, threshold = (
        np.array([0.0, 0.1, 0.2, 0.3, 0.7]),
        np.array([0.4, 0.5, 0.6, 0.8]),
        0.5,
    )  # of which 0.6 to 0.8 are flagged
    scores, labels = np.r_[normal, anomalous], np.repeat([0, 1], (5, 4))

    def lines(draw, threshold):
        figure = new_figure("this test needs")
        draw(figure, scores, labels, threshold)
        assert figure.axes[0].get_legend()
        return figure.axes[0].lines

    auroc = np.mean(anomalous[:, None] > normal)
    curve, chance, point = lines(draw_roc, threshold)
    assert curve.get_label() == f"AUROC {auroc:.3f}"
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(auroc)
    assert chance.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert point.get_xydata().tolist() == [[1 / 5, 2 / 4]]
    # At each anomaly, the highest first, the recall grows by a quarter.
    average = np.mean([(anomalous >= score).sum() / (scores >= score).sum() for score in anomalous])
    curve, share, point = lines(draw_precision_recall, threshold)
    assert curve.get_label() == f"average precision {average:.3f}"
    assert -np.sum(np.diff(curve.get_xdata()) * curve.get_ydata()[:-1]) == pytest.approx(average)
    assert curve.get_drawstyle() == "steps-post", "so that it is the area below the curve"
    assert (set(share.get_ydata()), share.get_label()) == ({4 / 9}, "share of anomalies 0.444")
    assert point.get_xydata().tolist() == [[2 / 4, 2 / 3]]
    for draw in (draw_roc, draw_precision_recall):  # nothing is flagged, and no place is that of the threshold
        assert [len(lines(draw, none)) for none in (None, np.inf)] == [2, 2]


def test_what_the_histogram_shows():
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    scores, labels = np.r_[np.linspace(0, 1, 30), np.linspace(0.5, 2, 10)], np.repeat([0, 1], (30, 10))

    def drawn(scores, labels, threshold):
        figure = new_figure("this test needs")
        draw_scores(figure, scores, labels, threshold)
        (axes,) = figure.axes
        return axes, {text.get_text() for text in axes.get_legend().get_texts()}

    axes, names = drawn(scores, labels, 1.5)
    assert names == {"normal (30)", "anomalous (10)", "threshold"}
    assert axes.get_xlabel() == "score"
    assert axes.lines[0].get_xdata() == [1.5, 1.5]
    for container, of in zip(axes.containers, (scores[:30], scores[30:]), strict=True):
        assert len(container) == 40
        low, high = (np.array([bar.get_x() + side * bar.get_width() for bar in container]) for side in (0, 1))
        counted = [((of >= a) & (of < b)).sum() for a, b in zip(low, high, strict=True)]
        counted[-1] += (of == high[-1]).sum()
        assert [bar.get_height() for bar in container] == counted
    axes, names = drawn(scores, None, None)
    assert names == {"all (40)"}
    assert not axes.lines
    for few, limit in ((np.r_[np.zeros(20), 1, 5], 5), (np.r_[np.linspace(0, 1, 20), -1e6], 1)):  # more than half tie; a straggler below
        axes, _ = drawn(few, None, 0.5)
        assert axes.get_xlim()[0] > -20
        assert axes.get_xlim()[1] >= limit
        assert axes.get_xlabel() == "score" + (" (stragglers in the outermost bars)" if limit == 1 else "")


def test_scores_that_nearly_tie_are_drawn(folder):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    scores, labels = np.float32([1, 1, 1, 1, 1, 1.0000001]), np.array([0, 0, 0, 1, 1, 1])
    write_figures(folder, scores, labels, threshold=1.0)
    assert (folder / "figures" / "scores.png").exists()


def test_stragglers_are_drawn_on_their_side_of_the_threshold():
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    scores, labels = np.array([*range(20), 40.0, 1e6]), np.array([0] * 21 + [1])
    for sign in (1, -1):
        figure = new_figure("this test needs")
        draw_scores(figure, sign * scores, labels, sign * 50.0)
        (outermost,) = [bar for bar in figure.axes[0].containers[1] if bar.get_height()]
        assert sign * (outermost.get_x() + (0 if sign > 0 else outermost.get_width())) > 50
        assert np.abs(figure.axes[0].get_xlim()).max() < 100


def test_without_matplotlib_there_are_no_figures(folder, monkeypatch, caplog):
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "roc.png").write_bytes(b"old")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_figures(folder, np.arange(4.0), np.array([0, 0, 1, 1]))
    assert "hf-anomaly[plots]" in caplog.text
    assert "figures/" not in card(folder)[0]


HOSTILE = [
    "<script>alert(1)</script>",
    "`code` ```\nfence",
    "a\n---\nlicense: evil\n---\nb",
    "---",
    "{{ 7 * 7 }}{% for x in y %}",
    "[click](http://example.com) ![i](x)",
    "x: y # comment",
    "a | b",
    "&lt;b&gt;",
    "line\u2028separator\x85next",
    "- item",
    "\"quoted\" 'too'",
    "",
]


def structure(body):
    """Headings, fences, rules, tables and lists: where a line outside of code begins with what Markdown acts on."""
    body = re.sub(r"^```(.*?)^```$", "```", body, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in body.splitlines() if re.match(r"#+ |```|---|\||- |<", line)]
    return [line.split()[0] for line in lines]


@pytest.mark.parametrize("source", ["dataset", "normal_label", "reason", "command", "settings"])
def test_text_of_users_is_only_text(tmp_path, source):
    results = {**(NO_TEST if source == "reason" else RESULTS), "command": "c"}

    def card_with(text, folder):
        return card(folder, results, dissolver_settings={text: text}) if source == "settings" else card(folder, results | {source: text})

    plain_body, plain_data = card_with("z", tmp_path / "harmless")
    for number, text in enumerate(HOSTILE):
        body, data = card_with(text, tmp_path / f"hostile-{number}")
        if source != "command" or text:  # without a command its section is left out
            assert structure(body) == structure(plain_body), text
        assert data.keys() == plain_data.keys()
        assert data.get("model-index", [{}])[0].keys() == plain_data.get("model-index", [{}])[0].keys()
        prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
        for markup in ("<script", r"\]\(http", r"(?<![\d.])49(?!\d)"):  # 7 * 7
            assert not re.search(markup, prose), text


def test_the_command_is_shown_without_tokens_and_local_paths(folder):
    words = [
        "scripts/train_dia.py",
        "--hub_token",
        "hf_secret",
        "--hub_token=hf_secret",
        "--dataset_name",
        "/home/me/lungs",
        "--output_dir=/tmp/x y",
    ]
    shown = shown_command(words)
    assert "hf_secret" not in shown
    assert "/home" not in shown
    assert "--dataset_name lungs" in shown


def test_of_local_paths_the_command_shows_the_last_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    words = ["accelerate", "launch", "scripts/train_dia.py", "--dataset_name", "../ward3/patients_doe/scans", "--output_dir=runs/doe/x"]
    words += ["--dissolver", "org/here", "--backbone", "org/on-the-hub", "--data_dir", "~/doe/data", "--temperature", ".5", "--x", "."]
    assert shown_command(words) == (
        "accelerate launch scripts/train_dia.py --dataset_name scans --output_dir=x --dissolver here --backbone org/on-the-hub --data_dir data "
        f"--temperature .5 --x {tmp_path.name}"
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])), "tack2020csi"),
        (DIAConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])), "shi2024dissolving"),
        (SharedAEConfig(image_size=8, hidden_sizes=[4, 4, 4]), "jia2023anomaly"),
    ],
)
def test_the_method_is_cited(folder, config, words):
    folder.mkdir()
    write_card(folder, DETECTORS[type(config)](config), RESULTS)
    body = (folder / "README.md").read_text()
    assert re.findall(r"^@\w+\{(\w+),$", body, flags=re.MULTILINE) == [words]
    assert body.endswith("}\n```\n<!-- /hf-anomaly: citation -->\n")


def test_a_method_without_a_citation(folder, monkeypatch):
    monkeypatch.setattr(DIAModel, "citation", "")
    body, _ = card(folder)
    check_whole(body)
    assert "Citation" not in body


def test_a_pushed_card_loads_from_its_repository(folder):
    body, _ = card(folder, repo_id="org/lungs")
    assert 'AutoModel.from_pretrained("org/lungs")' in body
    assert address_card(body, "org/hearts") == body.replace('from_pretrained("org/lungs"', 'from_pretrained("org/hearts"')


def test_the_card_cites_its_method(folder):
    assert "shi2024dissolving" in card(folder)[0]
    csi = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    write_card(folder, csi, RESULTS)
    assert "tack2020csi" in (folder / "README.md").read_text()
    assert "shi2024dissolving" not in (folder / "README.md").read_text()


WRITTEN = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.parent.name)
def test_the_written_cards_are_whole(path):
    text = path.read_text()
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    data = yaml.safe_load(front)
    assert (data["library_name"], data["license"], data["tags"][0]) == ("hf-anomaly", "apache-2.0", "anomaly-detection")
    assert data["model-index"][0]["results"][0]["metrics"]
    check_whole(body.partition("## Citation")[0])  # BibTeX has {{
    assert re.findall(r"^<!-- hf-anomaly: (\w+) -->$", body, re.MULTILINE) == [
        "about",
        "usage",
        "data",
        "results",
        "settings",
        "limits",
        "citation",
    ]
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", body):
        assert (path.parent / link).exists(), link
    assert path.parent.name in (path.parents[1] / "README.md").read_text()
