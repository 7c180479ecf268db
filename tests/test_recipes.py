"""The papers' datasets in the layout of their downloads, tiny; which images are normal, train and test."""

import csv
import json
from dataclasses import asdict

import datasets
import numpy as np
import PIL.Image
import pytest

from hf_anomaly.data import RECIPES, decode_image, find_recipe, load_one_class
from hf_anomaly.data.protocols import contaminate, subclass_vs_superclass, subset
from hf_anomaly.data.recipes import CIFAR_10, CIFAR_100, KVASIR, MVTEC_AD, SHARED_AE_TABLE_4
from hf_anomaly.errors import InputError
from hf_anomaly.training import DataArguments
from hf_anomaly.training.commands.train_dissolver import main as train_dissolver
from hf_anomaly.training.runs import load_splits

datasets.disable_progress_bars()


def save(path, level=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size, size), level, np.uint8)).save(path)


def class_folders(root, counts):
    """The grey level of an image is the number of its class."""
    for number, (folder, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / folder / f"{i}.png", number)


def levels(split):
    """The grey level of every image."""
    return [int(np.asarray(decode_image(value, "")).flat[0]) for value in split["image"]]


def medmnist(path, counts):
    arrays = {}
    for split, per_class in counts.items():
        labels = np.repeat([0, 1], per_class)[:, None]
        arrays |= {f"{split}_labels": labels, f"{split}_images": np.broadcast_to(labels[..., None], (len(labels), 8, 8)).astype(np.uint8)}
    np.savez(path, **arrays)


def cifar(root, coarse_names, fine_names, files, per_class):
    """The binary versions: every class `per_class` times in every file; the red level is the class, green 1, blue 2."""
    root.mkdir()
    labels = np.tile(np.arange(len(fine_names)), per_class).astype(np.uint8)
    columns = [labels[:, None]]
    if coarse_names is None:
        (root / "batches.meta.txt").write_text("\n".join(fine_names) + "\n\n")
    else:
        (root / "coarse_label_names.txt").write_text("\n".join(coarse_names) + "\n")
        (root / "fine_label_names.txt").write_text("\n".join(fine_names) + "\n")
        groups = {name: number for number, names in enumerate(CIFAR_100.values()) for name in names}
        columns.insert(0, np.array([[groups[fine_names[label]]] for label in labels], np.uint8))
    pixels = np.zeros((len(labels), 3, 32, 32), np.uint8)
    pixels[:, 0], pixels[:, 1], pixels[:, 2] = labels[:, None, None], 1, 2
    for name in files:
        np.concatenate([*columns, pixels.reshape(len(labels), -1)], 1).tofile(root / name)
    return root


