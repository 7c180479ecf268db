"""The page on a detector: what a browser would find in it, and that its numbers are those of the scores."""

import base64
import copy
import io
import re
import sys
from html.parser import HTMLParser

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModel

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, SharedAEConfig, SharedAEModel, SmallResNetConfig, cli
from hf_anomaly.calibration import drift_check
from hf_anomaly.data import collate, prepare
from hf_anomaly.image_processing import to_eight_bit_image
from hf_anomaly.metrics import bootstrap_intervals, image_metrics
from hf_anomaly.report import write_report
from hf_anomaly.report.writing import _picture
from hf_anomaly.training.localization import evaluate_maps
from hf_anomaly.visualization import paint

VOID = {"meta", "img", "br"}


def decoded(img):
    return PIL.Image.open(io.BytesIO(base64.b64decode(img["src"].removeprefix("data:image/png;base64,"))))


class Page(HTMLParser):
    """Elements with their attributes, the tables' cells, and the text; refuses tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.tables, self.open, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self):
        """Needs no other file, and can be read by who does not see."""
        for tag, attributes in self.elements:
            assert tag not in ("script", "link", "iframe", "object")
            assert not {"href", "srcset", "onclick", "onerror"} & attributes.keys()
            if tag == "img":
                assert attributes["alt"].strip()
                decoded(attributes).load()
            if tag == "th":
                assert attributes["scope"] in ("row", "col")
        assert "url(" not in "".join(self.rawdata)
        assert len(self.all("h1")) == 1
        assert self.all("html") == [{"lang": "en"}]
        return self


def image(seed, size=(20, 12), bright=0):
    return PIL.Image.fromarray((np.random.default_rng(seed).integers(0, 100, size[::-1]) + bright).astype(np.uint8))


def images(labels, first_seed=0):
    """Brighter ones are anomalous."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64"), "row": datasets.Value("int64")})
    rows = []
    for i, label in enumerate(labels):
        file = io.BytesIO()
        image(first_seed + i, bright=100 * label).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": label, "row": 100 + i})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def processor():
    return AnomalyImageProcessor.for_images(16, 1)


@pytest.fixture(scope="module")
def detector(processor):
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=16, hidden_sizes=[8, 8, 8], latent_size=8, normal_label="good")).eval()
    # Others than the tests': whose score is the threshold could be on either side of it in another batch.
    normal = torch.stack([row["pixel_values"] for row in (collate([r]) for r in prepare(images([0] * 39, 3000), processor))])[:, 0]
    return model.fit_reference([normal], progress=False).calibrate([normal], false_positive_rate=0.1, progress=False)


