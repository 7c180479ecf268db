"""Saving is whole or nothing, brings the companions, and loading refuses what is damaged."""

import json
import math
import os
import resource
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_anomaly import (
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DIAConfig,
    DIAModel,
    DiffusionDissolver,
    GaussianDissolver,
    HubError,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
)
from hf_anomaly.cards import write_card
from hf_anomaly.dissolving import build_scheduler, build_unet
from hf_anomaly.loading import load_detector
from hf_anomaly.saving import Home
from hf_anomaly.untrusted import check_attention, check_memory, check_plausible

MEASURED = {
    "dataset": "x.npz",
    "normal_label": "good",
    "num_train": 6,
    "num_calibration": 19,
    "num_normal": 5,
    "num_anomalous": 5,
    "seed": 0,
    "steps": 1,
}
MEASURED |= {"split_hash": "0123abcd", "auroc": 0.5, "false_positive_rate_at_threshold": 0.0, "true_positive_rate_at_threshold": 0.5}


def detector(model_class=CSIModel):
    torch.manual_seed(0)
    model = model_class(CSIConfig(image_size=8, projection_size=4, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    model.fit_reference([images(6)], progress=False)
    return model.calibrate([images(19, 1)], progress=False)


def images(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class ConfigFromElsewhere(CSIConfig):
    model_type = "from_elsewhere"


class ModelFromElsewhere(CSIModel):
    config_class = ConfigFromElsewhere


@pytest.fixture
def folder(tmp_path):
    """A finished detector's folder, as a run leaves it."""
    folder = tmp_path / "detector"
    detector().save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    GaussianDissolver(3).save_pretrained(folder / "dissolver")
    (folder / "README.md").write_text("# the card")
    (folder / "eval_results.json").write_text("{}")
    (folder / "figures").mkdir()
    (folder / "figures" / "roc.png").write_bytes(b"a picture")
    return folder


def test_load_and_save_brings_the_companions(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    before, after = contents(folder), contents(tmp_path / "copy")
    before.pop("config.json"), after.pop("config.json")  # transformers writes the time of nothing, but may add its version
    assert after == before
    assert (tmp_path / "copy" / "config.json").is_file()
    assert "dissolver/dissolver_config.json" in after
    assert len({path.stat().st_mode for path in (tmp_path / "copy").rglob("*") if path.is_file()}) == 1  # others may read all or nothing
    AutoModel.from_pretrained(tmp_path, subfolder=folder.name).save_pretrained(tmp_path)
    assert before.keys() < contents(tmp_path).keys()


def test_card_and_results_do_not_follow_a_detector_calibrated_anew(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"preprocessor_config.json", "dissolver"} < names
    assert names.isdisjoint({"README.md", "eval_results.json", "figures"})


def test_other_scores_have_no_calibration(folder, tmp_path, caplog):
    x = images(4, 3)
    before = AutoModel.from_pretrained(folder, temperature=0.7).eval()  # a setting of training
    assert before.calibration.is_calibrated
    assert not caplog.text
    after = AutoModel.from_pretrained(folder, score_shift_logit=True).eval()
    assert not torch.allclose(after(x).scores, before(x).scores)
    assert f"{folder} was calibrated for other scores (score_shift_logit was False, now True): its calibration is dropped" in caplog.text
    assert not after.calibration.is_calibrated
    assert (after.config.num_calibration_scores, after.config.false_positive_rate, after.config.calibrated_for) == (0, None, None)
    after.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "README.md").exists()  # its numbers were of the other scores
    after.calibrate([images(9, 2)], progress=False).save_pretrained(tmp_path / "copy")
    assert AutoModel.from_pretrained(tmp_path / "copy").calibration.is_calibrated


def test_a_config_edited_by_hand_has_no_calibration(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "score_shift_logit": True}))
    assert not AutoModel.from_pretrained(folder).calibration.is_calibrated
    assert "score_shift_logit was False, now True" in caplog.text
    config.pop("calibrated_for")  # as of a folder that was saved before the field
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoModel.from_pretrained(folder).calibration.is_calibrated


OTHER_FEATURES = (
    *(
        {"image_size": 12},
        {"tiles": 2},
        {"shift": "perm"},
        {"score_features": "penultimate"},
        {"score_features": "both"},
        {"score_whitening": False},
    ),
    *({"test_views": "crops"}, {"num_test_views": 4}, {"test_crop_scale": [0.5, 0.9]}, {"flip_probability": 0.1}),
)


@pytest.mark.parametrize(("changes", "calibrated"), [*((changes, True) for changes in OTHER_FEATURES), ({"shift": "perm"}, False)])
def test_other_features_have_no_reference(tmp_path, caplog, calibrated, changes):
    config = CSIConfig(
        image_size=8, projection_size=8, score_features="projection", backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])
    )
    model = CSIModel(config).fit_reference([images(6)], progress=False)
    if calibrated:
        model.calibrate([images(19, 1)], progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, **changes)
    ((name, value),) = changes.items()
    assert f"{name} was {getattr(config, name)!r}, now {value!r}): its reference is dropped" in caplog.text
    assert len([record for record in caplog.records if record.name.startswith("hf_anomaly")]) == 1
    assert not loaded.is_fitted
    assert not loaded.calibration.is_calibrated
    assert (loaded.config.fitted_for, loaded.config.calibrated_for) == (None, None)
    size = loaded.config.image_size
    assert loaded.fit_reference([torch.rand(6, 1, size, size)], progress=False).config.fitted_for[name] == value


