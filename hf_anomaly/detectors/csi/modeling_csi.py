"""CSI (Tack et al. 2020), DIA's base: contrasting shifted instances."""

import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...backbones.pretrained import build_backbone, load_backbone_weights
from ...calibration import Float32State
from ...detector import AnomalyDetector, AnomalyDetectorOutput
from ...ops.contrastive import amplified_nt_xent
from ...ops.distributed import draw_rows
from ...ops.knn import max_cosine, min_distance
from ...ops.pieces import pieces
from ...ops.resizing import resize
from ...ops.shifts import SHIFTS
from ...ops.views import View, apply_shifted_views, apply_views, crops_views, draw_views
from ...ops.whitening import fit_whitening, leave_out_change
from .configuration_csi import CSIConfig

logger = logging.getLogger(__name__)

NUM_SHIFTS = 4  # K, of rotate and of perm

# Pixels of all views that the encoder sees at once at test time: bounds the memory of a call, whatever its batch size. 2**19 are 668 views at 28 px.
_MAX_TEST_PIXELS = 2**19


class CSIReference(Float32State):
    """What the score compares with: features of the normal training images, the balancing terms, and the fixed test-time views."""

    def __init__(self, config: CSIConfig, width: int):
        super().__init__()
        groups = config.num_encoders * NUM_SHIFTS  # of features, each compared with its own
        zeros = partial(torch.zeros, dtype=torch.float32)  # whatever dtype the model is built in
        self.register_buffer("bank", zeros(groups, config.bank_size, width))
        self.register_buffer("center", zeros(groups, width if config.score_whitening else 0))
        self.register_buffer("whitening", zeros(groups, *self.center.shape[1:] * 2))
        self.register_buffer("lambda_sim", zeros(groups))
        self.register_buffer("lambda_cls", zeros(groups))
        self.register_buffer("views", zeros(config.num_test_views, len(View)))


class _Encoder:
    """The networks that the loss trains: an encoder and the heads on its penultimate features.

    A mixin, as the first encoder is the model itself: its weights have the names that they had before there were several, so that folders saved then load.
    """

    def build_networks(self, config: CSIConfig) -> None:
        self.backbone = build_backbone(config.backbone_config, config.tile_size, config.num_channels)
        width = self.backbone.channels[-1]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.projection_size))
        self.shift_classifier = nn.Linear(width, NUM_SHIFTS)

    def feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The backbone's last map (N, width, h, w)."""
        return self.backbone(pixel_values).feature_maps[-1]

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Penultimate features (N, width): the last map, averaged over space."""
        return self.feature_map(pixel_values).mean((-2, -1))


class _FurtherEncoder(_Encoder, nn.Module):
    def __init__(self, config: CSIConfig):
        super().__init__()
        self.build_networks(config)


class CSIModel(_Encoder, AnomalyDetector):
    """Contrasting shifted instances: DIA without its dissolved branch D.

    Every image gives 2·K views, A: O(S_k(x)) and B: O'(S_k(x)). The loss is L_con + λ·L_cls of Eq. 6–9.

        A(x) = (1/K) Σ_k min_m ‖W_k (u_k(x) − u_k(x_m))‖

    is the score by default, the distance to the nearest training image x_m between whitened features u of length 1, three kinds of them joined: the
    projection z, the penultimate features and their map's standard deviation over space. Eq. 10 as printed, −(s_sim + s_cls)/K of z alone, takes
    `score_features="projection"`, `score_whitening=False`, `score_norm=True` and `score_shift_logit=True`.

    With `num_encoders` above 1 it is an ensemble: each encoder has its own heads, loss and bank, all see the same views, and loss and score are the means
    of theirs. The first is the model's own `backbone`, `projection` and `shift_classifier`.
    """

    config_class = CSIConfig
    config: CSIConfig
    unsupported_maps_reason = "CSI and DIA, which compare whole views, give no anomaly maps unless they are trained with tiles (--tiles 4)"
    citation = """\
