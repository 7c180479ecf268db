"""DIA: dissolving is amplifying (Shi et al., ECCV 2024, arXiv 2302.14696)."""

import torch
from transformers.utils import can_return_tuple

from ...detector import AnomalyDetectorOutput
from ...errors import InputError
from ...ops.contrastive import amplified_nt_xent
from ...ops.distributed import draw_rows
from ...ops.tiles import draw_tiles
from ..csi.modeling_csi import CSIModel
from .configuration_dia import DIAConfig


class DIAModel(CSIModel):
    """CSI with a third branch D: O''(S_k(dissolve(x))) of negatives (Eq. 5), which teaches the encoder what dissolving takes away.
    It scores as CSI does, by default not by Eq. 10 as printed.

    Dissolved images come with the batch (`dissolved_pixel_values`, cached) or from `self.dissolver`, a `hf_anomaly.dissolving.Dissolver`, or whatever has
    its `to`, `is_deterministic`, `sample_timesteps` and `(pixel_values, timesteps) -> pixel_values`. It is no part of the weights and scoring does
    without it, so that `save_pretrained` leaves it out: save it to `dissolver/` in the detector's folder, with which it goes from then on.
    """

    config_class = DIAConfig
    config: DIAConfig
    citation = """\
@inproceedings{shi2024dissolving,
  title = {Dissolving Is Amplifying: Towards Fine-Grained Anomaly Detection},
  author = {Shi, Jian and Zhang, Pengyi and Zhang, Ni and Ghazzai, Hakim and Wonka, Peter},
  booktitle = {European Conference on Computer Vision},
  year = {2024}
}"""

    def __init__(self, config: DIAConfig):
        super().__init__(config)
        self.dissolver = None

    def __setattr__(self, name, value):
        if name == "dissolver":  # torch would make one that is a module part of the weights
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        dissolved_pixel_values: torch.Tensor | None = None,
        epoch: float | None = None,
        output_anomaly_maps: bool = False,
        output_embeddings: bool = False,
    ) -> AnomalyDetectorOutput:
        """As `AnomalyDetector.forward`.

        Args:
            dissolved_pixel_values: (B, V, C, H, W) in [−1, 1], or uint8 levels v, x = v / 127.5 − 1: V dissolved variants of each image, of which a step
                takes one at random; training mode only. Without it `self.dissolver` dissolves on the fly.

        Raises:
            InputError: also when training has neither.
        """
        return self._forward(pixel_values, epoch, output_anomaly_maps, output_embeddings, dissolved_pixel_values=dissolved_pixel_values)

    def _draw_tiles(self, pixel_values, dissolved_pixel_values=None):
        variants, batch_size = dissolved_pixel_values, len(pixel_values)
        if variants is not None and (
            variants.ndim != 5 or len(variants) != batch_size or variants.shape[1] == 0 or variants.shape[2:] != pixel_values.shape[1:]
        ):
            raise InputError(
                f"dissolved_pixel_values must be (batch, variants, channels, height, width) for pixel_values {tuple(pixel_values.shape)}, "
                f"got {tuple(variants.shape)}"
            )
        pixel_values, variants = draw_tiles(self.config.tiles, pixel_values, variants)
        return pixel_values, {"dissolved_pixel_values": variants}

    def training_branches(self, pixel_values, *, dissolved_pixel_values=None):
        return [pixel_values, pixel_values, self._dissolve(pixel_values, dissolved_pixel_values)]

    def _dissolve(self, pixel_values, variants):
        batch_size = len(pixel_values)
        if variants is None:
            if self.dissolver is None:
                raise InputError("DIA trains with dissolved images: give dissolved_pixel_values, or set detector.dissolver")
            self.dissolver.to(pixel_values.device)
            timesteps = None if self.dissolver.is_deterministic else draw_rows(self.dissolver.sample_timesteps, batch_size)
            with torch.no_grad(), self._own_precision():  # as cached images were dissolved
                return self.dissolver(pixel_values, timesteps)
        chosen = draw_rows(lambda rows: torch.randint(variants.shape[1], (rows,)), batch_size)
        picked = variants[torch.arange(batch_size), chosen]
        return (picked / 127.5 - 1 if picked.dtype == torch.uint8 else picked).to(pixel_values)

    def contrastive_loss(self, projections):
        config = self.config
        return amplified_nt_xent(
            *projections,
            temperature=config.temperature,
            exclude_twins=config.similarity_design == "b",
            divisor=config.loss_divisor,
        )
