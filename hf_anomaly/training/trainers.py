"""Trainers: transformers' own loop, made exactly resumable and process-count independent, for detectors and dissolvers."""

import inspect
import json
import logging
import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalPrediction,
    HubStrategy,
    PredictionOutput,
    denumpify_detensorize,
    get_last_checkpoint,
    has_length,
    rotate_checkpoints,
)

from ..cards import write_card
from ..data import collate
from ..data.protocols import subset
from ..detector import AnomalyDetector, refuse_anomalies
from ..errors import HubError, InputError
from ..files import let_others_read, read_json, remove_staged
from ..hub import CommitInfo, hub_errors, push_checkpoint, push_folder
from ..metrics import IMAGE_METRICS, image_metrics
from ..ops.distributed import share_buffers
from .arguments import AnomalyTrainingArguments, DenoisingTrainingArguments, ReproducibleArguments
from .lars import LARS
from .phases import PhasedOptimizer, only
from .run_record import check_same_run

logger = logging.getLogger(__name__)

# Handed to a detector even if its `forward` does not know it, which is then an error: to leave it out would go unnoticed.
_NEVER_LEFT_OUT = ("pixel_values", "labels", "dissolved_pixel_values", "phase")

_AVERAGE_FILE = "ema.safetensors"
_RUN_FILE = "run.json"
_STAGING = ".incomplete"

