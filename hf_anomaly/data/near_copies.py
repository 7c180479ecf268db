"""Images that look nearly the same: neighbouring slices or frames, one part under two lights. Seen by thumbnails, at no great cost."""

from collections.abc import Iterator

import numpy as np
import PIL.Image

THUMBNAIL_SIZE = 16  # px
_NEAR = 0.25  # of the usual distance
_USUAL = (10, 0.05)  # that to the tenth nearest, or to the last of the nearest twentieth: so many may show one and the same thing
FEWEST = 2 * _USUAL[0]  # images among which a near copy can be told
_CHUNK_VALUES = 1 << 22  # distances held at once


def thumbnail(image: PIL.Image.Image) -> np.ndarray:
    """(16, 16) uint8, gray, whatever the image's proportions."""
    return np.asarray(image.convert("L").resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), PIL.Image.Resampling.BILINEAR))


def find_near_copies(among: np.ndarray, images: np.ndarray) -> dict[int, int]:
    """The images that have a near copy among others, at less than a quarter of the distance that is usual for near images.

    That is relative, since images of one kind of thing are all alike. Thumbnails are compared as brought to one mean and contrast, so that another exposure
    makes no difference.

    Args:
        among, images: (m, 16, 16) and (n, 16, 16), of `thumbnail`.

    Returns:
        Index in `images` → index of the nearest in `among`. Empty if these are fewer than `FEWEST`, too few to tell what is usual.
    """
    found = {}
    for start, squared, limits in _squared_distances(_standardized(among), _standardized(images)):
        rows = np.flatnonzero(squared.min(1) < limits)
        found |= zip((start + rows).tolist(), squared[rows].argmin(1).tolist(), strict=True)
    return found


def group_near_copies(images: np.ndarray) -> np.ndarray:
    """What belongs together: near copies, as `find_near_copies` finds them among all the others, and their near copies in turn; and equal thumbnails, however
    many there are.

    Args:
        images: (n, 16, 16), of `thumbnail`.

    Returns:
        (n,) numbers of the groups, from 0 in the order of their first images.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pixels = _standardized(images)
    _, first, equal = np.unique(images.reshape(-1, THUMBNAIL_SIZE**2), axis=0, return_index=True, return_inverse=True)
    pairs = [np.stack([np.arange(len(images)), first[equal]])]
    for start, squared, limits in _squared_distances(pixels, pixels, leave_out_self=True):
        rows, columns = np.nonzero(squared < limits[:, None])
        pairs.append(np.stack([start + rows, columns]))
    rows, columns = np.concatenate(pairs, axis=1)
    links = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(images), len(images)))
    _, groups = connected_components(links, directed=False)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


def _squared_distances(among: np.ndarray, images: np.ndarray, leave_out_self: bool = False) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Chunks of images: the index of the first, the squares (k, m) of their distances, and those (k,) below which one is a near copy. None at all if there
    are too few to tell.

    Args:
        among, images: of `_standardized`.
        leave_out_self: they are the same images, none of which is its own copy.
    """
    least, share = _USUAL
    others = len(among) - leave_out_self
    if others < FEWEST:
        return
    usual = max(least, round(share * others)) - 1
    step = max(1, _CHUNK_VALUES // len(among))
    for start in range(0, len(images), step):
        squared = (2 - 2 * images[start : start + step] @ among.T).clip(min=0)
        if leave_out_self:
            squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        yield start, squared, _NEAR**2 * np.partition(squared, usual, axis=1)[:, usual]


def _standardized(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 256) float32, of mean 0 and length 1. Flat ones are 0, which is as far from each other as from anything."""
    pixels = thumbnails.reshape(-1, THUMBNAIL_SIZE**2).astype(np.float32)
    pixels -= pixels.mean(1, keepdims=True)
    return pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(min=1e-6)
