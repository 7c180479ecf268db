"""From any image to `pixel_values`, and from a detector's output back to the image's own size; saved with the model."""

import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from .data.formats import FULL, Reading, Window, apply_window, check_window
from .data.transforms import decode_image
from .detector import AnomalyDetectorConfig, AnomalyDetectorOutput
from .errors import InputError, one_line
from .ops.resizing import resize
from .saving import auto_map, write_remote_code


def to_eight_bit_image(image: "PIL.Image.Image | np.ndarray | torch.Tensor", name: str = "image", window: Window = None) -> PIL.Image.Image:
    """A PIL image of 8 bits a channel, upright.

    Args:
        image: a PIL image, or an array (H, W), (H, W, C) or (C, H, W) of uint8 or of floats in [0, 1]; with a window also of 16-bit integers.
        name: how an error calls it.
        window: for more than 8 bits, see `Reading`.

    Raises:
        InputError: an unreadable image, more than 8 bits without a window, NaN or infinite values, floats outside [0, 1], or a shape that is no image's.
    """
    if isinstance(image, PIL.Image.Image):
        return decode_image(image, name, window)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image  # which numpy does not know
    array = np.asarray(image)
    if _has_channels_first(array.shape):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or array.size == 0:
        raise InputError(
            f"{name} has shape {array.shape}: expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; several images are given as a list"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinite pixels: leave it out or repair it")
        if array.min() < 0 or array.max() > 1:
            raise InputError(f"{name} holds floats from {array.min():.4g} to {array.max():.4g}: scale them to [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind in "ui" and array.itemsize == 2 and window is not None:  # in either order of bytes
        limits = np.iinfo(array.dtype)
        array = apply_window(array, *((limits.min, limits.max) if window == FULL else window))
    elif array.dtype != np.uint8:
        raise InputError(f"{name} has dtype {array.dtype}: give uint8 or floats in [0, 1], or 16-bit integers and the processor a window")
    return PIL.Image.fromarray(array)


def _has_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3, 4) and shape[-1] not in (1, 3, 4)


def _as_list(images) -> Sequence:
    return images if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]


def _holds_floats(image) -> bool:
    dtype = getattr(image, "dtype", None)
    return dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype is not None and np.issubdtype(dtype, np.floating)


def _converted(image: PIL.Image.Image, to_rgb: bool, size: tuple[int, int], resample: int) -> PIL.Image.Image:
    mode = "RGB" if to_rgb else "L"
    if image.mode != mode:  # else PIL would copy it
        image = image.convert(mode)
    return image if image.size == size else image.resize(size, resample)


