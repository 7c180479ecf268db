import numpy as np
import pytest
import torch

from hf_anomaly.ops.whitening import fit_whitening, leave_out_change


def vectors(count, groups=2, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, width, width, generator=generator)
    return torch.einsum("mkd,kde->mke", torch.randn(count, groups, width, generator=generator), mixing) + 5


@pytest.mark.parametrize("shrinkage", [0.1, 0.3, 1])
def test_whitens_the_shrunk_covariance_of_each_group(shrinkage):
    x = vectors(50)
    center, whitening = fit_whitening(x, shrinkage)
    for k in range(2):
        rows = x[:, k].double().numpy()
        np.testing.assert_allclose(center[k].numpy(), rows.mean(0), rtol=1e-5)
        covariance = np.cov(rows.T, bias=True)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 4 * np.eye(4)
        np.testing.assert_allclose(whitening[k].double().numpy() @ shrunk @ whitening[k].double().numpy().T, np.eye(4) / 4, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 1e-4])
def test_lengths_are_about_one(scale):
    x = scale * vectors(2000)
    center, whitening = fit_whitening(x, 1e-6)
    whitened = torch.einsum("mkd,ked->mke", x - center, whitening)
    torch.testing.assert_close(whitened.square().sum(-1).mean(0), torch.ones(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_vectors_than_directions(count):
    center, whitening = fit_whitening(vectors(count))
    assert center.isfinite().all()
    assert whitening.isfinite().all()


def test_equal_vectors():
    _, whitening = fit_whitening(torch.ones(5, 2, 3))
    assert whitening.isfinite().all()


class OnMPS(torch.Tensor):
    is_mps = True

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("MPS has no float64")


def test_where_there_is_no_float64():
    x, changes = vectors(20), vectors(20, seed=1)
    center, whitening = fit_whitening(x)
    found = fit_whitening(x.as_subclass(OnMPS))
    assert torch.equal(found[0], center)
    assert torch.equal(found[1], whitening)
    left = leave_out_change(whitening.as_subclass(OnMPS), changes.as_subclass(OnMPS))
    assert torch.equal(left, leave_out_change(whitening, changes))


def test_memory_of_one_group_at_a_time(peak_bytes):
    x = vectors(2000, groups=8, width=16)
    assert peak_bytes(lambda: fit_whitening(x)) < x.nbytes
