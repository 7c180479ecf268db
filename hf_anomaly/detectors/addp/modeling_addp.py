"""ADDP: denoising pretraining, then reconstruction (Ge, Li & Zhang 2023)."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ...backbones.pretrained import load_backbone_weights
from ...detector import AnomalyDetectorOutput, SelfContainedDetector
from ...errors import InputError
from ...ops.distributed import draw_rows
from ...ops.maps import median_filter
from ...ops.noise import NOISES
from ...ops.tiles import draw_tiles
from .configuration_addp import ADDPConfig
from .networks import ENCODERS, Decoder


class ADDPPreTrainedModel(PreTrainedModel):
    """Encoder and decoder, which both stages share, and the freezing of the encoder."""

    config_class = ADDPConfig
    config: ADDPConfig
    base_model_prefix = "addp"
    main_input_name = "pixel_values"
    citation = """\
@article{ge2023addp,
  title = {{ADDP}: Anomaly Detection based on Denoising Pretraining},
  author = {Ge, Xianlei and Li, Xiaoyan and Zhang, Zhipeng},
  journal = {International Journal of Electronics and Telecommunications},
  year = {2023}
}"""

    def __init__(self, config: ADDPConfig):
        super().__init__(config)
        config = self.config  # which the backbone shares
        self.encoder = ENCODERS[config.encoder](config)
        self.decoder = Decoder(config, self.encoder.channels)
        self.post_init()
        self.train(self.training)  # freezes what is to be frozen

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")  # He et al. 2015

    @property
    def encoder_is_frozen(self) -> bool:
        raise NotImplementedError

    def train(self, mode: bool = True):
        """As `nn.Module.train`; a frozen encoder stays in eval mode, so that neither batch statistics nor dropout move in it."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval().requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, from safetensors only; weights of either stage serve for both."""
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **{**kwargs, "use_safetensors": True})

    def reconstruct(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) as the decoder makes them, and the latents (B, latent_size, h, w) at the bottleneck."""
        if self.training and self.config.norm == "batch" and len(pixel_values) == 1:
            raise InputError("batch normalisation trains on batches of at least 2 images, got 1: enlarge the batch, or set norm to 'group'")
        try:
            maps, places = self.encoder(pixel_values)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # torch's, of a backbone's own normalisation
                raise
            raise InputError(
                "the backbone's batch normalisation trains on batches of at least 2 images where its map is one pixel, got 1: enlarge the batch, "
                "or image_size"
            ) from error
        return self.decoder(maps, places, tuple(pixel_values.shape[-2:]))

    def load_backbone(self, name_or_path: str, **kwargs) -> "ADDPPreTrainedModel":
        """Takes the encoder's weights from a pretrained backbone of the same architecture.

        Args:
            name_or_path: a Hub id or folder, as for `AutoBackbone.from_pretrained`.

        Raises:
            InputError: the encoder is no backbone, or the architecture or widths differ from `backbone_config`.
        """
        if self.config.encoder != "backbone":
            raise InputError(f"encoder {self.config.encoder!r} takes no backbone's weights: give the configuration a backbone_config")
        load_backbone_weights([self.encoder.backbone], name_or_path, **kwargs)
        return self


@dataclass
class ADDPForPreTrainingOutput(ModelOutput):
    """What `ADDPForPreTraining` returns.

    Args:
        loss: (), in training mode only.
        reconstruction: (B, C, H, W), the denoised images.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class ADDPForPreTraining(ADDPPreTrainedModel):
    """The first stage: x̃ = x + σε goes in, and the loss is ‖x − D(E(x̃))‖², the mean over all numbers, against the noise-free image x.

    With `pretraining_mode="decoder"` the encoder is frozen, whatever its weights: load some first. Saved, it is a folder by itself, from which
    `ADDPModel.from_pretrained` begins, on any data of the same channels. What the configuration it is built with says of a fitted detector is dropped.
    """

    _keys_to_ignore_on_load_unexpected = [r"^calibration\."]  # of a detector that pretraining goes on from

    def __init__(self, config: ADDPConfig):
        config = copy.deepcopy(config)
        config.forget_calibration()
        config.num_reference_images, config.normal_label = 0, None
        super().__init__(config)

    @property
    def encoder_is_frozen(self) -> bool:
        return self.config.pretraining_mode == "decoder"

    def draw_noise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """σε for a batch (B, C, H, W), from the global random state: this process's rows of the global batch's."""
        config, (batch_size, *shape) = self.config, pixel_values.shape
        noise = draw_rows(lambda n: NOISES[config.noise]((n, *shape), config.noise_resolution, pixel_values.device), batch_size)
        return config.noise_level * noise.to(pixel_values.dtype)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ADDPForPreTrainingOutput:
        """In training mode adds noise and returns the loss too; in eval mode denoises the images as they are.

        Args:
            pixel_values: (B, C, H, W) in [−1, 1]; any size.
            labels: ignored: the images need none.

        Raises:
            InputError: other channels, or a batch of one where batch normalisation trains.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise InputError(f"pixel_values must be (batch, {self.config.num_channels}, height, width), got {tuple(pixel_values.shape)}")
        clean = pixel_values.to(self.dtype)
        if not self.training:
            return ADDPForPreTrainingOutput(reconstruction=self.reconstruct(clean)[0])
        (clean,) = draw_tiles(self.config.tiles, clean)
        reconstruction, _ = self.reconstruct(clean + self.draw_noise(clean))
        return ADDPForPreTrainingOutput(loss=F.mse_loss(reconstruction, clean), reconstruction=reconstruction)


class ADDPModel(ADDPPreTrainedModel, SelfContainedDetector):
    """The second stage, and the detector: an encoder–decoder that learns to reconstruct normal images, clean ones.

        L = A(x) = ‖x − D(E(x))‖², the loss and the score, as means over pixels and channels

    What it has not seen it reconstructs badly. `ADDPModel.from_pretrained(folder of ADDPForPreTraining)` starts from denoising's weights; by the abstract
    most is gained where training images are few, above all through the decoder, which otherwise starts at random. The anomaly map is the squared error of
    each pixel, as the mean over its channels; embeddings are the latents, averaged over space.

    Reference: Ge, Li & Zhang, ADDP: Anomaly detection based on denoising pretraining, International Journal of Electronics and Telecommunications, 2023.
    """

    supports_anomaly_maps = True

    def __init__(self, config: ADDPConfig):
        super().__init__(config)
        if not self.is_fitted:  # then it has no calibration that weights could lack, and those of the first stage are whole
            self._keys_to_ignore_on_load_missing.add(r"^calibration\.")

    @classmethod
    def from_pretraining(cls, pretrained: ADDPForPreTraining, **changes) -> "ADDPModel":
        """A new detector with a copy of pretrained weights; `from_pretrained` without a folder.

        Args:
            changes: fields of the configuration that shall differ, such as `freeze_encoder` or `image_size`.
        """
        config = {**pretrained.config.to_dict(), **changes, "_name_or_path": ""}  # a new one, which brings no companions from there
        model = cls(type(pretrained.config).from_dict(config))
        model.load_state_dict(pretrained.state_dict(), strict=False)
        return model.to(pretrained.device)

    @property
    def encoder_is_frozen(self) -> bool:
        return self.config.freeze_encoder

    def compute_losses(self, pixel_values, *, epoch):
        loss = F.mse_loss(self.reconstruct(pixel_values)[0], pixel_values)
        return loss, {"reconstruction_loss": loss}

    def compute_scores(self, pixel_values, *, output_anomaly_maps, output_embeddings):
        reconstruction, latents = self.reconstruct(pixel_values)
        errors = (pixel_values.float() - reconstruction.float()).square()
        maps = median_filter(errors.mean(1, keepdim=True), self.config.map_filter_size) if output_anomaly_maps else None
        embeddings = latents.float().mean((-2, -1)) if output_embeddings else None
        return AnomalyDetectorOutput(scores=errors.mean((1, 2, 3)), anomaly_maps=maps, embeddings=embeddings)
