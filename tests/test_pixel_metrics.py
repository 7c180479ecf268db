"""Pixel-level metrics from histograms, against scikit-learn and against the definition of per-region overlap."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_anomaly.metrics import PixelMetrics
from hf_anomaly.metrics.pixel_level import PixelAnomalyMetrics

NAMES = ("pixel_auroc", "pixel_average_precision", "aupro")


def disc(size, y, x, radius):
    rows, columns = np.ogrid[:size, :size]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def example(seed, count=4, size=24, digits=None, scale=1.0, offset=0.0):
    """(maps, masks): images without an anomaly, with one region, with two; `digits` makes ties."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), bool)
    for i in range(1, count):
        for _ in range(1 + i % 2):
            masks[i] |= disc(size, *rng.integers(3, size - 3, 2), rng.integers(1, 4))
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    maps = maps if digits is None else maps.round(digits)
    return (scale * maps + offset).astype(np.float32), masks


def regions_of(mask):
    """Lists of pixels that touch, at corners too: grown one by one."""
    left, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        region, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        regions.append(tuple(np.array(region).T))
    return regions


def slow_aupro(maps, masks, max_fpr=0.3):
    """The definition: every score is a threshold; the overlap of each region; trapezoids up to max_fpr, and division by it."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in regions_of(mask)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        points.append((above[~masks].mean(), np.mean([above[i][region].mean() for i, region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 > max_fpr:
            y1, x1 = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0), max_fpr
            area += (x1 - x0) * (y0 + y1) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


def exact(maps, masks, max_fpr=0.3):
    scores = (masks.ravel(), maps.ravel())
    return dict(zip(NAMES, (roc_auc_score(*scores), average_precision_score(*scores), slow_aupro(maps, masks, max_fpr)), strict=True))


def computed(maps, masks, max_fpr=0.3, **settings):
    metrics = PixelMetrics(**settings)
    metrics.update(maps, masks)
    return metrics.compute(max_fpr)


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_values_are_the_exact_ones_where_every_score_has_a_bin(max_fpr):
    maps, masks = example(0, digits=1, scale=0.625)  # multiples of 1/16: no two within a bin
    assert len(np.unique(maps)) > 30
    values, expected = computed(maps, masks, max_fpr), exact(maps, masks, max_fpr)
    assert {name: values[name] for name in NAMES} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bits", [10, 12, 20])
@pytest.mark.parametrize("make", [{}, {"scale": 1e-20}, {"offset": 5.0}, {"digits": 1}], ids=str)
def test_values_are_within_the_bound(bits, make):
    maps, masks = example(1, **make)
    values, expected = computed(maps, masks, bits=bits), exact(maps, masks)
    for name in NAMES:
        assert abs(values[name] - expected[name]) <= values[f"{name}_error"] + 1e-12
    if bits == 20 and "digits" not in make:  # true ties count in the bound, though they lose nothing
        assert values["pixel_auroc_error"] < 5e-4


@pytest.mark.parametrize("order", ["best", "worst"])
def test_the_bound_is_reached(order):
    """One bin for all: exactly the values may be in the best order, or in the worst one."""
    rng = np.random.default_rng(2)
    mask = rng.random((8, 8)) < 0.3
    inside = 1 + np.arange(64, dtype=np.float32) * 1e-5
    maps = np.empty((8, 8), np.float32)
    maps[mask], maps[~mask] = np.split(inside[::-1], [mask.sum()]) if order == "best" else (inside[: mask.sum()], inside[mask.sum() :])
    values, expected = computed(maps, mask, bits=10), exact(maps[None], mask[None])
    assert expected["pixel_auroc"] == (order == "best")
    assert (values["pixel_auroc"], values["pixel_auroc_error"]) == (0.5, 0.5)
    # AUPRO: the straight line to .3 has .15; the best order 1, the worst 0. The bound takes what a cut bin could hide, and no less.
    assert values["aupro"] == pytest.approx(0.15)
    for name in NAMES:
        assert abs(values[name] - expected[name]) <= values[f"{name}_error"] + 1e-12
    if order == "worst":  # the average precision of a bin is low as it is: its worst order is not far below
        error = values["pixel_average_precision"] - expected["pixel_average_precision"]
        assert 0 < error <= values["pixel_average_precision_error"]


@pytest.mark.parametrize("order", ["best", "worst"])
def test_the_bound_of_aupro_is_reached(order):
    """10 of 100 normal pixels share a bin with the region: with them above it .1 / .3 of the area is lost, else nothing."""
    mask = np.arange(110).reshape(11, 10) < 10
    maps = np.where(mask, 1 + 1e-5, 1.0 if order == "best" else 1 + 2e-5).astype(np.float32)
    maps[2:] = 0
    values, expected = computed(maps, mask, bits=10), exact(maps[None], mask[None])
    assert expected["aupro"] == pytest.approx(1 if order == "best" else 2 / 3)
    assert (values["aupro"], values["aupro_error"]) == pytest.approx((5 / 6, 1 / 6))


def test_the_bound_of_average_precision_below_is_reached():
    """100 normal pixels in a bin above; then one, with 9 anomalous ones, all of them below it and apart."""
    mask = np.arange(110).reshape(11, 10) >= 101
    maps = np.where(mask, 1 - 1e-5 * np.arange(110).reshape(11, 10), 1).astype(np.float32)
    maps.ravel()[:100] = 2
    values, expected = computed(maps, mask, bits=10), exact(maps[None], mask[None])
    assert values["pixel_average_precision"] == pytest.approx(9 / 110)
    lost = values["pixel_average_precision"] - expected["pixel_average_precision"]
    assert lost == pytest.approx(np.mean([9 / 110 - j / (j + 101) for j in range(1, 10)]))
    assert values["pixel_average_precision_error"] == pytest.approx(lost, rel=1e-9)


def test_bins_keep_the_order_of_all_floats():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]]).astype(np.float32)
    values.sort()
    for bits in (10, 20, 26):
        bins = PixelMetrics(bits=bits)._bins(values)
        assert (np.diff(bins) >= 0).all()
        assert 0 <= bins[0] <= bins[-1] < 2**bits
        assert len(set(bins[values == 0])) == 1  # both zeros


def test_a_center_resolves_what_lies_far_from_zero():
    maps, masks = example(4, scale=1e-3, offset=1e4)
    blurred, sharp, expected = computed(maps, masks), computed(maps, masks, center=1e4), exact(maps, masks)
    assert blurred["pixel_auroc_error"] > 0.3  # it says so
    assert sharp["pixel_auroc_error"] < 0.1
    assert {name: sharp[name] for name in NAMES} == pytest.approx(
        expected, abs=1e-9
    )  # float32 has few values up there, all with bins of their own


def test_batches_add_up():
    maps, masks = example(5, count=6)
    whole = computed(maps, masks)
    parts = PixelMetrics()
    parts.update(torch.from_numpy(maps[:4])[:, None], torch.from_numpy(masks[:4])[:, None])
    parts.update(maps[4], masks[4].astype(np.uint8) * 255)
    parts.update(maps[5].tolist(), masks[5].astype(float))
    assert parts.compute() == pytest.approx(whole, rel=1e-12)
    assert (whole["num_mask_images"], whole["num_pixels"], whole["num_anomalous_pixels"]) == (6, maps.size, masks.sum())
    parts.reset()
    parts.update(maps, masks)
    assert parts.compute() == whole


def test_images_may_differ_in_size():
    (maps, masks), (others, other_masks) = example(6), example(7, size=31)
    metrics = PixelMetrics()
    metrics.update(maps, masks)
    metrics.update(others, other_masks)
    scores = np.concatenate([maps.ravel(), others.ravel()])
    labels = np.concatenate([masks.ravel(), other_masks.ravel()])
    assert metrics.compute()["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    regions = sum(len(regions_of(mask)) for mask in (*masks, *other_masks))
    assert metrics.compute()["num_regions"] == regions


def test_regions_touch_at_corners_but_not_across_images():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 3] = True
    masks[1] = masks[0]
    assert computed(np.zeros((2, 4, 4)), masks)["num_regions"] == 2 * ndimage.label(masks[0], np.ones((3, 3)))[1] == 4


def test_small_regions_count_as_much_as_large_ones():
    mask = np.zeros((20, 20), bool)
    mask[:5, :10], mask[15, 15] = True, True
    maps = np.where(mask, 1.0, 0.0)
    maps[15, 15] = -1  # the small one is missed: half the regions, 2 % of the pixels
    assert computed(maps, mask)["aupro"] == pytest.approx(0.5)
    assert computed(maps, mask)["pixel_auroc"] == pytest.approx(50 / 51)


def test_perfect_maps_are_one():
    for seed in range(20):
        masks = np.random.default_rng(seed).random((2, 9, 13)) < 0.2
        metrics = PixelMetrics()
        metrics.update(masks.astype(np.float32), masks)
        assert metrics.compute()["aupro"] == pytest.approx(1)
        assert metrics.compute()["aupro"] <= 1


def test_ties_and_perfect_maps():
    mask = disc(16, 8, 8, 3)
    assert [computed(mask, mask)[name] for name in NAMES] == pytest.approx([1, 1, 1], rel=1e-12)
    constant = computed(np.ones((16, 16)), mask)  # a curve of one step: the diagonal
    assert (constant["pixel_auroc"], constant["pixel_auroc_error"]) == (0.5, 0.5)
    assert constant["aupro"] == pytest.approx(0.15)
    assert constant["pixel_average_precision"] == pytest.approx(mask.mean())


@pytest.mark.parametrize("value", [False, True])
def test_one_class_has_no_values(value):
    metrics = computed(np.random.default_rng(8).random((2, 5, 5)), np.full((2, 5, 5), value))
    assert all(metrics[name] is None and metrics[f"{name}_error"] is None for name in NAMES)
    assert metrics["num_anomalous_pixels"] == 50 * value


@pytest.mark.parametrize(
    ("maps", "masks", "words"),
    [
        (np.array([[[0.0, 0.0]], [[0.0, np.nan]]]), np.zeros((2, 1, 2)), ["maps", "image 1", "NaN"]),
        (np.array([[1e300]]), np.zeros((1, 1)), ["maps", "image 0", "infinite"]),
        (np.zeros((2, 4, 4)), np.zeros((2, 8, 8)), ["4×4", "8×8", "ops.resizing"]),
        (np.zeros((2, 4, 4)), np.zeros((1, 4, 4)), ["maps", "2 of", "1 of"]),
        (np.zeros((2, 3, 4, 4)), np.zeros((2, 4, 4)), ["maps", "(2, 3, 4, 4)"]),
        ([np.zeros((4, 4)), np.zeros((5, 4))], [np.zeros((4, 4)), np.zeros((5, 4))], ["maps", "one by one"]),
        (np.zeros((2, 4, 4)), np.full((2, 4, 4), "a"), ["masks", "<U1"]),
        (np.zeros((2, 1, 2)), np.array([[[1.0, 0.0]], [[0.0, np.nan]]]), ["masks", "image 1", "NaN"]),
    ],
)
def test_what_cannot_be_added(maps, masks, words, refused):
    metrics = PixelMetrics()
    with refused(*words):
        metrics.update(maps, masks)
    assert metrics.num_images == 0
    with refused("no pixels"):
        metrics.compute()


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 32}, {"center": np.inf}, {"max_fpr": 0}, {"max_fpr": 1.5}])
def test_settings_out_of_range(settings, refused):
    with refused(next(iter(settings)), str(next(iter(settings.values())))):
        computed(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), **settings)


def test_memory_does_not_grow_with_the_images():
    metrics, (maps, masks) = PixelMetrics(), example(9, count=8, size=64)
    metrics.update(maps, masks)  # imports
    tracemalloc.start()
    for _ in range(200):  # 26 MB of maps
        metrics.update(maps, masks)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 2e4
    assert peak < 20 * maps.nbytes
    assert metrics.compute()["num_pixels"] == 201 * maps.size


def test_half_precision_maps():
    maps, masks = example(10)
    half = torch.from_numpy(maps).bfloat16()
    assert computed(half, masks) == computed(half.float(), masks)
    assert computed(half, torch.from_numpy(masks).bfloat16()) == computed(half, masks)


def test_evaluate_metric_accumulates(refused):
    maps, masks = example(11)
    metric, expected = PixelAnomalyMetrics(), computed(maps, masks)
    assert metric.compute(predictions=maps, references=masks) == expected
    metric.add_batch(predictions=maps[:2], references=masks[:2])
    metric.add(prediction=maps[2], reference=masks[2])
    metric.add(prediction=maps[3], reference=masks[3])
    assert metric.compute(max_fpr=0.1) == pytest.approx(computed(maps, masks, 0.1), rel=1e-12)
    assert PixelAnomalyMetrics(center=2.0).compute(predictions=maps, references=masks) == computed(maps, masks, center=2.0)
    with refused("no pixels"):  # nothing is left of the maps before
        metric.compute()
    with refused("references"):
        metric.compute(predictions=maps)
    with refused("num_process=2"):
        PixelAnomalyMetrics(num_process=2, process_id=0, experiment_id="x")
