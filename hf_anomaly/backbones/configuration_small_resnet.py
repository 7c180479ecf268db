from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..errors import InputError


@strict
class SmallResNetConfig(BackboneConfigMixin, PreTrainedConfig):
    """A ResNet for small images: a stem of one convolution without max-pool, basic blocks.

    Args:
        num_channels: channels of the images.
        hidden_sizes: width of each stage; each but the first halves the resolution.
        depths: basic blocks of each stage.
        stem_stride: stride s of the first convolution; 1 is the CIFAR stem, 4 covers what ImageNet's stem does. Its kernel is max(3, 2s − 1) up to 4, half
            as wide again as the stride beyond.
        norm: `"batch"`, or `"group"` (8 groups or fewer), which keeps no batch statistics.
    """

    model_type = "small_resnet"

    num_channels: int = 1
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    depths: list[int] | tuple[int, ...] = (1, 1, 1, 1)
    stem_stride: int = 1
    norm: Literal["batch", "group"] = "batch"

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None))
        super().__post_init__(**kwargs)
        if len(self.hidden_sizes) != len(self.depths) or not self.depths or min(self.hidden_sizes + self.depths) < 1:
            raise InputError(f"hidden_sizes {self.hidden_sizes} and depths {self.depths} must be equally long lists of positive integers")
        if self.stem_stride < 1:
            raise InputError(f"stem_stride must be at least 1, got {self.stem_stride}")
