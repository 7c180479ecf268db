"""From a detector's output to something a person sees: the right place, the right size, one range for all."""

import errno
import inspect
import json
import runpy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModel

from hf_anomaly import AnomalyDetectorOutput, AnomalyImageProcessor, SharedAEConfig, SharedAEModel, overlay_anomaly_map
from hf_anomaly.calibration import normal_map_range
from hf_anomaly.ops.maps import map_levels
from hf_anomaly.ops.resizing import resize
from hf_anomaly.visualization import DIMMED, HEAT, VISIBLE, enlarge, image_grid

ROOT = Path(__file__).parents[1]
SIZE = 16
WIDTH, HEIGHT = 60, 40
LEFT, TOP, SIDE = 41, 6, 9  # of the planted square: above the middle, at the right


def textures(count, seed, planted=False):
    """Gray photographs of one woven cloth, (HEIGHT, WIDTH) uint8, perhaps with a square on them."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    shifts = generator.random((2, count, 1, 1))
    cloth = 0.5 + 0.2 * np.sin(2 * np.pi * (columns / 30 + shifts[0])) + 0.1 * np.sin(2 * np.pi * (rows / 20 + shifts[1]))
    if planted:
        square = np.s_[:, TOP : TOP + SIDE, LEFT : LEFT + SIDE]
        cloth[square] = (cloth[square] + 0.5) % 1
    return [PIL.Image.fromarray(image) for image in np.rint(255 * cloth).astype(np.uint8)]


@pytest.fixture(scope="module")
def processor():
    return AnomalyImageProcessor.for_images(SIZE, 1)


@pytest.fixture(scope="module")
def detector(processor):
    """A real one, trained for seconds."""
    torch.manual_seed(0)

    def pixels(count, seed):
        return processor(images=textures(count, seed), return_tensors="pt")["pixel_values"]

    model = SharedAEModel(SharedAEConfig(image_size=SIZE, hidden_sizes=[8, 16, 16], latent_size=16, normal_label="normal")).train()
    optimizers = {name: torch.optim.Adam(parameters, 3e-3) for name, parameters in model.phases.items()}
    batches = pixels(256, 0).split(16)
    for step in range(160):
        for phase, optimizer in optimizers.items():
            model.zero_grad()
            model(batches[step % 16], epoch=step / 16, phase=phase).loss.backward()
            optimizer.step()
    model.eval().fit_reference(batches, progress=False)
    return model.calibrate(pixels(60, 1).split(16), progress=False)


def output_of(detector, processor, images):
    with torch.no_grad():
        return detector(**processor(images=images, return_tensors="pt"), output_anomaly_maps=True)


def in_the_square(row, column):
    return TOP - 1 <= row <= TOP + SIDE and LEFT - 1 <= column <= LEFT + SIDE


# From a real detector ---------------------------------------------------------------------------------------------------------


def test_the_processed_map_peaks_where_the_square_was_planted(detector, processor):
    images = textures(6, 2, planted=True)
    results = processor.post_process_anomaly_detection(output_of(detector, processor, images), [image.size[::-1] for image in images])
    for result in results:
        assert isinstance(result["score"], float)
        assert result["anomaly_map"].shape == (HEIGHT, WIDTH)
        assert result["anomaly_map"].dtype == torch.float32
        assert in_the_square(*divmod(int(result["anomaly_map"].argmax()), WIDTH))


def test_the_overlay_is_hot_where_the_square_was_planted(detector, processor):
    square = np.s_[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    measured = {}
    for planted in (True, False):
        images = textures(6, 3, planted)
        heats = []
        for image, one in zip(images, output_of(detector, processor, images).anomaly_maps, strict=True):
            overlay = overlay_anomaly_map(image, one, value_range=detector.config.anomaly_map_range)
            assert (overlay.mode, overlay.size) == ("RGB", (WIDTH, HEIGHT))
            heat = np.ptp(np.asarray(overlay).astype(float), axis=2)  # the cloth is gray
            heats.append((heat[square].mean(), heat.mean()))
        measured[planted] = heats
    for inside, everywhere in measured[True]:
        assert inside > 5 * everywhere
        assert inside > 3 * max(normal for heat in measured[False] for normal in heat)


def test_calibration_learns_the_range_of_normal_maps(detector, processor, tmp_path):
    low, high = detector.config.anomaly_map_range
    maps = output_of(detector, processor, textures(60, 1)).anomaly_maps.flatten(1)
    peaks = sorted(maps.max(1).values.tolist())
    assert low == pytest.approx(maps.median(1).values.median().item())
    assert high == pytest.approx(peaks[58 - 1])  # ⌈.95 · 61⌉ = 58
    detector.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.anomaly_map_range == [low, high]


def test_a_new_reference_drops_the_range(processor):
    model, x = SharedAEModel(SharedAEConfig(image_size=8, hidden_sizes=[2, 2, 2])).eval(), torch.rand(20, 1, 8, 8)
    assert model.fit_reference([x], progress=False).config.anomaly_map_range is None
    assert len(model.calibrate([x], progress=False).config.anomaly_map_range) == 2
    assert model.fit_reference([x], progress=False).config.anomaly_map_range is None


def test_the_range_of_few_or_constant_maps():
    levels = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 9.0]])
    assert normal_map_range(levels, 0.05) == [2, 9]  # three images are too few for 5 %
    assert normal_map_range(levels, 0.5) == [2, 5]
    low, high = normal_map_range(map_levels(torch.full((3, 1, 4, 4), 0.5)), 0.5)
    assert low == 0.5 < high


# post_process_anomaly_detection -----------------------------------------------------------------------------------------------


def slow_bilinear(array, height, width):
    """Between the centres of the pixels; the border's value beyond them."""
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * array.shape[0] / height - 0.5, 0), array.shape[0] - 1)
            x = min(max((j + 0.5) * array.shape[1] / width - 0.5, 0), array.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, array.shape[0] - 1), min(left + 1, array.shape[1] - 1)
            above = array[top, left] * (1 - x + left) + array[top, right] * (x - left)
            below = array[bottom, left] * (1 - x + left) + array[bottom, right] * (x - left)
            result[i, j] = above * (1 - y + top) + below * (y - top)
    return result


