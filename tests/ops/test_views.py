import colorsys
import math

import numpy as np
import pytest
import torch

import hf_anomaly.ops.views
from hf_anomaly.errors import InputError
from hf_anomaly.ops.shifts import perm, rotate
from hf_anomaly.ops.views import View, apply_shifted_views, apply_views, crops_views, draw_views, identity_views


def random_images(n, channels=3, height=16, width=16, dtype=torch.float32):
    return torch.rand(n, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_views(n, channels=3, **options):
    return draw_views(n, num_channels=channels, generator=torch.Generator().manual_seed(1), **options)


def view(**columns):
    """One view that differs from the identity in the named columns."""
    views = identity_views(1)
    for name, value in columns.items():
        views[0, View[name.upper()]] = value
    return views


# --- a slow oracle: one image, one pixel at a time


def slow_crop(image, p):
    channels, height, width = image.shape
    out = np.empty_like(image)

    def reflected(index, size):  # the half pixel outside the outermost centres mirrors into itself
        return min(max(index, 0), size - 1)

    for row in range(height):
        for column in range(width):
            along = (2 * column + 1) / width - 1
            x = p[View.CENTER_X] + p[View.HALF_WIDTH] * (-along if p[View.FLIP] else along)
            y = p[View.CENTER_Y] + p[View.HALF_HEIGHT] * ((2 * row + 1) / height - 1)
            x, y = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2  # in pixels
            left, top = math.floor(x), math.floor(y)
            for c in range(channels):
                out[c, row, column] = sum(
                    (1 - abs(x - i)) * (1 - abs(y - j)) * image[c, reflected(j, height), reflected(i, width)]
                    for i in (left, left + 1)
                    for j in (top, top + 1)
                )
    return out


def slow_color(image, p):
    def gray(pixel):
        return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2] if len(pixel) == 3 else pixel[0]

    def clip(pixel):
        return np.clip(pixel, 0, 1)

    pixels = [clip(p[View.BRIGHTNESS] * pixel) for pixel in (image.reshape(len(image), -1).T + 1) / 2]
    mean = sum(map(gray, pixels)) / len(pixels)
    pixels = [clip(p[View.CONTRAST] * pixel + (1 - p[View.CONTRAST]) * mean) for pixel in pixels]
    if len(image) == 3:
        pixels = [clip(p[View.SATURATION] * pixel + (1 - p[View.SATURATION]) * gray(pixel)) for pixel in pixels]
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
        pixels = [np.array(colorsys.hsv_to_rgb((h + p[View.HUE]) % 1, s, v)) for h, s, v in hsv]
        if p[View.GRAY]:
            pixels = [np.full(3, gray(pixel)) for pixel in pixels]
    return np.stack(pixels, axis=1).reshape(image.shape) * 2 - 1


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 16, 16), (3, 9, 14)])
def test_equals_the_oracle_image_by_image(channels, height, width):
    x, views = random_images(8, channels, height, width, torch.float64), random_views(8, channels, jitter=(0.6, 0.6, 0.6, 0.5))
    expected = [slow_color(slow_crop(image, p), p) for image, p in zip(x.numpy(), views.double().numpy(), strict=True)]
    torch.testing.assert_close(apply_views(x, views), torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-6)
    torch.testing.assert_close(apply_views(x.float(), views).double(), torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-4)


# --- one property at a time


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_is_exact_in_any_company(channels, dtype):
    x = random_images(6, channels, dtype=dtype)
    assert torch.equal(apply_views(x, identity_views(6)), x)
    views = random_views(6, channels)
    views[::2] = identity_views(3)
    y = apply_views(x, views)
    assert y.dtype == dtype
    assert torch.equal(y[::2], x[::2])
    assert not torch.equal(y[1::2], x[1::2])


def test_flip_mirrors_left_to_right():
    x = random_images(2, height=16, width=12)
    torch.testing.assert_close(apply_views(x, view(flip=1).repeat(2, 1)), x.flip(-1), rtol=0, atol=1e-5)


def test_crop_shows_its_part_of_the_image():
    # Half of each side, at the lower left; magnified twice, so pairs of pixels average to the pixels of the crop.
    corner = view(center_x=-0.5, center_y=0.5, half_width=0.5, half_height=0.5)
    ramp = torch.arange(16.0) / 8 - 1
    x = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16)])[:, None]
    across, down = apply_views(x, corner.repeat(2, 1))[:, 0, 1:-1, 1:-1]  # inside, where no border is mirrored
    pixels = (torch.arange(1, 15) + 0.5) / 2 - 0.5
    torch.testing.assert_close(across, (pixels / 8 - 1).expand(14, 14))
    torch.testing.assert_close(down, ((pixels + 8) / 8 - 1)[:, None].expand(14, 14))


