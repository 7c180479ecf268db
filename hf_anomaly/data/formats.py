"""Images of more than 8 bits: a window of their values becomes 0 to 255. 16-bit PNG and TIFF by Pillow, DICOM by pydicom, NIfTI by nibabel."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageFile
from PIL import TiffImagePlugin

from ..errors import InputError, one_line

if TYPE_CHECKING:
    import pydicom

DICOM_SUFFIXES = (".dcm", ".dicom")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
MEDICAL_SUFFIXES = DICOM_SUFFIXES + NIFTI_SUFFIXES
# What Pillow decodes itself, whatever a file is called: for EPS it starts a program, of HDF5 or MPEG it merely knows the names. PCX and TGA come last, which
# have hardly anything in their headers to be told by; MPO is opened as JPEG.
RASTER_FORMATS = (
    "JPEG", "MPO", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "GIF", "ICO", "DDS", "FITS", "PSD", "QOI", "SGI", "SUN", "PCX", "TGA",
)  # fmt: skip
FULL = "full"
SLICES = ("hf_anomaly", "slices")  # below the cache of datasets: a folder for each file that is cut
_FORMAT = 2  # of the slices: raise it when files are read otherwise, and those cut before are no longer found
Window = tuple[float, float] | str | None  # (low, high), which become 0 and 255; "full"; None
_LARGEST = "largest"  # in the `info` of a PGM file of more than 8 bits: the value that stands for white
REMEDY = "give its --window LOW HIGH, or --window full"


@dataclass(frozen=True)
class Reading:
    """How files of more than 8 bits are read.

    Attributes:
        window: the values that become 0 and 255, all others are clipped: of DICOM after rescaling, such as Hounsfield units. "full" is the whole range: of
            16-bit images 0 to 65535, of DICOM what its stored bits can hold, of others, NIfTI among them, from their smallest to their largest value. None:
            the window in a DICOM file's header; others are refused.
        slice_axis: along which NIfTI volumes are sliced, in the patient's axes: 0 sagittal, 1 coronal, 2 axial.
        central_slices: only so many slices of a volume, around its middle; None: all.
    """

    window: Window = None
    slice_axis: int = 2
    central_slices: int | None = None

    def __post_init__(self):
        check_window(self.window)
        if self.slice_axis not in (0, 1, 2):
            raise InputError(f"slice_axis={self.slice_axis} is none of 0 (sagittal), 1 (coronal), 2 (axial)")
        if self.central_slices is not None and not (isinstance(self.central_slices, int) and self.central_slices >= 1):
            raise InputError(f"central_slices must be at least 1, got {self.central_slices}")

    def chosen(self, num_slices: int) -> range:
        """Which slices of a volume."""
        size = num_slices if self.central_slices is None else min(self.central_slices, num_slices)
        first = (num_slices - size) // 2
        return range(first, first + size)


def check_window(window: Window | Sequence[float]) -> None:
    """Refuses what is no window.

    Raises:
        InputError: neither None, nor "full", nor two finite numbers, the lower first.
    """
    if window is None or window == FULL:
        return
    try:
        low, high = window
        fits = math.isfinite(low) and math.isfinite(high) and low < high
    except (TypeError, ValueError, OverflowError):  # a downloaded config may hold anything
        fits = False
    if not fits:
        raise InputError(f"window={window!r} is neither two numbers, the lower first, nor {FULL!r}")


def parse_window(words: Sequence[str] | None) -> Window:
    """The window of a command line's words.

    Raises:
        InputError: neither two numbers, the lower first, nor "full".
    """
    if not words:
        return None
    try:
        window = FULL if list(words) == [FULL] else tuple(map(float, words))
        check_window(window)
    except ValueError as error:  # of float; InputError is one too
        raise InputError(f"--window takes two numbers, the lower first, or {FULL!r}; got {' '.join(words)}") from error
    return window


def apply_window(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the values' shape: low and less becomes 0, high and more 255."""
    return np.rint((np.clip(values.astype(np.float64), low, high) - low) * 255 / (high - low)).astype(np.uint8)


