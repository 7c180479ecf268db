"""CSI against slow oracles written from Eq. 6–10."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, ConvNextConfig, ConvNextForImageClassification, ResNetConfig

from hf_anomaly import CSIConfig, CSIModel, SmallResNetConfig
from hf_anomaly.backbones.pretrained import load_backbone_config
from hf_anomaly.detectors.csi import modeling_csi
from hf_anomaly.ops.views import View, apply_views, crops_views

SIZE, K = 8, 4


def tiny(num_channels=1, **settings):
    torch.manual_seed(0)
    backbone = SmallResNetConfig(num_channels=num_channels, hidden_sizes=[8], depths=[1])
    settings = {
        "image_size": SIZE,
        "projection_size": 6,
        "test_views": "crops",
        "test_crop_scale": 0.54,
        "num_test_views": 2,
        "score_features": "penultimate",
        "score_whitening": False,
        "backbone_config": backbone,
    } | settings
    return CSIModel(CSIConfig(num_channels=num_channels, **settings))


def images(count, seed=0, channels=1):
    return torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shifted(image, k, shift):
    """S_k of one image (C, H, W), in NumPy."""
    array = image.numpy()
    if shift == "rotate":
        return torch.from_numpy(np.rot90(array, k, axes=(1, 2)).copy())
    if k in (2, 3):
        array = np.concatenate([array[:, :, SIZE // 2 :], array[:, :, : SIZE // 2]], axis=2)
    if k in (1, 3):
        array = np.concatenate([array[:, SIZE // 2 :], array[:, : SIZE // 2]], axis=1)
    return torch.from_numpy(array.copy())


@torch.no_grad()
def slow_features(model, image, views):
    """The features that the score compares, of f_k, z_k and the deviation of f_k's map, and W_k·f_k of one image, one view at a time."""
    features, logits = [], []
    for k in range(K):
        fs, zs, ss, ls = [], [], [], []
        for view in views:
            pixels = apply_views(shifted(image, k, model.config.shift)[None], view[None])
            f = model.encode(pixels)
            fs.append(f[0].double().numpy())
            zs.append(model.projection(f)[0].double().numpy())
            ss.append([np.std(channel) for channel in model.backbone(pixels).feature_maps[-1][0].double().numpy()])
            ls.append(model.shift_classifier(f)[0, k].double().item())
        f, z, s = (np.mean(vectors, axis=0) for vectors in (fs, zs, ss))
        unit = [vector / np.linalg.norm(vector) for vector in (z, f, s)]
        both, everything = np.concatenate(unit[:2]), np.concatenate(unit)
        features.append({"penultimate": f, "projection": z, "both": both, "all": everything}[model.config.score_features])
        logits.append(np.mean(ls))
    return features, logits


