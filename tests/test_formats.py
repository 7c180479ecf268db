"""More than 8 bits: windows, 16-bit PNG and TIFF, real DICOM and NIfTI files."""

import json
import os
import struct
import tracemalloc

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, pipeline

from hf_anomaly import AnomalyImageProcessor, InputError, SharedAEConfig, SharedAEModel
from hf_anomaly.cli import main
from hf_anomaly.data import Reading, decode_image, file_name, formats, load_one_class, prepare, stream_one_class
from hf_anomaly.data.formats import apply_window, is_raster, parse_window, read_slices
from hf_anomaly.data.transforms import decode_mask
from hf_anomaly.image_processing import to_eight_bit_image
from hf_anomaly.training import DataArguments, parse_arguments
from hf_anomaly.training.runs import load_splits, processor_for

datasets.disable_progress_bars()
RAMP = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read_image(path, window=None):
    return decode_image({"path": str(path)}, str(path), window)


def slow_window(values, low, high):
    """The definition, value by value."""
    levels = []
    for value in values.flat:
        share = (float(value) - low) / (high - low)
        levels.append(round(255 * min(max(share, 0.0), 1.0)))
    return np.array(levels, np.uint8).reshape(values.shape)


def write_wide(path, array=RAMP):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
    return path


# Windows


def test_window_against_its_definition():
    values = np.random.default_rng(0).uniform(-2000, 3000, (9, 7))
    for low, high in ((-160, 240), (0.25, 0.5), (-1e4, 1e4)):
        assert np.array_equal(apply_window(values, low, high), slow_window(values, low, high))


def test_window_of_the_command_line(refused):
    assert parse_window(None) is None
    assert parse_window(["full"]) == "full"
    (arguments,) = parse_arguments(DataArguments, description="", argv=["--window", "-160", "240", "--slice_axis", "1"])
    assert arguments.reading == Reading((-160, 240), 1)
    for words in (["240", "-160"], ["5"], ["1", "2", "3"], ["full", "1"], ["nan", "1"], ["a", "b"], ["1", "1"]):
        with refused("--window takes two numbers", " ".join(words)):
            parse_window(words)
    for window in ((2, 1), "half", (0, float("inf")), (1,)):
        with refused("window="):
            Reading(window)
        with refused("window="):
            AnomalyImageProcessor.for_images(8, 1, window=window)
    with refused("slice_axis=3"):
        Reading(slice_axis=3)
    with refused("central_slices", "0"):
        Reading(central_slices=0)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_16_bit_files(tmp_path, refused, name):
    path = write_wide(tmp_path / name)
    assert np.array_equal(read_image(path, (5000, 40000)), slow_window(RAMP, 5000, 40000))
    assert np.array_equal(read_image(path, "full"), slow_window(RAMP, 0, 65535))
    assert np.array_equal(decode_image({"path": str(path), "bytes": None}, "", (0, 1000)), slow_window(RAMP, 0, 1000))
    with refused(name, "--window LOW HIGH", "--window full"):
        read_image(path)


def test_16_bit_images_are_turned_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    PIL.Image.fromarray(RAMP).save(tmp_path / "x.png", exif=exif)
    expected = slow_window(RAMP[::-1, ::-1], 5000, 40000)
    assert np.array_equal(decode_image({"path": str(tmp_path / "x.png"), "bytes": None}, "", (5000, 40000)), expected)
    processor = AnomalyImageProcessor.for_images(8, 1, window=(5000, 40000))
    pixels = processor(images=[PIL.Image.open(tmp_path / "x.png")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0, 0], torch.tensor(expected) / 127.5 - 1)


