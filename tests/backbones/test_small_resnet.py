import itertools

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig

from hf_anomaly import SmallResNetBackbone, SmallResNetConfig


def tiny(**settings):
    torch.manual_seed(0)
    return SmallResNetBackbone(SmallResNetConfig(**{"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], **settings}))


@pytest.mark.parametrize(("channels", "stride", "size"), [(1, 1, 8), (3, 2, 4)])
def test_shapes(channels, stride, size):
    model = tiny(num_channels=channels, stem_stride=stride, out_features=["stem", "stage1", "stage2", "stage3"])
    maps = model(torch.randn(2, channels, 8, 8)).feature_maps
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, size, size),
        (2, 8, size, size),
        (2, 12, size // 2, size // 2),
        (2, 16, size // 4, size // 4),
    ]
    assert model.channels == [m.shape[1] for m in maps]


def test_the_last_stage_is_the_default():
    model = tiny()
    assert model.config.out_features == ["stage3"]
    assert model.channels == [16]
    (alone,) = model(torch.randn(2, 1, 8, 8)).feature_maps
    assert alone.shape == (2, 16, 2, 2)
    assert model(torch.randn(2, 1, 8, 8), return_dict=False)[0][0].shape == alone.shape


@torch.no_grad()
def test_the_maps_of_all_stages():
    model, x = tiny().eval(), torch.randn(2, 1, 8, 8)
    assert model(x).hidden_states is None
    output = model(x, output_hidden_states=True)
    assert [tuple(m.shape[1:]) for m in output.hidden_states] == [(8, 8, 8), (8, 8, 8), (12, 4, 4), (16, 2, 2)]
    assert torch.equal(output.hidden_states[-1], output.feature_maps[0])
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_the_order_in_memory_changes_nothing_but_the_speed(channels):
    model = tiny(num_channels=channels, out_features=["stage1", "stage3"]).eval()
    x = torch.randn(2, channels, 8, 8)
    maps = model(x).feature_maps
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    model.memory_format = torch.contiguous_format
    for ours, plain in zip(maps, model(x).feature_maps, strict=True):
        assert plain.is_contiguous()
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("channels", "stride"), [*itertools.product((1, 3), (1, 6, 10, 16)), (1, 4), (3, 9)])
def test_gradients_of_the_stem(channels, stride):
    """Of one channel, and of an even stride, it takes other ways through oneDNN."""
    model = tiny(num_channels=channels, stem_stride=stride, out_features=["stem"]).eval()
    x = torch.randn(4, channels, 36, 36)

    def gradients(model, x):
        model.zero_grad()
        x = x.clone().requires_grad_()
        model(x).feature_maps[0].square().mean().backward()
        return x.grad, model.stem[0].weight.grad.clone()

    ours = gradients(model, x)
    for gradient, expected in zip(ours, gradients(model.double(), x.double()), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("width", [3, 4, 6, 8, 12])
def test_gradients_of_narrow_blocks_in_channels_last(width):
    """oneDNN #6035: a 1×1 convolution with a stride, of fewer channels than a vector register holds, gets wrong gradients or crashes."""
    block = tiny(hidden_sizes=[width, 8, 8]).stages[1][0].eval()
    x, target = torch.randn(8, width, 32, 32), torch.randn(8, 8, 16, 16)

    def gradients(block, x, target):
        block.zero_grad()
        (block(x) * target).mean().backward()
        return [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]

    ours = gradients(block, x.to(memory_format=torch.channels_last), target)
    exact = gradients(block.double(), x.double(), target.double())
    assert len(ours) == 9
    for gradient, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stride", [5, 6, 8, 10, 16])  # margins 2, 2, 2, 3, 4: odd ones are padded to pairs
def test_the_stem_is_a_convolution(stride):
    stem = tiny(num_channels=3, stem_stride=stride).double().stem[0]
    for size, memory_format in itertools.product((35, 36, 40), (torch.contiguous_format, torch.channels_last)):
        x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=memory_format)
        torch.testing.assert_close(stem(x), nn.Conv2d.forward(stem, x))


def test_blocks_add_to_a_shortcut():
    model = tiny().eval()
    block = model.stages[0][0]
    nn.init.zeros_(block.residual[3].weight)  # the residual branch gives nothing: the block is the identity on positive maps
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_group_norm_has_no_batch_statistics():
    torch.manual_seed(0)
    grouped, batched = tiny(norm="group").train(), tiny().train()
    assert not [m for m in grouped.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not list(grouped.buffers())
    x = torch.randn(4, 1, 8, 8)
    alone = torch.cat([grouped(row[None]).feature_maps[0] for row in x])
    torch.testing.assert_close(grouped(x).feature_maps[0], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batched(x).feature_maps[0][:1], batched(x[:1]).feature_maps[0], atol=1e-2)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_save_and_load_through_the_auto_classes(norm, tmp_path):
    model = tiny(norm=norm, out_features=["stage2"])
    model(torch.randn(8, 1, 8, 8))  # batch statistics other than the initial ones
    model.eval().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert type(AutoBackbone.from_config(config)) is SmallResNetBackbone
    loaded = SmallResNetBackbone.from_pretrained(tmp_path)  # AutoBackbone.from_pretrained takes Hub ids only
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x).feature_maps[0], model(x).feature_maps[0])


def test_initial_maps_keep_their_scale():
    """Kaiming's initialisation; transformers' own N(0, 0.02) would let the signal die out."""
    model = tiny(hidden_sizes=[32], depths=[1], norm="group")
    weight = model.stages[0][0].residual[0].weight
    assert weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("settings", [{"depths": [1]}, {"hidden_sizes": [], "depths": []}, {"depths": [1, 0, 1]}, {"stem_stride": 0}])
def test_wrong_config(settings, refused):
    with refused(next(iter(settings))):
        SmallResNetConfig(**{"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], **settings})


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16])
def test_no_pixel_is_skipped(stride):
    model = tiny(stem_stride=stride).eval()
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    model.stem[0](x).square().sum().backward()
    assert (x.grad != 0).all()