def without_detail(image):
    """Shrunk to half its size and enlarged again, with triangular filters."""
    centers, halves = np.arange(SIZE) + 0.5, 2 * (np.arange(SIZE // 2) + 0.5)
    down = np.maximum(0, 1 - abs(centers - halves[:, None]) / 2)
    up = np.maximum(0, 1 - abs(centers[:, None] - halves) / 2)
    both = (up / up.sum(1, keepdims=True)) @ (down / down.sum(1, keepdims=True))
    return torch.from_numpy(both @ image.numpy() @ both.T).float()


def slow_similarity(config, z, train, coarse):
    """To the nearest training image: the cosine, or minus the distance under the inverse of the shrunk covariance, maybe without the direction in which
    `coarse`, the features of training images with less detail, differ most."""
    u, rows = z / np.linalg.norm(z), np.array([m / np.linalg.norm(m) for m in train])
    if not config.score_whitening:
        return max(u @ row for row in rows)
    deviations = rows - rows.mean(0)
    covariance = deviations.T @ deviations / len(rows)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / len(u) * np.eye(len(u))
    metric = np.linalg.inv(shrunk) / len(u)
    if config.score_ignores_detail:
        values, vectors = np.linalg.eigh(metric)
        root = vectors * values**0.5 @ vectors.T  # another W with the same WᵀW
        changes = (np.array([m / np.linalg.norm(m) for m in coarse]) - rows) @ root
        v = np.linalg.svd(changes)[2][0]
        metric = root @ (np.eye(len(u)) - np.outer(v, v)) @ root
    return -min(((u - row) @ metric @ (u - row)) ** 0.5 for row in rows)


def slow_scores(model, bank_images, queries, views):
    """Eq. 10, with loops."""
    config = model.config
    train = [slow_features(model, x, views) for x in bank_images]
    coarse = [slow_features(model, without_detail(x), views)[0] for x in bank_images]
    lambda_sim = [1 / np.mean([np.linalg.norm(z[k]) for z, _ in train]) for k in range(K)]
    mean_logit = [np.mean([logit[k] for _, logit in train]) for k in range(K)]
    lambda_cls = [1 / mean if mean > 0 else 0 for mean in mean_logit]
    scores = []
    for x in queries:
        z, logit = slow_features(model, x, views)
        total = 0
        for k in range(K):
            similarity = slow_similarity(config, z[k], [m[k] for m, _ in train], [m[k] for m in coarse])
            norm = lambda_sim[k] * np.linalg.norm(z[k])
            if config.score_cosine and config.score_norm:
                total += similarity * norm
            elif config.score_cosine:
                total += similarity
            elif config.score_norm:
                total += norm
            if config.score_shift_logit:
                total += lambda_cls[k] * logit[k]
        scores.append(-total / K)
    return np.array(scores), lambda_sim, lambda_cls


SWITCHES = [switches for switches in itertools.product([True, False], repeat=3) if any(switches)]


@pytest.mark.parametrize(
    ("cosine", "norm", "logit", "shift", "features"),
    [
        *((*switches, "rotate", "penultimate") for switches in SWITCHES),
        (True, True, True, "rotate", "projection"),
        (True, True, True, "perm", "penultimate"),
    ],
)
def test_score_is_equation_10(cosine, norm, logit, shift, features):
    model = tiny(score_cosine=cosine, score_norm=norm, score_shift_logit=logit, shift=shift, score_features=features).eval()
    model.shift_classifier.bias.data = torch.tensor([1.0, 2.0, 3.0, -9.0])  # the last λ_cls must be left out
    bank, queries = images(5), images(4, seed=1)
    model.fit_reference([bank[:3], bank[3:]], progress=False)
    expected, lambda_sim, lambda_cls = slow_scores(model, bank, queries, crops_views(2, 0.54))
    np.testing.assert_allclose(model(queries).scores.detach().numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose(model.reference.lambda_sim.numpy(), lambda_sim, rtol=1e-5)
    np.testing.assert_allclose(model.reference.lambda_cls.numpy(), lambda_cls, rtol=1e-5)
    assert lambda_cls[3] == 0
    assert min(lambda_cls[:3]) > 0


@pytest.mark.parametrize("shift", ["rotate", "perm"])
@pytest.mark.parametrize("features", ["projection", "penultimate", "all"])
def test_embeddings_are_the_features_of_the_image_as_it_is(features, shift):
    model, queries = tiny(score_features=features, shift=shift).eval(), images(3, seed=1)
    model.fit_reference([images(5)], progress=False)
    expected, *others = np.array([slow_features(model, x, crops_views(2, 0.54))[0] for x in queries]).swapaxes(0, 1)
    np.testing.assert_allclose(model(queries, output_embeddings=True).embeddings.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert all(abs(expected - other).max() > 1e-3 for other in others)


@pytest.mark.parametrize("whitening", [True, False])
@pytest.mark.parametrize("features", ["projection", "penultimate", "both", "all"])
def test_score_of_whitened_features(features, whitening):
    model = tiny(score_features=features, score_whitening=whitening, score_shift_logit=True).eval()
    bank, queries = images(20), images(4, seed=1)
    model.fit_reference([bank], progress=False)
    expected, *_ = slow_scores(model, bank, queries, crops_views(2, 0.54))
    np.testing.assert_allclose(model(queries).scores.detach().numpy(), expected, rtol=2e-4)


def test_the_score_has_a_gradient_where_the_last_maps_are_flat():
    backbone = SmallResNetConfig(num_channels=1, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])  # of one pixel, at this size
    model = tiny(score_features="all", backbone_config=backbone).eval()
    model.fit_reference([images(5)], progress=False)
    assert model.backbone(images(1)).feature_maps[-1].shape[-2:] == (1, 1)
    queries = images(4, seed=1).requires_grad_()
    model(queries).scores.sum().backward()
    gradients = queries.grad.flatten(1)
    assert gradients.isfinite().all()
    assert (gradients.norm(dim=1) > 0).all()


@pytest.mark.parametrize(("features", "count"), [("penultimate", 20), ("all", 20), ("all", 3)])
def test_score_that_ignores_detail(features, count, tmp_path):
    model = tiny(score_features=features, score_whitening=True, score_ignores_detail=True).eval()
    bank, queries = images(count), images(4, seed=1)
    model.fit_reference([bank], progress=False)
    expected, *_ = slow_scores(model, bank, queries, crops_views(2, 0.54))
    scores = model(queries).scores.detach()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3)
    plain = tiny(score_features=features, score_whitening=True).eval().fit_reference([bank], progress=False)
    assert (scores < plain(queries).scores).all()  # a distance that sees one direction less
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(queries).scores.detach(), scores)
    assert not CSIModel.from_pretrained(tmp_path, score_ignores_detail=False).is_fitted


def test_images_with_less_detail_score_lower_where_it_is_ignored():
    """The encoder of this test sees nothing but detail, as one that dissolved images taught does."""
    bank = images(30)
    coarse = torch.stack([without_detail(image) for image in images(30, seed=1)])
    scores = {}
    for ignored in (False, True):
        model = tiny(score_whitening=True, score_ignores_detail=ignored).eval()
        model.fit_reference([bank], progress=False)
        normal, blurred = model(images(30, seed=2)).scores.mean().item(), model(coarse).scores.mean().item()
        scores[ignored] = blurred / normal
    assert scores[True] < scores[False]


@pytest.mark.parametrize("ignored", [False, True])
def test_one_training_image_is_enough_to_whiten(ignored):
    model = tiny(score_whitening=True, score_ignores_detail=ignored).eval()
    model.fit_reference([images(1)], progress=False)
    assert model(images(3, seed=1)).scores.isfinite().all()


def test_whitened_bank_is_not_read_as_another(tmp_path, caplog):
    model = tiny(score_whitening=True).eval()
    model.fit_reference([images(5)], progress=False)
    model.save_pretrained(tmp_path)
    loaded = CSIModel.from_pretrained(tmp_path, score_whitening=False)
    assert "its reference is dropped" in caplog.text
    assert not loaded.is_fitted


@pytest.mark.parametrize(
    "settings",
    [{"score_whitening": True}, {"score_features": "both", "score_whitening": False}, {"score_features": "all", "score_whitening": False}],
)
def test_the_norm_needs_features_as_they_are(settings, refused):
    with refused("score_norm", "score_whitening", "score_features"):
        tiny(score_norm=True, **settings)


def test_detail_is_ignored_by_the_whitened_distance_alone(refused):
    with refused("score_ignores_detail", "score_whitening"):
        tiny(score_ignores_detail=True)


def test_all_score_terms_off(refused):
    with refused("score_cosine", "score_norm", "score_shift_logit"):
        CSIConfig(score_cosine=False)


@pytest.mark.parametrize("used", [True, False])
def test_a_logit_that_would_flip_its_sign_is_left_out_aloud(used, caplog, tmp_path):
    model = tiny(score_shift_logit=used).eval()
    model.shift_classifier.weight.data[3] = 0
    model.shift_classifier.bias.data = torch.tensor([-9.0, 5.0, 5.0, 0.0])
    model.fit_reference([images(4)], progress=False)
    assert (model.reference.lambda_cls > 0).tolist() == [False, True, True, False]
    assert model.reference.lambda_cls[[0, 3]].tolist() == [0, 0]
    assert ("s_cls" in caplog.text) is used
    model.save_pretrained(tmp_path)
    caplog.clear()
    CSIModel.from_pretrained(tmp_path, score_shift_logit=True)
    assert "s_cls" in caplog.text
    model.reset_reference()
    model.save_pretrained(tmp_path)
    caplog.clear()
    CSIModel.from_pretrained(tmp_path, score_shift_logit=True)
    assert "s_cls" not in caplog.text


def test_training_images_score_best():
    model = tiny().eval()
    model.fit_reference([images(5)], progress=False)
    old, new = model(images(5)).scores, model(images(5, seed=1)).scores
    torch.testing.assert_close(old, torch.full((5,), -1.0), rtol=1e-5, atol=0)  # their own nearest neighbours: cos = 1
    assert old.max() < new.min()


# Reference --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score_features", "width"), [("penultimate", 8), ("projection", 6), ("both", 14), ("all", 22)])
def test_bank_holds_normalised_features_in_dataset_order(score_features, width):
    model = tiny(score_features=score_features).eval()
    x = images(5)
    model.fit_reference([x[:2], x[2:]], progress=False)
    assert model.reference.bank.shape == (K, 5, width)
    views = crops_views(2, 0.54)
    for m, k in itertools.product(range(5), range(K)):
        z = slow_features(model, x[m], views)[0][k]
        np.testing.assert_allclose(model.reference.bank[k, m].numpy(), z / np.linalg.norm(z), rtol=1e-4, atol=1e-6)


def test_max_bank_size():
    whole, part, again = tiny().eval(), tiny(max_bank_size=4).eval(), tiny(max_bank_size=4).eval()
    for seed, model in enumerate((whole, part, again)):
        torch.manual_seed(seed)  # the choice is fixed, whatever the global seed
        model.fit_reference([images(9)], progress=False)
    assert (whole.config.bank_size, part.config.bank_size) == (9, 4)
    assert part.reference.bank.shape == (K, 4, 8)
    assert torch.equal(part.reference.bank, again.reference.bank)
    rows = [next(m for m in range(9) if torch.equal(whole.reference.bank[:, m], part.reference.bank[:, i])) for i in range(4)]
    assert rows == sorted(set(rows)) != [0, 1, 2, 3]  # in order, without repetition, not simply the first
    only = tiny().eval().fit_reference([images(9)[rows]], progress=False)
    torch.testing.assert_close(part.reference.lambda_sim, only.reference.lambda_sim)


def test_memory_of_the_search_is_a_setting(peak_bytes):
    scores, peaks = [], []
    for chunk in (2**20, 2**12):
        model = tiny(search_chunk_size=chunk).eval()
        model.fit_reference([images(4)], progress=False)
        model.reference.bank = torch.randn(K, 80_000, model.score_width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            peaks.append(peak_bytes(lambda model=model: scores.append(model(images(2)).scores)))
    torch.testing.assert_close(*scores)
    assert 2**19 < peaks[0] < 1.1 * 4 * 2**20
    assert peaks[1] < peaks[0] / 4


def test_many_test_rows_are_chunked(monkeypatch):
    model = tiny(num_test_views=40).eval()
    model.fit_reference([images(4)], progress=False)
    monkeypatch.setattr(modeling_csi, "_MAX_TEST_PIXELS", 500 * SIZE**2)  # 160 rows an image: three images a chunk
    x, rows = images(7, seed=1), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    scores = model(x).scores
    assert rows == [480, 480, 160]
    torch.testing.assert_close(scores, torch.cat([model(part[None]).scores for part in x]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations_as_test_views(channels, tmp_path):
    model = tiny(channels, test_views="augmentations", num_test_views=5).eval()
    bank, queries = images(5, channels=channels), images(3, seed=1, channels=channels)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model.fit_reference([bank], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    views = model.reference.views.clone()
    assert len({tuple(view) for view in views.tolist()}) == 5
    expected, _, _ = slow_scores(model, bank, queries, views)
    np.testing.assert_allclose(model(queries).scores.detach().numpy(), expected, rtol=2e-5)
    # Scoring follows the saved views, not a new draw.
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.reference.views, views)
    loaded.reference.views = crops_views(5, 0.54)
    assert not torch.equal(loaded(queries).scores, model(queries).scores)


@pytest.mark.parametrize(("scale", "low", "high"), [(0.54, 0.54, 0.54), ((0.3, 0.5), 0.3, 0.5)])
def test_area_of_test_time_crops(scale, low, high):
    views = tiny(test_views="augmentations", num_test_views=200, test_crop_scale=scale).fixed_views()
    area = views[:, View.HALF_WIDTH] * views[:, View.HALF_HEIGHT]
    torch.testing.assert_close(torch.stack(area.aminmax()), torch.tensor([low, high]), rtol=0, atol=0.01)
    crops = tiny(test_crop_scale=scale).fixed_views()
    assert torch.equal(crops, crops_views(2, (low + high) / 2))


# Loss -------------------------------------------------------------------------------------------------------------------------


def slow_contrastive_loss(z, temperature, divisor, exclude_twins=False):
    """Eq. 6–7 on z[k][branch][i], by loops over anchors; the first two branches are A and B, a third is D."""
    views = [(k, b, i) for k in range(len(z)) for b in range(len(z[0])) for i in range(len(z[0][0]))]

    def similarity(u, v):
        a, b = z[u[0]][u[1]][u[2]], z[v[0]][v[1]][v[2]]
        return math.exp(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / temperature)

    anchors = [view for view in views if view[1] < 2]
    total = 0
    for k, b, i in anchors:
        others = [v for v in views if v != (k, b, i) and not (exclude_twins and v == (k, 2, i))]
        total -= math.log(similarity((k, b, i), (k, 1 - b, i)) / sum(similarity((k, b, i), v) for v in others))
    return total / (len(anchors) if divisor == "anchors" else len(views))


def slow_cross_entropy(logits, labels):
    return np.mean([math.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)])


def training_views(model, *args, seed=0, **kwargs):
    """The output of a training step, and the views (N, C, H, W) that the encoder saw."""
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    torch.manual_seed(seed)
    output = model.train()(*args, **kwargs)
    hook.remove()
    return output, seen[0]


def slow_losses(model, views, branches, batch_size, exclude_twins=False):
    """L_con and L_cls of the views in the order (shift, branch, image)."""
    with torch.no_grad():  # in training mode, where batch statistics are those of the same batch
        features = model.encode(views)
        z = model.projection(features).double().unflatten(0, (K, branches, batch_size)).numpy()
        logits = model.shift_classifier(features).double().numpy()
    labels = [k for k in range(K) for _ in range(branches * batch_size)]
    config = model.config
    return slow_contrastive_loss(z, config.temperature, config.loss_divisor, exclude_twins), slow_cross_entropy(logits, labels)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.2, "loss_divisor": "views", "shift_loss_weight": 0.25}])
