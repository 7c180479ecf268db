"""Images that belong together: patients, and slices of a volume."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
from commands.running import run
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_anomaly import InputError, load_one_class
from hf_anomaly.data.formats import Reading
from hf_anomaly.data.groups import draw_groups


def images(patients, first=0):
    pixels = [PIL.Image.fromarray(np.full((8, 8), first + i, np.uint8)) for i in range(len(patients))]
    features = Features({"image": Image(), "patient": Value("int64"), "label": Value("string")})
    return Dataset.from_dict({"image": pixels, "patient": patients, "label": ["normal"] * len(patients)}, features)


def with_tumours(patients, tumours):
    """The last images are anomalies."""
    labels = ["normal"] * (len(patients) - tumours) + ["tumour"] * tumours
    return images(patients).remove_columns("label").add_column("label", labels)


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_are_drawn(seed):
    groups = np.random.default_rng(seed).integers(0, 9, 60).astype(str)
    held = draw_groups(groups, 0.2, seed, "images are drawn")
    names = set(groups[held])
    assert not names & set(groups[~held])
    assert names
    assert abs(held.sum() - 12) <= max(np.unique(groups, return_counts=True)[1]) / 2
    assert (draw_groups(groups, 0.2, seed, "images are drawn") == held).all()


def test_drawn_groups_are_pinned():
    """In the order 0, 4, 1, 2, 3; a group that brings their images no nearer to the share is passed over."""
    for share, rows in ((0.2, [0, 1]), (0.3, [0, 1]), (0.31, [0, 1, 8, 9])):
        assert np.flatnonzero(draw_groups(np.arange(10) // 2, share, 0, "")).tolist() == rows
    assert np.flatnonzero(draw_groups(np.array(["a"] * 9 + ["b"] * 5), 0.01, 0, "")).tolist() == [9, 10, 11, 12, 13], "the smallest"


@pytest.mark.parametrize("seed", range(8))
def test_a_group_that_is_too_large_is_not_drawn(seed):
    held = draw_groups(np.array(["large"] * 1000 + ["b"] * 50 + ["c"] * 50), 0.2, seed, "images are drawn")
    assert held.sum() == 100


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_one_group_is_drawn_at_least_and_one_is_left(share):
    held = draw_groups(np.array(["a", "b", "a", "c"]), share, 0, "images are drawn")
    assert 0 < len(set(np.array(["a", "b", "a", "c"])[held])) < 3


def test_no_patient_trains_and_calibrates(caplog):
    patients = [i // 5 for i in range(50)]
    splits = load_one_class(images(patients), group_column="patient")
    sides = [{patients[row] for row in split["row"][:]} for split in (splits.train, splits.calibration)]
    assert len(sides[1]) == 2
    assert sides[0] | sides[1] == set(range(10))
    assert not sides[0] & sides[1]
    assert splits.division.group_column == "patient"
    assert load_one_class(images(patients), group_column="patient", seed=1).calibration["row"][:] != splits.calibration["row"][:]
    assert not caplog.records


def test_groups_of_one_image_change_nothing():
    whole = images(list(range(50)))
    assert load_one_class(whole, group_column="patient").split_hash == load_one_class(whole).split_hash
    whole = with_tumours(list(range(60)), tumours=20)
    drawn = [load_one_class(whole, group_column=column, protocol="balanced", normal_label="normal") for column in ("patient", None)]
    assert drawn[0].split_hash == drawn[1].split_hash


@pytest.mark.parametrize("seed", range(3))
def test_no_patient_trains_and_tests(seed, caplog):
    """Ten patients of five normal images, of whom five also have tumours, and five patients of two tumours alone."""
    patients = [i // 5 for i in range(50)] + [i // 2 for i in range(10)] + [10 + i // 2 for i in range(10)]
    options = {"group_column": "patient", "protocol": "balanced", "normal_label": "normal", "seed": seed}
    splits = load_one_class(with_tumours(patients, tumours=20), **options)
    train, calibration, test = ({patients[row] for row in split["row"][:]} for split in (splits.train, splits.calibration, splits.test))
    assert not train & test
    assert not train & calibration
    assert not calibration & test
    labels = splits.test["label"][:]
    assert (labels.count(0), labels.count(1)) == (10, 10)
    assert len(splits.train) + len(splits.calibration) == 40
    assert "that trains" not in caplog.text
    both = load_one_class(with_tumours([0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 2, tumours=10), **options).test
    assert (len({row % 10 // 2 for row in both["row"]}), both["label"][:]) == (1, [0, 0, 1, 1]), "a patient's tumours test beside the rest"
    again = load_one_class(with_tumours(patients, tumours=20), evaluation_only=True, **options)
    assert again.test["row"][:] == splits.test["row"][:]
    assert len({tuple(load_one_class(with_tumours(patients, tumours=20), **options | {"seed": i}).test["row"][:]) for i in range(5)}) > 1


def test_anomalies_of_patients_that_train_are_told_of(caplog):
    """All but two of them are of the patient who has most normal images, too many to test."""
    patients = [0] * 30 + [1 + i // 2 for i in range(10)] + [0] * 3 + [9] * 2
    splits = load_one_class(with_tumours(patients, tumours=5), group_column="patient", protocol="balanced", normal_label="normal")
    assert splits.test["label"][:].count(1) == 2
    assert "There are 2 anomalies for 8 normal test images: the test is not balanced; 3 others belong to what trains" in caplog.text


def test_only_normal_images_count():
    whole = images([0, 0, 1, 1, 2, 2])
    labels = ["normal", "normal", "normal", "normal", "tumour", "tumour"]
    whole = whole.remove_columns("label").add_column("label", labels)
    splits = load_one_class(whole, group_column="patient")
    assert sorted([splits.train["row"][:], splits.calibration["row"][:]]) == [[0, 1], [2, 3]]


def test_patients_that_also_test_are_told_of(caplog):
    splits = DatasetDict(train=images([0, 0, 1, 1]), test=images([1, 7, 1], first=9))
    load_one_class(splits, group_column="patient")
    assert "2 of 3 images of split 'test' are of a patient that trains, too" in caplog.text
    caplog.clear()
    load_one_class(DatasetDict(train=images([0, 0, 1, 1]), test=images([7], first=9).remove_columns("patient")), group_column="patient")
    assert "patient" not in caplog.text


def test_groups_are_what_they_are_called(caplog):
    """Whatever the type of the column: 1 is 1.0 but not 1.5, and a class is its name."""

    def shared(train, patients):
        caplog.clear()
        test = images([0, 0], first=9).remove_columns("patient").add_column("patient", patients)
        load_one_class(DatasetDict(train=train, test=test), group_column="patient")
        return "1 of 2 images of split 'test'" in caplog.text

    train = images([1, 1, 2, 2])
    assert shared(train, [1.0, 7.0])
    assert not shared(train, [1.5, 7.0])
    named = train.cast_column("patient", ClassLabel(names=["0a", "1a", "2a"]))
    assert shared(named, ["1a", "7a"])
    assert not shared(named, ["1b", "7b"])


def test_a_large_group_is_told_of(caplog):
    splits = load_one_class(images([0] * 9 + [1] * 9), group_column="patient")
    assert len(splits.calibration) == 9
    assert "9 of 18 normal training images are held out" in caplog.text


def test_a_large_group_that_tests_is_told_of(caplog):
    splits = load_one_class(
        with_tumours([0] * 9 + [1] * 9 + [2], tumours=1), group_column="patient", protocol="balanced", normal_label="normal"
    )
    assert splits.test["label"][:].count(0) == 9
    assert "9 of 18 normal images test: they belong to one another" in caplog.text


def test_a_single_patient(caplog):
    splits = load_one_class(images([3] * 10), group_column="patient")
    assert len(splits.calibration) == 2
    assert "belong together" in caplog.text


def test_what_is_refused():
    with pytest.raises(InputError, match=r"split 'train' of .* has no column 'person'; its columns: image, patient, label"):
        load_one_class(images([1, 2]), group_column="person")
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\) of split 'train' of .* says nothing in column 'patient'"):
        load_one_class(images([1, None, 2]), group_column="patient")
    for nothing in ("", float("nan")):
        values = [nothing, nothing] if nothing == "" else [1.0, nothing]
        with pytest.raises(InputError, match=r"says nothing in column 'person'"):
            load_one_class(images([1, 2]).add_column("person", values), group_column="person")
    held_back = images([1, 2]).add_column("person", [0, -1]).cast_column("person", ClassLabel(names=["a"]))
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\) of split 'train' of .* says nothing in column 'person'"):
        load_one_class(held_back, group_column="person")
    with pytest.raises(InputError, match=r"column 'person' of .* holds List.*not one name or number"):
        load_one_class(images([1, 2]).add_column("person", [[1], [2]]), group_column="person")
    with pytest.raises(InputError, match="contamination draws image by image"):
        load_one_class(images([1, 2]), group_column="patient", contamination=0.1)
    with pytest.raises(InputError, match=r"'stratified' divides image by image: with group_column take 'balanced'"):
        load_one_class(images([1, 2]), group_column="patient", protocol="stratified")
    with pytest.raises(InputError, match=r"^all images of 'normal' belong together, to '7'"):
        load_one_class(with_tumours([7, 7, 7, 8], tumours=1), group_column="patient", protocol="balanced", normal_label="normal")
    with pytest.raises(InputError, match=r"all splits of .* has no column 'person'"):
        load_one_class(with_tumours([1, 2, 3], tumours=1), group_column="person", protocol="balanced", normal_label="normal")


def volumes(slices):
    return {value["path"].rsplit("/", 2)[1] for value in slices["image"]}


def test_slices_of_a_volume_belong_together(tmp_path, monkeypatch, caplog):
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "scans").mkdir()
    for i in range(5):
        volume = np.random.default_rng(i).integers(0, 99, (8, 8, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "scans" / f"{i}.nii")
    for name in ("train", "test"):
        (tmp_path / "mixed" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "scans" / ("0.nii" if name == "train" else "1.nii"), tmp_path / "mixed" / name)
        for i in range(9):
            PIL.Image.fromarray(np.full((8, 8), 9 * (name == "train") + i, np.uint8)).save(tmp_path / "mixed" / name / f"{i}.png")
    load_one_class(tmp_path / "mixed", reading=Reading((0, 99)))
    assert "volume" not in caplog.text
    splits = load_one_class(tmp_path / "scans", reading=Reading((0, 99)))
    assert len(splits.train) == 24
    assert len(volumes(splits.calibration)) == 1
    (tmp_path / "both").mkdir()
    for kind, names in (("normal", "012"), ("tumour", "34")):
        (tmp_path / "both" / kind).mkdir()
        for name in names:
            shutil.copy(tmp_path / "scans" / f"{name}.nii", tmp_path / "both" / kind)
    splits = load_one_class(tmp_path / "both", reading=Reading((0, 99)), protocol="balanced")
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (6, 6, 12)
    assert not volumes(splits.test) & (volumes(splits.train) | volumes(splits.calibration))
    with pytest.raises(InputError, match="contamination draws image by image: it does not go with volumes"):
        load_one_class(tmp_path / "both", reading=Reading((0, 99)), protocol="balanced", contamination=0.5)


def test_command(tmp_path):
    lines = ["file_name,patient,label"]
    for i in range(25):
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i // 4},{'normal' if i < 20 else 'tumour'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    tiny = [
        "--max_steps",
        1,
        "--hidden_sizes",
        4,
        4,
        4,
        "--latent_size",
        4,
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
    ]
    source = ["--dataset_name", tmp_path / "list.csv"]
    argv = [*source, "--group_column", "patient", "--output_dir", tmp_path / "run"]
    status, _, err = run("train_shared_ae.py", *argv, "--protocol", "balanced", *tiny)
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert (results["num_train"], results["num_calibration"], results["division"]["group_column"]) == (12, 4, "patient")
    assert (results["num_normal"], results["num_anomalous"]) == (4, 4)
    assert "balanced, test and calibration images held out by patient" in (tmp_path / "run" / "README.md").read_text()
    status, out, err = run("evaluate.py", "--model", tmp_path / "run", *source, "--protocol", "balanced")  # the column is recorded
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results["auroc"])
    assert json.loads(out)["division"]["group_column"] == "patient"
    moved = shutil.copy(tmp_path / "list.csv", tmp_path / "moved.csv")
    status, out, err = run("evaluate.py", "--model", tmp_path / "run", "--dataset_name", moved, "--protocol", "balanced")
    assert status == 0, err
    assert json.loads(out)["auroc"] == pytest.approx(results["auroc"])
    status, _, err = run("evaluate.py", "--model", tmp_path / "run", *source, "--protocol", "balanced", "--group_column", "label")
    assert status == 2
    assert "was trained with --group_column patient: with label it would be tested on images that it was trained on" in err
    status, _, err = run("evaluate.py", "--model", tmp_path / "run", *source, "--group_column", "patient")
    assert status == 2
    assert "--group_column is of the training images" in err
    status, _, err = run("train_shared_ae.py", *argv, "--streaming", "true", *tiny)
    assert status == 2
    assert "--group_column does not go with --streaming" in err
