"""Trains, fits, calibrates and scores tiny detectors; run as one process and as two by test_distributed_training.py.

python tests/distributed_run.py FOLDER WORLD_SIZE
"""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_anomaly import (
    ADDPConfig,
    ADDPForPreTraining,
    AnomalyImageProcessor,
    DIAConfig,
    DIAModel,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
)
from hf_anomaly.data import prepare
from hf_anomaly.dissolving import DenoisingModel, DiffusionDissolver, build_scheduler, build_unet, dissolve_dataset
from hf_anomaly.training import AnomalyTrainer, AnomalyTrainingArguments, DenoisingTrainer, DenoisingTrainingArguments

SIZE, GLOBAL_BATCH, STEPS = 8, 8, 4
TRAIN, CALIBRATION, TEST = 19, 7, 13  # odd: the last batches are padded under two processes
TILES = {"cached": 1, "on the fly": 2, "adamw": 1}
BANK = 50  # fewer than there are tiles, so that three of four are drawn, and then 50 of 57
LOSSES = ("contrastive_loss", "shift_loss", "ede1_loss", "ede2_loss")  # of all methods
PROCESSOR = AnomalyImageProcessor.for_images(SIZE, 1)


class FirstGradient(TrainerCallback):
    """The gradients of step 1, as the optimizer sees them."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            # DDP calls the model's parameters module.….
            self.gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class StatisticsInMidTraining(TrainerCallback):
    """The running means of every process, (W, channels), as an evaluation after step 2 sees them."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with self.trainer.averaged_weights():
                mean = next(value for name, value in self.trainer.model.named_buffers() if name.endswith("running_mean"))
                self.means = self.trainer.accelerator.gather(mean[None].clone())


def images(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)
    columns = {"image": [PILImage.fromarray(array) for array in pixels], "label": [0] * count}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=["normal", "anomaly"])}))


def stream(split):
    """The rows of a dataset as a stream of two shards; what is left of the first for a last batch comes before the second's whole ones."""
    return IterableDataset.from_generator(_rows, split.features, {"split": split, "parts": [range(1), range(1, len(split))]})


def _rows(split, parts):  # no local function: where processes are not forked, workers are sent it
    for part in parts:
        yield from split.select(part)


def diffusion():
    torch.manual_seed(7)
    return DiffusionDissolver(build_unet(SIZE, 1, (8, 8)), build_scheduler())


def arguments(folder, optim):
    return {
        "output_dir": str(folder / "run"),
        "max_steps": STEPS,
        "optim": optim,
        "learning_rate": 0.05 if optim == "sgd" else 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "ema_decay": 0.5,
        "use_cpu": True,
    }