def load_pixels(image: PIL.Image.Image) -> None:
    """Decodes an opened image; does nothing to any other. Pillow would map an uncompressed file by its name, and scrambles a TIFF that EXIF turns by 90°."""
    if not isinstance(image, PIL.ImageFile.ImageFile):
        return
    for tile in image.tile:
        if image.format == "PPM" and image.mode == "I" and isinstance(tile[3], tuple):  # which decoding scales to 65535
            image.info[_LARGEST] = tile[3][1]
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def wide_mode(image: PIL.Image.Image) -> str | None:
    """The mode of an image whose values are not 0 to 255; None of others. PIL drops the lower bits of 16-bit colour while decoding, so look before."""
    # ";16B", ";16L", ";16N" in a file's raw mode are 16-bit channels; BMP's "BGR;16" is 16 bits a pixel.
    if image.mode[0] in "IF":
        return image.mode
    if _is_signed_byte(image):
        return "L;8S"
    for tile in getattr(image, "tile", ()):
        if raw := re.search(r"\w+;16[BLN]", str(tile[3])):
            return raw.group()
        if image.format == "PPM" and isinstance(tile[3], tuple) and tile[3][1] > 255:  # ("RGB", largest value)
            return f"{tile[3][0]};16"
    return None


def _tiff_tag(image: PIL.Image.Image, tag: int) -> int | None:
    """The first value of a TIFF file's tag, 1 if it has none; None of other images."""
    return int(np.atleast_1d(image.tag_v2.get(tag, 1))[0]) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def _is_signed_byte(image: PIL.Image.Image) -> bool:
    return image.mode == "L" and _tiff_tag(image, TiffImagePlugin.SAMPLEFORMAT) == 2


def is_white_zero(image: PIL.Image.Image) -> bool:
    """Whether the lowest value of an image of more than 8 bits is white; those of 8 bits are inverted by Pillow itself."""
    return image.mode[0] in "IF" and _tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def stored_values(image: PIL.Image.Image) -> np.ndarray:
    """The values of a decoded image, as they are stored: Pillow takes unsigned 32-bit ones of a TIFF for signed, and signed 8-bit ones for unsigned."""
    values = np.asarray(image)
    if _is_signed_byte(image):
        return values.view(np.int8)
    is_unsigned = image.mode == "I" and _tiff_tag(image, TiffImagePlugin.SAMPLEFORMAT) == 1
    return values.view(np.uint32) if is_unsigned else values


def check_depth(image: PIL.Image.Image, name: str, window: Window = None) -> None:
    """Refuses an image of more than 8 bits a channel, or of signed ones, for which there is no window.

    Raises:
        InputError: a 16-bit, 32-bit, float or signed image without a window; 16-bit colour with another one than "full", or in planes.
    """
    has_planes = len(image.getbands()) > 1 and _tiff_tag(image, TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    if has_planes and _tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE) > 8:  # Pillow would take the halves of its values for pixels
        raise InputError(
            f"{name}: 16-bit colour in separate planes is not read; save it with PlanarConfiguration 1, or convert it to 8 bits"
        )
    mode = wide_mode(image)
    if mode is None or window == FULL:
        return
    if window is None:  # PIL's convert() would clip it to 255 without a word
        raise InputError(f"{name}: 16-bit, 32-bit, float or signed image (mode {mode!r}); {REMEDY}, or convert it to 8 bits")
    if len(image.getbands()) > 1:
        raise InputError(f"{name}: 16-bit colour (mode {mode!r}) is read with --window full alone; or convert it to 8 bits")


