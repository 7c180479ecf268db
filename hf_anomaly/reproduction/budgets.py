"""How much is spent on a table's cells, and what the cells of one division of a dataset share."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from ..data import OneClassSplits
from ..detector import AnomalyDetectorConfig
from ..image_processing import AnomalyImageProcessor
from ..training import AnomalyTrainingArguments
from ..training.baselines import pixel_matrix
from ..training.run_record import settings_of

SCORES_FILE = "scores.npz"  # of the test images, in the folder that a method works in


@dataclass(frozen=True)
class Budget:
    """How much is spent on a table.

    Attributes:
        max_rows, max_seeds: what is run of each section; None: all.
        max_image_size: larger images are shrunk to this, in pixels; None: they are not.
    """

    title: str
    max_rows: int | None = None
    max_seeds: int | None = None
    max_image_size: int | None = None

    def image_size(self, size: int) -> int:
        """What images of this size are shrunk to."""
        return min(size, self.max_image_size or size)


BUDGETS = {
    "smoke": Budget("smoke: a few steps, which say that it runs and nothing about the method", max_rows=1, max_seeds=1, max_image_size=32),
    "laptop": Budget("laptop: at most about three minutes of a CPU core a cell, images of at most 64 px", max_image_size=64),
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

    def twice(self) -> "Training":
        """For twice as many steps."""
        most = None if self.max_steps is None else 2 * self.max_steps
        return replace(self, epochs=2 * self.epochs, min_steps=2 * self.min_steps, max_steps=most)

    def optimizer(self) -> dict:
        """The training arguments that say how weights change."""
        return {"learning_rate": self.learning_rate}

    def arguments(self, num_images: int, seed: int, folder: Path) -> AnomalyTrainingArguments:
        """Arguments of a silent run which leaves no checkpoints in its folder."""
        quiet = {"disable_tqdm": True, "report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
        args = AnomalyTrainingArguments(output_dir=str(folder), seed=seed, max_steps=1, **self.optimizer(), **quiet)
        batch = min(self.batch_size, num_images)
        args.per_device_train_batch_size = max(1, batch // args.world_size)
        args.max_steps = max(self.min_steps, self.epochs * (num_images // batch))
        if self.max_steps is not None:
            args.max_steps = min(args.max_steps, self.max_steps)
        return args


@dataclass(frozen=True)
class LARSTraining(Training):
    """As the authors of CSI and DIA train.

    Attributes:
        learning_rate: LARS' peak.
        warmup: the share of the steps in which it rises.
        ema_decay: of averaged weights; 0: the last ones are taken.
    """

    warmup: float = 0.05
    weight_decay: float = 1e-6
    ema_decay: float = 0.0

    def optimizer(self) -> dict:
        decays = {"weight_decay": self.weight_decay, "ema_decay": self.ema_decay}
        return {"lars": True, "learning_rate": self.learning_rate, "warmup_steps": self.warmup, **decays}


def detector_settings(config: AnomalyDetectorConfig) -> dict:
    """A configuration's fields, as JSON holds them, except for the images' shape and the encoder; for `Method.settings`."""
    apart = {*PreTrainedConfig.__dataclass_fields__, "image_size", "num_channels", "backbone_config"}
    return as_json({name: value for name, value in settings_of(config).items() if name not in apart})


def as_json(settings: dict) -> dict:
    """The values that come back from a JSON file."""
    return json.loads(json.dumps(settings))


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
        return pixel_matrix(self.splits.train, self.processor)

    @cached_property
    def test_pixels(self) -> np.ndarray:
        return pixel_matrix(self.splits.test, self.processor)


class Method(ABC):
    """Whatever a cell can run.

    Attributes:
        title: its name in reports.
        keeps_folder: whether other cells need the folder that it writes.
        least_image_size: at a budget with smaller images it would not be what its title says, and is not run.
    """

    title: str
    is_implemented: bool = True
    keeps_folder: bool = False
    least_image_size: int = 0

    @abstractmethod
    def settings(self, cell) -> dict:
        """What a result depends on besides its cell, as JSON holds it."""

    def requires(self, cell) -> tuple:
        """The cells whose folders `run` needs."""
        return ()

    @abstractmethod
    def run(self, cell, data: CellData, folder: Path, command: list[str], required: list[Path]) -> dict:
        """Runs a cell and gives its results.

        Args:
            folder: to work in. The test images' scores go to `SCORES_FILE` there, see `write_scores`.
            command: the command line, for the results.
            required: the folders of the cells that it requires.
        """