def test_stretching_is_bilinear():
    maps = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    for one, stretched in zip(maps, resize(maps, (9, 13)), strict=True):
        np.testing.assert_allclose(stretched[0], slow_bilinear(one[0].numpy(), 9, 13), atol=1e-6)


def test_a_peak_survives_shrinking():
    maps = torch.zeros(1, 1, 32, 32)
    maps[..., 9, 22] = 1
    small = resize(maps, (8, 8))[0, 0]
    assert divmod(int(small.argmax()), 8) == (2, 5)
    assert small.sum().item() == pytest.approx(8 * 8 / (32 * 32))


def test_sizes_of_their_own(processor, refused):
    maps = torch.rand(3, 1, 8, 8)
    output = AnomalyDetectorOutput(scores=torch.tensor([1.0, 2.0, 3.0]), anomaly_maps=maps)
    for sizes in ([(4, 9), (30, 20), (8, 8)], torch.tensor([[4, 9], [30, 20], [8, 8]])):
        results = processor.post_process_anomaly_detection(output, sizes)
        assert [result["anomaly_map"].shape for result in results] == [(4, 9), (30, 20), (8, 8)]
        assert [result["score"] for result in results] == [1, 2, 3]
        torch.testing.assert_close(results[2]["anomaly_map"], maps[2, 0])
    assert [result["anomaly_map"].shape for result in processor.post_process_anomaly_detection(output)] == [(8, 8)] * 3
    output.anomaly_maps = None
    assert processor.post_process_anomaly_detection(output, [(4, 9)] * 3)[1] == {"score": 2, "anomaly_map": None}
    for wrong in ([(4, 9)], [(4,)] * 3, [(0, 4)] * 3, (4, 9)):
        with refused("target_sizes", "3 pairs (height, width)"):
            processor.post_process_anomaly_detection(output, wrong)
    with refused("eval mode"):
        processor.post_process_anomaly_detection(AnomalyDetectorOutput(loss=torch.zeros(())))