def _download(url: str, timeout: float) -> bytes:
    from huggingface_hub.utils import httpx  # without the client's token and offline mode: the address may be anybody's

    try:
        response = httpx.get(url, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(f"{url}: cannot be fetched ({one_line(error)[:300]}); check the address and the network") from error
    return response.content


def _are_finite(values, counts: tuple[int, ...]) -> bool:
    """Whether the values are finite numbers, as many as one of the counts: a downloaded config may hold anything."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return numbers.size in counts and bool(np.isfinite(numbers).all())


class AnomalyImageProcessor(PilBackend):
    """Images of any mode and size → `pixel_values` (B, C, H, W) float32 in [−1, 1].

    Gray when `do_convert_rgb` is False, RGB otherwise; transparency is dropped. The whole image is resized to `size`, without keeping its aspect.
    `window`, (low, high) or "full", tells which values of images of more than 8 bits become black and white; None refuses such images. `slice_axis` and
    `central_slices` tell readers of volumes how those were sliced that trained the detector; None: as by default. See `data.formats.Reading`.
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
    window: Window = None
    slice_axis: int | None = None
    central_slices: int | None = None

    def __init__(self, *, window: Window = None, slice_axis: int | None = None, central_slices: int | None = None, **kwargs):
        super().__init__(**kwargs)
        check_window(window)
        self.window = window if window is None or isinstance(window, str) else [float(value) for value in window]
        self.slice_axis, self.central_slices = slice_axis, central_slices
        self.reading  # noqa: B018, refuses other values

    def __setattr__(self, name, value):
        if name == "window":  # transformers sets what `from_pretrained` is given, and does not ask the constructor
            check_window(value)
        super().__setattr__(name, value)

    @classmethod
    def for_images(
        cls,
        image_size: int,
        num_channels: int,
        window: Window = None,
        *,
        slice_axis: int | None = None,
        central_slices: int | None = None,
    ) -> "AnomalyImageProcessor":
        """The processor that goes with a detector of this size and number of channels, 1 or 3; `window` for images of more than 8 bits, `slice_axis` and
        `central_slices` of volumes."""
        if num_channels not in (1, 3):
            raise InputError(f"num_channels must be 1 (gray) or 3 (RGB), got {num_channels}")
        return cls(
            window=window,
            slice_axis=slice_axis,
            central_slices=central_slices,
            size={"height": image_size, "width": image_size},
            do_convert_rgb=num_channels == 3,
            image_mean=[0.5] * num_channels,
            image_std=[0.5] * num_channels,
        )

    def check_fits(self, config: AnomalyDetectorConfig) -> None:
        """Refuses a processor that makes other images than a detector with this configuration takes: a downloaded one may ask for any amount of memory.

        Raises:
            InputError: another size or number of channels, no resizing, a step that changes the size, or numbers that nothing can be computed with.
        """
        wanted = config.image_size
        size = self.size or {"height": None, "width": None}
        if (size["height"], size["width"]) != (wanted, wanted) or self.num_channels != config.num_channels:
            makes = f"{size['height']}×{size['width']} pixels and {self.num_channels} channels"
            needs = f"{wanted}×{wanted} pixels and {config.num_channels} channels"
            raise InputError(
                f"the image processor makes images of {makes}, but the detector takes {needs}: correct preprocessor_config.json"
            )
        if not self.do_resize:
            raise InputError("the image processor has do_resize off, which leaves the images' sizes: correct preprocessor_config.json")
        for step in ("do_center_crop", "do_pad"):
            if getattr(self, step, None):
                raise InputError(f"the image processor has {step}, which changes the images' size: correct preprocessor_config.json")
        a_channel = (1, config.num_channels)
        for name, fits in {
            "image_mean": not self.do_normalize or _are_finite(self.image_mean, a_channel),
            "image_std": not self.do_normalize
            or (_are_finite(self.image_std, a_channel) and np.all(np.asarray(self.image_std, float) != 0)),
            "rescale_factor": not self.do_rescale or _are_finite(self.rescale_factor, (1,)),
            "resample": isinstance(self.resample, int) and self.resample in list(PILImageResampling),
        }.items():
            if not fits:
                raise InputError(f"the image processor's {name} cannot be {getattr(self, name)!r}: correct preprocessor_config.json")

    def to_dict(self) -> dict:
        content = super().to_dict()
        content["auto_map"] = auto_map(AutoImageProcessor=type(self))
        return {name: value for name, value in content.items() if name != "auto_map" or value is not None}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As `ImageProcessingMixin.save_pretrained`; also found by `AutoImageProcessor.from_pretrained(..., trust_remote_code=True)`."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_remote_code(save_directory)
        return files

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        write_remote_code(working_dir)  # `save_pretrained` uploads before it returns, and the config names this file
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoImageProcessor"):
        """Nothing: a saved processor refers to the package, whose code is not copied beside it."""

    @property
    def reading(self) -> Reading:
        """How files of more than 8 bits and volumes are read."""
        window = tuple(self.window) if isinstance(self.window, list) else self.window
        return Reading(window, 2 if self.slice_axis is None else self.slice_axis, self.central_slices)

    @property
    def num_channels(self) -> int:
        """Of the images it makes: 3 (RGB) or 1 (gray)."""
        return 3 if self.do_convert_rgb else 1

    @property
    def image_shape(self) -> dict[str, int]:
        """`image_size` and `num_channels` of the images it makes, as a detector's configuration has them."""
        return {"image_size": self.size["height"], "num_channels": self.num_channels}

    def read(self, image, name: str, timeout: float = 30.0) -> PIL.Image.Image:
        """As `to_eight_bit_image` with the processor's window, also of the path or http(s) URL of a file, or of `{"bytes", "path"}` as
        `datasets.Image(decode=False)` gives it.

        Args:
            timeout: seconds to wait for a URL.

        Raises:
            InputError: also a file that is missing, unreadable or cannot be fetched, what is no image, and an array (3, H, W) or (4, H, W) where images
                become gray: it may be one image in colour, or three or four gray ones.
        """
        shape = tuple(getattr(image, "shape", ()))
        if not self.do_convert_rgb and _has_channels_first(shape) and shape[0] != 1:
            raise InputError(
                f"{name} has shape {shape}, and the detector's images are gray: give {shape[0]} gray images as a list, or one in colour as (H, W, C)"
            )
        if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
            return decode_image({"bytes": _download(image, timeout)}, image, self.window)
        if isinstance(image, (str, os.PathLike)):
            return decode_image({"path": os.fspath(image)}, name, self.window)
        if isinstance(image, dict) and image.keys() <= {"bytes", "path"}:  # of a row that anybody may have written no address is fetched
            return decode_image(image, name, self.window)
        if isinstance(image, PIL.Image.Image):
            return decode_image(image, getattr(image, "filename", None) or name, self.window)
        if hasattr(image, "__array__"):
            return to_eight_bit_image(image, name, self.window)
        raise InputError(f"{name} is a {type(image).__name__}: give a path, a URL, a PIL image or an array")

    def resized(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """An upright image of 8 bits a channel in the processor's mode and size, which takes less memory to hold; its `pixel_values` are the same."""
        return _converted(image, self.do_convert_rgb, (self.size["width"], self.size["height"]), self.resample)

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        """As transformers' own; floats in [0, 1] become levels of 0 to 255 first, whatever `do_rescale` says.

        Raises:
            InputError: `do_rescale=False` with floats; see also `read`.
        """
        if not kwargs.get("do_rescale", self.do_rescale):
            for i, image in enumerate(_as_list(images)):
                if _holds_floats(image):
                    raise InputError(f"images[{i}] holds floats, which become levels of 0 to 255 first: leave do_rescale on")
        return super().preprocess(images, *args, **kwargs)

    def _prepare_images_structure(self, images, expected_ndims=3) -> list[PIL.Image.Image]:
        # transformers' own takes no (H, W) arrays, and converts files to RGB, which clips 16-bit ones before anything can be said against it.
        return [self.read(image, f"images[{i}]") for i, image in enumerate(_as_list(images))]

    def process_image(self, image, *, do_convert_rgb, do_resize, size, resample, **kwargs) -> np.ndarray:
        # Resized here, in PIL, where it costs no conversion to an array and back.
        wanted = (size.width, size.height) if do_resize and size.height and size.width else image.size
        image = _converted(image, do_convert_rgb, wanted, resample)
        array = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)  # in half of np.array's time
        return np.moveaxis(array, -1, 0)

    def resize(self, image: np.ndarray, size, **kwargs) -> np.ndarray:
        # After process_image mostly nothing is left to do, and transformers' own would go through PIL and back all the same.
        return image if image.shape[-2:] == (size.height, size.width) else super().resize(image, size, **kwargs)

    def _preprocess(
        self, images, *, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_pad, pad_size, return_tensors, **settings
    ) -> BatchFeature:
        # transformers' own, with its arithmetic, but once for all images of a size instead of image by image: of a small detector's time that
        # would be a third.
        off = {"do_rescale": False, "do_normalize": False, "do_pad": False, "return_tensors": None}
        unused = {"rescale_factor": None, "image_mean": None, "image_std": None, "pad_size": None}
        sized = super()._preprocess(images, **settings, **off, **unused)["pixel_values"]
        stacks = [np.stack(sized)] if len({image.shape for image in sized}) == 1 else [image[None] for image in sized]
        if do_rescale:
            stacks = [(stack * np.float64(rescale_factor)).astype(np.float32) for stack in stacks]
        if do_normalize:
            mean, std = (np.reshape(values, (-1, 1, 1)).astype(np.float32) for values in (image_mean, image_std))
            for stack in stacks:
                for name, values in (("image_mean", mean), ("image_std", std)):
                    if len(values) not in (1, stack.shape[1]):  # of one channel numpy would make as many
                        raise InputError(
                            f"{name} has {len(values)} numbers, and the images have {stack.shape[1]} channels: give one a channel"
                        )
            stacks = [(stack - mean) / std for stack in stacks]
        if len(stacks) == 1 and return_tensors is not None and not do_pad:
            return BatchFeature(data={"pixel_values": stacks[0]}, tensor_type=return_tensors)
        pixel_values = [image for stack in stacks for image in stack]
        if do_pad:
            pixel_values = self.pad(pixel_values, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def post_process_anomaly_detection(
        self, outputs: AnomalyDetectorOutput, target_sizes: "Sequence[tuple[int, int]] | torch.Tensor | None" = None
    ) -> list[dict]:
        """A detector's output image by image, each map stretched back to the size of its image.

        Args:
            outputs: of a detector in eval mode, B images; with `anomaly_maps` if it was asked for them.
            target_sizes: B pairs (height, width) in pixels, of the upright images, PIL's `image.size[::-1]`; None keeps the size of the maps.

        Returns:
            B dicts: `score` (float) and `anomaly_map`, (H, W) float32 on the maps' device, or None without maps.

        Raises:
            InputError: an output without scores, sizes that are not B pairs, or a processor that was set to crop or to pad.
        """
        if outputs.scores is None:
            raise InputError("the output has no scores: call the detector in eval mode")
        scores, maps, sizes = outputs.scores.tolist(), outputs.anomaly_maps, None
        if target_sizes is not None:
            try:
                sizes = [tuple(map(int, size)) for size in target_sizes]
            except TypeError:  # a number in place of a pair, such as of the size of a single image
                sizes = []
            if len(sizes) != len(scores) or any(len(size) != 2 or min(size) < 1 for size in sizes):
                raise InputError(f"target_sizes must be {len(scores)} pairs (height, width), one an image, got {target_sizes}")
        if maps is None:
            return [{"score": score, "anomaly_map": None} for score in scores]
        for step in ("do_center_crop", "do_pad"):
            if sizes is not None and getattr(self, step, None):
                raise InputError(f"the processor has {step}=True, where a map does not cover the image alone: leave out target_sizes")
        rows = zip(scores, maps.detach().float(), sizes or [tuple(maps.shape[-2:])] * len(scores), strict=True)
        return [{"score": score, "anomaly_map": resize(one[None], size)[0, 0]} for score, one, size in rows]
