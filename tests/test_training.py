import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands.running import SCRIPTS, run
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from hf_anomaly import (
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DIAConfig,
    DIAModel,
    GaussianDissolver,
    InputError,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetBackbone,
    SmallResNetConfig,
    load_one_class,
    train_detector,
)
from hf_anomaly.data import prepare
from hf_anomaly.dissolving import DenoisingModel, DiffusionDissolver, build_scheduler, build_unet, dissolve_dataset
from hf_anomaly.ops.tiles import cut_tiles
from hf_anomaly.training import AnomalyTrainer, AnomalyTrainingArguments, DenoisingTrainer, DenoisingTrainingArguments
from hf_anomaly.training.lars import LARS
from hf_anomaly.training.phases import PhasedOptimizer, only

datasets.disable_progress_bars()

SIZE, BATCH, EPOCH = 8, 4, 5  # 5 steps an epoch
PROCESSOR = AnomalyImageProcessor.for_images(SIZE, 1)


def images(count, seed=0, anomalous=0):
    """Blurry normals, then noise."""
    rng = np.random.default_rng(seed)
    ramps = np.linspace(40, 200, SIZE)[None, :, None] + rng.integers(-30, 30, (count - anomalous, 1, SIZE))
    pixels = np.concatenate([ramps, rng.integers(0, 255, (anomalous, SIZE, SIZE))]).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(array) for array in pixels], "label": [0] * (count - anomalous) + [1] * anomalous}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=["normal", "anomaly"])}))


def diffusion():
    torch.manual_seed(7)
    return DiffusionDissolver(build_unet(SIZE, 1, (8, 8)), build_scheduler())


def detector(config_class=CSIConfig, norm="batch", **settings):
    torch.manual_seed(3)
    backbone = SmallResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], norm=norm)
    config = config_class(image_size=SIZE, backbone_config=backbone, projection_size=8, num_test_views=2, **settings)
    return (DIAModel if config_class is DIAConfig else CSIModel)(config)


def adversaries(**settings):
    torch.manual_seed(3)
    return SharedAEModel(
        SharedAEConfig(
            image_size=SIZE, hidden_sizes=[4, 8, 8], latent_size=6, max_adversarial_weight=1, adversarial_margin=None, **settings
        )
    )


@pytest.fixture
def make(tmp_path):
    """Makes a trainer of one of the kinds below, always of the same initial weights and images."""

    def make(
        kind="csi", folder="run", *, eval_dataset=None, train_dataset=None, callbacks=None, optimizers=None, metrics=None, **arguments
    ):
        common = {
            "output_dir": str(tmp_path / folder),
            "max_steps": 12,
            "per_device_train_batch_size": BATCH,
            "logging_steps": 1,
            "save_strategy": "no",
            "ema_decay": 0.9,
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
        } | arguments
        train_dataset = images(BATCH * EPOCH) if train_dataset is None else train_dataset
        if kind == "dissolver":
            torch.manual_seed(5)
            model = DenoisingModel(build_unet(SIZE, 1, (8, 8)), build_scheduler())
            args = DenoisingTrainingArguments(**common)
            return DenoisingTrainer(model, args, train_dataset=prepare(train_dataset, PROCESSOR), callbacks=callbacks)
        model = adversaries() if kind == "phases" else detector(CSIConfig if kind == "csi" else DIAConfig)
        if kind == "cached":
            train_dataset = dissolve_dataset(train_dataset, diffusion(), PROCESSOR, num_variants=3, cache_dir=tmp_path / "cache")
        elif kind == "on the fly":
            model.dissolver = diffusion()
        return AnomalyTrainer(
            model,
            AnomalyTrainingArguments(**common),
            train_dataset=prepare(train_dataset, PROCESSOR),
            eval_dataset=prepared(eval_dataset),
            processing_class=PROCESSOR,
            callbacks=callbacks,
            compute_metrics=metrics,
            **({} if optimizers is None else {"optimizers": optimizers(model)}),
        )

    return make


def prepared(dataset):
    if isinstance(dataset, dict):
        return {name: prepared(part) for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset, PROCESSOR)


def losses(trainer):
    """[(step, loss, named losses …), …] as logged."""
    names = ("step", "loss", "contrastive_loss", "shift_loss", "ede1_loss", "ede2_loss")
    return [tuple(entry.get(name) for name in names) for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# Reproducing


def test_the_seed_decides(make):
    runs = {}
    for folder, seed in (("first", 1), ("again", 1), ("other", 2)):
        trainer = make("on the fly", folder, seed=seed, max_steps=6)
        trainer.train()
        runs[folder] = losses(trainer), weights(trainer)
        torch.rand(3)  # the state that a run leaves or finds must not matter
    assert runs["first"][0] == runs["again"][0]
    assert_same(runs["first"][1], runs["again"][1])
    assert [entry[1] for entry in runs["first"][0]] != [entry[1] for entry in runs["other"][0]]


def test_training_leaves_the_global_random_state_of_a_step_alone(make):
    trainer = make(max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    before = torch.get_rng_state()
    trainer.compute_loss(trainer.model.train(), batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_steps_draw_different_numbers(make):
    """Of one image repeated, views differ by what is drawn alone."""
    one = images(1).select([0] * BATCH * EPOCH)

    def views(folder, steps, accumulation):
        seen = []
        trainer = make("csi", folder, max_steps=steps, gradient_accumulation_steps=accumulation, train_dataset=one)
        trainer.model.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach().clone()))
        trainer.train()
        return seen

    accumulated, plain = views("accumulated", 2, 2), views("plain", 2, 1)
    assert len(accumulated) == 4
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(accumulated, 2))
    assert torch.equal(accumulated[0], plain[0])
    assert torch.equal(accumulated[2], plain[1])  # a step's first micro-step, however many there are


