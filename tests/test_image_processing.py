"""Any image to `pixel_values` in [−1, 1]."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel
from hf_anomaly.data import decode_image
from hf_anomaly.image_processing import to_eight_bit_image

GRAY, RGB = AnomalyImageProcessor.for_images(8, 1), AnomalyImageProcessor.for_images(8, 3)


def pixels(processor, *images):
    return processor(images=list(images), return_tensors="pt")["pixel_values"]


def color_image(mode="RGB", size=(8, 8)):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(array)
    if mode == "RGBA":
        image.putalpha(PIL.Image.fromarray(array[..., 0]))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_eight_bit_mode(mode):
    image = color_image(mode)
    for processor, target in ((GRAY, "L"), (RGB, "RGB")):
        expected = torch.from_numpy(np.array(image.convert(target))).view(8, 8, -1).permute(2, 0, 1) / 127.5 - 1
        result = pixels(processor, image)
        assert result.shape == (1, processor.num_channels, 8, 8)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mode", "by_way_of"), [("La", "LA"), ("RGBa", "RGB"), ("LAB", "RGB"), ("PA", "RGB")])
def test_modes_that_pillow_converts_in_part(mode, by_way_of):
    image = PIL.Image.new(mode, (8, 8))
    image = PIL.Image.frombytes(mode, (8, 8), bytes(range(64)) * len(image.getbands()))
    for processor, target in ((GRAY, "L"), (RGB, "RGB")):
        assert torch.equal(pixels(processor, image), pixels(processor, image.convert(by_way_of).convert(target)))


def test_a_mode_that_pillow_cannot_convert_is_refused(refused, monkeypatch):
    def convert(image, mode):
        raise ValueError("conversion not supported")

    monkeypatch.setattr(PIL.Image.Image, "convert", convert)
    with refused("scan", "'CMYK'", "convert it"):
        to_eight_bit_image(PIL.Image.new("CMYK", (8, 8)), "scan")


def test_transparency_is_dropped():
    image = color_image("RGBA")
    assert torch.equal(pixels(RGB, image), pixels(RGB, color_image("RGB")))


@pytest.mark.parametrize("processor", [GRAY, RGB])
def test_the_range_is_from_minus_one_to_one(processor):
    black, white = pixels(processor, PIL.Image.new("L", (8, 8), 0), PIL.Image.new("L", (8, 8), 255))
    assert black.unique().tolist() == [-1]
    assert white.unique().tolist() == [1]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_more_than_eight_bits_are_refused(mode, refused):
    with refused("images[1]", repr(mode), "8 bits"):
        pixels(GRAY, color_image("L"), PIL.Image.new(mode, (8, 8)))


def png_of_16_bits(color_type, channels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, color_type, 0, 0, 0)
    lines = zlib.compress((b"\0" + bytes(8 * channels * 2)) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_refused_though_its_mode_is_not_wide(color_type, channels, refused):
    data = png_of_16_bits(color_type, channels)
    image = PIL.Image.open(io.BytesIO(data))
    assert image.mode in ("RGB", "RGBA", "LA")
    with refused("images[0]", ";16B", "8 bits"):
        pixels(RGB, image)
    with refused("row 3", ";16B", "8 bits"):
        decode_image({"bytes": data, "path": None}, "row 3")


def test_16_bits_a_pixel_are_not_16_bits_a_channel():
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    image = PIL.Image.open(io.BytesIO(b"BM" + struct.pack("<IHHI", 66 + 128, 0, 0, 66) + header + b"\xff" * 128))
    assert "BGR;16" in str(image.tile)
    assert pixels(RGB, image).unique().tolist() == [1]


def test_arrays_of_all_layouts():
    rgb = np.array(color_image())
    gray = np.array(color_image("L"))
    for array, processor, image in (
        (rgb, RGB, color_image()),
        (rgb.transpose(2, 0, 1), RGB, color_image()),
        (torch.from_numpy(rgb), RGB, color_image()),
        (rgb / 255, RGB, color_image()),
        ((rgb / 255).astype(np.float32).transpose(2, 0, 1), RGB, color_image()),
        (np.dstack([rgb, rgb[..., :1]]), RGB, color_image()),
        (gray, GRAY, color_image("L")),
        (gray[None], GRAY, color_image("L")),
        (gray[..., None], GRAY, color_image("L")),
        (gray / 255, GRAY, color_image("L")),
        (gray > 127, GRAY, PIL.Image.fromarray(gray > 127)),
        (rgb, GRAY, color_image().convert("L")),
    ):
        assert torch.equal(pixels(processor, array), pixels(processor, image)), array.shape


@pytest.mark.parametrize("count", [3, 4])
def test_a_stack_of_gray_images_is_not_one_in_colour(count, refused):
    gray = np.stack([np.array(color_image("L"))] * count)
    for stack in (gray, gray / 255, torch.from_numpy(gray)):
        with refused("images[0]", f"({count}, 8, 8)", f"{count} gray images as a list", "(H, W, C)"):
            GRAY(images=stack)
        assert torch.equal(pixels(GRAY, *stack), pixels(GRAY, *[color_image("L")] * count))


def test_tensors_in_bfloat16():
    image = torch.rand(8, 8).bfloat16()
    assert torch.equal(pixels(GRAY, image), pixels(GRAY, image.float()))


def test_lists_batches_and_single_images():
    image, array = color_image("L"), np.array(color_image("L"))
    expected = pixels(GRAY, image)
    for single in (image, array, torch.from_numpy(array)):
        assert torch.equal(GRAY(images=single, return_tensors="pt")["pixel_values"], expected)
    for batch in ((image, array), np.stack([array, array])[..., None], torch.from_numpy(array)[None, None].expand(2, 1, 8, 8)):
        assert torch.equal(GRAY(images=batch, return_tensors="pt")["pixel_values"], expected.expand(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((8, 8), np.nan), ["images[1]", "NaN"]),
        (np.full((8, 8, 3), np.inf, dtype=np.float32), ["images[1]", "infinite"]),
        (np.full((8, 8), 200.0), ["images[1]", "200", "[0, 1]"]),
        (np.full((8, 8), -0.5), ["images[1]", "-0.5"]),
        (np.zeros((8, 8), np.uint16), ["images[1]", "uint16"]),
        (np.zeros((8, 8), np.int64), ["images[1]", "int64"]),
        (np.zeros((8, 8, 2), np.uint8), ["images[1]", "(8, 8, 2)"]),
        (np.zeros((0, 8), np.uint8), ["images[1]", "(0, 8)"]),
        (np.zeros((10, 8, 8), np.uint8), ["images[1]", "(10, 8, 8)", "a list"]),
    ],
)
def test_arrays_that_are_no_image(array, words, refused):
    with refused(*words):
        pixels(GRAY, color_image("L"), array)


def test_paths_are_read_as_images_are(tmp_path, refused):
    wide = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    wide.save(tmp_path / "wide.png")
    color_image().save(tmp_path / "rgb.png")
    windowed = AnomalyImageProcessor.for_images(8, 1, window="full")
    for path in (tmp_path / "wide.png", str(tmp_path / "wide.png")):
        assert torch.equal(pixels(windowed, path), pixels(windowed, wide))
        with refused(path, "--window", "16-bit"):
            pixels(GRAY, path)
    assert torch.equal(pixels(RGB, str(tmp_path / "rgb.png"), color_image()), pixels(RGB, color_image(), color_image()))
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken.png", "text.png", "missing.png"):
        with refused(tmp_path / name, "unreadable"):
            pixels(RGB, str(tmp_path / name))
    with refused("http://127.0.0.1:9/", "cannot be fetched"):
        pixels(RGB, "http://127.0.0.1:9/x.png")
    with refused("images[0]", "list"):
        pixels(RGB, [color_image()])


def test_mixed_sizes_are_resized_whole():
    small, large = PIL.Image.new("L", (5, 3), 51), color_image("L", (40, 20))
    result = pixels(GRAY, small, large)
    torch.testing.assert_close(result[0], torch.full((1, 8, 8), 51 / 127.5 - 1))
    expected = np.array(large.resize((8, 8), PIL.Image.Resampling.BILINEAR)) / 127.5 - 1
    torch.testing.assert_close(result[1, 0], torch.from_numpy(expected).float())


def test_a_call_may_change_the_settings():
    image = color_image("L", (40, 20))
    assert GRAY(images=[image], do_resize=False)["pixel_values"][0].shape == (1, 20, 40)
    (resized,) = GRAY(images=[image], size={"height": 12, "width": 16})["pixel_values"]
    expected = np.array(image.resize((16, 12), PIL.Image.Resampling.BILINEAR)) / 127.5 - 1
    np.testing.assert_allclose(resized[0], expected, atol=1e-6)
    (nearest,) = GRAY(images=[image], resample=PIL.Image.Resampling.NEAREST)["pixel_values"]
    np.testing.assert_allclose(nearest[0], np.array(image.resize((8, 8), PIL.Image.Resampling.NEAREST)) / 127.5 - 1, atol=1e-6)
    assert GRAY(images=[image], size={"shortest_edge": 10})["pixel_values"][0].shape == (1, 10, 20)
    assert GRAY(images=[image], do_convert_rgb=True)["pixel_values"][0].shape == (3, 8, 8)
    assert GRAY(images=[image])["pixel_values"][0].shape == (1, 8, 8)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_floats_are_always_rescaled(kind, refused):
    """transformers' own processors take do_rescale=False for floats: here their pixels would reach 255."""
    floats = kind(np.random.default_rng(0).random((8, 8), np.float32))
    for images in (floats, [color_image("L", (8, 8)), floats], floats[None, None]):
        with refused("holds floats", "leave do_rescale on"):
            GRAY(images=images, do_rescale=False)
    assert GRAY(images=[color_image("L", (8, 8))], do_rescale=False, do_normalize=False)["pixel_values"][0].dtype == np.uint8