TRAINING_BRANCH = "training"
_CHECKPOINT_PATHS = {  # hub strategy → the folder on that branch; "end" pushes none
    HubStrategy.EVERY_SAVE: "",
    HubStrategy.CHECKPOINT: "last-checkpoint",
    HubStrategy.ALL_CHECKPOINTS: "{name}",
}
_TRAINING_STATE = ["optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "training_args*", _AVERAGE_FILE, _RUN_FILE]


@contextmanager
def seeded(*entropy: int):
    """Runs a block under torch's global random state seeded from these numbers, and puts the old state back."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):  # by default it wakes every GPU
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        yield


def find_checkpoint(asked: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | os.PathLike | None:
    """The folder that is asked for or, if that is True, the last checkpoint in `output_dir`; None if there is none, or none is asked for.

    Raises:
        InputError: it is no complete checkpoint.
    """
    if asked is True:
        asked = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if asked in (None, False):
        return None
    if not Path(asked, "trainer_state.json").is_file():
        raise InputError(f"{asked} is not a complete checkpoint: it has no trainer_state.json; give another, or delete it")
    return asked


def hub_name(args) -> str:
    """`args.hub_model_id`, or the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def push_output(args, folder=None, message: str = "End of training", *, token=None, revision=None, private=None) -> CommitInfo:
    """Pushes `folder`, by default `args.output_dir`, in one commit to the repository `hub_name`. Other settings that are None are taken from `args`.

    Raises:
        HubError: the Hub refused or cannot be reached; one line, with the remedy.
    """
    return push_folder(
        args.output_dir if folder is None else folder,
        hub_name(args),
        private=args.hub_private_repo if private is None else private,
        token=args.hub_token if token is None else token,
        message=message,
        revision=args.hub_revision if revision is None else revision,
    )


def _synchronised(model, args):
    several = args.world_size > 1 and args.device.type == "cuda"
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model


class ReproducibleTrainer(Trainer):
    """`transformers.Trainer` with random numbers derived from (seed, step, micro-step), averaged weights, whole checkpoints, and named losses in the log.

    - Before each micro-step the global random state is forked and seeded, alike on every process: a resumed run draws what an uninterrupted one
      would, and modules that draw for the global batch (`ops.distributed.draw_rows`) train alike on any number of processes.
    - The exponential moving average of the parameters (`args.ema_decay`) is saved in checkpoints; after `train` the model holds it. Statistics of
      batch normalisation are not averaged again: they are moving averages themselves.
    - A checkpoint is written under another name and renamed when it is complete.
    - Batch normalisation is synchronised over the processes on GPUs; on CPUs all processes predict with the statistics of the main one, which are saved.

    Args:
        run: what describes the run (data, seed, settings), as JSON can hold it; written into checkpoints, and a checkpoint of another run is refused.
        The others are `Trainer`'s.

    Raises:
        InputError: `args` of another class than `arguments_class`, or a process that sees several GPUs.
    """

    arguments_class: type[ReproducibleArguments] = ReproducibleArguments

    def __init__(self, model, args, *, run: dict | None = None, **kwargs):
        if not isinstance(args, self.arguments_class):
            raise InputError(
                f"{type(self).__name__} takes {self.arguments_class.__name__}, not {type(args).__name__}: they have settings of its own"
            )
        if args.n_gpu > 1:
            raise InputError(f"one process sees {args.n_gpu} GPUs: start one process for each with `accelerate launch`")
        super().__init__(None if model is None else _synchronised(model, args), args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a `forward` with **kwargs would be taken to divide by the accumulation steps itself
        if hasattr(self.model, "config"):
            vars(self.model.config).pop("use_cache", None)  # Trainer puts it there, for language models
        self.run = run
        self._average = None
        self._micro_step = (-1, 0)  # (global step, micro-batches done in it)
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_counts: Counter[str] = Counter()
        self._staging = False
        # Trainer offers no other hook between the optimizer's step and the checkpoint.
        self.add_callback(_AverageCallback(self))

    def call_model_init(self, trial=None):
        return _synchronised(super().call_model_init(trial), self.args)

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.lars:
            parameters = (self.model if model is None else model).parameters()
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            self.optimizer = LARS(trained, self.args.learning_rate, weight_decay=self.args.weight_decay)
        return super().create_optimizer(model)

    # Steps --------------------------------------------------------------------------------------------------------------------

    def model_inputs(self, inputs: dict) -> dict:
        """What the model is called with in training; a hook for subclasses."""
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step, micro = self.state.global_step, self._micro_step[1] if self._micro_step[0] == self.state.global_step else 0
        self._micro_step = (step, micro + 1)
        with seeded(self.args.seed, step, micro):
            outputs = model(**self.model_inputs(inputs))
        for name, value in (outputs.get("losses") or {}).items():
            self._loss_sums[name] = self._loss_sums.get(name, 0) + value.detach().float()
            self._loss_counts[name] += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def get_train_dataloader(self):
        args = self.args
        if has_length(self.train_dataset) or not args.dataloader_drop_last:
            return super().get_train_dataloader()
        # Trainer heeds the flag where it knows the length. The last batch of a stream may be one image, which batch normalisation cannot take.
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
        )
        return self.accelerator.prepare(loader)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed when all was done: Trainer would take one more step
            self.control.should_training_stop = True
            return
        at_first = self.state.global_step == 0 and not has_length(self.train_dataset)
        try:
            super()._run_epoch(*args, **kwargs)
        except (TypeError, ValueError) as error:  # accelerate's, in several processes and in one
            if not (at_first and str(error).startswith(("Unsupported types (<class 'NoneType'>)", "Batch does not contain any data"))):
                raise
        if at_first and self.state.global_step == 0:  # Trainer would end without a word, or go on for ever
            raise InputError(
                f"the stream has fewer training images than the {self.args.images_per_step} of a step, or each worker that reads it has: take "
                "smaller batches, or lower --gradient_accumulation_steps or --dataloader_num_workers"
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(samples) < num_batches and not has_length(self.train_dataset):
            samples = []  # Trainer would add their gradients, too large ones, to those of the next pass's first step
        return samples, count

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial):
        passes, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.global_step > max_steps:  # Trainer would end at once, and give more steps than were asked for
            raise InputError(
                f"{resume_from_checkpoint} has {self.state.global_step} steps, more than the {max_steps} of this run: give as many steps or more, or leave "
                "--resume_from_checkpoint out"
            )
        if resume_from_checkpoint is not None and not has_length(self.train_dataset):
            # Trainer takes all steps for one pass over a stream, whose length it does not know, but its `epoch` counts passes.
            state = read_json(Path(resume_from_checkpoint, "trainer_state.json"))
            passes = math.ceil(state["epoch"]) - 1  # 1.0: all steps were of the first pass, which may have more images
            batches = round((state["epoch"] - passes) * state["max_steps"] * self.args.gradient_accumulation_steps)
        return passes, batches

    def log(self, logs, start_time=None):
        if "loss" in logs and self._loss_sums:
            means = {name: total / self._loss_counts[name] for name, total in self._loss_sums.items()}
            means = self.accelerator.reduce(means, "mean")
            logs = {**logs, **{name: mean.item() for name, mean in means.items()}}
            self._loss_sums, self._loss_counts = {}, Counter()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As `Trainer.train`; afterwards the model holds the averaged weights.

        Raises:
            InputError: `resume_from_checkpoint` is no complete checkpoint, or one of more steps than this run has. True takes the last one, if there is
                any.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is None and resume_from_checkpoint:
            logger.info("There is no checkpoint in %s yet: starting from the beginning", self.args.output_dir)
        if checkpoint and (description := Path(checkpoint, _RUN_FILE)).is_file():
            check_same_run(read_json(description), self.run, checkpoint)
        self._micro_step = (-1, 0)
        self._loss_sums, self._loss_counts = {}, Counter()
        self._average = None  # of a training that was interrupted
        if self._created_lr_scheduler and self.optimizer is not None:
            # The schedule of an earlier training wraps `step`, of a copied trainer, too, in which it steps the first one's optimizer. A new one follows.
            vars(self.optimizer).pop("step", None)
        shutil.rmtree(Path(self.args.output_dir, _STAGING), ignore_errors=True)  # the checkpoint that a killed process was writing
        remove_staged(self.args.output_dir)  # and the detector
        if has_length(self.train_dataset) and self.args.dataloader_drop_last:
            batch = self.args.train_batch_size * self.args.world_size
            if len(self.train_dataset) < batch:
                remedy = "set --per_device_train_batch_size lower" if self.args.train_batch_size > 1 else "start fewer processes"
                raise InputError(f"there are {len(self.train_dataset)} training images, fewer than one batch of {batch}: {remedy}")
        output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if self._average is not None:
            if best is not None:
                self._load_average(best)
            self._average.copy_to(self.model.parameters())
            self._average = None
        share_buffers(self.model)
        return output

    # Averaged weights ---------------------------------------------------------------------------------------------------------

    def _start_average(self):
        if self.args.ema_decay > 0 and self._average is None:
            from diffusers.training_utils import EMAModel

            self._average = EMAModel(self.model.parameters(), decay=self.args.ema_decay, foreach=True)

    def _load_average(self, checkpoint):
        self._start_average()
        path = Path(checkpoint, _AVERAGE_FILE)
        if self._average is None:
            return
        if not path.is_file():
            raise InputError(f"{checkpoint} has no {_AVERAGE_FILE}: it was trained without --ema_decay; resume it with --ema_decay 0")
        tensors = load_file(path)
        self._average.optimization_step = int(tensors.pop("step"))
        for i, shadow in enumerate(self._average.shadow_params):
            shadow.copy_(tensors[str(i)])

    @contextmanager
    def averaged_weights(self):
        """The model holds the averaged weights inside the block, and on every process the same buffers."""
        share_buffers(self.model)
        if self._average is None:
            yield
            return
        self._average.store(self.model.parameters())
        self._average.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self._average.restore(self.model.parameters())

    # Checkpoints --------------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(run_dir / _STAGING / name / "trainer_state.json"))
            let_others_read(run_dir / _STAGING / name)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(run_dir / _STAGING / name, run_dir / name)
            os.rmdir(run_dir / _STAGING)
            self._push_checkpoint(run_dir / name)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # Trainer pickles its arguments; JSON says the same.
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            text = json.dumps(self.args.to_sanitized_dict(), indent=2, sort_keys=True)
            (folder / "training_args.json").write_text(text, encoding="utf-8")
            if self.run is not None:
                (folder / _RUN_FILE).write_text(json.dumps(self.run, indent=2, sort_keys=True), encoding="utf-8")

    # The Hub ------------------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token=None, private=None):
        with hub_errors(hub_name(self.args)):
            super().init_hf_repo(token, private)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None) -> CommitInfo | None:
        """Pushes the model's files in `args.output_dir`, in one commit, to `args.hub_model_id` or a repository named like the folder. Main process only.

        Args:
            blocking: only True is taken.

        Raises:
            HubError: the Hub refused or cannot be reached; one line, with the remedy.
        """
        if not blocking:
            raise InputError("push_to_hub(blocking=False) is not supported: a push that fails in the background goes unnoticed")
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return push_output(self.args, message=commit_message, token=token, revision=revision, private=private)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing here: the checkpoint is not whole yet. `_push_checkpoint` comes after."""

    def _push_checkpoint(self, checkpoint: Path):
        """Pushes a checkpoint in mid-training, as `args.hub_strategy` says, to a branch of its own: who loads the model never gets an unfinished one."""
        path_in_repo = _CHECKPOINT_PATHS.get(self.args.hub_strategy)
        if not self.args.push_to_hub or path_in_repo is None:
            return
        ignored = _TRAINING_STATE if not path_in_repo else None
        try:
            url = push_checkpoint(
                checkpoint,
                self.hub_model_id,
                branch=TRAINING_BRANCH,
                path_in_repo=path_in_repo.format(name=checkpoint.name),
                token=self.args.hub_token,
                message=f"Training in progress, step {self.state.global_step}",
                ignore=ignored,
            )
            logger.info("Pushed: %s", url)
        except HubError as error:  # training goes on: the next checkpoint and the end push again
            logger.warning("The checkpoint of step %d was not pushed: %s", self.state.global_step, error)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            tensors = {str(i): shadow.contiguous() for i, shadow in enumerate(self._average.shadow_params)}
            save_file({**tensors, "step": torch.tensor(self._average.optimization_step)}, os.path.join(output_dir, _AVERAGE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_average(checkpoint)


class _AverageCallback(TrainerCallback):
    def __init__(self, trainer: ReproducibleTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start_average()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.step(self.trainer.model.parameters())


def _check_metric(name: str | None, eval_dataset) -> None:
    """Refuses to choose a model by a metric that `evaluate` does not give, such as Trainer's own default, the loss."""
    measured = list(IMAGE_METRICS)
    if isinstance(eval_dataset, dict):
        measured = [f"{part}_{metric}" for part in eval_dataset for metric in measured]
    if name is not None and name.removeprefix("eval_") not in measured:
        raise InputError(
            f"metric_for_best_model={name!r} is not measured: give {', '.join(measured)} or, with compute_metrics, one of your own"
        )


