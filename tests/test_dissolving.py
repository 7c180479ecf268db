"""The dissolvers against oracles and diffusers' own scheduler, and their folders in plain diffusers."""

import importlib
import inspect
import json
import math
import os
import sys
import textwrap

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from hf_anomaly.dissolving import (
    DISSOLVERS,
    DenoisingModel,
    DiffusionDissolver,
    Dissolver,
    GaussianDissolver,
    IdentityDissolver,
    MedianDissolver,
    ResizeDissolver,
    build_scheduler,
    build_unet,
    default_resolution,
    dissolving_quality,
    draw_integers,
    network_resolution,
)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth_images(n, size=16, seed=0):
    return F.interpolate(images(n, 1, 3, 3, seed=seed), (size, size), mode="bicubic").clamp(-1, 1)


def tiny_unet(resolution=16, num_channels=1, widths=(8, 16)):
    torch.manual_seed(0)
    return build_unet(resolution, num_channels, widths)


def silent_unet(resolution=16):
    """Its last layer is zero, so that it predicts no noise whatever it sees."""
    unet = tiny_unet(resolution)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


@pytest.fixture
def diffusion():
    return DiffusionDissolver(tiny_unet(), build_scheduler())


# Diffusion: Eq. 4 ----------------------------------------------------------------------------------------------------------------


def test_schedules():
    """The t ranges of the paper mean what they should on the cosine schedule only."""
    for scheduler, expected in [(build_scheduler(), (0.059, 0.215)), (DDPMScheduler(1000, beta_schedule="linear"), (0.111, 0.409))]:
        noise = (1 - scheduler.alphas_cumprod[[30, 130]]) ** 0.5
        assert noise.numpy() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_equals_scheduler_step_bit_for_bit(prediction_type):
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    dissolver = DiffusionDissolver(tiny_unet(), scheduler)
    x = images(5, 1, 16, 16)
    timesteps = torch.tensor([0, 30, 77, 130, 990])
    dissolved = dissolver(x, timesteps)
    with torch.no_grad():
        output = dissolver.unet(x, timesteps).sample
    for i, t in enumerate(timesteps.tolist()):
        expected = scheduler.step(output[i : i + 1], t, x[i : i + 1]).pred_original_sample.clamp(-1, 1)
        assert torch.equal(dissolved[i : i + 1], expected)


def test_equation_4_by_hand(diffusion):
    x, t = images(1, 1, 16, 16), 100
    alpha_bar = np.prod(1 - diffusion.scheduler.betas[: t + 1].double().numpy())
    with torch.no_grad():
        noise = diffusion.unet(x, torch.tensor([t])).sample.double().numpy()
    expected = ((x.double().numpy() - np.sqrt(1 - alpha_bar) * noise) / np.sqrt(alpha_bar)).clip(-1, 1)
    np.testing.assert_allclose(diffusion(x, torch.tensor([t])).numpy(), expected, atol=1e-5)


