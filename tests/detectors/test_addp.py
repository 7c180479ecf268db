"""ADDP: networks at every size, losses and score against slow oracles, the two stages, freezing, and why there are no skip connections."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForPreTraining, ConvNextConfig, ResNetConfig

from hf_anomaly import ADDPConfig, ADDPForPreTraining, ADDPModel, CSIConfig, CSIModel, SmallResNetBackbone, SmallResNetConfig
from hf_anomaly.detectors.addp.networks import AttentionGate, unpool

STAGES = ["stem", "stage1", "stage2"]


def small_resnet(channels=1, **settings):
    return SmallResNetConfig(num_channels=channels, hidden_sizes=[4, 6], depths=[1, 1], **settings)


def resnet(channels=1, **settings):
    return ResNetConfig(num_channels=channels, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", **settings)


FAMILIES = {
    "unet": lambda channels: {},
    "unet with skips": lambda channels: {"skip_connections": True},
    "attention unet": lambda channels: {"skip_connections": True, "attention_gates": True},
    "segnet": lambda channels: {"encoder": "segnet"},
    "small resnet": lambda channels: {"backbone_config": small_resnet(channels)},
    "resnet": lambda channels: {"backbone_config": resnet(channels, out_features=["stage2"])},
    "resnet with skips": lambda channels: {
        "backbone_config": resnet(channels, out_features=STAGES),
        "skip_connections": True,
        "attention_gates": True,
    },
}


def config(family="unet", **settings):
    channels = settings.get("num_channels", 1)
    return ADDPConfig(**{"image_size": 16, "hidden_sizes": [4, 6, 8], "latent_size": 2, **FAMILIES[family](channels), **settings})


def build(cls, family="unet", seed=0, **settings):
    torch.manual_seed(seed)
    return cls(config(family, **settings))


def pixels(count=4, size=16, channels=1, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.enable_grad()
def fit(model, data, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr)  # its weight decay would move what is not frozen
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(data(step)).loss.backward()
        optimizer.step()
    return model


# Networks ---------------------------------------------------------------------------------------------------------------------


def test_a_backbone_says_which_sizes_it_takes(refused):
    backbone = ConvNextConfig(num_channels=1, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    with refused("'convnext'", "28 px", "32, 48, 64", "--image_size"):
        ADDPModel(ADDPConfig(image_size=28, backbone_config=backbone))
    with refused("'convnext'", "28 px"):
        CSIModel(CSIConfig(image_size=28, backbone_config=backbone))
    for model_class, config_class in ((ADDPModel, ADDPConfig), (CSIModel, CSIConfig)):
        with refused("'convnext'", "16 px"):  # of a tile
            model_class(config_class(image_size=64, tiles=4, backbone_config=backbone))
    model = ADDPModel(ADDPConfig(image_size=32, backbone_config=backbone))
    assert model.reconstruct(pixels(2, 32))[0].shape == (2, 1, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size(family, channels):
    model = build(ADDPForPreTraining, family, num_channels=channels)
    for size in (8, 9, 13, 28, 33, 70):
        x = pixels(2, size, channels)
        for mode in (True, False):
            reconstruction, latents = model.train(mode).reconstruct(x)
            assert reconstruction.shape == x.shape
            assert latents.shape[:2] == (2, 2)
            assert reconstruction.isfinite().all()
            assert not torch.allclose(reconstruction[0], reconstruction[1])
        if "resnet" not in family:
            assert latents.shape[-1] == -(-size // 4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["unet", "segnet"])
def test_the_largest_images(family):
    assert build(ADDPModel, family, image_size=512, hidden_sizes=[2, 2, 2, 2]).eval().reconstruct(pixels(1, 512))[0].shape[-1] == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(family):
    model = build(ADDPForPreTraining, family)
    model(pixels()).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@torch.no_grad()
def test_segnet_puts_values_where_the_maxima_were():
    model = build(ADDPForPreTraining, "segnet").eval()
    maps, places = model.encoder(pixels())
    assert [tuple(place.shape[-2:]) for place in places] == [(8, 8), (4, 4)]
    level, seen = model.decoder.levels[-1], []
    level.mix.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, _ = model.decoder(maps, places, (16, 16))
    (unpooled,) = seen
    assert not unpooled.flatten(2).scatter(2, places[0].flatten(2), 0.0).any()  # nothing elsewhere
    moved = [place.roll(1, 0) for place in places]  # those of another image
    assert not torch.allclose(model.decoder(maps, moved, (16, 16))[0], x)


@torch.no_grad()
def test_attention_gate_is_its_equation():
    torch.manual_seed(0)
    gate = AttentionGate(4, 6)
    x, g = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    alpha = gate(x, g)
    assert alpha.shape == (2, 1, 3, 5)
    assert ((alpha >= 0) & (alpha <= 1)).all()
    weights = {name: value.double().numpy() for name, value in gate.state_dict().items()}
    for b, i, j in np.ndindex(2, 3, 5):
        inner = weights["skip.weight"][:, :, 0, 0] @ x[b, :, i, j].numpy() + weights["gating.weight"][:, :, 0, 0] @ g[b, :, i, j].numpy()
        q = weights["psi.weight"][0, :, 0, 0] @ np.maximum(inner + weights["gating.bias"], 0) + weights["psi.bias"]
        assert alpha[b, 0, i, j].item() == pytest.approx(1 / (1 + np.exp(-q.item())), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["attention unet", "resnet with skips"])
def test_attention_gates_are_used(family):
    model = build(ADDPForPreTraining, family).eval()
    maps, places = model.encoder(pixels())
    assert sum(isinstance(module, AttentionGate) for module in model.modules()) == 2
    before = model.decoder(maps, places, (16, 16))[0]
    for level in model.decoder.levels:
        torch.nn.init.constant_(level.gate.psi.bias, -1e4)  # shut
    shut = model.decoder(maps, places, (16, 16))[0]
    assert not torch.allclose(shut, before)
    emptied = [torch.zeros_like(skip) for skip in maps[:-1]] + maps[-1:]
    torch.testing.assert_close(model.decoder(emptied, places, (16, 16))[0], shut)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_size": 7}, ["image_size", "8"]),
        ({"image_size": 28, "tiles": 4}, ["image_size / tiles", "8", "got 7"]),
        ({"hidden_sizes": [4]}, ["hidden_sizes"]),
        ({"hidden_sizes": [4, 0]}, ["hidden_sizes"]),
        ({"latent_size": 0}, ["latent_size"]),
        ({"attention_gates": True}, ["attention_gates", "skip_connections"]),
        ({"encoder": "segnet", "skip_connections": True}, ["segnet", "skip_connections"]),
        ({"encoder": "unet", "backbone_config": small_resnet()}, ["unet", "backbone_config"]),
        ({"backbone_config": small_resnet(3)}, ["num_channels", "3"]),
        ({"backbone_config": {"num_channels": 1}}, ["model_type"]),
        ({"backbone_config": small_resnet(), "skip_connections": True}, ["out_features", "got 1"]),
        ({"noise_level": -0.1}, ["noise_level"]),
        ({"noise_resolution": 0}, ["noise_resolution"]),
        ({"map_filter_size": 2}, ["map_filter_size", "odd"]),
        ({"num_reference_images": -1}, ["num_reference_images"]),
    ],
)
def test_values_out_of_range(wrong, words, refused):
    with refused(*words):
        ADDPConfig(**wrong)


def test_batch_normalisation_needs_a_batch(refused):
    for cls in (ADDPForPreTraining, ADDPModel):
        with refused("at least 2", "group"):
            build(cls)(pixels(1))
        assert build(cls, norm="group", hidden_sizes=[8, 8, 8])(pixels(1)).loss.isfinite()
        assert build(cls, "small resnet", norm="group", hidden_sizes=[8, 8, 8])(pixels(1)).loss.isfinite()
        strided = {"backbone_config": small_resnet(stem_stride=8), "norm": "group", "hidden_sizes": [8, 8, 8]}
        with refused("backbone", "at least 2", "batch"):
            build(cls, **strided)(pixels(1))
        assert build(cls, **strided)(pixels(2)).loss.isfinite()


def test_segnet_under_deterministic_algorithms():
    model, x = build(ADDPModel, "segnet"), pixels(3)
    expected = model(x).loss.item()
    torch.use_deterministic_algorithms(True)
    try:
        loss = model(x).loss
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.item() == expected


@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
def test_unpooling_is_torchs(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    pooled, places = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    assert torch.equal(unpool(pooled, size, places), F.max_unpool2d(pooled, places, 2, output_size=size))


# Losses and score -------------------------------------------------------------------------------------------------------------


def mean_square(a, b):
    total = 0.0
    for left, right in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        total += (left - right) ** 2
    return total / a.numel()


@torch.no_grad()
@pytest.mark.parametrize("noise", ["gaussian", "coarse", "simplex"])
def test_denoising_compares_with_the_clean_image(noise):
    model, x = build(ADDPForPreTraining, noise=noise, noise_level=0.7), pixels()
    torch.manual_seed(3)
    added = model.draw_noise(x)
    assert 0.3 < added.std() < 1.1
    torch.manual_seed(3)
    output = model(x, labels=torch.zeros(4))
    expected, _ = model.reconstruct(x + added)  # with the same batch statistics
    torch.testing.assert_close(output.reconstruction, expected)
    assert output.loss.item() == pytest.approx(mean_square(expected, x), rel=1e-4)
    output = model.eval()(x)
    assert output.loss is None
    torch.testing.assert_close(output.reconstruction, model.reconstruct(x)[0])


def test_pretraining_sees_a_tile_of_each_image():
    assert build(ADDPForPreTraining, tiles=2)(pixels()).reconstruction.shape == (4, 1, 8, 8)


@torch.no_grad()
def test_the_level_is_the_standard_deviation():
    x = torch.zeros(500, 1, 16, 16)
    for noise in ("gaussian", "coarse", "simplex"):
        for level in (0.0, 0.3):
            assert build(ADDPForPreTraining, noise=noise, noise_level=level).draw_noise(x).std().item() == pytest.approx(level, rel=0.05)


@torch.no_grad()
def test_the_detector_compares_clean_images():
    model, x = build(ADDPModel, num_channels=3), pixels(channels=3)
    output = model(x)
    assert output.loss.item() == pytest.approx(mean_square(model.reconstruct(x)[0], x), rel=1e-4)
    model.eval().fit_reference([x], progress=False)
    output, (reconstruction, latents) = model(x, output_anomaly_maps=True, output_embeddings=True), model.reconstruct(x)
    for i in range(4):
        np.testing.assert_allclose(output.embeddings[i], [np.mean(channel) for channel in latents[i].numpy()], rtol=1e-4, atol=1e-6)
        assert output.scores[i].item() == pytest.approx(mean_square(reconstruction[i], x[i]), rel=1e-4)
        for row, column in ((0, 0), (3, 11), (15, 2)):
            expected = mean_square(reconstruction[i, :, row, column], x[i, :, row, column])
            assert output.anomaly_maps[i, 0, row, column].item() == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(output.anomaly_maps.mean((1, 2, 3)), output.scores)
    model.config.map_filter_size = 3
    filtered = model(x, output_anomaly_maps=True)
    assert torch.equal(filtered.scores, output.scores)
    window = output.anomaly_maps[0, 0, 4:7, 8:11]
    assert filtered.anomaly_maps[0, 0, 5, 9] == window.median()


def test_wrong_channels(refused):
    with refused("(batch, 1, height, width)", "(4, 3, 16, 16)"):
        build(ADDPForPreTraining)(pixels(channels=3))


def test_bfloat16():
    for family in FAMILIES:
        model = build(ADDPModel, family).eval().to(torch.bfloat16)
        model.fit_reference([pixels()], progress=False)
        output = model(pixels(), output_anomaly_maps=True)
        assert output.scores.dtype == output.anomaly_maps.dtype == torch.float32


# Two stages -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog):
    """What transformers warned of; its loggers do not propagate."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    yield lambda: [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and record.name.startswith("transformers")
    ]
    library.removeHandler(caplog.handler)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretraining_folder_is_where_the_detector_starts(family, tmp_path, logged, refused):
    pretrained = fit(build(ADDPForPreTraining, family), lambda step: pixels(seed=step), 2)
    pretrained.save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is ADDPForPreTraining
    again = ADDPForPreTraining.from_pretrained(tmp_path)
    assert same(state(again), state(pretrained))
    model, info = ADDPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(AutoModel.from_pretrained(tmp_path)) is ADDPModel
    assert not logged()
    assert same({name: value for name, value in state(model).items() if not name.startswith("calibration.")}, state(pretrained))
    assert (model.is_fitted, model.calibration.is_calibrated, model.calibration.threshold.item()) == (False, False, 0)
    assert same(state(ADDPModel.from_pretraining(pretrained)), state(model))
    with torch.no_grad():
        torch.testing.assert_close(model.reconstruct(pixels())[0], again(pixels()).reconstruction)


