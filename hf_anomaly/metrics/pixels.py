"""Pixel-level metrics in one pass and constant memory: histograms of the maps' values, from which the curves are drawn."""

import numpy as np

from ..errors import InputError, one_line

REGION = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner are one region, as in MVTec AD's own evaluation


class PixelMetrics:
    """AUROC, average precision and AUPRO of anomaly maps against masks, added up batch by batch.

    AUPRO is the area under the per-region overlap, the share of an anomalous region's pixels above a threshold, averaged over the regions of all
    images, against the false-positive rate of all normal pixels, up to the rate `max_fpr` and divided by it (Bergmann et al., The MVTec
    Anomaly Detection Dataset, IJCV 129, 2021). That average is linear: one histogram in which each pixel weighs 1 / size of its region holds it.

    A bin holds the values whose float32 numbers agree in their first `bits` bits. Read as integers, these are in the order of the values, so that the
    range need not be known before: with 20 bits a bin is 1/4096 to 1/2048 of its values wide, on either side of `center`. The histograms take
    24 MiB. What the bins lose is bounded: each metric comes with the largest error that any order of the values within the bins, also of equal
    ones, could make. Maps that vary little about a large value need a `center`.

    Args:
        center: where the bins are finest, such as a usual value of normal pixels.
        bits: 10 to 26; there are 2^bits bins.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(self, center: float = 0.0, bits: int = 20):
        if not np.isfinite(center):
            raise InputError(f"center must be a finite number, got {center}")
        if not 10 <= bits <= 26:
            raise InputError(f"bits must be 10 to 26, got {bits}")
        self.center, self.bits = float(center), bits
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.num_images = self.num_regions = 0
        self._pixels = np.zeros(2**self.bits, np.int64)
        self._anomalous = np.zeros(2**self.bits, np.int64)
        self._overlap = np.zeros(2**self.bits, np.float64)  # of anomalous pixels, each 1 / size of its region

    def update(self, maps, masks) -> None:
        """Adds images.

        Args:
            maps: (B, 1, H, W), (B, H, W) or (H, W) finite numbers, taken as float32; higher = more anomalous. Tensors or arrays.
            masks: the same, 0 = normal, above 0 = anomalous. Other batches may have another size.

        Raises:
            InputError: other shapes, a map with a value that is not finite, or a mask with NaN; nothing is added then.
        """
        maps, masks = _images("maps", maps), _images("masks", masks)
        if maps.shape != masks.shape:
            raise InputError(
                f"maps: {_size(maps)}, but masks: {_size(masks)}; stretch the maps to the masks' size, see ops.resizing.resize"
            )
        with np.errstate(over="ignore"):  # becomes infinite, and is refused below
            maps = maps.astype(np.float32, copy=False)
        if not (finite := np.isfinite(maps).all(axis=(1, 2))).all():
            raise InputError(
                f"maps: image {np.argmin(finite)} of the batch (counted from 0) holds NaN or infinite values; look at its model"
            )
        if (unknown := np.isnan(masks).any(axis=(1, 2))).any():
            raise InputError(f"masks: image {np.argmax(unknown)} of the batch (counted from 0) holds NaN; 0 is normal, above 0 anomalous")
        masks = masks > 0
        bins = self._bins(maps)
        np.add.at(self._pixels, bins.ravel(), 1)
        self.num_images += len(maps)
        if masks.any():
            from scipy import ndimage

            anomalous = bins[masks]
            # The images of a batch do not touch each other.
            regions, num_regions = ndimage.label(masks, structure=np.stack([0 * REGION, REGION, 0 * REGION]))
            regions = regions[masks]
            np.add.at(self._anomalous, anomalous, 1)
            np.add.at(self._overlap, anomalous, 1 / np.bincount(regions)[regions])
            self.num_regions += num_regions

    def compute(self, max_fpr: float = 0.3) -> dict[str, float | int | None]:
        """The metrics of all images so far.

        Args:
            max_fpr: where AUPRO ends, in (0, 1].

        Returns:
            `pixel_auroc`, `pixel_average_precision` and `aupro`, in [0, 1], None if no pixel or every pixel is anomalous; `pixel_auroc_error`,
            `pixel_average_precision_error` and `aupro_error`, by how much at most they differ from the exact values; the counts `num_mask_images`,
            `num_pixels`, `num_anomalous_pixels` and `num_regions`.

        Raises:
            InputError: no pixels, or `max_fpr` out of range.
        """
        if not 0 < max_fpr <= 1:
            raise InputError(f"max_fpr must be in (0, 1], got {max_fpr}")
        filled = np.flatnonzero(self._pixels)[::-1]  # the highest scores first
        if not len(filled):
            raise InputError("maps: no pixels; add at least one map and its mask")
        anomalous = self._anomalous[filled]
        normal = self._pixels[filled] - anomalous
        overlap = self._overlap[filled]
        num_anomalous, num_normal = int(anomalous.sum()), int(normal.sum())
        names = ("pixel_auroc", "pixel_average_precision", "aupro")
        metrics = dict.fromkeys([*names, *(f"{name}_error" for name in names)])
        if num_anomalous and num_normal:
            pairs = (
                _auroc(normal, anomalous),
                _average_precision(normal, anomalous),
                _aupro(normal / num_normal, overlap / self.num_regions, max_fpr),
            )
            for name, (value, error) in zip(names, pairs, strict=True):
                metrics |= {name: float(value), f"{name}_error": float(error)}
        return metrics | {
            "num_mask_images": self.num_images,
            "num_pixels": num_anomalous + num_normal,
            "num_anomalous_pixels": num_anomalous,
            "num_regions": self.num_regions,
        }

    def _bins(self, maps: np.ndarray) -> np.ndarray:
        """The bin of every value, of the same shape; a larger value never has a lower bin."""
        values = maps + np.float32(0.0 - self.center)  # a new array; −0.0 becomes 0.0
        bins = values.view(np.int32)
        bins >>= 32 - self.bits
        # Negative floats are sign and magnitude: their other bits count the wrong way round.
        negative = bins >> 31
        negative &= 2 ** (self.bits - 1) - 1
        bins ^= negative
        bins += 2 ** (self.bits - 1)
        return bins.astype(np.intp)


# Each gives a curve's area as far as its bins, the highest first, tell it, and by how much the exact one may differ.


def _auroc(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float]:
    """Pairs of one bin count half; exactly, each counts something from 0 to 1."""
    pairs = float(normal.sum()) * float(anomalous.sum())
    below = normal.sum() - normal.cumsum()
    return (anomalous * (below + normal / 2)).sum() / pairs, (anomalous * (normal / 2)).sum() / pairs


def _average_precision(normal: np.ndarray, anomalous: np.ndarray) -> tuple[float, float]:
    """Every anomalous pixel counts with the precision at the end of its bin.

    Exactly it is at most the precision with all anomalous and no normal pixels of the bin, and at least that with all normal ones before it, which for
    T anomalous and F normal pixels above is Σ_j (T + j) / (T + j + F) = p − F (ψ(T + F + p + 1) − ψ(T + F + 1)) over the p pixels of a bin.
    """
    from scipy.special import digamma

    hits, false_alarms = anomalous.cumsum(), normal.cumsum()
    here = anomalous > 0
    p, hits, normal, false_alarms = anomalous[here], hits[here], normal[here], false_alarms[here]
    value = p * (hits / (hits + false_alarms))
    most = p * (hits / (hits + false_alarms - normal))
    least = p - false_alarms * (digamma(hits + false_alarms + 1) - digamma(hits - p + false_alarms + 1))
    total = p.sum()
    return value.sum() / total, max((most - value).sum(), (value - least).sum(), 0.0) / total


def _aupro(normal: np.ndarray, overlap: np.ndarray, max_fpr: float) -> tuple[float, float]:
    """Between the ends of a bin the curve is taken as straight; exactly it climbs somehow, inside the rectangle over the bin.

    Args:
        normal, overlap: what each bin adds to the false-positive rate and to the mean overlap.
    """
    rate, height = (np.concatenate([[0.0], part.cumsum()]) for part in (normal, overlap))
    rate /= rate[-1]  # ends at 1, whatever rounding did
    last = np.searchsorted(rate, max_fpr, side="right") - 1  # the last bin's end up to max_fpr
    width, climb = np.diff(rate[: last + 1]), np.diff(height[: last + 1])
    area, error = (width * (height[:last] + climb / 2)).sum(), (width * climb).sum() / 2
    if last + 1 < len(rate):
        rest, climb = max_fpr - rate[last], height[last + 1] - height[last]
        area += rest * (height[last] + climb * rest / (rate[last + 1] - rate[last]) / 2)
        error += rest * climb
    return min(area / max_fpr, 1.0), error / max_fpr  # rounding goes beyond it


def _images(name: str, values) -> np.ndarray:
    """(B, H, W) of maps or masks."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values  # NumPy knows no bfloat16
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name}: {one_line(error)}; add images of different sizes one by one") from error
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise InputError(f"{name}: {array.dtype} of shape {array.shape}; give numbers of shape (B, 1, H, W), (B, H, W) or (H, W)")
    return array


def _size(images: np.ndarray) -> str:
    return f"{len(images)} of {images.shape[1]}×{images.shape[2]} pixels"
