"""Streams: what is read of them, what is held out, and that nothing is kept."""

import gc
import itertools
import json
import pickle
import shutil
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from commands.running import run
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hf_anomaly import AnomalyImageProcessor, AnomalyTrainer, AnomalyTrainingArguments, SharedAEConfig, SharedAEModel, prepare
from hf_anomaly.data import collate, decode_image, stream_one_class

datasets.disable_progress_bars()
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # at the end of each pass over a parquet file, for interpreters that end there
ENDLESS = 10**9
FEATURES = Features({"image": Image(), "label": ClassLabel(names=["bad", "good"])})


def pgm(number, size=8):
    """An encoded image whose first pixels tell its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size), dtype=np.uint8)
    pixels[0, :4] = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
    return b"P5 %d %d 255\n" % (size, size) + pixels.tobytes()


def number(value):
    return int(np.asarray(decode_image(value, ""))[0, :4].copy().view(np.uint32)[0])


class Source:
    """Every third image is bad. Counts the rows that were read."""

    def __init__(self, n=ENDLESS, size=8):
        self.n, self.size, self.read = n, size, 0

    def rows(self):
        for i in range(self.n):
            self.read += 1
            yield {"image": {"bytes": pgm(i, self.size), "path": None}, "label": int(i % 3 > 0)}

    def stream(self, features=FEATURES):
        return IterableDataset.from_generator(self.rows, features=features)


def load(source, **options):
    return stream_one_class({"train": source.stream()}, **{"head": 20, "shuffle_buffer": 10} | options)


def numbers(split):
    return [number(value["image"]) for value in split]


def test_only_the_head_is_read():
    source = Source()
    splits = load(source)
    assert source.read < 40, "20 normals are among the first 30 rows"
    normals = [i for i in range(30) if i % 3]
    assert sorted(numbers(splits.calibration) + numbers(splits.reference)) == normals
    assert (len(splits.calibration), len(splits.reference)) == (4, 16)
    assert (splits.normal_label, splits.num_channels, splits.native_size) == ("good", 1, 8)
    assert splits.division.protocol == "stream"
    source.read = 0
    seen = numbers(splits.train.take(50))
    assert source.read < 150
    assert all(i % 3 for i in seen)
    assert len(set(seen)) == 50
    assert seen != sorted(seen)
    assert max(seen) < 3 * 40, "no further than the buffer"


def test_what_calibrates_does_not_train():
    for seed in range(3):
        splits = load(Source(90), seed=seed)
        train, calibration = numbers(splits.train), numbers(splits.calibration)
        assert sorted(train + calibration) == [i for i in range(90) if i % 3]
        assert set(numbers(splits.reference)) <= set(train)
    draws = [tuple(numbers(load(Source(90), seed=seed).calibration)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({load(Source(90), seed=seed).split_hash for seed in range(3)}) == 3
    assert load(Source(90), calibration_fraction=0).calibration is None


def test_workers_and_shards_see_the_same_images():
    """The hash is of the content: positions would be others in every shard."""
    shards = Dataset.from_generator(lambda: Source(90).rows(), features=FEATURES).to_iterable_dataset(num_shards=3)
    splits = stream_one_class({"train": shards}, head=20, shuffle_buffer=10)
    expected = set(range(90)) - set(range(0, 90, 3)) - set(numbers(splits.calibration))
    processor = AnomalyImageProcessor.for_images(8, 1)
    loader = DataLoader(prepare(splits.train, processor), batch_size=4, collate_fn=collate, num_workers=2)
    pixels = torch.cat([batch["pixel_values"] for batch in loader])
    levels = ((pixels[:, 0, 0, :4] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert sorted(levels.copy().view(np.uint32)[:, 0].tolist()) == sorted(expected)


def test_streams_reach_workers_that_are_not_forked():
    """As on Windows and macOS, and from Python 3.14 on everywhere: what is done to a row can be pickled."""
    rows = Dataset.from_generator(lambda: Source(90).rows(), features=FEATURES).to_iterable_dataset()
    splits = stream_one_class({"train": rows, "test": rows}, head=20, normal_label="a", classes={"good": "a", "bad": "b"})
    for split in (splits.train, splits.test):
        stream = prepare(split, AnomalyImageProcessor.for_images(8, 1))
        first, again = ([row["labels"] for row in stream] for stream in (stream, pickle.loads(pickle.dumps(stream))))
        assert first == again
        assert len(first) > 50


def test_files_are_held_out_by_their_content(tmp_path):
    """Not by their path: then copies of a calibration image would train, and a moved folder would be divided otherwise."""
    for i in range(20):
        for name in (f"{i}.pgm", f"{i}-copy.pgm"):
            (tmp_path / "here").mkdir(exist_ok=True)
            (tmp_path / "here" / name).write_bytes(pgm(i))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (stream_one_class(tmp_path / folder, head=40, shuffle_buffer=4) for folder in ("here", "there"))
    assert len(set(numbers(here.calibration))) == 4
    assert not set(numbers(here.calibration)) & {*numbers(here.train), *numbers(here.reference)}
    assert sorted(numbers(here.calibration)) == sorted(numbers(there.calibration))
    assert here.split_hash == there.split_hash


def test_of_digits_the_zero_is_normal():
    splits = stream_one_class("digits", head=10)
    assert splits.normal_label == "0"
    assert len(splits.calibration) == 2


def test_a_limit_and_epochs():
    splits = load(Source(), max_train_images=30)
    assert len(splits.reference) == 16
    few = load(Source(), max_train_images=5)
    assert sorted(numbers(few.train)) == sorted(numbers(few.reference))
    first = numbers(splits.train)
    assert len(first) == len(set(first)) == 30
    splits.train.set_epoch(1)
    assert sorted(numbers(splits.train)) == sorted(first)
    assert numbers(splits.train) != first


def test_class_names_and_classes(refused):
    source = Source(90)
    stream = source.stream().cast_column("label", Value("int64"))
    assert stream_one_class({"train": stream}, head=10, normal_label=1).normal_label == "1"
    with refused("which class", "normal_label", "'0'", "'1'"):
        stream_one_class({"train": stream}, head=10)
    splits = stream_one_class({"train": stream, "test": stream}, head=10, classes={"1": "fine", "0": "broken"}, normal_label="fine")
    assert [row["label"] for row in splits.test.take(4)] == [1, 0, 0, 1]
    only = stream_one_class({"train": stream}, head=10, classes={"0": "zero"})
    assert {i % 3 for i in numbers(only.train)} == {0}
    assert stream_one_class({"train": source.stream()}, head=10, normal_label=0).normal_label == "bad"
    assert {row["label"] for row in stream_one_class({"train": source.stream().remove_columns("label")}, head=10).train} == {0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normal_label": "nice"}, ("'nice'", "'bad', 'good'")),
        ({"label_column": "y"}, ("no column 'y'", "image, label")),
        ({"image_column": "y"}, ("no column 'y'", "image, label")),
        ({"head": 1}, ("head must be at least 2",)),
        ({"max_train_images": 0}, ("max_train_images at least 1",)),
        ({"calibration_fraction": 1}, ("[0, 1)",)),
        ({"evaluation_only": True, "eval_split": "validation", "label_column": "y"}, ("'y'",)),
    ],
)
def test_bad_options(refused, options, words):
    with refused(*words):
        load(Source(), **options)


def test_a_stream_without_its_name_is_refused(refused):
    with refused("{'train': stream}", "IterableDataset"):
        stream_one_class(Source().stream())


def test_no_normals(refused):
    def rows():
        return ({"image": {"bytes": pgm(i), "path": None}, "label": 0} for i in itertools.count())

    with refused("0 images of class 'good' among its first 2000"):
        stream_one_class({"train": IterableDataset.from_generator(rows, features=FEATURES)}, head=20)


def test_an_unreadable_image_is_named(refused):
    def rows():
        yield from Source(30).rows()
        yield {"image": {"bytes": b"no image", "path": "x/17.png"}, "label": 1}

    splits = stream_one_class({"train": IterableDataset.from_generator(rows, features=FEATURES)}, head=10)
    with refused("17.png", "unreadable"):
        list(prepare(splits.train, AnomalyImageProcessor.for_images(8, 1)))


@pytest.mark.parametrize("missing", [3, 40])
def test_a_missing_image_is_told_of(refused, missing):
    rows = ({"image": {"bytes": pgm(i), "path": None} if i != missing else None} for i in range(60))
    stream = IterableDataset.from_generator(lambda rows=list(rows): iter(rows), features=Features({"image": Image()}))
    with refused("no image in column 'image'"):
        list(stream_one_class({"train": stream}, head=20).train)


def test_images_that_filter_or_map_have_decoded_are_refused(refused):
    stream = Source(30).stream()
    for decoded in (stream.filter(bool), stream.map(dict, features=FEATURES)):
        with refused("decode(False)"):
            stream_one_class({"train": decoded}, head=5)
    with refused("no features", "decode(False)"):
        stream_one_class({"train": stream.map(dict)}, head=5)
    expected, undecoded = load(Source(30)), stream.decode(False)
    for same in (undecoded.filter(bool), undecoded.map(dict)):
        splits = stream_one_class({"train": same}, normal_label=1, head=20, shuffle_buffer=10)
        assert sorted(numbers(splits.train)) == sorted(numbers(expected.train))


def test_files_of_their_own_are_fetched():
    """As streamed image folders of the Hub name them, but memory:// instead of hf://."""
    import fsspec

    for i in range(6):
        with fsspec.open(f"memory://images/{i}.pgm", "wb") as file:
            file.write(pgm(i))
    rows = [{"image": {"bytes": None, "path": f"memory://images/{i}.pgm"}, "label": 1} for i in range(6)]
    splits = stream_one_class({"train": IterableDataset.from_generator(lambda: iter(rows), features=FEATURES)}, head=3)
    assert sorted(numbers(splits.train) + numbers(splits.calibration)) == list(range(6))


