from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import sleep

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from hf_anomaly.ops.contrastive import amplified_nt_xent
from hf_anomaly.ops.distributed import draw_rows, gather_rows, local_main_process_first, world

WORLD, BATCH, SHIFTS, PIXELS, FEATURES = 2, 3, 4, 6, 5
OPTIONS = {
    "paper": {},
    "reference": {"exclude_twins": True, "divisor": "views"},
    "csi": {},
}


def draw(n):
    """Images of the three branches, (n, 3, K, pixels), a global batch drawn from a seed."""
    return torch.randn(n, 3, SHIFTS, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_and_gradient(images, design):
    """The loss of a shared linear encoder, and the gradient of its weights."""
    weight = torch.randn(FEATURES, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    branches = (images @ weight.T).permute(1, 2, 0, 3).unbind()
    loss = amplified_nt_xent(*(branches[:2] if design == "csi" else branches), **OPTIONS[design])
    loss.backward()
    return loss.detach(), weight.grad


def process(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.set_num_threads(1)
    images = draw_rows(draw, BATCH)
    results = {"world": torch.tensor(world()), "rows": images}
    x = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    gathered = gather_rows(x)
    # Rank r weights row j with j + 1 + 100 r, so the gradient tells which processes it came from.
    weights = (torch.arange(1.0, 5.0) + 100 * rank).view(4, 1).repeat(1, 2)
    gathered.backward(weights)
    results |= {"gathered": gathered.detach(), "gathered_gradient": x.grad, "weights": weights}
    file = Path(folder, "prepared")
    PartialState(cpu=True)
    with suppress(OSError), local_main_process_first():
        if rank == 0:
            sleep(0.5)
            file.touch()
        results["prepared"] = torch.tensor(file.exists())
        raise OSError  # after which the others are not waited for in vain
    results["transposed"] = gather_rows(x.detach().T)
    for design in OPTIONS:
        results[f"{design}.loss"], results[f"{design}.gradient"] = loss_and_gradient(images, design)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forks):
    """What each of two gloo processes saw."""
    folder = tmp_path_factory.mktemp("gloo")
    here = str(Path(__file__).parent)
    code = f"import sys\nsys.path.insert(0, {here!r})\nfrom test_distributed import process\nprocess({str(folder)!r})"
    statuses, output = forks.run(code, processes=WORLD)
    assert statuses == [0, 0], output
    results = [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]
    assert [r["world"].tolist() for r in results] == [[0, 2], [1, 2]]
    return results


def test_rows_of_the_global_batch(ranks):
    assert torch.equal(torch.cat([r["rows"] for r in ranks]), draw(WORLD * BATCH))


def test_gather_in_rank_order_with_gradient_of_every_process(ranks):
    expected = torch.cat([torch.arange(4.0).view(2, 2), torch.arange(4.0).view(2, 2) + 10])
    weights = torch.tensor([1.0, 2, 3, 4]) + torch.tensor([101.0, 102, 103, 104])
    for rank, result in enumerate(ranks):
        assert torch.equal(result["gathered"], expected)
        assert torch.equal(result["weights"], (torch.arange(1.0, 5.0) + 100 * rank).view(4, 1).expand(4, 2)), "it is another's, too"
        assert torch.equal(result["gathered_gradient"], weights[2 * rank : 2 * rank + 2, None].expand(2, 2))
        assert torch.equal(result["transposed"], torch.cat([expected[:2].T, expected[2:].T]))


def test_one_process_prepares_and_the_others_wait(ranks):
    assert [r["prepared"].item() for r in ranks] == [True, True]


@pytest.mark.parametrize("design", OPTIONS)
def test_two_processes_train_as_one(ranks, design):
    loss, gradient = loss_and_gradient(draw(WORLD * BATCH), design)
    losses, gradients = (torch.stack([r[f"{design}.{name}"] for r in ranks]) for name in ("loss", "gradient"))
    assert not torch.isclose(losses[0], losses[1])  # each is that of its own anchors
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients.mean(dim=0), gradient, rtol=1e-10, atol=1e-14)


def test_one_process():
    x = torch.randn(3, 2)
    assert world() == (0, 1)
    assert gather_rows(x) is x
    assert torch.equal(draw_rows(draw, 4), draw(4))