@pytest.mark.parametrize(("name", "before", "other"), [("tiles", 1, 2), ("score_ignores_detail", False, True)])
def test_a_folder_saved_before_there_was_a_field(folder, caplog, name, before, other):
    config = json.loads((folder / "config.json").read_text())
    for fields in (config, config["fitted_for"], config["calibrated_for"]):
        del fields[name]
    (folder / "config.json").write_text(json.dumps(config))
    assert AutoModel.from_pretrained(folder).calibration.is_calibrated
    assert not caplog.text
    after = AutoModel.from_pretrained(folder, **{name: other})
    assert f"{name} was {before}, now {other}): its reference is dropped" in caplog.text
    assert not after.is_fitted


def test_another_backbone_of_the_same_shapes_has_no_reference(folder, caplog):
    x = images(4, 3)
    before = AutoModel.from_pretrained(folder, dtype="float64").float().eval()  # which says nothing of the network
    assert before.calibration.is_calibrated
    assert not caplog.text
    after = AutoModel.from_pretrained(folder, backbone_config={"norm": "group"})
    assert "for other features (backbone_config.norm was 'batch', now 'group'): its reference is dropped" in caplog.text
    assert not after.is_fitted
    config = json.loads((folder / "config.json").read_text())
    for entry in ("backbone_config.stem_stride", "backbone_config.norm"):
        for record in (config["fitted_for"], config["calibrated_for"]):  # as of a version whose backbones have other fields
            record["backbone_config.gone"] = record.pop(entry)
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(AutoModel.from_pretrained(folder).eval()(x).scores, before(x).scores)
    assert len([record for record in caplog.records if record.name.startswith("hf_anomaly")]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_cosine": False}, ("score_cosine", "all off")),
        ({"score_norm": True}, ("score_norm", "score_whitening")),
        ({"max_bank_size": 3}, ("max_bank_size (3)", "got 6")),
        ({"backbone_config": {"hidden_sizes": [16]}}, ("do not fit config.json", "backbone", "(16,")),
    ],
)
def test_what_is_given_at_loading_is_checked(tmp_path, refused, changes, words):
    model = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    model.fit_reference([images(6)], progress=False).save_pretrained(tmp_path)
    with refused(*words):
        AutoModel.from_pretrained(tmp_path, **changes)
    assert AutoModel.from_pretrained(tmp_path, test_crop_scale=0.9).config.test_crop_scale == [0.9, 0.9]


def test_without_the_record_a_detector_loads_as_it_did(folder, caplog):
    before = AutoModel.from_pretrained(folder)
    edit_config(folder, fitted_for=None, calibrated_for=None)
    after = AutoModel.from_pretrained(folder, shift="perm")
    assert torch.equal(after.reference.bank, before.reference.bank)
    assert torch.equal(after.calibration.scores, before.calibration.scores)
    assert not caplog.text


