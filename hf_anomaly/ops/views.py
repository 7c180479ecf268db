"""SimCLR's augmentations that shift nothing semantic (O, O', O'' of DIA's Eq. 5): crop, flip, colour jitter, grayscale.

Parameters are drawn apart from being applied. So they can be drawn for the global batch and sliced by rank, or kept in a buffer
and applied to every image alike, as the fixed test-time views are. One row of a *views* tensor describes one view; `View` names
its columns.
"""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_anomaly.errors import InputError

from .pieces import pieces


class View(IntEnum):
    """Columns of a views tensor (n, 10), float32."""

    FLIP = 0  # 1: the crop is mirrored left to right, 0: it is not
    CENTER_X = 1  # centre of the crop; the image spans [−1, 1], x to the right and y down
    CENTER_Y = 2
    HALF_WIDTH = 3  # half the extent of the crop, (0, 1]: its share of the image's side
    HALF_HEIGHT = 4
    BRIGHTNESS = 5  # factors ≥ 0; 1 changes nothing
    CONTRAST = 6
    SATURATION = 7
    HUE = 8  # shift in turns of the colour circle, [−0.5, 0.5]
    GRAY = 9  # 1: the colours are replaced by their gray, 0: they are not


_GEOMETRY = slice(View.FLIP, View.BRIGHTNESS)
_IDENTITY = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
_CROPS = ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0))  # where `crops_views` look, as x and y
NUM_CROPS = len(_CROPS)
_CROP_RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height of a crop, relative to that of the image
_CHUNK_SIZE = 2**20  # numbers that are changed at once: with temporaries of many times that, 224 px take a CPU three times as long


def identity_views(n: int) -> Tensor:
    """n views that change nothing, (n, 10) float32."""
    return torch.tensor(_IDENTITY, dtype=torch.float32).repeat(n, 1)


def crops_views(n: int, scale: float = 0.54) -> Tensor:
    """n fixed crops without flip or change of colour: upper left, upper right, lower left, lower right, centre, and again.

    Args:
        n: number of views.
        scale: share of the image's area that a crop keeps, in (0, 1].

    Returns:
        (n, 10) float32.

    Raises:
        InputError: `scale` outside (0, 1].
    """
    _check_range("scale", (scale, scale), 0.0, 1.0, open_low=True)
    views = identity_views(n)
    half = math.sqrt(scale)
    places = torch.tensor(_CROPS, dtype=torch.float32)
    views[:, View.CENTER_X : View.HALF_WIDTH] = (1 - half) * places[torch.arange(n) % NUM_CROPS]
    views[:, View.HALF_WIDTH : View.BRIGHTNESS] = half
    return views


