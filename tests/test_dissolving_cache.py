"""Datasets with a column of dissolved images, and their cache."""

import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_anomaly.dissolving import (
    DiffusionDissolver,
    GaussianDissolver,
    IdentityDissolver,
    MedianDissolver,
    build_scheduler,
    build_unet,
    dissolve_dataset,
    draw_integers,
)


def diffusion_dissolver(num_channels=1):
    torch.manual_seed(0)
    return DiffusionDissolver(build_unet(16, num_channels, (8, 16)), build_scheduler())


@pytest.fixture(scope="module")
def diffusion():
    return diffusion_dissolver()


class Processor:
    """A stand-in: gray or RGB by the mode of the first image, square, in [−1, 1]."""

    def __init__(self, size=16):
        self.size = size

    def to_dict(self):
        return {"size": self.size}

    def __call__(self, images, return_tensors):
        arrays = [np.asarray(image.convert(images[0].mode).resize((self.size, self.size))) for image in images]
        x = torch.from_numpy(np.stack(arrays)).float() / 127.5 - 1
        return {"pixel_values": x[:, None] if x.ndim == 3 else x.movedim(-1, 1)}


class CountingMedian(MedianDissolver):
    calls = 0

    def _dissolve(self, x, timesteps):
        self.calls += 1
        return super()._dissolve(x, timesteps)


def toy_dataset(n=7, mode="L"):
    levels = np.random.default_rng(0).integers(0, 256, (n, 16, 16) if mode == "L" else (n, 16, 16, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["normal", "anomaly"])})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(level) for level in levels], "label": [0] * n}, features=features)


def images_of(row):
    """The column is stored undecoded, for the trainer to decode once."""
    return [datasets.Image().decode_example(value) for value in row["dissolved_images"]]


def pixels(row):
    return torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images_of(row)]).float() / 127.5 - 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("decode", [True, False])
def test_dissolved_column(tmp_path, mode, decode):
    dissolver = diffusion_dissolver(len(mode))
    dataset = toy_dataset(5, mode)
    original = dataset["image"][:]
    dissolved = dissolve_dataset(
        dataset.cast_column("image", datasets.Image(decode=decode)),
        dissolver,
        Processor(),
        num_variants=3,
        batch_size=2,
        cache_dir=tmp_path,
    )
    assert dissolved.features["dissolved_images"] == datasets.List(datasets.Image(decode=False))
    assert dissolved.features["image"] == datasets.Image(decode=decode)
    assert dissolved["label"][:] == [0] * 5
    timesteps = dissolver.sample_timesteps(15, "cpu", torch.Generator().manual_seed(0)).view(5, 3)
    assert len(timesteps.unique()) > 5
    for row, image, t in zip(dissolved, original, timesteps, strict=True):
        stored = images_of(row)
        assert [(s.mode, s.size, s.format) for s in stored] == [(mode, (16, 16), "PPM")] * 3
        x = Processor()([image], "pt")["pixel_values"]
        expected = torch.cat([dissolver(x, t[v : v + 1]) for v in range(3)])
        got = pixels(row)[:, None] if mode == "L" else pixels(row).movedim(-1, 1)
        torch.testing.assert_close(got, expected, atol=0.51 / 127.5, rtol=0)


def test_batch_size_does_not_change_the_variants(tmp_path, diffusion):
    made = [
        dissolve_dataset(toy_dataset(), diffusion, Processor(), num_variants=2, batch_size=b, cache_dir=tmp_path / str(b)) for b in (2, 64)
    ]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(pixels(one), pixels(other), atol=1.01 / 127.5, rtol=0)  # a rounding may fall the other way
    other_seed = dissolve_dataset(toy_dataset(), diffusion, Processor(), num_variants=2, seed=1, cache_dir=tmp_path)
    assert not torch.allclose(pixels(made[0][0]), pixels(other_seed[0]), atol=2 / 127.5)


def test_deterministic_dissolvers_need_one_variant(tmp_path):
    dissolved = dissolve_dataset(toy_dataset(), MedianDissolver(3), Processor(), num_variants=8, cache_dir=tmp_path)
    x = Processor()(toy_dataset()["image"][:], "pt")["pixel_values"]
    for row, expected in zip(dissolved, MedianDissolver(3)(x), strict=True):
        assert len(row["dissolved_images"]) == 1
        torch.testing.assert_close(pixels(row), expected, atol=1e-6, rtol=0)  # a median of 8-bit levels is an 8-bit level


