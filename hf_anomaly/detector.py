"""The contract that every detector obeys: configuration, output, fit_reference, calibrate, save and load."""

import copy
import difflib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Self

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.hub import resolve_revision

from .calibration import Calibration, Float32State, check_rate, normal_map_range, without_nan
from .cards import tag_card, write_card
from .cards.merging import read_card
from .errors import HubError, InputError, NotFittedError, one_line
from .files import staged
from .hub import CommitInfo, find_file, hub_errors, push_folder
from .ops.distributed import draw_rows
from .ops.maps import map_levels
from .ops.pieces import pieces
from .ops.sampling import Sample
from .ops.tiles import cut_tiles, draw_tiles, join_tiles
from .saving import Home, auto_map, bring_companions, outdated_files, warn_of_lost_companions, write_remote_code
from .untrusted import check_attention, check_backbone_config, check_memory, check_shard_names
from .version import __version__

logger = logging.getLogger(__name__)

# What PreTrainedConfig takes besides its own fields, from its callers and from config.json files.
_INHERITED_KEYWORDS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "output_attentions",
    "torch_dtype",
}

_LARGEST_IMAGE = 2**14  # px
_LARGEST_PIXEL = 10  # beyond it are levels of 0 to 255 that were never rescaled
_MOST_CALIBRATION_SCORES = 10**9
_MOST_TILES = 64  # along a side
_MAX_CUT_PIXELS = 2**20  # of the images whose tiles are scored at once: 16 of 256 px


