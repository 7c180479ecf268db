"""What every detector must do. A new detector adds one line to DETECTORS."""

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import hf_anomaly
from hf_anomaly import (
    ADDPConfig,
    ADDPModel,
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DIAConfig,
    DIAModel,
    GaussianDissolver,
    NotFittedError,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
    image_metrics,
)
from hf_anomaly import detector as detector_module
from hf_anomaly.calibration import Float32State
from hf_anomaly.ops.tiles import cut_tiles, draw_tiles
from hf_anomaly.training import AnomalyTrainer, AnomalyTrainingArguments


def small_resnet(num_channels=1, **_):
    return SmallResNetConfig(num_channels=num_channels, hidden_sizes=[8, 16], depths=[1, 1])


def with_attributes(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


PRINTED_SCORE = {"score_features": "projection", "score_whitening": False, "score_norm": True}

# One line a detector: a tiny model that can take a training step, for images of a given size and number of channels.
DETECTORS = {
    "addp": lambda **shape: ADDPModel(ADDPConfig(hidden_sizes=[8, 16, 16], latent_size=2, **shape)),
    "csi": lambda **shape: CSIModel(CSIConfig(backbone_config=small_resnet(**shape), projection_size=16, **PRINTED_SCORE, **shape)),
    "csi_tiles": lambda image_size, **shape: CSIModel(
        CSIConfig(image_size=image_size, tiles=2 - image_size % 2, backbone_config=small_resnet(**shape), projection_size=16, **shape)
    ),
    "dia": lambda **shape: with_attributes(
        DIAModel(DIAConfig(num_encoders=2, backbone_config=small_resnet(**shape), projection_size=16, **shape)),
        dissolver=GaussianDissolver(3),
    ),
    "shared_ae": lambda **shape: SharedAEModel(SharedAEConfig(hidden_sizes=[8, 16, 16], latent_size=16, **shape)),
}

STEPS = {"shared_ae": 400}  # what a detector needs to tell the anomalies below, where that is more than 40

SHAPES = [{"image_size": 16, "num_channels": 1}, {"image_size": 12, "num_channels": 3}, {"image_size": 13, "num_channels": 1}]


def images(count, image_size=16, num_channels=1, seed=0):
    """Smooth stripes of any phase and wave length: the normal class."""
    generator = torch.Generator().manual_seed(seed)
    phase, period, contrast = (torch.rand(count, 1, 1, 1, generator=generator) for _ in range(3))
    x = torch.arange(image_size).view(1, 1, 1, -1)
    stripes = (0.5 + 0.4 * contrast) * torch.sin(6.28 * (x / (6 + 4 * period) + phase))
    noise = 0.05 * torch.randn(count, num_channels, image_size, image_size, generator=generator)
    return (stripes + noise).clamp(-1, 1)


def anomalies(count, image_size=16, num_channels=1, seed=0):
    """The same stripes with a checkerboard in a corner."""
    x = images(count, image_size, num_channels, seed)
    side, index = image_size // 2, torch.arange(image_size // 2)
    x[:, :, :side, :side] = ((index[:, None] // 2 + index // 2) % 2).float() * 1.6 - 0.8
    return x


def fitted(build, seed=0, **shape):
    torch.manual_seed(seed)
    model = build(**(shape or SHAPES[0])).eval()
    shape = {"image_size": model.config.image_size, "num_channels": model.config.num_channels}
    model.fit_reference([images(20, **shape)], progress=False)
    model.calibrate([images(39, **shape, seed=1)], false_positive_rate=0.1, progress=False)
    return model


def states(model):
    """The buffers that must stay fp32: reference and calibration."""
    return {
        f"{prefix}.{name}": buffer.detach().clone()
        for prefix, module in model.named_modules()
        if isinstance(module, Float32State)
        for name, buffer in module.named_buffers(recurse=False)
    }


def train(model, steps=40, batch_size=16, seed=0):
    """A bare loop."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        loss = model(images(batch_size, seed=1000 + step), epoch=0.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=DETECTORS)
def build(request):
    return DETECTORS[request.param]


@pytest.fixture
def model(build):
    return fitted(build)


def bits(tensor):
    return tensor.detach().numpy().tobytes()


def test_every_registered_detector_is_tested():
    assert {type(build(**SHAPES[0])) for build in DETECTORS.values()} == set(hf_anomaly.DETECTORS.values())


def test_every_registered_class_is_found_in_the_package():
    """Else `trust_remote_code=True` would not find it, see `REMOTE_CODE` in `hf_anomaly.saving`."""
    for class_ in (*hf_anomaly.DETECTORS, *hf_anomaly.DETECTORS.values()):
        assert getattr(hf_anomaly, class_.__name__) is class_
        assert class_.__name__ in hf_anomaly.__all__


# Saving and loading -----------------------------------------------------------------------------------------------------------

FRESH_PROCESS = """
from pathlib import Path
import torch
import hf_anomaly
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

for folder in sorted(Path(ROOT).iterdir()):
    model = AutoModel.from_pretrained(folder)
    assert not model.training
    scores = model(**load_file(folder / "inputs.safetensors")).scores
    result = {"scores": scores, "p_values": model.p_values(scores), "flagged": model.is_anomalous(scores)}
    classes = (type(c.from_pretrained(folder)).__name__ for c in (AutoConfig, AutoModel, AutoImageProcessor))
    save_file({k: v.contiguous() for k, v in (result | model.state_dict()).items()}, folder / "fresh.safetensors", {"classes": " ".join(classes)})
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, forks):
    """Name → (what this process computes, what another one computes from the saved folder, its classes), one process for all cases."""
    from safetensors import safe_open

    root, before = tmp_path_factory.mktemp("saved"), {}
    for name, build in DETECTORS.items():
        for seed in range(3):
            for shape in SHAPES:
                model, key = fitted(build, seed, **shape), f"{name}-{seed}-{shape['image_size']}"
                x = torch.cat([images(5, **shape, seed=2), anomalies(6, **shape)])
                scores = model(x).scores
                before[key] = {"scores": scores, "p_values": model.p_values(scores), "flagged": model.is_anomalous(scores)}
                before[key] |= {k: v.clone() for k, v in model.state_dict().items()}
                model.save_pretrained(root / key)
                AnomalyImageProcessor.for_images(**shape).save_pretrained(root / key)
                save_file({"pixel_values": x}, root / key / "inputs.safetensors")
    statuses, output = forks.run(f"ROOT = {str(root)!r}\n{FRESH_PROCESS}")
    assert statuses == [0], output
    after = {key: load_file(root / key / "fresh.safetensors") for key in before}
    classes = {key: safe_open(root / key / "fresh.safetensors", "pt").metadata()["classes"].split() for key in before}
    return before, after, classes


def test_a_fresh_process_scores_bit_for_bit_as_before(fresh):
    before, after, _ = fresh
    for key, expected in before.items():
        assert expected.keys() == after[key].keys()
        different = [name for name, value in expected.items() if bits(value) != bits(after[key][name])]
        assert not different, key
        assert expected["scores"].unique().numel() > 5  # the comparison means something


def test_a_fresh_process_finds_the_classes(fresh):
    for key, names in fresh[2].items():
        config_class = type(DETECTORS[key.split("-")[0]](**SHAPES[0]).config)
        assert names == [config_class.__name__, hf_anomaly.DETECTORS[config_class].__name__, "AnomalyImageProcessor"]


def test_config_round_trip(model, tmp_path):
    config = model.config
    json.loads(config.to_json_string(), parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert (config.image_size, config.num_channels, config.num_calibration_scores) == (16, 1, 39)


def test_what_the_trainer_of_transformers_leaves_in_the_config(model, tmp_path):
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(images(4)).scores, model(images(4)).scores)


def test_new_weights_are_not_fitted(model, build, refused):
    """Of the configuration of a fitted and calibrated detector."""
    before = model.config.to_dict()
    new = AutoModel.from_config(model.config).eval()
    assert (new.is_fitted, new.calibration.is_calibrated) == (False, False)
    assert {name: value.shape for name, value in states(new).items()} == {
        name: value.shape for name, value in states(build(**SHAPES[0])).items()
    }
    with refused("fit_reference", error=NotFittedError):
        new(images(4))
    assert model.config.to_dict() == before
    new.fit_reference([images(20)], progress=False)
    assert new(images(4)).scores.isfinite().all()


def test_detectors_of_one_configuration(build, tmp_path):
    """What one of them learns is not written into the others."""
    config = build(**SHAPES[0]).config
    first, second = (fitted(lambda **_: hf_anomaly.DETECTORS[type(config)](config)) for _ in range(2))
    second.reset_reference()
    third = type(first)(config).eval()
    assert (second.is_fitted, third.is_fitted, third.calibration.is_calibrated) == (False, False, False)
    assert all(model.backbone.config is model.config.backbone_config for model in (first, second) if hasattr(model, "backbone"))
    first.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(images(4)).scores, first(images(4)).scores)


def test_misspelt_config_field(build, refused):
    config_class = type(build(**SHAPES[0]).config)
    with refused("image_sise", "'image_size'"):
        config_class(image_sise=16)
    with refused("xyzzy", config_class.__name__):
        config_class(xyzzy=16)


def test_config_values_out_of_range(build, refused):
    for name, value in {"image_size": 0, "num_channels": 2, "num_calibration_scores": -1}.items():
        with refused(name):
            type(build(**SHAPES[0]).config)(**{name: value})


def test_state_dict_holds_the_detector_alone(build):
    model = build(**SHAPES[0])
    assert not [key for key in model.state_dict() if "dissolver" in key]


class NetworkDissolver(torch.nn.Conv2d):
    is_deterministic = True

    def forward(self, pixel_values, timesteps=None):
        return super().forward(pixel_values)


def test_the_dissolver_stays_out_of_the_weights_even_if_it_is_a_module():
    model = DETECTORS["dia"](**SHAPES[0])
    keys, count = list(model.state_dict()), len(list(model.parameters()))
    model.dissolver = NetworkDissolver(1, 1, 3, padding=1)
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == count
    model.train()(images(4)).loss.backward()
    assert model.dissolver.weight.grad is None


def test_meta_device(model, tmp_path):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    model.save_pretrained(tmp_path)
    empty = AutoModel.from_pretrained(tmp_path, device_map="meta")
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    loaded = AutoModel.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(loaded(images(4)).scores, model(images(4)).scores)


def test_weights_put_aside(model, tmp_path):
    """As accelerate does with `device_map="auto"` where they do not fit: parameters are "meta" then, and it still computes on the CPU."""
    model.save_pretrained(tmp_path)
    places = {name: "disk" for name, _ in model.named_children()} | {"calibration": "cpu"}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "weights", false_positive_rate=0.2)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert loaded.device.type == "cpu"
    assert loaded.calibration.threshold == model.calibration.threshold_at(0.2)
    assert torch.equal(loaded(images(4)).scores, model(images(4)).scores)
    loaded.fit_reference([images(20)], progress=False).calibrate([images(39, seed=1)], false_positive_rate=0.1, progress=False)
    assert all(torch.equal(buffer, states(model)[name]) for name, buffer in states(loaded).items())