def test_loss_is_equation_9(settings):
    model = tiny(**settings)
    output, views = training_views(model, images(3))
    contrastive, shift = slow_losses(model, views, 2, 3)
    assert output.losses["contrastive_loss"].item() == pytest.approx(contrastive, rel=1e-5)
    assert output.losses["shift_loss"].item() == pytest.approx(shift, rel=1e-5)
    assert output.loss.item() == pytest.approx(contrastive + settings.get("shift_loss_weight", 1.0) * shift, rel=1e-5)


NO_AUGMENTATION = {"crop_scale": (1.0, 1.0), "jitter_probability": 0.0, "gray_probability": 0.0, "flip_probability": 0.0}


@pytest.mark.parametrize("shift", ["rotate", "perm"])
def test_views_are_the_shifted_images_in_the_order_of_the_labels(shift):
    x = images(3)
    _, views = training_views(tiny(shift=shift, **NO_AUGMENTATION), x)
    expected = [shifted(x[i], k, shift) for k in range(K) for _ in "AB" for i in range(3)]
    torch.testing.assert_close(views, torch.stack(expected))


def test_every_view_is_augmented_by_itself():
    _, views = training_views(tiny(), images(1).expand(3, -1, -1, -1))
    views = views.unflatten(0, (K, 2 * 3))
    for k in range(K):
        assert len({view.numpy().tobytes() for view in views[k]}) == 6  # the same image, six times