@strict
class AnomalyDetectorConfig(PreTrainedConfig):
    """What every detector's configuration holds.

    Its fields are of three kinds:

    - Those of the training: with other values, a trained detector still scores the same.
    - `score_fields`: with other values, it would score differently. Among them `reference_fields`: with other values, its reference would differ, too.
      `calibrate` notes their values in `calibrated_for`, `fit_reference` in `fitted_for`; a detector that is loaded with other values, see
      `score_changes` and `reference_changes`, loses the calibration or the reference.
    - `recorded_fields`: nobody chooses them; saving, fitting and calibrating fill them in.

    Args:
        image_size: height and width of `pixel_values`, in pixels.
        num_channels: 1 (gray) or 3 (RGB).
        tiles: images are cut into tiles × tiles squares of `tile_size` pixels, for anomalies that are small in them. That is what the networks see: in
            training one of them at random, in scoring all, of which the most anomalous gives the image's score.
        normal_label: the class that the training data called normal, for the record and for evaluation.
        false_positive_rate: the rate at which `calibrate` set the threshold; None before.
        num_calibration_scores: how many held-out normal images calibrated the detector; 0 before.
        anomaly_map_range: what their anomaly maps say is normal, [low, high], to paint maps with: the median of their pixels, and what at most the share
            `false_positive_rate` of these images exceeds anywhere (or their maximum, where they are too few for that). None before, and without maps. It
            belongs to the rate of `calibrate` even if loading sets the threshold for another one, as the maps themselves are not kept.
        calibrated_for: the values of `score_fields` that calibration was made with; None before.
        fitted_for: the values of `reference_fields` that the reference was made with; None before, and where there are no such fields.
        hf_anomaly_version: the version of this package that wrote the file.

    Raises:
        InputError: a keyword that is no field of the configuration, or a value out of range.
        huggingface_hub.errors.StrictDataclassError: a value of another type than its field's, or none of its choices.
    """

    score_fields = ("image_size", "tiles")
    reference_fields = ()
    recorded_fields = (
        "hf_anomaly_version",
        "transformers_version",
        "architectures",
        "auto_map",
        "dtype",
        "num_calibration_scores",
        "anomaly_map_range",
        "calibrated_for",
        "fitted_for",
    )
    fields_before = {"tiles": 1}  # what fields mean that a file of an earlier version, or a record in it, lacks

    image_size: int = 32
    num_channels: int = 1
    tiles: int = 1
    normal_label: str | None = None
    false_positive_rate: float | None = None
    num_calibration_scores: int = 0
    anomaly_map_range: list | tuple | None = None
    calibrated_for: dict | None = None
    fitted_for: dict | None = None
    hf_anomaly_version: str | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("use_cache", None)  # transformers.Trainer puts it into every configuration, for language models
        known = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        for name in kwargs:
            if name not in _INHERITED_KEYWORDS:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"its fields are in the docstring of {type(self).__name__}"
                raise InputError(f"{type(self).__name__} has no field {name!r}: {hint}")
        check_attention(kwargs.get("attn_implementation"))
        if self.hf_anomaly_version is None:
            self.hf_anomaly_version = __version__
        if (backbone_config := getattr(self, "backbone_config", None)) is not None:
            check_backbone_config(backbone_config if isinstance(backbone_config, dict) else backbone_config.to_dict())
        super().__post_init__(**kwargs)
        for config in (self, getattr(self, "backbone_config", None)):
            if config is not None:
                config.return_dict = True  # outputs are read by name; a call's own `return_dict=False` still gives a tuple
        self.check()

    def forget_calibration(self) -> None:
        """Puts the fields that `calibrate` sets back to their defaults."""
        self.num_calibration_scores = 0
        self.false_positive_rate = self.anomaly_map_range = self.calibrated_for = None

    @property
    def tile_size(self) -> int:
        """Height and width, in pixels, of what the networks see: a tile, or the image itself if it is not cut."""
        return self.image_size // max(1, self.tiles)  # `check` refuses others later

    @property
    def images_in_words(self) -> str:
        """What images it takes: size, tiles and colour."""
        tiles = f" in {self.tiles}×{self.tiles} tiles" if self.tiles > 1 else ""
        return f"{self.image_size}×{self.image_size} px{tiles}, {'gray' if self.num_channels == 1 else 'RGB'}"

    def values_of(self, fields: Iterable[str]) -> dict:
        """The fields' values for the record; of a nested configuration one by one, as `backbone_config.norm`."""
        values = {}
        for name in fields:
            value = getattr(self, name)
            values |= _own_fields(name, value) if isinstance(value, PreTrainedConfig) else {name: value}
        return values

    @property
    def score_changes(self) -> str:
        """Which fields have other values than those that calibration was made for, in words; empty if none has, or nothing was recorded."""
        return self._changes_since(self.calibrated_for or {}, self.score_fields)

    @property
    def reference_changes(self) -> str:
        """As `score_changes`, of the reference. Folders saved before there was `fitted_for` tell it in `calibrated_for`."""
        recorded = {name: value for name, value in (self.calibrated_for or {}).items() if name.partition(".")[0] in self.reference_fields}
        return self._changes_since(recorded | (self.fitted_for or {}), self.reference_fields)

    def _changes_since(self, record: dict, fields: tuple[str, ...]) -> str:
        if record:
            record = {name: value for name, value in self.fields_before.items() if name in fields} | record
        now = self.values_of({name.partition(".")[0] for name in record} & self.__dataclass_fields__.keys())
        both = record.keys() & now.keys()  # those of another version may be more, or fewer
        return ", ".join(f"{name} was {record[name]!r}, now {now[name]!r}" for name in sorted(both) if now[name] != record[name])

    def check(self) -> None:
        """Refuses values out of range. Called at the end of the constructor; subclasses extend it."""
        if not 1 <= self.image_size <= _LARGEST_IMAGE:
            raise InputError(f"image_size must be 1 to {_LARGEST_IMAGE} pixels, got {self.image_size}")
        if not 1 <= self.tiles <= _MOST_TILES or self.image_size % self.tiles:
            raise InputError(f"tiles must be 1 to {_MOST_TILES}, and image_size a multiple of it, got {self.tiles} and {self.image_size}")
        if self.num_channels not in (1, 3):
            raise InputError(f"num_channels must be 1 (gray) or 3 (RGB), got {self.num_channels}")
        if not 0 <= self.num_calibration_scores <= _MOST_CALIBRATION_SCORES:
            raise InputError(f"num_calibration_scores must be 0 to {_MOST_CALIBRATION_SCORES}, got {self.num_calibration_scores}")
        if self.false_positive_rate is not None or self.num_calibration_scores > 0:
            check_rate(self.false_positive_rate)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`, but keywords that are fields go through the checks, too: transformers sets them afterwards."""
        given = {
            name: kwargs.pop(name) for name in cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__ if name in kwargs
        }
        for name, value in given.items():
            before = config_dict.get(name)  # of a configuration in the configuration some fields may be given
            if isinstance(before, dict) and isinstance(value, dict) and value.get("model_type") in (None, before.get("model_type")):
                given[name] = {**before, **value}
        return super().from_dict({**cls.fields_before, **config_dict, **given}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing: a saved detector refers to the package, whose code is not copied beside it."""


def _own_fields(where: str, config: PreTrainedConfig) -> dict:
    """The values, as JSON holds them, of the fields that not every configuration has."""
    common = PreTrainedConfig().to_dict().keys() - {"model_type"}
    values = json.loads(config.to_json_string(use_diff=False))
    return {f"{where}.{name}": value for name, value in values.items() if name not in common}


@strict
class SelfContainedDetectorConfig(AnomalyDetectorConfig):
    """Configuration of a `SelfContainedDetector`.

    Args:
        num_reference_images: how many images `fit_reference` saw; 0 before.
    """

    recorded_fields = (*AnomalyDetectorConfig.recorded_fields, "num_reference_images")

    num_reference_images: int = 0

    def check(self):
        super().check()
        if self.num_reference_images < 0:
            raise InputError(f"num_reference_images must not be negative, got {self.num_reference_images}")


@dataclass
class AnomalyDetectorOutput(ModelOutput):
    """What a detector returns.

    Args:
        loss: (), the training loss; in training mode only.
        losses: its named parts, keys end in `_loss`; in training mode only.
        scores: (B,) float32, higher = more anomalous; in eval mode only.
        anomaly_maps: (B, 1, H, W) float32, higher = more anomalous; on request, in eval mode.
        embeddings: (B, d); on request, in eval mode.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    scores: torch.Tensor | None = None
    anomaly_maps: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


def refuse_anomalies(labels: torch.Tensor | None, where: str) -> None:
    """Raises InputError where a label is not 0 (normal)."""
    if labels is not None and bool((labels != 0).any()):
        raise InputError(f"{where} takes normal images only, but image {int((labels != 0).nonzero()[0])} of a batch is labelled anomalous")


def _refuse_not_finite(features: dict[str, torch.Tensor], first: int) -> None:
    """Raises InputError where what was computed of a normal image, a row of each tensor (B, …), is not finite; `first` is the number of the first row."""
    for name, values in features.items():
        finite = torch.isfinite(values).flatten(1).all(1)
        if not finite.all():
            row = first + int((~finite).nonzero()[0])
            raise InputError(f"normal image {row} has no finite {name.replace('_', ' ')}: train again with a lower learning rate")


class AnomalyDetector(PreTrainedModel):
    """Base of all detectors: images in, one loss in training mode, one score an image in eval mode.

    A detector goes through three stages. Training fills the weights. `fit_reference` makes one pass over the normal training images and fills
    what scoring compares with (buffers in modules derived from `Float32State`). `calibrate` scores held-out normal images and sets
    the threshold. All of it is in the saved folder, so that a loaded detector scores bit for bit as before.

    `AnomalyTrainer.train` empties reference and calibration. A loop of your own leaves them as they are, of the weights before it: fit and calibrate
    after it, and to score in between, too.

    A subclass implements `compute_losses`, `reference_features`, `set_reference`, `clear_reference`, `is_fitted` and `compute_scores`.
    """

    config_class = AnomalyDetectorConfig
    config: AnomalyDetectorConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = {"calibration", "reference"}
    unsupported_maps_reason = "this method gives no anomaly maps"
    supports_anomaly_maps = False
    citation = ""  # BibTeX of the method's paper, for the card

    def __init__(self, config: AnomalyDetectorConfig):
        # A copy of its own, as fitting and calibrating write into it: several detectors may be made of one configuration.
        super().__init__(copy.deepcopy(config))
        self.calibration = Calibration(config.num_calibration_scores)
        self._homes: list[Home] = []  # where it was saved last, and where it was loaded from

    # What a method implements -------------------------------------------------------------------------------------------------

    def compute_losses(self, pixel_values: torch.Tensor, *, epoch: float | None, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss () and its named parts (keys end in `_loss`), for images or tiles (B, C, tile_size, tile_size)."""
        raise NotImplementedError

    @property
    def phases(self) -> dict[str, list[nn.Parameter]]:
        """Adversarial methods: the name of each phase of a training step, in their order, and the parameters that it updates.

        For every batch the trainer runs them in turn, each with a fresh `forward(..., phase=name)` and optimizer moments of its own, even for
        parameters that phases share. Empty: one forward a batch updates all, and `phase` is not passed.
        """
        return {}

    def reference_features(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `fit_reference` collects from a batch of normal images or tiles: named tensors with first dimension B, independent of the companions."""
        raise NotImplementedError

    @property
    def max_reference_images(self) -> int | None:
        """How many images' (or tiles') features `fit_reference` keeps, so that memory stays bounded: of more it takes a random choice. None: all."""
        return None

    def set_reference(self, features: dict[str, torch.Tensor]) -> None:
        """Fills the reference buffers (and the config fields that give their sizes) from the features of normal images, `max_reference_images` at most."""
        raise NotImplementedError

    def clear_reference(self) -> None:
        """Empties the reference buffers again."""
        raise NotImplementedError

    @property
    def is_fitted(self) -> bool:
        """Whether it has a reference, without which it scores nothing."""
        raise NotImplementedError

    def compute_scores(self, pixel_values: torch.Tensor, *, output_anomaly_maps: bool, output_embeddings: bool) -> AnomalyDetectorOutput:
        """Scores (B,) and, on request, maps (B, 1, H, W) and embeddings (B, d) of a fitted detector, for images or tiles (B, C, tile_size, tile_size)."""
        raise NotImplementedError

    # The contract -------------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        epoch: float | None = None,
        output_anomaly_maps: bool = False,
        output_embeddings: bool = False,
    ) -> AnomalyDetectorOutput:
        """The loss in training mode, scores in eval mode.

        Graphs of `torch.export` and `torch.compile` do not look at the pixels' values, and score +inf where a score is not finite.

        Args:
            pixel_values: (B, C, H, W) in [−1, 1], as the saved processor gives them.
            labels: (B,), ignored: training takes normal images only. Accepted so that a labelled batch passes through unchanged.
            epoch: the training epoch, for losses with a schedule.
            output_anomaly_maps: also return `anomaly_maps` (B, 1, H, W).
            output_embeddings: also return `embeddings` (B, d); of an image in tiles their mean.

        Raises:
            InputError: no tensor, wrong shape or channels, integers, pixels that are NaN, infinite or far from [−1, 1], maps asked of a method that has none,
                or a score that is not finite.
            NotFittedError: eval mode before `fit_reference`.
        """
        return self._forward(pixel_values, epoch, output_anomaly_maps, output_embeddings)

    def _forward(self, pixel_values, epoch, output_anomaly_maps, output_embeddings, **inputs) -> AnomalyDetectorOutput:
        self.check_pixel_values(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        if self.training:
            pixel_values, inputs = self._draw_tiles(pixel_values, **inputs)
            loss, losses = self.compute_losses(pixel_values, epoch=epoch, **inputs)
            return AnomalyDetectorOutput(loss=loss, losses=losses)
        self.require_fitted()
        if output_anomaly_maps and not self.supports_anomaly_maps:
            raise InputError(f"output_anomaly_maps=True: {self.unsupported_maps_reason}")
        with self._own_precision():
            output = self._score_images(pixel_values, output_anomaly_maps, output_embeddings)
        finite = torch.isfinite(output.scores)  # NaN lies above no threshold: it would pass for normal
        if torch.compiler.is_compiling():  # a graph can raise nothing
            output.scores = torch.where(finite, output.scores, torch.inf)
        elif not finite.all():
            rows = ", ".join(map(str, (~finite).nonzero().flatten().tolist()))
            raise InputError(
                f"the scores of these images of the batch are not finite: {rows}; in half precision take float32, else train again"
            )
        return output

    def _draw_tiles(self, pixel_values: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict]:
        """What a training step sees of images (B, C, H, W): a tile of each. Where `inputs` hold images, too, a subclass draws the same tiles of them."""
        return draw_tiles(self.config.tiles, pixel_values)[0], inputs

    def _cut(self, pixel_values: torch.Tensor, chosen: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What the networks see of images (B, C, H, W): their tiles, or those `chosen` (B, n), of a few images at a time, or the images as they are."""
        if self.config.tiles == 1:
            return [pixel_values]
        chunks = pieces(pixel_values.shape[0], _MAX_CUT_PIXELS, pixel_values.shape[-2:].numel())
        return [cut_tiles(pixel_values[chunk], self.config.tiles, None if chosen is None else chosen[chunk]) for chunk in chunks]

    def _score_images(self, pixel_values: torch.Tensor, output_anomaly_maps: bool, output_embeddings: bool) -> AnomalyDetectorOutput:
        """`compute_scores` of images. If these are cut, the highest score of its tiles is an image's, its map is put together of theirs."""
        asked = {"output_anomaly_maps": output_anomaly_maps, "output_embeddings": output_embeddings}
        outputs = [self.compute_scores(tiles, **asked) for tiles in self._cut(pixel_values)]
        tiles, maps, embeddings = self.config.tiles, None, None
        if tiles == 1:
            return outputs[0]
        scores = torch.cat([output.scores for output in outputs]).unflatten(0, (-1, tiles**2)).amax(1)
        if output_anomaly_maps:
            maps = join_tiles(torch.cat([output.anomaly_maps for output in outputs]), tiles)
        if output_embeddings:
            embeddings = torch.cat([output.embeddings for output in outputs]).unflatten(0, (-1, tiles**2)).mean(1)
        return AnomalyDetectorOutput(scores=scores, anomaly_maps=maps, embeddings=embeddings)

    def check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        """Refuses what the processor does not give, see `forward`."""
        if not isinstance(pixel_values, torch.Tensor):
            raise InputError(
                f"pixel_values are a {type(pixel_values).__name__}: give a tensor, as the processor does with return_tensors='pt'"
            )
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise InputError(
                f"pixel_values must be (batch, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}: "
                "use the processor that was saved with the detector"
            )
        if not pixel_values.is_floating_point():
            raise InputError(
                f"pixel_values are {pixel_values.dtype}: give floats in [−1, 1], as the processor that was saved with the detector does"
            )
        if torch.compiler.is_compiling():  # the graphs of torch.export and torch.compile cannot depend on what the pixels are
            return
        largest = pixel_values.abs().flatten(1).amax(1)
        within = largest <= _LARGEST_PIXEL  # False for NaN
        if not within.all():
            row = int((~within).nonzero()[0])
            if not largest[row].isfinite():
                raise InputError(f"pixel_values[{row}] holds NaN or infinite pixels: leave that image out or repair it")
            raise InputError(
                f"pixel_values[{row}] reaches ±{largest[row].item():.4g}, far from [−1, 1]: use the processor that was saved with the detector"
            )

    def require_fitted(self) -> None:
        """Raises NotFittedError before `fit_reference`."""
        if not self.is_fitted:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: call fit_reference(dataloader) with normal training images first; of a checkpoint, finish its run"
            )

    @torch.inference_mode(False)  # else autograd would refuse the buffers ever after
    @torch.no_grad()
    def fit_reference(
        self, dataloader: Iterable, *, num_images: int | None = None, gather: Callable | None = None, progress: bool = True
    ) -> Self:
        """One pass over the normal training images fills what scoring needs. Any earlier calibration is dropped.

        Args:
            dataloader: batches as dicts with `pixel_values` (and perhaps `labels` or `label`, which must all be 0), or bare (B, C, H, W) tensors.
            num_images: how many there are in all. If these have more tiles than are kept, so many are drawn of each, always the same, as make up for it;
                of a number that is not known all features are computed.
            gather: under several processes, collects a batch of all of them in dataset order without padded duplicates
                (`accelerator.gather_for_metrics`).
            progress: show a progress bar.

        Raises:
            InputError: no images, pixels that `forward` refuses, an image labelled anomalous, or one whose features or score are not finite.
        """
        limit = self.max_reference_images
        sample, seen = Sample(limit), 0
        tiles = self.config.tiles**2
        drawn = tiles if None in (num_images, limit) else min(tiles, math.ceil(limit / max(num_images, 1)))
        generator = torch.Generator().manual_seed(0)
        for pixel_values, labels in self._eval_batches(dataloader, "Fitting the reference", progress):
            refuse_anomalies(labels, "fit_reference")
            self.check_pixel_values(pixel_values)
            chosen = None
            if drawn < tiles:
                chosen = draw_rows(lambda n: torch.rand(n, tiles, generator=generator).argsort(1)[:, :drawn], len(pixel_values))
            with self._own_precision():
                parts = [self.reference_features(part) for part in self._cut(pixel_values.to(self.dtype), chosen)]
            # (B, tiles, …), as `gather` counts images.
            features = {name: torch.cat([part[name] for part in parts]).unflatten(0, (-1, drawn)) for name in parts[0]}
            features = gather(features) if gather else features
            _refuse_not_finite(features, seen)
            seen += len(next(iter(features.values())))
            sample.add({name: value.cpu().flatten(0, 1) for name, value in features.items()})
        if not (features := sample.rows()):
            raise InputError("fit_reference got no images: it needs the normal training images")
        with self._own_precision():
            self.set_reference({name: values.to(self.device) for name, values in features.items()})
        self.config.fitted_for = self.config.values_of(self.config.reference_fields) or None
        self._drop_calibration()
        return self

    def reset_reference(self) -> None:
        """Back to the unfitted state, in which training checkpoints are saved."""
        self.clear_reference()
        self.config.fitted_for = None
        self._drop_calibration()

    @torch.inference_mode(False)  # as `fit_reference`
    def calibrate(
        self, dataloader: Iterable, *, false_positive_rate: float = 0.05, gather: Callable | None = None, progress: bool = True
    ) -> Self:
        """Held-out *normal* images, neither trained on nor in the reference, give the threshold and the conformal p-values.

        Args:
            dataloader: as in `fit_reference`.
            false_positive_rate: the share of normal images that may be flagged, in (0, 1).
            gather: as in `fit_reference`.
            progress: show a progress bar.

        Raises:
            InputError: no images, an image labelled anomalous, or a rate outside (0, 1).
            NotFittedError: before `fit_reference`.
        """
        check_rate(false_positive_rate)  # before anything is scored
        scores, labels, levels = self._score(dataloader, gather, progress, "Calibrating", with_map_levels=self.supports_anomaly_maps)
        refuse_anomalies(labels, "calibrate")
        self.calibration.fit(scores, false_positive_rate)
        self._outdate_reports()
        self.config.num_calibration_scores = scores.numel()
        self.config.false_positive_rate = float(false_positive_rate)
        self.config.anomaly_map_range = None if levels is None else normal_map_range(levels, false_positive_rate)
        self.config.calibrated_for = self.config.values_of(self.config.score_fields)
        return self

    def score(
        self, dataloader: Iterable, *, gather: Callable | None = None, progress: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores (N,) float32 of all images, and their labels (N,) where the batches have them; both on the CPU, memory constant but for these.

        Raises:
            InputError: pixels that `forward` refuses, or labels in some batches alone.
            NotFittedError: before `fit_reference`.
        """
        scores, labels, _ = self._score(dataloader, gather, progress, "Scoring")
        return scores, labels

    def p_values(self, scores: torch.Tensor | Sequence[float]) -> torch.Tensor:
        """Conformal p-values (B,) of scores (B,), a tensor, an array or a list; see `conformal_p_values`. Raises InputError for NaN."""
        return self.calibration.p_values(without_nan(scores))

    def is_anomalous(self, scores: torch.Tensor | Sequence[float], false_positive_rate: float | None = None) -> torch.Tensor:
        """(B,) bool: score strictly above the threshold of `calibrate`, or of another false-positive rate. Scores as in `p_values`."""
        return without_nan(scores) > self.calibration.threshold_at(false_positive_rate)

    # Saving and loading -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, Float32State):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        else:
            super()._init_weights(module)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing: a saved detector refers to the package, whose code is not copied beside it."""

    @classmethod
    def _from_config(cls, config, **kwargs):
        """What `AutoModel.from_config` calls: a detector with new weights, unfitted and uncalibrated even if the configuration is a saved detector's.
        The constructor alone believes that configuration, as the saved weights may be loaded into what it builds."""
        model = super()._from_config(copy.deepcopy(config), **kwargs)
        model.reset_reference()
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ) -> Self:
        """As `PreTrainedModel.from_pretrained`, from safetensors only. With other values of `config.score_fields` than the calibration was made for,
        such as keywords here can give, the calibration is dropped with a warning; with other values of `config.reference_fields`, or with weights that
        `ignore_mismatched_sizes=True` leaves out, the reference, too. With another `false_positive_rate` the threshold becomes that of the new rate;
        `anomaly_map_range` stays that of the old one.

        Raises:
            InputError: the weights lack the reference or the calibration that the config promises, those of a fitted detector lack
                anything at all, or they are damaged, or pickles; or the calibration is none.
            HubError: the Hub refused or cannot be reached, and the cache does not have it; one line, with the remedy.
        """
        name = pretrained_model_name_or_path
        place = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        place["revision"] = kwargs["revision"] = resolve_revision(name, **place)  # one state of the repository for all that is read
        place["subfolder"] = kwargs.get("subfolder") or ""
        find = partial(find_file, name, **place)
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        if (index := find(f"model.safetensors.index{variant}.json")) is not None:
            check_shard_names(index)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # other sizes are refused below
        with _weight_errors(name, find, index):
            model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
            if not ignore_mismatched_sizes:
                model._refuse_other_sizes(info["mismatched_keys"])
        model._refuse_missing(info["missing_keys"], name)
        if info["mismatched_keys"] and model.is_fitted and not model.config.reference_changes:  # these are told of below
            logger.warning(
                "%s: some of its weights have other sizes and begin anew: its reference is dropped; train, fit and calibrate it", name
            )
            model.reset_reference()
        model._align_tensors()
        if name is not None:
            model._homes = [Home.of(name, place["revision"], place["subfolder"], place.get("cache_dir"))]
        if model.device.type != "meta":  # there tensors have no values to check
            model._drop_what_does_not_hold(str(name))
        return (model, info) if output_loading_info else model

    def _get_dtype_plan(self, dtype):
        # transformers itself keeps these modules in float32 when half precision is asked for, but not float64.
        return {**super()._get_dtype_plan(dtype), **dict.fromkeys(self._keep_in_fp32_modules_strict, torch.float32)}

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        if checkpoint_files:
            check_memory(model, checkpoint_files, str(model.config.name_or_path))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, but whole or not at all, and with the companions of the place that the detector was loaded from.

        Files are written to a temporary folder inside `save_directory` and then renamed into place, the config last. Card and results
        describe a detector as it was when they were written: if this one has been fitted or calibrated anew since, or if the folder holds another one, the
        results are left out, and so is what the card says of them.

        Args:
            push_to_hub: push it afterwards. Further keywords go to the method `push_to_hub`; without `repo_id` the repository is called like the folder.
        """
        if not is_main_process:
            return
        target = Path(save_directory).absolute()
        hub = {name: kwargs.pop(name) for name in signature(self.push_to_hub).parameters if name in kwargs} if push_to_hub else {}
        self._save(target, token=token, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant, **kwargs)
        self._homes = [Home(os.fspath(target)), *(home for home in self._homes if not home.lies_in(target))]
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", target.name), token=token, max_shard_size=max_shard_size, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Iterable[str] | str | None = None,
        git_tag: str | None = None,
        image_processor: BaseImageProcessor | None = None,
    ) -> CommitInfo:
        """Pushes the detector whole, in one commit: weights, config, processor, card, results and dissolver.

        What lies beside the weights comes from where the detector was saved last or loaded from. What a person wrote in the repository's card stays.

        Args:
            repo_id: "name" or "organisation/name"; made if it does not exist.
            private: whether a new repository is private.
            revision: branch to push to, made if it does not exist.
            create_pr: open a pull request instead.
            max_shard_size: larger weights are saved in several files.
            tags: for the card; one or several.
            git_tag: also gives the commit this tag.
            image_processor: goes with it in place of the one that lies beside the detector.

        Raises:
            NotFittedError: before `fit_reference`.
            HubError: the Hub refused or cannot be reached; one line, with the remedy.
        """
        self.require_fitted()
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder, repo_id.split("/")[-1])
            with hub_errors(repo_id):
                self._save(folder, token=token, max_shard_size=max_shard_size, whole=True)
            if image_processor is not None:
                image_processor.save_pretrained(folder)
            if not (folder / "README.md").exists():
                write_card(folder, self)
            if tags:
                card = folder / "README.md"
                card.write_text(tag_card(read_card(card), tags), encoding="utf-8")
            if not (folder / "preprocessor_config.json").exists():
                logger.warning("%s gets no image processor: save the detector to a folder with its processor, and push it then", repo_id)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                message=commit_message or f"Upload {type(self).__name__}",
                description=commit_description,
                revision=revision,
                create_pr=create_pr,
                git_tag=git_tag,
            )

    # Inner helpers ------------------------------------------------------------------------------------------------------------

    def _save(self, target: Path, *, token, whole: bool = False, variant: str | None = None, **kwargs) -> None:
        """Saves weights, config and companions; `whole`: companions that cannot be had are an error."""
        self.config.hf_anomaly_version = __version__
        ours = auto_map(AutoConfig=type(self.config), AutoModel=type(self))
        vars(self.config).pop("auto_map", None)
        if ours is not None:  # transformers cannot load a config whose auto_map is null
            self.config.auto_map = ours
        warn_of_lost_companions(self._homes)  # before `target` is made, which may be the place
        with staged(target, outdated_files(self._homes, target, self.config, variant)) as staging:
            super().save_pretrained(staging, variant=variant, **kwargs)
            bring_companions(self._homes, target, staging, token, whole=whole)
            if ours is not None:
                write_remote_code(staging)

    @property
    def device(self) -> torch.device:
        """Where it computes: the place of its buffers, as accelerate may have put its parameters aside, on the disk or in the CPU's memory."""
        return self.calibration.threshold.device

    def _own_precision(self):
        """Turns autocast off, which training in bf16 leaves on in `forward`: threshold and results would not be those of the model that is saved.
        A user's own autocast has no effect either; for scores in bfloat16 load the detector with that dtype.
        """
        return torch.autocast(self.device.type, enabled=False)

    def _outdate_reports(self) -> None:
        for home in self._homes:
            home.reports_hold = False

    @torch.no_grad()
    def _score(self, dataloader: Iterable, gather: Callable | None, progress: bool, description: str, with_map_levels: bool = False):
        """As `score`, and the `map_levels` (N, 2) of all images on request, else None."""
        self.require_fitted()
        # Numbers, not a tensor a batch: those would lie among the batches' own memory and keep the allocator from using it again.
        collected: dict[str, list] = {}
        for pixel_values, labels in self._eval_batches(dataloader, description, progress):
            output = self(pixel_values, output_anomaly_maps=with_map_levels)
            batch = {"scores": output.scores}
            if labels is not None:
                batch["labels"] = labels.to(pixel_values.device)
            if with_map_levels:
                batch["levels"] = map_levels(output.anomaly_maps)
            for name, value in (gather(batch) if gather else batch).items():
                collected.setdefault(name, []).extend(value.tolist())
        everything = {name: torch.tensor(values) for name, values in collected.items()}
        if len(everything.get("labels", ())) not in (0, len(everything.get("scores", ()))):
            raise InputError("some batches have labels and others none: give every image its label, or none")
        return everything.get("scores", torch.zeros(0)), everything.get("labels"), everything.get("levels")

    def _refuse_other_sizes(self, mismatched: Iterable[tuple[str, torch.Size, torch.Size]]) -> None:
        """Refuses weights just loaded whose sizes, (key, saved, expected), do not fit, unless they are of a reference that will be dropped anyway."""
        dropped = ("reference.",) if self.config.reference_changes else ()
        misfits = {f"{key} has {tuple(saved)}, not {tuple(expected)}" for key, saved, expected in mismatched if not key.startswith(dropped)}
        if misfits:
            raise RuntimeError("; ".join(sorted(misfits)))

    def _refuse_missing(self, missing: Iterable[str], name: str | os.PathLike) -> None:
        """Refuses weights just loaded that lack a tensor: any tensor of a fitted detector, else one of the reference or the calibration."""
        states = tuple(f"{prefix}." for prefix, module in self.named_modules() if isinstance(module, Float32State))
        tensors = self.state_dict()
        lost = sorted(key for key in missing if (self.is_fitted or key.startswith(states)) and tensors[key].numel())
        if lost:
            raise InputError(
                f"{name}: the weights lack {', '.join(lost)}, which config.json promises; save the detector again "
                "after fit_reference and calibrate"
            )

    def _align_tensors(self) -> None:
        """Weights mapped from a file lie at any address, and some kernels round otherwise unless it is torch's own alignment."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()

    def _drop_what_does_not_hold(self, name: str) -> None:
        """Drops the reference or the calibration of a detector just loaded if its configuration has changed since they were made."""
        config = self.config
        if changes := config.reference_changes:
            logger.warning("%s was fitted for other features (%s): its reference is dropped; fit and calibrate it again", name, changes)
            self.reset_reference()
        elif changes := config.score_changes:
            logger.warning("%s was calibrated for other scores (%s): its calibration is dropped; calibrate it again", name, changes)
            self._drop_calibration()
        if self.calibration.is_calibrated:
            self.calibration.check(name)
            if self.calibration.move_to(config.false_positive_rate):
                self._outdate_reports()

    def _drop_calibration(self) -> None:
        self._outdate_reports()
        self.calibration.reset()
        self.config.forget_calibration()

    def _eval_batches(self, dataloader: Iterable, description: str, progress: bool):
        """Yields (pixel_values on the model's device, labels or None) in eval mode, and puts the mode back afterwards."""
        from tqdm.auto import tqdm

        was_training = self.training
        self.eval()
        try:
            for batch in tqdm(dataloader, desc=description, unit="batch", disable=not progress):
                held = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
                if not isinstance(pixel_values := held.get("pixel_values"), torch.Tensor):
                    raise InputError(
                        f"a batch is a {type(batch).__name__}: give tensors (B, C, H, W), or dicts that hold such as 'pixel_values'"
                    )
                labels = held.get("labels", held.get("label"))
                yield pixel_values.to(self.device), None if labels is None else torch.as_tensor(labels)
        finally:
            self.train(was_training)


@contextmanager
def _weight_errors(name: str | os.PathLike | None, find: Callable[[str], str | None], index: str | None) -> Iterator[None]:
    """Turns what goes wrong while the block loads weights into an error of one line with the remedy.

    Args:
        find: gives the path of a file beside the weights, None if there is none.
        index: the path of the index of their shards, None if there is none.
    """
    try:
        with hub_errors(str(name), reading=True):
            yield
    except (SafetensorError, RuntimeError) as error:
        if torch.get_default_device().type == "meta":  # transformers refuses that, and says what to do instead
            raise
        reason = one_line(error)
        raise InputError(f"{name}: the weights are damaged or do not fit config.json ({reason}); save or download them again") from error
    except HubError:
        raise
    except OSError as error:
        if index is None and find("model.safetensors") is None and (find("pytorch_model.bin") or find("pytorch_model.bin.index.json")):
            raise InputError(
                f"{name}: its weights are pickles (.bin), which run code when they are loaded, and are refused; save them as safetensors"
            ) from error
        raise


class SelfContainedDetector(AnomalyDetector):
    """A detector that compares with nothing but its weights: `fit_reference` only checks that they score the normal training images."""

    config_class = SelfContainedDetectorConfig
    config: SelfContainedDetectorConfig

    @property
    def is_fitted(self) -> bool:
        return self.config.num_reference_images > 0

    def reference_features(self, pixel_values):
        return {"scores": self.compute_scores(pixel_values, output_anomaly_maps=False, output_embeddings=False).scores}

    def set_reference(self, features):
        self.config.num_reference_images = len(features["scores"]) // self.config.tiles**2

    def clear_reference(self):
        self.config.num_reference_images = 0
