"""Two processes with batches of b train as one with batches of 2b, on an encoder without batch statistics."""

import distributed_run as script
import pytest
import torch
from safetensors.torch import load_file

DETECTORS = ["cached", "on the fly", "adamw"]
NAMED = {"dissolver": (), "pretraining": (), "phases": ("ede1_loss", "ede2_loss")}  # losses; of the others those of DIA
KINDS = [*DETECTORS, *NAMED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks):
    """What one process and two gloo processes got."""
    folder = tmp_path_factory.mktemp("distributed")
    script.main(folder, 1)
    statuses, output = forks.run_script(script.__file__, folder, 2, processes=2)  # which checks the number of processes
    assert statuses == [0, 0], output
    return load_file(folder / "1.safetensors"), load_file(folder / "2.safetensors")


def close(runs, prefix, **tolerance):
    one, two = ({name: value for name, value in run.items() if name.startswith(prefix)} for run in runs)
    assert one.keys() == two.keys()
    assert one
    for name in one:
        torch.testing.assert_close(two[name], one[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_losses(runs, kind):
    assert len(runs[0][f"{kind}/loss"]) == script.STEPS
    for name in ("loss", *NAMED.get(kind, ("contrastive_loss", "shift_loss"))):
        close(runs, f"{kind}/{name}", rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(run[f"{kind}/{name}"][0] for run in runs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_first_step(runs, kind):
    close(runs, f"{kind}/gradient/", rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 1e-2 for name, value in runs[0].items() if name.startswith(f"{kind}/gradient/"))


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights(runs, kind):
    close(runs, f"{kind}/weight/", rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_bank_is_in_dataset_order_each_image_once(runs, kind):
    count = min(script.TRAIN * script.TILES[kind] ** 2, script.BANK)
    # Shifts, images or tiles, the head's features with the encoder's and their deviation.
    assert runs[1][f"{kind}/bank"].shape == (4, count, 40)
    close(runs, f"{kind}/bank", rtol=1e-3, atol=1e-3)
    bank = runs[0][f"{kind}/bank"]
    distance = (bank[0, :, None] - bank[0, None]).norm(dim=-1) + torch.eye(count)
    assert distance.min() > 5e-3  # so that another order would not pass for the same


@pytest.mark.parametrize("kind", DETECTORS)
def test_scores_and_calibration(runs, kind):
    for name, count in (("calibration", script.CALIBRATION), ("scores", script.TEST)):
        assert runs[1][f"{kind}/{name}"].shape == (count,)
        close(runs, f"{kind}/{name}", rtol=1e-4, atol=1e-4)
        assert runs[0][f"{kind}/{name}"].unique().numel() == count
    close(runs, f"{kind}/threshold", rtol=1e-4, atol=1e-4)


def test_a_stream_that_workers_read_is_scored_whole(runs):
    for run in runs:
        torch.testing.assert_close(run["adamw/streamed"].sort().values, run["adamw/scores"].sort().values)


def test_all_processes_predict_with_the_statistics_that_are_saved(runs):
    """Batch normalisation is not synchronised on CPUs: each process has running statistics of its own."""
    means = runs[1]["batch norm/means"]
    assert means.shape[0] == 2
    assert torch.equal(means[0], means[1])
    torch.testing.assert_close(runs[1]["batch norm/rescored"], runs[1]["batch norm/calibration"], rtol=1e-5, atol=0)
