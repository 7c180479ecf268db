"""What all dissolvers share: the resolution rule, fingerprints, saving and loading."""

import hashlib
import inspect
import json
import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..cards import write_dissolver_card
from ..errors import InputError
from ..files import canonical_json, read_json, staged
from ..hub import CommitInfo, loading, push_folder
from ..ops.resizing import resize
from ..ops.tiles import cut_tiles, join_tiles
from ..saving import DISSOLVER_FILES

CONFIG_NAME = "dissolver_config.json"


class Dissolver(ABC):
    """Base of all dissolvers. Images larger than `resolution` are resized down to it (bilinear, antialiased), dissolved and resized back.

    Your own dissolver needs a new `kind`, `_dissolve`, and `settings` if its constructor takes anything. A deterministic dissolver gives one variant of an
    image. In any other, all randomness follows from the timesteps, one an image: a strength, or the seed of what is drawn for that image.

        class MaskDissolver(Dissolver):
            kind, is_deterministic, symbol = "mask", False, "seed"

            def __init__(self, share: float = 0.5):
                self.share = share

            def settings(self):
                return {"share": self.share}

            def sample_timesteps(self, batch_size, device="cpu", generator=None):
                return draw_integers(0, 2**31, batch_size, device, generator)  # of hf_anomaly.dissolving

            def _dissolve(self, x, timesteps):
                drawn = [torch.rand(x.shape[-2:], generator=torch.Generator().manual_seed(seed)) for seed in timesteps.tolist()]
                return x * (torch.stack(drawn)[:, None] > self.share).to(x)

        DISSOLVERS["mask"] = MaskDissolver  # now Dissolver.from_pretrained loads it, and train_dia's --dissolver takes it

    Attributes:
        kind: the dissolver's name in `DISSOLVERS`.
        is_deterministic, symbol, choices: whether, under what name and from what few values a dissolver draws its timesteps.
        resolution: the dissolving resolution r, in pixels; images of at most r×r are not resized. None: never resize.
        device: where images are expected.
        training_notes: anything worth keeping about the training, as JSON can hold it; saved under the key `training`.
    """

    kind: str
    is_deterministic = True  # no timestep to draw
    symbol = "t"  # what people call the numbers that `sample_timesteps` draws
    choices: list[int] | None = None  # all numbers that it draws from, if they are few
    resolution: int | None = None
    device = torch.device("cpu")
    training_notes: dict | None = None
    _own_code = b""  # source of a class from outside this package; its own have none, so that fingerprints outlast versions

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # Read now: the file may be edited while what was read of it goes on running.
        own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in (__name__.partition(".")[0], "abc", "builtins")]
        cls._own_code = "\n".join(map(_source, own)).encode()

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, timesteps: Tensor | None = None, tiles: int = 1) -> Tensor:
        """Dissolves a batch of images, each independently of the others.

        Args:
            pixel_values: (B, C, H, W), floating point, in [−1, 1].
            timesteps: (B,) long, one t an image, or one kernel size for a blur of several; None draws them with `sample_timesteps`. Deterministic dissolvers
                do not look at them.
            tiles: dissolve tiles × tiles parts of an image, each by itself, as a detector sees them that cuts its images.

        Returns:
            (B, C, H, W) in [−1, 1], of the same dtype.

        Raises:
            InputError: wrong shape, dtype, range or number of channels; a timestep outside the schedule; an image too small for the kernel, or with sides
                that are no multiples of `tiles`.
        """
        check_pixel_values(pixel_values)
        if not self.is_deterministic:
            timesteps = self._checked_timesteps(timesteps, len(pixel_values), pixel_values.device)
        if tiles > 1:
            of_tiles = None if timesteps is None else timesteps.repeat_interleave(tiles**2)
            return join_tiles(self(cut_tiles(pixel_values, tiles), of_tiles), tiles)
        size = tuple(pixel_values.shape[-2:])
        small = resize(pixel_values, self._working_size(*size))
        dissolved = self._dissolve(small, timesteps).clamp(-1, 1).to(pixel_values.dtype)
        return resize(dissolved, size).clamp(-1, 1)  # again: interpolation rounds

    def _checked_timesteps(self, timesteps: Tensor | None, batch_size: int, device: torch.device) -> Tensor:
        if timesteps is None:
            return self.sample_timesteps(batch_size, device)
        if timesteps.shape != (batch_size,) or timesteps.dtype != torch.long:
            raise InputError(f"timesteps must be ({batch_size},) long, one an image, got {tuple(timesteps.shape)} {timesteps.dtype}")
        return timesteps.to(device)

    @abstractmethod
    def _dissolve(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        """Dissolves images (B, C, h, w) of at most r×r pixels; `timesteps` are (B,) long, or anything for a deterministic dissolver."""

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        return working_size(height, width, self.resolution)

    def sample_timesteps(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor | None:
        """(B,) long, one t an image; None for a dissolver that is deterministic. With a generator the draw is made on the generator's device.

        Raises:
            InputError: the class is not deterministic, and has no such method of its own.
        """
        if not self.is_deterministic:
            raise InputError(
                f"{type(self).__name__} is not deterministic: give it a method sample_timesteps, which draws (B,) long, one random number an image"
            )
        return None

    def spread_timesteps(self, count: int = 5) -> list[int]:
        """At most `count` timesteps, in order, to show what dissolving does."""
        return self.sample_timesteps(count, generator=torch.Generator().manual_seed(0)).unique().tolist()

    def to(self, device: torch.device | str) -> "Dissolver":
        """Moves the dissolver to a device, in place."""
        self.device = torch.device(device)
        return self

    def settings(self) -> dict:
        """The constructor's arguments, as JSON can hold them; what JSON cannot hold, such as networks, is told by `_weights`."""
        return {}

    def _weights(self) -> Iterator[bytes]:
        """What the result depends on besides the settings."""
        return iter(())

    def _description(self) -> dict:
        """Kind and settings, from which the dissolver can be made again."""
        settings = self.settings()
        if type(self)._weights is Dissolver._weights:
            variable = () if not settings else (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            parameters = inspect.signature(type(self)).parameters.values()
            if left_out := [one.name for one in parameters if one.name not in settings and one.kind not in variable]:
                raise InputError(
                    f"{type(self).__name__} takes {', '.join(left_out)}, which its settings() leave out: return there all that the constructor takes"
                )
        return {"kind": self.kind, **settings}

    def fingerprint(self) -> str:
        """SHA-256, in hex, over settings and weights: the same in every process and on every device. For a class from outside this package its source
        counts, too, but not what that calls elsewhere. If there is no source to read, as in a notebook, each definition of the class has its own fingerprint.

        Raises:
            InputError: the constructor takes what `settings` leaves out.
        """
        digest = hashlib.sha256(canonical_json(self._description()) + self._own_code)
        for part in self._weights():
            digest.update(part)
        return digest.hexdigest()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `dissolver_config.json` (and a diffusion dissolver's networks) to a folder; a failure while writing leaves the old content.

        Everything is written to a temporary folder inside and then renamed into place, the config last. Other files of the folder are kept.

        Args:
            folder: made if it is not there.

        Raises:
            InputError: `folder` is a file, or as `fingerprint`.
        """
        with staged(folder) as staging:
            self._write(staging)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        git_tag: str | None = None,
    ) -> CommitInfo:
        """Pushes the dissolver with a card to a repository of its own, in one commit. What a person wrote in the repository's card stays.

        Args:
            repo_id, private, token, revision, create_pr, git_tag: as in `AnomalyDetector.push_to_hub`.

        Raises:
            HubError: the Hub refused or cannot be reached; one line, with the remedy.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.write_card(folder, repo_id)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                message=commit_message or f"Upload {type(self).__name__}",
                revision=revision,
                create_pr=create_pr,
                git_tag=git_tag,
            )

    def write_card(self, folder: str | os.PathLike, repo_id: str | None = None) -> None:
        """Writes `README.md` of the folder; `repo_id` is where that will be pushed."""
        write_dissolver_card(folder, self.kind, self.settings(), repo_id=repo_id)

    def _write(self, folder: Path) -> None:
        config = self._description() | ({} if self.training_notes is None else {"training": self.training_notes})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "Dissolver":
        """Loads a dissolver that `save_pretrained` wrote; `Dissolver.from_pretrained` finds out its kind, which must be in `DISSOLVERS`.

        Args:
            folder_or_hub_id: a local folder or a Hub repository, of the dissolver itself or of a detector that holds it under `dissolver/`.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token, for private repositories.

        Raises:
            InputError: a folder or repository that holds none, or a damaged one, or one of another kind.
            HubError: the Hub refused or cannot be reached; one line, with the remedy.
        """
        from . import DISSOLVERS

        root = locate(folder_or_hub_id, revision, token)
        config = read_config(root)
        kind = config.pop("kind")
        known = {**DISSOLVERS, cls.kind: cls} if hasattr(cls, "kind") else DISSOLVERS
        if not isinstance(kind, str) or kind not in known:
            raise InputError(
                f"{root / CONFIG_NAME}: kind {kind!r} is not one of {', '.join(known)}; correct the file, or enter its class in hf_anomaly.DISSOLVERS"
            )
        dissolver_class = known[kind]
        if not issubclass(dissolver_class, cls):
            raise InputError(f"{root} holds a {kind!r} dissolver, not {cls.kind!r}: load it with Dissolver.from_pretrained")
        if dissolver_class is not cls and dissolver_class.from_pretrained.__func__ is not Dissolver.from_pretrained.__func__:
            return dissolver_class.from_pretrained(root)  # such as one with networks
        config.pop("training", None)
        try:
            return dissolver_class(**config)
        except (TypeError, InputError) as error:
            raise InputError(f"{root / CONFIG_NAME}: {error}; correct the file") from error


def _source(class_: type) -> str:
    """Module, name and source of a class; if there is no source to read, something that no other class has."""
    try:
        source = inspect.getsource(class_)
    except (OSError, TypeError, SyntaxError):
        source = uuid.uuid4().hex
    return f"{class_.__module__}.{class_.__qualname__}\n{source}"


def working_size(height: int, width: int, resolution: int | None) -> tuple[int, int]:
    """The resolution rule: an image with a side longer than `resolution` is worked on at resolution × resolution, any other as it is."""
    return (height, width) if resolution is None or max(height, width) <= resolution else (resolution, resolution)


def check_pixel_values(pixel_values: Tensor) -> None:
    if pixel_values.ndim != 4 or not pixel_values.is_floating_point():
        raise InputError(f"pixel_values must be (B, C, H, W) floating point, got {tuple(pixel_values.shape)} {pixel_values.dtype}")
    if torch.compiler.is_compiling():  # a graph that depends on what the pixels are is broken there, and in every call that leads there
        return
    if pixel_values.numel() and not pixel_values.abs().max() <= 1.001:  # `not` catches NaN too; a little room for rounding
        low, high = (value.item() for value in pixel_values.aminmax())
        raise InputError(f"pixel_values must be in [-1, 1], got {low:.3g} … {high:.3g}: use a processor with image_mean = image_std = 0.5")


def draw_integers(low: int, high: int, count: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    """(count,) long, uniform in low … high − 1. With a generator the draw is made on the generator's device."""
    drawn_on = device if generator is None else generator.device
    return torch.randint(low, high, (count,), generator=generator, device=drawn_on).to(device)


def check_integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def read_config(root: Path) -> dict:
    """`dissolver_config.json` of a folder that `locate` gave; a plain DDPMPipeline has none, and is of the kind diffusion."""
    path = root / CONFIG_NAME
    return {"kind": "diffusion"} | (read_json(path) if path.exists() else {})


def locate(folder_or_hub_id: str | os.PathLike, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder, downloaded if need be, that holds the dissolver's files."""
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [prefix + name for prefix in ("", "dissolver/") for name in DISSOLVER_FILES]
        with loading(str(folder_or_hub_id), "is no local folder, and not to be had from the Hub"):
            folder = Path(snapshot_download(str(folder_or_hub_id), revision=revision, token=token, allow_patterns=patterns))
    for root in (folder, folder / "dissolver"):
        if (root / CONFIG_NAME).exists() or (root / "unet").is_dir():
            return root
    raise InputError(f"{folder} holds no dissolver: name a folder with {CONFIG_NAME}, or with unet/ and scheduler/ of a DDPMPipeline")
