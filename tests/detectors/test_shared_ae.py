"""SharedAE: shapes at every size, Eq. 1–7 and Algorithm 2 against a slow oracle, phases, maps."""

import math

import numpy as np
import pytest
import torch

from hf_anomaly import SharedAEConfig, SharedAEModel
from hf_anomaly.detectors.shared_ae.modeling_shared_ae import SharedAEDecoder, SharedAEEncoder

PARTS = ("encoder1", "encoder2", "decoder1", "decoder2")


def detector(**settings):
    torch.manual_seed(0)
    return SharedAEModel(SharedAEConfig(**{"image_size": 8, "hidden_sizes": [4, 8, 8], "latent_size": 6, **settings}))


def pixels(count=5, size=8, channels=1, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Networks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels"), [*((size, 1) for size in (8, 13, 28, 32, 64, 71, 72, 128, 131, 224, 512)), (28, 3), (131, 3)]
)
def test_the_decoder_mirrors_the_encoder(size, channels):
    config = SharedAEConfig(image_size=size, num_channels=channels, hidden_sizes=[2, 3, 4], latent_size=5)
    encoder, decoder, x = SharedAEEncoder(config), SharedAEDecoder(config), pixels(2, size, channels)
    z = encoder(x)
    assert z.shape == (2, 5, 1, 1)
    assert decoder(z).shape == x.shape
    for network in (encoder, decoder):
        assert sum(isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d) for layer in network) == 4
        assert isinstance(network[-1], torch.nn.Tanh)
    assert config.feature_sizes[-1] <= 8


@pytest.mark.parametrize("size", [28, 35, 100, 131, 227])
def test_every_pixel_is_seen(size):
    encoder = SharedAEEncoder(SharedAEConfig(image_size=size, hidden_sizes=[2, 2, 2], latent_size=2)).eval().double()
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, 1e-3)  # so that nothing cancels
    x = torch.zeros(1, 1, size, size, dtype=torch.double, requires_grad=True)
    encoder(x).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_size": 7}, ["image_size", "8 to 512", "7"]),
        ({"image_size": 513}, ["image_size", "8 to 512", "513"]),
        ({"image_size": 28, "tiles": 4}, ["image_size / tiles", "8 to 512", "got 7"]),
        ({"hidden_sizes": [4, 4]}, ["hidden_sizes", "three"]),
        ({"hidden_sizes": [4, 4, 0]}, ["hidden_sizes"]),
        ({"latent_size": 0}, ["latent_size"]),
        ({"alpha": -1}, ["alpha"]),
        ({"beta": math.nan}, ["beta"]),
        ({"alpha": 0, "beta": 0}, ["alpha and beta"]),
        ({"max_adversarial_weight": 1.1}, ["max_adversarial_weight"]),
        ({"adversarial_margin": 0}, ["adversarial_margin", "None"]),
        ({"omega1": 0.7}, ["omega1 and omega2", "0.7"]),
        ({"omega1": 1.5, "omega2": -0.5}, ["omega1 and omega2"]),
        ({"num_reference_images": -1}, ["num_reference_images"]),
    ],
)
def test_values_out_of_range(wrong, words, refused):
    with refused(*words):
        SharedAEConfig(**wrong)


# Losses and score against an oracle -------------------------------------------------------------------------------------------


def oracle(model, x):
    """Algorithm 1's vectors as NumPy arrays, each image's flattened."""
    e1, e2, d1, d2 = (getattr(model, name) for name in PARTS)
    with torch.no_grad():
        z = e1(x)
        x1, x2 = d1(z), d2(z)
        z1, z2 = e2(x1), e2(x2)
        x1_ = d1(z2)
        z1_ = e2(x1_)
    names = ("x", "z", "x1", "x2", "z1", "z2", "x1_", "z1_")
    return {name: value.flatten(1).numpy() for name, value in zip(names, (x, z, x1, x2, z1, z2, x1_, z1_), strict=True)}


def mean_square(a, b):
    total = 0.0
    for left, right in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        total += (left - right) ** 2
    return total / a.size


def expected_losses(v, n, alpha, beta, bound, margin=math.inf):
    def error(image, latent):
        return alpha * mean_square(v["x"], v[image]) + beta * mean_square(v["z"], v[latent])

    share = max(1 / n, 1 - bound)
    first, second, adversarial = error("x1", "z1"), error("x2", "z2"), error("x1_", "z1_")
    return share * first - (1 - share) * min(adversarial, margin * first), share * second + (1 - share) * adversarial


@pytest.mark.parametrize("margin", [None, 5.0, 0.5])
@pytest.mark.parametrize("bound", [1.0, 0.1])
def test_losses(bound, margin):
    model = detector(alpha=0.7, beta=2.5, max_adversarial_weight=bound, adversarial_margin=margin).train()
    x = pixels()
    for epoch, n in ((0.0, 1), (0.99, 1), (1.0, 2), (6.5, 7)):
        one, two = expected_losses(oracle(model, x), n, 0.7, 2.5, bound, math.inf if margin is None else margin)
        for phase, expected in (("ede1", one), ("ede2", two)):
            output = model(x, epoch=epoch, phase=phase)
            assert output.loss.item() == pytest.approx(expected, rel=1e-5), epoch
            assert {name: value.item() for name, value in output.losses.items()} == {f"{phase}_loss": output.loss.item()}
        if n == 1:
            assert model(x, epoch=epoch).loss.item() == pytest.approx(one + two, rel=1e-5)