# Ensembles --------------------------------------------------------------------------------------------------------------------


def alone(model, index):
    """The ensemble's encoder of that index as a detector of its own, in the model's mode."""
    single = tiny(**{name: getattr(model.config, name) for name in ("score_features", "score_whitening", "score_norm")})
    for name in ("backbone", "projection", "shift_classifier"):
        getattr(single, name).load_state_dict(getattr(model.encoders[index], name).state_dict())
    return single.train(model.training)


def test_encoders_start_apart():
    layer = tiny(projection_size=100).projection[2]  # as torch's own do
    for parameter in layer.parameters():
        assert parameter.abs().max().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
    weights = [encoder.backbone.stem[0].weight for encoder in tiny(num_encoders=3).encoders]
    assert len({weight.detach().numpy().tobytes() for weight in weights}) == 3


def test_an_ensemble_trains_as_its_encoders_would_alone():
    """But for the factor of the mean, which an optimiser such as Adam does not feel."""
    model, x = tiny(num_encoders=3), images(4)
    singles = [alone(model.train(), i) for i in range(3)]
    output, views = training_views(model, x)
    output.loss.backward()
    losses = []
    for encoder, single in zip(model.encoders, singles, strict=True):
        loss, its_views = training_views(single, x)
        assert torch.equal(views, its_views)
        loss.loss.backward()
        losses.append(loss)
        gradient = single.backbone.stem[0].weight.grad
        torch.testing.assert_close(3 * encoder.backbone.stem[0].weight.grad, gradient, rtol=1e-4, atol=1e-6)
    for name in ("contrastive_loss", "shift_loss"):
        assert output.losses[name].item() == pytest.approx(np.mean([loss.losses[name].item() for loss in losses]), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"score_features": "all", "score_whitening": True}, {"score_features": "projection", "score_norm": True}]
)
def test_an_ensembles_score_is_the_mean_of_its_encoders_scores(settings, tmp_path):
    model, x = tiny(num_encoders=3, **settings).eval(), images(5, seed=1)
    model.fit_reference([images(8)], progress=False)
    scores = [alone(model, i).fit_reference([images(8)], progress=False)(x).scores for i in range(3)]
    torch.testing.assert_close(model(x).scores, torch.stack(scores).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0], scores[1])
    embeddings = [alone(model, i).fit_reference([images(8)], progress=False)(x, output_embeddings=True).embeddings for i in range(3)]
    torch.testing.assert_close(model(x, output_embeddings=True).embeddings, torch.cat(embeddings, dim=1))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(x).scores, model(x).scores)