@pytest.mark.parametrize("rate", [0.3, 0.01])
def test_another_false_positive_rate_moves_the_threshold(folder, tmp_path, rate):
    due = AutoModel.from_pretrained(folder).calibration.threshold_at(rate)
    model = AutoModel.from_pretrained(folder, false_positive_rate=rate)
    assert model.calibration.threshold.item() == due
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "eval_results.json").exists()
    edit_config(folder, false_positive_rate=rate)
    assert AutoModel.from_pretrained(folder).calibration.threshold.item() == due


@pytest.mark.parametrize("rate", [None, 7.0, 0.0])
def test_a_config_without_the_rate_of_its_calibration_is_refused(folder, rate, refused):
    edit_config(folder, false_positive_rate=rate)
    with refused("false_positive_rate", rate):
        AutoModel.from_pretrained(folder)


def test_an_infinite_threshold_is_told_of_once(folder, caplog):
    AutoModel.from_pretrained(folder, false_positive_rate=0.01).save_pretrained(folder)
    assert "needs at least 99" in caplog.text
    caplog.clear()
    assert AutoModel.from_pretrained(folder).calibration.threshold.item() == float("inf")
    assert not caplog.text


def test_companions_already_there_are_kept(folder, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    (target / "README.md").write_text("# mine")
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(target)
    model.save_pretrained(tmp_path / "next")  # from where it was saved last
    assert (target / "README.md").read_text() == (tmp_path / "next" / "README.md").read_text() == "# mine"


def test_saving_in_place_keeps_everything_else(folder):
    before = contents(folder)
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(folder)
    after = contents(folder)
    assert {name for name in after if before[name] != after[name]} == {"config.json", "model.safetensors"}
    assert before.keys() - after.keys() == {"eval_results.json", "figures/roc.png"}  # of the detector as it was
    assert AutoModel.from_pretrained(folder).calibration.scores.numel() == 9


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_generated_card_loses_its_results_when_they_no_longer_hold(folder, tmp_path, elsewhere):
    target = tmp_path / "copy" if elsewhere else folder
    write_card(folder, AutoModel.from_pretrained(folder), {**MEASURED, "auroc": 0.8765})
    with open(folder / "README.md", "a") as card:
        card.write("\n## My own words\n")
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(target)
    card = (target / "README.md").read_text()
    assert "fitted or calibrated again" in card
    assert "My own words" in card
    for gone in ("0.8765", "model-index", "aims at a false-positive rate"):
        assert gone not in card
    assert not (target / "eval_results.json").exists()


def test_the_card_of_a_dissolver_is_no_card_of_the_detector(folder, caplog):
    """Trained by itself it has one, which stays as it is when the detector is calibrated anew."""
    GaussianDissolver.from_pretrained(folder / "dissolver").write_card(folder / "dissolver")
    before = contents(folder / "dissolver")
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(19, 2)], progress=False).save_pretrained(folder)
    assert contents(folder / "dissolver") == before
    assert not caplog.records


def test_what_is_written_after_saving_holds(folder, tmp_path):
    """As a training script does: calibrate, save, evaluate, write the card; what is then saved elsewhere brings that card."""
    model = detector()
    model.save_pretrained(folder)
    (folder / "eval_results.json").write_text("{}")
    write_card(folder, model, {**MEASURED, "auroc": 0.8765})
    model.save_pretrained(tmp_path / "copy")
    assert "0.8765" in (tmp_path / "copy" / "README.md").read_text()
    model.save_pretrained(folder)
    assert "0.8765" in (folder / "README.md").read_text()
    assert (tmp_path / "copy" / "eval_results.json").exists()


def other_detector():
    torch.manual_seed(1)
    return SharedAEModel(SharedAEConfig(image_size=8, hidden_sizes=[4, 4, 4], latent_size=4)).fit_reference([images(4)], progress=False)


def test_another_detector_does_not_get_what_was_measured_of_the_one_that_lay_there(folder):
    write_card(folder, AutoModel.from_pretrained(folder), {**MEASURED, "auroc": 0.8765})
    model = other_detector()
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names.isdisjoint({"eval_results.json", "figures", "dissolver"})
    assert "0.8765" not in (folder / "README.md").read_text()
    (folder / "eval_results.json").write_text("{}")  # now of this one
    model.save_pretrained(folder)
    assert (folder / "eval_results.json").exists()


