from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...backbones.configuration_small_resnet import SmallResNetConfig
from ...backbones.pretrained import check_channels
from ...detector import SelfContainedDetectorConfig
from ...errors import InputError

_MOST_SIZES = 16  # each halves the image, and costs time before the weights are looked at
_MIN_SIZE = 8  # px: below, the coarsest map of the default is one pixel of mere padding


@strict
class ADDPConfig(SelfContainedDetectorConfig):
    """Configuration of `ADDPForPreTraining` and of `ADDPModel`, which begins with the weights of the former.

    The paper's abstract is all that could be had: backbones are those that it cites, and none of the values below is the paper's.

    Args:
        image_size: from 8 pixels, even or odd. The networks are fully convolutional: weights pretrained at one size serve at any other.
        encoder: `"unet"` (Ronneberger et al. 2015); `"segnet"` (Badrinarayanan et al. 2017), whose decoder puts each value back to where max-pooling
            found it; or `"backbone"`, any `AutoBackbone`, with U-Net's decoder. Default: `"backbone"` where there is a `backbone_config`, else `"unet"`.
            The places that SegNet hands over tell where edges lie, of a part of the image never seen before, too: it is a weak skip connection.
        backbone_config: any `AutoBackbone` configuration, as an object or a dict with `model_type`; default a `SmallResNetConfig` of these channels.
        hidden_sizes: channels at full, half, a quarter … of the resolution, of encoder and decoder; with a backbone of the decoder, the last of them at
            the resolution of its last map. One entry a doubling and one more fits: six for strides of 32.
        latent_size: channels between encoder and decoder, the bottleneck. By default a position of it stands for 64 pixels, so that 2 channels are a
            thirty-second of a gray image's numbers. A wide one lets everything through, anomalies too.
        skip_connections: hand the encoder's finer maps to the decoder, as U-Net does for segmentation; of a backbone, those of its `out_features`. Off: with
            them the decoder copies the image past the bottleneck, reconstruction becomes the identity, and every score nearly 0.
        attention_gates: weigh the maps of skip connections by what the decoder asks for (Oktay et al., arXiv 1804.03999).
        norm: `"batch"`, or `"group"`, which keeps no batch statistics: for tiny batches, or several processes on CPUs.
        noise: of pretraining, `"gaussian"`, `"coarse"` or `"simplex"`; see `hf_anomaly.ops.noise`.
        noise_level: its standard deviation σ, in units of `pixel_values`, which span 2. A fifth of the range is near what decoder denoising
            pretraining takes (.22).
        noise_resolution: points of coarse noise, or units of simplex noise's first octave, along the image's side.
        pretraining_mode: what pretraining trains, `"encoder_decoder"` or `"decoder"`, the encoder frozen.
        freeze_encoder: whether the detector's training leaves the encoder as it is. Frozen are its parameters, batch statistics and dropout.
        map_filter_size: side of the median filter on anomaly maps, odd, in pixels; 1: none, so that a score is its map's mean. A larger one takes away
            single pixels and thin edges, and anomalies as small as them.

    Raises:
        InputError: a value out of range, values that contradict each other, or an unknown field.
    """

    model_type = "addp_anomaly"
    score_fields = (
        *SelfContainedDetectorConfig.score_fields,
        *("encoder", "backbone_config", "skip_connections", "attention_gates", "norm"),
        "map_filter_size",  # of the maps, whose range calibration finds
    )
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="small_resnet", optional=True)}

    encoder: Literal["unet", "segnet", "backbone"] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    hidden_sizes: list | tuple = (16, 32, 64, 128)
    latent_size: int = 2
    skip_connections: bool = False
    attention_gates: bool = False
    norm: Literal["batch", "group"] = "batch"
    noise: Literal["gaussian", "coarse", "simplex"] = "gaussian"
    noise_level: float | int = 0.4
    noise_resolution: int = 4
    pretraining_mode: Literal["encoder_decoder", "decoder"] = "encoder_decoder"
    freeze_encoder: bool = False
    map_filter_size: int = 1

    def __post_init__(self, **kwargs):
        self.hidden_sizes = list(self.hidden_sizes)
        if self.encoder is None:
            self.encoder = "unet" if self.backbone_config is None else "backbone"
        if self.encoder == "backbone" and self.backbone_config is None:
            self.backbone_config = SmallResNetConfig(num_channels=self.num_channels)
        super().__post_init__(**kwargs)

    def check(self):
        super().check()
        if self.tile_size < _MIN_SIZE:
            size = "image_size" if self.tiles == 1 else "image_size / tiles"
            raise InputError(f"{size} must be at least {_MIN_SIZE} pixels, got {self.tile_size}: --image_size enlarges the images")
        if self.encoder == "backbone":
            check_channels(self.backbone_config, self.num_channels)
        elif self.backbone_config is not None:
            raise InputError(f"encoder {self.encoder!r} has no backbone: leave backbone_config out, or set encoder to 'backbone'")
        if not 2 <= len(self.hidden_sizes) <= _MOST_SIZES or not all(isinstance(width, int) and width > 0 for width in self.hidden_sizes):
            raise InputError(f"hidden_sizes must be 2 to {_MOST_SIZES} positive integers, got {str(self.hidden_sizes)[:100]}")
        if self.latent_size < 1:
            raise InputError(f"latent_size must be at least 1, got {self.latent_size}")
        if self.skip_connections and self.encoder == "segnet":
            raise InputError("segnet has no skip connections besides the places of its maxima: set skip_connections to False, or take unet")
        if self.attention_gates and not self.skip_connections:
            raise InputError("attention_gates weigh skip connections: set skip_connections too, or leave them out")
        if self.skip_connections and self.encoder == "backbone":
            maps = len(self.backbone_config.out_features)
            if not 2 <= maps <= len(self.hidden_sizes):
                raise InputError(
                    f"skip_connections join the maps of the backbone's out_features, two to {len(self.hidden_sizes)} (the length of "
                    f"hidden_sizes), got {maps}: name them in backbone_config"
                )
        if not 0 <= self.noise_level < float("inf"):
            raise InputError(f"noise_level must be a number ≥ 0, got {self.noise_level}")
        if self.noise_resolution < 1:
            raise InputError(f"noise_resolution must be at least 1, got {self.noise_resolution}")
        if self.map_filter_size < 1 or self.map_filter_size % 2 == 0:
            raise InputError(f"map_filter_size must be odd and at least 1, got {self.map_filter_size}")
