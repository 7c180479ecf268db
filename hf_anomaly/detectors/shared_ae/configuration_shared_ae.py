from typing import Literal

from huggingface_hub.dataclasses import strict

from ...detector import SelfContainedDetectorConfig
from ...errors import InputError

_MIN_SIZE, _MAX_SIZE = 8, 512  # px: what three halvings and three quarterings bring to between 1 and _MAX_LAST_SIZE
_MAX_LAST_SIZE = 8  # px: bounds the kernel of the fourth convolution


@strict
class SharedAEConfig(SelfContainedDetectorConfig):
    """Configuration of `SharedAEModel`.

    The paper gives the architecture and the schedule, but none of the values below. The squared norms of Eq. 1–7 are means over their elements here, so
    that image and latent weigh alike at any size.

    Args:
        image_size: 8 to 512 pixels, or so many for each of the `tiles`. The first three convolutions halve the maps, as many of them quarter them as bring
            the last one to 8 pixels or fewer; the fourth takes that one whole.
        hidden_sizes: channels of the first three convolutions; the decoders have them in reverse.
        latent_size: width of z, the output of the fourth: at 28 px, a twelfth of the pixels.
        alpha, beta: α and β of Eq. 1–7, the weights of the image's and the latent's error. A latent error as heavy as the image's is reduced by
            shrinking the latents, and what they tell with them.
        max_adversarial_weight: bounds 1 − 1/n, the weight of the adversarial term; the reconstruction's is the rest. 1 is the schedule as printed, in which
            reconstruction fades out.
        adversarial_margin: EDE1 is paid for adv up to this multiple of its own rec_1, which is held constant there; None: without limit, as printed.
            Without it EDE1 wins sooner or later at any weight, E2 marking reconstructions so that D1 paints normal images as far from x as it can,
            and the score tells nothing.
        omega1, omega2: ω1 and ω2 of the score, which add up to 1. The second term, which passes both decoders, tells less in most trials.
        score_from: what the score is: `"latents"`, Algorithm 2, as printed; or `"map"`, the highest value of the anomaly map, for anomalies that take up
            little of the image, which the latents hardly tell (model_cards/results/shared_ae.md).
        ablation: the rows of Table 5: `"one"`, a single encoder–decoder–encoder; `"two"`, both, without adversarial training; `"full"`, the method.

    Raises:
        InputError: a value out of range, or an unknown field.
    """

    model_type = "shared_ae_anomaly"
    score_fields = (*SelfContainedDetectorConfig.score_fields, "omega1", "omega2", "score_from", "ablation")

    hidden_sizes: list | tuple = (16, 32, 64)
    latent_size: int = 64
    alpha: float | int = 1.0
    beta: float | int = 0.1
    omega1: float | int = 0.9
    omega2: float | int = 0.1
    score_from: Literal["latents", "map"] = "latents"
    max_adversarial_weight: float | int = 0.1
    adversarial_margin: float | int | None = 1.5
    ablation: Literal["one", "two", "full"] = "full"

    def __post_init__(self, **kwargs):
        self.hidden_sizes = list(self.hidden_sizes)
        super().__post_init__(**kwargs)

    def check(self):
        super().check()
        if not _MIN_SIZE <= self.tile_size <= _MAX_SIZE:
            size = "image_size" if self.tiles == 1 else "image_size / tiles"
            raise InputError(f"{size} must be {_MIN_SIZE} to {_MAX_SIZE} pixels for four convolutions, got {self.tile_size}")
        if len(self.hidden_sizes) != 3 or not all(isinstance(width, int) and width > 0 for width in self.hidden_sizes):
            raise InputError(f"hidden_sizes must be three positive integers, got {self.hidden_sizes}")
        if self.latent_size < 1:
            raise InputError(f"latent_size must be at least 1, got {self.latent_size}")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a number ≥ 0, got {getattr(self, name)}")
        if self.alpha == self.beta == 0:
            raise InputError("alpha and beta are both 0: the loss needs at least one of them")
        if not 0 <= self.max_adversarial_weight <= 1:
            raise InputError(f"max_adversarial_weight must be between 0 and 1, got {self.max_adversarial_weight}")
        if self.adversarial_margin is not None and not 0 < self.adversarial_margin < float("inf"):
            raise InputError(f"adversarial_margin must be a number > 0, or None for no limit, got {self.adversarial_margin}")
        if min(self.omega1, self.omega2) < 0 or not abs(self.omega1 + self.omega2 - 1) < 1e-6:
            raise InputError(f"omega1 and omega2 must be ≥ 0 and add up to 1, got {self.omega1} and {self.omega2}")

    @property
    def strides(self) -> list[int]:
        """Strides of the first three convolutions, 4 for as many as needed and 2 for the others; kernels are twice as wide, see `feature_sizes`."""
        choices = ([4] * fours + [2] * (3 - fours) for fours in range(4))
        return next(strides for strides in choices if self._sizes(strides)[-1] <= _MAX_LAST_SIZE)

    @property
    def feature_sizes(self) -> list[int]:
        """Height and width of the image and of the three maps after it, in pixels."""
        return self._sizes(self.strides)

    def _sizes(self, strides: list[int]) -> list[int]:
        sizes = [self.tile_size]
        for stride in strides:
            sizes.append((sizes[-1] - 2) // stride + 1)  # kernel 2·stride, padding stride − 1: no pixel is skipped, at any size
        return sizes
