import pytest
import torch

from hf_anomaly.errors import InputError
from hf_anomaly.ops.shifts import SHIFTS, perm, rotate


def planted(height, width, row, column):
    x = torch.zeros(2, 3, height, width)
    x[1, 2, row, column] = 1.0
    return x


def places(shifted):
    """(row, column) of the planted pixel under each shift; fails if it moved to another image or channel, or was lost."""
    assert torch.equal(shifted.sum(dim=(-2, -1)), torch.tensor([[0.0, 0, 0], [0, 0, 1]]).expand(4, 2, 3))
    return [tuple(view[1, 2].nonzero().squeeze(0).tolist()) for view in shifted]


def test_rotate_turns_counter_clockwise():
    # Top row, second column: it goes to the left edge, the bottom, the right edge.
    assert places(rotate(planted(5, 5, 0, 1))) == [(0, 1), (3, 0), (4, 3), (1, 4)]


def test_perm_swaps_upper_and_lower_then_left_and_right():
    assert places(perm(planted(4, 6, 0, 1))) == [(0, 1), (2, 1), (0, 4), (2, 4)]


def test_perm_cuts_odd_sides_at_half():
    x = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    assert perm(x)[2, 0, 0, 0].tolist() == [2.0, 3.0, 4.0, 0.0, 1.0]
    assert perm(x.mT)[1, 0, 0, :, 0].tolist() == [2.0, 3.0, 4.0, 0.0, 1.0]


@pytest.mark.parametrize("name", SHIFTS)
def test_four_shifts_of_which_the_first_is_the_identity(name):
    x = torch.randn(2, 3, 6, 6)
    shifted = SHIFTS[name](x)
    assert shifted.shape == (4, 2, 3, 6, 6)
    assert torch.equal(shifted[0], x)
    assert len({view.flatten().numpy().tobytes() for view in shifted}) == 4


def test_errors():
    with pytest.raises(InputError, match="4×6 cannot be rotated"):
        rotate(torch.zeros(1, 1, 4, 6))
    for shift in SHIFTS.values():
        with pytest.raises(InputError, match=r"shape \(3, 4, 4\)"):
            shift(torch.zeros(3, 4, 4))