class Everything(CSIModel):
    def forward(self, pixel_values, **kwargs):
        return super().forward(pixel_values, **kwargs)


def test_a_forward_that_takes_everything_is_trained_alike(make):
    weights = []
    for kind in (CSIModel, Everything):
        trainer = make("csi", max_steps=2, gradient_accumulation_steps=2)
        model = kind(trainer.model.config)
        model.load_state_dict(trainer.model.state_dict())
        AnomalyTrainer(model, trainer.args, train_dataset=trainer.train_dataset).train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_the_model_ends_with_the_average_of_the_weights(make, decay):
    after_each_step = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after_each_step.append({name: p.detach().double() for name, p in model.named_parameters()})

    trainer = make(callbacks=[Record()], ema_decay=decay, max_steps=6)
    trainer.train()
    average = after_each_step[0]
    for step, current in enumerate(after_each_step[1:], 2):
        d = min(decay, step / (step + 9))  # diffusers' EMAModel starts with small decays
        average = {name: d * average[name] + (1 - d) * current[name] for name in average}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), average[name], rtol=1e-5, atol=1e-6)
    moved = any(not torch.equal(p.detach().double(), after_each_step[-1][name]) for name, p in trainer.model.named_parameters())
    assert moved == (decay > 0)


def test_an_interrupted_training_leaves_no_average(make):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    clean = make(max_steps=5)
    clean.train()
    trainer = make(max_steps=5, callbacks=[Interrupt()])
    initial = weights(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.model.load_state_dict(initial)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert_same(weights(trainer), weights(clean))


def test_named_losses_are_logged(make):
    trainer = make(max_steps=4, logging_steps=2)
    trainer.train()
    assert [entry[0] for entry in losses(trainer)] == [2, 4]
    for _, loss, contrastive, shift, *_ in losses(trainer):
        assert loss == pytest.approx(contrastive + shift, rel=1e-5)  # λ = 1


def test_named_losses_are_of_one_run(make):
    trainer = make(max_steps=3, logging_steps=2)  # the third step's are not logged
    trainer.train()
    trainer.train()
    for _, loss, contrastive, shift, *_ in losses(trainer):
        assert loss == pytest.approx(contrastive + shift, rel=1e-3)


@pytest.mark.parametrize("kind", ["csi", "cached", "phases"])
def test_further_columns_stay_out_of_the_model(make, kind):
    plain, wider = make(kind, "plain", max_steps=3), make(kind, "wider", max_steps=3)
    count = BATCH * EPOCH
    dataset = wider.train_dataset.with_format(None).add_column("patient", [i // 4 for i in range(count)]).add_column("site", ["A"] * count)
    wider.train_dataset = wider.reference_dataset = prepare(dataset, PROCESSOR, extra_columns=["patient", "site"])
    for trainer in (plain, wider):
        trainer.train()
        trainer.fit_reference()
    assert_same(weights(wider), weights(plain))
    assert np.array_equal(*(trainer.predict(plain.train_dataset).predictions for trainer in (wider, plain)))


def test_dissolved_images_are_not_left_out_unnoticed(make):
    trainer = make(max_steps=1)
    trainer.train_dataset = make("cached", "other").train_dataset
    with pytest.raises(TypeError, match="dissolved_pixel_values"):
        trainer.train()


# Faster ways of the same


@pytest.mark.parametrize("kind", ["csi", "on the fly", "phases", "dissolver"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"bf16": True}, 0.05), ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-4)],
    ids=["bf16", "compiled"],
)
def test_faster_ways_train_alike(make, monkeypatch, kind, settings, tolerance):
    """The backend "eager" compiles nothing, but traces the step as the others do: as one graph."""
    if "torch_compile" in settings:
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    plain, faster = make(kind, "plain", max_steps=2), make(kind, "faster", max_steps=2, **settings)
    start = weights(faster)
    for trainer in (plain, faster):
        trainer.train()
    assert [entry[1] for entry in losses(faster)] == pytest.approx([entry[1] for entry in losses(plain)], rel=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in faster.model.parameters())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(faster).items())
    if kind != "dissolver":
        faster.fit_reference()
        assert np.isfinite(faster.predict(faster.train_dataset).predictions).all()


# Phases