def test_on_from_a_fitted_detector(tmp_path, logged):
    model = build(ADDPModel).eval()
    model.fit_reference([pixels()], progress=False)
    model.calibrate([pixels()], progress=False)
    model.config.normal_label = "good"
    model.save_pretrained(tmp_path / "detector")
    pretrained, info = ADDPForPreTraining.from_pretrained(tmp_path / "detector", output_loading_info=True)
    assert not any(info.values())
    assert not logged()
    config = pretrained.config
    assert (config.num_reference_images, config.num_calibration_scores, config.false_positive_rate, config.normal_label) == (
        0,
        0,
        None,
        None,
    )
    assert (config.anomaly_map_range, config.calibrated_for) == (None, None)
    pretrained.save_pretrained(tmp_path / "pretrained")
    fresh = ADDPModel.from_pretrained(tmp_path / "pretrained")
    assert not fresh.is_fitted
    assert fresh.calibration.scores.numel() == 0
    assert model.is_fitted  # the one that was saved stays as it is
    assert not ADDPModel.from_pretraining(pretrained).is_fitted


@pytest.mark.parametrize(("name", "before", "now"), [("encoder", "unet", "segnet"), ("norm", "batch", "group")])
def test_another_network_of_the_same_shapes_has_no_calibration(tmp_path, caplog, name, before, now):
    model = build(ADDPModel, **{name: before}).eval()
    model.fit_reference([pixels()], progress=False).calibrate([pixels()], progress=False).save_pretrained(tmp_path)
    assert ADDPModel.from_pretrained(tmp_path, noise="coarse").calibration.is_calibrated  # a setting of pretraining
    assert not ADDPModel.from_pretrained(tmp_path, **{name: now}).calibration.is_calibrated
    assert f"({name} was {before!r}, now {now!r}): its calibration is dropped" in caplog.text