@pytest.fixture(scope="module")
def without_maps():
    """Fitted, not calibrated, and of a method without maps."""
    torch.manual_seed(0)
    model = CSIModel(CSIConfig(image_size=16, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).eval()
    return model.fit_reference([torch.rand(4, 1, 16, 16) * 2 - 1], progress=False)


def test_kinds_of_anomalies(detector, processor, tmp_path):
    labels = np.arange(30) % 3  # normal, and two kinds
    kinds = [("good", "<dent>", "scratch")[label] for label in labels]
    dataset = images((labels > 0).astype(int)).add_column("class_name", kinds)
    page = Page(write_report(detector, processor, dataset, tmp_path / "page.html")).check()
    scores = detector.score([collate([row]) for row in prepare(dataset, processor)], progress=False)[0].numpy()
    threshold = detector.calibration.threshold.item()
    for row, label, name in zip(page.tables[1][1:], (1, 2), ("<dent>", "scratch"), strict=True):
        wins = np.mean([a > b for a in scores[labels == label] for b in scores[labels == 0]])
        assert row == [name, "10", f"{wins:.3f}", f"{(scores[labels == label] > threshold).mean():.3f}"]
    one_kind = Page(write_report(detector, processor, dataset.select(np.flatnonzero(labels < 2)), tmp_path / "page.html"))
    assert "Which anomalies it finds" not in one_kind.text


def test_weights_put_aside(detector, processor, tmp_path):
    detector.save_pretrained(tmp_path / "detector")
    places = {name: "disk" for name, _ in detector.named_children()} | {"calibration": "cpu"}
    apart = AutoModel.from_pretrained(tmp_path / "detector", device_map=places, offload_folder=tmp_path / "weights")
    dataset = images([0, 1] * 10)
    pages = [write_report(model, processor, dataset, tmp_path / "page.html", title="one").read_text() for model in (detector, apart)]
    assert pages[0] == pages[1]


def test_the_numbers_are_those_of_the_scores(detector, processor, tmp_path):
    labels = (np.arange(50) % 5 > 2).astype(int)
    dataset = images(labels)
    path = write_report(detector, processor, dataset, tmp_path / "sub" / "page.html", data_name="mine", split_hash="abc123", num_examples=3)
    page = Page(path).check()
    scores = detector.score([collate([row]) for row in prepare(dataset, processor)], progress=False)[0].numpy()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    metrics, thresholds = page.tables
    measured, intervals = image_metrics(scores, labels), bootstrap_intervals(scores, labels)
    intervals = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in intervals.items()}
    assert metrics[1:5] == [
        ["AUROC", f"{np.mean(pairs):.3f}", intervals["auroc"], "0.500"],
        ["Average precision", f"{measured['average_precision']:.3f}", intervals["average_precision"], "0.400"],
        ["False-positive rate at 95 % true positives", f"{measured['fpr_at_95_tpr']:.3f}", "", "0.950"],
        ["Best F1, at a threshold chosen on these images", f"{measured['f1_max']:.3f}", "", f"{0.8 / 1.4:.3f}"],
    ]
    flagged = scores > detector.calibration.threshold.item()
    accuracy = (flagged[labels == 1].mean() + (~flagged[labels == 0]).mean()) / 2
    assert metrics[5] == ["Balanced accuracy at its own threshold", f"{accuracy:.3f}", "", "0.500"]
    assert "Pixel AUROC" not in page.text
    calibration = detector.calibration.scores.numpy()
    for cells, rate in zip(thresholds[1:], (0.01, 0.05, 0.1, 0.2), strict=True):
        if rate == 0.01:  # takes 99 images
            assert cells[1:] == ["∞", "0", "0.000", "0.000", "–"]
            continue
        threshold = calibration[int(np.ceil(np.round((1 - rate) * 40, 9))) - 1]
        flagged = scores > threshold
        shares = [flagged[labels == 0].mean(), flagged[labels == 1].mean(), (labels[flagged] == 1).mean()]
        assert cells[1:] == [f"{threshold:.6g}", str(flagged.sum()), *(f"{share:.3f}" for share in shares)]
    assert [cells[0] for cells in thresholds[1:]] == ["1 %", "5 %", "10 % (its own)", "20 %"]
    assert [row.get("class") for row in page.all("tr")[-4:]] == [None, None, "own", None]
    assert "a rate of α takes at least" in page.text
    drift = drift_check(torch.from_numpy(scores[labels == 0]), detector.calibration.scores)
    assert f"as far as 30 of them can tell (two-sample Kolmogorov–Smirnov test, p = {drift.p_value:.2g})" in page.text
    for fact in ("abc123", "mine", "30 normal, 20 anomalous", "39 held-out normal images", "normal: good", "SharedAEModel, 16×16 px, gray"):
        assert fact in page.text
    # The examples: rows as the data counts them, in the order that the headings promise, each with its map.
    shown = [int(row) for row in re.findall(r"row (\d+)score", page.text)]
    order = scores.argsort()
    normal, anomalous = ([int(i) + 100 for i in order if labels[i] == label] for label in (0, 1))
    assert shown == [*normal[::-1][:3], *anomalous[:3], *anomalous[::-1][:3], *normal[:3]]
    said = re.findall(r"row (\d+)score ([^p]+)p = ([\d.]+)(flagged)?", page.text)
    p_values, flagged = detector.p_values(torch.from_numpy(scores)), detector.is_anomalous(torch.from_numpy(scores))
    numbers = [(f"{scores[row - 100]:.4g}", f"{p_values[row - 100]:.3g}", "flagged" * flagged[row - 100].item()) for row in shown]
    assert [numbers for _, *numbers in said] == [list(of) for of in numbers]
    assert {flag for *_, flag in numbers} == {"", "flagged"}
    figures, pictures = page.all("img")[:3], page.all("img")[3:]
    assert len({img["src"] for img in figures}) == 3
    assert len(pictures) == 2 * len(shown)
    for picture, overlay, row, (score, *_) in zip(pictures[::2], pictures[1::2], shown, numbers, strict=True):
        label = labels[row - 100]
        assert picture["alt"] == f"{('Normal', 'Anomalous')[label]} image, row {row}, score {score}"
        assert overlay["alt"] == f"Anomaly map over row {row}"
        expected = paint(detector, processor, image(row - 100, bright=100 * label))
        assert np.abs(np.asarray(decoded(overlay)).astype(int) - np.asarray(expected)).max() <= 1