def test_cropping_cannot_be_undone(refused):
    processor = AnomalyImageProcessor(size={"height": 8, "width": 8}, do_center_crop=True)
    output = AnomalyDetectorOutput(scores=torch.zeros(1), anomaly_maps=torch.zeros(1, 1, 8, 8))
    with refused("do_center_crop"):
        processor.post_process_anomaly_detection(output, [(9, 9)])


# overlay_anomaly_map ----------------------------------------------------------------------------------------------------------


def test_the_range_decides_what_is_painted():
    ramp = np.tile(np.linspace(-1, 3, 9), (4, 1))  # low and high are its columns 2 and 6
    gray = np.full((4, 9), 100, np.uint8)
    overlay = np.asarray(overlay_anomaly_map(gray, ramp, value_range=(0, 2), alpha=0.5))
    dark = 100 * DIMMED
    assert (overlay[:, :3] == dark).all()
    hottest = 0.5 * dark + 0.5 * HEAT[-1].astype(float)
    assert np.abs(overlay[:, 6:] - hottest).max() <= 1
    opacity = 0.5 * 0.5**1.5  # at half the heat
    assert np.abs(overlay[:, 4] - (1 - opacity) * dark - opacity * HEAT[128].astype(float)).max() <= 1
    assert (np.asarray(overlay_anomaly_map(gray, ramp, value_range=(0, 2), alpha=0)) == dark).all()
    usual = np.asarray(overlay_anomaly_map(gray, ramp, value_range=(0, 2)))  # hardly anything shines through
    assert np.abs(usual[:, 6:] - 0.2 * dark - 0.8 * HEAT[-1].astype(float)).max() <= 1


@pytest.mark.parametrize("color", [(152, 0, 38), (230, 180, 90), (255, 255, 255), (0, 0, 0), (60, 140, 70), (80, 110, 200)])
def test_the_anomaly_is_what_has_a_colour(color):
    """On whatever image: it was lost on dark cracks, red cloth and brown wood."""
    image = np.full((4, 9, 3), color, np.uint8)
    overlay = np.asarray(overlay_anomaly_map(image, np.eye(4, 9), value_range=(0, 1))).astype(int)
    chroma, lightness = np.ptp(overlay, axis=2), overlay.mean(2)
    assert chroma[3, 8] == 0
    assert chroma[0, 0] > 60
    assert lightness[0, 0] > lightness[3, 8] + 20
    steps = HEAT[::8].astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(steps) > 0).all()  # the higher, the lighter, without regard to hue


def test_small_images_are_enlarged_on_request():
    image, anomaly_map = np.arange(15, dtype=np.uint8).reshape(3, 5) * 10, np.zeros((3, 5))
    overlay = overlay_anomaly_map(image, anomaly_map, value_range=(0, 1), least_size=11)
    assert overlay.size == (15, 9)
    same = np.asarray(overlay_anomaly_map(image, anomaly_map, value_range=(0, 1)))
    np.testing.assert_array_equal(np.asarray(overlay), same.repeat(3, 0).repeat(3, 1))
    assert overlay_anomaly_map(image, anomaly_map, value_range=(0, 1), least_size=2).size == (5, 3)
    assert enlarge(PIL.Image.new("L", (224, 200)), VISIBLE).size == (224, 200), "a common size, large enough"


@pytest.mark.parametrize("value", [0.0, 1.0, 7.0])
def test_constant_maps_are_no_special_case(value):
    overlay = np.asarray(overlay_anomaly_map(np.zeros((5, 7), np.uint8), torch.full((1, 1, 2, 2), value), value_range=(1, 2)))
    assert (overlay.reshape(-1, 3) == overlay[0, 0]).all()
    assert overlay.any() == (value > 1)