def stream(*rows, **features):
    """Of images by their number, and what else the rows have."""
    rows = [{"image": {"bytes": pgm(i), "path": None}} | others for i, others in rows]
    return IterableDataset.from_generator(lambda: iter(rows), features=Features({"image": Image(), **features}))


@pytest.mark.parametrize("features", [{}, {"label": FEATURES["label"]}])
def test_a_test_split_without_labels_is_told_of_before_training(refused, features):
    rows = [(i, dict.fromkeys(features)) for i in range(9)]
    splits = {"train": Source(90).stream(), "test": stream(*rows, **features)}
    loaded = stream_one_class(splits, head=10)
    assert (loaded.test, loaded.test_missing_reason) == (None, "split 'test' of 'a stream' has no labels")
    assert len(list(loaded.train)) == 58
    with refused("split 'test' of 'a stream' has no labels", "label_column"):
        stream_one_class(splits, head=10, evaluation_only=True)


def test_a_test_split_without_images_of_the_classes_is_told_of_before_training():
    stream = Source(90).stream().cast_column("label", Value("int64"))
    ones = stream.filter(lambda label: label == 1, input_columns=["label"])
    splits = stream_one_class({"train": stream, "test": ones}, head=10, classes={"0": "zero"})
    assert splits.test is None
    assert splits.test_missing_reason == "split 'test' of 'a stream' has no images of the classes that count"


