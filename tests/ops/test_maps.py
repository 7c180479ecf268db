"""The median filter against a slow oracle."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_anomaly.dissolving import MedianDissolver
from hf_anomaly.ops import maps as maps_module
from hf_anomaly.ops.maps import median_filter


@pytest.mark.parametrize(("border", "numpy_mode"), [("replicate", "edge"), ("reflect", "reflect")])
@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_filter(size, at_once, border, numpy_mode, monkeypatch):
    monkeypatch.setattr(maps_module, "_WINDOW_PIXELS", at_once)
    maps = torch.rand(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    filtered = median_filter(maps, size, border).numpy()
    reach = size // 2
    for b, c in np.ndindex(2, 3):
        padded = np.pad(maps[b, c].numpy(), reach, mode=numpy_mode)
        for i, j in np.ndindex(9, 6):
            assert filtered[b, c, i, j] == np.median(padded[i : i + size, j : j + size])
    assert median_filter(maps[:0], size, border).shape == (0, 3, 9, 6)


def test_the_median_of_a_large_batch_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(maps_module, "_WINDOW_PIXELS", 2**16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    images = torch.rand(16, 3, 24, 24)
    with Watch():
        MedianDissolver(7)(images)
    assert images.numel() <= largest <= 2**16 < images.numel() * 7**2