class AnomalyTrainer(ReproducibleTrainer):
    """Trains any `AnomalyDetector`; then `fit_reference` and `calibrate` make it ready to score.

    A detector with `phases` runs them in turn for every batch: fresh forwards, gradient clipping and an optimizer step of its own each. The logged
    loss is their sum; `global_step` and the averaged weights count batches.

    Args:
        model: the detector.
        args: `AnomalyTrainingArguments`.
        model_init: in place of `model`, makes a new or loads a saved one for every training, which `hyperparameter_search` needs; it may take the trial.
        train_dataset: prepared images (`hf_anomaly.prepare`), normals only.
        eval_dataset: prepared, with labels; `evaluate` reports image-level metrics on it. Or several by name.
        reference_dataset: prepared normals that scoring compares with; default `train_dataset`.
        calibration_dataset: prepared normals, disjoint from the other two.
        processing_class: the image processor, saved beside the model.
        compute_metrics: further metrics of `predict` and `evaluate`, from an `EvalPrediction` of scores (N,) and labels (N,), as {name: number}; with
            `args.batch_eval_metrics` called once all the same, with `compute_result=True`.
        callbacks: as in `Trainer`.
        optimizers: an optimizer of `model.parameters()` and its schedule, in place of what `args` say; either may be None. A resumed run loads their
            states from the checkpoint.
        run: as in `ReproducibleTrainer`.

    Raises:
        InputError: a model that is no detector; one with phases under fp16, FSDP or DeepSpeed, or with `optimizers`: each phase has its own; or a
            `metric_for_best_model` that is not measured.
    """

    arguments_class = AnomalyTrainingArguments

    def __init__(
        self,
        model: AnomalyDetector | None = None,
        args=None,
        *,
        model_init=None,
        train_dataset=None,
        eval_dataset=None,
        reference_dataset=None,
        calibration_dataset=None,
        processing_class=None,
        data_collator=collate,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        run=None,
    ):
        if model is not None and not isinstance(getattr(model, "_orig_mod", model), AnomalyDetector):  # as torch.compile wraps it
            raise InputError(f"AnomalyTrainer trains an AnomalyDetector, not {type(model).__name__}: give the detector itself")
        super().__init__(
            model,
            args,
            run=run,
            model_init=model_init,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.eval_strategy != "no" and compute_metrics is None:  # with one only the first evaluation tells which metrics there are
            _check_metric(args.metric_for_best_model, eval_dataset)
        model = self.model
        if model.phases and any(part is not None for part in optimizers):
            raise InputError(f"{type(model).__name__} trains in phases, each with an optimizer of its own: leave out optimizers")
        self.reference_dataset = train_dataset if reference_dataset is None else reference_dataset
        self.calibration_dataset = calibration_dataset
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._taken = None if takes_all else {*parameters, *_NEVER_LEFT_OUT}
        self._micro_batches: list[dict] = []  # of an accumulated batch, until it is whole
        # fp16's scaler would unscale the gradients of shared parameters once a phase; the other two keep their own optimizers.
        if model.phases and (args.fp16 or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError(
                f"{type(model).__name__} trains in phases, which fp16, FSDP and DeepSpeed do not know: take bf16 or fp32 and plain processes"
            )

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        model.reset_reference()  # of a saved detector
        return model

    def create_optimizer(self, model=None):
        if self.optimizer is not None or not self.model.phases:
            return super().create_optimizer(model)
        optimizers = {}
        for name, parameters in self.model.phases.items():
            with only(parameters, self.model):  # Trainer's optimizer takes what requires a gradient
                optimizers[name] = super().create_optimizer(model)
            self.optimizer = None
        self.optimizer = PhasedOptimizer(optimizers)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        phases = self.model.phases
        if not phases:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:  # a phase needs the whole batch before the next one's forward
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        total = torch.zeros((), device=self.args.device)
        for i, (name, parameters) in enumerate(phases.items()):
            if i > 0:  # the step of the phase before; Trainer's loop takes that of the last one
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
            for batch in batches:
                total += super().training_step(model, {**batch, "phase": name}, num_items_in_batch)
            kept = {id(parameter) for parameter in parameters}
            for parameter in self.model.parameters():
                if id(parameter) not in kept:
                    parameter.grad = None  # is another phase's, and must not count in the norm
            self.optimizer.optimizer.phase = name
        return total

    def model_inputs(self, inputs):
        """A batch without the columns that the detector's `forward` does not name, and `epoch`."""
        refuse_anomalies(inputs.get("labels"), "training")
        taken = {name: value for name, value in inputs.items() if self._taken is None or name in self._taken}
        return {**taken, "epoch": self._epoch()}

    def _epoch(self) -> float:
        """Epochs done. A stream has no length: there as many images as the reference holds make one."""
        if has_length(self.train_dataset) or not has_length(self.reference_dataset):
            return self.state.epoch
        batch = self.args.images_per_step
        return self.state.global_step * batch / len(self.reference_dataset)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if self.model_init is None:
            self.model.reset_reference()  # checkpoints are unfitted
        self._micro_batches = []
        return super().train(resume_from_checkpoint, **kwargs)

    def fit_reference(self) -> None:
        """`model.fit_reference` on the reference dataset, in dataset order, each image once, on any number of processes. Of more images than the detector
        keeps, so many are drawn first, always the same, and of images cut into tiles some of each: the features of the others would be computed for nothing.

        Raises:
            InputError: there is neither a reference nor a training dataset.
        """
        if self.reference_dataset is None:
            raise InputError("there are no images to fit the reference to: give reference_dataset or train_dataset")
        images, limit = self.reference_dataset, self.model.max_reference_images
        if limit is not None and has_length(images) and len(images) > limit:
            images = Subset(images, subset(len(images), limit, seed=0).tolist())
        self.model.fit_reference(
            self.get_test_dataloader(images),
            num_images=len(images) if has_length(images) else None,
            gather=self.accelerator.gather_for_metrics,
            progress=self._progress,
        )

    def calibrate(self) -> None:
        """`model.calibrate` on the calibration dataset at `args.false_positive_rate`.

        Raises:
            InputError: there is no calibration dataset.
        """
        if self.calibration_dataset is None or (has_length(self.calibration_dataset) and len(self.calibration_dataset) == 0):
            raise InputError("there are no calibration images: hold some normal images out (--calibration_fraction)")
        self.model.calibrate(
            self.get_test_dataloader(self.calibration_dataset),
            false_positive_rate=self.args.false_positive_rate,
            gather=self.accelerator.gather_for_metrics,
            progress=self._progress,
        )

    def score(self, dataset) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`model.score` on a prepared dataset, on any number of processes."""
        return self.model.score(self.get_test_dataloader(dataset), gather=self.accelerator.gather_for_metrics, progress=self._progress)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test") -> PredictionOutput:
        """Scores (N,), labels (N,) or None, and image-level metrics where there are labels. In mid-training the averaged weights are fitted for the call."""
        output = self._predict(test_dataset, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return output

    def _predict(self, test_dataset, metric_key_prefix) -> PredictionOutput:
        fitted_before = self.model.is_fitted
        with self.averaged_weights():
            if not fitted_before:
                self.fit_reference()
            scores, labels = self.score(test_dataset)
            if not fitted_before:
                self.model.reset_reference()
        scores, labels = scores.numpy(), None if labels is None else labels.numpy()
        metrics = {} if labels is None else image_metrics(scores, labels)
        if labels is not None and self.compute_metrics is not None:
            last = {"compute_result": True} if self.args.batch_eval_metrics else {}  # the only call is the last one, too
            metrics |= denumpify_detensorize(self.compute_metrics(EvalPrediction(scores, labels), **last))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return PredictionOutput(predictions=scores, label_ids=labels, metrics=metrics)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float | None]:
        """Image-level metrics on `eval_dataset`, logged as `Trainer.evaluate` does; of several datasets by name, those of each: eval_<name>_auroc …

        Args:
            eval_dataset: in place of the trainer's; a string names one of several.
        """
        eval_dataset = self._to_evaluate(eval_dataset)
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        metrics = self._predict(eval_dataset, metric_key_prefix).metrics
        if not metrics:
            raise InputError("evaluate needs an eval_dataset with labels, and its batches have none; predict gives the scores alone")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def hyperparameter_search(self, hp_space=None, compute_objective=None, n_trials=20, direction=None, **settings):
        """As `Trainer.hyperparameter_search`, but objective and direction must be given: by default Trainer seeks the least sum of all metrics, which the
        worst detector has.

        Args:
            compute_objective: the number that tells how good a trial is, from what `evaluate` gives.
            direction: `"maximize"` or `"minimize"` it.

        Raises:
            InputError: one of the two is missing.
        """
        if compute_objective is None or direction is None:
            raise InputError(
                "hyperparameter_search must be told what is best: give compute_objective=lambda metrics: metrics['eval_auroc'] and "
                "direction='maximize', or the like"
            )
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **settings)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None) -> CommitInfo | None:
        """Saves the detector with its processor, and a card if there is none, in `args.output_dir`, and pushes that; see `ReproducibleTrainer.push_to_hub`.

        Raises:
            NotFittedError: before `fit_reference`.
        """
        self.model.require_fitted()
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self.model.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            if not (folder / "README.md").exists():
                write_card(folder, self.model)
        return super().push_to_hub(commit_message, blocking, token, revision, private)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As `get_test_dataloader`, of the dataset that `evaluate` takes."""
        return self.get_test_dataloader(self._to_evaluate(eval_dataset))

    def _to_evaluate(self, eval_dataset):
        """The dataset given, else the trainer's own; of several the one with the name that was given."""
        if isinstance(eval_dataset, str):
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if eval_dataset not in names:
                raise InputError(
                    f"there is no eval_dataset {eval_dataset!r} among {', '.join(names) or 'none with names'}: give a dataset, or its name"
                )
            return self.eval_dataset[eval_dataset]
        if eval_dataset is None and self.eval_dataset is None:
            raise InputError("evaluate needs an eval_dataset with labels")
        return self.eval_dataset if eval_dataset is None else eval_dataset

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """What reads the images that are fitted to, calibrate or are scored: in dataset order, all of them even with `dataloader_drop_last`."""
        workers = self.args.dataloader_num_workers
        if self.args.world_size > 1 and not has_length(test_dataset):
            # accelerate divides a stream's batches evenly and fills up the last one alone; several workers have a last one each, whose rest would be lost.
            workers = min(workers, 1)
        loader = DataLoader(
            test_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    @property
    def _progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_world_process_zero()


class DenoisingTrainer(ReproducibleTrainer):
    """Trains a model that learns from images alone by taking noise away: a diffusion model for dissolving, or ADDP's first stage.

    Args:
        model: called with `pixel_values`, gives `loss`: `hf_anomaly.dissolving.DenoisingModel`, `ADDPForPreTraining`.
        args: `DenoisingTrainingArguments`.
        train_dataset: prepared images; what labels they have is ignored.
    """

    arguments_class = DenoisingTrainingArguments

    def __init__(self, model, args, *, train_dataset, callbacks=None, run=None):
        super().__init__(model, args, run=run, data_collator=collate, train_dataset=train_dataset, callbacks=callbacks)

    def model_inputs(self, inputs):
        return {"pixel_values": inputs["pixel_values"]}
