"""What can stand in a table's column: detectors to train and trivial baselines, by name; and for how long each is trained."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from ..data import OneClassSplits, prepare
from ..detector import AnomalyDetector
from ..detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from ..detectors.shared_ae.modeling_shared_ae import SharedAEModel
from ..image_processing import AnomalyImageProcessor
from ..metrics import image_metrics
from ..training import AnomalyTrainingArguments
from ..training.runs import train_detector
from . import baselines


@dataclass(frozen=True)
class Budget:
    """How much is spent on a table.

    Attributes:
        max_rows, max_seeds: what is run of each section; None: all.
    """

    title: str
    max_rows: int | None = None
    max_seeds: int | None = None


BUDGETS = {
    "smoke": Budget("smoke: a few steps, which say that it runs and nothing about the method", max_rows=1, max_seeds=1),
    "laptop": Budget("laptop: at most about three minutes of a CPU core a cell"),
    "paper": Budget("paper: as long as it takes"),
}


@dataclass(frozen=True)
class Training:
    """How long, and how, a method is trained.

    Attributes:
        epochs: passes over the training images.
        min_steps, max_steps: bounds of the steps which that makes.
        batch_size: images a step over all processes, or all training images if there are fewer.
        learning_rate: AdamW's peak; the schedule is a cosine.
    """

    epochs: int
    min_steps: int = 1
    max_steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3

    def arguments(self, num_images: int, seed: int, folder: Path) -> AnomalyTrainingArguments:
        """Arguments of a silent run which leaves no checkpoints in its folder."""
        quiet = {"disable_tqdm": True, "report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
        args = AnomalyTrainingArguments(output_dir=str(folder), seed=seed, max_steps=1, learning_rate=self.learning_rate, **quiet)
        batch = min(self.batch_size, num_images)
        args.per_device_train_batch_size = max(1, batch // args.world_size)
        args.max_steps = max(self.min_steps, self.epochs * (num_images // batch))
        if self.max_steps is not None:
            args.max_steps = min(args.max_steps, self.max_steps)
        return args


@dataclass(frozen=True)
class CellData:
    """What the cells of one dataset, protocol and seed share.

    Attributes:
        protocol: the one in use.
    """

    splits: OneClassSplits
    processor: AnomalyImageProcessor
    protocol: str

    @cached_property
    def train_pixels(self) -> np.ndarray:
        return self._pixels(self.splits.train)

    @cached_property
    def test_pixels(self) -> np.ndarray:
        return self._pixels(self.splits.test)

    def _pixels(self, dataset) -> np.ndarray:
        prepared = prepare(dataset, self.processor)
        batches = (prepared[start : start + 1024]["pixel_values"] for start in range(0, len(prepared), 1024))
        return np.concatenate([np.stack(batch).reshape(len(batch), -1) for batch in batches])


Builder = Callable[[Any, OneClassSplits, AnomalyImageProcessor, AnomalyTrainingArguments], AnomalyDetector]


@dataclass(frozen=True)
class Trained:
    """A detector that is trained.

    Attributes:
        build: (cell, splits, processor, arguments) → the detector to train. None: not implemented.
        lengths: budget → how long.
    """

    title: str
    build: Builder | None
    lengths: dict[str, Training]

    @property
    def is_implemented(self) -> bool:
        return self.build is not None

    def settings(self, budget: str) -> dict:
        """What a result hangs on besides its cell."""
        return vars(self.lengths[budget])

    def run(self, cell, data: CellData, folder: Path, command: list[str]) -> dict:
        """Trains and evaluates; see `train_detector`. `folder` holds the detector then."""
        started = time.time()
        args = self.lengths[cell.budget].arguments(len(data.splits.train), cell.seed, folder)
        set_seed(cell.seed)
        model = self.build(cell, data.splits, data.processor, args)
        return train_detector(model, data.processor, data.splits, args, started=started, command=command)


@dataclass(frozen=True)
class Baseline:
    """Scores computed from the pixels, without training: a function of `baselines`."""

    title: str
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    is_implemented: bool = True

    def settings(self, budget: str) -> dict:
        return {}

    def run(self, cell, data: CellData, folder: Path, command: list[str]) -> dict:
        """Image-level metrics and counts, called as `train_detector` calls them."""
        started, splits = time.time(), data.splits
        labels = np.asarray(splits.test["label"][:])
        scores = self.score(data.train_pixels, data.test_pixels)
        return image_metrics(scores, labels) | {
            "num_train": len(splits.train),
            "num_calibration": 0 if splits.calibration is None else len(splits.calibration),
            "num_normal": int((labels == 0).sum()),
            "num_anomalous": int((labels == 1).sum()),
            "split_hash": splits.split_hash,
            "steps": 0,
            "seconds": round(time.time() - started, 1),
        }


def shared_ae(cell, splits, processor, args, *, ablation: str = "full") -> SharedAEModel:
    """SharedAE with its configuration's defaults."""
    size = processor.size["height"]
    return SharedAEModel(SharedAEConfig(image_size=size, num_channels=processor.num_channels, ablation=ablation))


def addp(pretrain_mode: str | None) -> Builder | None:
    """ADDP's detector after stage one; None while the package has no such detector, and its cells show "not implemented".

    Args:
        pretrain_mode: what stage one trains, "encoder_decoder" or "decoder"; None: there is no stage one.
    """
    return None


SHARED_AE_TRAINING = Training(epochs=100)
ADDP_TRAINING = Training(epochs=100, min_steps=300)  # 16 images make one step an epoch
SHARED_AE_LENGTHS = {
    "smoke": replace(SHARED_AE_TRAINING, epochs=1, max_steps=2),
    "laptop": replace(SHARED_AE_TRAINING, epochs=30, max_steps=500),
    "paper": SHARED_AE_TRAINING,
}
ADDP_LENGTHS = {
    "smoke": replace(ADDP_TRAINING, epochs=1, min_steps=2, max_steps=2),
    "laptop": replace(ADDP_TRAINING, epochs=30, max_steps=500),
    "paper": ADDP_TRAINING,
}

_BASELINES = {
    "mean_intensity": Baseline("mean intensity", baselines.mean_intensity),
    "contrast": Baseline("contrast (negative pixel std)", baselines.contrast),
    "pixel_knn": Baseline("pixel kNN", baselines.pixel_knn),
    "pca_residual": Baseline("PCA residual", baselines.pca_residual),
}
BASELINES = tuple(_BASELINES)
METHODS: dict[str, Trained | Baseline] = {
    "shared_ae": Trained("SharedAE", shared_ae, SHARED_AE_LENGTHS),
    "shared_ae_one": Trained("one EDE", partial(shared_ae, ablation="one"), SHARED_AE_LENGTHS),
    "shared_ae_two": Trained("two EDEs", partial(shared_ae, ablation="two"), SHARED_AE_LENGTHS),
    "autoencoder": Trained("autoencoder alone", None, SHARED_AE_LENGTHS),
    "addp_random": Trained("random init", addp(None), ADDP_LENGTHS),
    "addp_encoder_decoder": Trained("encoder + decoder pretrained", addp("encoder_decoder"), ADDP_LENGTHS),
    "addp_decoder": Trained("decoder pretrained", addp("decoder"), ADDP_LENGTHS),
    **_BASELINES,
}
