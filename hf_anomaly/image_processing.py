"""From any image to `pixel_values`: mode, size and range, saved with the model."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from .data.transforms import check_eight_bits
from .errors import InputError


def to_eight_bit_image(image: "PIL.Image.Image | np.ndarray | torch.Tensor", name: str = "image") -> PIL.Image.Image:
    """A PIL image of 8 bits a channel, upright.

    Args:
        image: a PIL image of any 8-bit mode, or an array (H, W), (H, W, C) or (C, H, W) of uint8 or of floats in [0, 1].
        name: how an error calls it.

    Raises:
        InputError: more than 8 bits, NaN or infinite values, floats outside [0, 1], or a shape that is no image's.
    """
    if isinstance(image, PIL.Image.Image):
        check_eight_bits(image, name)
        return PIL.ImageOps.exif_transpose(image)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or array.size == 0:
        raise InputError(f"{name} has shape {array.shape}: expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinite pixels: leave it out or repair it")
        if array.min() < 0 or array.max() > 1:
            raise InputError(f"{name} holds floats from {array.min():.4g} to {array.max():.4g}: scale them to [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise InputError(f"{name} has dtype {array.dtype}: give uint8 or floats in [0, 1]")
    return PIL.Image.fromarray(array)


class AnomalyImageProcessor(PilBackend):
    """Images of any mode and size → `pixel_values` (B, C, H, W) float32 in [−1, 1].

    Gray when `do_convert_rgb` is False, RGB otherwise; transparency is dropped. The whole image is resized to `size`, without keeping its aspect.
    Build it with `AnomalyImageProcessor.for_images(image_size, num_channels)`.
    """

    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BILINEAR
    size = {"height": 32, "width": 32}
    image_mean = [0.5]
    image_std = [0.5]
    do_convert_rgb = False
    do_resize = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def for_images(cls, image_size: int, num_channels: int) -> "AnomalyImageProcessor":
        """The processor that goes with a detector of this size and number of channels."""
        return cls(
            size={"height": image_size, "width": image_size},
            do_convert_rgb=num_channels == 3,
            image_mean=[0.5] * num_channels,
            image_std=[0.5] * num_channels,
        )

    @property
    def num_channels(self) -> int:
        return 3 if self.do_convert_rgb else 1

    def _prepare_images_structure(self, images, expected_ndims=3) -> list[PIL.Image.Image]:
        # transformers' own takes no (H, W) arrays.
        images = self.fetch_images(images)
        images = images if isinstance(images, list) or getattr(images, "ndim", 0) == 4 else [images]
        return [to_eight_bit_image(image, f"images[{i}]") for i, image in enumerate(images)]

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        image = image.convert("RGB" if do_convert_rgb else "L")
        size = self.size
        if self.do_resize and image.size != (size["width"], size["height"]):
            # Resized here, in PIL, where it costs no conversion to an array and back.
            image = image.resize((size["width"], size["height"]), self.resample)
        array = np.array(image)
        return np.moveaxis(array, -1, 0) if do_convert_rgb else array[None]