def test_what_belongs_to_a_detector_replaces_what_belongs_to_the_one_that_lay_there(folder, tmp_path):
    target = tmp_path / "other"
    other_detector().save_pretrained(target)
    AnomalyImageProcessor.for_images(9, 3).save_pretrained(target)
    (target / "README.md").write_text("# of the other")
    (target / "figures").mkdir()
    for name in ("roc.png", "scores.png"):
        (target / "figures" / name).write_bytes(b"of the other")
    AutoModel.from_pretrained(folder).save_pretrained(target)
    before, after = contents(folder), contents(target)
    before.pop("config.json"), after.pop("config.json")
    assert after == before


def test_what_a_person_laid_into_figures_stays(folder, tmp_path):
    """Beside the figures of this detector, which a new calibration outdates, or of one that lay there, which go or are replaced."""
    own = {"figures/mine.png": b"mine", "figures/notes/roc.png": b"mine", "figures/notes/text": b"mine"}
    (folder / "figures" / "notes").mkdir()
    for name in own:
        (folder / name).write_bytes(b"mine")
    (folder / "figures" / "link").symlink_to("../../elsewhere")

    def figures():
        assert os.readlink(folder / "figures" / "link") == "../../elsewhere"
        return {name: content for name, content in contents(folder).items() if name.startswith("figures")}

    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False).save_pretrained(folder)
    assert figures() == own
    model.save_pretrained(folder)
    assert figures() == own
    other_detector().save_pretrained(folder)
    assert figures() == own
    other_detector().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "figures").mkdir()
    for name in ("roc.png", "mine.png"):
        (tmp_path / "other" / "figures" / name).write_bytes(b"of the other")
    AutoModel.from_pretrained(tmp_path / "other").save_pretrained(folder)
    assert figures() == own | {"figures/roc.png": b"of the other"}


def test_a_dissolver_saved_for_the_detector_stays(folder):
    """As in training, into a folder of an earlier run of the same method, then of another."""
    detector().save_pretrained(folder)
    assert (folder / "dissolver" / "dissolver_config.json").exists()
    config = DIAConfig(
        image_size=8, projection_size=4, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]), dissolver="gaussian"
    )
    DIAModel(config).fit_reference([images(4)], progress=False).save_pretrained(folder)
    assert (folder / "dissolver" / "dissolver_config.json").exists()


def test_every_folder_that_it_was_saved_to_is_its_own(tmp_path, caplog):
    model = detector()
    model.save_pretrained(tmp_path / "a")
    model.calibrate([images(19, 2)], progress=False)
    for name in "bc":
        model.save_pretrained(tmp_path / name)
    (tmp_path / "b" / "eval_results.json").write_text("{}")
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "eval_results.json").exists()
    for name in "abc":  # as checkpoints go
        shutil.rmtree(tmp_path / name)
    model.save_pretrained(tmp_path / "d")
    assert not caplog.records


def test_results_of_a_detector_calibrated_in_place_hold(folder):
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(folder)
    (folder / "eval_results.json").write_text("{}")
    model.save_pretrained(folder)
    assert (folder / "eval_results.json").exists()


def test_a_folder_that_is_gone_is_not_sought_on_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    model = AutoModel.from_pretrained(f"{folder.parent.name}/{folder.name}")
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    assert model._homes[-1].folder() is None


def test_a_folder_called_like_the_repository_is_not_taken_for_it(folder, tmp_path, monkeypatch):
    model = AutoModel.from_pretrained(folder)
    model._homes = [Home("org/name", was_loaded=True)]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: folder)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("org/name")
    assert contents(tmp_path / "org" / "name").keys() == contents(folder).keys()


def test_a_home_that_cannot_be_reached_is_passed_over(folder, tmp_path, caplog, monkeypatch, refused):
    """Saved over another detector while the Hub is away: the other's card does not keep its results."""
    write_card(folder, AutoModel.from_pretrained(folder), {**MEASURED, "auroc": 0.8765})
    model = other_detector()
    model._homes = [Home("org/name", cache_dir=str(tmp_path / "cache"))]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model.save_pretrained(folder)
    assert "Saved without what lies beside org/name on the Hub: " in caplog.text
    assert "0.8765" not in (folder / "README.md").read_text()
    caplog.clear()
    with refused("org/name", error=HubError):  # what is pushed is whole
        model.push_to_hub("org/name")
    assert not caplog.text


