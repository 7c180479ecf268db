import math

from torch import nn


def norm_layer(kind: str, channels: int) -> nn.Module:
    """`"batch"` normalisation, or `"group"` (8 groups or fewer), which keeps no batch statistics."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)
