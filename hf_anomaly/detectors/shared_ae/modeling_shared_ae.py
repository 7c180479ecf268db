"""SharedAE: two decoders that share two encoders and train against each other (Jia & Liu 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from ...detector import AnomalyDetectorOutput, SelfContainedDetector
from ...errors import InputError
from ...ops.distributed import gather_rows
from .configuration_shared_ae import SharedAEConfig

_LEAK = 0.2  # LeakyReLU's slope below 0
_LATENT_SCALE = 0.14  # the standard deviation of what Tanh makes latents of, in a new encoder


def _hidden_layer(convolution: nn.Module, norm: bool) -> list[nn.Module]:
    return [convolution, *([nn.BatchNorm2d(convolution.out_channels)] if norm else []), nn.LeakyReLU(_LEAK, inplace=True)]


class SharedAEEncoder(nn.Sequential):
    """Images (B, C, H, W) → latents (B, latent_size, 1, 1) in [−1, 1] (Fig. 3A)."""

    def __init__(self, config: SharedAEConfig):
        widths, layers = [config.num_channels, *config.hidden_sizes], []
        for i, stride in enumerate(config.strides):
            layers += _hidden_layer(nn.Conv2d(widths[i], widths[i + 1], 2 * stride, stride, stride - 1, bias=i == 0), norm=i > 0)
        super().__init__(*layers, nn.Conv2d(widths[-1], config.latent_size, config.feature_sizes[-1]), nn.Tanh())


class SharedAEDecoder(nn.Sequential):
    """Latents (B, latent_size, 1, 1) → images (B, C, H, W) in [−1, 1]: the encoder mirrored, with one more batch normalisation (Fig. 3B)."""

    def __init__(self, config: SharedAEConfig):
        widths, sizes = [config.num_channels, *config.hidden_sizes], config.feature_sizes
        layers = _hidden_layer(nn.ConvTranspose2d(config.latent_size, widths[-1], sizes[-1], bias=False), norm=True)
        for i, stride in reversed(list(enumerate(config.strides))):
            rest = (sizes[i] - 2) % stride  # what rounding down took away in the encoder
            up = nn.ConvTranspose2d(widths[i + 1], widths[i], 2 * stride, stride, stride - 1, output_padding=rest, bias=i == 0)
            layers += _hidden_layer(up, norm=True) if i > 0 else [up, nn.Tanh()]
        super().__init__(*layers)


class SharedAEModel(SelfContainedDetector):
    """Two encoder–decoder–encoders, E1→D1→E2 and E1→D2→E2, of which the second learns to deceive the first.

        z = E1(x)   x_i = D_i(z)   z_i = E2(x_i)   x1' = D1(z2)   z1' = E2(x1')
        rec_i  = α‖x − x_i‖² + β‖z − z_i‖²                                                          (Eq. 1–2)
        adv    = α‖x − x1'‖² + β‖z − z1'‖²                                                          (Eq. 3–5)
        L_EDE1 = (1/n) rec_1 − (1 − 1/n) adv,   L_EDE2 = (1/n) rec_2 + (1 − 1/n) adv                (Eq. 6–7)
        A(x)   = ω1‖z − z2‖² + ω2‖z − z1'‖²                                                         (Algorithm 2)

    n is the epoch, from 1. For every batch phase `"ede1"` updates E1, D1 and E2 by L_EDE1, then phase `"ede2"` E1, D2 and E2 by L_EDE2; on their sum the
    adversarial terms would cancel. Tanh bounds images and latents, hence adv, and with it L_EDE1 from below.

    Three deviations. Eq. 7 and Algorithm 1 print x1 and z1 in the first bracket of L_EDE2: a slip, by Eq. 2 and the text they are x2 and z2, else
    nothing would teach D2 to reconstruct. The weight of adv is bounded (`max_adversarial_weight`), and so is what EDE1 gains by adv
    (`adversarial_margin`). In the losses ‖·‖² is the mean of the squares, in the score their sum.

    The anomaly map is ‖x − x1'‖ of every pixel, over the channels. With ablation `"one"` there is no D2: the score is ‖z − z1‖² and the map
    ‖x − x1‖.

    Reference: Jia & Liu, Anomaly detection in images with shared autoencoders, Frontiers in Neurorobotics 16, 2023, doi 10.3389/fnbot.2022.1046867.
    """

    config_class = SharedAEConfig
    config: SharedAEConfig
    supports_anomaly_maps = True
    citation = """\
@article{jia2023anomaly,
  title = {Anomaly Detection in Images with Shared Autoencoders},
  author = {Jia, Haoyang and Liu, Wenfen},
  journal = {Frontiers in Neurorobotics},
  volume = {16},
  year = {2023},
  doi = {10.3389/fnbot.2022.1046867}
}"""

    def __init__(self, config: SharedAEConfig):
        super().__init__(config)
        self.encoder1, self.encoder2 = SharedAEEncoder(config), SharedAEEncoder(config)
        self.decoder1 = SharedAEDecoder(config)
        if config.ablation != "one":
            self.decoder2 = SharedAEDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module in (self.encoder1[-2], self.encoder2[-2]):
            # Into the linear range of Tanh. With He's scale the latents soon saturate, all images get the same one, and the decoders paint the mean image.
            init.normal_(module.weight, std=_LATENT_SCALE / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # After He et al. 2015: with transformers' N(0, 0.02) the latents of all images would be nearly 0.
            init.kaiming_normal_(module.weight, a=_LEAK, mode="fan_in" if isinstance(module, nn.Conv2d) else "fan_out")

    # Training -----------------------------------------------------------------------------------------------------------------

    @property
    def phases(self):
        shared = [*self.encoder1.parameters(), *self.encoder2.parameters()]
        phases = {"ede1": [*shared, *self.decoder1.parameters()]}
        if self.config.ablation != "one":
            phases["ede2"] = [*shared, *self.decoder2.parameters()]
        return phases

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        epoch: float | None = None,
        phase: str | None = None,
        output_anomaly_maps: bool = False,
        output_embeddings: bool = False,
    ) -> AnomalyDetectorOutput:
        """As `AnomalyDetector.forward`; embeddings are z.

        Args:
            epoch: epochs done, from 0, fractions of the current one included: n = ⌊epoch⌋ + 1. Training needs it, unless an ablation leaves out adv.
            phase: `"ede1"` or `"ede2"`, whose loss training returns. Without it the sum of both, where it has no adversarial terms to cancel: in the
                first epoch and in the ablations.

        Raises:
            InputError: also in training, when the epoch or the phase is missing or unknown, or with a single image, which batch normalisation cannot take.
        """
        return self._forward(pixel_values, epoch, output_anomaly_maps, output_embeddings, phase=phase)

    def adversarial_weight(self, epoch: float | None) -> float:
        """The weight of adv in Eq. 6–7, 1 − 1/n up to `max_adversarial_weight`; the reconstruction's is the rest."""
        if self.config.ablation != "full":
            return 0.0
        if epoch is None:
            raise InputError("SharedAE's losses follow the epoch: give epoch, from 0")
        n = math.floor(epoch) + 1
        return min(1 - 1 / n, self.config.max_adversarial_weight)

    def compute_losses(self, pixel_values, *, epoch, phase):
        weight, names = self.adversarial_weight(epoch), list(self.phases)
        if phase is None and weight > 0:
            raise InputError(f"on the sum of SharedAE's losses the adversarial terms cancel: give phase, in turn {' and '.join(names)}")
        if phase is not None and phase not in names:
            raise InputError(f"phase must be one of {', '.join(names)}, got {phase!r}")
        if len(pixel_values) == 1:
            raise InputError(
                "SharedAE trains on batches of at least 2 images, got 1: give more images, another --per_device_train_batch_size, "
                "or --dataloader_drop_last true"
            )
        x, z, losses = pixel_values, self.encoder1(pixel_values), {}
        for name in names if phase is None else [phase]:
            image = (self.decoder1 if name == "ede1" else self.decoder2)(z)
            latent = self.encoder2(image)
            reconstruction = self._error(x, image, z, latent)
            losses[f"{name}_loss"] = (1 - weight) * reconstruction
        if weight > 0:  # then there is one phase
            z2 = latent if phase == "ede2" else self.encoder2(self.decoder2(z))
            image = self.decoder1(z2)  # x1'
            adversarial = self._error(x, image, z, self.encoder2(image))
            if phase == "ede1":
                adversarial = -self._within_margin(adversarial, reconstruction.detach())
            losses[f"{phase}_loss"] = losses[f"{phase}_loss"] + weight * adversarial
        return sum(losses.values()), losses

    def _within_margin(self, adversarial, reconstruction):
        """adv, or where it is beyond `adversarial_margin` the margin, a constant. That is told from the batch of all processes, which so train as one."""
        if self.config.adversarial_margin is None:
            return adversarial
        limit = self.config.adversarial_margin * reconstruction
        beyond = gather_rows((adversarial.detach() - limit)[None]).mean() > 0
        return torch.where(beyond, limit, adversarial)

    def _error(self, x, image, z, latent):
        """α‖x − image‖² + β‖z − latent‖², the norms as means."""
        return self.config.alpha * F.mse_loss(image, x) + self.config.beta * F.mse_loss(latent, z)

    # Score -------------------------------------------------------------------------------------------------------------------

    def reconstruct(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """z, z2, x1' and z1', or with ablation `"one"` z, z1, x1 and z1; latents (B, latent_size), images as `pixel_values`."""
        z = self.encoder1(pixel_values)
        if self.config.ablation == "one":
            image = self.decoder1(z)
            first = second = self.encoder2(image)
        else:
            first = self.encoder2(self.decoder2(z))
            image = self.decoder1(first)
            second = self.encoder2(image)
        return z.flatten(1), first.flatten(1), image, second.flatten(1)

    def compute_scores(self, pixel_values, *, output_anomaly_maps, output_embeddings):
        z, first, image, second = (tensor.float() for tensor in self.reconstruct(pixel_values))
        config = self.config
        maps = (pixel_values.float() - image).norm(dim=1, keepdim=True)
        if config.score_from == "map":
            scores = maps.flatten(1).amax(1)
        else:
            scores = config.omega1 * (z - first).square().sum(1) + config.omega2 * (z - second).square().sum(1)  # Algorithm 2
        return AnomalyDetectorOutput(
            scores=scores, anomaly_maps=maps if output_anomaly_maps else None, embeddings=z if output_embeddings else None
        )