@pytest.mark.parametrize("ablation", ["one", "two"])
def test_the_ablations_have_no_adversary(ablation):
    full, model = detector(), detector(ablation=ablation, beta=1).train()
    full.load_state_dict(model.state_dict(), strict=False)
    x = pixels()
    one, two = expected_losses(oracle(full.train(), x), 1, 1, 1, 1)
    assert list(model.phases) == (["ede1"] if ablation == "one" else ["ede1", "ede2"])
    assert model(x, epoch=50.0, phase="ede1").loss.item() == pytest.approx(one, rel=1e-5)
    assert model(x).loss.item() == pytest.approx(one if ablation == "one" else one + two, rel=1e-5)
    assert hasattr(model, "decoder2") == (ablation == "two")


@pytest.mark.parametrize("ablation", ["one", "two", "full"])
def test_scores_and_maps(ablation):
    full, model = detector().eval(), detector(ablation=ablation, omega1=0.3, omega2=0.7, num_channels=1).eval()
    full.load_state_dict(model.state_dict(), strict=False)
    x = pixels(6)
    v = oracle(full, x)
    output = model.fit_reference([x], progress=False)(x, output_anomaly_maps=True, output_embeddings=True)
    first, second, image = ("z1", "z1", "x1") if ablation == "one" else ("z2", "z1_", "x1_")
    for i, score in enumerate(output.scores.tolist()):
        terms = [sum((a - b) ** 2 for a, b in zip(v["z"][i], v[name][i], strict=True)) for name in (first, second)]
        assert score == pytest.approx(0.3 * terms[0] + 0.7 * terms[1], rel=1e-5)
    np.testing.assert_allclose(output.anomaly_maps.detach().flatten(1), np.abs(v["x"] - v[image]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.embeddings.detach(), v["z"], rtol=1e-6)


def test_the_score_can_be_the_maps_highest_value():
    model, x = detector(score_from="map").eval(), pixels(6)
    output = model.fit_reference([x], progress=False)(x, output_anomaly_maps=True)
    assert torch.equal(output.scores, output.anomaly_maps.flatten(1).amax(1))
    assert torch.equal(model(x).scores, output.scores)
    assert model(x).anomaly_maps is None


def test_maps_are_over_the_channels():
    model, x = detector(num_channels=3).eval(), pixels(2, channels=3)
    model.fit_reference([x], progress=False)
    image = oracle(model, x)["x1_"].reshape(x.shape)
    maps = model(x, output_anomaly_maps=True).anomaly_maps
    np.testing.assert_allclose(maps.detach(), np.sqrt(((x.numpy() - image) ** 2).sum(1, keepdims=True)), rtol=1e-5)


@pytest.mark.parametrize("other", [{"omega1": 1.0, "omega2": 0.0}, {"ablation": "one"}, {"score_from": "map"}])
def test_the_calibration_does_not_outlive_its_scores(other, tmp_path, caplog):
    detector().eval().fit_reference([pixels()], progress=False).calibrate([pixels(20)], progress=False).save_pretrained(tmp_path)
    assert SharedAEModel.from_pretrained(tmp_path).calibration.is_calibrated
    assert "dropped" not in caplog.text
    model = SharedAEModel.from_pretrained(tmp_path, **other)
    assert not model.calibration.is_calibrated
    assert model.config.anomaly_map_range is None
    assert all(name in caplog.text for name in ("dropped", *other))


def test_a_detector_that_diverged_is_not_fitted(refused, monkeypatch):
    model = detector().eval()
    with torch.no_grad():
        model.decoder2[-2].weight.fill_(math.nan)
    with refused("normal image 0", "no finite score", "learning rate"):
        model.fit_reference([pixels()], progress=False)
    assert not model.is_fitted
    for tiles, batches in ((1, [4]), (1, [1, 1, 2]), (2, [4]), (2, [1, 1, 2])):
        model, x = detector(image_size=16, tiles=tiles).eval(), pixels(4, size=16)
        assert model.fit_reference(x.split(batches), progress=False).config.num_reference_images == 4
        x[2, :, -1, -1] = 7.0  # in the last tile, if there are several
        monkeypatch.setattr(model, "reference_features", lambda x: {"scores": 1 / (7 - x.amax((1, 2, 3)))})
        with refused("normal image 2"):
            model.fit_reference(x.split(batches), progress=False)


# Phases -----------------------------------------------------------------------------------------------------------------------


def gradients(model, part, loss):
    return torch.autograd.grad(loss, list(getattr(model, part).parameters()), retain_graph=True)


@pytest.mark.parametrize("epoch", [0.0, 3.0])
def test_a_phase_has_one_decoder_and_both_encoders(epoch):
    model = detector()
    for phase, parts in (("ede1", {"encoder1", "encoder2", "decoder1"}), ("ede2", {"encoder1", "encoder2", "decoder2"})):
        own = {id(parameter) for part in parts for parameter in getattr(model, part).parameters()}
        assert {id(parameter) for parameter in model.phases[phase]} == own
        loss = model.train()(pixels(), epoch=epoch, phase=phase).loss
        assert all(gradient.any() for part in parts for gradient in gradients(model, part, loss))


def test_the_gradient_of_decoder1_contains_minus_adv():
    """(1 − w) ∇rec_1 − w ∇adv, where ∇rec_1 comes from a first epoch and ∇adv from the losses' sums."""
    model, x = detector(max_adversarial_weight=1.0, adversarial_margin=None).train(), pixels()
    n = 4
    reconstruction = gradients(model, "decoder1", model(x, epoch=0.0, phase="ede1").loss)
    adversarial = gradients(model, "decoder1", model(x, epoch=n - 1.0, phase="ede2").loss)  # rec_2 does not depend on D1
    together = gradients(model, "decoder1", model(x, epoch=n - 1.0, phase="ede1").loss)
    for rec, adv, both in zip(reconstruction, adversarial, together, strict=True):
        assert adv.any()
        torch.testing.assert_close(both, rec / n - adv, rtol=1e-4, atol=1e-6)


def test_beyond_the_margin_ede1_gains_nothing_by_adv():
    """Neither by worse twice-decoded images nor by a worse reconstruction, which the margin is a multiple of."""
    settings, x = {"max_adversarial_weight": 0.5}, pixels()
    bounded, plain = detector(**settings, adversarial_margin=1e-3).train(), detector(ablation="two").train()
    bounded.load_state_dict(plain.state_dict())
    for part in ("encoder1", "encoder2", "decoder1"):
        expected = gradients(plain, part, plain(x, phase="ede1").loss)
        for gradient, alone in zip(gradients(bounded, part, bounded(x, epoch=9.0, phase="ede1").loss), expected, strict=True):
            torch.testing.assert_close(gradient, 0.5 * alone, rtol=1e-4, atol=1e-7)


def test_new_latents_are_in_the_linear_range_of_tanh():
    for size in (16, 28, 64):
        model = detector(image_size=size, hidden_sizes=[16, 16, 16], latent_size=64).train()
        for encoder in (model.encoder1, model.encoder2):
            assert 0.03 < encoder(pixels(32, size)).std() < 0.4


def test_training_is_told_what_it_needs(refused):
    model, x = detector().train(), pixels()
    with refused("epoch"):
        model(x, phase="ede1")
    with refused("cancel", "phase", "ede1 and ede2"):
        model(x, epoch=1.0)
    with refused("phase", "ede1, ede2", "'ede3'"):
        model(x, epoch=1.0, phase="ede3")
    with refused("phase", "'ede2'"):
        detector(ablation="one").train()(x, phase="ede2")
    with refused("at least 2", "--per_device_train_batch_size", "--dataloader_drop_last"):
        model(x[:1], epoch=0.0)


def test_the_map_peaks_where_a_square_was_planted():
    size, steps = 16, 150
    model = detector(image_size=size, hidden_sizes=[8, 16, 16], latent_size=16).train()
    optimizers = {name: torch.optim.Adam(parameters, 3e-3) for name, parameters in model.phases.items()}

    def stripes(count, seed):
        phase = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
        return (0.7 * torch.sin(6.28 * (torch.arange(size) / 8 + phase))).expand(-1, 1, size, -1).clone()

    for step in range(steps):
        for phase, optimizer in optimizers.items():
            model.zero_grad()
            model(stripes(16, step), epoch=step / 10, phase=phase).loss.backward()
            optimizer.step()
    model.eval().fit_reference([stripes(16, 1000)], progress=False)
    x, corners = stripes(8, 2000), torch.arange(8)
    for i in corners:
        x[i, :, i : i + 3, 9:12] = -x[i, :, i : i + 3, 9:12].sign()
    maps = model(x, output_anomaly_maps=True).anomaly_maps.detach()
    smooth = torch.nn.functional.avg_pool2d(maps, 3, 1)  # where a 3×3 window begins
    rows, columns = smooth.flatten(1).argmax(1) // (size - 2), smooth.flatten(1).argmax(1) % (size - 2)
    assert ((rows - corners).abs() <= 1).all()
    assert ((columns - 9).abs() <= 1).all()


def test_weights_of_scores_given_at_loading_add_up(tmp_path, refused):
    detector().fit_reference([pixels()], progress=False).save_pretrained(tmp_path)
    with refused("omega1", "add up to 1"):
        SharedAEModel.from_pretrained(tmp_path, omega1=0.7)
    assert SharedAEModel.from_pretrained(tmp_path, omega1=0.7, omega2=0.3).config.omega1 == 0.7
