"""What can stand in a table's column: detectors to train and trivial baselines, by name; and for how long each is trained."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import set_seed

from ..data import OneClassSplits, load_unlabelled
from ..detector import AnomalyDetector, AnomalyDetectorConfig
from ..detectors.addp.configuration_addp import ADDPConfig
from ..detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from ..detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from ..detectors.shared_ae.modeling_shared_ae import SharedAEModel
from ..image_processing import AnomalyImageProcessor
from ..metrics import image_metrics
from ..ops import baselines
from ..training import AnomalyTrainingArguments
from ..training.denoising import denoising_arguments, pretrain
from ..training.evaluation import write_scores
from ..training.runs import train_detector
from .budgets import SCORES_FILE, CellData, Method, Training, detector_settings
from .contrastive import CONTRASTIVE_METHODS

Builder = Callable[[Any, OneClassSplits, AnomalyImageProcessor, AnomalyTrainingArguments], AnomalyDetector]


@dataclass(frozen=True)
class Trained(Method):
    """A detector that is trained.

    Attributes:
        build: (cell, splits, processor, arguments) → the detector to train. None: not implemented.
        lengths: budget → how long.
        config: the detector's configuration; None: not implemented.
    """

    title: str
    build: Builder | None
    lengths: dict[str, Training]
    config: AnomalyDetectorConfig | None = None

    @property
    def is_implemented(self) -> bool:
        return self.build is not None

    def settings(self, cell) -> dict:
        return {**vars(self.lengths[cell.budget]), "detector": detector_settings(self.config)}

    def run(self, cell, data: CellData, folder: Path, command: list[str], required: list[Path]) -> dict:
        """Trains and evaluates; see `train_detector`. `folder` holds the detector then."""
        started = time.time()
        args = self.lengths[cell.budget].arguments(len(data.splits.train), cell.seed, folder)
        set_seed(cell.seed)
        model = self.build(cell, data.splits, data.processor, args)
        return train_detector(model, data.processor, data.splits, args, started=started, command=command, scores_file=folder / SCORES_FILE)


@dataclass(frozen=True)
class Baseline(Method):
    """Scores computed from the pixels, without training: a function of `baselines`."""

    title: str
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def settings(self, cell) -> dict:
        return {}

    def run(self, cell, data: CellData, folder: Path, command: list[str], required: list[Path]) -> dict:
        """Image-level metrics and counts, called as `train_detector` calls them."""
        started, splits = time.time(), data.splits
        labels = np.asarray(splits.test["label"][:])
        scores = self.score(data.train_pixels, data.test_pixels)
        if PartialState().is_main_process:
            write_scores(folder / SCORES_FILE, scores, labels)
        return image_metrics(scores, labels) | {
            "num_train": len(splits.train),
            "num_calibration": 0 if splits.calibration is None else len(splits.calibration),
            "num_normal": int((labels == 0).sum()),
            "num_anomalous": int((labels == 1).sum()),
            "split_hash": splits.split_hash,
            "steps": 0,
            "seconds": round(time.time() - started, 1),
        }


def addp(cell, splits, processor, args, *, mode: str | None = None, from_digits: bool = False) -> ADDPModel:
    """ADDP's detector, ready for its second stage. The first one denoises the same training images, in as many steps and batches as the second.

    Args:
        mode: what the first stage trains, "encoder_decoder" or "decoder"; None: there is none.
        from_digits: begin with an encoder from elsewhere, see `_encoder_of_digits`.
    """
    shape = processor.image_shape
    weights = _encoder_of_digits(**shape, seed=cell.seed, steps=args.max_steps) if from_digits else None
    set_seed(cell.seed)  # the same decoder, whether the encoder was at hand or not
    model = ADDPForPreTraining(ADDPConfig(**shape, pretraining_mode=mode or "encoder_decoder"))
    if weights is not None:
        model.encoder.load_state_dict(weights)
    if mode is None:
        return ADDPModel.from_pretraining(model)
    batch_size, rate = args.per_device_train_batch_size, args.learning_rate
    stage = denoising_arguments(args, "pretrained", learning_rate=rate, batch_size=batch_size, steps=args.max_steps)
    return pretrain(model, splits.train, processor=processor, args=stage)


@lru_cache(maxsize=4)
def _encoder_of_digits(*, image_size: int, num_channels: int, seed: int, steps: int) -> dict:
    """The weights of an encoder that learned, with a decoder of its own, to denoise scikit-learn's 1,797 digits, enlarged to `image_size`."""
    set_seed(seed)
    processor = AnomalyImageProcessor.for_images(image_size, num_channels)
    model = ADDPForPreTraining(ADDPConfig(image_size=image_size, num_channels=num_channels))
    with tempfile.TemporaryDirectory() as folder:
        args = AnomalyTrainingArguments(output_dir=folder, seed=seed, disable_tqdm=True, report_to="none", save_strategy="no")
        stage = denoising_arguments(args, "digits", learning_rate=1e-3, batch_size=32, steps=steps)
        return pretrain(model, load_unlabelled("digits"), processor=processor, args=stage).encoder.state_dict()


SHARED_AE_TRAINING = Training(epochs=100)
ADDP_TRAINING = Training(epochs=100, min_steps=300)  # of each stage; 16 images make one step an epoch
SHARED_AE_LENGTHS = {
    "smoke": replace(SHARED_AE_TRAINING, epochs=1, max_steps=2),
    "laptop": replace(SHARED_AE_TRAINING, epochs=30, max_steps=300),
    "paper": SHARED_AE_TRAINING,
}
ADDP_LENGTHS = {
    "smoke": replace(ADDP_TRAINING, epochs=1, min_steps=2, max_steps=2),
    "laptop": replace(ADDP_TRAINING, min_steps=200, max_steps=200, batch_size=32),
    "paper": ADDP_TRAINING,
}


def _shared_ae(title: str, ablation: str) -> Trained:
    def build(cell, splits, processor, args) -> SharedAEModel:
        return SharedAEModel(SharedAEConfig(**processor.image_shape, ablation=ablation))

    return Trained(title, build, SHARED_AE_LENGTHS, SharedAEConfig(ablation=ablation))


def _addp(title: str, lengths: dict[str, Training] = ADDP_LENGTHS, **first_stage) -> Trained:
    return Trained(title, partial(addp, **first_stage), lengths, ADDPConfig())


BASELINES = tuple(baselines.BASELINES)
METHODS: dict[str, Method] = {
    "shared_ae": _shared_ae("SharedAE", "full"),
    "shared_ae_one": _shared_ae("one EDE", "one"),
    "shared_ae_two": _shared_ae("two EDEs", "two"),
    "autoencoder": Trained("autoencoder alone", None, SHARED_AE_LENGTHS),
    "addp_random": _addp("random init"),
    "addp_random_longer": _addp("random init, the steps of both stages", {name: one.twice() for name, one in ADDP_LENGTHS.items()}),
    "addp_encoder_decoder": _addp("encoder + decoder pretrained", mode="encoder_decoder"),
    "addp_digits": _addp("encoder of digits, random decoder", from_digits=True),
    "addp_decoder": _addp("encoder of digits, decoder pretrained", from_digits=True, mode="decoder"),
    **CONTRASTIVE_METHODS,
    "kdad": Trained("KDAD", None, {}),
    "transformaly": Trained("Transformaly", None, {}),
    "rd4ad": Trained("RD4AD", None, {}),
    "uniad": Trained("UniAD", None, {}),
    "mean_shift": Trained("Mean-shift", None, {}),
    **{name: Baseline(baselines.TITLES[name], score) for name, score in baselines.BASELINES.items()},
}
