from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...backbones.configuration_small_resnet import SmallResNetConfig
from ...backbones.pretrained import check_channels
from ...detector import AnomalyDetectorConfig
from ...errors import InputError
from ...ops.views import NUM_CROPS

_COMPARED = {
    "projection": ("projection",),
    "penultimate": ("penultimate",),
    "both": ("projection", "penultimate"),
    "all": ("projection", "penultimate", "deviation"),
}


@strict
class CSIConfig(AnomalyDetectorConfig):
    """Configuration of `CSIModel`, and the base of `DIAConfig`.

    Args:
        backbone_config: any `AutoBackbone` configuration, as an object or a dict with `model_type`; default a `SmallResNetConfig` for `tile_size`.
        num_encoders: encoders with heads of their own, trained side by side on the same views; their scores are averaged. Each costs the time of one.
        projection_size: width of z, the output of the projection head, which the contrastive loss compares.
        score_features: what Eq. 10 compares at test time: `"projection"`, the head's z, as printed; `"penultimate"`, the encoder's features f, its last map's
            mean over space; `"both"`; or `"all"`, these two and the map's standard deviation over space. Several are concatenated, each of length 1. The
            head drops what its loss has no use for (Chen et al., arXiv 2002.05709, section 4.2), in which an anomaly may show, or only a change of the
            camera; the mean drops how unevenly a feature is spread. Files that lack the field mean `"projection"`.
        score_whitening: the similarity to the nearest training image is not its cosine but −‖W(u − u_m)‖, where u are features of length 1 and W whitens
            those of the training images (`fit_whitening`): directions in which normal images differ anyway count less. W takes the square of the features'
            number in memory, for each shift and encoder. Files that lack the field mean False.
        score_ignores_detail: the whitened distance leaves out the direction in which the features of the training images move when these lose fine detail
            (shrunk to half their size and enlarged again, see `leave_out_change`), so that normal images of a device with less detail look less like
            anomalies, most of all to an encoder that dissolved images taught to see it. Needs `score_whitening`, and a second look at each training image.
        shift: the shifting transformations S_k: `"rotate"` by 0/90/180/270° or `"perm"`, the halves swapped.
        temperature: τ of Eq. 6.
        shift_loss_weight: λ of Eq. 9.
        loss_divisor: what Eq. 7's sum is divided by: `"anchors"`, the mean over positive pairs as printed, or `"views"`, all views as in the
            authors' code. The same without branch D.
        crop_scale: area of the random resized crops, as a share of the image.
        color_jitter: strengths of brightness, contrast, saturation and hue; gray images use the first two.
        jitter_probability, gray_probability, flip_probability: how often each is applied.
        test_views: the fixed views at test time: `"augmentations"`, whole augmentations with crops of `test_crop_scale`, drawn once, as in the
            authors' code; or `"crops"`, the corners and the centre.
        num_test_views: how many; features are averaged over them. By default 10 augmentations, or the 5 crops; more would be the same crops again.
        test_crop_scale: area of a test-time crop, as a share of the image: a number, or two between which those of augmentations are drawn (`"crops"` have
            the middle of the two). The authors take 0.54, the smallest that training sees, so that an enlarged normal image looks like none of its views.
        score_cosine, score_norm, score_shift_logit: the terms of Eq. 10 that enter the score: max cos(z, z_m), λ_sim·‖z‖, λ_cls·W_k·f_k, with z the
            `score_features`. Cosine and norm multiply where both are on; the norm needs unwhitened features of one kind.
        max_bank_size: at most so many training images, or tiles, are compared with, a fixed random choice among more; whitening and λ are of these, too.
        bank_size: how many are in it; 0 before `fit_reference`.
        search_chunk_size: elements held at once while the bank is searched, beside the bank itself: bounds the memory of scoring; see `max_cosine`.

    Raises:
        InputError: a value out of range, an unknown field, fields that exclude each other, or a backbone whose `num_channels` differ.
    """

    model_type = "csi_anomaly"
    reference_fields = (
        *AnomalyDetectorConfig.score_fields,
        *("backbone_config", "shift", "score_features", "score_whitening", "score_ignores_detail"),
        *("test_views", "num_test_views", "test_crop_scale"),
        *("color_jitter", "jitter_probability", "gray_probability", "flip_probability"),  # which the test-time views have, too
    )
    score_fields = (*reference_fields, "score_cosine", "score_norm", "score_shift_logit")
    recorded_fields = (*AnomalyDetectorConfig.recorded_fields, "bank_size")
    fields_before = {
        **AnomalyDetectorConfig.fields_before,
        "score_features": "projection",
        "score_whitening": False,
        "score_ignores_detail": False,
    }
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="small_resnet", optional=True)}

    backbone_config: dict | PreTrainedConfig | None = None
    num_encoders: int = 1
    projection_size: int = 128
    shift: Literal["rotate", "perm"] = "rotate"
    temperature: float | int = 0.5
    shift_loss_weight: float | int = 1.0
    loss_divisor: Literal["anchors", "views"] = "anchors"
    crop_scale: list | tuple = (0.54, 1.0)
    color_jitter: list | tuple = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float | int = 0.8
    gray_probability: float | int = 0.2
    flip_probability: float | int = 0.5
    test_views: Literal["crops", "augmentations"] = "augmentations"
    num_test_views: int | None = None
    score_features: Literal["projection", "penultimate", "both", "all"] = "all"
    score_whitening: bool = True
    score_ignores_detail: bool = False
    test_crop_scale: float | int | list | tuple = (0.54, 0.7)
    score_cosine: bool = True
    score_norm: bool = False
    score_shift_logit: bool = False
    max_bank_size: int = 20_000
    bank_size: int = 0
    search_chunk_size: int = 2**24

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            # From 28 px on the first stage works at 14 to 21 px whatever the size: at 28 px a quarter of the time of stride 1.
            stride = max(1, self.tile_size // 14)
            self.backbone_config = SmallResNetConfig(num_channels=self.num_channels, hidden_sizes=(16, 32, 64, 128), stem_stride=stride)
        if self.num_test_views is None:
            self.num_test_views = NUM_CROPS if self.test_views == "crops" else 10
        self.crop_scale, self.color_jitter = list(self.crop_scale), list(self.color_jitter)
        scale = [self.test_crop_scale] if isinstance(self.test_crop_scale, float | int) else list(self.test_crop_scale)
        self.test_crop_scale = scale * 2 if len(scale) == 1 else scale
        super().__post_init__(**kwargs)

    @property
    def compared_features(self) -> tuple[str, ...]:
        """The kinds of features that `score_features` names, in the order in which they are concatenated."""
        return _COMPARED[self.score_features]

    def check(self):
        super().check()
        check_channels(self.backbone_config, self.num_channels)
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be a number > 0, got {self.temperature}")
        if not 0 <= self.shift_loss_weight < float("inf"):
            raise InputError(f"shift_loss_weight must be a number ≥ 0, got {self.shift_loss_weight}")
        for name in ("crop_scale", "test_crop_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not _are_numbers(scale) or not 0 < scale[0] <= scale[1] <= 1:
                raise InputError(f"{name} must be two numbers 0 < low ≤ high ≤ 1, got {scale}")
        jitter = self.color_jitter
        if len(jitter) != 4 or not _are_numbers(jitter) or not all(0 <= x < float("inf") for x in jitter) or jitter[3] > 0.5:
            raise InputError(f"color_jitter must be four strengths ≥ 0, the last (hue) ≤ 0.5, got {jitter}")
        for name in ("jitter_probability", "gray_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not (self.score_cosine or self.score_norm or self.score_shift_logit):
            raise InputError("score_cosine, score_norm and score_shift_logit are all off: the score needs at least one of them")
        if self.score_ignores_detail and not self.score_whitening:
            raise InputError("score_ignores_detail is of the whitened distance: set score_whitening to True, or leave it out")
        if self.score_norm and (self.score_whitening or len(self.compared_features) > 1):
            raise InputError(
                "score_norm needs features as they are: set score_whitening to False, and score_features to 'projection' or 'penultimate' "
                f"(got {self.score_features!r})"
            )
        for name in ("num_encoders", "projection_size", "num_test_views", "max_bank_size", "search_chunk_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, most in (("num_encoders", 64), ("projection_size", 2**16)):
            if getattr(self, name) > most:
                raise InputError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not 0 <= self.bank_size <= self.max_bank_size:
            raise InputError(f"bank_size must be between 0 and max_bank_size ({self.max_bank_size}), got {self.bank_size}")


def _are_numbers(values: list) -> bool:
    return all(isinstance(value, float | int) for value in values)
