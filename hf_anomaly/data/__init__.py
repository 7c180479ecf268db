"""Any source of images as one-class splits, and the way from a row to `pixel_values`."""

from .caching import shrink_images
from .content import content_digest, find_copies
from .formats import Reading
from .loading import OneClassSplits, check_images, check_pixels, load_one_class, load_unlabelled
from .near_copies import find_near_copies, group_near_copies, thumbnail
from .protocols import Division
from .recipes import RECIPES, DatasetRecipe, find_recipe
from .streaming import stream_one_class
from .transforms import PixelTransform, collate, decode_image, file_name, image_loader, prepare

__all__ = [
    "DatasetRecipe",
    "Division",
    "OneClassSplits",
    "PixelTransform",
    "RECIPES",
    "Reading",
    "check_images",
    "check_pixels",
    "collate",
    "content_digest",
    "decode_image",
    "file_name",
    "find_copies",
    "find_near_copies",
    "find_recipe",
    "group_near_copies",
    "image_loader",
    "load_one_class",
    "load_unlabelled",
    "prepare",
    "shrink_images",
    "stream_one_class",
    "thumbnail",
]