class Calls:
    """What each forward of a training run was given: [(phase, epoch, pixel_values), …]."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        self.calls.append((kwargs["phase"], kwargs["epoch"], kwargs["pixel_values"].clone()))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_phases_are_those_of_a_bare_loop(make, accumulation):
    """Two optimizers over overlapping parameters, each with clipping and the schedule."""
    steps, rate, norm = 6, 0.01, 0.1
    trainer = make(
        "phases", max_steps=steps, learning_rate=rate, lr_scheduler_type="linear", max_grad_norm=norm, ema_decay=0, weight_decay=0.1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    seen = Calls(trainer.model.double())  # as rounding is amplified
    trainer.train()
    batches = iter(seen.calls)

    model = adversaries().double().train()
    phases = {"ede1": ("encoder1", "encoder2", "decoder1"), "ede2": ("encoder1", "encoder2", "decoder2")}
    own = {name: [p for part in parts for p in getattr(model, part).parameters()] for name, parts in phases.items()}
    decayed = trainer.get_decay_parameter_names(model)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = {
        name: torch.optim.AdamW(
            [
                {"params": [p for p in own[name] if (names[id(p)] in decayed) == decay], "weight_decay": 0.1 * decay}
                for decay in (True, False)
            ],
        )
        for name in phases
    }
    logged = []
    for step in range(steps):
        # An epoch has 5 batches, so that the third accumulated step of each is of one batch alone.
        count = 1 if accumulation == 2 and step % 3 == 2 else accumulation
        logged.append({})
        for name, optimizer in optimizers.items():
            model.zero_grad()
            for _ in range(count):
                phase, epoch, x = next(batches)
                assert phase == name
                loss = model(x, epoch=epoch, phase=name).loss / count
                loss.backward()
                logged[-1][name] = logged[-1].get(name, 0) + loss.item()
            torch.nn.utils.clip_grad_norm_(own[name], norm)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
    assert next(batches, None) is None
    assert trainer.state.global_step == steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")
    for (_, total, _, _, one, two), expected in zip(losses(trainer), logged, strict=True):
        assert (one, two) == pytest.approx((expected["ede1"], expected["ede2"]), rel=1e-4)
        assert total == pytest.approx(one + two, abs=2e-4)  # Trainer rounds it


def test_a_phase_leaves_the_other_decoder_untouched(make):
    trainer = make("phases", max_steps=7, ema_decay=0, weight_decay=0.1)
    parts = ("encoder1", "encoder2", "decoder1", "decoder2")

    def state():
        return {part: [p.detach().clone() for p in getattr(trainer.model, part).parameters()] for part in parts}

    history = []
    trainer.model.register_forward_pre_hook(lambda *_, **__: history.append(state()))  # before ede1, before ede2, before ede1, …
    trainer.train()
    history.append(state())
    assert len(history) == 15
    for i, (before, after) in enumerate(itertools.pairwise(history)):
        changed = {part for part in parts if not all(map(torch.equal, before[part], after[part]))}
        assert changed == set(parts) - {"decoder2" if i % 2 == 0 else "decoder1"}


def test_200_epochs_stay_finite_with_a_resume_in_the_middle(make, tmp_path):
    """At the printed schedule and a high learning rate, where −adv is at its bound."""
    options = {"train_dataset": images(2 * BATCH), "max_steps": 400, "learning_rate": 0.01, "logging_steps": 67}  # a report at 201
    whole = make("phases", "whole", save_strategy="steps", save_steps=201, save_total_limit=None, **options)
    whole.train()
    assert whole.state.epoch == 200
    history = losses(whole)
    assert [entry[0] for entry in history] == [67, 134, 201, 268, 335]
    bound = 4 * (whole.model.config.alpha + whole.model.config.beta)  # images and latents are in [−1, 1]
    for _, total, _, _, one, two in history:
        assert np.isfinite(total)
        assert -bound <= one
        assert 0 <= two <= bound
    assert history[-1][4] < -1  # the adversary did train
    assert all(torch.isfinite(tensor).all() for tensor in weights(whole).values())
    resumed = make("phases", "resumed", **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-201"))
    assert losses(resumed) == history
    assert_same(weights(resumed), weights(whole))


def test_moments_are_kept_for_each_phase(make, tmp_path):
    make("phases", save_strategy="steps", save_steps=12).train()
    state = torch.load(tmp_path / "run" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert list(state) == ["ede1", "ede2"]
    for phase in state.values():
        assert len(phase["state"]) == sum(len(group["params"]) for group in phase["param_groups"])  # the other decoder is not its own
        assert all(moments["step"] == 12 for moments in phase["state"].values())
    first, second = (state[name]["state"][0]["exp_avg"] for name in state)  # of E1's first convolution, in both
    assert first.shape == second.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("kind", "settings"), [("csi", {}), ("csi", {"lars": True}), ("phases", {})])
def test_a_copied_trainer_trains_the_copy(make, kind, settings):
    trainer = make(kind, max_steps=2, **settings)
    trainer.train()
    twin, before = copy.deepcopy(trainer), weights(trainer)
    twin.train()
    assert_same(weights(trainer), before)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in twin.model.named_parameters())
    trainer.train()
    assert_same(weights(trainer), weights(twin))


def test_half_precision_with_a_scaler_is_refused(make):
    args = make().args
    args.fp16 = True  # set here, as a CPU has none
    with pytest.raises(InputError, match=r"^SharedAEModel trains in phases, which fp16[^\n]*bf16"):
        AnomalyTrainer(adversaries(), args, train_dataset=prepare(images(BATCH), PROCESSOR))


# Evaluating in mid-training


def test_evaluation_does_not_disturb_training(make, tmp_path):
    plain = make("cached", "plain")
    plain.train()
    evaluated = make(
        "cached", "evaluated", eval_dataset=images(11, 1, 5), eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        save_total_limit=None,
    )  # fmt: skip
    evaluated.train()
    scores = [entry for entry in evaluated.state.log_history if "eval_auroc" in entry]
    assert [entry["step"] for entry in scores] == [3, 6, 9, 12]
    assert all(0 <= entry[f"eval_{name}"] <= 1 for entry in scores for name in ("auroc", "average_precision", "fpr_at_95_tpr"))
    assert losses(evaluated) == losses(plain)
    assert_same(weights(evaluated), weights(plain))
    for step in (3, 6, 9, 12):
        folder = tmp_path / "evaluated" / f"checkpoint-{step}"
        assert json.loads((folder / "config.json").read_text())["bank_size"] == 0
        assert load_file(folder / "model.safetensors")["reference.bank"].shape[1] == 0
        assert not DIAModel.from_pretrained(folder).is_fitted


def test_evaluation_scores_the_averaged_weights(make, tmp_path):
    noise = images(40, 1, 40)  # nothing to tell apart: the metrics hang on every weight
    labels = [0, 1] * 20
    noise = noise.remove_columns("label").add_column("label", labels, feature=noise.features["label"])
    options = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6, "max_steps": 6, "learning_rate": 0.03}
    trainer = make(eval_dataset=noise, **options)
    trainer.train()
    [logged] = [(entry["eval_auroc"], entry["eval_average_precision"]) for entry in trainer.state.log_history if "eval_auroc" in entry]

    def predict():
        trainer.model.reset_reference()
        trainer.fit_reference()
        prediction = trainer.predict(prepare(noise, PROCESSOR))
        assert prediction.predictions.shape == (40,)
        assert prediction.label_ids.tolist() == labels
        assert trainer.model.is_fitted  # a fitted detector stays fitted
        return prediction.metrics["test_auroc"], prediction.metrics["test_average_precision"]

    assert predict() == logged  # the model now holds the average
    trainer.model.reset_reference()
    trainer.model.load_state_dict(CSIModel.from_pretrained(tmp_path / "run" / "checkpoint-6").state_dict())
    assert predict() != logged


def test_metrics_of_ones_own(make):
    def metrics(prediction):
        scores, labels = prediction.predictions, prediction.label_ids
        return {"gap": scores[labels == 1].mean() - scores[labels == 0].mean()}  # a NumPy number, which JSON does not know

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "gap", "greater_is_better": True}
    trainer = make(eval_dataset=images(11, 1, 5), metrics=metrics, **options)
    trainer.train()
    gaps = {entry["step"]: entry["eval_gap"] for entry in trainer.state.log_history if "eval_gap" in entry}
    assert list(gaps) == [2, 4]
    assert trainer.state.best_global_step == max(gaps, key=gaps.get)
    trainer.fit_reference()
    found = trainer.evaluate()
    assert {"eval_auroc", "eval_f1_max"} < set(found)
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.metrics["test_gap"] == metrics(prediction)["gap"]


def test_metrics_batch_by_batch_are_asked_for_their_result(make):
    """Else a function written for `batch_eval_metrics` would wait for a last batch."""

    def metrics(prediction, compute_result):
        return {"images": len(prediction.predictions)} if compute_result else None

    trainer = make(eval_dataset=images(11, 1, 5), metrics=metrics, batch_eval_metrics=True, per_device_eval_batch_size=4)
    trainer.fit_reference()
    assert trainer.evaluate()["eval_images"] == 11


def test_several_evaluation_datasets_by_name(make, refused):
    parts = {"here": images(11, 1, 5), "there": images(13, 2, 6)}
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    with refused("metric_for_best_model='auroc'", "here_auroc", "there_f1_max"):
        make(eval_dataset=parts, metric_for_best_model="auroc", **options)
    trainer = make(eval_dataset=parts, metric_for_best_model="there_auroc", max_steps=4, **options)
    trainer.train()
    assert trainer.state.best_metric is not None
    trainer.fit_reference()
    found = trainer.evaluate()
    for name, part in trainer.eval_dataset.items():
        alone = trainer.evaluate(part)
        assert {metric: found[metric.replace("eval_", f"eval_{name}_")] for metric in alone} == alone
        assert trainer.evaluate(name) == alone
    assert trainer.evaluate(trainer.eval_dataset) == found
    with refused("'nowhere'", "here, there"):
        trainer.evaluate("nowhere")


def test_callbacks_hear_of_evaluations_and_predictions(make):
    heard = []

    class Listen(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(metrics)

        on_predict = on_evaluate

    trainer = make(eval_dataset=images(11, 1, 5), callbacks=[Listen()])
    trainer.fit_reference()
    found = [trainer.evaluate(), trainer.predict(trainer.eval_dataset).metrics]
    assert heard == found
    assert ["eval_auroc" in metrics for metrics in found] == [True, False]


def test_loaders_for_evaluation_leave_no_image_out(make):
    """Though those for training do, by default."""
    trainer = make(eval_dataset={"here": images(11, 1, 5)}, per_device_eval_batch_size=4)
    part = trainer.eval_dataset["here"]
    assert trainer.args.dataloader_drop_last
    for loader in (trainer.get_eval_dataloader("here"), trainer.get_eval_dataloader(part), trainer.get_test_dataloader(part)):
        found = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(found, torch.stack([row["pixel_values"] for row in part]))


def test_evaluation_starts_its_workers_as_training_does(make):
    trainer = make(dataloader_num_workers=1, dataloader_multiprocessing_context="spawn", dataloader_prefetch_factor=3)
    for loader in (trainer.get_train_dataloader(), trainer.get_test_dataloader(trainer.train_dataset)):
        assert (loader.multiprocessing_context.get_start_method(), loader.prefetch_factor) == ("spawn", 3)


def test_without_labels_there_is_nothing_to_evaluate(make, refused):
    trainer = make(max_steps=2)
    trainer.fit_reference()
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in trainer.train_dataset]
    assert trainer.predict(unlabelled).metrics == {}
    with refused("eval_dataset with labels", "predict"):
        trainer.evaluate(unlabelled)


def test_training_again_starts_unfitted(make):
    trainer = make(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.fit_reference()
    assert trainer.model.is_fitted
    trainer.train()
    assert not trainer.model.is_fitted


def test_no_calibration_images(make):
    trainer = make()
    trainer.fit_reference()
    with pytest.raises(InputError, match=r"^there are no calibration images: .*--calibration_fraction"):
        trainer.calibrate()


def test_no_reference_images(make, refused):
    with refused("reference_dataset", "train_dataset"):
        AnomalyTrainer(detector(), make().args).fit_reference()


def test_a_stream_calibrates(make):
    trainer = make()
    trainer.fit_reference()
    scores = []
    for dataset in (images(10, 3), images(10, 3).to_iterable_dataset()):
        trainer.calibration_dataset = prepare(dataset, PROCESSOR)
        trainer.calibrate()
        scores.append(trainer.model.calibration.scores)
    assert torch.equal(*scores)


def test_arguments_of_another_class_are_refused(tmp_path, refused):
    plain = TrainingArguments(str(tmp_path), report_to="none")
    with refused("AnomalyTrainer takes AnomalyTrainingArguments, not TrainingArguments"):
        AnomalyTrainer(detector(), plain, train_dataset=prepare(images(4), PROCESSOR))
    with refused("AnomalyTrainer takes AnomalyTrainingArguments, not NoneType"):
        AnomalyTrainer(detector())
    with refused("DenoisingTrainer takes DenoisingTrainingArguments, not TrainingArguments"):
        DenoisingTrainer(detector(), plain, train_dataset=prepare(images(4), PROCESSOR))


def test_what_is_no_detector(make, refused):
    trainer = make(max_steps=2)
    for model in (torch.nn.Sequential(detector()), CSIModel, trainer.args):
        with refused("AnomalyDetector", type(model).__name__):
            AnomalyTrainer(model, trainer.args, train_dataset=trainer.train_dataset)
    AnomalyTrainer(torch.compile(detector(), backend="eager"), trainer.args, train_dataset=trainer.train_dataset).train()


@pytest.mark.parametrize("kind", ["csi", "phases"])
def test_every_training_may_begin_with_a_new_model(make, kind):
    """As trials of hyperparameter_search do, which forgets the model in between."""
    given, made = make(kind), []
    given.train()

    def init(trial):
        made.append(adversaries() if kind == "phases" else detector())
        return made[-1]

    trainer = AnomalyTrainer(args=given.args, model_init=init, train_dataset=given.train_dataset)
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert_same(weights(given), weights(trainer))
        trainer.model = None


def test_a_search_is_told_what_is_best(make, refused):
    """Trainer's defaults would choose the detector with the least sum of AUROC and the other metrics."""
    trainer = make()
    for settings in ({}, {"direction": "maximize"}, {"compute_objective": lambda metrics: metrics["eval_auroc"]}):
        with refused("compute_objective", "direction"):
            trainer.hyperparameter_search(**settings)
    with pytest.raises(RuntimeError, match=r"optuna|model_init"):  # Trainer's: not installed, or no model that it can make anew
        trainer.hyperparameter_search(compute_objective=lambda metrics: metrics["eval_auroc"], direction="maximize", backend="optuna")