def test_each_image_has_its_own_timestep(diffusion):
    x, timesteps = images(4, 1, 16, 16), torch.tensor([30, 60, 90, 130])
    together = diffusion(x, timesteps)
    one_by_one = torch.cat([diffusion(x[i : i + 1], timesteps[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    assert not torch.allclose(together, diffusion(x, timesteps.flip(0)), atol=1e-3)


def test_sampled_timesteps():
    dissolver = DiffusionDissolver(tiny_unet(), build_scheduler(), t_min=3, t_max=5)
    drawn = dissolver.sample_timesteps(200, "cpu", torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.long
    assert drawn.unique().tolist() == [3, 4, 5]
    assert torch.equal(drawn, dissolver.sample_timesteps(200, "cpu", torch.Generator().manual_seed(1)))
    x = images(3, 1, 16, 16)
    torch.manual_seed(0)
    timesteps = dissolver.sample_timesteps(3)
    torch.manual_seed(0)
    assert torch.equal(dissolver(x), dissolver(x, timesteps))


@pytest.mark.parametrize("size", [(16, 16), (13, 14), (9, 16), (5, 16), (1, 1)])
def test_padding_and_cropping(size):
    """With a network that predicts no noise Eq. 4 is x / sqrt(ᾱ): the crop must give every pixel back in its place."""
    dissolver = DiffusionDissolver(silent_unet(), build_scheduler())
    x, t = images(2, 1, *size) / 2, torch.tensor([130, 40])
    assert torch.equal(dissolver(x, t), x / dissolver.alphas_cumprod[t].view(-1, 1, 1, 1) ** 0.5)


def test_padding_is_reflection():
    seen = []

    class Recording(UNet2DModel):
        def forward(self, sample, timestep):
            seen.append(sample)
            return super().forward(sample, timestep)

    dissolver = DiffusionDissolver(Recording.from_config(tiny_unet().config), build_scheduler())
    x = images(1, 1, 13, 12)
    dissolver(x)
    np.testing.assert_array_equal(seen[0][0, 0].numpy(), np.pad(x[0, 0].numpy(), ((1, 2), (2, 2)), mode="reflect"))
    dissolver(images(1, 1, 4, 4))
    np.testing.assert_array_equal(seen[1][0, 0].numpy(), np.pad(images(4, 4).numpy(), 6, mode="edge"))
    dissolver(images(1, 1, 40, 10))
    assert seen[2].shape == (1, 1, 16, 16)


def test_larger_images_go_down_and_back():
    dissolver = DiffusionDissolver(silent_unet(), build_scheduler())
    x, t = images(2, 1, 24, 40) / 2, torch.tensor([100, 100])
    small = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    expected = F.interpolate(small / dissolver.alphas_cumprod[100] ** 0.5, (24, 40), mode="bilinear", antialias=True)
    torch.testing.assert_close(dissolver(x, t), expected)


def test_range_and_dtype(diffusion):
    extreme = images(2, 1, 16, 16).sign()
    assert diffusion(extreme, torch.tensor([999, 999])).abs().max() <= 1
    assert diffusion(extreme.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resized(dtype):
    x = smooth_images(2, 48)
    dissolver = ResizeDissolver(8)
    dissolved = dissolver(x.to(dtype))
    assert dissolved.dtype == dtype
    torch.testing.assert_close(dissolved.float(), dissolver(x), atol=0.02, rtol=0)


def test_network_in_training_is_left_alone():
    unet = tiny_unet()
    dissolver = DiffusionDissolver(unet, build_scheduler())
    assert unet.training
    assert all(p.requires_grad for p in unet.parameters())
    assert not dissolver.unet.training
    assert not any(p.requires_grad for p in dissolver.unet.parameters())
    assert DiffusionDissolver(dissolver.unet, build_scheduler()).unet is dissolver.unet


def test_built_on_the_meta_device(tmp_path, diffusion):
    diffusion.save_pretrained(tmp_path / "d")
    with torch.device("meta"):
        assert not build_scheduler().alphas_cumprod.is_meta
        loaded = DiffusionDissolver.from_pretrained(tmp_path / "d")
        empty = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    assert empty.alphas_cumprod.is_meta
    assert loaded.fingerprint() == diffusion.fingerprint()
    assert torch.equal(DiffusionDissolver(diffusion.unet, empty).alphas_cumprod, diffusion.alphas_cumprod)


# Blur, resize, identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel_size", "sigma", "used"), [(3, None, 0.8), (11, None, 2.0), (7, 1.1, 1.1)])
def test_gaussian_against_numpy(kernel_size, sigma, used):
    x = images(2, 3, 14, 17)
    offsets = np.arange(kernel_size) - kernel_size // 2
    kernel = np.exp(-(offsets**2) / (2 * used**2))
    kernel /= kernel.sum()
    expected = x[1, 2].double().numpy()
    for axis in (0, 1):
        expected = scipy.ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
    np.testing.assert_allclose(GaussianDissolver(kernel_size, sigma)(x)[1, 2].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_median_against_scipy(kernel_size):
    x = images(2, 3, 14, 17)
    expected = scipy.ndimage.median_filter(x[1, 2].numpy(), kernel_size, mode="mirror")
    np.testing.assert_array_equal(MedianDissolver(kernel_size)(x)[1, 2].numpy(), expected)


@pytest.mark.parametrize("blur", [GaussianDissolver, MedianDissolver])
def test_several_kernel_sizes(blur, tmp_path, refused):
    x, several = images(6, 1, 16, 16), blur([7, 3, 3])
    kernels = torch.tensor([3, 7, 7, 3, 7, 5])
    expected = torch.cat([blur(k)(image[None]) for image, k in zip(x, kernels.tolist(), strict=True)])
    last_bits = 1e-6 if blur is GaussianDissolver else 0  # those of a convolution go with its batch size
    torch.testing.assert_close(several(x, kernels), expected, rtol=0, atol=last_bits)
    drawn = several.sample_timesteps(200, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.long
    assert set(drawn.tolist()) == {3, 7}
    assert 70 < (drawn == 3).sum() < 130
    assert torch.equal(drawn, several.sample_timesteps(200, generator=torch.Generator().manual_seed(0)))
    assert several.spread_timesteps() == [3, 7]
    assert blur(range(3, 23, 2)).spread_timesteps(3) in ([3, 11, 21], [3, 13, 21])
    torch.manual_seed(0)
    undrawn = several(x)
    torch.manual_seed(0)
    assert torch.equal(undrawn, several(x, several.sample_timesteps(6)))
    several.save_pretrained(tmp_path)
    loaded = Dissolver.from_pretrained(tmp_path)
    assert loaded.fingerprint() == several.fingerprint() != blur(3).fingerprint()
    for kernel in (4, 1, -3):
        with refused("kernel", kernel):
            several(x, torch.full((6,), kernel))
    with refused("timesteps"):
        several(x, kernels[:3])


def test_blur_of_larger_images_is_at_the_dissolving_resolution():
    x = images(1, 1, 48, 48)
    small = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    expected = F.interpolate(GaussianDissolver(5)(small), (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(GaussianDissolver(5, resolution=16)(x), expected)


def test_resize_and_identity():
    x = images(1, 1, 16, 12)
    assert torch.equal(IdentityDissolver()(x), x)
    for resolution, size in ((16, (8, 6)), (15, (15, 15)), (4, (4, 4))):  # only images that fit go down to half of their size
        small = F.interpolate(x, size, mode="bilinear", antialias=True)
        expected = F.interpolate(small, (16, 12), mode="bilinear", antialias=True)
        torch.testing.assert_close(ResizeDissolver(resolution)(x), expected)
    assert ResizeDissolver(8)(images(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("dissolver", [GaussianDissolver(5), MedianDissolver(3), ResizeDissolver(8), IdentityDissolver()])
def test_deterministic_dissolvers(dissolver, tmp_path):
    assert DISSOLVERS[dissolver.kind] is type(dissolver)
    assert dissolver.sample_timesteps(3, "cpu") is None
    x = images(3, 1, 16, 16)
    torch.testing.assert_close(dissolver(x)[1:2], dissolver(x[1:2]))
    dissolver.save_pretrained(tmp_path / "d")
    loaded = Dissolver.from_pretrained(tmp_path / "d")
    assert type(loaded) is type(dissolver)
    assert loaded.fingerprint() == dissolver.fingerprint()


# Folders -------------------------------------------------------------------------------------------------------------------------


def test_plain_diffusers_loads_the_folder(tmp_path, diffusion):
    diffusion.training_notes = {"steps": 7}
    diffusion.save_pretrained(tmp_path / "new" / "d")
    folder = tmp_path / "new" / "d"
    assert sorted(p.name for p in folder.iterdir()) == ["dissolver_config.json", "model_index.json", "scheduler", "unet"]
    assert sorted(p.name for p in (folder / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["d"]
    assert json.loads((folder / "dissolver_config.json").read_text()) == {
        "kind": "diffusion",
        "t_min": 30,
        "t_max": 130,
        "training": {"steps": 7},
    }
    x, t = images(1, 1, 16, 16), torch.tensor([50])
    with torch.no_grad():
        expected = diffusion.unet(x, t).sample
        pipeline = DDPMPipeline.from_pretrained(folder)
        for unet in (UNet2DModel.from_pretrained(folder, subfolder="unet"), pipeline.unet):
            torch.testing.assert_close(unet(x, t).sample, expected, atol=1e-5, rtol=0)
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_round_trip(tmp_path):
    dissolver = DiffusionDissolver(tiny_unet(), build_scheduler(), t_min=5, t_max=50)
    detector = tmp_path / "detector"
    dissolver.training_notes = {"steps": 7}
    dissolver.save_pretrained(detector / "dissolver")
    for loaded in (DiffusionDissolver.from_pretrained(detector), Dissolver.from_pretrained(str(detector / "dissolver"))):
        assert (loaded.t_min, loaded.t_max, loaded.training_notes) == (5, 50, {"steps": 7})
        assert loaded.fingerprint() == dissolver.fingerprint()
        assert not loaded.unet.training
        assert not any(p.requires_grad for p in loaded.unet.parameters())
        x, t = images(1, 1, 16, 16), torch.tensor([50])
        with torch.no_grad():
            assert torch.equal(loaded.unet(x, t).sample, dissolver.unet(x, t).sample), "bit for bit as before"
        assert torch.equal(loaded(x, t), dissolver(x, t))
    overridden = DiffusionDissolver.from_pretrained(detector, t_max=40)
    assert (overridden.t_min, overridden.t_max) == (5, 40)
    (detector / "dissolver" / "dissolver_config.json").unlink()
    plain = DiffusionDissolver.from_pretrained(detector)
    assert (plain.t_min, plain.t_max) == (30, 130)


def test_saving_over_a_folder(tmp_path, diffusion):
    folder = tmp_path / "d"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    (folder / "logs" / "log").write_text("mine too")
    (folder / "unet").mkdir()
    (folder / "unet" / "stale.bin").write_text("old")
    diffusion.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "logs" / "log").read_text() == "mine too"
    assert not (folder / "unet" / "stale.bin").exists()
    assert DiffusionDissolver.from_pretrained(folder).fingerprint() == diffusion.fingerprint()
    before = (folder / "dissolver_config.json").read_bytes()
    diffusion.training_notes = {"x": object()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        diffusion.save_pretrained(folder)
    assert (folder / "dissolver_config.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "dissolver_config.json",
        "logs",
        "model_index.json",
        "scheduler",
        "unet",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_saving_into_the_working_directory(tmp_path, diffusion, monkeypatch):
    """The folder itself stays: it may be a process's working directory or a mount point."""
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    for _ in range(2):
        diffusion.save_pretrained(".")
        assert os.getcwd() == str(tmp_path)
        assert tmp_path.stat().st_ino == inode
        assert Dissolver.from_pretrained(".").fingerprint() == diffusion.fingerprint()


def test_nothing_is_written_beside_the_folder(tmp_path):
    """The folder above may be read-only or another file system."""

    class Recording(IdentityDissolver):
        def _write(self, folder):
            super()._write(folder)
            assert [path.name for path in tmp_path.iterdir()] == ["d"]

    Recording().save_pretrained(tmp_path / "d")
    assert type(Dissolver.from_pretrained(tmp_path / "d")) is IdentityDissolver


def test_t_beyond_the_training(tmp_path, diffusion, refused):
    """The network never saw such noise."""
    diffusion.training_notes = {"max_timestep": 131}
    diffusion.save_pretrained(tmp_path / "d")
    assert Dissolver.from_pretrained(tmp_path / "d").t_max == 130
    with refused(tmp_path / "d", "t_max 131", "max_timestep 131"):
        DiffusionDissolver.from_pretrained(tmp_path / "d", t_max=131)
    diffusion.training_notes = {"max_timestep": 100}
    diffusion.save_pretrained(tmp_path / "d")
    with refused("t_max 130", "max_timestep 100"):
        Dissolver.from_pretrained(tmp_path / "d")
    assert DiffusionDissolver.from_pretrained(tmp_path / "d", t_max=99).t_max == 99
    diffusion.training_notes = {"max_timestep": None}
    diffusion.save_pretrained(tmp_path / "d")
    assert DiffusionDissolver.from_pretrained(tmp_path / "d", t_max=999).t_max == 999


def test_fingerprints_differ(diffusion):
    fingerprints = [
        diffusion.fingerprint(),
        DiffusionDissolver(diffusion.unet, diffusion.scheduler, t_max=131).fingerprint(),
        DiffusionDissolver(diffusion.unet, DDPMScheduler(1000)).fingerprint(),
        DiffusionDissolver(silent_unet(), build_scheduler()).fingerprint(),
        GaussianDissolver().fingerprint(),
        GaussianDissolver(sigma=1.0).fingerprint(),
        GaussianDissolver(resolution=64).fingerprint(),
        MedianDissolver().fingerprint(),
        ResizeDissolver().fingerprint(),
        IdentityDissolver().fingerprint(),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_fingerprints_of_the_package_stay():
    """Caches and runs of earlier versions are found by them."""
    assert MedianDissolver(3).fingerprint() == "52d07dc6da87a3b2dd9bed3c2708f351e96c7b4533c81dfa3e38c0d55960269b"
    assert ResizeDissolver().fingerprint() == "35a92619b2d7d67791d8e45d0385c90fdf15bf0793471cab0ed76741fcbc19e2"


@pytest.mark.parametrize("base", [IdentityDissolver, MedianDissolver])
def test_fingerprints_cover_the_code_of_an_own_class(base, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = f"from hf_anomaly import {base.__name__}\n\nclass Mixin:\n    scale = 1\n\nclass Own(Mixin, {base.__name__}):\n    shift = 2\n"
    fingerprints = [base().fingerprint()]
    for code in (source, source, source.replace("scale = 1", "scale = 3"), source.replace("shift = 2", "shift = 4")):
        (tmp_path / "own_dissolver.py").write_text(code)
        monkeypatch.delitem(sys.modules, "own_dissolver", raising=False)
        fingerprints.append(importlib.import_module("own_dissolver").Own().fingerprint())
    assert fingerprints[1] == fingerprints[2]
    assert len(set(fingerprints)) == 4
    monkeypatch.delitem(sys.modules, "own_dissolver")
    namespaces = [{"__name__": "notebook"}, {"__name__": "notebook"}]  # whose classes have no file
    for namespace in namespaces:
        exec(source, namespace)
    one, other = (namespace["Own"] for namespace in namespaces)
    assert one().fingerprint() == one().fingerprint() != other().fingerprint()


def test_settings_of_an_own_class_are_complete(tmp_path, refused):
    class Darker(MedianDissolver):
        def __init__(self, kernel_size=3, *, strength):
            super().__init__(kernel_size)
            self.strength = strength

    class Told(Darker):
        def settings(self):
            return {**super().settings(), "strength": self.strength}

    class Network(Darker):
        def _weights(self):
            yield bytes([self.strength])

    class Anything(MedianDissolver):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)

    for use in (Darker.fingerprint, lambda dissolver: dissolver.save_pretrained(tmp_path)):
        with refused("Darker takes strength", "settings()"):
            use(Darker(strength=1))
    for own in (Told, Network):
        assert own(strength=1).fingerprint() != own(strength=2).fingerprint()
    assert Anything(3).fingerprint() != Anything(5).fingerprint()


# Own dissolvers ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mask(monkeypatch):
    """The class that the docstring of `Dissolver` shows, entered in DISSOLVERS."""
    lines = inspect.getdoc(Dissolver).partition("Attributes:")[0].splitlines()
    monkeypatch.setitem(DISSOLVERS, "mask", None)
    namespace = {"DISSOLVERS": DISSOLVERS, "Dissolver": Dissolver, "draw_integers": draw_integers, "torch": torch}
    exec(textwrap.dedent("\n".join(line for line in lines if line.startswith("    "))), namespace)
    return namespace["MaskDissolver"]


def test_a_random_dissolver(mask, tmp_path):
    x, dissolver = images(3, 2, 8, 8), mask(0.25)
    seeds = torch.tensor([5, 6, 5])
    dissolved = dissolver(x, seeds)
    kept = dissolved == x
    assert 0.6 < kept.float().mean() < 0.9
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(dissolver(x[1:2], seeds[1:2]), dissolved[1:2]), "whatever its companions"
    assert len(dissolver.spread_timesteps(4)) == 4
    dissolver.save_pretrained(tmp_path)
    for loaded in (Dissolver.from_pretrained(tmp_path), mask.from_pretrained(tmp_path)):
        assert loaded.fingerprint() == dissolver.fingerprint() != mask().fingerprint()


def test_an_own_class_loads_what_it_saved(mask, tmp_path, monkeypatch, refused):
    class Networked(mask):
        kind = "networked"

        def __init__(self, network, share=0.5):
            super().__init__(share)
            self.network = network

        def _weights(self):
            yield self.network

        def _write(self, folder):
            super()._write(folder)
            (folder / "network").write_bytes(self.network)

        @classmethod
        def from_pretrained(cls, folder):
            return cls((folder / "network").read_bytes())

    Networked(b"weights").save_pretrained(tmp_path / "n")
    mask().save_pretrained(tmp_path / "m")
    monkeypatch.delitem(DISSOLVERS, "mask")
    assert type(mask.from_pretrained(tmp_path / "m")) is mask
    for name, kind in (("m", "mask"), ("n", "networked")):
        with refused(tmp_path / name, repr(kind), "hf_anomaly.DISSOLVERS"):
            Dissolver.from_pretrained(tmp_path / name)
    monkeypatch.setitem(DISSOLVERS, "networked", Networked)
    assert Dissolver.from_pretrained(tmp_path / "n").network == b"weights"
    with refused("'mask' is not one of"):
        MedianDissolver.from_pretrained(tmp_path / "m")


def test_a_random_dissolver_must_say_what_it_draws(refused):
    class Random(IdentityDissolver):
        is_deterministic = False

    with refused("Random", "sample_timesteps"):
        Random()(images(2, 1, 8, 8))


# Training ------------------------------------------------------------------------------------------------------------------------


def test_trained_network_denoises_better_than_the_identity():
    torch.manual_seed(0)
    model = DenoisingModel(build_unet(16, 1, (8, 16)), build_scheduler(), max_timestep=400).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    normals = smooth_images(256)
    for _ in range(150):
        loss = model(normals[torch.randint(256, (8,))])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = smooth_images(128, seed=1)
    t = torch.randint(50, 400, (128,))
    noise = torch.randn(x.shape)
    x_t = model.scheduler.add_noise(x, noise, t)
    alpha_bar = model.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        estimate = (x_t - (1 - alpha_bar) ** 0.5 * model.unet(x_t, t).sample) / alpha_bar**0.5
    error, of_identity, of_scaling = ((e - x).abs().mean().item() for e in (estimate, x_t, x_t / alpha_bar**0.5))
    assert error < 0.6 * min(of_identity, of_scaling), (error, of_identity, of_scaling)


def test_a_detector_that_trains_in_mixed_precision_leaves_the_diffusion_model_its_own():
    model = DenoisingModel(tiny_unet(), build_scheduler()).eval()
    given = (images(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([3, 200]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*given)["loss"]
    assert torch.equal(loss, model(*given)["loss"])


def test_images_of_another_precision_than_the_network():
    model, (x, noise, t) = (
        DenoisingModel(tiny_unet(), build_scheduler()).eval(),
        (images(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([3, 200])),
    )
    expected = model(x, noise, t)["loss"].item()
    for other, precision in ((x.double(), 1e-5), (x.bfloat16(), 0.02)):
        assert model(other, noise.to(other), t)["loss"].item() == pytest.approx(expected, rel=precision)
    assert model.bfloat16()(x, noise, t)["loss"].item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_by_hand(prediction_type):
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    model = DenoisingModel(tiny_unet(), scheduler).eval()
    x, noise, t = images(3, 1, 16, 16), torch.randn(3, 1, 16, 16), torch.tensor([0, 100, 999])
    signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (scheduler.alphas_cumprod[t], 1 - scheduler.alphas_cumprod[t]))
    target = {"epsilon": noise, "v_prediction": signal * noise - sigma * x, "sample": x}[prediction_type]
    with torch.no_grad():
        difference = model.unet(signal * x + sigma * noise, t).sample - target
        expected = difference.abs().mean()
        torch.testing.assert_close(model(x, noise=noise, timesteps=t)["loss"], expected)


def test_denoising_draws():
    """Seeds decide all draws; images of any size are fitted to the network; flips are made in training mode only."""
    model = DenoisingModel(tiny_unet(), build_scheduler(), max_timestep=1)
    for size in ((16, 16), (13, 14), (20, 40)):
        x, losses = images(4, 1, *size), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(model(x)["loss"].item())
        assert losses[0] == losses[1] != losses[2]
    x, noise, t = images(8, 1, 16, 16), torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=torch.long)
    assert len({model(x, noise, t)["loss"].item() for _ in range(5)}) > 1
    assert len({model.eval()(x, noise, t)["loss"].item() for _ in range(5)}) == 1


@torch.no_grad()
def test_training_flips_about_half_of_the_images_left_to_right():
    torch.manual_seed(0)
    model, seen = DenoisingModel(tiny_unet(), build_scheduler()), []
    model.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    x = images(64, 1, 16, 16)
    model(x, torch.zeros_like(x), torch.zeros(64, dtype=torch.long))
    shown = seen[0].numpy() / math.sqrt(model.scheduler.alphas_cumprod[0])
    as_it_is, mirrored = (np.isclose(shown, expected, atol=1e-6).all((1, 2, 3)) for expected in (x.numpy(), x.numpy()[..., ::-1]))
    assert (as_it_is ^ mirrored).all()
    assert 20 <= mirrored.sum() <= 44


def test_timesteps_of_training_reach_every_value_below_the_maximum():
    seen = []

    class Recording(UNet2DModel):
        def forward(self, sample, timestep):
            seen.extend(timestep.tolist())
            return super().forward(sample, timestep)

    model = DenoisingModel(Recording.from_config(tiny_unet().config), build_scheduler(), max_timestep=3)
    with torch.no_grad():
        model(images(64, 1, 16, 16))
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize(("size", "resolution"), [(4, 4), (8, 8), (16, 8), (28, 8), (47, 8), (48, 16), (64, 16), (96, 32), (224, 32)])
def test_images_are_dissolved_below_their_own_size(size, resolution):
    assert network_resolution(size, default_resolution(size)) == resolution
    build_unet(resolution, 1, (8, 8, 8))  # a multiple of 4


def test_a_network_takes_the_next_power_of_two():
    assert [network_resolution(size, 32) for size in (16, 17, 28, 64)] == [16, 32, 32, 32]


@torch.no_grad()
def test_quality_of_a_network_that_sees_nothing():
    """ε_θ = ½: dissolving divides by sqrt(ᾱ), which adds 1/ᾱ − 1 of the energy, and shifts the mean, which does not count; the noise is left over."""
    unet, scheduler = silent_unet(), build_scheduler()
    torch.nn.init.constant_(unet.conv_out.bias, 0.5)
    x = images(3, 1, 16, 16) / 2  # room for the division
    (low, high), (again, _) = (dissolving_quality(DiffusionDissolver(unet, scheduler), x, [30, 130]) for _ in range(2))
    epsilon = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).numpy()
    for row, alpha_bar in ((low, scheduler.alphas_cumprod[30].item()), (high, scheduler.alphas_cumprod[130].item())):
        assert row.noise == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar), rel=1e-5)
        assert row.denoising_error == pytest.approx(row.noise * math.sqrt(((epsilon - 0.5) ** 2).mean()), rel=1e-4)
        assert row.ringing == pytest.approx(1 / alpha_bar - 1, rel=1e-3)
        assert row.removed == pytest.approx(0, abs=1e-6)
    assert again == low

    scheduler.register_to_config(prediction_type="sample")  # now x̂_0 = ½
    (row,) = dissolving_quality(DiffusionDissolver(unet, scheduler), x, [50])
    assert row.denoising_error == pytest.approx((x - 0.5).square().mean().sqrt().item(), rel=1e-5)
    assert (row.ringing, row.removed) == (0, pytest.approx(1))


def test_build_unet_widths():
    assert sum(p.numel() for p in build_unet(32, 1).parameters()) == pytest.approx(1.06e6, rel=0.01)
    for widths in ((12, 20), (6,), (8, 16, 16)):
        assert build_unet(8, 3, widths)(images(1, 3, 8, 8), torch.tensor([3])).sample.shape == (1, 3, 8, 8)


# Errors --------------------------------------------------------------------------------------------------------------------------


def test_refuses_bad_settings(diffusion, refused):
    unet, scheduler = diffusion.unet, build_scheduler()
    for t_min, t_max in ((-1, 5), (30, 1000), (9, 8), (1.5, 9)):
        with refused("t_m"):
            DiffusionDissolver(unet, scheduler, t_min, t_max)
    with refused("prediction_type", "flow"):
        DiffusionDissolver(unet, DDPMScheduler(1000, prediction_type="flow"))
    with refused("FlowMatchEulerDiscreteScheduler", "alphas_cumprod"):
        DiffusionDissolver(unet, FlowMatchEulerDiscreteScheduler())
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    with refused("class-conditional"):
        DiffusionDissolver(UNet2DModel(**config | {"num_class_embeds": 2}), scheduler)
    with refused("sample_size"):
        DiffusionDissolver(UNet2DModel(**config | {"sample_size": None}), scheduler)
    with refused("sample_size", "8192"):  # to which any image would be padded
        DiffusionDissolver(UNet2DModel(**config | {"sample_size": 8192}), scheduler)
    with refused("3 input channels", "2 output channels"):
        DiffusionDissolver(UNet2DModel(**config | {"in_channels": 3, "out_channels": 2}), scheduler)
    with refused("kernel_size", 4):
        GaussianDissolver(4)
    for kernel in ([], [3, 4], [2.5], "37", 2.5):
        with refused("kernel_size"):
            MedianDissolver(kernel)
    with refused("sigma"):
        GaussianDissolver(3, sigma=0.0)
    with refused("sigma", "[3, 5]"):
        GaussianDissolver([3, 5], sigma=1.0)
    with refused("resolution"):
        MedianDissolver(3, resolution=0)
    with refused("max_timestep", 1001):
        DenoisingModel(unet, scheduler, max_timestep=1001)
    with refused("resolution 18"):
        build_unet(18, 1, (8, 8, 8))


def test_refuses_bad_images(diffusion, refused):
    with refused("3 channels", "UNet takes 1", "--num_channels"):
        diffusion(images(1, 3, 16, 16))
    with refused("3 channels", "UNet takes 1", "--num_channels"):
        DenoisingModel(diffusion.unet, build_scheduler())(images(1, 3, 16, 16))
    with refused("kernel_size 11", "5×20", "at most 9"):
        GaussianDissolver(11)(images(1, 1, 5, 20))
    for kernel, height in ((9, 5), (11, 6)):
        assert GaussianDissolver(kernel)(images(1, 1, height, 20)).shape == (1, 1, height, 20)
    for bad in (images(16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.uint8), images(1, 1, 4, 4) * 127, images(1, 1, 4, 4) * torch.nan):
        with refused("pixel_values"):
            IdentityDissolver()(bad)
    for timesteps in (torch.tensor([3]), torch.tensor([3.0, 4.0]), torch.tensor([3, 1000]), torch.tensor([-1, 3])):
        with refused("timesteps"):
            diffusion(images(2, 1, 16, 16), timesteps)
    for t in (1000, -1):
        with refused("timesteps", "0…999", t):
            dissolving_quality(diffusion, images(2, 1, 16, 16), [30, t])


def test_refuses_bad_folders(tmp_path, diffusion, refused):
    folder = tmp_path / "d"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with refused("empty"):
        (tmp_path / "empty").mkdir()
        DiffusionDissolver.from_pretrained(tmp_path / "empty")
    with refused(tmp_path / "absent"):
        DiffusionDissolver.from_pretrained(tmp_path / "absent")
    diffusion.save_pretrained(folder)
    intact = weights.read_bytes()
    for config in ("{", "[]", '{"kind": "gaussian"}', '{"kind": "none"}', '{"t_min": "a"}', '{"t_max": 1000}'):
        (folder / "dissolver_config.json").write_text(config)
        with refused(folder):
            DiffusionDissolver.from_pretrained(folder)
    diffusion.save_pretrained(folder)
    weights.write_bytes(intact[: len(intact) // 2])
    with refused(folder):
        DiffusionDissolver.from_pretrained(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    weights.write_bytes(intact)
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with refused(folder):
        DiffusionDissolver.from_pretrained(folder)
    weights.unlink()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    torch.save(diffusion.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    with refused(folder, "safetensors"):
        DiffusionDissolver.from_pretrained(folder)
    GaussianDissolver().save_pretrained(tmp_path / "g")
    with refused("gaussian"):
        DiffusionDissolver.from_pretrained(tmp_path / "g")
    with refused("gaussian", "median"):
        MedianDissolver.from_pretrained(tmp_path / "g")
    for setting, value in (("radius", 3), ("kernel_size", 4), ("sigma", "a"), ("resolution", None)):
        (tmp_path / "g" / "dissolver_config.json").write_text(json.dumps({"kind": "gaussian", setting: value}))
        with refused(tmp_path / "g" / "dissolver_config.json", setting):
            Dissolver.from_pretrained(tmp_path / "g")
    (tmp_path / "file").write_text("")
    with refused("file"):
        GaussianDissolver().save_pretrained(tmp_path / "file")