@pytest.mark.parametrize("blur", [GaussianDissolver, MedianDissolver])
def test_a_variant_for_every_kernel_size(blur, tmp_path):
    for num_variants, expected in ((1, 1), (2, 2), (4, 2)):  # beyond that it would be the same again
        dissolved = dissolve_dataset(toy_dataset(), blur([7, 3, 3]), Processor(), num_variants=num_variants, cache_dir=tmp_path)
        assert all(len(row["dissolved_images"]) == expected for row in dissolved)
    single = dissolve_dataset(toy_dataset(), blur(7), Processor(), cache_dir=tmp_path)
    for row, other in zip(dissolved, single, strict=True):
        assert torch.equal(pixels(row)[1:], pixels(other))


class Rolled(IdentityDissolver):
    """By a random number of columns."""

    is_deterministic = False

    def _dissolve(self, x, timesteps):
        return torch.stack([image.roll(t, -1) for image, t in zip(x, timesteps.tolist(), strict=True)])


class Random(Rolled):
    def sample_timesteps(self, batch_size, device="cpu", generator=None):
        return draw_integers(0, 16, batch_size, device, generator)


def test_variants_of_an_own_random_dissolver(tmp_path, refused):
    dissolved = dissolve_dataset(toy_dataset(), Random(), Processor(), num_variants=8, cache_dir=tmp_path)
    timesteps = Random().sample_timesteps(7 * 8, generator=torch.Generator().manual_seed(0)).view(7, 8)
    assert len(timesteps.unique()) > 8
    for row, image, drawn in zip(dissolved, toy_dataset()["image"][:], timesteps.tolist(), strict=True):
        expected = [np.roll(np.asarray(image), t, -1) for t in drawn]
        np.testing.assert_array_equal([np.asarray(variant) for variant in images_of(row)], expected)
    with refused("Rolled", "sample_timesteps"):
        dissolve_dataset(toy_dataset(), Rolled(), Processor(), cache_dir=tmp_path)


def test_cache_is_found_again(tmp_path):
    dissolver = CountingMedian(3)
    first = dissolve_dataset(toy_dataset(), dissolver, Processor(), cache_dir=tmp_path)
    assert dissolver.calls == 1
    again = dissolve_dataset(toy_dataset(), dissolver, Processor(), cache_dir=tmp_path)
    assert dissolver.calls == 1
    assert torch.equal(pixels(first[3]), pixels(again[3]))
    dissolve_dataset(toy_dataset(), dissolver, Processor(), num_variants=3, seed=5, cache_dir=tmp_path)
    assert dissolver.calls == 1, "neither V nor the seed matters to a deterministic dissolver"
    dissolve_dataset(toy_dataset(6), dissolver, Processor(), cache_dir=tmp_path)
    dissolve_dataset(toy_dataset(), dissolver, Processor(12), cache_dir=tmp_path)
    assert dissolver.calls == 3
    other = CountingMedian(5)
    dissolve_dataset(toy_dataset(), other, Processor(), cache_dir=tmp_path)
    assert other.calls == 1
    assert len(list(tmp_path.glob("dissolved-*.arrow"))) == 4


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_cache_that_is_cut_off_is_made_anew(tmp_path, caplog, kept):
    dissolver = CountingMedian(3)
    first = pixels(dissolve_dataset(toy_dataset(), dissolver, Processor(), cache_dir=tmp_path)[3])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert torch.equal(pixels(dissolve_dataset(toy_dataset(), dissolver, Processor(), cache_dir=tmp_path)[3]), first)
    assert dissolver.calls == 2
    assert f"{file} is damaged" in caplog.text


def dataset_of_files(*names):
    return datasets.Dataset.from_dict({"image": list(names)}, features=datasets.Features({"image": datasets.Image()}))


