"""Dissolved images as a cached column of a dataset."""

import os

import torch

from ..data.caching import encode_levels, map_cached
from ..data.transforms import process_images
from ..errors import InputError
from .base import Dissolver, check_integer


def dissolve_dataset(
    dataset,
    dissolver: Dissolver,
    processor,
    num_variants: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    tiles: int = 1,
):
    """Adds to every image V dissolved variants of itself, computed once and cached.

    Args:
        dataset: `datasets.Dataset` with a column `image` of type `Image`, decoded or not. A transform set on it is dropped.
        dissolver: a deterministic one gives one variant, one with at most V `choices` a variant of each, any other V, each with its own t.
        processor: image processor; its `pixel_values`, in [−1, 1], are dissolved.
        num_variants: V.
        batch_size: images per call of the dissolver; it does not change the timesteps.
        seed: seed of the timesteps, which depend on it, V, the row and the variant alone.
        cache_dir: folder of the cache files, which are found again by a fingerprint of dataset, image files, dissolver, processor, V and
            seed; None is `hf_anomaly` under the cache of datasets.
        tiles: of the configuration of a detector that cuts its images: their parts are dissolved one by one.

    Returns:
        The dataset with a column `dissolved_images`, a list of V 8-bit images (gray or RGB, `Image(decode=False)`) of the processor's output size:
        x = v / 127.5 − 1. Training reads all V of an image for every step.

    Raises:
        InputError: not a `datasets.Dataset` or an empty one, no column `image`, a missing image file, an unreadable image (naming
            its row), a processor whose range is not [−1, 1], or a dissolver that gives what is not finite.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise InputError(f"dissolve_dataset takes a datasets.Dataset, got {type(dataset).__name__}: load one split, without streaming")
    if "image" not in dataset.column_names:
        raise InputError(f"the dataset has no column 'image', only {', '.join(dataset.column_names)}: rename the column of the images")
    if len(dataset) == 0:
        raise InputError("the dataset has no rows, so there is nothing to dissolve: check the split")
    check_integer("num_variants", num_variants, 1)
    check_integer("batch_size", batch_size, 1)

    # One table for all rows, so that neither the batch size nor the order of batches enters.
    if dissolver.is_deterministic:
        timesteps, num_variants, seed = None, 1, 0
    elif dissolver.choices is not None and len(dissolver.choices) <= num_variants:  # nothing is computed twice
        timesteps, num_variants, seed = torch.tensor(dissolver.choices).repeat(len(dataset), 1), len(dissolver.choices), 0
    else:
        generator = torch.Generator().manual_seed(seed)
        timesteps = dissolver.sample_timesteps(len(dataset) * num_variants, "cpu", generator).view(len(dataset), num_variants)

    def dissolve(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        pixel_values = torch.stack(process_images(batch["image"], [f"row {index}" for index in indices], processor, "pt"))
        pixel_values = pixel_values.to(dissolver.device)
        if pixel_values.shape[1] not in (1, 3):
            raise InputError(f"the processor gives {pixel_values.shape[1]} channels: dissolved images are stored with 1 (gray) or 3 (RGB)")
        levels = torch.empty(len(indices), num_variants, *pixel_values.shape[1:], dtype=torch.uint8)
        for variant in range(num_variants):
            dissolved = dissolver(pixel_values, None if timesteps is None else timesteps[indices, variant].to(dissolver.device), tiles)
            if not dissolved.isfinite().all():
                raise InputError(f"the {dissolver.kind} dissolver gives values that are not finite: its weights are damaged, make it anew")
            levels[:, variant] = dissolved.float().add(1).mul(127.5).round()
        return {"dissolved_images": [[encode_levels(array) for array in row] for row in levels.numpy()]}

    key = {
        "dissolver": dissolver.fingerprint(),
        "processor": processor.to_dict(),
        "num_variants": num_variants,
        "seed": seed,
        **({} if tiles == 1 else {"tiles": tiles}),
    }
    return map_cached(
        dataset,
        dissolve,
        name="dissolved",
        key=key,
        batch_size=batch_size,
        cache_dir=cache_dir,
        desc=f"Dissolving ({dissolver.kind})",
        columns={"dissolved_images": datasets.List(datasets.Image(decode=False))},
    )