FINE = sorted(name for names in CIFAR_100.values() for name in names)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    medmnist(root / "breastmnist.npz", {"train": (3, 10), "val": (1, 2), "test": (4, 6)})
    class_folders(root / "sars-cov-2-ct", {"COVID": 10, "non-COVID": 20})
    class_folders(root / "kvasir-dataset-v2", dict.fromkeys(sorted(KVASIR), 10))
    per_class = {"CNV": 2, "DME": 2, "DRUSEN": 2, "NORMAL": 5}
    class_folders(root / "OCT2017", {f"{split}/{name}": count for split in ("train", "val", "test") for name, count in per_class.items()})
    aptos = root / "aptos2019-blindness-detection"
    rows = [(f"{i:012x}", i % 5) for i in range(100)]
    for name, grade in rows:
        save(aptos / "train_images" / f"{name}.png", grade)
    save(aptos / "test_images" / "x.png")
    with open(aptos / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id_code", "diagnosis"), *rows])
    for number in range(1, 101):
        for angle in (0, 5, 10, 15, 20):
            save(root / "coil-100" / f"obj{number}__{angle}.png", number)
    cifar(root / "cifar-10-batches-bin", None, CIFAR_10, [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 1)
    cifar(root / "cifar-100-binary", tuple(CIFAR_100), FINE, ["train.bin", "test.bin"], 2)
    bottle = root / "mvtec_anomaly_detection" / "bottle"
    class_folders(bottle, {"train/good": 10, "test/broken_large": 3, "test/good": 2, "test/contamination": 1})
    for folder, count in (("broken_large", 3), ("contamination", 1)):
        for i in range(count):
            save(bottle / "ground_truth" / folder / f"{i}_mask.png", 255)
    return root


def test_there_is_a_recipe_for_each_dataset_of_the_papers():
    assert set(RECIPES) == {
        "digits", "mnist", "fashion_mnist", "pneumonia_mnist", "breast_mnist", "sars_cov_2", "kvasir_polyp", "retinal_oct", "aptos_2019", "coil_100",
        "cifar_10", "cifar_100", "cifar_100_subclasses", *(f"mvtec_{category}" for category in MVTEC_AD),
    }  # fmt: skip
    for recipe in RECIPES.values():
        assert set(recipe.normal_labels) <= set(recipe.classes)
        assert recipe.timesteps == ((130, 230) if recipe.name == "kvasir_polyp" else (30, 130))
    assert len(CIFAR_100) == 20
    assert len(set(FINE)) == 100
    assert len({next(group for group, names in CIFAR_100.items() if name in names) for name in SHARED_AE_TABLE_4}) == 10


# (recipe, normal class, normals that train and calibrate, normal and anomalous that test)
@pytest.mark.parametrize(
    ("name", "normal_label", "num_train", "num_normal", "num_anomalous"),
    [
        ("breast_mnist", "1", 10, 6, 4),  # MedMNIST: 0 is malignant
        ("sars_cov_2", "non-COVID", 14, 6, 3),
        ("kvasir_polyp", "non-polyp", 42, 18, 6),
        ("retinal_oct", "NORMAL", 5, 5, 6),
        ("aptos_2019", "0", 14, 6, 24),
        ("mvtec_bottle", "good", 10, 2, 4),
    ],
)
def test_one_normal_class(data_dir, name, normal_label, num_train, num_normal, num_anomalous):
    recipe = RECIPES[name]
    splits = recipe.load(data_dir)
    assert splits.normal_label == normal_label
    assert splits.test_missing_reason is None
    assert len(splits.train) + len(splits.calibration) == num_train
    assert splits.test["label"][:].count(0) == num_normal
    assert splits.test["label"][:].count(1) == num_anomalous
    assert asdict(splits.division) == {
        "recipe": name, "protocol": recipe.protocol, "seed": 0, "normal_label": normal_label, "classes": recipe.counts_as, "contamination": 0.0,
        "max_train_images": None, "split_hash": splits.split_hash, "group_column": None, "calibration_fraction": 0.2,
    }  # fmt: skip


def test_polarity(data_dir):
    assert set(levels(RECIPES["breast_mnist"].load(data_dir).train)) == {1}
    splits = RECIPES["kvasir_polyp"].load(data_dir)
    polyps = {number for number, name in enumerate(sorted(KVASIR)) if name in ("polyps", "dyed-lifted-polyps")}
    assert [int(level in polyps) for level in levels(splits.test)] == splits.test["label"][:]
    assert not polyps & set(levels(splits.train) + levels(splits.calibration))
    splits = RECIPES["aptos_2019"].load(data_dir)
    assert [int(level > 0) for level in levels(splits.test)] == splits.test["label"][:]
    assert {level for level in levels(splits.test) if level} == {1, 2, 3, 4}


def test_cifar_10(data_dir):
    divisions = [RECIPES["cifar_10"].load(data_dir, label, calibration_fraction=0) for label in CIFAR_10]
    assert [splits.normal_label for splits in divisions] == list(CIFAR_10)
    assert len({splits.split_hash for splits in divisions}) == 10
    for number, splits in enumerate(divisions):
        assert len(splits.train) == 5
        assert splits.test["label"][:] == [int(i != number) for i in range(10)]
        assert splits.num_channels == 3
    image = np.asarray(decode_image(divisions[7].train["image"][0], ""))
    assert image.shape == (32, 32, 3)
    assert image[3, 4].tolist() == [7, 1, 2]


def test_cifar_100_superclasses(data_dir):
    splits = RECIPES["cifar_100"].load(data_dir, "fish", calibration_fraction=0)
    assert len(splits.train) == 10
    fish = {FINE.index(name) for name in CIFAR_100["fish"]}
    assert {level for level, label in zip(red(splits.test), splits.test["label"], strict=True) if label == 0} == fish
    assert len(splits.test) == 200


def red(split):
    return [int(np.asarray(decode_image(value, ""))[0, 0, 0]) for value in split["image"]]


def test_cifar_100_subclasses(data_dir):
    splits = RECIPES["cifar_100_subclasses"].load(data_dir, "shark", calibration_fraction=0)
    assert set(red(splits.train)) == {FINE.index("shark")}
    expected = sorted((FINE.index(name), int(name != "shark")) for name in CIFAR_100["fish"])
    assert sorted(set(zip(red(splits.test), splits.test["label"][:], strict=True))) == expected
    assert len(splits.test) == 10
    assert set(splits.division.classes) == set(CIFAR_100["fish"])
    assert splits.test["row"][:] == [i for i in range(200) if FINE[i % 100] in CIFAR_100["fish"]], (
        "numbers of the file, not of the selection"
    )
    with pytest.raises(InputError, match="'unicorn' is no subclass"):
        subclass_vs_superclass(CIFAR_100, "unicorn")


def test_coil_100(data_dir):
    splits = RECIPES["coil_100"].load(data_dir, "17", calibration_fraction=0)
    assert set(levels(splits.train)) == {17}
    assert sorted(splits.test["label"][:]) == [0, 1]


def test_masks(data_dir):
    splits = RECIPES["mvtec_bottle"].load(data_dir)
    assert "mask" not in splits.train.column_names + splits.calibration.column_names
    assert [mask is not None for mask in splits.test["mask"]] == [bool(label) for label in splits.test["label"]]
    for image, mask in zip(splits.test["image"], splits.test["mask"], strict=True):
        if mask is not None:
            assert mask["path"] == image["path"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
    pooled = load_one_class(
        splits.source, protocol="stratified_70_30", normal_label="good", classes={"good": "good", "broken_large": "bad"}
    )
    assert [mask is not None for mask in pooled.test["mask"]] == [bool(label) for label in pooled.test["label"]]


def test_what_is_missing_says_how_to_get_it(tmp_path, refused):
    for recipe in RECIPES.values():
        if recipe.local is not None:
            with refused(recipe.title, str(tmp_path), recipe.instructions):
                recipe.load(tmp_path)


def test_no_such_recipe(refused):
    with refused("'kvasir'", "kvasir_polyp", "retinal_oct"):
        find_recipe("kvasir")
    with refused("MNIST", "0, 1, 2"):
        RECIPES["mnist"].normal_class()
    with refused("'11'", "MNIST"):
        RECIPES["mnist"].normal_class("11")


# Damaged downloads


def test_python_version_of_cifar_is_not_unpickled(tmp_path, refused):
    for files in (("batches.meta", "data_batch_1"), ("meta", "train", "test")):
        (tmp_path / files[0]).mkdir()
        for name in files:
            (tmp_path / files[0] / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        with refused("pickles could run code", "binary version"):
            load_one_class(tmp_path / files[0], normal_label=0)


def test_damaged_cifar(tmp_path, refused):
    root = cifar(tmp_path / "x", None, CIFAR_10, ["data_batch_1.bin"], 1)
    content = (root / "data_batch_1.bin").read_bytes()
    (root / "data_batch_1.bin").write_bytes(content[:-1])
    with refused("data_batch_1.bin", "3073"):
        load_one_class(root, normal_label=0)
    (root / "data_batch_1.bin").write_bytes(content[:3073] + b"\x0b" + content[3074:])
    with refused("data_batch_1.bin, record 1", "label 11 of 10"):
        load_one_class(root, normal_label=0)
    (root / "data_batch_1.bin").unlink()
    with refused(str(root), "no images"):
        load_one_class(root, normal_label=0)


def test_damaged_aptos(tmp_path, refused):
    save(tmp_path / "train_images" / "a.png")
    (tmp_path / "train.csv").write_text("id_code,diagnosis\na,0\nb,1\n")
    with refused("train.csv, row 2", "'b'"):
        load_one_class(tmp_path, normal_label="0")
    (tmp_path / "train.csv").write_text("name,diagnosis\na,0\n")
    with refused("train.csv", "id_code"):
        load_one_class(tmp_path, normal_label="0")


def test_class_that_is_not_there(data_dir, refused):
    with refused("'rays'", "COVID"):
        load_one_class(data_dir / "sars-cov-2-ct", classes={"rays": "x", "COVID": "y"})


# Contamination


@pytest.mark.parametrize("protocol", ["official", "balanced", "stratified"])
def test_contamination(data_dir, protocol):
    options = {"protocol": protocol, "calibration_fraction": 0.25}
    clean = RECIPES["cifar_100"].load(data_dir, "fish", **options)
    previous = set()
    for share in (0.1, 0.3):
        splits = RECIPES["cifar_100"].load(data_dir, "fish", contamination=share, **options)
        fish = {FINE.index(name) for name in CIFAR_100["fish"]}
        added = {row for row, level in zip(splits.train["row"], red(splits.train), strict=True) if level not in fish}
        assert len(added) == round(share / (1 - share) * len(clean.train))
        assert len(splits.train) == len(clean.train) + len(added)
        assert set(splits.train["label"]) == {0}, "unlabelled"
        assert splits.train["row"][:] == sorted(splits.train["row"])
        assert set(splits.train["row"]) - added == set(clean.train["row"])
        assert splits.calibration["row"][:] == clean.calibration["row"][:]
        assert splits.test["row"][:] == clean.test["row"][:]
        if protocol != "official":  # there the test split counts for itself
            assert not added & set(splits.test["row"])
        assert previous <= added, "nested"
        previous = added
        assert splits.split_hash != clean.split_hash
        assert splits.division.contamination == share
    of_another_seed = RECIPES["cifar_100"].load(data_dir, "fish", contamination=0.3, seed=1, **options)
    assert {row for row, level in zip(of_another_seed.train["row"], red(of_another_seed.train), strict=True) if level not in fish} != added


def test_contamination_needs_anomalies(data_dir, refused):
    with refused("contamination=0.2", "takes 2 anomalies", "only 0"):
        RECIPES["mvtec_bottle"].load(data_dir, contamination=0.2)
    with refused("contamination=1", "[0, 1)"):
        RECIPES["mvtec_bottle"].load(data_dir, contamination=1)


def test_draws_are_pinned():
    assert subset(10, 3, 0).tolist() == sorted(np.random.RandomState([0, 1]).permutation(10)[:3])
    assert contaminate(9, 10, 0.1, 0).tolist() == [np.random.RandomState([0, 2]).permutation(10)[0]]
    assert contaminate(9, 10, 0.1, 4).tolist() == [np.random.RandomState([4, 2]).permutation(10)[0]] != contaminate(9, 10, 0.1, 0).tolist()
    assert len(contaminate(100, 100, 0.5, 0)) == 100
    assert len(contaminate(100, 100, 0, 0)) == 0
    with pytest.raises(InputError, match="takes 100 anomalies, but only 99"):
        contaminate(100, 99, 0.5, 0)
    with pytest.raises(InputError, match=r"contamination=0\.1 of 4 normal training images is less than one anomaly"):
        contaminate(4, 10, 0.1, 0)


# On the command line


def test_arguments_follow_the_recipe(data_dir):
    arguments = DataArguments(dataset="kvasir_polyp", data_dir=str(data_dir))
    assert (arguments.normal_label, arguments.protocol, arguments.image_size) == ("non-polyp", "stratified_70_30", 224)
    assert load_splits(arguments).split_hash == RECIPES["kvasir_polyp"].load(data_dir).split_hash
    arguments = DataArguments(dataset="cifar_100_subclasses", data_dir=str(data_dir), normal_label="cup", image_size=16)
    assert arguments.image_size == 16
    assert len(load_splits(arguments).test) == 10
    assert load_splits(arguments, evaluation_only=True).test["row"][:] == load_splits(arguments).test["row"][:]


def test_a_dissolver_takes_the_timesteps_of_the_recipe(data_dir, tmp_path):
    argv = ["--dataset", "kvasir_polyp", "--data_dir", str(data_dir), "--image_size", "8", "--block_out_channels", "8", "--max_steps", "1"]
    for name, more, expected in (("own", [], (130, 230)), ("given", ["--t_min", "40"], (40, 230))):
        folder = tmp_path / name
        train_dissolver([*argv, *more, "--output_dir", str(folder), "--report_to", "none"], program="train_dissolver")
        config = json.loads((folder / "dissolver_config.json").read_text())
        assert (config["t_min"], config["t_max"]) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "x"}, ("no recipe 'x'",)),
        ({"dataset": "breast_mnist", "dataset_name": "y"}, ("--dataset breast_mnist", "--dataset_name y")),
        ({"data_dir": "y"}, ("--data_dir", "--dataset")),
        ({"dataset": "aptos_2019"}, ("APTOS 2019 needs a local copy", "train.csv", "--data_dir")),
    ],
)
def test_arguments_that_contradict(options, words, refused, monkeypatch):
    monkeypatch.delenv("HF_ANOMALY_DATA_DIR", raising=False)
    with refused(*words):
        DataArguments(**options)
