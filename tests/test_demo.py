"""The demo: what the page says is what the detector says, nobody's text acts as markup, and a person sees it in a real browser."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image

from hf_anomaly import (
    AnomalyImageProcessor,
    DIAConfig,
    DIAModel,
    DiffusionDissolver,
    GaussianDissolver,
    NotFittedError,
    SharedAEConfig,
    SharedAEModel,
    SmallResNetConfig,
)
from hf_anomaly.demo import build_demo, make_space, run_demo
from hf_anomaly.demo.analysis import RATE_STEP, Verdict, analyse, dissolved_versions, judge, open_upload, rate_range
from hf_anomaly.demo.page import GRADIO, WARNING, heading_html, result_html
from hf_anomaly.demo.serving import load_dissolver
from hf_anomaly.demo.space import space_files
from hf_anomaly.dissolving import ResizeDissolver, build_scheduler, build_unet
from hf_anomaly.version import __version__
from hf_anomaly.visualization import DIMMED, overlay_anomaly_map

SIZE = 16
HOSTILE = "<img src=x onerror=document.title='hit'>${1+1}{{2}}"


def batch(count, seed=0):
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def finished(model, num_calibration=39):
    model.eval().fit_reference([batch(6)], progress=False)
    return model.calibrate([batch(num_calibration, 1)], false_positive_rate=0.1, progress=False) if num_calibration else model


def shared_ae(num_calibration=39, **settings):
    torch.manual_seed(0)
    return finished(SharedAEModel(SharedAEConfig(image_size=SIZE, hidden_sizes=[4, 8, 8], latent_size=8, **settings)), num_calibration)


def dia():
    torch.manual_seed(0)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    return finished(DIAModel(DIAConfig(image_size=SIZE, projection_size=4, num_test_views=2, backbone_config=backbone)))


def diffusion():
    torch.manual_seed(0)
    return DiffusionDissolver(build_unet(SIZE, 1, (8, 16)), build_scheduler(), t_min=100, t_max=900)


def save(folder, model, dissolver=None):
    model.save_pretrained(folder)
    AnomalyImageProcessor.for_images(SIZE, 1).save_pretrained(folder)
    if dissolver is not None:
        dissolver.save_pretrained(folder / "dissolver")
    return folder


@pytest.fixture
def processor():
    return AnomalyImageProcessor.for_images(SIZE, 1)


@pytest.fixture
def picture():
    levels = torch.randint(0, 256, (20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Image.fromarray(levels.numpy())


# Behind the page --------------------------------------------------------------------------------------------------------------


def test_the_numbers_are_the_detectors(processor, picture):
    model = shared_ae()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    analysis = analyse(model, processor, picture)
    assert len(runs) == 1
    scores = model(processor(images=picture, return_tensors="pt")["pixel_values"]).scores
    assert analysis.score == scores.item()
    assert analysis.p_value == model.p_values(scores).item()
    runs.clear()
    for rate in (0.05, 0.1, 0.3, 0.9):
        assert judge(model, analysis.score, rate).flagged == model.is_anomalous(scores, rate).item()
    assert judge(model, analysis.score, 0.1).threshold == model.calibration.threshold.item()
    threshold = judge(model, analysis.score, 0.1).threshold
    assert not judge(model, threshold, 0.1).flagged, "it lies not strictly above"
    assert not runs
    assert not analysis.dissolved


def test_images_are_shown_at_a_size_to_look_at(processor, picture):
    model = shared_ae()
    overlay = analyse(model, processor, picture).overlay
    assert (overlay.mode, overlay.size) == ("RGB", (270, 180))
    output = model(processor(images=picture, return_tensors="pt")["pixel_values"], output_anomaly_maps=True)
    (result,) = processor.post_process_anomaly_detection(output, [(180, 270)])
    expected = overlay_anomaly_map(picture.resize((270, 180), 0), result["anomaly_map"], value_range=model.config.anomaly_map_range)
    assert overlay.tobytes() == expected.tobytes()
    for mode, size, shown in (("RGB", (3000, 1500), (1024, 512)), ("P", (2000, 2000), (1024, 1024)), ("L", (1, 4), (64, 256))):
        assert analyse(model, processor, Image.new(mode, size)).overlay.size == shown
    model.config.anomaly_map_range = (1e6, 2e6)  # nothing is as high: the image itself, darker
    painted = torch.frombuffer(bytearray(analyse(model, processor, picture).overlay.tobytes()), dtype=torch.uint8).view(180, 270, 3)
    original = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(20, 30)
    assert torch.equal(painted[4::9, 4::9, 0], (original * DIMMED).round().byte())


def test_without_maps_or_calibration(processor, picture):
    analysis = analyse(dia(), processor, picture)
    assert analysis.overlay is None
    assert "no anomaly maps" in analysis.reason
    model = shared_ae(num_calibration=0)
    analysis = analyse(model, processor, picture)
    assert (analysis.p_value, analysis.overlay) == (None, None)
    assert "calibrate" in analysis.reason
    assert "not calibrated" in result_html(analysis.score, None, None)
    with pytest.raises(NotFittedError):
        judge(model, analysis.score, 0.1)


@pytest.mark.parametrize("n", [1, 3, 39, 199, 1000])
def test_every_rate_of_the_slider_has_a_threshold(n):
    model = shared_ae(num_calibration=n)
    lowest, highest, first = rate_range(model)
    assert 0 < lowest <= first <= highest < 1
    assert lowest < highest
    for rate in (lowest, first, highest):
        assert torch.isfinite(torch.tensor(judge(model, 0.0, rate).threshold))
    if lowest > RATE_STEP:
        assert judge(model, 1e9, lowest - RATE_STEP).threshold == float("inf")
    model = shared_ae(num_calibration=39)
    assert rate_range(model) == (0.025, 0.5, 0.1)  # the last is the detector's own
    model.config.false_positive_rate = 0.8
    assert rate_range(model)[2] == 0.5


def test_the_words_are_those_of_the_verdict():
    for flagged, p_value, said in ((True, 0.0249, ("Flagged as anomalous", "2.49")), (False, 1.0, ("Not flagged", "100"))):
        text = result_html(1.25, p_value, Verdict(flagged, 1.5, 0.005)).replace("\xa0", " ")
        assert f">{said[0]}</p>" in text
        assert f"The score is {'' if flagged else 'not '}above the threshold for a false-alarm rate of 0.5 %." in text
        assert f"About {said[1]} % of normal images score at least so high." in text


def test_dissolved_versions_are_the_dissolvers(processor, picture):
    dissolver, pixels = diffusion(), processor(images=picture, return_tensors="pt")["pixel_values"]
    versions = dissolved_versions(dissolver, pixels)
    assert [caption for _, caption in versions] == ["input", "t = 100", "t = 300", "t = 500", "t = 700", "t = 900"]
    expected = ((dissolver(pixels, torch.tensor([700]))[0, 0] + 1) * 127.5).round().byte()
    shown = torch.frombuffer(bytearray(versions[4][0].tobytes()), dtype=torch.uint8).view(256, 256)
    assert torch.equal(shown[8::16, 8::16], expected)
    for fixed in (GaussianDissolver(3), ResizeDissolver(8)):
        assert [caption for _, caption in dissolved_versions(fixed, pixels)] == ["input", f"dissolved ({fixed.kind})"]
    assert analyse(dia(), processor, picture, dissolver).dissolved[5][1] == "t = 900"


def test_bad_uploads_are_refused_by_their_own_name(tmp_path, picture, refused):
    path = tmp_path / "0f3a"
    picture.save(path, format="PNG")
    assert open_upload(path, "x.png").size == picture.size
    path.write_bytes(path.read_bytes()[:100])
    with refused("lung 7.png", "unreadable"):
        open_upload(path, "lung 7.png")
    Image.new("I;16", (9, 9)).save(path, format="PNG")
    assert open_upload(path, "lung 7.png", (0, 4000)).mode == "L"
    with refused("lung 7.png", "16-bit"):
        open_upload(path, "lung 7.png")


def test_the_dissolver_beside_a_detector(tmp_path, refused):
    folder = save(tmp_path / "m", dia())
    assert load_dissolver(str(folder)) is None
    diffusion().save_pretrained(folder / "dissolver")
    assert load_dissolver(str(folder)).t_max == 900
    (folder / "dissolver" / "dissolver_config.json").write_text('{"kind": "xyzzy"}')
    with refused("xyzzy"):
        load_dissolver(str(folder))


def test_names_and_labels_are_only_text():
    model = shared_ae(normal_label=HOSTILE)
    text = heading_html(model, HOSTILE)
    for markup in ("<img", "${", "{{", "onerror='"):
        assert markup not in text
    assert text.count("&lt;img") == 2
    assert "SharedAEModel, 16×16 px, gray · normal: " in text
    assert "calibrated with 39 normal images" in text
    assert "not calibrated" in heading_html(shared_ae(num_calibration=0), "page")
    assert WARNING in text


def test_without_gradio(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    for action in (lambda: run_demo("nowhere", host="localhost", port=1), lambda: build_demo(shared_ae(), None)):
        with refused("pip install 'hf-anomaly[demo]'"):
            action()
    assert f'\ndemo = ["{GRADIO}"]\n' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("address", "word"),
    [({"port": 0}, "65535"), ({"port": 70000}, "65535"), ({"host": "203.0.113.7"}, "no address"), ({"host": "x" * 99}, "no address")],
)
def test_where_no_page_can_be_served(address, word, refused):
    """Such as an address of another machine, kept for documentation."""
    ((name, value),) = address.items()
    with refused(f"--{name} {value}:", word):
        run_demo("nowhere", **address)


def test_what_is_served(tmp_path, monkeypatch):
    folder = save(tmp_path / "lungs", dia(), GaussianDissolver(3))
    pages = []
    monkeypatch.setattr("hf_anomaly.demo.serving.import_gradio", Mock())
    monkeypatch.setattr("hf_anomaly.demo.serving.build_demo", lambda *parts, name: pages.append((*parts, name)) or Mock())
    AnomalyImageProcessor.for_images(SIZE, 1, window=(0, 9)).save_pretrained(folder)
    monkeypatch.chdir(folder)
    for window, found in (((0, 4095), (0, 4095)), (None, [0, 9])):
        run_demo(".", window=window, device="cpu", block=False)
        model, processor, dissolver, name = pages.pop()
        assert (type(model), processor.window, dissolver.kind, name) == (DIAModel, found, "gaussian", "lungs")


# The Space --------------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_space(tmp_path, monkeypatch):
    assert make_space("org/lungs", "org/try", folder=tmp_path / "space", push=False) == str(tmp_path / "space")
    assert {path.name for path in (tmp_path / "space").iterdir()} == {"app.py", "requirements.txt", "README.md"}
    _, front, body = (tmp_path / "space" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["sdk"], front["app_file"], front["models"], front["title"]) == ("gradio", "app.py", ["org/lungs"], "try")
    assert front["sdk_version"].startswith("6.")
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert "org/lungs" in body
    assert WARNING in body
    assert f"hf-anomaly[demo]>={__version__}\n" in (tmp_path / "space" / "requirements.txt").read_text()
    for installed, written in (("6.99.1", "6.99.1"), ("5.49.0", "6.31.0"), ("7.0.0", "6.31.0")):
        monkeypatch.setattr("hf_anomaly.demo.space.version", lambda name, installed=installed: installed)
        assert f"\nsdk_version: {written}\n" in space_files("org/lungs", "org/try")["README.md"]


@pytest.mark.parametrize("revision", [None, "v1", "');import os;('"])
def test_the_app_serves_the_detector(revision, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_anomaly.demo.run_demo", lambda *words, **settings: calls.append((words, settings)))
    exec(compile(space_files("org/lungs", "org/try", revision)["app.py"], "app.py", "exec"), {})
    assert calls == [(("org/lungs",), {} if revision is None else {"revision": revision})]


def test_spaces_that_cannot_be(tmp_path, refused):
    with refused("push it first"):
        make_space(str(tmp_path), "org/try", folder=tmp_path / "space", push=False)
    for names in (("org/a/b", "org/try"), ("org/lungs", "not a name")):
        with refused("no name of a repository"):
            make_space(*names, folder=tmp_path / "space", push=False)
    with refused("nothing to do"):
        make_space("org/lungs", "org/try", push=False)
    (tmp_path / "README.md").write_text("mine")
    with refused("README.md", "overwritten"):
        make_space("org/lungs", "org/try", folder=tmp_path, push=False)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# In a browser -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", "--window-size=1100,1000"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, tmp_path, monkeypatch):
    """`page(folder)` opens the demo of a saved detector; gives what is on it, by CSS selector, as soon as it is there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    running = []

    class Page:
        def __init__(self, folder):
            running.append(run_demo(str(folder), device="cpu", block=False))
            browser.get(running[-1].local_url)

        def all(self, selector):
            return browser.find_elements(By.CSS_SELECTOR, selector)

        def wait(self, condition):
            return WebDriverWait(browser, 60, ignored_exceptions=(Exception,)).until(lambda _: condition())

        def text(self, selector):
            return self.wait(lambda: self.all(selector)[0].text)

        def drop(self, path):
            if self.all("#image button[aria-label=Clear]"):
                self.all("#image button[aria-label=Clear]")[0].click()
            self.wait(lambda: self.all("#image input[type=file]"))[0].send_keys(str(path))

    yield Page
    for demo in running:
        demo.close()