# Encoders ---------------------------------------------------------------------------------------------------------------------


def resnet_config(**settings):
    return ResNetConfig(
        **{"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", **settings},
        out_features=["stage2"],
    )


@pytest.mark.parametrize(("size", "first_map"), [(13, 13), (28, 14), (64, 16), (224, 14)])
def test_the_default_encoder_costs_alike_at_every_size(size, first_map):
    backbone = CSIModel(CSIConfig(image_size=size)).backbone.eval()
    assert backbone.stem(torch.zeros(1, 1, size, size)).shape[-2:] == (first_map, first_map)


@pytest.mark.parametrize("as_dict", [False, True])
def test_any_auto_backbone_is_an_encoder(as_dict, tmp_path):
    backbone = resnet_config().to_dict() if as_dict else resnet_config()
    model = tiny(backbone_config=backbone, image_size=32)
    assert type(model.backbone).__name__ == "ResNetBackbone"
    x = torch.nn.functional.interpolate(images(4), (32, 32))
    model.train()(x).loss.backward()
    model.eval().fit_reference([x], progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.config.backbone_config) is ResNetConfig
    assert torch.equal(loaded(x).scores, model(x).scores)


def test_load_backbone(tmp_path, refused):
    source = tiny()
    source.backbone.save_pretrained(tmp_path / "fits")
    model = tiny(num_encoders=2)
    torch.nn.init.zeros_(model.backbone.stem[0].weight)
    model.load_backbone(tmp_path / "fits")
    for encoder in model.encoders:
        assert torch.equal(encoder.backbone.stem[0].weight, source.backbone.stem[0].weight)
    tiny(backbone_config=SmallResNetConfig(hidden_sizes=[16], depths=[1])).backbone.save_pretrained(tmp_path / "other")
    with refused(str(tmp_path / "other"), "backbone_config"):
        model.load_backbone(tmp_path / "other")
    with refused(str(tmp_path / "fits"), "'small_resnet'", "'resnet'"):
        tiny(backbone_config=resnet_config(), image_size=32).load_backbone(tmp_path / "fits")
    weights = tmp_path / "fits" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with refused(str(tmp_path / "fits"), "backbone"):
        model.load_backbone(tmp_path / "fits")
    weights.unlink()
    torch.save(source.backbone.state_dict(), tmp_path / "fits" / "pytorch_model.bin")
    with refused(str(tmp_path / "fits"), "backbone", "safetensors"):
        model.load_backbone(tmp_path / "fits")