@pytest.mark.parametrize("largest", [4095, 65535])
def test_16_bit_pgm_and_ppm(tmp_path, refused, largest):
    values = np.arange(64).reshape(8, 8) * 60
    for name, magic, array in (("x.pgm", b"P5", values), ("x.ppm", b"P6", np.stack([values] * 3, -1))):
        path = tmp_path / name
        path.write_bytes(b"%s 8 8 %d\n" % (magic, largest) + array.astype(">u2").tobytes())
        with refused(name, "--window full"):
            read_image(path)
        for image in (read_image(path, "full"), decode_image({"path": str(path)}, "", "full")):
            assert np.abs(np.asarray(image, int) - np.rint(array * 255 / largest)).max() <= 1, "on the scale of the largest value"
    assert np.array_equal(read_image(tmp_path / "x.pgm", (0, 2000)), slow_window(values, 0, 2000)), "a window is of the file's own values"
    with refused("x.ppm", "16-bit colour"):
        read_image(tmp_path / "x.ppm", (0, 4000))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_uncompressed_tiffs_are_turned_upright(tmp_path, orientation, dtype):
    array = np.arange(8 * 16).reshape(8, 16).astype(dtype) * (np.iinfo(dtype).max // 127)
    path = tmp_path / "x.tif"
    PIL.Image.fromarray(array).save(path, tiffinfo={274: orientation})
    turned = {5: array.T, 6: np.rot90(array, -1), 7: np.rot90(array, 2).T, 8: np.rot90(array)}[orientation]
    expected = slow_window(turned, 0, np.iinfo(dtype).max)
    for image in (
        decode_image({"path": str(path)}, "", "full"),
        decode_image({"bytes": path.read_bytes()}, "", "full"),
        decode_image(PIL.Image.open(path), "", "full"),
        to_eight_bit_image(PIL.Image.open(path), window="full"),
    ):
        assert np.array_equal(image, expected)
    assert np.array_equal(np.asarray(read_image(path, "full")), expected)


def test_float_tiff(tmp_path, refused):
    values = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    path = write_wide(tmp_path / "x.tiff", values)
    assert np.array_equal(read_image(path, (0, 1)), slow_window(values, 0, 1))
    full = np.asarray(read_image(path, "full"))
    assert (full.min(), full.max()) == (0, 255)
    PIL.Image.new("I;16B", (8, 8)).save(tmp_path / "y.tiff")
    assert load_one_class(tmp_path, reading=Reading("full")).num_channels == 1
    values[3, 3] = np.nan
    with refused("x.tiff", "NaN"):
        read_image(write_wide(path, values), (0, 1))
    assert np.asarray(read_image(write_wide(path, np.full((8, 8), 7, np.float32)), "full")).max() == 0


def write_tiff(path, array, *, white_is_zero=False, planes=False):
    """An uncompressed TIFF with what Pillow does not write; colour as (H, W, 3), which planes turn into (3, H, W)."""
    height, width, samples = (*array.shape, 1)[:3]
    data = (np.moveaxis(array, -1, 0) if planes else array).tobytes()
    photometric = 2 if samples == 3 else 1 - white_is_zero
    sample_format = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * array.itemsize, 259: 1, 262: photometric, 273: 0, 277: samples, 278: height, 279: len(data)}
    tags |= {284: 1 + planes, 339: sample_format}
    tags[273] = start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    assert len(content) == start
    path.write_bytes(content + data)
    return path


def every_reading(path, window):
    """An image as the readers of files, of bytes and of opened images give it."""
    values = ({"path": str(path)}, {"bytes": path.read_bytes()}, PIL.Image.open(path))
    yield from (np.asarray(decode_image(value, "", window)) for value in values)
    yield np.asarray(read_image(path, window))
    yield np.asarray(to_eight_bit_image(PIL.Image.open(path), window=window))