def test_maps_against_masks(detector, without_maps, processor, tmp_path):
    masks = []
    for i in range(6):
        file = io.BytesIO()
        array = np.zeros((12, 20), np.uint8)
        array[:6, : 2 + i] = 255
        PIL.Image.fromarray(array).save(file, "PNG")
        masks.append({"bytes": file.getvalue(), "path": None} if i % 2 else None)
    dataset = images(np.arange(6) % 2).add_column("mask", masks).cast_column("mask", datasets.Image(decode=False))
    expected = evaluate_maps(detector, processor, dataset, 4)
    page = Page(write_report(detector, processor, dataset, tmp_path / "page.html")).check()
    assert page.tables[1][1:] == [
        [title, f"{expected[name]:.3f}", f"{expected[f'{name}_error']:.5f}"]
        for title, name in (
            ("Pixel AUROC", "pixel_auroc"),
            ("Pixel average precision", "pixel_average_precision"),
            ("AUPRO, up to a false-positive rate of 0.3", "aupro"),
        )
    ]
    for model, has_labels in ((without_maps, True), (detector, False)):
        other = Page(write_report(model, processor, dataset, tmp_path / "page.html", has_labels=has_labels))
        assert "Pixel AUROC" not in other.text


def test_without_labels(detector, processor, tmp_path):
    page = Page(write_report(detector, processor, images([0, 1] * 5), tmp_path / "page.html", has_labels=False)).check()
    assert "the images have no labels" in page.text
    assert "10, unlabelled" in page.text
    assert not any(word in page.text for word in ("AUROC", "True-positive", "Precision", "Anomalous images"))
    assert "Highest scores" in page.text
    (thresholds,) = page.tables
    assert thresholds[0] == ["Target false-positive rate", "Threshold", "Images flagged"]


def test_labels_of_any_type(without_maps, processor, tmp_path):
    whole, *others = (images([0, 1]).cast_column("label", datasets.Value(kind)) for kind in ("int64", "bool", "float64"))
    page = write_report(without_maps, processor, whole, tmp_path / "page.html").read_text()
    for dataset in others:
        assert write_report(without_maps, processor, dataset, tmp_path / "page.html").read_text() == page


@pytest.mark.parametrize(("labels", "words"), [([0, 1, 2], ["row 2", "2"]), ([-1, -1, 0], ["row 0", "-1"]), (["a", "b"], ["'a', 'b'"])])
def test_labels_that_are_none(without_maps, processor, tmp_path, labels, words, refused):
    unlabelled, path = images([0] * len(labels)).remove_columns("label"), tmp_path / "page.html"
    dataset = unlabelled.add_column("label", labels)
    with refused("labels", *words):
        write_report(without_maps, processor, dataset, path)
    with refused("mine", "'label'", "has_labels=False"):
        write_report(without_maps, processor, unlabelled, path, data_name="mine")
    assert f"{len(labels)}, unlabelled" in Page(write_report(without_maps, processor, dataset, path, has_labels=False)).text


def test_normal_images_alone(detector, processor, tmp_path):
    page = Page(write_report(detector, processor, images([0] * 39), tmp_path / "page.html")).check()
    assert "39 normal and 0 anomalous" in page.text
    assert "AUROC" not in page.text
    assert page.tables[0][3][4:] == ["–", "–"]
    assert "score like those that calibrated" in page.text  # they are the same


def test_drift_is_told(detector, processor, tmp_path):
    bright = images([1] * 40).remove_columns("label").add_column("label", [0] * 40)
    for shift, direction, advice in ((-1e6, "higher", "calibrate with images like these"), (1e6, "lower", "trained on these")):
        shifted = copy.deepcopy(detector)
        shifted.calibration.fit(detector.calibration.scores + shift, 0.05)
        page = Page(write_report(shifted, processor, bright, tmp_path / "page.html"))
        assert f"score {direction} than those that calibrated" in page.text
        assert "do not hold here" in page.text
        assert advice in page.text


def test_uncalibrated_and_without_maps(without_maps, processor, tmp_path):
    page = Page(write_report(without_maps, processor, images([0, 1] * 4), tmp_path / "page.html", num_examples=2)).check()
    assert "None: the detector is not calibrated" in page.text
    assert not any("Anomaly map" in img["alt"] for img in page.all("img"))
    assert "p = " not in page.text
    assert len(page.tables) == 1


