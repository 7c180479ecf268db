import math

import numpy as np
import pytest
import torch

from hf_anomaly.errors import InputError
from hf_anomaly.ops import contrastive
from hf_anomaly.ops.contrastive import amplified_nt_xent


def oracle(z_a, z_b, z_d=None, *, temperature=0.5, exclude_twins=False, divisor="anchors"):
    """Eq. 6-7, a pair at a time."""
    shifts, images, _ = z_a.shape
    branches = {"A": z_a, "B": z_b} | ({} if z_d is None else {"D": z_d})
    views = [(name, k, i) for name in branches for k in range(shifts) for i in range(images)]

    def similarity(u, v):
        a, b = (branches[name][k, i].double().numpy() for name, k, i in (u, v))
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    total, anchors = 0.0, 0
    for anchor in views:
        name, k, i = anchor
        if name == "D":
            continue
        anchors += 1
        denominator = 0.0
        for other in views:
            twin = other == ("D", k, i)
            if other != anchor and not (exclude_twins and twin):
                denominator += math.exp(similarity(anchor, other) / temperature)
        positive = ("B" if name == "A" else "A", k, i)
        total -= math.log(math.exp(similarity(anchor, positive) / temperature) / denominator)
    return total / (anchors if divisor == "anchors" else len(views))


def projections(branches, shifts=4, images=3, features=5):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shifts, images, features, dtype=torch.float64, generator=generator) for _ in range(branches)]


@pytest.mark.parametrize("divisor", ["anchors", "views"])
@pytest.mark.parametrize(("branches", "exclude_twins"), [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_equals_the_formula(branches, exclude_twins, divisor, temperature):
    z = projections(branches)
    options = {"exclude_twins": exclude_twins, "divisor": divisor, "temperature": temperature}
    assert amplified_nt_xent(*z, **options).item() == pytest.approx(oracle(*z, **options), rel=1e-12)


def test_one_image_and_one_shift():
    z = projections(3, shifts=1, images=1)
    assert amplified_nt_xent(*z).item() == pytest.approx(oracle(*z), rel=1e-12)
    assert amplified_nt_xent(*z[:2]).item() == pytest.approx(0.0, abs=1e-12)  # the positive is the whole denominator


@pytest.mark.parametrize("exclude_twins", [False, True])
def test_gradient_equals_finite_differences(exclude_twins):
    z = [x.requires_grad_() for x in projections(3, shifts=2, images=2, features=3)]
    assert torch.autograd.gradcheck(lambda *z: amplified_nt_xent(*z, exclude_twins=exclude_twins), z)


@pytest.mark.parametrize("exclude_twins", [False, True])
def test_pieces_of_the_rows_change_nothing(monkeypatch, exclude_twins):
    def loss_and_gradients():
        z = [x.requires_grad_() for x in projections(3)]
        loss = amplified_nt_xent(*z, exclude_twins=exclude_twins)
        return [loss.detach(), *torch.autograd.grad(3 * loss, z)]

    whole = loss_and_gradients()
    monkeypatch.setattr(contrastive, "_PIECE", 100)  # two rows of 36 views
    for a, b in zip(loss_and_gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_matrix_of_all_pairs_is_held(monkeypatch, peak_bytes):
    """Forward and backward together; autograd of the plain formula takes four such matrices."""
    monkeypatch.setattr(contrastive, "_PIECE", 2**16)
    z = [torch.randn(4, 128, 16, requires_grad=True) for _ in range(3)]
    matrix = 4 * (8 * 128) * (12 * 128)  # bytes of float32, anchors × views
    assert peak_bytes(lambda: amplified_nt_xent(*z).backward()) < matrix / 2


def test_designs_differ_in_the_twin_alone():
    z_a, z_b, z_d = projections(3)
    paper, reference = amplified_nt_xent(z_a, z_b, z_d), amplified_nt_xent(z_a, z_b, z_d, exclude_twins=True)
    assert reference < paper
    # A twin of another shift stays a negative in design (b): moving the twins to the next shift changes the loss.
    assert not torch.isclose(reference, amplified_nt_xent(z_a, z_b, z_d.roll(1, dims=0), exclude_twins=True))


def test_stable_and_exact_at_small_temperature():
    z = projections(3)
    loss = amplified_nt_xent(*[x.float() for x in z], temperature=1e-3)  # exp(1000) is infinite in float64 even
    assert loss.item() == pytest.approx(amplified_nt_xent(*z, temperature=1e-3).item(), rel=1e-4)


def test_half_precision_and_autocast_are_computed_in_float32():
    z = [x.bfloat16() for x in projections(3)]
    expected = amplified_nt_xent(*[x.float() for x in z])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(amplified_nt_xent(*z), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"z_b": torch.zeros(4, 2, 5)}, "z_b"),
        ({"z_d": torch.zeros(2, 3, 5)}, "z_d"),
        ({"z_a": torch.zeros(12, 5)}, "z_a"),
        ({"z_a": torch.zeros(4, 0, 5)}, "z_a"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"divisor": "batch"}, "divisor"),
        ({"z_d": None, "exclude_twins": True}, "exclude_twins"),
    ],
)
def test_errors_name_the_culprit(change, culprit):
    arguments = dict(zip(("z_a", "z_b", "z_d"), projections(3), strict=True)) | change
    with pytest.raises(InputError, match=f"^{culprit}: ") as error:
        amplified_nt_xent(**arguments)
    assert "\n" not in str(error.value)