def test_a_saved_detector_is_trained_again_unfitted(make, tmp_path):
    """A reference of the weights before would score all evaluations in mid-training."""
    done = make(max_steps=2)
    done.train()
    done.fit_reference()
    done.model.save_pretrained(tmp_path / "saved")
    fitted = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            fitted.append(model.is_fitted)

    def load():
        return CSIModel.from_pretrained(tmp_path / "saved")

    for model in ({"model": load()}, {"model_init": load}):
        AnomalyTrainer(args=done.args, train_dataset=done.train_dataset, callbacks=[Watch()], **model).train()
    assert fitted == [False] * 4


def test_fewer_images_than_a_batch(make, monkeypatch):
    with pytest.raises(InputError, match="3 training images, fewer than one batch of 4: set --per_device_train_batch_size"):
        make(train_dataset=images(3)).train()
    with pytest.raises(InputError, match="stream has fewer training images than the 4 of a step"):
        make(train_dataset=images(3).to_iterable_dataset()).train()
    trainer = make(train_dataset=images(3), per_device_train_batch_size=1)
    monkeypatch.setattr(AnomalyTrainingArguments, "world_size", 4)
    with pytest.raises(InputError, match="3 training images, fewer than one batch of 4: start fewer processes"):
        trainer.train()


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [
        (10, {}, [4, 4, 4, 4]),
        (10, {"dataloader_drop_last": False}, [4, 4, 2, 4]),
        (12, {"gradient_accumulation_steps": 2, "max_steps": 2}, [4, 4, 4, 4]),  # the third batch of a pass makes no step
    ],
)
def test_the_last_batch_of_a_stream(make, monkeypatch, count, settings, expected):
    sizes, train = [], CSIModel.compute_losses
    monkeypatch.setattr(CSIModel, "compute_losses", lambda self, x, **inputs: sizes.append(len(x)) or train(self, x, **inputs))
    make(train_dataset=images(count).to_iterable_dataset(), **{"max_steps": 4} | settings).train()
    assert sizes == expected


