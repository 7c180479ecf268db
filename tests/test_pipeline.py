"""The pipeline gives what the detector gives, for every kind of input."""

import copy
import json
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from datasets import Dataset, Features, Image
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_anomaly import (
    AnomalyDetectionPipeline,
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    HubError,
    InputError,
    NotFittedError,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
)

TASK = "image-anomaly-detection"
SIZES = [(16, 16), (20, 30), (9, 12), (40, 16), (16, 24)]


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=16, hidden_sizes=[8, 8, 8], latent_size=8)).eval()
    normal = torch.rand(39, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return model.fit_reference([normal], progress=False).calibrate([normal], progress=False)


@pytest.fixture(scope="module")
def processor():
    return AnomalyImageProcessor.for_images(16, 1)


@pytest.fixture(scope="module")
def folder(model, processor, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(TASK, model=str(folder))


@pytest.fixture(scope="module")
def expected(model, processor, images):
    """What the detector says of each image alone."""
    results = []
    with torch.no_grad():
        for image in images:
            output = model(**processor(images=image, return_tensors="pt"), output_anomaly_maps=True)
            (result,) = processor.post_process_anomaly_detection(output, [image.size[::-1]])
            result["p_value"], flagged = model.p_values(output.scores).item(), model.is_anomalous(output.scores).item()
            results.append(result | {"label": "anomaly" if flagged else "normal"})
    return results


def same(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert list(result) == ["score", "p_value", "label", "threshold"]
        assert result["score"] == pytest.approx(wanted["score"], rel=1e-5)
        assert (result["p_value"], result["label"]) == (wanted["p_value"], wanted["label"])


def test_a_saved_detector_needs_no_flag_and_no_prompt(pipe, model, monkeypatch):
    assert type(pipe) is AnomalyDetectionPipeline
    assert not hasattr(pipe.model.config, "custom_pipelines")
    assert not pipe.model.training
    assert pipe(np.zeros((5, 5)))["threshold"] == model.calibration.threshold.item()


def test_loading_asks_nothing(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    pipeline(TASK, model=str(folder))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_kinds_of_input(pipe, folder, images, expected, batch_size):
    paths = [str(folder / f"{i}.png") for i in range(len(images))]
    column = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    undecoded = column.cast_column("image", Image(decode=False))  # as `load_one_class` gives them
    embedded = [{"bytes": path.read_bytes(), "path": None} for path in map(Path, paths)]
    arrays = [np.asarray(image) for image in images]
    for inputs in (
        images,
        paths,
        [folder / "0.png", images[1], arrays[2], torch.tensor(arrays[3])[None], arrays[4] / 255.0],
        tuple(images),
        column["image"],
        undecoded["image"],
        embedded,
    ):
        results = pipe(inputs, batch_size=batch_size)
        assert type(results) is list
        same(results, expected)
    streams = (
        *(KeyDataset(rows, "image") for rows in (column, undecoded)),
        (image for image in images),
        column.to_iterable_dataset()["image"],
    )
    for stream in streams:
        results = pipe(stream, batch_size=batch_size)
        assert not isinstance(results, list)
        same(list(results), expected)
    for single in (images[1], paths[1], arrays[1], torch.tensor(arrays[1]), undecoded[1]["image"], embedded[1]):
        same([pipe(single, batch_size=batch_size)], expected[1:2])
    assert pipe([]) == []
    stack = np.stack([np.asarray(images[0]), 255 - np.asarray(images[0])])[:, None]
    assert len(pipe(stack)) == 2


def test_a_column_is_read_as_it_is_stored(pipe, images, expected, tmp_path, refused):
    """datasets scrambles a TIFF that EXIF turns, and takes the upper bits of 16-bit colour without a word."""
    import fsspec

    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    images[1].transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.tif", exif=exif)
    with fsspec.open("memory://images/2.png", "wb") as file:
        images[2].save(file, "png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "turned.tif"), "memory://images/2.png", images[3]]}, Features({"image": Image()}))
    same(pipe(rows["image"], batch_size=2), expected[1:4])
    same(pipe(rows.select([2, 0])["image"]), [expected[3], expected[1]])
    turned = rows.select([2]).with_transform(lambda batch: {"image": [images[0] for _ in batch["image"]]})
    same(pipe(turned["image"]), expected[:1])
    (tmp_path / "wide.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    nothing = Dataset.from_dict({"image": [{"bytes": None, "path": None}]}).cast_column("image", Image())
    with refused("row 0", "the image is missing"):
        pipe(nothing["image"])
    with refused("wide.ppm", "16-bit"):
        pipe(Dataset.from_dict({"image": [str(tmp_path / "wide.ppm")]}, Features({"image": Image()}))["image"])


def test_workers_prepare_and_report(pipe, images, expected, tmp_path, refused):
    same(pipe(images, batch_size=2, num_workers=2), expected)
    with refused(str(tmp_path / "no.png")):
        pipe([*images, tmp_path / "no.png"], batch_size=2, num_workers=2)


def test_workers_are_sent_no_detector(pipe, images, monkeypatch):
    settings = []
    monkeypatch.setattr("hf_anomaly.pipeline.DataLoader", lambda *args, **given: settings.append(given) or DataLoader(*args, **given))
    pipe(images)
    assert type(pipe.model).__name__.encode() not in pickle.dumps(settings[0]["collate_fn"])


def test_a_stream_is_read_as_it_is_scored(pipe, images):
    read = []
    results = pipe((read.append(i) or images[0] for i in range(10)), batch_size=2)
    next(results)
    assert len(read) <= 4


def test_what_a_stream_overwrites_is_scored_as_it_was(pipe, tmp_path):
    """Pages of a file, which are one object, and frames that are read into one buffer: a batch is read before it is prepared."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    pages = [PIL.Image.fromarray(frame) for frame in frames]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    buffer = np.empty((16, 16), np.uint8)

    def video(buffer, view):
        for frame in frames:
            buffer[:] = frame
            yield view

    streams = [
        PIL.ImageSequence.Iterator(PIL.Image.open(tmp_path / "pages.tif")),
        video(buffer, buffer),
        video(buffer, torch.from_numpy(buffer)),
    ]
    expected = [result["score"] for result in pipe(pages)]
    (tmp_path / "broken.tif").write_bytes((tmp_path / "pages.tif").read_bytes()[:-1000])  # in the second page
    for first in (PIL.Image.open(tmp_path / "broken.tif"), pages[0]):
        assert [result["score"] for result in pipe(iter([first]))] == pytest.approx(expected[:1], rel=1e-5)
    for stream in streams:
        assert [result["score"] for result in pipe(stream, batch_size=3)] == pytest.approx(expected, rel=1e-5)


def test_maps(pipe, images, expected):
    for result, wanted, image in zip(pipe(images, batch_size=4, output_anomaly_maps=True), expected, images, strict=True):
        assert result["anomaly_map"].shape == image.size[::-1]
        torch.testing.assert_close(result["anomaly_map"], wanted["anomaly_map"], rtol=1e-4, atol=1e-5)


def test_thresholds(pipe, model, folder, images, refused, caplog):
    scores = torch.tensor([result["score"] for result in pipe(images)])
    middle = scores.median().item()
    labels = [result["label"] for result in pipe(images, threshold=middle)]
    assert labels == ["anomaly" if score > middle else "normal" for score in scores]  # strictly above
    assert set(labels) == {"anomaly", "normal"}
    for rate in (0.05, 0.5, 0.9):
        results = pipe(images, false_positive_rate=rate)
        assert {result["threshold"] for result in results} == {model.calibration.threshold_at(rate)}
        assert [result["label"] == "anomaly" for result in results] == model.is_anomalous(scores, rate).tolist()
    # Defaults of the pipeline, and a call that decides otherwise.
    for half in (np.float32(0.5), torch.tensor(0.5)):
        assert pipe(images[0], false_positive_rate=half, batch_size=np.int64(2)) == pipe(images[0], false_positive_rate=0.5)
    lenient = pipeline(TASK, model=str(folder), false_positive_rate=0.5)
    assert lenient(images[0])["threshold"] == model.calibration.threshold_at(0.5)
    assert lenient(images[0], threshold=0.25)["threshold"] == 0.25
    assert pipe(images, false_positive_rate=0.001)[0]["threshold"] == float("inf")
    assert caplog.text.count("at least 999 calibration images") == 1
    with refused("threshold", "false_positive_rate"):
        pipe(images, threshold=1, false_positive_rate=0.1)
    for rate in (0, 1.5):
        with refused("false_positive_rate", str(rate)):
            pipe(images, false_positive_rate=rate)
    with refused("NaN"):
        pipe(images, threshold=float("nan"))
    with refused("threshold", "'a'"):
        pipe(images, threshold="a")
    with refused("false_positive_rate", "'0.1'"):
        pipe(images, false_positive_rate="0.1")


def test_after_a_training_it_scores_as_before(model, images, expected):
    model = copy.deepcopy(model)
    pipe = AnomalyDetectionPipeline(model)
    model.train()
    same(pipe(images), expected)


def test_a_compiled_detector(model, images, expected):
    torch.compiler.reset()
    same(AnomalyDetectionPipeline(torch.compile(model, backend="eager"))(images), expected)


def test_not_calibrated_and_not_fitted(model, images, caplog):
    model = copy.deepcopy(model)
    scores = [result["score"] for result in AnomalyDetectionPipeline(model)(images)]
    model._drop_calibration()
    pipe = AnomalyDetectionPipeline(model)
    for _ in range(2):
        for result, score in zip(pipe(images, false_positive_rate=0.1), scores, strict=True):
            assert result == {"score": pytest.approx(score), "p_value": None, "label": None, "threshold": None}
    assert caplog.text.count("not calibrated") == 1
    assert "calibrate(dataloader)" in caplog.text
    decided = pipe(images[0], threshold=-1)
    assert (decided["label"], decided["threshold"], decided["p_value"]) == ("anomaly", -1, None)
    model.reset_reference()
    with pytest.raises(NotFittedError, match="fit_reference"):
        pipe(images[0])


@pytest.mark.parametrize(
    ("name", "hint"), [("treshold", "did you mean threshold?"), ("batchsize", "did you mean batch_size?"), ("fpr", "false_positive_rate")]
)
def test_unknown_keywords(pipe, folder, images, name, hint, refused):
    with refused(name, hint):
        pipe(images[0], **{name: 3})
    with refused(name, hint):
        pipeline(TASK, model=str(folder), **{name: 3})


def test_errors_name_the_culprit(pipe, images, folder, tmp_path, refused):
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "1.png").read_bytes()[:200])
    sixteen = tmp_path / "sixteen.png"
    PIL.Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(sixteen)
    for path, words in ((broken, ["unreadable"]), (sixteen, ["16-bit"]), (tmp_path / "none.png", ["No such file"])):
        with refused(str(path), *words):
            pipe([*images, str(path)], batch_size=2)
    column = Dataset.from_dict({"image": [str(folder / "0.png"), str(broken)]}, features=Features({"image": Image()}))
    for inputs, name in ((column["image"], broken), (KeyDataset(column, "image"), "row 1")):
        with refused(name):
            list(pipe(inputs))
    with refused("column", "dataset['image']"):
        pipe(column)
    with refused("images[1]", "NaN"):
        pipe([images[0], np.full((4, 4), np.nan)])
    with refused("the image", "(4, 8, 8)", "4 gray images as a list"):
        pipe(np.zeros((4, 8, 8)))
    with refused("images[0]", "dict"):
        pipe([{"image": images[0]}])
    with refused("the image", "dict"):
        pipe({"image": images[0]})
    for value, words in (({"bytes": None, "path": str(broken)}, [broken]), ({"bytes": b"", "path": None}, ["images[1]"])):
        with refused("unreadable", *words):
            pipe([images[0], value])
    with refused("int"):
        pipe(3)
    for size in (0, 2.5, "2"):
        with refused("batch_size", repr(size)):
            pipe(images, batch_size=size)


def test_a_stream_names_the_image_that_cannot_be_read(pipe, images, folder, refused):
    broken = folder / "0.png"
    encoded = Dataset.from_dict(
        {"image": [{"bytes": broken.read_bytes()[:n], "path": None} for n in (None, 60)]}, Features({"image": Image()})
    )
    with refused("image 1"):
        list(pipe(row["image"] for row in encoded.to_iterable_dataset()))

    def unreachable():
        yield images[0]
        raise HubError("org/name is gone")

    with pytest.raises(HubError, match=r"^org/name is gone$"):
        list(pipe(unreachable()))


def test_urls(pipe, folder, expected, refused):
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        same([pipe(f"{url}/0.png", timeout=10)], expected[:1])
        same([pipe(f"{url}/0.png".replace("http", "HTTP"))], expected[:1])
        same(pipe([f"{url}/1.png", f"{url}/2.png"], batch_size=2), expected[1:3])
        for name, word in (("none.png", "404"), ("config.json", "unknown image format")):
            with refused(f"{url}/{name}", word):
                pipe([f"{url}/0.png", f"{url}/{name}"])
        with refused(f"{url}/0.png", "No such file"):  # what a row of a dataset names is not fetched
            pipe({"bytes": None, "path": f"{url}/0.png"})
    finally:
        server.shutdown()
        server.server_close()


def test_other_models_and_processors(model, refused):
    backbone = ResNetModel(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1]))
    with refused("ResNetModel"):
        AnomalyDetectionPipeline(backbone)
    with refused("AnomalyImageProcessor", "object"):
        AnomalyDetectionPipeline(model, object())
    with refused("24×24", "16×16"):
        AnomalyDetectionPipeline(model, AnomalyImageProcessor.for_images(24, 1))
    torch.manual_seed(0)
    csi = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    csi.train().fit_reference([torch.rand(4, 1, 8, 8) * 2 - 1], progress=False)
    pipe = AnomalyDetectionPipeline(csi)  # it gets a processor, and out of training mode
    assert np.isfinite(pipe(np.zeros((30, 20)))["score"])
    with pytest.raises(InputError, match="maps"):
        pipe(np.zeros((30, 20)), output_anomaly_maps=True)


def test_saved_again_it_brings_no_code(pipe, images, expected, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert [path.name for path in tmp_path.glob("*.py")] == ["modeling_hf_anomaly.py"]
    same(pipeline(TASK, model=str(tmp_path))(images), expected)
