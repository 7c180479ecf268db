"""Datasets on the Hub, through the real client: scored while they are downloaded, in a pipeline, and to train on."""

import pytest

PREPARED = """
    import contextlib
    import csv
    import io
    import re

    import datasets
    import numpy as np
    import PIL.Image
    from hf_anomaly.cli import main

    datasets.disable_progress_bars()

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(list(map(str, argv)))
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()
        return 0, out.getvalue(), err.getvalue()

    def error(*argv):
        status, out, err = run(*argv)
        assert status == 2 and err.splitlines()[-1].startswith("error: "), (status, err)
        return err.splitlines()[-1]

    pictures = [PIL.Image.fromarray(image) for image in np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)]

    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def rows(table):
        return list(csv.DictReader(table.splitlines()))

    def files_of(name):
        return [path for path in Path(os.environ["HF_HOME"]).rglob("*") if name in str(path) and path.suffix in (".parquet", ".arrow", ".png")]
"""


@pytest.fixture(scope="module")
def stored(hub_session, tmp_path_factory):
    """Parquet in four parts, a folder of images, a table without images, and the folder of a detector; a line of Python that names the latter."""
    folder = tmp_path_factory.mktemp("datasets") / "detector"
    hub_session.run(
        PREPARED
        + f"""
    AutoModel.from_pretrained(finished()).save_pretrained({str(folder)!r})
    names = datasets.ClassLabel(names=["normal", "broken"])
    features = datasets.Features({{"note": datasets.Value("string"), "scan": datasets.Image(), "label": names}})
    content = {{"note": ["x"] * 20, "scan": pictures, "label": [0] * 10 + [1] * 10}}
    data = datasets.Dataset.from_dict(content, features=features)
    parts = datasets.DatasetDict({{"train": data.select(range(10)), "test": data}})
    parts.push_to_hub("org/scans", num_shards={{"train": 1, "test": 4}})
    data.select(range(3)).push_to_hub("org/scans", "small", split="test")
    data.push_to_hub("org/locked", private=True)
    edit("datasets/org/folder", {{f"test/{{i}}.png": b"no image" if i == 1 else png(pictures[i]) for i in range(4)}})
    edit("datasets/org/table", {{"train.csv": b"a,b\\n1,2\\n"}})
    """
    )
    return f"    DETECTOR = {str(folder)!r}\n"


def test_the_first_rows_are_scored_before_the_last_are_there(hub, stored):
    hub.run(
        stored
        + PREPARED
        + """
    fault("GET", "datasets/org/scans/resolve/.*/test-00003-of-00004", status=403, times=10**6)
    status, out, err = run("predict", DETECTOR, "org/scans", "--split", "test", "--batch_size", 5)
    assert status == 2 and "error: org/scans: it is gated" in err.splitlines()[-1], err
    assert [row["image"] for row in rows(out)] == [f"test/{i}" for i in range(15)], out

    call("/_mend", {})
    status, out, err = run("predict", DETECTOR, "org/scans", "--split=test", "--batch_size", 7)
    assert status == 0, err
    Path("files").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(f"files/{i:02d}.png")
    there, here = rows(out), rows(run("predict", DETECTOR, "files", "--batch_size", 7)[1])
    assert len(there) == len(here) == 20
    for one, other in zip(there, here, strict=True):
        assert {**one, "image": ""} == {**other, "image": ""}
    assert not files_of("scans"), files_of("scans")  # nothing was kept

    status, out, err = run("predict", DETECTOR, "org/scans", "--dataset_config_name", "small", "--image_column", "scan")
    assert status == 0, err
    for row, other in zip(rows(out), here[:3], strict=True):  # batches of other sizes round otherwise
        assert abs(float(row["score"]) - float(other["score"])) < 1e-6
    """
    )


def test_files_of_their_own_and_a_broken_one(hub, stored):
    hub.run(
        stored
        + PREPARED
        + """
    assert "row 1 of split 'test'" in error("predict", DETECTOR, "org/folder")
    status, out, err = run("predict", DETECTOR, "org/folder", "--on_error", "skip", "--output", "scores.csv")
    assert status == 1, err
    assert [row["image"] for row in rows(Path("scores.csv").read_text())] == ["test/0", "test/2", "test/3"]
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 1 and "row 1" in skipped[0] and "test/1.png" in skipped[0], err
    """
    )