def test_outside_the_image_is_its_reflection():
    x = random_images(1, height=8, width=8)
    shifted = apply_views(x, view(center_x=1.0))  # centred on the right edge
    torch.testing.assert_close(shifted, torch.cat([x[..., 4:], x[..., 4:].flip(-1)], dim=-1), rtol=0, atol=1e-5)


def test_color_of_one_channel_is_brightness_and_contrast():
    x = random_images(1, 1)
    assert torch.equal(apply_views(x, view(saturation=0.0, hue=0.3, gray=1)), x)
    assert apply_views(x, view(contrast=0.0)).std() < 1e-6
    torch.testing.assert_close(apply_views(x, view(brightness=0.5)), (x + 1) / 2 - 1)
    assert torch.equal(apply_views(x, view(brightness=0.0)), torch.full_like(x, -1))


def test_hue_turns_red_to_green_and_gray_has_the_luma():
    red = torch.tensor([1.0, -1, -1])[None, :, None, None].expand(1, 3, 4, 4)
    torch.testing.assert_close(apply_views(red, view(hue=1 / 3)), red.roll(1, dims=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(apply_views(red, view(gray=1)), torch.full_like(red, 2 * 0.299 - 1))
    torch.testing.assert_close(apply_views(red, view(saturation=0.0)), torch.full_like(red, 2 * 0.299 - 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_independent_of_batch_companions_and_order(channels):
    x, views = random_images(9, channels), random_views(9, channels)
    together = apply_views(x, views)
    alone = torch.cat([apply_views(x[i : i + 1], views[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(apply_views(x[order], views[order]), together[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2 * 3 * 6 * 6])  # one image at once; two, so that one is left over
def test_in_pieces_as_at_once(monkeypatch, size):
    x, views = random_images(5, 3, 6, 6), random_views(5)
    at_once = apply_views(x, views)
    monkeypatch.setattr(hf_anomaly.ops.views, "_CHUNK_SIZE", size)
    torch.testing.assert_close(apply_views(x, views), at_once, rtol=0, atol=1e-6)
    assert apply_views(x[:0], views[:0]).shape == (0, 3, 6, 6)


@pytest.mark.parametrize("shift", [rotate, perm])
@pytest.mark.parametrize("size", [1, 4 * 2 * 3 * 6 * 6, 2**20])  # one image with its shifts at once; two, so that one is left over; all
def test_shifted_in_pieces_as_at_once(monkeypatch, size, shift):
    x, views = random_images(5, 3, 6, 6), random_views(4 * 5)
    at_once = apply_views(shift(x).flatten(0, 1), views).unflatten(0, (4, 5))
    monkeypatch.setattr(hf_anomaly.ops.views, "_CHUNK_SIZE", size)
    in_pieces = apply_shifted_views(x, views.unflatten(0, (4, 5)), shift)
    torch.testing.assert_close(in_pieces, at_once, rtol=0, atol=1e-6)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (at_once.flatten(0, 1), in_pieces.flatten(0, 1)))


def test_half_precision_is_computed_in_float32():
    x, views = random_images(4).bfloat16(), random_views(4)
    expected = apply_views(x.float(), views).bfloat16()
    assert torch.equal(apply_views(x, views), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_views(x, views), expected)


def test_gradient_reaches_the_image():
    x = random_images(2, 3, 4, 4, torch.float64).mul(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_views(x, random_views(2, jitter=(0.1, 0.1, 0.1, 0.1))), x)


# --- the parameters


def test_drawn_parameters_have_their_ranges_and_probabilities():
    n = 20_000
    views = draw_views(n, num_channels=3, generator=torch.Generator().manual_seed(0))
    assert views.dtype == torch.float32
    flip, x, y, width, height, brightness, contrast, saturation, hue, gray = views.double().T
    for flags, probability in ((flip, 0.5), (gray, 0.2), ((brightness != 1).double(), 0.8)):
        assert set(flags.tolist()) == {0, 1}
        assert flags.mean().item() == pytest.approx(probability, abs=0.015)
    area, ratio = width * height, width / height
    assert area.min() == pytest.approx(0.54, abs=2e-3)
    assert area.max() == pytest.approx(1.0, abs=2e-3)
    assert area.mean() == pytest.approx(0.77, abs=5e-3)  # uniform
    assert ratio.min() == pytest.approx(3 / 4, abs=2e-3)
    assert ratio.max() == pytest.approx(4 / 3, abs=4e-3)
    assert ratio.log().mean() == pytest.approx(0.0, abs=5e-3)
    for center, half in ((x, width), (y, height)):
        assert half.max() <= 1
        assert (center.abs() + half).max() <= 1 + 1e-6  # inside the image
        assert center.mean() == pytest.approx(0.0, abs=5e-3)
        assert (center / (1 - half).clamp(min=1e-6)).std() == pytest.approx(1 / math.sqrt(3), abs=0.01)  # uniform in [−1, 1]
    for factor in (brightness, contrast, saturation):
        assert factor.min() == pytest.approx(0.6, abs=2e-3)
        assert factor.max() == pytest.approx(1.4, abs=2e-3)
        assert torch.equal(factor != 1, brightness != 1)  # all four or none
    assert hue.min() == pytest.approx(-0.1, abs=1e-3)
    assert hue.max() == pytest.approx(0.1, abs=1e-3)
    drawn = torch.stack([flip, x / (1 - width), y / (1 - height), area, ratio.log(), brightness, contrast, saturation, hue, gray])
    assert (torch.corrcoef(drawn) - torch.eye(10)).abs().max() < 0.04  # independent


def test_drawing_is_reproducible_and_follows_the_generator():
    assert torch.equal(random_views(5), random_views(5))
    state = torch.get_rng_state()
    random_views(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first = draw_views(5, num_channels=3)
    assert not torch.equal(first, draw_views(5, num_channels=3))
    torch.manual_seed(3)
    assert torch.equal(first, draw_views(5, num_channels=3))


def test_everything_can_be_switched_off():
    off = {"crop_scale": (1.0, 1.0), "jitter_probability": 0.0, "gray_probability": 0.0, "flip_probability": 0.0}
    for nothing in (off, off | {"jitter": (0.0, 0.0, 0.0, 0.0), "jitter_probability": 1.0}):
        torch.testing.assert_close(random_views(5, **nothing), identity_views(5), rtol=0, atol=1e-6)
    x = random_images(5)
    torch.testing.assert_close(apply_views(x, random_views(5, **off)), x, rtol=0, atol=1e-5)


def test_gray_images_have_no_color_parameters():
    views = random_views(200, channels=1)
    assert (views[:, View.SATURATION] == 1).all()
    assert (views[:, [View.HUE, View.GRAY]] == 0).all()
    assert (views[:, View.BRIGHTNESS] != 1).any()


def test_strong_jitter_gives_no_negative_factor():
    views = random_views(200, jitter=(2.0, 2.0, 2.0, 0.5), jitter_probability=1.0)
    assert (views[:, View.BRIGHTNESS : View.HUE] >= 0).all()
    assert (views[:, View.HUE] < 0).any()


def test_fixed_crops_are_corners_then_centre():
    views = crops_views(6, scale=0.25)
    assert views[:, View.CENTER_X].tolist() == [-0.5, 0.5, -0.5, 0.5, 0.0, -0.5]
    assert views[:, View.CENTER_Y].tolist() == [-0.5, -0.5, 0.5, 0.5, 0.0, -0.5]
    assert (views[:, View.HALF_WIDTH : View.BRIGHTNESS] == 0.5).all()
    assert torch.equal(views[:, View.BRIGHTNESS :], identity_views(6)[:, View.BRIGHTNESS :])
    assert torch.equal(crops_views(3, scale=1.0), identity_views(3))


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, r"jitter \(hue\)"),
        ({"jitter": (0.4, -0.4, 0.4, 0.1)}, "jitter"),
        ({"jitter": (0.4, 0.4, 0.4)}, "jitter"),
        ({"jitter_probability": 1.1}, "jitter_probability"),
        ({"gray_probability": float("nan")}, "gray_probability"),
        ({"flip_probability": -0.1}, "flip_probability"),
    ],
)
def test_errors_name_the_parameter(options, culprit):
    with pytest.raises(InputError, match=f"^{culprit}: "):
        random_views(2, **options)


def test_errors_of_shapes_and_scale():
    with pytest.raises(InputError, match=r"views: shape \(3, 10\)"):
        apply_views(random_images(2), identity_views(3))
    with pytest.raises(InputError, match=r"images \(3, 16, 16\)"):
        apply_views(random_images(2)[0], identity_views(3))
    with pytest.raises(InputError, match=r"^scale: 1\.5 "):
        crops_views(2, scale=1.5)