def test_names_are_text(without_maps, processor, tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    without_maps.config.normal_label = evil
    page = Page(
        write_report(without_maps, processor, images([0, 1]), tmp_path / "p.html", title=evil, data_name=evil, split_hash=evil)
    ).check()
    assert page.text.count(evil) == 5  # in the title and the head


def test_images_are_named_by_their_files(detector, processor, tmp_path):
    dataset = images([0, 1])
    paths = []
    for folder in ("good", "crack"):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "003.png"))
        image(0).save(paths[-1])
    dataset = dataset.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image(decode=False))
    page = Page(write_report(detector, processor, dataset, tmp_path / "page.html")).check()
    assert all(f"{name}score" in page.text for name in ("good/003.png", "crack/003.png"))
    assert "Anomaly map over crack/003.png" in {img["alt"] for img in page.all("img")}
    assert str(tmp_path) not in page.text + str(page.elements)


def test_large_pictures_shrink(without_maps, tmp_path):
    file, processor = io.BytesIO(), AnomalyImageProcessor.for_images(16, 1, window=(0, 25500))
    PIL.Image.fromarray(np.asarray(image(0, size=(2000, 1000))).astype(np.uint16) * 100).save(file, "PNG")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_list([{"image": {"bytes": file.getvalue(), "path": None}}], features=features)
    path = write_report(without_maps, processor, dataset, tmp_path / "page.html", has_labels=False)
    assert path.stat().st_size < 200_000
    page = Page(path).check()
    assert "row 0" in page.text
    assert decoded(page.all("img")[-1]).size == (256, 128)


def test_what_cannot_be(detector, processor, tmp_path, refused, monkeypatch):
    path = tmp_path / "page.html"
    with refused("mine holds no images"):
        write_report(detector, processor, images([0]).select([]), path, data_name="mine")
    with refused("num_examples", "0"):
        write_report(detector, processor, images([0]), path, num_examples=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused("pip install 'hf-anomaly[plots]'"):
        write_report(detector, processor, images([0]), path)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(detector, processor, tmp_path, monkeypatch, capsys):
    detector.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for i in range(4):
        for name in ("good", "bad"):
            path = tmp_path / "data" / "test" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(i, bright=100 * (name == "bad")).save(path)
    monkeypatch.chdir(tmp_path)
    cli.main(["report", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data"), "--num_examples", "2"])
    page = Page(tmp_path / "report.html").check()
    assert "model: report" in page.text
    assert "Datadata" in page.text
    assert str(tmp_path) not in page.text
    assert len(page.all("img")) == 3 + 2 * 4 * 2
    assert "saved: report.html" in capsys.readouterr().out
    assert "4 normal, 4 anomalous" in page.text
    assert re.search(r"Split hash[0-9a-f]{64}", re.sub(r"\s", "", page.text).replace("Splithash", "Split hash"))
    cli.main(["report", "model", "--dataset_name", "data/test/bad", "--unlabelled", "true", "--output", "other.html"])
    assert "4, unlabelled" in Page(tmp_path / "other.html").text
    for split, count in (("train", 3), ("valid", 2)):
        for i in range(count):
            path = tmp_path / "data" / split / "good" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(i).save(path)
    for options, count in (([], 8), (["--eval_split", "validation"], 2)):  # not those that it was trained on
        cli.main(["report", "model", "--dataset_name", "data", "--unlabelled", "true", "--output", "other.html", *options])
        assert f"{count}, unlabelled" in Page(tmp_path / "other.html").text
    PIL.Image.new("I;16", (9, 9)).save("deep.png")
    (tmp_path / "list.csv").write_text("path\ndeep.png\n")
    options = ["--image_column", "path", "--window", "0", "4095"]
    cli.main(["report", "model", "--dataset_name", "list.csv", "--unlabelled", "true", "--output", "other.html", *options])
    assert "1, unlabelled" in Page(tmp_path / "other.html").text
    for argv, words in (
        (["--dataset_name", "nowhere"], "nowhere"),
        (["--dataset_name", "data", "--streaming", "true"], "--streaming"),
        (["--dataset_name", "data", "--unlabelled", "true", "--label_column", "label"], "--label_column"),
        (["--dataset_name", "data", "--unlabelled", "true", "--protocol", "balanced"], "--protocol"),
        (["--dataset_name", "data", "--unlabelled", "true", "--normal_label", "good"], "--normal_label"),
        (["--dataset_name", "data", "--max_train_images", "3"], "--max_train_images"),
        (["--dataset_name", "data", "--batch_size", "0"], "--batch_size must be at least 1"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["report", "model", *argv])
        assert exit.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pictures_of_every_mode_of_eight_bits(mode):
    picture = _picture(to_eight_bit_image(PIL.Image.new(mode, (4, 4))))
    assert PIL.Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).mode in ("L", "RGB")