def to_eight_bits(image: PIL.Image.Image, window: Window, name: str) -> PIL.Image.Image:
    """An image of any mode with 8 bits a channel: L if it had more, as it is if Pillow converts its mode to gray and RGB, else RGB. `check_depth` comes first.

    Raises:
        InputError: NaN or infinite values, or a mode that Pillow cannot convert.
    """
    # 16-bit colour too: decoding has kept the upper 8 bits, which is the full range.
    if image.mode[0] not in "IF" and not _is_signed_byte(image):
        if image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"):  # the last has its own gray, Y
            return image
        try:
            return image.convert("LA" if image.mode == "La" else "RGB")
        except ValueError as error:
            raise InputError(f"{name}: Pillow cannot convert images of mode {image.mode!r}; convert it to gray or RGB") from error
    values = stored_values(image)
    _check_finite(values, name)
    if window == FULL:
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # Pillow scales a PGM to 65535
        window = (0, 65535) if is_16_bit else _own_range(values)
    elif _LARGEST in image.info:
        values = np.rint(values * (image.info[_LARGEST] / 65535))
    levels = apply_window(values, *window)
    return PIL.Image.fromarray(255 - levels if is_white_zero(image) else levels)


def is_raster(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file of the `RASTER_FORMATS`, by its name."""
    PIL.Image.init()
    return PIL.Image.EXTENSION.get(Path(path).suffix.lower()) in RASTER_FORMATS


def open_raster(file: str | os.PathLike[str] | BinaryIO) -> PIL.Image.Image:
    """Opens a file of the `RASTER_FORMATS`, without decoding it.

    Raises:
        Exception: whatever Pillow's plugins raise on others and on broken ones.
    """
    PIL.Image.init()
    return PIL.Image.open(file, formats=[name for name in RASTER_FORMATS if name in PIL.Image.OPEN])


def is_medical(path: str | os.PathLike[str]) -> bool:
    """Whether it is a DICOM or NIfTI file, by its name."""
    return os.fspath(path).lower().endswith(MEDICAL_SUFFIXES)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file that is read as an image, or slice by slice, by its name."""
    return is_raster(path) or is_medical(path)


def read_slice(path: str | os.PathLike[str], window: Window = None) -> PIL.Image.Image:
    """The only slice of a DICOM or NIfTI file.

    Raises:
        InputError: unreadable; several slices; no window; the library for it is not installed.
    """
    slices = read_slices(path, Reading(window))
    if len(slices) != 1:
        raise InputError(f"{path} holds {len(slices)} slices, not one image: `hf-anomaly predict` scores them all; else cut it up")
    return slices[0]


def read_slices(path: str | os.PathLike[str], reading: Reading) -> list[PIL.Image.Image]:
    """The slices of a NIfTI volume, or the frames of a DICOM file, L or RGB, 8 bits; `info["slice"]` of each is its number in the file, from 0 on.

    Raises:
        InputError: as `read_slice`.
    """
    read = _read_nifti if os.fspath(path).lower().endswith(NIFTI_SUFFIXES) else _read_dicom
    try:
        images = []
        for number, array in read(Path(path), reading):
            images.append(PIL.Image.fromarray(array))
            images[-1].info["slice"] = number
        return images
    except ImportError as error:
        raise InputError(f"{path}: DICOM and NIfTI files need pydicom and nibabel: pip install 'hf-anomaly[medical]'") from error
    except InputError:
        raise
    except Exception as error:  # pydicom and nibabel raise whatever their decoders do
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path}: cannot be read ({reason[:300]}); replace it by an intact one") from error