# Checkpoints


@pytest.mark.parametrize("kind", ["csi", "cached", "on the fly", "dissolver", "phases"])
def test_a_resumed_run_is_the_uninterrupted_one(make, kind, tmp_path):
    whole = make(kind, "whole", save_strategy="steps", save_steps=1, save_total_limit=None)
    whole.train()
    for step in (EPOCH, EPOCH + 1):  # at the end of an epoch, and within the next one
        resumed = make(kind, f"resumed-{step}")
        with torch.no_grad():
            next(resumed.model.parameters()).zero_()  # all of the state has to come from the checkpoint
        torch.manual_seed(step)
        resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(losses(resumed)) == 12
        assert losses(resumed) == losses(whole)
        assert_same(weights(resumed), weights(whole))


def test_of_false_alarms_fewer_are_better(tmp_path):
    options = {"output_dir": str(tmp_path), "report_to": "none", "metric_for_best_model": "fpr_at_95_tpr"}
    assert AnomalyTrainingArguments(**options).greater_is_better is False
    assert AnomalyTrainingArguments(**options, greater_is_better=True).greater_is_better is True
    assert AnomalyTrainingArguments(**options | {"metric_for_best_model": "auroc"}).greater_is_better is True


@pytest.mark.parametrize("on_the_fly", [True, False])
def test_a_run_from_python_resumes_with_the_same_dissolver_alone(tmp_path, refused, on_the_fly):
    splits = load_one_class("digits")

    def run(kernel_size, **more):
        model, dissolver = detector(DIAConfig), GaussianDissolver(kernel_size)
        options = {"max_steps": 2, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **more}
        args = AnomalyTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=BATCH, **options)
        dissolved = None
        if on_the_fly:
            model.dissolver = dissolver
        else:
            dissolved = dissolve_dataset(splits.train, dissolver, PROCESSOR, cache_dir=tmp_path / f"cache{kernel_size}")
        return train_detector(model, PROCESSOR, splits, args, train_dataset=dissolved)

    run(3)
    assert run(3, max_steps=3, resume_from_checkpoint=True)["steps"] == 3
    with refused("belongs to another run", "dissolving."):
        run(5, max_steps=4, resume_from_checkpoint=True)