@inproceedings{tack2020csi,
  title = {{CSI}: Novelty Detection via Contrastive Learning on Distributionally Shifted Instances},
  author = {Tack, Jihoon and Mo, Sangwoo and Jeong, Jongheon and Shin, Jinwoo},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""

    def __init__(self, config: CSIConfig):
        super().__init__(config)
        config = self.config  # which the backbone shares
        self.build_networks(config)
        self.further_encoders = nn.ModuleList(_FurtherEncoder(config) for _ in range(config.num_encoders - 1))
        self.reference = CSIReference(config, self.score_width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            # torch's own initialisation, not transformers' N(0, 0.02): the projection starts with a useful scale.
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @property
    def encoders(self) -> list[_Encoder]:
        return [self, *self.further_encoders]

    @property
    def supports_anomaly_maps(self) -> bool:
        """Whether images are cut: the maps show the scores of the tiles."""
        return self.config.tiles > 1

    @property
    def score_width(self) -> int:
        """Width of the features that the score compares."""
        width = self.backbone.channels[-1]
        widths = {"projection": self.config.projection_size, "penultimate": width, "deviation": width}
        return sum(widths[kind] for kind in self.config.compared_features)

    # Training -----------------------------------------------------------------------------------------------------------------

    def training_branches(self, pixel_values: torch.Tensor, **inputs) -> list[torch.Tensor]:
        """The images (B, C, H, W) that each branch shifts and augments: x for A and B."""
        return [pixel_values, pixel_values]

    def contrastive_loss(self, projections: list[torch.Tensor]) -> torch.Tensor:
        """L_con of the projections (K, B, d) of each branch."""
        return amplified_nt_xent(*projections, temperature=self.config.temperature, divisor=self.config.loss_divisor)

    def compute_losses(self, pixel_values, *, epoch, **inputs):
        branches = torch.stack(self.training_branches(pixel_values, **inputs))
        num_branches, batch_size = branches.shape[:2]
        shape = (NUM_SHIFTS, num_branches, batch_size)
        views_per_image, crop_scale = NUM_SHIFTS * num_branches, self.config.crop_scale
        parameters = draw_rows(lambda n: self._draw_views(n * views_per_image, crop_scale).unflatten(0, (n, -1)), batch_size)
        parameters = parameters.unflatten(1, shape[:2]).permute(1, 2, 0, 3).flatten(1, 2).to(pixel_values.device)
        views = apply_shifted_views(branches.flatten(0, 1), parameters, SHIFTS[self.config.shift]).flatten(0, 1)
        parts = [self._losses_of(encoder, encoder.encode(views).unflatten(0, shape)) for encoder in self.encoders]
        losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return losses["contrastive_loss"] + self.config.shift_loss_weight * losses["shift_loss"], losses  # Eq. 9

    def _losses_of(self, encoder: _Encoder, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of an encoder's loss, of its penultimate features (K, branches, B, width) of all views."""
        logits = encoder.shift_classifier(features).flatten(0, 2)
        shift_labels = torch.arange(NUM_SHIFTS, device=logits.device).repeat_interleave(len(logits) // NUM_SHIFTS)
        return {
            "contrastive_loss": self.contrastive_loss(list(encoder.projection(features).unbind(1))),
            "shift_loss": F.cross_entropy(logits.float(), shift_labels),  # Eq. 8
        }

    def _draw_views(self, count: int, crop_scale: list[float], generator: torch.Generator | None = None) -> torch.Tensor:
        config = self.config
        return draw_views(
            count,
            num_channels=config.num_channels,
            crop_scale=crop_scale,
            jitter=config.color_jitter,
            jitter_probability=config.jitter_probability,
            gray_probability=config.gray_probability,
            flip_probability=config.flip_probability,
            generator=generator,
        )

    # Reference and score ------------------------------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        return self.config.bank_size > 0

    def fixed_views(self) -> torch.Tensor:
        """The test-time views (n, P), the same for every image and every call."""
        config = self.config
        if config.test_views == "crops":
            return crops_views(config.num_test_views, sum(config.test_crop_scale) / 2)
        return self._draw_views(config.num_test_views, config.test_crop_scale, torch.Generator().manual_seed(0))

    def view_features(self, pixel_values: torch.Tensor, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """The `score_features` (B, K, d) and the logit of the true shift (B, K), averaged over the test-time views (n, P).

        With several encoders, those of one after the other: (B, encoders·K, d) and (B, encoders·K).
        """
        chunks = pieces(pixel_values.shape[0], _MAX_TEST_PIXELS, len(views) * NUM_SHIFTS * pixel_values.shape[-2:].numel())
        parts = [self._features_of_chunk(pixel_values[chunk], views) for chunk in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _features_of_chunk(self, pixel_values: torch.Tensor, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `view_features`, of so few images that all their views go through the encoders at once."""
        batch_size, num_views = pixel_values.shape[0], len(views)
        shifted = SHIFTS[self.config.shift](pixel_values)  # (K, B, C, H, W)
        rows = shifted.transpose(0, 1).unsqueeze(2).expand(-1, -1, num_views, -1, -1, -1).flatten(0, 2)
        rows = apply_views(rows, views.to(rows.device).repeat(batch_size * NUM_SHIFTS, 1))
        shape = (batch_size, NUM_SHIFTS, num_views)
        groups = [self._score_features_of(encoder, encoder.feature_map(rows).unflatten(0, shape)) for encoder in self.encoders]
        return {name: torch.cat([group[name] for group in groups], dim=1) for name in groups[0]}

    def _score_features_of(self, encoder: _Encoder, maps: torch.Tensor) -> dict[str, torch.Tensor]:
        """An encoder's part of `view_features`, of its last maps (B, K, n, width, h, w) of all views."""
        features = maps.mean((-2, -1))
        logits = encoder.shift_classifier(features).mean(2)
        kinds = {
            "projection": lambda: encoder.projection(features),
            "penultimate": lambda: features,
            "deviation": lambda: _deviation(maps.float()),
        }
        vectors = [kinds[kind]().mean(2).float() for kind in self.config.compared_features]
        if len(vectors) > 1:
            vectors = [F.normalize(v, dim=-1) for v in vectors]
        return {"features": torch.cat(vectors, dim=-1), "shift_logits": logits.diagonal(dim1=1, dim2=2).float()}

    def reference_features(self, pixel_values):
        views, config = self.fixed_views(), self.config
        features = self.view_features(pixel_values, views)
        if config.score_ignores_detail:
            features["features_without_detail"] = self.view_features(_without_detail(pixel_values), views)["features"]
        return features

    @property
    def max_reference_images(self):
        return self.config.max_bank_size

    def set_reference(self, features):
        vectors, logits = features["features"], features["shift_logits"]
        reference, config = self.reference, self.config
        norms = vectors.norm(dim=-1).mean(0)
        logit_means = logits.mean(0)
        reference.lambda_sim = 1 / norms
        # A mean that is not positive would turn the term's sign around.
        reference.lambda_cls = torch.where(logit_means > 0, 1 / logit_means, torch.zeros_like(logit_means))
        self._tell_missing_logits()
        reference.views = self.fixed_views().to(reference.views.device)
        bank = F.normalize(vectors, dim=-1)
        if config.score_whitening:
            reference.center, reference.whitening = fit_whitening(bank)
            if config.score_ignores_detail:
                changes = F.normalize(features["features_without_detail"], dim=-1) - bank
                reference.whitening = leave_out_change(reference.whitening, changes)
            bank = self._whiten(bank)
        reference.bank = bank.transpose(0, 1).contiguous()
        config.bank_size = len(bank)

    def _tell_missing_logits(self):
        if self.config.score_shift_logit and bool((self.reference.lambda_cls == 0).any()):
            logger.warning(
                "The mean logit of a shift is not positive on normal images; Eq. 10's s_cls would flip its sign there and is left out."
            )

    def _drop_what_does_not_hold(self, name):
        super()._drop_what_does_not_hold(name)
        if self.is_fitted:  # the term may have been off when the reference was made
            self._tell_missing_logits()

    def _whiten(self, directions):
        """W_k(u_k − μ_k) of u (B, K, d), vectors of length 1."""
        centered = (directions - self.reference.center).transpose(0, 1)
        return (centered @ self.reference.whitening.transpose(1, 2)).transpose(0, 1)

    def clear_reference(self):
        self.config.bank_size = 0
        fresh = CSIReference(self.config, self.score_width).to(self.reference.bank.device)
        for name, buffer in fresh.named_buffers():
            setattr(self.reference, name, buffer)

    def compute_scores(self, pixel_values, *, output_anomaly_maps, output_embeddings):
        config, reference = self.config, self.reference
        features = self.view_features(pixel_values, reference.views)
        vectors, logits = features["features"], features["shift_logits"]
        terms = torch.zeros_like(logits)
        if config.score_cosine or config.score_norm:
            similarity = torch.ones_like(logits)
            if config.score_cosine:
                similarity = similarity * self._nearest(vectors)
            if config.score_norm:
                similarity = similarity * reference.lambda_sim * vectors.norm(dim=-1)
            terms = terms + similarity
        if config.score_shift_logit:
            terms = terms + reference.lambda_cls * logits
        of_unshifted = vectors.unflatten(1, (-1, NUM_SHIFTS)).select(2, 0)  # (B, encoders, d)
        scores = -terms.mean(-1)  # Eq. 10
        maps = scores[:, None, None, None].expand(-1, 1, *pixel_values.shape[-2:]) if output_anomaly_maps else None
        embeddings = of_unshifted.flatten(1) if output_embeddings else None
        return AnomalyDetectorOutput(scores=scores, anomaly_maps=maps, embeddings=embeddings)

    def _nearest(self, vectors):
        """Similarity (B, K) to the nearest training image: max_m cos(z, z_m), or −min_m ‖W(u − u_m)‖."""
        bank, chunk_size = self.reference.bank, self.config.search_chunk_size
        if self.config.score_whitening:
            return -min_distance(self._whiten(F.normalize(vectors, dim=-1)), bank, chunk_size)
        return max_cosine(vectors, bank, chunk_size)

    # Pretrained encoders ------------------------------------------------------------------------------------------------------

    def load_backbone(self, name_or_path: str, **kwargs) -> "CSIModel":
        """Takes the encoder's weights from a pretrained backbone of the same architecture.

        Args:
            name_or_path: a Hub id or folder, as for `AutoBackbone.from_pretrained`.

        Raises:
            InputError: its architecture or widths differ from the detector's `backbone_config`.
        """
        load_backbone_weights([encoder.backbone for encoder in self.encoders], name_or_path, **kwargs)
        return self


def _without_detail(pixel_values: torch.Tensor) -> torch.Tensor:
    """The images (B, C, H, W) shrunk to half their size and enlarged again."""
    height, width = pixel_values.shape[-2:]
    return resize(resize(pixel_values, (max(1, height // 2), max(1, width // 2))), (height, width))


def _deviation(maps: torch.Tensor) -> torch.Tensor:
    """Standard deviation over space of maps (..., h, w). On CPUs torch's own takes six to thirty times as long for so few pixels."""
    variance = (maps - maps.mean((-2, -1), keepdim=True)).square().mean((-2, -1))
    # As all maps of one pixel are: there the root's gradient is infinite, and NaN would reach every pixel of the image.
    flat = variance == 0
    return variance.masked_fill(flat, 1).sqrt().masked_fill(flat, 0)
