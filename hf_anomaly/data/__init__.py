"""Any source of images as one-class splits, and the way from a row to `pixel_values`."""

from .loading import OneClassSplits, check_images, load_one_class, load_unlabelled
from .protocols import Division
from .recipes import RECIPES, DatasetRecipe, find_recipe
from .transforms import PixelTransform, collate, decode_image, prepare

__all__ = [
    "DatasetRecipe",
    "Division",
    "OneClassSplits",
    "PixelTransform",
    "RECIPES",
    "check_images",
    "collate",
    "decode_image",
    "find_recipe",
    "load_one_class",
    "load_unlabelled",
    "prepare",
]
