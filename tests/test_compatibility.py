"""Detectors saved by earlier versions load for ever, and score as they did then.

The folders under tests/data were written by the version in their path, by `python tests/test_compatibility.py`, and are never written again: a later
version adds its own beside them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

import hf_anomaly
from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, DIAConfig, DIAModel, SharedAEConfig, SharedAEModel, SmallResNetConfig

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.parent for path in DATA.glob("*/*/recorded.json"))


def pictures(count, first=0):
    """(count, 9, 11) uint8 without any random numbers."""
    index = np.arange(first, first + count)[:, None, None]
    y, x = np.mgrid[:9, :11]
    return np.rint(127.5 * (1 + np.sin(0.7 * x + 0.2 * index * y))).astype(np.uint8)


def scored(folder):
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        scores = model(**processor(list(pictures(6)), return_tensors="pt")).scores
    return {"scores": scores.tolist(), "p_values": model.p_values(scores).tolist(), "flagged": model.is_anomalous(scores).tolist()}


def test_there_is_one_of_every_detector():
    kinds = {json.loads((folder / "config.json").read_text())["model_type"] for folder in FOLDERS}
    assert kinds >= {"csi_anomaly", "dia_anomaly", "shared_ae_anomaly"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(DATA)))
def test_scores_are_as_recorded(folder):
    recorded, found = json.loads((folder / "recorded.json").read_text()), scored(folder)
    assert found["scores"] == pytest.approx(recorded["scores"], rel=1e-3, abs=1e-5)
    assert found["p_values"] == pytest.approx(recorded["p_values"], abs=0.06)  # one calibration score more or less
    assert found["flagged"] == recorded["flagged"]


def write():
    backbone = {"backbone_config": SmallResNetConfig(hidden_sizes=[4, 8], depths=[1, 1]), "projection_size": 4, "num_test_views": 2}
    models = {
        "csi": lambda: CSIModel(
            CSIConfig(image_size=8, score_features="projection", score_whitening=False, score_norm=True, score_shift_logit=True, **backbone)
        ),
        "dia": lambda: DIAModel(DIAConfig(image_size=8, **backbone)),
        "shared_ae": lambda: SharedAEModel(SharedAEConfig(image_size=8, hidden_sizes=[4, 4, 4], latent_size=4)),
    }
    for name, build in models.items():
        folder = DATA / hf_anomaly.__version__ / name
        folder.mkdir(parents=True)  # fails if it is there
        torch.manual_seed(0)
        model, processor = build(), AnomalyImageProcessor.for_images(8, 1)
        batches = [processor(list(pictures(19, first)), return_tensors="pt")["pixel_values"] for first in (6, 20)]
        model.fit_reference(batches[:1], progress=False)
        model.calibrate(batches[1:], false_positive_rate=0.45, progress=False)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "recorded.json").write_text(json.dumps(scored(folder), indent=2) + "\n")


if __name__ == "__main__":
    write()
