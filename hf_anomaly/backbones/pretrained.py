"""What every detector with an `AutoBackbone` for its encoder needs."""

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from ..errors import InputError
from ..hub import loading
from ..untrusted import load_without_code

_COMMON_SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 224, 256, 384, 512)  # px, to say which would do
_FAILURE = "cannot be loaded as a backbone"


def build_backbone(backbone_config: PreTrainedConfig, image_size: int, num_channels: int) -> nn.Module:
    """A new backbone for images of this size.

    Raises:
        InputError: it cannot take them; names sizes that it can.
    """
    settings = backbone_config.to_json_string(use_diff=False)
    if not _takes(settings, image_size, num_channels):
        fitting = [str(size) for size in _COMMON_SIZES if _takes(settings, size, num_channels)]
        if fitting:  # else something but the size is wrong, or it cannot be tried in this way
            raise InputError(
                f"the backbone {backbone_config.model_type!r} cannot take images of {image_size} px; it takes, for instance, {', '.join(fitting)}: "
                "set image_size (--image_size)"
            )
    return AutoBackbone.from_config(backbone_config)


@lru_cache(maxsize=256)
def _takes(settings: str, image_size: int, num_channels: int) -> bool:
    """Whether the backbone of this configuration, as JSON, takes such images. Tries shapes alone, without weights."""
    try:
        with torch.device("meta"):
            backbone = AutoBackbone.from_config(AutoConfig.for_model(**json.loads(settings))).eval()
            maps = backbone(torch.empty(1, num_channels, image_size, image_size)).feature_maps
    except (RuntimeError, ValueError):
        return False
    return all(min(map_.shape[-2:]) > 0 for map_ in maps)


def check_channels(backbone_config: PreTrainedConfig, num_channels: int) -> None:
    """Refuses a backbone for images of other channels."""
    channels = getattr(backbone_config, "num_channels", num_channels)
    if channels != num_channels:
        raise InputError(
            f"backbone_config.num_channels is {channels}, but the images have {num_channels}: "
            f"convert the images (--num_channels {channels}) or take another backbone"
        )


def load_backbone_config(name_or_path: str, stage: str | None = None) -> PreTrainedConfig:
    """The configuration of a pretrained backbone, from a folder or the Hub.

    Args:
        stage: the one whose map it gives, by its name in `stage_names`; None: its own choice, as a rule the last.

    Raises:
        InputError: there is none, or it has no such stage.
        HubError: the Hub refused or cannot be reached.
    """
    with loading(name_or_path, _FAILURE):
        return load_without_code(AutoConfig, name_or_path, **({} if stage is None else {"out_features": [stage]}))


def load_backbone_weights(backbones: Sequence[nn.Module], name_or_path: str, **kwargs) -> None:
    """Copies the weights of a pretrained backbone into all of `backbones`, which are of one architecture, that of the pretrained one.

    Args:
        name_or_path: a Hub id or folder, as for `AutoBackbone.from_pretrained`.

    Raises:
        InputError: its architecture or widths differ from those of `backbones`, or its weights are missing, damaged or no safetensors.
        HubError: the Hub refused or cannot be reached.
    """
    new, misfit = backbones[0], f"{name_or_path} does not fit the detector's backbone_config"
    with loading(str(name_or_path), _FAILURE):
        config = load_without_code(AutoConfig, name_or_path, **kwargs)
        if type(config) is not type(new.config):
            raise InputError(f"{misfit}: it is a {config.model_type!r}, not a {new.config.model_type!r}")
        if set(new.out_features) <= set(config.stage_names):  # else it does not fit
            config.out_features = new.out_features  # some have weights of their own for each map that they give
        # Not AutoBackbone.from_pretrained, which knows no folders.
        weights = type(new).from_pretrained(name_or_path, config=config, use_safetensors=True, **kwargs).state_dict()
    try:
        for backbone in backbones:
            backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{misfit}: {str(error).splitlines()[-1].strip()}") from error
