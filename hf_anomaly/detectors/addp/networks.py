"""Encoders and the decoder of ADDP."""

import math
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import nn

from ...backbones.layers import norm_layer
from ...backbones.pretrained import build_backbone
from .configuration_addp import ADDPConfig


class ConvLayer(nn.Sequential):
    """A 3 × 3 convolution, normalisation and ReLU; the resolution stays."""

    def __init__(self, config: ADDPConfig, in_channels: int, out_channels: int):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        super().__init__(convolution, norm_layer(config.norm, out_channels), nn.ReLU(inplace=True))


class ConvBlock(nn.Sequential):
    """Two of them."""

    def __init__(self, config: ADDPConfig, in_channels: int, out_channels: int):
        super().__init__(ConvLayer(config, in_channels, out_channels), ConvLayer(config, out_channels, out_channels))


class ConvEncoder(nn.Module):
    """Encoder of U-Net and SegNet: a block, then max-pooling by 2 and a block for each further width. Odd maps are rounded up, so that any size will do."""

    def __init__(self, config: ADDPConfig):
        super().__init__()
        self.channels = config.hidden_sizes
        widths = [config.num_channels, *config.hidden_sizes]
        self.blocks = nn.ModuleList(ConvBlock(config, *pair) for pair in pairwise(widths))

    def forward(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(B, C, H, W) → the maps, fine to coarse, and where each pooling found its maxima, (B, c, h, w) indices each."""
        x = self.blocks[0](pixel_values)
        maps, places = [x], []
        for block in self.blocks[1:]:
            x, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            x = block(x)
            maps.append(x)
            places.append(indices)
        return maps, places


class BackboneEncoder(nn.Module):
    """Any `AutoBackbone`; its maps, fine to coarse, and no places."""

    def __init__(self, config: ADDPConfig):
        super().__init__()
        self.backbone = build_backbone(config.backbone_config, config.tile_size, config.num_channels)
        self.channels = list(self.backbone.channels)

    def forward(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return list(self.backbone(pixel_values).feature_maps), []


ENCODERS = {"unet": ConvEncoder, "segnet": ConvEncoder, "backbone": BackboneEncoder}


def interpolate(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Feature maps (B, c, h, w) at another height and width: bilinear between the cells' centres, without the average of `ops.resizing.resize`."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def unpool(x: torch.Tensor, size: tuple[int, int], places: torch.Tensor) -> torch.Tensor:
    """As `F.max_unpool2d`, which has no deterministic implementation. Windows do not overlap, so that no place is taken twice."""
    return x.new_zeros(*x.shape[:2], math.prod(size)).scatter(2, places.flatten(2), x.flatten(2)).unflatten(2, size)


class AttentionGate(nn.Module):
    """α = σ₂(ψᵀ σ₁(W_x x + W_g g)), σ₁ ReLU and σ₂ the sigmoid (Oktay et al. 2018, Eq. 1–2), for x and g of one resolution."""

    def __init__(self, skip_channels: int, gating_channels: int):
        super().__init__()
        inner = max(1, skip_channels // 2)
        self.skip = nn.Conv2d(skip_channels, inner, 1, bias=False)
        self.gating = nn.Conv2d(gating_channels, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """(B, 1, h, w) in [0, 1], the weight of each position of the skip connection x (B, c, h, w), given the decoder's g (B, c', h, w)."""
        return self.psi(F.relu(self.skip(x) + self.gating(g))).sigmoid()


class DecoderLevel(nn.Module):
    """Narrows the coarser map, upsamples it, joins the skip connection if there is one, and mixes."""

    def __init__(self, config: ADDPConfig, in_channels: int, out_channels: int, skip_channels: int = 0):
        super().__init__()
        self.narrow = ConvLayer(config, in_channels, out_channels)
        self.gate = AttentionGate(skip_channels, out_channels) if skip_channels and config.attention_gates else None
        self.mix = ConvLayer(config, out_channels + skip_channels, out_channels)

    def forward(
        self, x: torch.Tensor, size: tuple[int, int], skip: torch.Tensor | None = None, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.narrow(x)
        x = interpolate(x, size) if places is None else unpool(x, size, places)
        if skip is not None:
            skip = interpolate(skip, size)
            x = torch.cat([x, skip if self.gate is None else self.gate(skip, x) * skip], dim=1)
        return self.mix(x)


class Decoder(nn.Module):
    """The encoder's maps → images: a bottleneck of `latent_size` channels, then a level for each finer resolution.

    Args:
        channels: of the encoder's maps, fine to coarse.
    """

    def __init__(self, config: ADDPConfig, channels: list[int]):
        super().__init__()
        self.skip_connections, self.unpool = config.skip_connections, config.encoder == "segnet"
        self.squeeze = nn.Conv2d(channels[-1], config.latent_size, 1, bias=False)
        widths = config.hidden_sizes[::-1]
        self.expand = ConvLayer(config, config.latent_size, widths[0])
        # Coarse to fine; a backbone may have fewer maps than there are levels, the finest then go without.
        skips = channels[-2::-1] if config.skip_connections else []
        skips += [0] * (len(widths) - 1 - len(skips))
        self.levels = nn.ModuleList(DecoderLevel(config, *sizes) for sizes in zip(widths, widths[1:], skips, strict=False))
        self.head = nn.Conv2d(widths[-1], config.num_channels, 1)

    def forward(self, maps: list[torch.Tensor], places: list[torch.Tensor], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) of the given size, and the latents (B, latent_size, h, w) that they are made of."""
        latents = self.squeeze(maps[-1])
        x = self.expand(latents)
        halvings = reversed(range(len(self.levels)))
        skips = maps[-2::-1] if self.skip_connections else []
        places = places[::-1] if self.unpool else []
        for level, halved, skip, where in zip_longest(self.levels, halvings, skips, places):
            x = level(x, tuple(-(-side // 2**halved) for side in size), skip, where)
        return self.head(x), latents