def slice_files(path: Path, reading: Reading) -> list[Path]:
    """The slices of a DICOM or NIfTI file as PNG files, cut once and kept below the cache of datasets.

    Raises:
        InputError: as `read_slice`.
    """
    import datasets

    stat = path.stat()
    content = (_FORMAT, os.path.abspath(path), stat.st_size, stat.st_mtime_ns, astuple(reading))
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, *SLICES, key)
    if not folder.is_dir():
        temporary = folder.with_name(f"{key}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            for image in read_slices(path, reading):
                image.save(temporary / f"{path.name}-{image.info['slice']:04d}.png")
            if not folder.is_dir():  # another process may have been faster
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return sorted(folder.iterdir())


def _read_nifti(path: Path, reading: Reading) -> Iterator[tuple[int, np.ndarray]]:
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))  # the axes point right, to the front, up
    if len(image.shape) != 3 and image.shape[3:] != (1,):
        raise InputError(f"{path} has shape {image.shape}, which is no volume of gray slices: cut it into volumes")
    volume = np.asanyarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
    _check_finite(volume, str(path))
    if reading.window is None:
        raise InputError(f"{path}: a NIfTI file does not say which window to look at: {REMEDY}")
    low, high = _own_range(volume) if reading.window == FULL else reading.window
    axis = reading.slice_axis
    # Turned so that the top of the patient, or in axial slices the front, is above.
    return ((i, np.rot90(apply_window(volume.take(i, axis), low, high))) for i in reading.chosen(volume.shape[axis]))


def _read_dicom(path: Path, reading: Reading) -> Iterator[tuple[int, np.ndarray]]:
    import pydicom
    from pydicom.pixels import apply_modality_lut, iter_pixels

    header = pydicom.dcmread(path)
    photometric = header.PhotometricInterpretation
    frames = reading.chosen(int(header.get("NumberOfFrames", 1) or 1))
    # One by one: as float64 they take several times the file. (rows, columns[, 3]), YBR already as RGB.
    for frame, pixels in zip(frames, iter_pixels(header, indices=frames), strict=True):
        if header.get("SamplesPerPixel", 1) == 3 and pixels.dtype == np.uint8:
            yield frame, pixels
            continue
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise InputError(f"{path}: {photometric} of {header.BitsAllocated} bits is not read; convert it to 8-bit gray or RGB")
        rescaling = _of_frame(header, frame, "PixelValueTransformationSequence")
        low, high = _dicom_window(path, header, rescaling, _of_frame(header, frame, "FrameVOILUTSequence"), reading.window)
        values = apply_window(apply_modality_lut(pixels, rescaling), low, high)
        yield frame, 255 - values if photometric == "MONOCHROME1" else values  # there the lowest value is white


def _of_frame(header: pydicom.Dataset, frame: int, sequence: str) -> pydicom.Dataset:
    """The part of a file that describes a frame: an enhanced file does so frame by frame, or for all frames at once, any other in its header itself."""
    for groups, item in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        found = header.get(groups) or ()
        if item < len(found) and found[item].get(sequence):
            return found[item].get(sequence)[0]
    return header


def _dicom_window(
    path: Path, header: pydicom.Dataset, rescaling: pydicom.Dataset, voi: pydicom.Dataset, window: Window
) -> tuple[float, float]:
    """(low, high) after rescaling."""
    if window == FULL:
        if "ModalityLUTSequence" in rescaling:
            raise InputError(f"{path}: its values come from a table, whose full range is not known; give --window LOW HIGH")
        bits, signed = header.BitsStored, header.get("PixelRepresentation", 0)
        stored = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], np.float64)
        low, high = sorted(stored * float(rescaling.get("RescaleSlope", 1)) + float(rescaling.get("RescaleIntercept", 0)))
        return low, high
    if window is not None:
        return tuple(window)
    center, width, function = (voi.get(name) for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"))
    if center is None or width is None or function not in (None, "", "LINEAR", "LINEAR_EXACT"):
        raise InputError(f"{path}: the header has no linear window: {REMEDY}")
    # The first of several. PS3.3 C.11.2.1.2: LINEAR maps c − 0.5 − (w − 1)/2 … c − 0.5 + (w − 1)/2, LINEAR_EXACT c − w/2 … c + w/2.
    center, width = (float(np.atleast_1d(value)[0]) for value in (center, width))
    if function != "LINEAR_EXACT":
        center, width = center - 0.5, max(width - 1, 1e-6)  # width 1 is a threshold
    return center - width / 2, center + width / 2


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values: leave it out or repair it")


def _own_range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))  # a constant image is black
