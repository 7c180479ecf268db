"""Any source of images as one-class splits, and the way from a row to `pixel_values`."""

from .loading import OneClassSplits, check_images, load_one_class, load_unlabelled
from .transforms import PixelTransform, collate, decode_image, prepare

__all__ = ["OneClassSplits", "PixelTransform", "check_images", "collate", "decode_image", "load_one_class", "load_unlabelled", "prepare"]