def draw_views(
    n: int,
    *,
    num_channels: int,
    crop_scale: tuple[float, float] = (0.54, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_probability: float = 0.8,
    gray_probability: float = 0.2,
    flip_probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random parameters of n views, drawn independently (SimCLR, Chen et al., arXiv 2002.05709, appendix A; strengths of CSI and DIA).

    The crop's area is uniform in `crop_scale`; the logarithm of its aspect ratio is uniform between those of 3/4 and 4/3, narrowed where the
    crop would not fit the image; its position is uniform where it fits. (The usual rejection of crops that do not fit would favour
    small areas, and needs a loop.)

    Args:
        n: number of views.
        num_channels: of the images; unless it is 3, saturation, hue and gray are left at the identity.
        crop_scale: smallest and largest share of the image's area, in (0, 1].
        jitter: strengths (b, c, s, h): brightness, contrast and saturation factors are uniform in [max(0, 1 − b), 1 + b] and so
            on, the hue shift in [−h, h] turns, h ≤ 0.5.
        jitter_probability: of the jitter, all four together.
        gray_probability, flip_probability: of either.
        generator: the source of randomness, on the CPU; the global one by default.

    Returns:
        (n, 10) float32; the columns are those of `View`.

    Raises:
        InputError: a probability, scale, ratio or strength out of its range.
    """
    _check_range("crop_scale", crop_scale, 0.0, 1.0, open_low=True)
    if len(jitter) != 4:
        raise InputError(f"jitter: {jitter} has {len(jitter)} entries; give brightness, contrast, saturation and hue")
    _check_range("jitter", (min(jitter), max(jitter)), 0.0, math.inf)
    _check_range("jitter (hue)", (jitter[3], jitter[3]), 0.0, 0.5)
    for name, p in (
        ("jitter_probability", jitter_probability),
        ("gray_probability", gray_probability),
        ("flip_probability", flip_probability),
    ):
        _check_range(name, (p, p), 0.0, 1.0)

    u = torch.rand(n, 11, dtype=torch.float32, generator=generator)
    views = identity_views(n)
    views[:, View.FLIP] = (u[:, 0] < flip_probability).float()

    log_area = torch.lerp(torch.full_like(u[:, 1], crop_scale[0]), torch.full_like(u[:, 1], crop_scale[1]), u[:, 1]).log()
    # width² = area·ratio ≤ 1 and height² = area/ratio ≤ 1, that is |log ratio| ≤ −log area.
    low, high = (torch.full_like(log_area, math.log(r)).clamp(min=log_area, max=-log_area) for r in _CROP_RATIO)
    log_ratio = torch.lerp(low, high, u[:, 2])
    half = torch.stack([log_area + log_ratio, log_area - log_ratio], dim=1).div(2).exp().clamp(max=1.0)
    views[:, View.HALF_WIDTH : View.BRIGHTNESS] = half
    views[:, View.CENTER_X : View.HALF_WIDTH] = (1 - half) * (2 * u[:, 3:5] - 1)

    color = num_channels == 3
    strength = u.new_tensor(jitter if color else (*jitter[:2], 0.0, 0.0))
    center = u.new_tensor(_IDENTITY)[View.BRIGHTNESS : View.GRAY]
    low = (center - strength).clamp(min=u.new_tensor((0.0, 0.0, 0.0, -math.inf)))  # factors are not negative, a hue shift may be
    jittered = torch.lerp(low, center + strength, u[:, 5:9])
    views[:, View.BRIGHTNESS : View.GRAY] = torch.where(u[:, 9:10] < jitter_probability, jittered, center)
    views[:, View.GRAY] = (u[:, 10] < gray_probability).float() if color else 0.0
    return views


def apply_views(pixel_values: Tensor, views: Tensor) -> Tensor:
    """Apply to each image its view: crop (bilinear, to the image's own size), flip, colour.

    The order of colour operations is fixed, as the parameters fix the result: brightness (a factor), contrast (a blend with the
    image's mean gray), saturation (a blend with the pixel's gray), hue (a shift in HSV), gray; each is clamped to [0, 1]. These are
    the definitions of PIL and torchvision. Images without three channels get brightness and contrast only. Parts of a crop outside
    the image are filled by reflection. An image's result does not depend on the others; the identity view returns it exactly.

    Args:
        pixel_values: (N, C, H, W) in [−1, 1]. Half precision is computed in float32.
        views: (N, 10), one row an image: `draw_views`, `crops_views`, `identity_views`.

    Returns:
        (N, C, H, W) in [−1, 1], of the dtype of `pixel_values`; in memory the channels are innermost (channels_last), as convolutions like them.

    Raises:
        InputError: shapes that do not fit.
    """
    if pixel_values.ndim != 4 or views.shape != (pixel_values.shape[0], len(View)):
        raise InputError(
            f"views: shape {tuple(views.shape)} does not fit images {tuple(pixel_values.shape)}; pass (N, {len(View)}) and (N, C, H, W)"
        )
    # Filled piece by piece: joining the pieces would hold everything twice.
    result = torch.empty_like(pixel_values, memory_format=torch.channels_last)
    for piece in pieces(pixel_values.shape[0], _CHUNK_SIZE, pixel_values.shape[1:].numel()):
        result[piece] = _apply(pixel_values[piece], views[piece])
    return result


def apply_shifted_views(pixel_values: Tensor, views: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
    """`apply_views` to the shifted images S_k(x), which are made a few at a time: to write all of them to memory first costs as much as to view them.

    Args:
        pixel_values: (N, C, H, W) in [−1, 1].
        views: (K, N, 10), a row for each shift of each image.
        shift: of `ops.shifts`: (B, C, H, W) → (K, B, C, H, W).

    Returns:
        (K, N, C, H, W) in [−1, 1], of the dtype of `pixel_values`, with the channels innermost in memory.
    """
    # Filled piece by piece: joining the pieces would hold everything twice.
    count, channels, height, width = pixel_values.shape
    result = pixel_values.new_empty(len(views), count, height, width, channels).movedim(-1, 2)
    for piece in pieces(count, _CHUNK_SIZE, len(views) * channels * height * width):
        shifted, parameters = shift(pixel_values[piece]), views[:, piece]
        result[:, piece] = apply_views(shifted.flatten(0, 1), parameters.flatten(0, 1)).unflatten(0, parameters.shape[:2])
    return result


def _apply(pixel_values: Tensor, views: Tensor) -> Tensor:
    dtype = torch.promote_types(pixel_values.dtype, torch.float32)
    x, views = pixel_values.to(dtype), views.to(pixel_values.device, dtype)
    identity = views.new_tensor(_IDENTITY)
    x = _change(x, views, (views[:, _GEOMETRY] != identity[_GEOMETRY]).any(dim=1), _crop)
    x = _change(x, views, (views[:, View.BRIGHTNESS :] != identity[View.BRIGHTNESS :]).any(dim=1), _color)
    return x.to(pixel_values.dtype)


def _change(x: Tensor, views: Tensor, changed: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`change` of the images that are `changed` (N,): the others stay exact, and their time is saved."""
    if torch.compiler.is_compiling():  # a graph cannot depend on how many they are
        return torch.where(changed[:, None, None, None], change(x, views), x)
    rows = changed.nonzero().squeeze(1)
    if len(rows) == len(x):  # most often; nothing has to be copied
        return change(x, views)
    return x.index_copy(0, rows, change(x[rows], views[rows])) if len(rows) else x


def _crop(x: Tensor, views: Tensor) -> Tensor:
    """Crop, mirrored or not, of x (N, C, H, W), as one affine resampling. The map has no shear, so each axis has its own line."""

    def line(center: View, half: Tensor, size: int) -> Tensor:
        pixels = (2 * torch.arange(size, dtype=x.dtype, device=x.device) + 1) / size - 1  # pixel centres (align_corners=False)
        return views[:, center, None] + half[:, None] * pixels

    height, width = x.shape[-2:]
    mirror = 1 - 2 * views[:, View.FLIP]
    grid_x = line(View.CENTER_X, mirror * views[:, View.HALF_WIDTH], width)[:, None, :].expand(-1, height, -1)
    grid_y = line(View.CENTER_Y, views[:, View.HALF_HEIGHT], height)[:, :, None].expand(-1, -1, width)
    return F.grid_sample(x, torch.stack([grid_x, grid_y], dim=-1), mode="bilinear", padding_mode="reflection", align_corners=False)


def _color(x: Tensor, views: Tensor) -> Tensor:
    """Colour operations on x (N, C, H, W) in [−1, 1]."""
    from kornia.color import rgb_to_grayscale

    color = x.shape[1] == 3
    brightness, contrast, saturation = views[:, View.BRIGHTNESS : View.HUE, None, None, None].unbind(1)
    # In place: new memory for every step takes large images half as long again.
    y = ((x + 1) / 2).mul_(brightness).clamp_(0, 1)
    mean = (rgb_to_grayscale(y) if color else y).mean((-3, -2, -1), keepdim=True)
    y.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    if color:
        gray = rgb_to_grayscale(y).mul_(1 - saturation)
        y.mul_(saturation).add_(gray).clamp_(0, 1)
        y = _change(y, views, views[:, View.HUE] != 0, _shift_hue)
        y = _change(y, views, views[:, View.GRAY] > 0, lambda y, _: rgb_to_grayscale(y).expand_as(y))
    return y * 2 - 1


def _shift_hue(y: Tensor, views: Tensor) -> Tensor:
    """Hue of y (N, 3, H, W) in [0, 1] shifted in HSV. Kornia's way through an HSV image takes four times the time."""
    red, green, blue = y.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # Which channel is largest, as weights 0 and 1, red before green: torch.where takes a CPU ten times as long.
    hue = (red - green).add_(chroma, alpha=4)
    hue.lerp_((blue - red).add_(chroma, alpha=2), (value == green).to(y.dtype)).lerp_(green - blue, (value == red).to(y.dtype))
    hue.div_(chroma.clamp(min=1e-12)).add_(6 * views[:, View.HUE, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # in sixths of a turn, [0, 6]
    shares = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1)  # of red, green, blue
    return shares.clamp_(0, 1).mul_(chroma[:, None]).add_(least[:, None])


def _check_range(name: str, limits: tuple[float, float], low: float, high: float, open_low: bool = False) -> None:
    first, last = limits
    if not ((low < first if open_low else low <= first) and first <= last <= high):
        shown = first if first == last else tuple(limits)
        raise InputError(
            f"{name}: {shown} is out of range; choose within {'(' if open_low else '['}{low:g}, {high:g}], the smaller one first"
        )