def test_every_kind_of_image():
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    expected = np.asarray(overlay_anomaly_map(rgb, np.eye(4), value_range=(0, 1)))
    kinds = [PIL.Image.fromarray(rgb), torch.from_numpy(rgb), torch.from_numpy(rgb).permute(2, 0, 1), rgb / 255]
    for image in kinds:
        for one in (torch.eye(4, requires_grad=True), torch.eye(4)[None], torch.eye(4, dtype=torch.bfloat16)[None, None]):
            np.testing.assert_array_equal(np.asarray(overlay_anomaly_map(image, one, value_range=(0, 1))), expected)
    for one in (np.eye(4)[::-1, ::-1], np.eye(4, dtype=">f4")):  # mirrored, and of another machine's byte order
        np.testing.assert_array_equal(np.asarray(overlay_anomaly_map(rgb, one, value_range=(0, 1))), expected)
    gray = np.asarray(overlay_anomaly_map(rgb[..., 0], np.zeros((4, 4)), value_range=(0, 1)))
    np.testing.assert_array_equal(gray, np.rint(DIMMED * np.repeat(rgb[..., :1], 3, axis=2)))


def test_a_truncated_image_is_not_painted(tmp_path, refused):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "scan.png")
    (tmp_path / "scan.png").write_bytes((tmp_path / "scan.png").read_bytes()[:2000])
    with PIL.Image.open(tmp_path / "scan.png") as image, refused("image", "truncated", "intact"):
        overlay_anomaly_map(image, np.eye(4), value_range=(0, 1))


def test_other_colours():
    assert len(str(inspect.signature(overlay_anomaly_map))) < 400, "help() would print a whole table of colours"
    table = np.array([[0, 0, 0], [0, 0, 1.0]])
    overlay = np.asarray(overlay_anomaly_map(np.zeros((2, 2), np.uint8), np.ones((2, 2)), value_range=(0, 1), alpha=1, colormap=table))
    assert overlay[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anomaly_map": np.full((3, 3), np.nan)}, ["anomaly_map", "NaN"]),
        ({"anomaly_map": np.full((3, 3), np.inf)}, ["anomaly_map", "infinite"]),
        ({"anomaly_map": np.zeros(3)}, ["anomaly_map", "(3,)"]),
        ({"anomaly_map": np.zeros((2, 1, 3, 3))}, ["anomaly_map", "(2, 1, 3, 3)", "one by one"]),
        ({"anomaly_map": np.zeros((0, 3))}, ["anomaly_map", "(0, 3)"]),
        ({"image": np.zeros((5, 5, 2), np.uint8)}, ["image", "(5, 5, 2)"]),
        ({"image": np.full((4, 4), 300.0)}, ["image", "[0, 1]"]),
        ({"value_range": None}, ["value_range", "calibrate"]),
        ({"value_range": (1, 1)}, ["value_range", "(1, 1)"]),
        ({"value_range": (0, np.nan)}, ["value_range"]),
        ({"value_range": (0, 1, 2)}, ["value_range"]),
        ({"alpha": 1.5}, ["alpha", "1.5"]),
        ({"colormap": np.zeros((3, 4))}, ["colormap", "(3, 4)"]),
        ({"colormap": np.zeros((1, 3))}, ["colormap", "(1, 3)"]),
        ({"colormap": np.full((3, 3), 255)}, ["colormap", "int64"]),
        ({"colormap": np.full((3, 3), -0.5)}, ["colormap", "-0.5"]),
    ],
)
def test_what_cannot_be_painted(settings, words, refused):
    good = {"image": np.zeros((4, 4), np.uint8), "anomaly_map": np.zeros((3, 3)), "value_range": (0, 1)}
    with refused(*words):
        overlay_anomaly_map(**(good | settings))


