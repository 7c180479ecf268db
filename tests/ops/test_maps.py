"""The median filter against a slow oracle."""

import numpy as np
import pytest
import torch

from hf_anomaly.ops import maps as maps_module
from hf_anomaly.ops.maps import median_filter


@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_filter(size, at_once, monkeypatch):
    monkeypatch.setattr(maps_module, "_WINDOW_PIXELS", at_once)
    maps = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(0))
    filtered = median_filter(maps, size).numpy()
    reach = size // 2
    for b in range(2):
        padded = np.pad(maps[b, 0].numpy(), reach, mode="edge")
        for i in range(6):
            for j in range(9):
                assert filtered[b, 0, i, j] == np.median(padded[i : i + size, j : j + size])