@pytest.mark.parametrize(
    ("processor", "settings", "words"),
    [
        (RGB, {"do_convert_rgb": False}, ["image_mean has 3", "1 channels"]),
        (GRAY, {"image_std": [0.5, 0.5, 0.5]}, ["image_std has 3", "1 channels"]),
        (RGB, {"image_mean": [0.5, 0.5]}, ["image_mean has 2", "3 channels"]),
    ],
)
def test_normalising_makes_no_channels(processor, settings, words, refused):
    with refused(*words):
        processor(images=[color_image("RGB", (8, 8))], return_tensors="pt", **settings)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"do_resize": False}, {"do_resize": False, "do_pad": True}, {"do_rescale": False}, {"do_normalize": False}]
)
def test_together_as_one_by_one(channels, settings):
    """Bit for bit what transformers' own steps make of each image alone, of one size or of several."""
    processor, side = AnomalyImageProcessor.for_images(8, channels), {"height": 40, "width": 40}
    for name, value in {**settings, "pad_size": side}.items():
        setattr(processor, name, value)
    images = [color_image(mode, size) for mode, size in (("L", (8, 8)), ("RGB", (5, 3)), ("P", (40, 20)))]
    for image, result in zip(images, processor(images=images)["pixel_values"], strict=True):
        array = processor.process_image(
            image, do_convert_rgb=channels == 3, do_resize=processor.do_resize, size=processor.size, resample=processor.resample
        )
        array = processor.rescale(array, 1 / 255) if processor.do_rescale else array
        array = processor.normalize(array, processor.image_mean, processor.image_std) if processor.do_normalize else array
        (array,) = processor.pad([array], SizeDict(**side)) if processor.do_pad else [array]
        assert result.dtype == array.dtype
        assert np.array_equal(result, array)