def test_a_fitted_detector_without_its_calibration_is_still_refused(tmp_path, refused):
    from safetensors.torch import load_file, save_file

    model = build(ADDPModel).eval()
    model.fit_reference([pixels()], progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "calibration.threshold"}, tmp_path / "model.safetensors")
    with refused("calibration.threshold"):
        ADDPModel.from_pretrained(tmp_path)


def test_another_size_and_other_settings(tmp_path, refused):
    pretrained = build(ADDPForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model = ADDPModel.from_pretrained(tmp_path, image_size=13, freeze_encoder=True)
    other = ADDPModel.from_pretraining(pretrained, image_size=13, freeze_encoder=True)
    assert same(state(other), state(model))
    for loaded in (model, other):
        assert (loaded.config.image_size, loaded.config.freeze_encoder, loaded.encoder_is_frozen) == (13, True, True)
        assert loaded.train()(pixels(size=13)).loss.isfinite()
    with refused("freeze_encodre", "freeze_encoder"):
        ADDPModel.from_pretraining(pretrained, freeze_encodre=True)


def test_a_copy_not_a_view():
    pretrained = build(ADDPForPreTraining)
    before = state(pretrained)
    fit(ADDPModel.from_pretraining(pretrained), lambda step: pixels(), 2)
    assert same(state(pretrained), before)


def test_a_backbone_from_elsewhere(tmp_path, refused):
    torch.manual_seed(5)
    SmallResNetBackbone(small_resnet()).save_pretrained(tmp_path)
    model = build(ADDPForPreTraining, "small resnet", pretraining_mode="decoder").load_backbone(tmp_path)
    before = state(model.encoder)
    assert same(state(SmallResNetBackbone.from_pretrained(tmp_path)), {name.removeprefix("backbone."): v for name, v in before.items()})
    fit(model, lambda step: pixels(seed=step), 2)
    assert same(state(model.encoder), before)
    with refused("unet", "backbone_config"):
        build(ADDPForPreTraining).load_backbone(tmp_path)
    with refused("does not fit"):
        build(ADDPForPreTraining, backbone_config=small_resnet(stem_stride=3)).load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("cls", "settings"), [(ADDPForPreTraining, {"pretraining_mode": "decoder"}), (ADDPModel, {"freeze_encoder": True})]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_encoder_does_not_move(family, cls, settings, tmp_path):
    new = build(cls, family, **settings)
    new.save_pretrained(tmp_path)
    for model in (new, cls.from_pretrained(tmp_path), build(cls, family, **settings).eval()):
        model.encoder.register_module("dropout", torch.nn.Dropout(0.5))
        before, decoder = state(model.encoder), state(model.decoder)
        fit(model, lambda step: pixels(seed=step), 3)
        assert same(state(model.encoder), before)
        assert not same(state(model.decoder), decoder)
        assert model.training
        assert model.decoder.training
        assert not any(module.training for module in model.encoder.modules())
        assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


@pytest.mark.parametrize("cls", [ADDPForPreTraining, ADDPModel])
def test_an_encoder_that_is_not_frozen_moves(cls):
    other = {"freeze_encoder": True} if cls is ADDPForPreTraining else {"pretraining_mode": "decoder"}  # the other stage's field
    model = build(cls, **other)
    before = state(model.encoder)
    after = state(fit(model, lambda step: pixels(seed=step), 2).encoder)
    assert not [name for name in before if torch.equal(before[name], after[name])]


# What it learns ---------------------------------------------------------------------------------------------------------------

SIZE = 16


def stripes(count, seed):
    """Of any phase, with a grain that nothing but the identity can reproduce."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(count, 1, 1, 1, generator=generator)
    return 0.7 * torch.sin(6.28 * (torch.arange(SIZE) / 8 + phase)) + 0.15 * torch.randn(count, 1, SIZE, SIZE, generator=generator)


def planted(count, seed):
    """Stripes that change their sign within a square, up and to the right; and where it is."""
    x, mask = stripes(count, seed), torch.zeros(count, 1, SIZE, SIZE, dtype=torch.bool)
    for i in range(count):
        mask[i, :, 1 + i % 4 : 5 + i % 4, 10:14] = True
    return torch.where(mask, -0.7 * x.sign(), x), mask


def trained(steps=120, **settings):
    """An encoder–decoder of normal stripes, both stages."""
    settings = {"hidden_sizes": [8, 16, 16], "latent_size": 2, **settings}
    pretrained = fit(build(ADDPForPreTraining, **settings), lambda step: stripes(16, step), 60)
    model = fit(ADDPModel.from_pretraining(pretrained), lambda step: stripes(16, 500 + step), steps).eval()
    return model.fit_reference([stripes(16, 1000)], progress=False)


@pytest.fixture(scope="module")
def default():
    return trained()


@torch.no_grad()
def test_an_unseen_square_is_reconstructed_badly(default):
    x, mask = planted(8, 2000)
    maps = default(x, output_anomaly_maps=True).anomaly_maps
    assert maps[mask].mean() > 5 * maps[~mask].mean()
    assert maps[mask].mean() > 0.1
    assert default(x).scores.min() > default(stripes(8, 3000)).scores.max()


@torch.no_grad()
def test_with_skip_connections_it_is_reconstructed_too(default):
    """The reason for the default: the identity reconstructs everything."""
    model, (x, mask) = trained(skip_connections=True), planted(8, 2000)
    errors, maps = (m(x, output_anomaly_maps=True).anomaly_maps for m in (model, default))
    assert errors[mask].mean() < 0.1 * maps[mask].mean()
    assert model(x).scores.max() < 0.2 * default(x).scores.min()


@torch.no_grad()
def test_the_map_peaks_where_the_square_is(default):
    x, mask = planted(8, 2000)
    maps = default(x, output_anomaly_maps=True).anomaly_maps
    smooth = F.avg_pool2d(maps, 3, 1).flatten(1).argmax(1)  # where a 3 × 3 window begins
    rows, columns = smooth // (SIZE - 2), smooth % (SIZE - 2)
    for i in range(8):
        assert mask[i, 0, rows[i] + 1, columns[i] + 1], (i, rows[i], columns[i])


@torch.no_grad()
def test_pretraining_learns_to_denoise():
    model = fit(build(ADDPForPreTraining, hidden_sizes=[8, 16, 16], noise_level=0.3), lambda step: stripes(16, step), 120).eval()
    x = stripes(32, 900)
    torch.manual_seed(0)
    noisy = x + model.draw_noise(x)
    assert F.mse_loss(model(noisy).reconstruction, x) < 0.5 * F.mse_loss(noisy, x)