@pytest.mark.parametrize("again", ["detector", "copy"])
def test_companions_of_a_folder_that_is_gone_are_missed(folder, tmp_path, caplog, again):
    model = AutoModel.from_pretrained(folder.parent, subfolder=folder.name)
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "whole")
    assert not caplog.records
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "as-whole")  # from where it was saved last
    assert (tmp_path / "as-whole" / "preprocessor_config.json").is_file()
    assert not caplog.records
    shutil.rmtree(tmp_path / "whole")
    shutil.rmtree(tmp_path / "as-whole")
    model.save_pretrained(tmp_path / again)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} is gone: saved without the processor, the card and the results that lay there; save a processor beside it"
    ]


def test_companions_come_after_a_save_to_a_place_that_is_gone(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "dissolver").is_dir()


@pytest.mark.parametrize("name", ["README.md", "dissolver/unet/config.json", "dissolver"])
def test_links_that_leave_the_folder_are_not_followed(folder, tmp_path, refused, name):
    secret = tmp_path / "secret"
    (secret / "id.json").parent.mkdir()
    (secret / "id.json").write_text("{}")
    link = folder / name
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret if name == "dissolver" else secret / "id.json")
    model = AutoModel.from_pretrained(folder)
    with refused(str(secret), "outside"):
        model.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_only_files_of_a_dissolver_come_from_its_folder(folder, tmp_path):
    (folder / "dissolver" / "unet").mkdir()
    for name in ("weights.bin", "code.py", "model.safetensors"):
        (folder / "dissolver" / name).write_text("")
        (folder / "dissolver" / "unet" / name).write_text("")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    names = {"dissolver_config.json", "model.safetensors", "unet/model.safetensors"}
    assert contents(tmp_path / "copy" / "dissolver").keys() == names


class DiskFull(CSIModel):
    def state_dict(self, *args, **kwargs):
        raise OSError("No space left on device")


def test_a_failure_half_way_leaves_the_old_folder(folder):
    before = contents(folder)
    model = detector()
    model.__class__ = DiskFull  # config.json comes before the weights, so part of the new detector is written when it fails
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert contents(folder) == before
    assert not list(folder.glob(".saving*"))


def test_a_target_that_is_a_file(tmp_path, refused):
    target = tmp_path / "file"
    target.write_text("precious")
    with refused(str(target), "file"):
        detector().save_pretrained(target)
    assert target.read_text() == "precious"


def test_only_the_main_process_writes(tmp_path):
    detector().save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()


def drop(folder, *names):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("lost", ["reference.bank", "reference.lambda_sim", "calibration.scores", "calibration.threshold"])
def test_a_checkpoint_without_its_reference_is_refused(folder, lost, refused):
    drop(folder, lost)
    with refused(str(folder), lost, "save the detector again"):
        AutoModel.from_pretrained(folder)
    with refused(lost):
        CSIModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("calibration.scores", lambda scores: torch.cat([scores[:-2], scores[-2:].flip(0)])),
        ("calibration.scores", lambda scores: torch.full_like(scores, float("nan"))),
        ("calibration.threshold", lambda threshold: threshold * float("nan")),
    ],
)
def test_a_damaged_calibration_is_refused(folder, name, change, refused):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with refused(str(folder), name, "calibrate it again"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("field", ["bank_size", "num_calibration_scores"])
def test_a_config_that_contradicts_the_weights_is_refused(folder, field, refused):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: config[field] + 1}))
    with refused(str(folder)):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("lost", ["projection.0.weight", "backbone.stem.0.weight"])
def test_a_checkpoint_without_its_weights_is_refused(folder, lost, refused):
    drop(folder, lost)
    with refused(str(folder), lost):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_weights_are_refused(folder, keep, refused):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refused(str(folder)):
        AutoModel.from_pretrained(folder)


def test_weights_that_may_not_be_read_are_told_of(folder, monkeypatch, refused):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).suffix != ".safetensors")  # root may read everything
    with refused(f"{folder / 'model.safetensors'}: the file cannot be read; change its permissions"):
        load_detector(str(folder))