def test_rows_name_no_files_of_this_machine(hub, stored):
    hub.run(
        stored
        + PREPARED
        + """
    import pyarrow
    import pyarrow.parquet
    import zipfile
    from hf_anomaly import InputError
    from hf_anomaly.data import load_one_class, stream_one_class
    from hf_anomaly.data.sources import check_place

    pictures[0].save("secret.png")
    secret = Path("secret.png").resolve()
    for number, name in enumerate((str(secret), f"file://{secret}", "secret.png", f"file://{secret}::hf://datasets/org/folder/test/0.png")):
        for kind, row in (("image", {"bytes": None, "path": name}), ("name", name)):
            table = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"image": [row] * 5}), table)
            repo_id = f"org/{kind}{number}"
            edit(f"datasets/{repo_id}", {"data/train-00000-of-00001.parquet": table.getvalue()})
            if kind == "image":
                message = error("predict", DETECTOR, repo_id)
                assert repo_id in message and "secret.png" in message and "no file of the Hub" in message, message
            for load in (load_one_class, stream_one_class):
                refused(InputError, lambda: load(repo_id), repo_id, "secret.png", "no file of the Hub")
    kinds = datasets.Features(image=datasets.Image(), mask=datasets.Image(), label=datasets.ClassLabel(names=["good", "bad"]))
    content = {"image": [{"bytes": png(pictures[0]), "path": None}] * 2, "mask": [{"bytes": None, "path": str(secret)}] * 2, "label": [0, 1]}
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict(content, schema=kinds.arrow_schema), table)
    edit("datasets/org/masks", {"data/test-00000-of-00001.parquet": table.getvalue()})
    refused(InputError, lambda: load_one_class("org/masks", normal_label="good", evaluation_only=True), "org/masks", "secret.png", "no file of the Hub")
    Path("own.csv").write_text("image\\n" + "secret.png\\n" * 5)
    assert len(load_one_class("own.csv", calibration_fraction=0).train) == 5  # of this machine's own list

    # What lies on the Hub, and what was downloaded from there, by itself and in an archive.
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(4):
            file.writestr(f"{i}.png", png(pictures[i]))
    edit("datasets/org/zipped", {"train.zip": archive.getvalue()})
    edit("datasets/org/files", {f"train/{i}.png": png(pictures[i]) for i in range(4)})
    for repo_id in ("org/zipped", "org/files"):
        assert run("predict", DETECTOR, repo_id, "--split", "train")[0] == 0
    assert len(load_one_class("org/files", calibration_fraction=0).train) == 4
    stream = stream_one_class("org/files", calibration_fraction=0)
    assert sorted(row["image"]["bytes"] for row in stream.train) == sorted(png(picture) for picture in pictures[:4])
    check_place(os.environ["HF_ENDPOINT"] + "/datasets/org/files/resolve/main/train/0.png", "org/files")
    for place in ("https://huggingface.co.example/x.png", "http://127.0.0.1/x.png", "secret.png::hf://datasets/org/files/train/0.png"):
        refused(InputError, lambda: check_place(place, "org/files"), place)
    """
    )


def test_errors_name_what_there_is(hub, stored):
    hub.run(
        stored
        + PREPARED
        + """
    for argv, words in (
        (["org/nothing"], ["org/nothing", "no dataset on the Hub", "hf auth login"]),
        (["org/scans"], ["--split", "train, test"]),
        (["org/scans", "--split", "dev"], ["'dev'", "train, test"]),
        (["org/scans", "--split", "test", "--image_column", "pixels"], ["'pixels'", "note, scan, label"]),
        (["org/scans", "--split", "test", "--image_column", "note"], ["'note'", "holds no images", "string"]),
        (["org/scans", "--dataset_config_name", "large"], ["'large'", "default", "small"]),
        (["org/scans", "--dataset_revision", "v9"], ["org/scans", "check the revision"]),
        (["org/table"], ["column of images", "a, b", "--image_column"]),
        (["files", "--dataset_config_name", "small"], ["files"]),
    ):
        message = error("predict", DETECTOR, *argv)
        assert all(word in message for word in words), message
    for status, words in ((401, "does not accept the token"), (403, "ask for access")):
        for method in ("GET", "HEAD"):
            fault(method, "datasets/org/locked", status=status, times=10**6)
        message = error("predict", DETECTOR, "org/locked")
        assert "org/locked" in message and words in message, message
        call("/_mend", {})
    assert run("predict", DETECTOR, "org/locked")[0] == 0  # private, and the token may read it
    """
    )


def test_pipeline_with_a_column(hub, stored):
    hub.run(
        stored
        + PREPARED
        + """
    from transformers import pipeline

    pipe = pipeline("image-anomaly-detection", model=DETECTOR)
    expected = pipe(pictures, batch_size=4)
    streamed = datasets.load_dataset("org/scans", split="test", streaming=True)
    stored = datasets.load_dataset("org/scans", split="test")
    assert list(pipe(streamed["scan"], batch_size=4)) == expected == pipe(stored["scan"], batch_size=4)
    """
    )


def test_train_and_evaluate(hub, stored):
    hub.run(
        PREPARED
        + """
    options = ["--normal_label=normal", "--max_steps=2", "--hidden_sizes", 4, 4, 4, "--latent_size=4", "--disable_tqdm=true", "--use_cpu=true"]
    status, out, err = run("train", "shared_ae", "--dataset_name=org/scans", *options, "--output_dir=run", "--report_to=none")
    assert status == 0, err
    trained = json.loads(Path("run/eval_results.json").read_text())
    assert (trained["dataset"], trained["num_train"], trained["num_calibration"]) == ("org/scans", 8, 2), trained
    assert (trained["num_normal"], trained["num_anomalous"]) == (10, 10)
    status, out, err = run("evaluate", "run", "--dataset_name=org/scans")
    assert status == 0 and json.loads(out)["auroc"] == trained["auroc"], err
    for name, word in (("org/nothing", "no dataset on the Hub"), ("org/table", "column")):
        message = error("train", "shared_ae", f"--dataset_name={name}", *options, "--output_dir=other")
        assert name in message and word in message, message
    assert not Path("other").exists()
    """
    )
