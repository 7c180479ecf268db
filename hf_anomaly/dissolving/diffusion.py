"""The diffusion dissolver of DIA, and the model that trains its network."""

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cards import write_dissolver_card
from ..data.recipes import DatasetRecipe
from ..errors import InputError, one_line
from ..files import canonical_json, read_json
from ..ops.distributed import draw_rows
from ..ops.resizing import resize
from ..ops.tiles import draw_tiles
from ..untrusted import check_plausible, check_shard_names
from .base import (
    Dissolver,
    check_integer,
    check_pixel_values,
    draw_integers,
    locate,
    read_config,
    working_size,
)

T_MIN, T_MAX = DatasetRecipe.timesteps  # 30 and 130 unless a dataset has others
LARGEST_SAMPLE = 1024  # px; every image is padded to the sample size, and a downloaded config may name any, as no weights depend on it


class DiffusionDissolver(Dissolver):
    """One reverse step of a diffusion model from the clean image, taken as x_t, and no noise added (DIA, Eq. 4):

        x̂_{t→0} = ( x − sqrt(1−ᾱ_t) · ε_θ(x, t) ) / sqrt(ᾱ_t)

    Larger t dissolve more. The range refers to the scheduler's ᾱ: (30, 130), the paper's, to the cosine schedule
    (`squaredcos_cap_v2`); the linear one removes twice as much at the same t. Images smaller than the network's `sample_size`
    are padded by reflection and cropped back.

    Args:
        unet: `diffusers.UNet2DModel` of a square `sample_size`. Dissolving needs it frozen and in eval mode: one that is still in
            training is copied, so that training is not disturbed.
        scheduler: `diffusers.DDPMScheduler`, or any with `alphas_cumprod` and `config.prediction_type` (epsilon, v_prediction or sample).
        t_min, t_max: t is drawn uniformly from the integers t_min … t_max, both included.

    Raises:
        InputError: t range outside the schedule, unknown prediction type, or a network or scheduler of another kind.
    """

    kind = "diffusion"
    is_deterministic = False

    def __init__(self, unet, scheduler, t_min: int = T_MIN, t_max: int = T_MAX):
        if unet.training or any(parameter.requires_grad for parameter in unet.parameters()):
            unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.unet, self.scheduler = unet, _with_tables(scheduler)
        self.device = unet.device
        self.resolution = _sample_size(unet)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)
        self.prediction_type = _prediction_type(scheduler)
        self.t_min, self.t_max = check_integer("t_min", t_min, 0), check_integer("t_max", t_max, 0)
        last = len(self.alphas_cumprod) - 1
        if not t_min <= t_max <= last:
            raise InputError(f"t range {t_min}…{t_max} is not within the schedule: t_min and t_max must be in order and in 0…{last}")
        channels = unet.config.in_channels
        # A network that also learns the variance has twice the channels, of which the first half predicts.
        if unet.config.out_channels not in (channels, 2 * channels):
            raise InputError(f"the UNet has {channels} input channels but {unet.config.out_channels} output channels: as many are needed")
        if unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None:
            raise InputError("the UNet is class-conditional: dissolving needs an unconditional one")

    def settings(self) -> dict:
        return {"t_min": self.t_min, "t_max": self.t_max}

    def _weights(self) -> Iterator[bytes]:
        architecture = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}
        yield canonical_json({"unet": architecture, "prediction_type": self.prediction_type})
        for name, tensor in [("alphas_cumprod", self.alphas_cumprod), *sorted(self.unet.state_dict().items())]:
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def to(self, device: torch.device | str) -> "DiffusionDissolver":
        if self.unet.device != torch.device(device):  # torch 2.11 cannot trace a move
            self.unet.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return super().to(device)

    def spread_timesteps(self, count: int = 5) -> list[int]:
        """`count` timesteps, or fewer in a narrow range, evenly from t_min to t_max: to show what dissolving does."""
        return torch.linspace(self.t_min, self.t_max, count).round().long().unique().tolist()

    def sample_timesteps(self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
        """(B,) long, t ~ U{t_min … t_max}, both included. With a generator the draw is made on the generator's device."""
        return draw_integers(self.t_min, self.t_max + 1, batch_size, device, generator)

    def predict_original(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x̂_0 of x, taken as x_t, as the network predicts it: beyond [−1, 1], too. Dissolving is this of images without noise.

        Args:
            x: (B, C, h, w) of at most r×r pixels.
            timesteps: t, (B,) long.

        Returns:
            (B, C, h, w).

        Raises:
            InputError: wrong number of channels, or a timestep outside the schedule.
        """
        batch_size, channels = x.shape[:2]
        _check_channels(channels, self.unet)
        if not torch.compiler.is_compiling() and batch_size and not (timesteps.min() >= 0 and timesteps.max() < len(self.alphas_cumprod)):
            raise InputError(f"timesteps must be within the schedule's 0…{len(self.alphas_cumprod) - 1}, got {timesteps.tolist()}")
        padded, rows, columns = _pad(x, self.resolution)
        output = self.unet(padded.to(self.unet.dtype), timesteps).sample[:, :channels]
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return _predict_original(padded, output, alpha_bar, self.prediction_type)[..., rows, columns]

    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        return self.predict_original(x, timesteps)

    @property
    def training_run(self) -> dict | None:
        """What `training_notes` say of the run that trained it: its images, seed and settings; None if nothing."""
        run = self.training_notes.get("run") if isinstance(self.training_notes, dict) else None
        return run if isinstance(run, dict) else None

    def write_card(self, folder: str | os.PathLike, repo_id: str | None = None) -> None:
        """As `Dissolver.write_card`; the card tells the training as `training_notes` does."""
        facts = {"resolution": self.resolution, "num_channels": self.unet.config.in_channels, "notes": self.training_notes}
        write_dissolver_card(folder, self.kind, self.settings(), repo_id=repo_id, **facts)

    def _write(self, folder: Path) -> None:
        from diffusers import DDPMPipeline

        super()._write(folder)
        DDPMPipeline(self.unet, self.scheduler).save_pretrained(folder, safe_serialization=True)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike,
        t_min: int | None = None,
        t_max: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "DiffusionDissolver":
        """Loads a `DDPMPipeline` folder or repository, with or without `dissolver_config.json`, from safetensors only.

        Args:
            folder_or_hub_id, revision, token: as in `Dissolver.from_pretrained`.
            t_min, t_max: override `dissolver_config.json`; without either, 30 and 130.

        Raises:
            InputError: incomplete or damaged folder or repository, weights that are not safetensors, or a t range
                outside the schedule or beyond the `max_timestep` of the training notes.
            HubError: as `Dissolver.from_pretrained`.
        """
        from diffusers import DDPMScheduler, UNet2DModel

        root = locate(folder_or_hub_id, revision, token)
        config = read_config(root)
        if config["kind"] not in ("diffusion", cls.kind):
            raise InputError(f"{root} holds a {config['kind']!r} dissolver, not {cls.kind!r}: load it with Dissolver.from_pretrained")
        _check_networks(root)
        try:
            with torch.device("cpu"):  # a caller may be building its model on the meta device
                unet, info = UNet2DModel.from_pretrained(root, subfolder="unet", use_safetensors=True, output_loading_info=True)
                scheduler = DDPMScheduler.from_pretrained(root, subfolder="scheduler")
        except Exception as error:  # damaged files raise errors of every kind
            raise InputError(
                f"{root}: unet/ (safetensors) and scheduler/ of a DDPMPipeline folder cannot be loaded: {one_line(error)}"
            ) from error
        if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise InputError(f"{root / 'unet'}: the weights lack {lost[0]} and do not fit config.json; save the dissolver again")
        range_ = {name: config[name] for name in ("t_min", "t_max") if name in config}
        range_ |= {name: value for name, value in (("t_min", t_min), ("t_max", t_max)) if value is not None}
        # The constructor copies the network, and must: weights mapped from a file lie at addresses where kernels may round otherwise,
        # and a loaded dissolver would differ in the last bits from the one that was saved.
        try:
            dissolver = cls(unet, scheduler, **range_)
        except InputError as error:
            raise InputError(f"{root}: {error}") from error
        dissolver.training_notes = notes = config.get("training")
        trained = notes.get("max_timestep") if isinstance(notes, dict) else None  # None: the whole schedule
        if isinstance(trained, int) and dissolver.t_max >= trained:
            raise InputError(
                f"{root}: t_max {dissolver.t_max} was never trained, only t below max_timestep {trained}: "
                "lower t_max, or train the dissolver with a larger max_timestep"
            )
        return dissolver


def network_resolution(image_size: int, largest: int = 32) -> int:
    """The size in pixels that a dissolver for these images works at: the next power of two (28 is padded to 32, as in DIA), at most `largest`."""
    return min(largest, 1 << (image_size - 1).bit_length())


def default_resolution(image_size: int) -> int:
    """The resolution that a diffusion model is trained at for these images: the largest power of two within a third of their size, but 8 to 32 px.

    28 → 8, 64 → 16, 224 → 32. The paper has 32 for all, at which its larger images lose fine detail by the resizing alone and its 28 px ones do not;
    this way all do, without which an encoder does not learn to tell image and dissolved twin apart (model_cards/results/dia_ablation.md).
    """
    return min(32, 1 << (max(8, image_size // 3).bit_length() - 1))


def default_batch_size(resolution: int) -> int:
    """Images per training step of a diffusion model that works at so many pixels.

    At 32 px half as many as below: each has so many pixels that twice as many lower the error by 1 % (model_cards/results/speed.md).
    """
    return 32 if resolution < 32 else 16


def build_unet(resolution: int, num_channels: int, block_out_channels: tuple[int, ...] = (32, 64, 64), layers_per_block: int = 1):
    """A small `diffusers.UNet2DModel` with plain blocks; 1.1 million parameters by default.

    Args:
        resolution: height and width of its images, in pixels; a multiple of 2^(number of blocks − 1).
        num_channels: 1 (gray) or 3 (RGB).
        block_out_channels: the width of each block.
        layers_per_block: residual layers in each.

    Raises:
        InputError: an argument out of range.
    """
    from diffusers import UNet2DModel

    check_integer("num_channels", num_channels, 1)
    check_integer("resolution", resolution, 1)
    depth = check_integer("the number of block_out_channels", len(block_out_channels), 1)
    if resolution % 2 ** (depth - 1):
        raise InputError(
            f"resolution {resolution} cannot be halved {depth - 1} times: use a multiple of {2 ** (depth - 1)} or fewer blocks"
        )
    for width in block_out_channels:
        check_integer("each of block_out_channels", width, 1)
    groups = math.gcd(8, *block_out_channels)  # group norm and attention heads must divide every width
    return UNet2DModel(
        sample_size=resolution,
        in_channels=num_channels,
        out_channels=num_channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * depth,
        up_block_types=("UpBlock2D",) * depth,
        norm_num_groups=groups,
        attention_head_dim=groups,
    )


def build_scheduler():
    """The `diffusers.DDPMScheduler` of DIA: T = 1000, cosine β schedule, noise prediction, x̂_0 not clipped."""
    from diffusers import DDPMScheduler

    with torch.device("cpu"):  # its tables would be lost if the caller is building a model on the meta device
        return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=False)


class DenoisingModel(torch.nn.Module):
    """Trains a diffusion model's network: its loss is that of DDPM (Ho et al. 2020, Eq. 14), with L1 instead of L2 as DIA trains it.

        L = E_{x,ε,t} | ε − ε_θ( sqrt(ᾱ_t) x + sqrt(1−ᾱ_t) ε, t ) |

    Args:
        unet: `diffusers.UNet2DModel`, trained in place.
        scheduler: `diffusers.DDPMScheduler`; its prediction type sets the target (ε, v or x).
        max_timestep: t ~ U{0 … max_timestep − 1}; None takes the whole schedule. Dissolving looks at small t only.
        tiles: it learns tiles × tiles parts of the images, one of each at random in a step.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(self, unet, scheduler, max_timestep: int | None = None, tiles: int = 1):
        super().__init__()
        self.tiles = tiles
        self.resolution = _sample_size(unet)
        self.prediction_type = _prediction_type(scheduler)
        num_timesteps = len(scheduler.alphas_cumprod)
        self.max_timestep = num_timesteps if max_timestep is None else check_integer("max_timestep", max_timestep, 1)
        if self.max_timestep > num_timesteps:
            raise InputError(f"max_timestep {max_timestep} is beyond the schedule: use at most {num_timesteps}")
        self.unet, self.scheduler = unet, _with_tables(scheduler)

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """The denoising loss of a batch.

        The network runs without autocast, in its own precision. What is not given is drawn from the global random state, for the batch of all
        processes, which must be seeded alike: N processes then train as one. In training mode images are flipped left to right at random.

        Args:
            pixel_values: (B, C, H, W) in [−1, 1]; resized down or padded by reflection to the network's r×r.
            noise: ε, (B, C, r, r), standard normal.
            timesteps: t, (B,) long.

        Returns:
            {"loss": ()}

        Raises:
            InputError: wrong shape, dtype, range or number of channels.
        """
        check_pixel_values(pixel_values)
        batch_size, channels = pixel_values.shape[:2]
        _check_channels(channels, self.unet)
        (pixel_values,) = draw_tiles(self.tiles, pixel_values)
        device, r = pixel_values.device, self.resolution
        x, *_ = _pad(resize(pixel_values, working_size(*pixel_values.shape[-2:], r)), r)
        if self.training:
            flipped = draw_rows(lambda n: torch.rand(n, 1, 1, 1, device=device) < 0.5, batch_size)
            x = torch.where(flipped, x.flip(-1), x)
        if noise is None:
            noise = draw_rows(lambda n: torch.randn(n, channels, r, r, device=device, dtype=x.dtype), batch_size)
        if timesteps is None:
            timesteps = draw_rows(lambda n: torch.randint(self.max_timestep, (n,), device=device), batch_size)
        if noise.shape != x.shape or timesteps.shape != (batch_size,):
            raise InputError(
                f"noise must be {tuple(x.shape)} and timesteps ({batch_size},), got {tuple(noise.shape)} and {tuple(timesteps.shape)}"
            )
        # The detector may train in mixed precision, in which the authors' did not converge.
        with torch.autocast(device.type, enabled=False):
            output = self.unet(self.scheduler.add_noise(x, noise, timesteps).to(self.unet.dtype), timesteps).sample
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "sample":
            target = x
        else:
            target = self.scheduler.get_velocity(x, noise, timesteps)
        return {"loss": F.l1_loss(output, target)}


def _predict_original(x_t: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """x̂_0 from x_t and the network's output (DDPM, Eq. 15; DIA, Eq. 4): bit for bit what `DDPMScheduler.step` computes for one t."""
    if prediction_type == "sample":
        return output
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return (x_t - noise * output) / signal if prediction_type == "epsilon" else signal * x_t - noise * output


def _pad(x: Tensor, r: int) -> tuple[Tensor, slice, slice]:
    """Images (B, C, h, w) centred in r×r, and the rows and columns where they are.

    The borders are reflections or, where one is as wide as the image, which reflection cannot give, copies of the edge.
    """
    height, width = x.shape[-2:]
    top, left = (r - height) // 2, (r - width) // 2
    bottom, right = r - height - top, r - width - left
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(x, (left, right, top, bottom), mode=mode), slice(top, top + height), slice(left, left + width)


def _with_tables(scheduler):
    """The scheduler, made anew if it was made while a model was being built on the meta device: its tables are then empty."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"a {type(scheduler).__name__} has no alphas_cumprod, which tell how noisy a timestep is: give a DDPMScheduler or the like"
        )
    if not scheduler.alphas_cumprod.is_meta:
        return scheduler
    with torch.device("cpu"):
        return type(scheduler).from_config(scheduler.config)


def _prediction_type(scheduler) -> str:
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise InputError(f"the scheduler's prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
    return prediction_type


def _sample_size(unet) -> int:
    size = unet.config.sample_size
    side, *others = size if isinstance(size, list | tuple) and size else [size]
    if not isinstance(side, int) or any(other != side for other in others):
        raise InputError(f"the UNet's sample_size must be one number of pixels, got {size}: set it in its config.json")
    if not 1 <= side <= LARGEST_SAMPLE:
        raise InputError(f"the UNet's sample_size must be in 1…{LARGEST_SAMPLE} pixels, got {side}: set it in its config.json")
    return side


def _check_networks(root: Path) -> None:
    """Refuses configs that would exhaust memory or time, and an index of weights outside the folder."""
    for path in (root / "unet" / "config.json", root / "scheduler" / "scheduler_config.json"):
        if path.is_file():
            check_plausible(read_json(path), str(path))
    for path in (root / "unet").glob("*.index.json"):
        check_shard_names(path)


def _check_channels(channels: int, unet) -> None:
    if channels != unet.config.in_channels:
        raise InputError(
            f"pixel_values have {channels} channels, but the UNet takes {unet.config.in_channels}: "
            f"convert the images (--num_channels {unet.config.in_channels}) or take another dissolver"
        )