def test_labels_that_are_none(refused):
    some = stream(*((i, {"label": None if i == 4 else 0}) for i in range(9)), label=FEATURES["label"])
    with refused("row 4", "no label in column 'label'"):
        stream_one_class({"train": Source(90).stream(), "test": some}, head=10)
    lists = stream(*((i, {"label": [0]}) for i in range(9)), label=List(Value("int64")))
    with refused("column 'label'", "List", "label_column"):
        stream_one_class({"train": lists})


def test_a_training_split_without_a_label_column(caplog):
    splits = {"train": stream(*((i, {}) for i in range(1, 9, 3))), "test": Source(9).stream()}
    assert len(list(stream_one_class(splits, normal_label="good").train)) == 2
    assert {row["label"] for row in stream_one_class(splits, normal_label="good", evaluation_only=True).test} == {0, 1}
    unnamed = stream(*((i, {"sick": i % 2}) for i in range(9)), sick=Value("int64"))
    stream_one_class({"train": unnamed})
    assert "no label column among image, sick" in caplog.text


def test_a_training_split_that_is_evaluated_is_warned_of(caplog):
    found = stream_one_class({"train": Source(9).stream()}, evaluation_only=True)
    assert len(list(found.test)) == 9
    assert "no split 'test': all of it is evaluated" in caplog.text