def test_what_train_detector_refuses(tmp_path, refused):
    with refused("TrainingArguments"):
        train_detector(detector(), PROCESSOR, load_one_class("digits"), TrainingArguments(str(tmp_path)))
    args = AnomalyTrainingArguments(output_dir=str(tmp_path), report_to="none")
    with refused("OneClassSplits", "load_one_class", "got Dataset"):
        train_detector(detector(), PROCESSOR, images(8), args)
    with refused("evaluation_only"):
        train_detector(detector(), PROCESSOR, load_one_class("digits", evaluation_only=True), args)


@pytest.mark.parametrize("kind", ["csi", "phases"])
def test_lars(make, kind, tmp_path):
    options = {"lars": True, "learning_rate": 1.0, "warmup_steps": 0.25, "weight_decay": 1e-6}
    whole = make(kind, "whole", save_strategy="steps", save_steps=4, save_total_limit=None, **options)
    whole.train()
    assert losses(whole)[-1][1] < losses(whole)[0][1]
    resumed = make(kind, "resumed", **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed), weights(whole))
    other = make(kind, "other", **options | {"lars": False, "learning_rate": 1e-3})
    other.train()
    assert losses(other)[-1] != losses(whole)[-1]


def test_a_step_of_lars_is_that_of_the_formula():
    """You et al. 2017, Algorithm 1, in NumPy, with the momentum of torch's SGD."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in ((3, 4), (5,), (2,), (2,), (2,))]
    start[2][:] = 0  # a bias as it begins
    lr, momentum, decay, trust = 0.7, 0.9, 0.1, 0.01
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in start]
    optimizer = LARS(parameters, lr, momentum=momentum, weight_decay=decay, trust=trust)
    expected, velocity = [w.copy() for w in start], [0.0] * 4
    for _ in range(3):
        for i, parameter in enumerate(parameters[:4]):  # the last one has no gradient
            gradient = rng.normal(size=parameter.shape) * (i != 3)
            parameter.grad = torch.tensor(gradient)
            w = expected[i]
            norms = np.sqrt((w**2).sum()), np.sqrt((gradient**2).sum())
            rate = trust * norms[0] / (norms[1] + decay * norms[0]) if min(norms) > 0 else 1.0
            velocity[i] = momentum * velocity[i] + rate * (gradient + decay * w)
            expected[i] = w - lr * velocity[i]
        optimizer.step()
    for parameter, w in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-12)


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.1)


def test_an_optimizer_of_ones_own(make, tmp_path):
    """It is what trains, with its schedule, and is resumed exactly."""
    rates = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    options = {"optimizers": sgd, "ema_decay": 0}
    whole = make("csi", "whole", save_strategy="steps", save_steps=1, save_total_limit=None, callbacks=[Note()], **options)
    whole.train()
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 4 + [0.0005] * 4)
    for step in (EPOCH, EPOCH + 1):
        resumed = make("csi", f"resumed-{step}", **options)
        resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        assert_same(weights(resumed), weights(whole))
    scheduled = make("csi", "scheduled", optimizers=lambda model: (sgd(model)[0], None), lr_scheduler_type="constant", max_steps=2)
    scheduled.train()
    assert scheduled.lr_scheduler.get_last_lr() == [0.05]


class Modal(torch.optim.SGD):
    """As schedule-free optimizers are."""

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_modes_reach_the_optimizers_that_have_them():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    modal = Modal(weights, 0.1)
    phased = PhasedOptimizer({"plain": torch.optim.SGD(weights, 0.1), "modal": modal})
    for mode in ("eval", "train"):
        getattr(phased, mode)()
        assert modal.mode == mode
    weights[0].grad = torch.ones(1)
    assert phased.phase == "plain"
    phased.phase = "modal"
    assert (phased.state, phased.defaults) == (modal.state, modal.defaults)
    phased.zero_grad(set_to_none=False)
    assert weights[0].grad.tolist() == [0]
    phased.zero_grad()
    assert weights[0].grad is None


def test_phases_have_their_own_optimizers(make, refused):
    with refused("SharedAEModel", "leave out optimizers"):
        make("phases", optimizers=sgd)
    layer = torch.nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    with only([], layer):
        assert not layer.weight.requires_grad
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)


@pytest.mark.parametrize("kind", ["cached", "phases"])
def test_resuming_with_accumulation(make, kind, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 5}  # 2.5 steps an epoch
    whole = make(kind, "whole", save_strategy="steps", save_steps=1, save_total_limit=None, **options)
    whole.train()
    resumed = make(kind, "resumed", **options)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed), weights(whole))


def test_what_a_checkpoint_holds(make, tmp_path):
    make(save_strategy="steps", save_steps=4).train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-12"]  # save_total_limit is 1, and nothing is left beside it
    names = {path.name for path in (tmp_path / "run" / "checkpoint-12").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "trainer_state.json", "training_args.json", "preprocessor_config.json"} <= names
    assert "training_args.bin" not in names
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "run" / "checkpoint-12").iterdir()}
    assert len(set(modes.values())) == 1, f"others may read all: {modes}"
    assert json.loads((tmp_path / "run" / "checkpoint-12" / "training_args.json").read_text())["ema_decay"] == 0.9


def test_save_total_limit(make, tmp_path):
    make(save_strategy="steps", save_steps=3, save_total_limit=2).train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-9", "checkpoint-12"}


def test_the_best_checkpoint_is_loaded_with_its_average(make, tmp_path):
    # Each image once as normal and once as anomalous: all evaluations tie, and the first stays the best.
    pairs = images(4)
    pairs = datasets.concatenate_datasets(
        [pairs, pairs.remove_columns("label").add_column("label", [1] * 4, feature=pairs.features["label"])]
    )
    trainer = make(
        eval_dataset=pairs, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="auroc",
    )  # fmt: skip
    trainer.train()
    best = tmp_path / "run" / "checkpoint-3"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    average, saved = load_file(best / "ema.safetensors"), load_file(best / "model.safetensors")
    for i, parameter in enumerate(trainer.model.parameters()):
        assert torch.equal(parameter, average[str(i)])
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, saved[name])


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "aurok", None])
def test_a_metric_that_is_not_measured_chooses_nothing(make, metric, refused):
    """None: Trainer takes the loss, which no evaluation has."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_strategy": "steps", "load_best_model_at_end": True}
    with refused(f"metric_for_best_model={metric or 'loss'!r}", "auroc, average_precision, fpr_at_95_tpr, f1_max"):
        make(eval_dataset=images(11, 1, 5), metric_for_best_model=metric, **options)
    for known in ("eval_auroc", "fpr_at_95_tpr"):
        make(eval_dataset=images(11, 1, 5), metric_for_best_model=known, **options)