@pytest.mark.parametrize("processor", [GRAY, RGB])
def test_resized_before_it_is_prepared_an_image_gives_the_same(processor):
    for image in (color_image(mode, size) for mode in ("L", "RGB", "P", "RGBA") for size in ((8, 8), (5, 3), (40, 20))):
        small = processor.resized(image)
        assert small.size == (8, 8)
        assert torch.equal(pixels(processor, small), pixels(processor, image))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_orientation(mode):
    stored = color_image(mode, (8, 6))
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # stored lying on its side
    stored.save(file, "png", exif=exif)
    upright = stored.transpose(PIL.Image.Transpose.ROTATE_270)
    assert torch.equal(pixels(RGB, PIL.Image.open(file)), pixels(RGB, upright))
    assert not torch.equal(pixels(RGB, stored), pixels(RGB, upright))


@pytest.mark.parametrize("processor", [GRAY, AnomalyImageProcessor.for_images(12, 3)])
def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    CSIConfig().save_pretrained(tmp_path)
    images = [color_image(mode, (20, 10)) for mode in ("L", "RGBA")]
    for loaded in (AnomalyImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is AnomalyImageProcessor
        assert loaded.num_channels == processor.num_channels
        assert torch.equal(pixels(loaded, *images), pixels(processor, *images))


def test_a_window_given_when_it_is_loaded(tmp_path, refused):
    GRAY.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, window=(0, 4095))
    assert processor.reading.window == (0, 4095)
    with refused("window=(5, 1)"):
        AutoImageProcessor.from_pretrained(tmp_path, window=(5, 1))
    with refused("window='half'"):
        processor.window = "half"


@pytest.mark.parametrize("count", [0, 2, 4, 16])
def test_images_have_one_or_three_channels(count, refused):
    with refused("num_channels", "1 (gray) or 3 (RGB)", count):
        AnomalyImageProcessor.for_images(1, count)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_detector_takes_what_the_processor_gives(channels):
    model = CSIModel(CSIConfig(image_size=8, num_channels=channels))
    model.check_pixel_values(pixels(AnomalyImageProcessor.for_images(8, channels), color_image("P", (30, 20))))