def test_an_earlier_stage_of_a_pretrained_backbone(tmp_path, refused):
    source = ConvNextConfig(hidden_sizes=[8, 16, 24], depths=[1, 1, 1], num_stages=3, num_channels=1)
    ConvNextForImageClassification(source).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    config = load_backbone_config(str(tmp_path), "stage2")
    model = tiny(backbone_config=config, image_size=32).load_backbone(tmp_path)  # whose norm of the last map is of no use to another
    assert model.feature_map(torch.zeros(1, 1, 32, 32)).shape == (1, 16, 4, 4)
    weights = {name: value for name, value in model.backbone.state_dict().items() if f"convnext.{name}" in before}
    assert len(weights) > 20
    assert all(torch.equal(value, before[f"convnext.{name}"]) for name, value in weights.items())
    with refused(str(tmp_path), "stage4", "stage3"):
        load_backbone_config(str(tmp_path), "stage4")
    deeper = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_channels=1)
    with refused(str(tmp_path), "backbone_config"):
        tiny(backbone_config=deeper, image_size=32).load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone_config": SmallResNetConfig(num_channels=3)}, ["backbone_config.num_channels", "3", "1"]),
        ({"backbone_config": {"hidden_sizes": [8]}}, ["backbone_config", "model_type"]),
        ({"backbone_config": {"model_type": "small_resnet", "num_channels": 3}}, ["backbone_config.num_channels"]),
        ({"temperature": 0}, ["temperature"]),
        ({"temperature": math.inf}, ["temperature"]),
        ({"shift_loss_weight": -1.0}, ["shift_loss_weight"]),
        ({"shift_loss_weight": math.nan}, ["shift_loss_weight"]),
        ({"crop_scale": (0.9, 0.5)}, ["crop_scale"]),
        ({"crop_scale": (0.5,)}, ["crop_scale"]),
        ({"color_jitter": (0.4, 0.4, 0.4)}, ["color_jitter"]),
        ({"color_jitter": (math.nan, 0.4, 0.4, 0.1)}, ["color_jitter"]),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, ["color_jitter", "hue"]),
        ({"flip_probability": 1.5}, ["flip_probability"]),
        ({"test_crop_scale": 0}, ["test_crop_scale"]),
        ({"test_crop_scale": (0.7, 0.5)}, ["test_crop_scale"]),
        ({"test_crop_scale": ["0.5", "0.7"]}, ["test_crop_scale"]),
        ({"color_jitter": [0.4, None, 0.4, 0.1]}, ["color_jitter"]),
        ({"test_crop_scale": (0.5, 0.6, 0.7)}, ["test_crop_scale"]),
        ({"num_test_views": 0}, ["num_test_views"]),
        ({"num_encoders": 0}, ["num_encoders"]),
        ({"num_encoders": 65}, ["num_encoders", "64"]),
        ({"max_bank_size": 0}, ["max_bank_size"]),
        ({"search_chunk_size": 0}, ["search_chunk_size"]),
        ({"bank_size": -1}, ["bank_size"]),
    ],
)
def test_config_values_out_of_range(settings, words, refused):
    with refused(*words):
        CSIConfig(**settings)


def test_crops_are_five_by_default():
    assert (CSIConfig().num_test_views, CSIConfig(test_views="crops").num_test_views) == (10, 5)
    assert len(CSIModel(CSIConfig(image_size=8, test_views="crops")).fixed_views().unique(dim=0)) == 5
    earlier = {**CSIConfig(test_views="crops").to_dict(), "num_test_views": 10}  # the default before
    assert CSIConfig.from_dict(earlier).num_test_views == 10


def test_a_file_that_lacks_fields_of_the_score_has_the_printed_one():
    new = CSIConfig()
    assert (new.score_features, new.score_whitening) == ("all", True)
    old = {name: value for name, value in new.to_dict().items() if name not in ("score_features", "score_whitening")}
    assert (CSIConfig.from_dict(old).score_features, CSIConfig.from_dict(old).score_whitening) == ("projection", False)
    assert CSIConfig.from_dict(new.to_dict()).to_dict() == new.to_dict()


@pytest.mark.parametrize(
    "settings", [{"shift": "spin"}, {"score_features": "head"}, {"loss_divisor": "all"}, {"test_views": "none"}, {"temperature": "warm"}]
)
def test_config_values_of_the_wrong_kind(settings):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        CSIConfig(**settings)
