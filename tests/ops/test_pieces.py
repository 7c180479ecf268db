import pytest

from hf_anomaly.ops.pieces import pieces


@pytest.mark.parametrize(
    ("count", "budget", "row", "sizes"), [(7, 30, 10, [3, 3, 1]), (2, 30, 10, [2]), (2, 5, 10, [1, 1]), (2, 5, 0, [2]), (0, 5, 1, [0])]
)
def test_pieces_part_the_rows(count, budget, row, sizes):
    rows = list(range(count))
    parts = [rows[piece] for piece in pieces(count, budget, row)]
    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part] == rows
