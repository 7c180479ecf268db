"""Saving is whole or nothing, brings the companions, and loading refuses what is damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, GaussianDissolver, SmallResNetConfig


def detector(model_class=CSIModel):
    torch.manual_seed(0)
    model = model_class(CSIConfig(image_size=8, projection_size=4, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    model.fit_reference([images(6)], progress=False)
    return model.calibrate([images(19, 1)], progress=False)


def images(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A finished detector's folder, as a run leaves it."""
    folder = tmp_path / "detector"
    detector().save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    GaussianDissolver(3).save_pretrained(folder / "dissolver")
    (folder / "README.md").write_text("# the card")
    (folder / "eval_results.json").write_text("{}")
    return folder


def test_load_and_save_brings_the_companions(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    before, after = contents(folder), contents(tmp_path / "copy")
    before.pop("config.json"), after.pop("config.json")  # transformers writes the time of nothing, but may add its version
    assert after == before
    assert (tmp_path / "copy" / "config.json").is_file()
    assert "dissolver/dissolver_config.json" in after


def test_card_and_results_do_not_follow_a_detector_calibrated_anew(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"preprocessor_config.json", "dissolver"} < names
    assert names.isdisjoint({"README.md", "eval_results.json"})


def test_other_scores_have_no_calibration(folder, tmp_path, caplog):
    x = images(4, 3)
    before = AutoModel.from_pretrained(folder, temperature=0.7).eval()  # a setting of training
    assert before.calibration.is_calibrated
    assert not caplog.text
    after = AutoModel.from_pretrained(folder, score_norm=True).eval()
    assert not torch.allclose(after(x).scores, before(x).scores)
    assert f"{folder} was calibrated for other scores (score_norm was False, now True): its calibration is dropped" in caplog.text
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


def test_companions_already_there_are_kept(folder, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    (target / "README.md").write_text("# mine")
    AutoModel.from_pretrained(folder).save_pretrained(target)
    assert (target / "README.md").read_text() == "# mine"


def test_saving_in_place_keeps_everything_else(folder):
    before = contents(folder)
    model = AutoModel.from_pretrained(folder)
    model.calibrate([images(9, 2)], progress=False)
    model.save_pretrained(folder)
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"config.json", "model.safetensors"}
    assert after.keys() == before.keys()
    assert AutoModel.from_pretrained(folder).calibration.scores.numel() == 9


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


def test_pickles_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for settings in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="safetensors"):
            AutoModel.from_pretrained(folder, **settings)


def test_loading_info_on_request(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.is_fitted
    assert not info["missing_keys"]


def test_shards_of_an_earlier_save_are_replaced(folder):
    model = AutoModel.from_pretrained(folder)
    for settings in ({"max_shard_size": "2KB"}, {}):
        model.calibrate([images(9, seed=len(settings))], progress=False)
        model.save_pretrained(folder, **settings)
        loaded = AutoModel.from_pretrained(folder)
        assert torch.equal(loaded.calibration.scores, model.calibration.scores)
        assert (folder / "model.safetensors.index.json").exists() == bool(settings)


def test_loaded_tensors_are_aligned_as_torch_aligns_them(folder):
    """A matrix-vector product with weights mapped at another address differs in its last bits."""
    assert all(tensor.data_ptr() % 64 == 0 for tensor in AutoModel.from_pretrained(folder).state_dict().values())