def test_replaced_files_are_dissolved_anew(tmp_path, monkeypatch, refused):
    def dissolved():
        return dissolve_dataset(dataset_of_files("x.png"), dissolver, Processor(), cache_dir=tmp_path / "cache")[0]

    def save(folder, level):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("L", (16, 16), level).save(tmp_path / folder / "x.png")
        os.utime(tmp_path / folder / "x.png", ns=(0, times.pop()))

    dissolver, times = CountingMedian(3), [3, 1, 1]
    save("one", 10)
    save("other", 20)
    monkeypatch.chdir(tmp_path / "one")
    for calls in (1, 1):
        assert images_of(dissolved())[0].getextrema() == (10, 10)
        assert dissolver.calls == calls
    monkeypatch.chdir(tmp_path / "other")  # another file of the same relative path, size and time
    assert images_of(dissolved())[0].getextrema() == (20, 20)
    save("other", 30)
    assert images_of(dissolved())[0].getextrema() == (30, 30)
    assert dissolver.calls == 3
    (tmp_path / "other" / "x.png").unlink()
    with refused("x.png", "restore"):
        dissolved()


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dissolve_dataset(toy_dataset(), MedianDissolver(3), Processor())
    assert len(list((tmp_path / "hf_anomaly").glob("*.arrow"))) == 1


def test_fresh_process(tmp_path, diffusion, forks):
    """Fingerprints are stable across processes, so the cache is found there too; a bad name offline is one line."""
    diffusion.save_pretrained(tmp_path / "d")
    dissolved = dissolve_dataset(toy_dataset(), CountingMedian(3), Processor(), cache_dir=tmp_path / "cache")
    script = """
import json, hf_anomaly
from test_dissolving_cache import CountingMedian, DiffusionDissolver, Processor, dissolve_dataset, images_of, np, toy_dataset

dissolver = CountingMedian(3)
found = dissolve_dataset(toy_dataset(), dissolver, Processor(), cache_dir=FOLDER + "/cache")
diffusion = DiffusionDissolver.from_pretrained(FOLDER + "/d")
try:
    DiffusionDissolver.from_pretrained("nobody/nothing")
except hf_anomaly.HubError as error:
    message = str(error)
print(json.dumps([dissolver.calls, diffusion.fingerprint(), np.asarray(images_of(found[3])[0]).tolist(), message]))
"""
    here = str(Path(__file__).parent)
    (status,), output = forks.run(f"import sys\nsys.path.insert(0, {here!r})\nFOLDER = {str(tmp_path)!r}\n{script}")
    assert status == 0, output
    calls, fingerprint, levels, message = json.loads(output.splitlines()[-1])
    assert calls == 0
    assert fingerprint == diffusion.fingerprint()
    assert levels == np.asarray(images_of(dissolved[3])[0]).tolist()
    assert "nobody/nothing" in message
    assert "\n" not in message


def test_transform_on_the_dataset_is_dropped(tmp_path):
    transformed = toy_dataset().with_transform(lambda batch: {"pixel_values": batch["image"]})
    dissolved = dissolve_dataset(transformed, MedianDissolver(3), Processor(), cache_dir=tmp_path)
    assert set(dissolved[0]) == {"image", "label", "dissolved_images"}


def test_refuses_bad_datasets(tmp_path, refused):
    dissolver, dataset = MedianDissolver(3), toy_dataset()
    with refused("IterableDataset"):
        dissolve_dataset(dataset.to_iterable_dataset(), dissolver, Processor())
    with refused("'image'", "picture", "label"):
        dissolve_dataset(dataset.rename_column("image", "picture"), dissolver, Processor())
    with refused("no rows"):
        dissolve_dataset(dataset.select([]), dissolver, Processor())
    with refused("num_variants"):
        dissolve_dataset(dataset, dissolver, Processor(), num_variants=0)
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    broken = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    dataset = datasets.Dataset.from_dict({"image": broken}, features=datasets.Features({"image": datasets.Image()}))
    with refused("row 1"):
        dissolve_dataset(dataset, dissolver, Processor(), cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


def test_what_is_not_finite_is_refused(tmp_path, refused):
    """Levels of 8 bits would not show it."""
    dissolver = diffusion_dissolver()
    next(dissolver.unet.parameters()).fill_(torch.nan)
    with refused("the diffusion dissolver gives values that are not finite"):
        dissolve_dataset(toy_dataset(), dissolver, Processor(), num_variants=1, cache_dir=tmp_path)