def test_resuming_keeps_the_best_checkpoint(make, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "auroc", "eval_dataset": images(11, 1, 5)}
    whole = make("csi", "run", **options)
    whole.train()
    resumed = make("csi", "run", **options)
    resumed.train(str(tmp_path / "run" / "checkpoint-9"))
    assert resumed.state.best_model_checkpoint == whole.state.best_model_checkpoint
    assert_same(weights(resumed), weights(whole))


def test_half_written_checkpoints_are_ignored_and_removed(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    first = make(**options, max_steps=12, save_total_limit=None)
    first.train()
    half = tmp_path / "run" / ".incomplete" / "checkpoint-13"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    resumed = make(**options, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(first)
    assert not half.parent.exists()


def test_fewer_steps_than_the_checkpoint_has_are_refused(make, tmp_path):
    make("csi", "run", max_steps=8, save_strategy="steps", save_steps=8).train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    with pytest.raises(InputError, match=r"checkpoint-8 has 8 steps, more than the 2 of this run: give as many steps or more, or leave"):
        make("csi", "run", max_steps=2).train(str(checkpoint))
    for step in (8, 9):
        longer = make("csi", "run", max_steps=step)
        longer.train(str(checkpoint))
        assert longer.state.global_step == step


def test_a_folder_that_is_no_checkpoint(make, tmp_path):
    half = tmp_path / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"^\S*checkpoint-6 is not a complete checkpoint: [^\n]*trainer_state\.json[^\n]*$"):
        make().train(str(half))


def test_no_features_are_computed_of_images_that_the_bank_does_not_keep(tmp_path):
    """They are drawn beforehand, always the same, and those drawn are fitted to as they are alone."""
    seen = []

    class Counted(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    args = AnomalyTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    rows = list(prepare(images(20), PROCESSOR))
    banks = []
    for _ in range(2):
        trainer = AnomalyTrainer(detector(), args, train_dataset=Counted(rows))
        trainer.model.config.max_bank_size = 6
        seen.clear()
        trainer.fit_reference()
        banks.append(trainer.model.reference.bank)
        assert len(seen) == 6 == trainer.model.config.bank_size
        assert seen == sorted(seen) != list(range(6))
    assert torch.equal(*banks)
    trainer.reference_dataset = [rows[i] for i in seen]
    trainer.fit_reference()
    assert torch.equal(trainer.model.reference.bank, banks[0])


def test_no_features_are_computed_of_tiles_that_the_bank_does_not_keep(tmp_path, monkeypatch):
    """Of every image as many are drawn as make up the bank, others of each, and the same whatever the batches."""
    seen = []
    compute = CSIModel.reference_features
    monkeypatch.setattr(CSIModel, "reference_features", lambda self, pixels: [seen.extend(pixels), compute(self, pixels)][1])
    rows = prepare(images(20), PROCESSOR)
    every_tile = cut_tiles(torch.stack([row["pixel_values"] for row in rows]), 2)
    kept = []
    for batch_size in (4, 7):
        args = AnomalyTrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=batch_size
        )
        trainer = AnomalyTrainer(detector(tiles=2), args, train_dataset=rows)
        trainer.model.config.max_bank_size = 55
        seen.clear()
        trainer.fit_reference()
        assert (len(seen), trainer.model.config.bank_size) == (60, 55)
        places = [next(i for i, tile in enumerate(every_tile) if torch.equal(tile, found)) for found in seen]
        assert [place // 4 for place in places] == [i // 3 for i in range(60)]
        assert len({tuple(place % 4 for place in places[i : i + 3]) for i in range(0, 60, 3)}) > 10
        kept.append((places, trainer.model.reference.bank))
    assert kept[0][0] == kept[1][0]
    torch.testing.assert_close(kept[0][1], kept[1][1])
    trainer.model.config.max_bank_size = 20 * 4
    trainer.fit_reference()
    assert trainer.model.config.bank_size == 20 * 4


def test_half_a_checkpoint_is_not_resumed_from(make, tmp_path, refused):
    """One that was being deleted when the process was killed, say."""
    (tmp_path / "run" / "checkpoint-6").mkdir(parents=True)
    with refused("checkpoint-6 is not a complete checkpoint", "trainer_state.json", "delete it"):
        make().train(resume_from_checkpoint=True)


def test_resuming_where_there_is_nothing_yet_starts_from_the_beginning(make):
    """A run killed before its first checkpoint is repeated with the same command as any other."""
    plain, resumed = make("csi", "plain", max_steps=2), make("csi", "resumed", max_steps=2)
    plain.train()
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(plain)


def test_a_checkpoint_without_an_average(make, tmp_path):
    make("csi", "run", save_strategy="steps", save_steps=6, ema_decay=0.0, save_total_limit=None).train()
    with pytest.raises(InputError, match=r"ema\.safetensors.*--ema_decay 0"):
        make("csi", "other").train(str(tmp_path / "run" / "checkpoint-6"))


# A killed process


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    SmallResNetBackbone(SmallResNetConfig(hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path / "backbone")
    options = ["--max_steps=30", "--save_steps=4", "--logging_steps=1", "--save_total_limit=3", "--dissolver_steps=3"]
    options += ["--dissolved_variants=2", "--report_to=none", "--use_cpu=true", f"--backbone={tmp_path / 'backbone'}"]

    command = [sys.executable, str(SCRIPTS / "train_dia.py"), f"--output_dir={tmp_path / 'killed'}", *options]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").glob("checkpoint-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed" / "config.json").exists()
    reached = max(int(path.name.split("-")[1]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert 4 <= reached < 30

    for folder, *more in (("killed", "--resume_from_checkpoint=true"), ("whole",)):
        status, _, err = run("train_dia.py", f"--output_dir={tmp_path / folder}", *options, *more)
        assert status == 0, err

    def read(folder, name):
        return json.loads((tmp_path / folder / name).read_text())

    histories = []
    for folder in ("killed", "whole"):
        history = [entry for entry in read(folder, "checkpoint-30/trainer_state.json")["log_history"] if "loss" in entry]
        histories.append([(entry["step"], entry["loss"], entry["contrastive_loss"], entry["shift_loss"]) for entry in history])
    assert len(histories[0]) == 30
    assert histories[0] == histories[1]
    results = [
        {name: value for name, value in read(folder, "eval_results.json").items() if name not in ("seconds", "command")}
        for folder in ("killed", "whole")
    ]
    assert results[0] == results[1]
    states = [load_file(tmp_path / folder / "model.safetensors") for folder in ("killed", "whole")]
    assert_same(*states)  # with bank, threshold and calibration scores


def test_anomalies_are_refused_in_training(make):
    with pytest.raises(InputError, match="training takes normal images only"):
        make(train_dataset=images(BATCH * EPOCH, anomalous=BATCH * EPOCH - 1)).train()