# scripts/evaluate.py --save_maps ----------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(detector, processor, tmp_path, monkeypatch, capsys):
    def evaluate(*argv):
        detector.save_pretrained(tmp_path / "detector")
        processor.save_pretrained(tmp_path / "detector")
        for name, planted in (("normal", False), ("square", True)):
            (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(textures(4, 5, planted)):
                image.save(tmp_path / "test" / name / f"{i}.png")
        argv = ["--model", str(tmp_path / "detector"), "--dataset_name", str(tmp_path / "test"), *map(str, argv)]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return evaluate


def test_the_highest_scoring_images_are_written(evaluate, detector, processor, tmp_path):
    status, out, err = evaluate("--save_maps", tmp_path / "maps", "--num_maps", 3)
    assert status == 0, err
    assert json.loads(out)["num_anomalous"] == 4
    images = [*textures(4, 5), *textures(4, 5, planted=True)]  # the rows, in the order of the folders
    output = output_of(detector, processor, images)
    rows = output.scores.topk(3).indices.tolist()
    files = sorted((tmp_path / "maps").iterdir())
    names = ["square_{}_anomaly" if row > 3 else "normal_{}_normal" for row in rows]
    assert [path.name for path in files] == [
        f"{i:04d}_{name.format(row % 4)}.png" for i, (name, row) in enumerate(zip(names, rows, strict=True), 1)
    ]
    for path, row in zip(files, rows, strict=True):
        expected = overlay_anomaly_map(images[row], output.anomaly_maps[row], value_range=detector.config.anomaly_map_range, least_size=224)
        assert np.abs(np.asarray(PIL.Image.open(path)).astype(int) - np.asarray(expected)).max() <= 1


def test_maps_of_images_with_long_names(evaluate, tmp_path):
    (tmp_path / "test" / "square").mkdir(parents=True)
    textures(1, 9, planted=True)[0].save(tmp_path / "test" / "square" / f"{'x' * 251}.png")
    status, _, err = evaluate("--save_maps", tmp_path / "maps")
    assert status == 0, err
    assert sum(path.name.endswith(f"_square_{'x' * 193}_anomaly.png") for path in (tmp_path / "maps").iterdir()) == 1


def test_maps_that_cannot_be_written_cost_no_results(evaluate, tmp_path, monkeypatch):
    def full(image, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_anomaly.training.commands.evaluate.write_image", full)
    status, out, err = evaluate("--save_maps", tmp_path / "maps", "--output", tmp_path / "results.json")
    assert (status, "make room" in err) == (2, True)
    assert json.loads(out)["num_anomalous"] == json.loads((tmp_path / "results.json").read_text())["num_anomalous"] == 4


@pytest.mark.parametrize(
    ("settings", "argv", "words"),
    [({"anomaly_map_range": None}, [], ["--save_maps", "calibrate"]), ({}, ["--num_maps", 0], ["--num_maps", "0"])],
)
def test_maps_are_refused_before_anything_is_scored(evaluate, detector, tmp_path, monkeypatch, settings, argv, words):
    for name, value in settings.items():
        monkeypatch.setattr(detector.config, name, value)
    status, out, err = evaluate("--save_maps", tmp_path / "maps", *argv)
    assert (status, out) == (2, "")
    assert all(word in err.splitlines()[-1] for word in words)
    assert not (tmp_path / "maps").exists()


def test_captions_over_narrow_images_do_not_meet():
    grid = image_grid([[torch.zeros(1, 200, 30)] * 2], ["original", "dissolved"])
    written = (np.asarray(grid.convert("L"))[:20] < 255).any(0)
    width = (grid.width - 4) // 2
    assert written[:width].any()
    assert written[width + 4 :].any()
    assert not written[width : width + 4].any()
    assert not written[-4:].any()


def test_captions_beside_rows_are_left_of_their_images():
    rows, captions = [[torch.zeros(1, 64, 64)] * 2] * 2, ["a", "dissolved"]
    plain = np.asarray(image_grid(rows, captions).convert("L"))
    named = np.asarray(image_grid(rows, captions, ["by the model of\nSARS-COV-2", ""]).convert("L"))
    left = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, left + 4 :], plain[:, 4:])  # but for the margin of 4 px, all is as without
    beside = named[:, : left + 4] < 255
    assert beside[20 : 20 + 128].any()
    assert not beside[:20].any()
    assert not beside[20 + 128 :].any()
    assert not beside[:, -4:].any(), "there is room for the longest line"
    alike = np.asarray(image_grid(rows, ["dissolved", "dissolved"]).convert("L"))
    second = 4 + (plain.shape[1] - 4) // 2
    np.testing.assert_array_equal(plain[:, second:], alike[:, second:])
    assert (plain[:20, :second] != alike[:20, :second]).any()
