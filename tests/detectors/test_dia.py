"""Branch D: where dissolved images come from, and what they do to the loss."""

import inspect

import pytest
import torch
from test_csi import NO_AUGMENTATION, K, images, shifted, slow_losses, training_views

from hf_anomaly import CSIConfig, CSIModel, DIAConfig, DIAModel, DiffusionDissolver, GaussianDissolver, SmallResNetConfig
from hf_anomaly.dissolving import build_scheduler, build_unet


def tiny(**settings):
    torch.manual_seed(0)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    return DIAModel(DIAConfig(image_size=8, projection_size=6, backbone_config=backbone, **settings))


def variants(batch_size, count):
    """Variant j of image i is the constant (10 i + j) / 100, so that it is known again."""
    value = (10 * torch.arange(batch_size)[:, None] + torch.arange(count)) / 100
    return value[:, :, None, None, None].expand(-1, -1, 1, 8, 8).contiguous()


@pytest.mark.parametrize("design", ["a", "b"])
@pytest.mark.parametrize("divisor", ["anchors", "views"])
def test_loss_is_equation_9_with_three_branches(design, divisor):
    model = tiny(similarity_design=design, loss_divisor=divisor, temperature=0.2, shift_loss_weight=0.25)
    output, views = training_views(model, images(3), dissolved_pixel_values=images(6, seed=1).unflatten(0, (3, 2)))
    contrastive, shift = slow_losses(model, views, 3, 3, exclude_twins=design == "b")
    assert output.losses["contrastive_loss"].item() == pytest.approx(contrastive, rel=1e-5)
    assert output.losses["shift_loss"].item() == pytest.approx(shift, rel=1e-5)
    assert output.loss.item() == pytest.approx(contrastive + 0.25 * shift, rel=1e-5)


def test_branch_d_is_dissolved_then_shifted():
    x, dissolver = images(3), GaussianDissolver(3)
    model = tiny(**NO_AUGMENTATION)
    model.dissolver = dissolver
    _, views = training_views(model, x)
    branches = [x, x, dissolver(x)]
    expected = [shifted(branch[i], k, "rotate") for k in range(K) for branch in branches for i in range(3)]
    torch.testing.assert_close(views, torch.stack(expected))


def test_a_variant_is_chosen_for_each_image_under_the_seed():
    model, given = tiny(**NO_AUGMENTATION), variants(4, 3)

    def chosen(seed):
        _, views = training_views(model, images(4), dissolved_pixel_values=given, seed=seed)
        values = views.unflatten(0, (K, 3, 4))[0, 2].mean((1, 2, 3)).mul(100).round().long()
        assert (values // 10).tolist() == [0, 1, 2, 3]  # each image gets a twin of its own
        return tuple((values % 10).tolist())

    draws = [chosen(seed) for seed in range(12)]
    assert draws == [chosen(seed) for seed in range(12)]
    assert {j for draw in draws for j in draw} == {0, 1, 2}
    assert any(len(set(draw)) > 1 for draw in draws)  # not one choice for the whole batch


def test_levels_are_taken_for_the_values_that_they_stand_for():
    model, levels = tiny(**NO_AUGMENTATION), torch.randint(256, (4, 2, 1, 8, 8), dtype=torch.uint8)
    (_, ours), (_, expected) = (
        training_views(model, images(4), dissolved_pixel_values=given, seed=0) for given in (levels, levels / 127.5 - 1)
    )
    assert torch.equal(ours, expected)


def test_dissolved_images_are_cut_as_the_images_are():
    x = images(4)
    _, views = training_views(tiny(tiles=2, **NO_AUGMENTATION), x, dissolved_pixel_values=x[:, None])
    ours, _, dissolved = views.unflatten(0, (K, 3, 4)).unbind(1)
    assert ours.shape == (K, 4, 1, 4, 4)
    assert torch.equal(dissolved, ours)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 0, 1, 8, 8), (3, 2, 1, 8, 8), (4, 2, 3, 8, 8), (4, 2, 1, 9, 9)])
def test_dissolved_images_of_another_shape(shape, tiles, refused):
    with refused("dissolved_pixel_values", str(shape)):
        tiny(tiles=tiles).train()(images(4), dissolved_pixel_values=torch.zeros(shape))


def test_training_needs_dissolved_images(refused):
    with refused("dissolved_pixel_values", "dissolver"):
        tiny().train()(images(4))


def test_diffusion_on_the_fly_draws_a_timestep_for_each_image():
    torch.manual_seed(0)
    dissolver, seen = DiffusionDissolver(build_unet(8, 1, (8, 16)), build_scheduler(), t_min=20, t_max=60), []

    def record(module, args, kwargs):
        seen.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments["timestep"])

    dissolver.unet.register_forward_pre_hook(record, with_kwargs=True)
    model = tiny(**NO_AUGMENTATION).train()
    model.dissolver = dissolver
    x = images(6)
    _, views = training_views(model, x, seed=5)
    training_views(model, x, seed=5)
    training_views(model, x, seed=6)
    first, again, other = seen
    assert first.shape == (6,)
    assert len(set(first.tolist())) > 1
    assert 20 <= first.min() <= first.max() <= 60
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(views.unflatten(0, (K, 3, 6))[0, 2], dissolver(x, first))
    convolutions = []
    dissolver.unet.conv_in.register_forward_hook(lambda module, inputs, output: convolutions.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert convolutions == [torch.float32]


def test_scoring_needs_no_dissolver_and_equals_csi():
    dia = tiny().eval()
    csi = CSIModel(CSIConfig(image_size=8, projection_size=6, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1]))).eval()
    csi.load_state_dict(dia.state_dict())
    for model in (dia, csi):
        model.fit_reference([images(5)], progress=False)
    assert torch.equal(dia(images(3, seed=1)).scores, csi(images(3, seed=1)).scores)


def test_csi_takes_no_dissolved_images():
    model = CSIModel(CSIConfig(image_size=8, backbone_config=SmallResNetConfig(hidden_sizes=[8], depths=[1])))
    with pytest.raises(TypeError, match="dissolved_pixel_values"):
        model.train()(images(4), dissolved_pixel_values=variants(4, 2))
