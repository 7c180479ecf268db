import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

from .configuration_small_resnet import SmallResNetConfig
from .layers import norm_layer


def _stem_window(stride: int) -> tuple[int, int]:
    """Kernel and padding of the stem. Windows overlap; beyond a stride of 4 less so, for speed, and sides that are no multiple of it lose a few pixels."""
    if stride <= 4:
        kernel = max(3, 2 * stride - 1)
        return kernel, kernel // 2
    margin = -(-stride // 4)
    return stride + 2 * margin, margin


class _Stem(nn.Conv2d):
    """`nn.Conv2d`, in half of its time for large kernels: two neighbouring columns of pixels become one of twice the channels.

    Of images in channels_last that is a view; of others it copies. For three channels oneDNN has no fast kernels, for six it has.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (stride, _), (padding, _) = self.stride, self.padding
        if stride <= 4 or stride % 2 or x.shape[-1] % 2:
            return super().forward(x)
        pairs = x.movedim(1, -1).unflatten(2, (-1, 2)).flatten(3).movedim(-1, 1)  # (N, 2C, H, W/2)
        odd = padding % 2  # then a column of zeros on either side of the kernel, which is of even width, makes whole pairs
        weight = F.pad(self.weight, (odd, odd)).unflatten(-1, (-1, 2)).permute(0, 4, 1, 2, 3).flatten(1, 2)
        return F.conv2d(pairs, weight, stride=(stride, stride // 2), padding=(padding, (padding + odd) // 2))


class BasicBlock(nn.Module):
    def __init__(self, config: SmallResNetConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            norm_layer(config.norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            norm_layer(config.norm, out_channels),
        )
        # Not in the shortcut's convolution: of few channels in channels_last, oneDNN's backward pass writes past its memory (oneDNN #6035).
        self.subsample = nn.AvgPool2d(1, stride) if stride != 1 else nn.Identity()
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm_layer(config.norm, out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.residual(x) + self.shortcut(self.subsample(x)))


class SmallResNetBackbone(BackboneMixin, PreTrainedModel):
    """He et al. 2016 with the CIFAR stem; the default encoder. (B, C, H, W) → feature maps of the stages named in `out_features`."""

    config_class = SmallResNetConfig
    main_input_name = "pixel_values"
    has_attentions = False
    memory_format = torch.channels_last  # of the maps: a fifth less time on CPUs

    def __init__(self, config: SmallResNetConfig):
        super().__init__(config)
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        self.num_features = widths
        stride = config.stem_stride
        kernel, padding = _stem_window(stride)
        self.stem = nn.Sequential(
            _Stem(config.num_channels, widths[0], kernel, stride, padding, bias=False),
            norm_layer(config.norm, widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    BasicBlock(config, widths[i] if block == 0 else widths[i + 1], widths[i + 1], 2 if i and block == 0 else 1)
                    for block in range(depth)
                )
            )
            for i, depth in enumerate(config.depths)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None) -> BackboneOutput:
        """The maps of `out_features` and, on request here or in the configuration, of all stages."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if pixel_values.shape[1] == 1 and self.memory_format is torch.channels_last:
            # One channel lies innermost as well as outermost. Unless its strides say the former, oneDNN takes another backward pass, ten times as slow.
            n, _, height, width = pixel_values.shape
            pixel_values = pixel_values.reshape(n, height, width, 1).movedim(-1, 1)
        hidden_state = self.stem(pixel_values).contiguous(memory_format=self.memory_format)
        maps = {"stem": hidden_state}
        for i, stage in enumerate(self.stages, 1):
            hidden_state = stage(hidden_state)
            maps[f"stage{i}"] = hidden_state
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
        )
