"""Parameters and multiply–accumulate operations, counted on networks without data."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, ResNetConfig

from ..detectors.dia.configuration_dia import DIAConfig
from ..dissolving import build_unet
from .contrastive import DISSOLVER_LENGTHS

IMAGE_SIZE = 224  # px; RGB
_PAPER = {None: (11.2, 1.82), 32: (19.93, 2.33), 64: (19.93, 3.84), 128: (19.93, 9.90)}  # Table 6


@dataclass(frozen=True)
class Cost:
    """Of one forward pass.

    Attributes:
        parameters: how many.
        macs: multiply–accumulate operations of convolutions and matrix products; normalisation and activations are not counted.
    """

    parameters: int
    macs: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.macs + other.macs)


def cost(network: nn.Module, *inputs: torch.Tensor) -> Cost:
    """Counts a network in eval mode; on the meta device nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(*inputs)
    return Cost(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() // 2)


def dissolving_costs() -> list[dict[str, str]]:
    """Table 6 of DIA, a line a resolution: the encoder alone, and with the diffusion model that dissolves; for the paper's sizes and for the defaults."""
    resnet = ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage4"],
    )
    columns = {
        "ResNet-18, UNet of budget paper": (resnet, DISSOLVER_LENGTHS["paper"].widths),
        "the defaults": (DIAConfig(image_size=IMAGE_SIZE, num_channels=3).backbone_config, DISSOLVER_LENGTHS["laptop"].widths),
    }
    lines = []
    for resolution, printed in _PAPER.items():
        line = {"dissolved at": "without" if resolution is None else f"{resolution} × {resolution}"}
        line |= {"paper: parameters (M)": f"{printed[0]:.2f}", "paper: MACs (G)": f"{printed[1]:.2f}"}
        for title, (encoder, widths) in columns.items():
            with torch.device("meta"):
                total = cost(AutoBackbone.from_config(encoder), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
                if resolution is not None:
                    images, timesteps = torch.zeros(1, 3, resolution, resolution), torch.zeros(1, dtype=torch.long)
                    total += cost(build_unet(resolution, 3, widths), images, timesteps)
            line |= {f"{title}: parameters (M)": f"{total.parameters / 1e6:.2f}", f"{title}: MACs (G)": f"{total.macs / 1e9:.2f}"}
        lines.append(line)
    return lines