def test_pickles_are_refused(folder, refused):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for settings in ({}, {"use_safetensors": False}):
        with refused(str(folder), "pickles", "safetensors"):
            AutoModel.from_pretrained(folder, **settings)


def test_loading_info_on_request(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.is_fitted
    assert not info["missing_keys"]


def test_a_detector_with_new_weights_has_no_reference(folder, caplog):
    """Else it would go on giving scores and verdicts, of weights that nothing has trained."""
    model = AutoModel.from_pretrained(folder, projection_size=5, ignore_mismatched_sizes=True)
    assert "begin anew" in caplog.text
    assert (model.is_fitted, model.calibration.is_calibrated, model.config.num_calibration_scores) == (False, False, 0)
    assert AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True).calibration.is_calibrated


def test_loading_under_the_meta_device_is_not_told_of_as_damage(folder):
    with torch.device("meta"), pytest.raises(RuntimeError, match="from_config"):
        AutoModel.from_pretrained(folder)


def test_shards_of_an_earlier_save_are_replaced(folder):
    model = AutoModel.from_pretrained(folder)
    for settings in ({"max_shard_size": "2KB"}, {}):
        model.calibrate([images(9, seed=len(settings))], progress=False)
        model.save_pretrained(folder, **settings)
        loaded = AutoModel.from_pretrained(folder)
        assert torch.equal(loaded.calibration.scores, model.calibration.scores)
        assert (folder / "model.safetensors.index.json").exists() == bool(settings)


def test_variants_of_the_weights_lie_side_by_side(folder):
    model = AutoModel.from_pretrained(folder)
    for variant in ("fp16", None):
        for settings in ({"max_shard_size": "2KB"}, {}):
            model.save_pretrained(folder, variant=variant, **settings)
            for each in ("fp16", None):
                assert torch.equal(AutoModel.from_pretrained(folder, variant=each).reference.bank, model.reference.bank)
    assert sorted(path.name for path in folder.glob("model*.safetensors*")) == ["model.fp16.safetensors", "model.safetensors"]


def test_loaded_tensors_are_aligned_as_torch_aligns_them(folder):
    """A matrix-vector product with weights mapped at another address differs in its last bits."""
    assert all(tensor.data_ptr() % 64 == 0 for tensor in AutoModel.from_pretrained(folder).state_dict().values())


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


RESNET = {"model_type": "small_resnet", "num_channels": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_calibration_scores": 10**8}, ["calibration.scores", "GiB"]),
        ({"num_calibration_scores": 10**12}, ["num_calibration_scores"]),
        ({"bank_size": 10**12}, ["bank_size"]),
        ({"bank_size": 10**9, "max_bank_size": 10**9}, ["reference.bank", "GiB"]),
        ({"projection_size": 10**9}, ["projection_size"]),
        ({"projection_size": 2**16}, ["GiB"]),
        ({"image_size": 10**9}, ["image_size"]),
        ({"num_test_views": 10**12}, []),
        ({"num_labels": 10**6}, ["num_labels"]),
        ({"backbone_config": {**RESNET, "hidden_sizes": [10**9], "depths": [1]}}, ["hidden_sizes"]),
        ({"backbone_config": {**RESNET, "hidden_sizes": [[10**30]], "depths": [1]}}, ["hidden_sizes", "no network's"]),
        ({"backbone_config": {**RESNET, "hidden_sizes": [8], "depths": [10**9]}}, ["depths"]),
        ({"backbone_config": {**RESNET, "hidden_sizes": [8], "depths": [10**5]}}, ["depths"]),
        ({"backbone_config": {"model_type": "hgnet_v2", "stage_num_blocks": [300] * 4}}, ["stage_num_blocks"]),
        ({"backbone_config": {**RESNET, "auto_map": {"AutoBackbone": "evil.Evil", "AutoConfig": "evil.Evil"}}}, ["auto_map"]),
        ({"backbone_config": {**RESNET, "hidden_sizes": [8], "depths": [1], "num_labels": 10**6}}, ["num_labels"]),
        ({"backbone_config": {"model_type": "evil"}}, ["evil", "backbone"]),
        ({"backbone_config": {"model_type": "gpt2"}}, ["gpt2", "backbone"]),
        ({"backbone_config": {"model_type": ["small_resnet"]}}, ["model_type"]),
        ({"attn_implementation": "someone/kernel"}, ["attn_implementation", "someone/kernel"]),
        ({"attn_implementation": {"": "someone/kernel"}}, ["attn_implementation"]),
        ({"attn_implementation": 3}, ["attn_implementation"]),
        ({"transformers_weights": "../model.safetensors"}, ["transformers_weights"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
    ],
)
def test_a_hostile_config_is_refused_at_once(folder, changes, words, refused):
    edit_config(folder, **changes)
    most = psutil.Process().memory_info().vms + 2 * 2**30  # beyond what the tests before have taken
    resource.setrlimit(resource.RLIMIT_AS, limit := (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    started = time.monotonic()
    try:
        with refused(*words):
            AutoModel.from_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit[1], limit[1]))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "changes",
    [{"image_size": "8"}, {"auto_map": None}, {"model_type": []}, {"dtype": "x" * 10**4}, {"backbone_config": {**RESNET, "id2label": 0}}],
)
def test_a_damaged_config_is_told_in_one_line(folder, changes, refused):
    edit_config(folder, **changes)
    with refused(folder):
        load_detector(str(folder))