def main(folder, world_size):
    folder = Path(folder)
    results = {}

    def train(trainer, name, callback):
        assert trainer.args.world_size == world_size, trainer.args.world_size
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        for key in ("loss", *LOSSES):
            results[f"{name}/{key}"] = torch.tensor([entry[key] for entry in history if key in entry], dtype=torch.float64)
        results.update({f"{name}/gradient/{key}": value for key, value in callback.gradients.items()})
        results.update({f"{name}/weight/{key}": value.detach() for key, value in trainer.model.named_parameters()})

    for name, optim in (("cached", "sgd"), ("on the fly", "sgd"), ("adamw", "adamw_torch")):
        torch.manual_seed(3)
        backbone = SmallResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], norm="group")
        config = DIAConfig(
            image_size=SIZE, tiles=TILES[name], backbone_config=backbone, projection_size=8, num_test_views=2, max_bank_size=BANK
        )
        model = DIAModel(config)
        train_images = images(TRAIN, 0)
        callback = FirstGradient()
        if name == "on the fly":
            model.dissolver = diffusion()
            train_dataset = train_images
        else:
            cache = folder / f"cache-{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}"
            train_dataset = dissolve_dataset(train_images, diffusion(), PROCESSOR, num_variants=3, cache_dir=cache)
        batch = GLOBAL_BATCH // world_size
        args = AnomalyTrainingArguments(
            **arguments(folder, optim), per_device_train_batch_size=batch, per_device_eval_batch_size=batch, false_positive_rate=0.2
        )
        trainer = AnomalyTrainer(
            model,
            args,
            train_dataset=prepare(train_dataset, PROCESSOR),
            reference_dataset=prepare(train_images, PROCESSOR),
            calibration_dataset=prepare(images(CALIBRATION, 1), PROCESSOR),
            callbacks=[callback],
        )
        train(trainer, name, callback)
        trainer.fit_reference()
        trainer.calibrate()
        results |= {
            f"{name}/bank": model.reference.bank,
            f"{name}/calibration": model.calibration.scores,
            f"{name}/threshold": model.calibration.threshold,
            f"{name}/scores": torch.from_numpy(trainer.predict(prepare(images(TEST, 2), PROCESSOR)).predictions),
        }

    trainer.args.dataloader_num_workers = 2
    results["adamw/streamed"] = trainer.score(prepare(stream(images(TEST, 2)), PROCESSOR))[0]

    torch.manual_seed(4)
    config = SharedAEConfig(image_size=SIZE, hidden_sizes=[4, 8, 8], latent_size=6, max_adversarial_weight=0.5, adversarial_margin=0.93)
    model, callback = SharedAEModel(config), FirstGradient()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # images then differ in adv: in a step some processes' share lies below the margin, and others' above
    for network in (model.encoder1, model.encoder2, model.decoder1, model.decoder2):
        for i, layer in enumerate(network):
            if isinstance(layer, torch.nn.BatchNorm2d):  # is not synchronised on CPUs
                network[i] = torch.nn.Identity()
    args = AnomalyTrainingArguments(**arguments(folder, "sgd"), per_device_train_batch_size=GLOBAL_BATCH // world_size)
    train(AnomalyTrainer(model, args, train_dataset=prepare(images(TRAIN, 0), PROCESSOR), callbacks=[callback]), "phases", callback)

    torch.manual_seed(4)
    model, callback = SharedAEModel(SharedAEConfig(image_size=SIZE, hidden_sizes=[4, 8, 8], latent_size=6)), StatisticsInMidTraining()
    batch = GLOBAL_BATCH // world_size
    args = AnomalyTrainingArguments(**arguments(folder, "sgd"), per_device_train_batch_size=batch, per_device_eval_batch_size=batch)
    trainer = callback.trainer = AnomalyTrainer(
        model,
        args,
        train_dataset=prepare(images(TRAIN, 0), PROCESSOR),
        calibration_dataset=prepare(images(CALIBRATION, 1), PROCESSOR),
        callbacks=[callback],
    )
    trainer.train()
    trainer.fit_reference()
    trainer.calibrate()
    results |= {"batch norm/means": callback.means, "batch norm/calibration": model.calibration.scores}
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / f"batch norm {world_size}")
        saved = SharedAEModel.from_pretrained(folder / f"batch norm {world_size}")
        pixel_values = torch.stack(trainer.calibration_dataset[:]["pixel_values"])
        results["batch norm/rescored"] = saved.score([pixel_values], progress=False)[0].sort().values

    torch.manual_seed(5)
    callback = FirstGradient()
    args = DenoisingTrainingArguments(**arguments(folder, "sgd"), per_device_train_batch_size=GLOBAL_BATCH // world_size)
    denoising = DenoisingModel(build_unet(SIZE, 1, (8, 8)), build_scheduler())
    trainer = DenoisingTrainer(denoising, args, train_dataset=prepare(images(TRAIN, 0), PROCESSOR), callbacks=[callback])
    train(trainer, "dissolver", callback)

    torch.manual_seed(6)
    callback = FirstGradient()
    args = DenoisingTrainingArguments(**arguments(folder, "sgd"), per_device_train_batch_size=GLOBAL_BATCH // world_size)
    pretraining = ADDPForPreTraining(ADDPConfig(image_size=SIZE, hidden_sizes=[8, 8], norm="group"))
    trainer = DenoisingTrainer(pretraining, args, train_dataset=prepare(images(TRAIN, 0), PROCESSOR), callbacks=[callback])
    train(trainer, "pretraining", callback)

    if trainer.is_world_process_zero():
        save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{world_size}.safetensors")
    trainer.accelerator.wait_for_everyone()
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
