"""CSI and DIA in the tables' variants, and the diffusion models that DIA's cells share."""

import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from ..backbones.configuration_small_resnet import SmallResNetConfig
from ..data.recipes import RECIPES
from ..detectors.csi.configuration_csi import CSIConfig
from ..detectors.csi.modeling_csi import CSIModel
from ..detectors.dia.configuration_dia import DIAConfig
from ..detectors.dia.modeling_dia import DIAModel
from ..dissolving import DISSOLVERS, DiffusionDissolver, dissolve_dataset
from ..ops.distributed import local_main_process_first
from ..training.denoising import denoising_arguments, train_dissolver
from ..training.runs import train_detector
from .budgets import SCORES_FILE, CellData, LARSTraining, Method, Training, as_json, detector_settings

STEP_RANGES = tuple((low, low + 100) for low in range(30, 530, 100))  # of Table 2


@dataclass(frozen=True)
class DetectorLength:
    """How long CSI and DIA are trained, and how large they are.

    Attributes:
        variants: dissolved variants of each training image, of which a step takes one.
        backbone: fields of the `SmallResNetConfig` that differ from the detectors' own.
    """

    training: Training
    variants: int = 8
    backbone: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class DissolverLength:
    """How long a diffusion model is trained, and how large it is.

    Attributes:
        max_timestep: it learns the noise levels below this: all that any table dissolves at, so that one model serves them all.
        batch_sizes: images a step at each dissolving resolution.
    """

    steps: int
    batch_sizes: dict[int, int]
    learning_rate: float
    max_timestep: int
    widths: tuple[int, ...] = (32, 64, 64)
    layers: int = 1
    gradient_accumulation: int = 1
    schedule = "cosine"  # no field, as results on disk have none


@dataclass(frozen=True)
class ConstantDissolverLength(DissolverLength):
    """With a learning rate that does not fall, as DIA's authors have it."""

    schedule: str = "constant"