def test_shared_ae_in_a_browser(page, tmp_path, picture, processor, browser):
    model = shared_ae(normal_label=HOSTILE)
    page = page(save(tmp_path / HOSTILE, model))
    assert page.text("#name") == HOSTILE
    assert page.text("#warning") == WARNING
    picture.save(tmp_path / "good.png")
    page.drop(tmp_path / "good.png")
    expected = analyse(model, processor, picture)
    assert page.text("#score") == f"{expected.score:.4g}"
    assert page.text("#p-value") == f"{expected.p_value:.3g}"
    verdicts = {True: "Flagged as anomalous", False: "Not flagged"}
    assert page.text("#verdict") == verdicts[judge(model, expected.score, 0.1).flagged]
    assert page.wait(lambda: page.all("#map img")[0].get_property("naturalWidth")) == 270
    # Another rate, another threshold.
    number = page.all("#rate input[type=number]")[0]
    number.send_keys("\ue009a\ue000", "0.5", "\ue007")  # select all, type, enter
    other = judge(model, expected.score, 0.5)
    page.wait(lambda: page.text("#threshold") == f"{other.threshold:.4g}")
    assert page.text("#verdict") == verdicts[other.flagged]
    # A broken image: a message, and no old result beside it.
    broken = tmp_path / "<b>bad.png"
    broken.write_bytes(b"no image")
    page.drop(broken)
    message = page.text(".toast-body")
    assert "bad.png" in message
    assert "unknown image format" in message
    assert not page.all("#score")
    assert not page.all(".toast-body b")
    assert "hit" not in browser.title.replace(HOSTILE, "")


def test_dia_and_its_dissolver_in_a_browser(page, tmp_path, picture):
    page = page(save(tmp_path / "dia", dia(), diffusion()))
    assert "no anomaly maps" in page.text("#no-map")
    assert not page.all("#map")
    picture.save(tmp_path / "good.png")
    page.drop(tmp_path / "good.png")
    assert float(page.text("#score"))
    page.wait(lambda: len(page.all("#dissolved img")) == 6)
    assert page.wait(lambda: all(image.get_property("naturalWidth") == 256 for image in page.all("#dissolved img")))
    assert "t = 900" in page.text("#dissolved")


def test_the_address_is_told_in_our_words(tmp_path, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio", reason="needs the extra `demo`")
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda demo: None)
    demo = run_demo(str(save(tmp_path / "m", shared_ae())), device="cpu")
    demo.close()
    out, _ = capsys.readouterr()
    assert f"running on {demo.local_url}\n" in out
    assert "share=True" not in out


def test_a_taken_port_is_told(tmp_path, refused):
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with refused(str(port), "--port"):
            run_demo(str(save(tmp_path / "m", shared_ae())), port=port, device="cpu", block=False)
