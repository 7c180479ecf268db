"""A random choice of a stream."""

import pytest
import torch

from hf_anomaly.ops.sampling import Sample


def choice(count, limit, batch_size):
    sample = Sample(limit)
    for rows in torch.arange(count).split(batch_size):
        sample.add({"number": rows, "square": rows[:, None] ** 2})
        assert sum(map(len, sample._rows["number"])) <= 1.5 * limit
    rows = sample.rows()
    assert torch.equal(rows["square"][:, 0], rows["number"] ** 2)
    return rows["number"].tolist()


@pytest.mark.parametrize(("count", "limit"), [(1000, 40), (41, 40), (40, 40), (7, 40)])
def test_the_same_rows_in_whatever_batches(count, limit):
    whole = choice(count, limit, count)
    assert len(whole) == min(count, limit)
    assert whole == sorted(set(whole))
    assert choice(count, limit, 3) == choice(count, limit, 17) == whole


def test_every_row_is_as_likely():
    rows = torch.tensor(choice(100_000, 20_000, 512))
    shares = torch.histc(rows.float(), bins=10, min=0, max=100_000) / 20_000
    assert (shares - 0.1).abs().max() < 0.01  # five standard deviations


def test_without_a_limit_all_rows():
    sample = Sample()
    for rows in torch.arange(10).split(3):
        sample.add({"number": rows})
    assert sample.rows()["number"].tolist() == list(range(10))
    assert Sample(3).rows() == {}