@pytest.mark.parametrize("asked", [0, "0", False, "False", "false", np.False_])
def test_a_boolean_class(asked):
    booleans = stream(*((i, {"label": i % 3 > 0}) for i in range(9)), label=Value("bool"))
    assert sorted(numbers(stream_one_class({"train": booleans}, normal_label=asked, calibration_fraction=0).train)) == [0, 3, 6]


@pytest.mark.parametrize("format", ["torch", "arrow"])
def test_a_format_changes_no_label(format):
    formatted = stream(*((i, {"label": i % 2}) for i in range(9)), label=Value("int64")).with_format(format)
    found = stream_one_class({"train": formatted}, normal_label=0, calibration_fraction=0)
    assert sorted(numbers(found.train)) == [0, 2, 4, 6, 8]


def test_copies_in_the_head(refused):
    with refused("the first 10 normals", "copies of one image", "calibration_fraction=0"):
        stream_one_class({"train": stream(*((7, {}) for _ in range(10)))})
    for counts, held_out in (((5, 5), 5), ((17, 1, 1, 1), 3), ((4, 16), 4), ((2, 2, 2, 4), 2)):
        for seed in range(5):
            copies = stream(*((i, {}) for i, count in enumerate(counts) for _ in range(count)))
            splits = stream_one_class({"train": copies}, seed=seed)
            train, calibration = numbers(splits.train), numbers(splits.calibration)
            assert (len(calibration), len(train)) == (held_out, sum(counts) - held_out)
            assert not set(train) & set(calibration)


def test_what_decides_which_images_train_has_a_digest():
    options = {"calibration_fraction": 0.4}, {"max_train_images": 5}, {"shuffle_buffer": 9}, {"seed": 1}, {}
    digests = [load(Source(90), **changed).train_digest for changed in options]
    assert len({*digests, None}) == 6
    assert load(Source(90)).train_digest == digests[-1]
    assert stream_one_class({"test": Source(9).stream()}, evaluation_only=True).train_digest is None


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=16, num_channels=1, hidden_sizes=[8, 8, 8], latent_size=8))
    model.fit_reference([torch.rand(4, 1, 16, 16) * 2 - 1], progress=False)
    return model.eval()


def test_training_reads_no_more_than_it_takes(tmp_path):
    source = Source()
    splits = load(source)
    processor = AnomalyImageProcessor.for_images(16, 1)
    source.read = 0
    model = SharedAEModel(SharedAEConfig(image_size=16, num_channels=1, hidden_sizes=[8, 8, 8], latent_size=8))
    weights = []
    original = model.adversarial_weight
    model.adversarial_weight = lambda epoch: weights.append(original(epoch)) or weights[-1]
    arguments = AnomalyTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = AnomalyTrainer(
        model,
        arguments,
        train_dataset=prepare(splits.train, processor),
        reference_dataset=prepare(splits.reference, processor),
        calibration_dataset=prepare(splits.calibration, processor),
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert source.read < 1.5 * (6 * 8 + 10) + 100, "batches, buffer, and what is read ahead"
    assert weights[0] == 0 < weights[-1], "16 images of the reference make an epoch"
    trainer.fit_reference()
    trainer.calibrate()
    assert model.config.num_reference_images == 16
    assert model.calibration.scores.numel() == 4


def test_scoring_keeps_no_images(detector):
    source = Source(400, size=256)
    splits = stream_one_class({"test": source.stream()}, evaluation_only=True, head=2)
    loader = DataLoader(prepare(splits.test, AnomalyImageProcessor.for_images(16, 1)), batch_size=16, collate_fn=collate)
    tracemalloc.start()
    scores, labels = detector.score(loader, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(scores), labels.tolist()) == (400, [int(i % 3 == 0) for i in range(400)])
    assert peak < 400 * 256 * 256 / 3, "all images take 26 MB"


def test_scoring_keeps_no_tensors(detector):
    """One left by every batch, however small, would keep the memory around it from being used again."""
    alive = []

    def batches():
        for _ in range(20):
            yield torch.zeros(2, 1, 16, 16)
            alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))

    scores, _ = detector.score(batches(), progress=False)
    assert len(scores) == 40
    assert alive[-1] == alive[4]