PLAUSIBLE = {
    "num_layers": [500, 500],
    "trained_betas": [0.1] * 1000,
    "num_labels": 2**15,
    "image_size": 2**20,
    "least": -math.inf,
    "name": None,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", [500, 501]),
        ("trained_betas", [0.1] * 1001),
        ("num_labels", 2**15 + 1),
        ("image_size", 2**20 + 1),
        ("least", -(2.0**21)),
    ],
)
def test_what_a_network_may_have_and_one_more(name, value, refused):
    check_attention("eager")
    check_plausible({**PLAUSIBLE, "more": PLAUSIBLE}, "config")
    with refused(f"config.{name}"):
        check_plausible(PLAUSIBLE | {name: value}, "config")
    with refused(f"config.more.{name}"):
        check_plausible({"more": {name: value}}, "config")


def test_files_may_lack_four_times_what_they_hold(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("hf_anomaly.untrusted._FREE_BYTES", 0)
    file = str(tmp_path / "model.safetensors")
    save_file({"weight": torch.zeros(9, 9)}, file)
    model = torch.nn.Linear(9, 9, bias=False)
    model.register_buffer("more", torch.zeros(Path(file).stat().st_size))
    check_memory(model, [file], "here")
    model.register_buffer("more", torch.zeros(Path(file).stat().st_size + 1))
    with refused("here", "more"):
        check_memory(model, [file], "here")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "model.bin", "..\\outside.safetensors", 1, [1]])
def test_an_index_names_files_beside_it_only(folder, shard, refused):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model.safetensors.index.json"):
        AutoModel.from_pretrained(folder)
    for damaged in ("{", "{}", "1", "[]", '{"weight_map": []}'):
        (folder / "model.safetensors.index.json").write_text(damaged)
        with refused("model.safetensors.index.json", "no index"):
            AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1e10}),
        ("unet/config.json", {"layers_per_block": 10**6}),
    ],
)
def test_a_hostile_dissolver_is_refused(tmp_path, file, changes, refused):
    DiffusionDissolver(build_unet(8, 1, (8, 16)), build_scheduler()).save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with refused(*changes):
        DiffusionDissolver.from_pretrained(tmp_path)


def test_a_detector_of_ones_own_code(tmp_path):
    """Registered as any transformers model: nothing in its folder says that the package has the class."""
    AutoConfig.register("from_elsewhere", ConfigFromElsewhere)
    AutoModel.register(ConfigFromElsewhere, ModelFromElsewhere)
    model = ModelFromElsewhere(ConfigFromElsewhere(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    model.fit_reference([images(6)], progress=False).eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ModelFromElsewhere
    assert loaded(images(3, 1)).scores.tolist() == model(images(3, 1)).scores.tolist()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    write_card(tmp_path, loaded)
    assert f"import {__name__}  # the code of ModelFromElsewhere" in (tmp_path / "README.md").read_text()