def test_tiff_whose_zero_is_white(tmp_path, refused):
    for values, window in ((RAMP, "full"), (RAMP, (5000, 40000)), ((RAMP / 64000).astype(np.float32), (0.2, 0.7))):
        path = write_tiff(tmp_path / "x.tif", values, white_is_zero=True)
        expected = 255 - slow_window(values, *((0, 65535) if window == "full" else window))
        assert all(np.array_equal(image, expected) for image in every_reading(path, window))
        with refused("x.tif", "zero is white"):
            decode_mask({"path": str(path)}, "")
    path = write_tiff(tmp_path / "x.tif", (RAMP // 256).astype(np.uint8), white_is_zero=True)
    assert all(np.array_equal(image, 255 - RAMP // 256) for image in every_reading(path, None)), "those of 8 bits, too"


def test_tiff_of_unsigned_32_and_signed_8_bits(tmp_path, refused):
    large = RAMP.astype(np.uint32) * 65_000
    signed = (RAMP // 256 - 120.0).astype(np.int8)
    for values, window in ((large, (1e9, 4e9)), (signed, (-100, 50))):
        path = write_tiff(tmp_path / "x.tif", values)
        assert all(np.array_equal(image, slow_window(values, *window)) for image in every_reading(path, window))
        full = slow_window(values, int(values.min()), int(values.max()))
        assert all(np.array_equal(image, full) for image in every_reading(path, "full"))
        assert np.array_equal(decode_mask({"path": str(path)}, ""), values > 0)
        with refused("x.tif", "--window LOW HIGH"):
            read_image(path)


def test_tiff_of_16_bit_colour(tmp_path, refused):
    colour = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
    path = write_tiff(tmp_path / "x.tif", colour)
    assert all(np.abs(image - colour / 257).max() <= 1 for image in every_reading(path, "full"))
    path = write_tiff(tmp_path / "planes.tif", colour, planes=True)
    for window in (None, "full", (0, 1000)):
        with refused("planes.tif", "separate planes", "PlanarConfiguration"):
            read_image(path, window)
    path = write_tiff(tmp_path / "planes.tif", (colour // 256).astype(np.uint8), planes=True)
    assert all(image.shape == (8, 8, 3) for image in every_reading(path, None)), "those of 8 bits are read"


def test_8_bit_images_need_no_window(tmp_path):
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for window in (None, "full", (0, 10)):
        assert np.array_equal(read_image(write_wide(tmp_path / "x.png", array), window), array)


def test_processor_keeps_the_window(tmp_path, refused):
    processor = AnomalyImageProcessor.for_images(8, 1, window=(5000, 40000))
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["window"] == [5000, 40000]
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    expected = torch.tensor(slow_window(RAMP, 5000, 40000)) / 127.5 - 1
    for image in (PIL.Image.fromarray(RAMP), RAMP, RAMP.astype(">u2")):
        torch.testing.assert_close(loaded(images=[image], return_tensors="pt")["pixel_values"][0, 0], expected)
    full = AnomalyImageProcessor.for_images(8, 1, window="full")
    assert full(images=[RAMP], return_tensors="pt")["pixel_values"].max() < 1
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(tmp_path / "none")
    none = AutoImageProcessor.from_pretrained(tmp_path / "none")
    assert none.window is None
    with refused("images[0]", "--window"):
        none(images=[PIL.Image.fromarray(RAMP)], return_tensors="pt")
    with refused("images[0]", "uint16", "window"):
        none(images=[RAMP], return_tensors="pt")


def test_from_the_folder_to_the_pipeline(tmp_path, refused):
    for i in range(6):
        write_wide(tmp_path / "data" / "train" / "good" / f"{i}.png", RAMP[::-1] + i)
    for name in ("good", "bad"):
        write_wide(tmp_path / "data" / "test" / name / "x.png")
    with refused("0.png", "--window"):
        load_one_class(tmp_path / "data")
    (arguments,) = parse_arguments(
        DataArguments, description="", argv=["--dataset_name", str(tmp_path / "data"), "--window", "5000", "4e4"]
    )
    splits = load_splits(arguments)
    processor = processor_for(splits, arguments)
    assert (splits.num_channels, processor.window) == (1, [5000, 40000])
    pixels = prepare(splits.test, processor)[0]["pixel_values"]
    torch.testing.assert_close(pixels[0], torch.tensor(slow_window(RAMP, 5000, 40000)) / 127.5 - 1)
    streamed = stream_one_class(tmp_path / "data", head=5, reading=arguments.reading)
    assert next(iter(prepare(streamed.train, processor)))["pixel_values"].shape == (1, 8, 8)
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=8, num_channels=1, hidden_sizes=[8, 8, 8], latent_size=8))
    model.fit_reference([pixels[None]], progress=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    detect = pipeline("image-anomaly-detection", model=str(tmp_path / "model"))
    path = tmp_path / "data" / "test" / "bad" / "x.png"
    results = detect([str(path), PIL.Image.open(path), RAMP])
    expected = model.eval()(pixels[None]).scores.item()
    assert [result["score"] for result in results] == pytest.approx([expected] * 3)
    main(["predict", str(tmp_path / "model"), str(tmp_path / "data" / "test"), "--output", str(tmp_path / "scores.jsonl")])
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == pytest.approx([expected] * 2)


# Formats


@pytest.mark.parametrize(
    "suffix",
    ["jpg", "mpo", "png", "pgm", "bmp", "dib", "tif", "webp", "avif", "jp2", "gif", "ico", "dds", "tga", "pcx", "sgi"],
)
def test_formats_that_are_read(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    PIL.Image.new("L", (32, 32), 100).convert("RGB" if suffix in ("mpo", "dds", "avif", "webp") else "L").save(path)
    assert is_raster(path)
    for image in (read_image(path), decode_image({"bytes": path.read_bytes()}, "")):
        assert np.abs(np.asarray(image.convert("L"), int) - 100).max() <= 2


def test_what_would_start_programs_is_no_image(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("a program was started"))
    for name in ("x.png", "x.eps"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
        with refused(name, "unknown image format"):
            decode_image({"path": str(tmp_path / name)}, "")
        with refused(name, "unreadable image"):
            read_image(tmp_path / name)
    assert not any(is_raster(f"x.{suffix}") for suffix in ("eps", "ps", "wmf", "emf", "h5", "hdf", "mpg", "mpeg", "grib", "bufr"))


# DICOM


def write_dicom(path, array, *, photometric="MONOCHROME2", slope=1, intercept=0, window=None, function=None, bits=None, frames=None):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    is_colour = photometric == "RGB"
    shape = array.shape[:-1] if is_colour else array.shape
    dataset.Rows, dataset.Columns = shape[-2:]
    dataset.SamplesPerPixel = 3 if is_colour else 1
    if is_colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * array.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    dataset.PixelData = array.tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    if frames is not None:
        dataset.NumberOfFrames = frames
    if window is not None:
        dataset.WindowCenter, dataset.WindowWidth = window
    if function is not None:
        dataset.VOILUTFunction = function
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


HOUNSFIELD = (np.arange(64).reshape(8, 8) * 40 + 24).astype(np.uint16)  # stored; minus 1024 in the header


def test_dicom_window(tmp_path, refused):
    path = write_dicom(tmp_path / "x.dcm", HOUNSFIELD, slope=2, intercept=-1024, window=(40, 400), bits=12)
    values = HOUNSFIELD * 2.0 - 1024
    # PS3.3 C.11.2.1.2.1: y = ((x − (c − 0.5)) / (w − 1) + 0.5) · 255
    expected = np.clip(np.rint(((values - 39.5) / 399 + 0.5) * 255), 0, 255)
    assert np.array_equal(read_image(path), expected)
    assert np.array_equal(read_image(path, (-160, 240)), slow_window(values, -160, 240))
    assert np.array_equal(read_image(path, "full"), slow_window(values, -1024, 2 * 4095 - 1024))
    exact = write_dicom(tmp_path / "exact.dcm", HOUNSFIELD, intercept=-1024, window=(40, 400), function="LINEAR_EXACT")
    assert np.array_equal(read_image(exact), slow_window(HOUNSFIELD - 1024.0, -160, 240))
    several = write_dicom(tmp_path / "several.dcm", HOUNSFIELD, intercept=-1024, window=([40, 300], [400, 2000]))
    assert np.array_equal(read_image(several), np.clip(np.rint(((HOUNSFIELD - 1024.0 - 39.5) / 399 + 0.5) * 255), 0, 255))
    threshold = write_dicom(tmp_path / "threshold.dcm", HOUNSFIELD, intercept=-1024, window=(40, 1))
    assert np.array_equal(read_image(threshold), np.where(HOUNSFIELD - 1024.0 > 39.5, 255, 0))
    for bare in (
        write_dicom(tmp_path / "bare.dcm", HOUNSFIELD),
        write_dicom(tmp_path / "curve.dcm", HOUNSFIELD, window=(40, 400), function="SIGMOID"),
    ):
        with refused(bare.name, "--window LOW HIGH"):
            read_image(bare)


def test_dicom_of_other_kinds(tmp_path, refused):
    inverted = write_dicom(tmp_path / "inverted.dcm", HOUNSFIELD, photometric="MONOCHROME1")
    assert np.array_equal(read_image(inverted, (0, 2000)), 255 - slow_window(HOUNSFIELD, 0, 2000))
    signed = write_dicom(tmp_path / "signed.dcm", HOUNSFIELD.astype(np.int16) - 1000)
    assert np.array_equal(read_image(signed, "full"), slow_window(HOUNSFIELD - 1000.0, -32768, 32767))
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(read_image(write_dicom(tmp_path / "colour.dcm", colour, photometric="RGB")), colour)
    frames = np.stack([HOUNSFIELD, HOUNSFIELD[::-1], HOUNSFIELD.T, HOUNSFIELD // 2])
    path = write_dicom(tmp_path / "frames.dcm", frames, frames=4)
    slices = read_slices(path, Reading((0, 2000)))
    assert np.array_equal(np.stack(slices), slow_window(frames, 0, 2000))
    central = read_slices(path, Reading((0, 2000), central_slices=2))
    assert np.array_equal(np.stack(central), slow_window(frames[1:3], 0, 2000))
    assert [image.info["slice"] for image in central] == [1, 2]
    with refused("frames.dcm", "4 slices"):
        read_image(path, (0, 2000))
    (tmp_path / "broken.dcm").write_bytes(b"no DICOM")
    with refused("broken.dcm", "cannot be read"):
        read_image(tmp_path / "broken.dcm")


def write_enhanced(path, array, shared, per_frame):
    """A multi-frame file whose functional groups say (slope, intercept, center, width): for all frames, and for each; None: nothing."""
    pydicom = pytest.importorskip("pydicom")

    def groups(values):
        group, rescaling, voi = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        if values is not None:
            rescaling.RescaleSlope, rescaling.RescaleIntercept, voi.WindowCenter, voi.WindowWidth = values
            voi.VOILUTFunction = "LINEAR_EXACT"
            group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [rescaling], [voi]
        return group

    dataset = pydicom.dcmread(write_dicom(path, array, frames=len(array), window=(7, 9)))
    dataset.SharedFunctionalGroupsSequence = [groups(shared)]
    dataset.PerFrameFunctionalGroupsSequence = [groups(values) for values in per_frame]
    dataset.save_as(path)
    return path


def test_enhanced_dicom_says_of_each_frame_how_it_is_rescaled_and_windowed(tmp_path):
    frames = np.stack([HOUNSFIELD, HOUNSFIELD[::-1], HOUNSFIELD.T])
    shared, own = (1, -1024, 40, 400), (2, -500, 100, 1000)
    path = write_enhanced(tmp_path / "x.dcm", frames, shared, [None, own, None])
    rescaled = [frames[0] - 1024.0, frames[1] * 2.0 - 500, frames[2] - 1024.0]
    ranges = [(-160, 240), (-400, 600), (-160, 240)]
    expected = [slow_window(values, *window) for values, window in zip(rescaled, ranges, strict=True)]
    assert np.array_equal(np.stack(read_slices(path, Reading())), expected)
    assert np.array_equal(np.stack(read_slices(path, Reading(central_slices=1))), expected[1:2])
    given = [slow_window(values, -100, 100) for values in rescaled]
    assert np.array_equal(np.stack(read_slices(path, Reading((-100, 100)))), given)
    full = [slow_window(values, low, slope * 65535 + low) for values, (slope, low, *_) in zip(rescaled, (shared, own, shared), strict=True)]
    assert np.array_equal(np.stack(read_slices(path, Reading("full"))), full)
    top = write_enhanced(tmp_path / "top.dcm", frames, None, [None] * 3)
    assert np.array_equal(np.stack(read_slices(top, Reading())), slow_window(frames, 6.5 - 4, 6.5 + 4))


def test_frames_are_windowed_one_by_one(tmp_path):
    frames = np.arange(64 * 128 * 128, dtype=np.uint16).reshape(64, 128, 128)
    path = write_dicom(tmp_path / "x.dcm", frames, frames=64, slope=2)
    tracemalloc.start()
    try:
        slices = read_slices(path, Reading((0, 70_000)))
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(slices) == 64


def test_dicom_files_without_a_suffix_are_told(tmp_path, caplog, refused):
    folder = tmp_path / "x"
    write_dicom(folder / "IM0001", HOUNSFIELD)
    with refused("x holds neither images", "IM0001 is DICOM", ".dcm"):
        load_one_class(folder)
    PIL.Image.new("L", (8, 8)).save(folder / "y.png")
    load_one_class(folder, calibration_fraction=0)
    assert "IM0001 is DICOM, but left out" in caplog.text
    (folder / "IM0001").rename(folder / "DICOMDIR")
    (folder / "LICENSE").write_text("short")
    caplog.clear()
    load_one_class(folder, calibration_fraction=0)
    assert "is DICOM" not in caplog.text


def test_folder_of_dicom_files(tmp_path, monkeypatch):
    for i in range(5):
        write_dicom(tmp_path / "train" / "good" / f"{i}.dcm", HOUNSFIELD + i, window=(1000, 2000))
    write_dicom(tmp_path / "test" / "bad" / "x.dcm", np.stack([HOUNSFIELD] * 3), frames=3, window=(1000, 2000))
    PIL.Image.new("L", (8, 8)).save(tmp_path / "test" / "bad" / "y.png")
    splits = load_one_class(tmp_path)
    assert len(splits.train) + len(splits.calibration) == 5
    assert splits.test["label"][:] == [1, 1, 1, 1]
    assert (splits.num_channels, splits.native_size) == (1, 8)
    assert [file_name(image, "") for image in splits.test["image"][2:]] == ["x.dcm-0002.png", "bad/y.png"]
    cut = sorted(datasets.config.HF_DATASETS_CACHE.rglob("*.png"))
    times = [path.stat().st_mtime_ns for path in cut]
    again = load_one_class(tmp_path)
    assert again.test["image"][:] == splits.test["image"][:]
    assert [path.stat().st_mtime_ns for path in cut] == times, "cut once"
    with monkeypatch.context() as patched:
        patched.setattr(formats, "_FORMAT", "later")
        assert load_one_class(tmp_path).test["image"][0] != splits.test["image"][0], "what another version cut is not found again"
    other = load_one_class(tmp_path, reading=Reading((0, 4000)))
    assert np.asarray(decode_image(other.test["image"][0], "")).mean() != np.asarray(decode_image(splits.test["image"][0], "")).mean()


# NIfTI


def write_nifti(path, volume, affine=None):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return path


VOLUME = np.random.default_rng(0).integers(-1000, 2000, (4, 6, 5)).astype(np.int16)  # right, front, up


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_nifti(tmp_path, refused, name):
    path = write_nifti(tmp_path / name, VOLUME)
    levels = slow_window(VOLUME, -160, 240)
    axial = read_slices(path, Reading((-160, 240)))
    assert len(axial) == 5
    for up, image in enumerate(axial):
        for right in range(4):
            for front in range(6):
                assert image.getpixel((right, 5 - front)) == levels[right, front, up]
    sagittal = read_slices(path, Reading((-160, 240), slice_axis=0))
    assert len(sagittal) == 4
    assert sagittal[3].getpixel((2, 0)) == levels[3, 2, 4], "what is up is above"
    central = read_slices(path, Reading((-160, 240), slice_axis=0, central_slices=2))
    assert [np.array_equal(a, b) for a, b in zip(central, sagittal[1:3], strict=True)] == [True, True]
    full = read_slices(path, Reading("full"))
    assert np.array_equal(np.asarray(full[2]), np.rot90(slow_window(VOLUME, VOLUME.min(), VOLUME.max())[:, :, 2]))
    with refused(name, "--window LOW HIGH"):
        read_slices(path, Reading())


def test_nifti_axes_are_the_patients(tmp_path):
    """The same volume stored with other axes gives the same slices."""
    turned = np.ascontiguousarray(VOLUME.transpose(2, 0, 1)[:, ::-1])  # stored: up, left, front
    affine = np.array([[0, -1, 0, 3], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
    reading = Reading((-160, 240))
    first = read_slices(write_nifti(tmp_path / "a.nii", VOLUME), reading)
    second = read_slices(write_nifti(tmp_path / "b.nii", turned, affine), reading)
    assert np.array_equal(np.stack(first), np.stack(second))


def test_folder_of_volumes(tmp_path, refused):
    for i in range(2):
        write_nifti(tmp_path / "train" / "healthy" / f"{i}.nii.gz", VOLUME + i)
    write_nifti(tmp_path / "test" / "tumour" / "x.nii.gz", VOLUME)
    splits = load_one_class(tmp_path, reading=Reading((-160, 240), central_slices=3))
    assert len(splits.train) + len(splits.calibration) == 6
    assert splits.test["label"][:] == [1, 1, 1]
    first = VOLUME.shape[2] // 2 - 1
    assert [os.path.basename(value["path"]) for value in splits.test["image"]] == [f"x.nii.gz-{first + i:04d}.png" for i in range(3)]
    with refused("0.nii.gz", "--window"):
        load_one_class(tmp_path)
    write_nifti(tmp_path / "train" / "healthy" / "four.nii", np.zeros((3, 3, 3, 2), np.int16))
    with refused("four.nii", "(3, 3, 3, 2)"):
        load_one_class(tmp_path, reading=Reading("full"))


def test_volumes_are_sliced_as_in_the_training(tmp_path, capsys):
    for folder in ("train/healthy", "test/healthy", "test/tumour"):
        for i in range(2):
            write_nifti(tmp_path / "data" / folder / f"{i}.nii.gz", VOLUME + i)
    words = ["--dataset_name", str(tmp_path / "data")]
    (data,) = parse_arguments(
        DataArguments,
        description="",
        argv=[*words, "--window", "-160", "240", "--slice_axis", "0", "--central_slices", "2", "--image_size", "8"],
    )
    splits = load_splits(data)
    processor = processor_for(splits, data)
    torch.manual_seed(0)
    model = SharedAEModel(SharedAEConfig(image_size=8, num_channels=1, hidden_sizes=[8, 8, 8], latent_size=8))
    model.fit_reference([torch.stack([row["pixel_values"] for row in prepare(splits.train, processor)])], progress=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    main(["evaluate", str(tmp_path / "model"), *words, "--normal_label", "healthy"])
    results = json.loads(capsys.readouterr().out)
    assert (results["num_normal"], results["num_anomalous"]) == (4, 4)
    main(["evaluate", str(tmp_path / "model"), *words, "--normal_label", "healthy", "--central_slices", "1"])
    assert json.loads(capsys.readouterr().out)["num_normal"] == 2

    volume = tmp_path / "data" / "test" / "tumour" / "0.nii.gz"
    for source in (volume, volume.parent):
        main(["predict", str(tmp_path / "model"), str(source)])
        rows = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
        first = VOLUME.shape[0] // 2 - 1
        assert [row[0] for row in rows[:2]] == [f"{volume}/{first:04d}", f"{volume}/{first + 1:04d}"]
    assert len(rows) == 4
    pixels = processor(images=read_slices(volume, Reading((-160, 240), 0, 2)), return_tensors="pt")["pixel_values"]
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(model.eval()(pixels).scores.tolist(), rel=1e-5)


def test_a_processor_that_slices_nothing(refused):
    for slicing in ({"slice_axis": 5}, {"central_slices": "x"}, {"central_slices": 0}):
        with refused(next(iter(slicing))):
            AnomalyImageProcessor.for_images(8, 1, **slicing)


@pytest.mark.parametrize(("name", "library"), [("x.dcm", "pydicom"), ("x.nii.gz", "nibabel")])
def test_without_the_libraries(tmp_path, monkeypatch, refused, name, library):
    import sys

    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with refused(name, "pip install 'hf-anomaly[medical]'", error=InputError):
        read_image(tmp_path / name, "full")