# The scripts


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for split, n in (("train", 120), ("test", 30)):
        Dataset.from_generator(lambda n=n: Source(n).rows(), features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_shared_ae.py", ("--hidden_sizes", 8, 8, 8, "--latent_size", 8, "--image_size", 16)),
        ("train_dia.py", ("--dissolver_steps", 2, "--dissolver_batch_size", 4, "--num_test_views", 1)),
    ],
)
def test_scripts(parquet, tmp_path, script, options):
    common = ("--dataset_name", parquet, "--streaming", "true", "--stream_head", 20)
    status, out, err = run(
        script, *common, *options, "--max_steps", 3, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "run",
        "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
    )  # fmt: skip
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert (results["num_normal"], results["num_anomalous"], results["num_train"], results["num_calibration"]) == (20, 10, None, 4)
    assert 0 <= results["auroc"] <= 1
    assert "a stream of normal images" in (tmp_path / "run" / "README.md").read_text()
    status, out, err = run("evaluate.py", "--model", tmp_path / "run", *common)
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results["auroc"])


def test_resuming_in_a_later_pass_over_a_stream(parquet, tmp_path):
    common = (
        "--dataset_name",
        parquet,
        "--streaming",
        "true",
        "--stream_head",
        20,
        "--image_size",
        16,
        "--per_device_train_batch_size",
        16,
    )
    common += (
        "--hidden_sizes",
        4,
        4,
        4,
        "--latent_size",
        4,
        "--max_steps",
        9,
        "--save_steps",
        3,
        "--report_to",
        "none",
        "--use_cpu",
        "true",
    )
    weights = []
    for name, resume in (("whole", ()), ("resumed", ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6"))):
        status, _, err = run("train_shared_ae.py", *common, "--save_total_limit", 9, *resume, "--output_dir", tmp_path / name)
        assert status == 0, err
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["epoch"] > 1, "of passes over the stream"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    status, _, err = run("train_shared_ae.py", *common, *resume, "--output_dir", tmp_path / "other", "--shuffle_buffer", 5)
    assert status == 2
    assert "belongs to another run (images was" in err


def test_steps_added_go_on_in_the_pass_that_was_begun(parquet, tmp_path):
    common = ("--dataset_name", parquet, "--streaming", "true", "--stream_head", 20, "--image_size", 16, "--per_device_train_batch_size", 8)
    common += ("--hidden_sizes", 4, 4, 4, "--latent_size", 4, "--lr_scheduler_type", "constant", "--save_steps", 3, "--report_to", "none")
    weights = []
    for folder, *options in (("whole", 6), ("added", 3), ("added", 6, "--resume_from_checkpoint", "true")):
        status, _, err = run("train_shared_ae.py", *common, "--use_cpu", "true", "--output_dir", tmp_path / folder, "--max_steps", *options)
        assert status == 0, err
        weights.append(load_file(tmp_path / folder / "model.safetensors"))
    assert json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())["epoch"] == 1, "of one pass over the stream"
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--protocol", "balanced"), "not --protocol balanced"),
        (("--num_train_epochs", "2"), "give --max_steps"),
        (("--card_figures", "true", "--max_steps", "1"), "--card_figures"),
    ],
)
def test_what_a_stream_cannot_do(parquet, tmp_path, options, words):
    status, _, err = run("train_shared_ae.py", "--dataset_name", parquet, "--streaming", "true", "--output_dir", tmp_path, *options)
    assert status == 2
    assert words in err
