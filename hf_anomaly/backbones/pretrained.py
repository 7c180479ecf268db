"""What every detector with an `AutoBackbone` for its encoder needs."""

from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from ..errors import InputError


def check_backbone_config(backbone_config, num_channels: int) -> None:
    """Refuses a `backbone_config` without a `model_type`, or for images of other channels."""
    if isinstance(backbone_config, dict) and "model_type" not in backbone_config:
        raise InputError("backbone_config has no 'model_type': name the backbone's architecture, for instance 'small_resnet' or 'resnet'")
    channels = getattr(backbone_config, "num_channels", num_channels)
    if channels != num_channels:
        raise InputError(
            f"backbone_config.num_channels is {channels}, but the images have {num_channels}: "
            "convert the images (--num_channels) or take another backbone"
        )


def load_backbone_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a pretrained backbone, from a folder or the Hub."""
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"backbone {name_or_path!r} cannot be loaded: {error}") from error


def load_backbone_weights(backbone: nn.Module, name_or_path: str, **kwargs) -> None:
    """Copies the weights of a pretrained backbone of the same architecture.

    Args:
        name_or_path: a Hub id or folder, as for `AutoBackbone.from_pretrained`.

    Raises:
        InputError: its architecture or widths differ from those of `backbone`.
    """
    # Not AutoBackbone.from_pretrained, which knows no folders.
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    pretrained = type(AutoBackbone.from_config(config)).from_pretrained(name_or_path, config=config, use_safetensors=True, **kwargs)
    try:
        backbone.load_state_dict(pretrained.state_dict())
    except RuntimeError as error:
        raise InputError(f"{name_or_path} does not fit the detector's backbone_config: {str(error).splitlines()[-1].strip()}") from error