_SMALL_RESNET = {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
_RESNET_18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
DETECTOR_LENGTHS = {
    "smoke": DetectorLength(Training(epochs=1, min_steps=2, max_steps=2, batch_size=8), variants=1),
    "laptop": DetectorLength(Training(epochs=1, min_steps=240, max_steps=240, batch_size=32), variants=4, backbone=_SMALL_RESNET),
    # 200 × 200 images; the peak is that of the authors' code, ten times .1 after 10 of 200 epochs, the paper's text has .001.
    "paper": DetectorLength(LARSTraining(epochs=1, min_steps=1250, max_steps=1250, batch_size=32, learning_rate=1.0), backbone=_RESNET_18),
}
DISSOLVER_LENGTHS = {
    "smoke": DissolverLength(2, {32: 8, 64: 4, 128: 2}, 1e-3, max_timestep=540, widths=(8, 8)),
    "laptop": DissolverLength(250, {32: 32, 64: 8, 128: 2}, 1e-3, max_timestep=540),
    "paper": ConstantDissolverLength(
        25_000, {32: 256, 64: 128, 128: 32}, 8e-5, max_timestep=1000, widths=(32, 64, 128, 256), gradient_accumulation=2
    ),
}  # fmt: skip


# The tables are of the paper's methods, not of the recipe that grew from them: Eq. 10 of the projections, in crops as the authors have them, and of short
# trainings its first factor, the cosine, alone.
AS_PRINTED = {"score_features": "projection", "score_whitening": False, "test_crop_scale": 0.54}
WHOLE_SCORE = {"score_norm": True, "score_shift_logit": True}  # the rest of Eq. 10


@dataclass(frozen=True)
class TrainedDissolver(Method):
    """A diffusion model, trained once for all the cells of a dataset, resolution and seed; it leaves the folder that `DiffusionDissolver` loads.

    Attributes:
        resolution: the dissolving resolution in pixels.
        share: of the normal training images that it sees.
    """

    title: str
    resolution: int = 32
    share: float = 1.0
    keeps_folder = True

    @property
    def least_image_size(self) -> int:
        return 0 if self.resolution == 32 else self.resolution

    def settings(self, cell) -> dict:
        length = asdict(DISSOLVER_LENGTHS[cell.budget])
        length["batch_size"] = length.pop("batch_sizes")[self.resolution]
        return as_json({**length, "resolution": self.resolution, "share": self.share})

    def run(self, cell, data: CellData, folder: Path, command: list[str], required: list[Path]) -> dict:
        """Steps, seconds and counts."""
        started, length = time.time(), DISSOLVER_LENGTHS[cell.budget]
        images = data.splits.train
        if self.share < 1:
            kept = max(1, round(self.share * len(images)))
            images = images.select(np.sort(np.random.RandomState([cell.seed, 2]).permutation(len(images))[:kept]))
        args = Training(epochs=1, batch_size=length.batch_sizes[self.resolution]).arguments(len(images), cell.seed, folder)
        stage = denoising_arguments(
            args, "dissolver", learning_rate=length.learning_rate, batch_size=args.per_device_train_batch_size, steps=length.steps
        )
        stage.gradient_accumulation_steps, stage.lr_scheduler_type = length.gradient_accumulation, length.schedule
        dissolver = train_dissolver(
            images,
            processor=data.processor,
            args=stage,
            resolution=self.resolution,
            block_out_channels=length.widths,
            layers_per_block=length.layers,
            max_timestep=length.max_timestep,
            target=folder,
        )
        shutil.rmtree(stage.output_dir, ignore_errors=True)
        return {
            "num_train": len(images),
            "num_parameters": dissolver.unet.num_parameters(),
            "split_hash": data.splits.split_hash,
            "steps": length.steps,
            "seconds": round(time.time() - started, 1),
        }


@dataclass(frozen=True)
class Dissolving:
    """What makes branch D.

    Attributes:
        kind: a name in DISSOLVERS.
        arguments: what its class is made with; of a diffusion model the resolution alone, for the record.
        t_range: t_min and t_max; None: the dataset's own.
        model: the name of the method that trains the diffusion model; None: it is none.
    """

    kind: str = "diffusion"
    arguments: dict[str, Any] = field(default_factory=dict)
    t_range: tuple[int, int] | None = None
    model: str | None = "dissolver"

    def load(self, cell, required: list[Path]):
        if self.kind == "diffusion":
            low, high = self.range(cell)
            return DiffusionDissolver.from_pretrained(required[0], t_min=low, t_max=high)
        return DISSOLVERS[self.kind](**self.arguments)

    @property
    def resolution(self) -> int:
        return self.arguments.get("resolution", 32)

    def range(self, cell) -> tuple[int, int]:
        return self.t_range or RECIPES[cell.dataset].timesteps

    def settings(self, cell) -> dict:
        more = {} if self.model is None else {"t_range": self.range(cell), "model": CONTRASTIVE_METHODS[self.model].settings(cell)}
        # Flat and with a kernel_size, as results on disk have them.
        flat = {"kernel_size": None, "resolution": self.resolution, **self.arguments}
        return {"kind": self.kind, **flat, "t_range": self.t_range, "model": self.model, **more}


def blur(kind: str, kernel_size: int, resolution: int = 32) -> Dissolving:
    return Dissolving(kind, {"kernel_size": kernel_size, "resolution": resolution}, model=None)


@dataclass(frozen=True)
class Contrastive(Method):
    """DIA, or CSI if there is no branch D.

    Attributes:
        detector: fields of the detector's configuration that differ from the default and `AS_PRINTED`.
        batch_factor: by which the batch is larger.
    """

    title: str
    dissolving: Dissolving | None = None
    detector: dict[str, str] = field(default_factory=dict)
    batch_factor: float = 1.0

    @property
    def least_image_size(self) -> int:
        """Below its resolution dissolving would be that of a smaller one; only the usual 32 px are padded to."""
        return 0 if self.dissolving is None or self.dissolving.resolution == 32 else self.dissolving.resolution

    def requires(self, cell) -> tuple:
        model = None if self.dissolving is None else self.dissolving.model
        return () if model is None else (replace(cell, method=model),)

    def settings(self, cell) -> dict:
        dissolving = None if self.dissolving is None else self.dissolving.settings(cell)
        more = {"dissolving": dissolving, "detector": detector_settings(self._config(cell.budget)), "batch_factor": self.batch_factor}
        return as_json({**asdict(DETECTOR_LENGTHS[cell.budget]), **more})

    def _config(self, budget: str, **shape) -> CSIConfig:
        score = AS_PRINTED | (WHOLE_SCORE if budget == "paper" else {})
        return (CSIConfig if self.dissolving is None else DIAConfig)(**shape, **score, **self.detector)

    def run(self, cell, data: CellData, folder: Path, command: list[str], required: list[Path]) -> dict:
        """Trains and evaluates; see `train_detector`."""
        started, length, splits = time.time(), DETECTOR_LENGTHS[cell.budget], data.splits
        training = replace(length.training, batch_size=round(self.batch_factor * length.training.batch_size))
        args = training.arguments(len(splits.train), cell.seed, folder)
        set_seed(cell.seed)
        shape = data.processor.image_shape
        config = self._config(cell.budget, **shape)
        if length.backbone:
            stride = config.backbone_config.stem_stride
            if cell.budget == "paper":  # ResNet-18's own, and that for CIFAR's 32 px
                stride = 1 if shape["image_size"] <= 32 else 4
            config.backbone_config = SmallResNetConfig(num_channels=shape["num_channels"], stem_stride=stride, **length.backbone)
        about = {"started": started, "command": command, "scores_file": folder / SCORES_FILE}
        if self.dissolving is None:
            return train_detector(CSIModel(config), data.processor, splits, args, **about)
        model, dissolver = DIAModel(config), self.dissolving.load(cell, required).to(args.device)
        with local_main_process_first():
            dissolved = dissolve_dataset(splits.train, dissolver, data.processor, num_variants=length.variants, seed=cell.seed)
        return train_detector(model, data.processor, splits, args, train_dataset=dissolved, **about)


BLUR_KERNELS = (3, 7, 11)
_BLURS = {"gaussian": "Gaussian", "median": "median"}
TYPICAL_KERNELS = {"gaussian": 7, "median": 3}  # of the tables that vary something else
_LARGER = (64, 128)  # px
CONTRASTIVE_METHODS: dict[str, Method] = {
    "dissolver": TrainedDissolver("diffusion model"),
    "dissolver_10_percent": TrainedDissolver("diffusion model of 10 % of the images", share=0.1),
    **{f"dissolver_{size}px": TrainedDissolver(f"diffusion model at {size} px", resolution=size) for size in _LARGER},
    "csi": Contrastive("CSI"),
    "csi_larger_batch": Contrastive("CSI-1.5: a batch 1.5 times as large", batch_factor=1.5),
    "dia": Contrastive("DIA", Dissolving()),
    "dia_b": Contrastive("DIA-(b): twins out of the denominator", Dissolving(), {"similarity_design": "b"}),
    "dia_perm": Contrastive("DIA, perm", Dissolving(), {"shift": "perm"}),
    **{f"dia_t{low}": Contrastive(f"DIA, t {low} to {high}", Dissolving(t_range=(low, high))) for low, high in STEP_RANGES},
    "dia_10_percent": Contrastive("DIA, diffusion model of 10 % of the images", Dissolving(model="dissolver_10_percent")),
    **{
        f"dia_{size}px": Contrastive(
            f"DIA, dissolved at {size} px", Dissolving("diffusion", {"resolution": size}, model=f"dissolver_{size}px")
        )
        for size in _LARGER
    },
    **{
        f"dia_{kind}_{kernel}": Contrastive(f"DIA, {title} blur, kernel {kernel}", blur(kind, kernel))
        for kind, title in _BLURS.items()
        for kernel in BLUR_KERNELS
    },
    **{
        f"dia_{kind}_{kernel}_perm": Contrastive(f"DIA, {_BLURS[kind]} blur, kernel {kernel}, perm", blur(kind, kernel), {"shift": "perm"})
        for kind, kernel in TYPICAL_KERNELS.items()
    },
    **{
        f"dia_{kind}_{kernel}_{size}px": Contrastive(f"DIA, {_BLURS[kind]} blur, kernel {kernel}, at {size} px", blur(kind, kernel, size))
        for kind, kernel in TYPICAL_KERNELS.items()
        for size in _LARGER
    },
}


def dia_at(t_range: tuple[int, int], dataset: str) -> str:
    """The name of DIA with this range of t: of the dataset's own range it is plain DIA."""
    return "dia" if t_range == RECIPES[dataset].timesteps else f"dia_t{t_range[0]}"
