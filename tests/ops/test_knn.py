import time

import pytest
import torch

from hf_anomaly.errors import InputError
from hf_anomaly.ops.knn import max_cosine, min_distance


def slow(queries, bank):
    """An image, a shift and a row at a time."""
    return torch.tensor(
        [[max(float(z @ row / (z.norm() * row.norm())) for row in bank[k]) for k, z in enumerate(image)] for image in queries.double()],
        dtype=torch.float64,
    )


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(3, 7, 1, generator=generator) * 10 + 0.1  # rows of very different norms
    return torch.randn(5, 3, 8, generator=generator), scale * torch.randn(3, 7, 8, generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 100, 2**24])
def test_equals_the_loop_in_any_chunks(features, chunk_size):
    queries, bank = features
    expected = slow(queries, bank.double())
    torch.testing.assert_close(max_cosine(queries, bank, chunk_size).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(max_cosine(queries.double(), bank.double(), chunk_size), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 100, 2**24])
def test_distance_equals_the_loop_in_any_chunks(features, chunk_size):
    queries, bank = features
    expected = torch.cdist(queries.transpose(0, 1).double(), bank.double()).amin(2).T
    torch.testing.assert_close(min_distance(queries, bank, chunk_size).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(min_distance(queries.double(), bank.double(), chunk_size), expected, rtol=1e-12, atol=1e-12)


def test_distance_to_a_row_itself_is_zero(features):
    _, bank = features
    assert not min_distance(bank.transpose(0, 1), bank).any()


def test_memory_is_bounded_at_a_million_rows(peak_bytes):
    chunk_size = 2**18
    line = torch.randn(10**6 + 127, generator=torch.Generator().manual_seed(0))
    bank = line.unfold(0, 128, 1)[None]  # a million different rows that share their numbers, 4 MB
    queries = torch.stack([bank[:, 123_456], -bank[:, 999_999]])
    nearest = []
    peak = peak_bytes(lambda: nearest.append(max_cosine(queries, bank, chunk_size)))
    assert peak < 1.1 * 4 * chunk_size
    assert nearest[0][0].item() == pytest.approx(1)
    assert nearest[0][1].item() < 0.6


def test_a_shift_sees_its_own_bank_only():
    bank = torch.eye(2).view(2, 1, 2)  # shift 0 knows the first axis, shift 1 the second
    queries = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[-2.0, 0.0], [0.0, 0.0]]])
    assert max_cosine(queries, bank).tolist() == [[1.0, 0.0], [-1.0, 0.0]]


def test_similarity_knows_no_length_but_zero():
    rows = torch.tensor([[[0.0, 0.0], [1e-6, 1e-6]]])
    assert max_cosine(torch.tensor([[[-1.0, -1.0]]]), rows).item() == 0
    assert max_cosine(torch.tensor([[[1.0, 1.0]]]), rows).item() == pytest.approx(1)


@pytest.mark.parametrize("search", [max_cosine, min_distance])
def test_half_precision_is_computed_in_float32(features, search):
    queries, bank = ((100 + x).bfloat16() for x in features)  # large and alike, so that products rounded to bfloat16 find another row
    expected = search(queries.float(), bank.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(search(queries, bank), expected)


def test_much_faster_than_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(256, 4, 32, generator=generator), torch.randn(4, 256, 32, generator=generator)

    def seconds(run):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    def loop():
        similarity = torch.nn.functional.cosine_similarity
        return torch.stack([torch.stack([similarity(z[None], bank[k]).max() for k, z in enumerate(image)]) for image in queries])

    torch.testing.assert_close(max_cosine(queries, bank), loop())
    assert seconds(lambda: max_cosine(queries, bank)) * 10 < seconds(loop)


@pytest.mark.parametrize(
    ("queries", "bank", "chunk_size", "message"),
    [
        ((5, 3, 8), (3, 0, 8), 100, "^bank: no rows"),
        ((5, 3, 8), (2, 7, 8), 100, "^bank: shape"),
        ((5, 3, 8), (3, 7, 9), 100, "^bank: shape"),
        ((3, 8), (3, 7, 8), 100, "^bank: shape"),
        ((5, 3, 8), (3, 7, 8), 0, "^chunk_size: 0"),
    ],
)
def test_errors(queries, bank, chunk_size, message):
    with pytest.raises(InputError, match=message):
        max_cosine(torch.zeros(queries), torch.zeros(bank), chunk_size)