# Scores -----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_depend_on_the_image_alone(model):
    x = torch.cat([images(4, seed=2), anomalies(3)])
    scores = model(x).scores
    assert scores.shape == (7,)
    assert scores.dtype == torch.float32
    for size in (1, 3):
        torch.testing.assert_close(torch.cat([model(part).scores for part in x.split(size)]), scores, rtol=1e-5, atol=0)
    order = torch.tensor([6, 2, 0, 5, 3, 1, 4])
    torch.testing.assert_close(model(x[order]).scores, scores[order], rtol=1e-5, atol=0)
    companions = torch.cat([anomalies(2, seed=9), x[:1], torch.ones(3, 1, 16, 16)])
    torch.testing.assert_close(model(companions).scores[2], scores[0], rtol=1e-5, atol=0)


def test_score_iterates_over_batches(model, refused):
    x = torch.cat([images(4, seed=2), anomalies(3)])
    labels = torch.tensor([0] * 4 + [1] * 3)
    scores, found = model.score(
        [{"pixel_values": x[:5], "labels": labels[:5]}, {"pixel_values": x[5:], "labels": labels[5:]}], progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(scores, model(x).scores, rtol=1e-5, atol=0)
    assert torch.equal(found, labels)
    assert model.score([x], progress=False)[1] is None
    with refused("some batches have labels and others none"):
        model.score([{"pixel_values": x, "labels": labels}, x], progress=False)


def test_scoring_neither_draws_nor_disturbs_random_numbers(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(images(3)).scores
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model(images(3)).scores, first)


def test_eval_mode_gives_scores_and_no_loss(model):
    output = model(images(3), labels=torch.zeros(3), output_embeddings=True)
    assert output.loss is None
    assert output.losses is None
    assert output.anomaly_maps is None
    assert output.embeddings.shape[0] == 3
    assert model(images(3)).embeddings is None


def test_it_takes_images(model):
    """As `transformers.Pipeline` prints it."""
    assert model.input_modalities == ("image",)


def test_tuples(model):
    scores = model(images(3)).scores
    (alone,) = model(images(3), return_dict=False)
    assert torch.equal(alone, scores)
    assert torch.equal(model(images(3)).to_tuple()[0], scores)


def test_a_config_that_asks_for_tuples(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"return_dict": False}
    if "backbone_config" in config and config["backbone_config"] is not None:
        config["backbone_config"]["return_dict"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    scores, _ = AutoModel.from_pretrained(tmp_path).score([images(3)], progress=False)
    assert torch.equal(scores, model(images(3)).scores)


def test_maps_or_a_reason(model, refused):
    if model.supports_anomaly_maps:
        maps = model(images(3), output_anomaly_maps=True).anomaly_maps
        assert maps.shape == (3, 1, 16, 16)
        assert maps.dtype == torch.float32
    else:
        with refused("output_anomaly_maps", model.unsupported_maps_reason):
            model(images(3), output_anomaly_maps=True)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_an_image_is_as_anomalous_as_its_tiles(build, at_once, monkeypatch):
    """Against a detector of images as small as the tiles are."""
    monkeypatch.setattr(detector_module, "_MAX_CUT_PIXELS", at_once)
    if build is DETECTORS["csi_tiles"]:
        build = DETECTORS["csi"]
    train, x = images(6, 32), anomalies(3, 32)
    whole, small = build(image_size=32, num_channels=1, tiles=2), build(image_size=16, num_channels=1)
    small.load_state_dict(whole.state_dict())
    whole.eval().fit_reference([train[:4], train[4:]], progress=False)
    small.eval().fit_reference([cut_tiles(train, 2)], progress=False)
    asked = {"output_anomaly_maps": small.supports_anomaly_maps, "output_embeddings": True}
    found, tiles = whole(x, output_anomaly_maps=True, output_embeddings=True), small(cut_tiles(x, 2), **asked)
    torch.testing.assert_close(found.scores, tiles.scores.view(3, 4).amax(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.embeddings, tiles.embeddings.view(3, 4, -1).mean(1), rtol=1e-5, atol=1e-6)
    maps = tiles.scores[:, None, None, None].expand(12, 1, 16, 16) if tiles.anomaly_maps is None else tiles.anomaly_maps
    torch.testing.assert_close(cut_tiles(found.anomaly_maps, 2), maps, rtol=1e-5, atol=1e-6)
    losses = []
    for model, batch in ((whole, lambda: x), (small, lambda: draw_tiles(2, x)[0])):
        torch.manual_seed(0)
        losses.append(model.train()(batch(), epoch=0.0).loss)
    assert losses[0] == pytest.approx(losses[1].item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_wrong_pixel_values(model, training, refused):
    model.train(training)
    with refused("(batch, 1, 16, 16)", "(2, 3, 16, 16)", "processor"):
        model(images(2, num_channels=3))
    with refused("(2, 1, 15, 15)"):
        model(images(2, image_size=15))
    with refused("(1, 16, 16)"):
        model(images(1)[0])
    for value in (float("nan"), float("inf")):
        x = images(3)
        x[1, 0, 2, 2] = value
        with refused("pixel_values[1]", "NaN"):
            model(x)
    for x in (images(2).numpy(), [*images(2)]):  # the second is the processor's without return_tensors
        with refused(f"a {type(x).__name__}", "return_tensors='pt'"):
            model(x)
    x = images(3)
    x[2] = (x[2] + 1) * 127.5
    with refused("pixel_values[2]", "[−1, 1]", "processor"):
        model(x)


def test_a_score_that_is_not_finite_is_no_verdict(model, refused):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with refused("not finite: 0, 1, 2;"):
        model(images(3))
    with refused("normal image 0", "finite"):
        model.fit_reference([images(3)], progress=False)
    with refused("not finite"):
        model.calibrate([images(3)], progress=False)


@torch.no_grad()
def test_a_batch_of_no_images(model):
    output = model(images(0), output_anomaly_maps=model.supports_anomaly_maps, output_embeddings=True)
    assert output.scores.shape == (0,)
    assert output.embeddings.shape[0] == 0


def test_integers_are_no_pixel_values(model, refused):
    uses = (model, *(lambda x, use=use: use([x], progress=False) for use in (model.fit_reference, model.calibrate, model.score)))
    for use, dtype in itertools.product(uses, (torch.uint8, torch.int64, torch.bool)):
        with refused(str(dtype), "[−1, 1]"):
            use((images(3) > 0).to(dtype))


# Exporting --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_program_scores_any_batch(build):
    shape = SHAPES[1]  # test-time views change the colours of RGB images
    model = fitted(build, **shape)
    asked = {"output_anomaly_maps": model.supports_anomaly_maps, "output_embeddings": True}
    batches = {"pixel_values": {0: torch.export.Dim("batch")}} | dict.fromkeys(asked)
    program = torch.export.export(model, (images(3, **shape),), asked, dynamic_shapes=batches, strict=False).module()
    for count in (1, 100):  # more than CSI sees at once when it is not exported
        x = torch.cat([images(count, **shape, seed=2), anomalies(1, **shape)])
        exported, expected = program(x, **asked), model(x, **asked)
        torch.testing.assert_close(exported.scores, expected.scores, rtol=1e-5, atol=0)
        torch.testing.assert_close(exported.embeddings, expected.embeddings, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(exported.anomaly_maps, expected.anomaly_maps, rtol=1e-5, atol=1e-6)
    x[1] = torch.nan
    assert program(x, **asked).scores.isinf().tolist() == [row == 1 for row in range(len(x))]  # above every threshold


@torch.no_grad()
def test_scores_of_one_compiled_graph(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for x in (images(3), anomalies(5)):
        torch.testing.assert_close(compiled(x).scores, model(x).scores, rtol=1e-5, atol=0)


# Fitting and calibrating ------------------------------------------------------------------------------------------------------


def test_nothing_works_before_its_stage(build, refused):
    model = build(**SHAPES[0]).eval()
    assert not model.is_fitted
    for use in (model, lambda x: model.score([x], progress=False), lambda x: model.calibrate([x], progress=False)):
        with refused("fit_reference", error=NotFittedError):
            use(images(2))
    model.fit_reference([images(4)], progress=False)
    assert model.is_fitted
    scores = model(images(2)).scores
    for use in (model.p_values, model.is_anomalous, lambda s: model.is_anomalous(s, 0.5)):
        with refused("calibrate", error=NotFittedError):
            use(scores)


def test_refitting_drops_the_calibration(model, refused):
    scores = model(images(2)).scores
    model.p_values(scores)
    model.fit_reference([images(5)], progress=False)
    assert (model.config.num_calibration_scores, model.config.false_positive_rate) == (0, None)
    with refused("calibrate", error=NotFittedError):
        model.p_values(scores)


def test_calibration_knows_what_it_was_made_for(model):
    config = model.config
    assert set(config.score_fields) <= set(config.to_dict())
    assert config.calibrated_for == config.values_of(config.score_fields)
    json.dumps(config.calibrated_for)
    model.reset_reference()
    assert config.calibrated_for is None


def test_reset_reference(model, build, tmp_path, refused):
    shapes = {name: buffer.shape for name, buffer in states(build(**SHAPES[0])).items()}
    model.reset_reference()
    assert {name: buffer.shape for name, buffer in states(model).items()} == shapes
    with refused("fit_reference", error=NotFittedError):
        model(images(2))
    model.save_pretrained(tmp_path)  # as training checkpoints are
    assert not AutoModel.from_pretrained(tmp_path).is_fitted


def test_fitted_in_inference_mode_it_is_differentiable_all_the_same(build):
    model = build(**SHAPES[0]).eval()
    with torch.inference_mode():
        model.fit_reference([images(20)], progress=False).calibrate([images(39, seed=1)], progress=False)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    x = images(3).requires_grad_()
    model(x).scores.sum().backward()
    assert x.grad.isfinite().all()


def test_fitting_does_not_depend_on_the_batches(build):
    x = images(10)
    one, many = (fitted(build) for _ in range(2))
    one.fit_reference([x], progress=False)
    many.fit_reference([{"pixel_values": part, "labels": torch.zeros(len(part))} for part in x.split(3)], progress=False)
    for (name, left), right in zip(states(one).items(), states(many).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False])
def test_fitting_and_scoring_keep_the_mode_and_the_weights(model, training):
    model.train(training)
    weights = {name: value.clone() for name, value in model.state_dict().items() if name not in states(model)}
    model.fit_reference([images(4)], progress=False)
    model.calibrate([images(4, seed=1)], progress=False)
    assert model.training is training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("method", ["fit_reference", "calibrate"])
def test_only_normal_images_and_at_least_one(model, method, refused):
    before = states(model)
    for key, labels in (("labels", torch.tensor([0, 0, 1])), ("labels", [0, 0, 1]), ("label", torch.tensor([0, 0, 1]))):
        with refused(method, "image 2", "anomalous"):
            getattr(model, method)([{"pixel_values": images(3), key: labels}], progress=False)
    with refused("normal"):
        getattr(model, method)([], progress=False)
    for batch in ([images(3)], {"image": images(3)}, {"pixel_values": images(3).numpy()}):  # the first is a TensorDataset's
        with refused(f"a batch is a {type(batch).__name__}", "pixel_values"):
            getattr(model, method)([batch], progress=False)
    assert all(torch.equal(before[name], buffer) for name, buffer in states(model).items())


def test_false_positive_rate_out_of_range(model, refused):
    before, fields = states(model), model.config.to_dict()
    for rate in (0, 1, -0.1, 2, float("nan")):
        with refused("false_positive_rate", str(rate)):
            model.calibrate([None], false_positive_rate=rate, progress=False)  # no batch is looked at
    assert all(torch.equal(before[name], buffer) for name, buffer in states(model).items())
    assert model.config.to_dict() == fields


def test_verdicts_are_the_threshold(model, refused):
    scores = torch.cat([model(images(20, seed=3)).scores, model.calibration.scores]).detach()
    threshold = model.calibration.threshold
    assert torch.equal(model.is_anomalous(scores), scores > threshold)
    assert not model.is_anomalous(threshold[None]).any()  # strictly above
    assert torch.equal(model.is_anomalous(scores), model.p_values(scores) <= model.config.false_positive_rate)
    for kind in (scores.numpy(), scores.tolist()):
        assert torch.equal(model.is_anomalous(kind), model.is_anomalous(scores))
        assert torch.equal(model.p_values(kind), model.p_values(scores))
    for decide in (model.is_anomalous, model.p_values):
        with refused("number 1", "NaN"):
            decide([0.5, float("nan")])


# Training ---------------------------------------------------------------------------------------------------------------------


def test_training_mode_gives_losses_and_no_scores(build):
    torch.manual_seed(0)
    model = build(**SHAPES[0]).train()  # unfitted: training needs no reference
    output = model(images(4), labels=torch.zeros(4), epoch=0.0)
    assert output.scores is None
    assert output.anomaly_maps is None
    assert output.loss.shape == ()
    assert output.losses
    assert all(name.endswith("_loss") and value.shape == () for name, value in output.losses.items())
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_training_draws_from_the_global_seed(build):
    model = build(**SHAPES[0]).train()

    def loss(seed):
        """And whether anything was drawn."""
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        value = model(images(4), epoch=0.0).loss.item()
        return value, not torch.equal(torch.get_rng_state(), before)

    (first, draws), (other, _) = loss(1), loss(2)
    assert loss(1)[0] == first
    assert (other != first) == draws


@pytest.mark.parametrize("name", DETECTORS)
def test_training_tells_normal_from_anomalous(name):
    torch.manual_seed(0)
    model = DETECTORS[name](**SHAPES[0])
    losses = train(model, STEPS.get(name, 40))
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < sum(losses[:5])
    model.eval().fit_reference([images(64, seed=1)], progress=False)
    with torch.no_grad():
        normal, anomalous = model(images(40, seed=2)).scores, model(anomalies(40, seed=3)).scores
    assert normal.mean() < anomalous.mean()
    assert image_metrics(torch.cat([normal, anomalous]).numpy(), [0] * 40 + [1] * 40)["auroc"] > 0.8


# Data types -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casts_leave_reference_and_calibration_alone(model, dtype):
    before = states(model)
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert model.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    for name, buffer in states(model).items():
        assert buffer.dtype == torch.float32
        assert bits(buffer) == bits(before[name]), name
    model.float()
    assert all(bits(buffer) == bits(before[name]) for name, buffer in states(model).items())


@torch.no_grad()
def test_bfloat16_ranks_as_float32(model):
    blend = torch.linspace(0, 1, 40).view(-1, 1, 1, 1)
    x = images(40, seed=2) * (1 - blend) + blend * anomalies(40, seed=5)
    exact = model(x).scores
    model.to(torch.bfloat16)
    rounded = model.score([x], progress=False)[0]
    assert rounded.dtype == torch.float32
    ranks = torch.stack([s.argsort().argsort().float() for s in (exact, rounded)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loading_in_a_dtype_equals_casting(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    model.to(dtype)
    assert loaded.dtype == dtype
    assert loaded(images(5)).scores.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.score([images(5)], progress=False)[0], model.score([images(5)], progress=False)[0])


def test_after_training_in_bf16_it_scores_as_it_will_be_loaded(build, tmp_path):
    rows = [{"pixel_values": image} for image in images(34)]
    arguments = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    args = AnomalyTrainingArguments(**arguments, use_cpu=True, bf16=True, disable_tqdm=True, report_to="none")
    torch.manual_seed(0)
    trainer = AnomalyTrainer(build(**SHAPES[0]), args, train_dataset=rows[:14], calibration_dataset=rows[14:])
    trainer.train()
    trainer.fit_reference()
    trainer.calibrate()
    before = trainer.model.eval()
    before.save_pretrained(tmp_path / "saved")
    after = AutoModel.from_pretrained(tmp_path / "saved")
    x = images(8, seed=2)
    with torch.no_grad():
        scores = after(x).scores
        assert bits(before(x).scores) == bits(scores)
        with torch.autocast("cpu", torch.bfloat16):
            assert bits(after(x).scores) == bits(scores)
            refitted = copy.deepcopy(after).fit_reference([images(34)[:14]], progress=False)
    assert bits(torch.from_numpy(trainer.predict([{"pixel_values": image} for image in x]).predictions)) == bits(scores)
    after.fit_reference([images(34)[:14]], progress=False).calibrate([images(34)[14:]], progress=False)
    for name, value in states(after).items():
        assert bits(states(before)[name]) == bits(value), name
        if name.startswith("reference"):
            assert bits(states(refitted)[name]) == bits(value), name


def test_the_processor_and_a_cast_model_go_together(model):
    processor = AnomalyImageProcessor.for_images(16, 1)
    inputs = processor(images=list(images(3) / 2 + 0.5), return_tensors="pt")
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype)(**inputs).scores.dtype == torch.float32


def test_auto_image_processor(model, tmp_path):
    model.save_pretrained(tmp_path)
    AnomalyImageProcessor.for_images(16, 1).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is AnomalyImageProcessor
