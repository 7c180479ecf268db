"""Loading from the Hub in every way, each in a process that has done nothing else: the same scores, bit for bit."""

import re
from pathlib import Path

import pytest

PUSH = """
    from hf_anomaly import DiffusionDissolver
    from hf_anomaly.dissolving import build_scheduler, build_unet

    folder = finished(dissolver=False)
    torch.manual_seed(0)
    dissolver = DiffusionDissolver(build_unet(8, 1, (8, 16)), build_scheduler())
    dissolver.save_pretrained(folder / "dissolver")
    model = AutoModel.from_pretrained(folder)
    first = model.push_to_hub("org/load", git_tag="v1")
    model.push_to_hub("org/sharded", max_shard_size="2KB")
    detector(1).push_to_hub("org/load", revision="next")
    dissolver.save_pretrained("alone")
    from hf_anomaly.hub import push_folder
    push_folder("alone", "org/dissolver")
    from safetensors.torch import save_file
    with torch.no_grad():
        tensors = {"images": images(5, 2), "scores": scores(model), "next": scores(detector(1)), "half": scores(detector().to(torch.bfloat16))}
        tensors["dissolved"] = dissolver(images(5, 2), torch.full((5,), 50))
    save_file(tensors, TARGET, metadata={"commit": first.oid})
"""

SCORE = """
    from safetensors.torch import load_file
    tensors = load_file(TARGET)

    def same(model, expected="scores"):
        with torch.no_grad():
            scores = model(tensors["images"].to(model.dtype)).scores
        assert torch.equal(scores, tensors[expected]), (scores, tensors[expected])
"""


@pytest.fixture(scope="module")
def stored(hub_session, tmp_path_factory):
    """What was pushed: the path of the expected tensors, as a line of Python."""
    line = f"TARGET = {str(tmp_path_factory.mktemp('expected') / 'tensors.safetensors')!r}\n"
    hub_session.run(indented(line) + PUSH)
    return line


def indented(line):
    return "    " + line


def test_auto_classes_concrete_class_and_revisions(hub, stored):
    hub.run(
        indented(stored)
        + SCORE
        + """
    from safetensors import safe_open
    same(AutoModel.from_pretrained("org/load"))
    same(CSIModel.from_pretrained("org/load"))
    same(AutoModel.from_pretrained("org/load", trust_remote_code=True))
    same(AutoModel.from_pretrained("org/load", revision="next"), "next")
    same(CSIModel.from_pretrained("org/load", revision="v1"))
    same(CSIModel.from_pretrained("org/load", revision=safe_open(TARGET, "pt").metadata()["commit"]))
    assert type(AutoConfig.from_pretrained("org/load")) is CSIConfig
    processor = AutoImageProcessor.from_pretrained("org/load", revision="v1")
    assert type(processor) is AnomalyImageProcessor and processor.size["height"] == 8
    """
    )


def test_shards_devices_and_dtypes(hub, stored):
    hub.run(
        indented(stored)
        + SCORE
        + """
    same(AutoModel.from_pretrained("org/sharded"))
    assert len([name for name in files("org/sharded") if name.endswith(".safetensors") and "model-" in name]) > 1
    for device_map in ("cpu", "auto", {"": "cpu"}):
        same(AutoModel.from_pretrained("org/load", device_map=device_map))
    half = AutoModel.from_pretrained("org/load", dtype=torch.bfloat16)
    cast = AutoModel.from_pretrained("org/load").to(torch.bfloat16)
    states, expected = half.state_dict(), cast.state_dict()
    assert states.keys() == expected.keys()
    for name, tensor in states.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert states["calibration.scores"].dtype == torch.float32
    same(half, "half")
    """
    )


def test_the_dissolver(hub, stored):
    hub.run(
        indented(stored)
        + SCORE
        + """
    from diffusers import DDPMPipeline, UNet2DModel
    from hf_anomaly import DiffusionDissolver, Dissolver

    steps = torch.full((5,), 50)
    for name in ("org/load", "org/dissolver"):
        for class_ in (DiffusionDissolver, Dissolver):
            assert torch.equal(class_.from_pretrained(name)(tensors["images"], steps), tensors["dissolved"])
    pipelines = [DDPMPipeline.from_pretrained("org/dissolver"), DDPMPipeline.from_pretrained(Path(api.snapshot_download("org/load"), "dissolver"))]
    networks = [UNet2DModel.from_pretrained("org/load", subfolder="dissolver/unet"), *(pipeline.unet for pipeline in pipelines)]
    for unet in networks:
        dissolver = DiffusionDissolver(unet.eval().requires_grad_(False), pipelines[0].scheduler)
        assert torch.allclose(dissolver(tensors["images"], steps), tensors["dissolved"], atol=1e-6)
    """
    )


def test_a_slow_and_broken_download_ends_whole(hub, stored):
    hub.run(
        indented(stored)
        + SCORE
        + """
    sha = edit("org/large", {name: Path(api.hf_hub_download("org/load", name)).read_bytes() for name in ("config.json", "model.safetensors")})
    fault("GET", "/lfs/", drop_after=1000)
    fault("GET", "/resolve/", delay=0.5)
    fault("HEAD", "/resolve/", status=503)
    same(AutoModel.from_pretrained("org/large", cache_dir="cache"))
    """
    )


def test_what_goes_wrong_is_told_in_one_line_with_the_remedy(hub, stored):
    hub.run("""
    import contextlib
    import io

    from hf_anomaly import Dissolver
    from hf_anomaly.backbones.pretrained import load_backbone_config
    from hf_anomaly.cli import main
    from hf_anomaly.training.denoising import load_pretraining
    from hf_anomaly.loading import load_detector

    def command(*argv):
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                main([*argv])
        except SystemExit as end:
            *_, line = err.getvalue().splitlines()
            assert end.code == 2 and line.startswith("error: "), err.getvalue()
            raise HubError(line)

    def told(repo_id, *words, error=HubError, revision=None):
        option = ["--revision", revision] if revision else []
        refused(error, lambda: CSIModel.from_pretrained(repo_id, revision=revision), repo_id, *words)
        refused(error, lambda: load_detector(repo_id, revision), repo_id, *words)
        refused(error, lambda: Dissolver.from_pretrained(repo_id, revision=revision), repo_id, *words)
        for argv in (["info", repo_id], ["predict", repo_id, "a.png"], ["evaluate", repo_id, "--dataset_name", "digits"]):
            refused(HubError, lambda: command(*argv, *option), repo_id, *words)
        if revision is None:
            refused(error, lambda: load_pretraining(repo_id, image_size=8, num_channels=1), repo_id, *words)
            refused(error, lambda: load_backbone_config(repo_id), repo_id, *words)
            refused(HubError, lambda: command("dissolve", repo_id, "a.png"), repo_id, *words)

    Path("a.png").write_bytes(b"")
    time.sleep = lambda seconds: None  # the client's pauses between its attempts
    told("org/nothing", "no folder here", "hf auth login")
    told("runs/mine/last", "no folder here", error=InputError)
    told("org/load", "no such branch, tag or commit", revision="nowhere")
    # A repository nothing of which is in the cache, and a Hub that answers so all the time.
    names = ("config.json", "model.safetensors", "preprocessor_config.json")
    edit("org/fresh", {name: Path(api.hf_hub_download("org/load", name)).read_bytes() for name in names})
    remedies = {401: "does not accept the token", 403: "ask for access", 404: "check the name", 429: "wait a few minutes", 500: "out of order (500)"}
    for status, remedy in remedies.items():
        for method in ("GET", "HEAD"):
            fault(method, "org/fresh", status=status, times=10**6)
        told("org/fresh", remedy)
        call("/_mend", {})
    for status in (401, 403):  # nobody is logged in, or who is has not asked for access
        for method in ("GET", "HEAD"):
            fault(method, "org/fresh", status=status, code="GatedRepo", times=10**6)
        told("org/fresh", "it is gated", "ask for access")
        call("/_mend", {})
    fault("GET", "org/fresh", drop_after=10, times=10**6)
    told("org/fresh", "cannot be reached", "check the network")
    call("/_mend", {})
    for method in ("GET", "HEAD"):
        fault(method, "org/fresh", status=500, times=2)
        fault(method, "org/fresh", drop_after=10)
    AutoModel.from_pretrained("org/fresh", cache_dir="cache")
    # Nothing to be read is no trouble of the Hub.
    edit("org/empty", {"README.md": b""})
    refused(InputError, lambda: load_detector("org/empty"), "org/empty", "config.json")
    refused(InputError, lambda: Dissolver.from_pretrained("org/empty"), "holds no dissolver")
    """)


def test_the_readmes_code_runs(hub, stored):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", readme, re.DOTALL) if "push_to_hub" in block)
    before = 'AutoModel.from_pretrained("org/load").save_pretrained("runs/mine")\n'
    after = 'assert api.model_info("org/name").private and torch.equal(scores(model), scores(detector()))\n'
    hub.run(before + code + after)


# Without importing hf_anomaly first, and offline: in new interpreters -----------------------------------------------------------

REMOTE_CODE = """
    import sys
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    assert "hf_anomaly" not in sys.modules
"""


def test_with_remote_code_then_offline(hub, stored):
    """Through the cache of the first, the second needs no network."""
    load = (
        REMOTE_CODE
        + """
    model = AutoModel.from_pretrained("org/load", trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained("org/load", trust_remote_code=True)
    config = AutoConfig.from_pretrained("org/load", trust_remote_code=True)
    assert [type(part).__module__.split(".")[0] for part in (model, processor, config)] == ["hf_anomaly"] * 3
    """
    )
    hub.run_fresh(
        indented(stored)
        + load
        + SCORE
        + """
    same(model)
    # Saved again, it refers to the package still, not to a copy of its files.
    model.save_pretrained("again")
    processor.save_pretrained("again")
    import json, os
    maps = {**json.load(open("again/config.json"))["auto_map"], **json.load(open("again/preprocessor_config.json"))["auto_map"]}
    assert set(maps.values()) == {f"modeling_hf_anomaly.{name}" for name in ("CSIConfig", "CSIModel", "AnomalyImageProcessor")}, maps
    assert [name for name in os.listdir("again") if name.endswith(".py")] == ["modeling_hf_anomaly.py"]
    """
    )
    hub.run_fresh(
        indented(stored)
        + load
        + SCORE
        + """
    same(model)
    same(type(model).from_pretrained("org/load"))
    """,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="1",
    )


def test_no_code_runs_without_the_flag_and_a_missing_package_is_named(hub, stored):
    hub.run_fresh(
        REMOTE_CODE
        + """
    class Hidden:
        def find_spec(self, name, *args):
            if name.split(".")[0] == "hf_anomaly":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
    for trust, words in ((None, "trust_remote_code"), (False, "trust_remote_code"), (True, "pip install hf_anomaly")):
        try:
            AutoModel.from_pretrained("org/load", trust_remote_code=trust)
        except (ImportError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(trust)
    """
    )


# Repositories that mean harm ---------------------------------------------------------------------------------------------------


def test_hostile_repositories(hub, stored):
    hub.run("""
    import sys
    from hf_anomaly import DiffusionDissolver

    def content(name):
        return Path(api.hf_hub_download("org/load", name)).read_bytes()

    def hostile(repo_id, config=None, **more):
        config = json.dumps(json.loads(content("config.json")) | (config or {})).encode()
        edit(repo_id, {"config.json": config, "model.safetensors": content("model.safetensors"), **more})

    evil = b"import pathlib; pathlib.Path('evil').touch()\\nclass Evil: pass\\n"
    # Pickles.
    torch.save(torch.nn.Linear(1, 1).state_dict(), "pytorch_model.bin")
    edit("org/pickle", {"config.json": content("config.json"), "pytorch_model.bin": Path("pytorch_model.bin").read_bytes()})
    for settings in ({}, {"use_safetensors": False}):
        refused(InputError, lambda: AutoModel.from_pretrained("org/pickle", **settings), "org/pickle", "pickles")
    # Code: of its own under the package's name, in place of the package's file, and for the backbone.
    hostile("org/code", {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}, **{"evil.py": evil})
    AutoModel.from_pretrained("org/code")
    AutoModel.from_pretrained("org/code", trust_remote_code=True)
    backbone = json.loads(content("config.json"))["backbone_config"]
    for nested in ({"auto_map": {"AutoConfig": "evil.Evil", "AutoBackbone": "evil.Evil"}}, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}):
        hostile("org/nested", {"backbone_config": backbone | nested}, **{"evil.py": evil})
        refused(InputError, lambda: AutoModel.from_pretrained("org/nested", trust_remote_code=True), "backbone_config")
    assert not Path("evil").exists() and "evil" not in sys.modules
    # Sizes that no memory holds.
    for number, config in enumerate(({"num_calibration_scores": 10**12}, {"num_calibration_scores": 10**9}, {"bank_size": 10**12, "max_bank_size": 10**12})):
        hostile(f"org/size{number}", config)
        assert timed(lambda: refused(InputError, lambda: AutoModel.from_pretrained(f"org/size{number}"))) < 5
    # Shards and companions from outside the folder.
    secret = tmp / "secret.safetensors"
    secret.write_bytes(content("model.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": {"shift_classifier.weight": f"../../../../../../..{secret}"}}
    edit("org/shards", {"config.json": content("config.json"), "model.safetensors.index.json": json.dumps(index).encode()})
    refused(InputError, lambda: AutoModel.from_pretrained("org/shards"), "org--shards", "beside")
    hostile("org/traversal", **{"dissolver/../../../../outside.json": b"{}", "dissolver/unet/config.json": b"{}", "dissolver/weights.bin": b"x"})
    try:
        AutoModel.from_pretrained("org/traversal").save_pretrained("traversal")
    except (OSError, ValueError):
        pass
    found = {path for root in (Path(os.environ["HF_HOME"]), tmp) for path in root.rglob("outside.json")}
    assert not found, found
    # A dissolver that asks for the moon.
    unet = json.loads(content("dissolver/unet/config.json"))
    scheduler = json.loads(content("dissolver/scheduler/scheduler_config.json"))
    weights = content("dissolver/unet/diffusion_pytorch_model.safetensors")
    for number, (u, s) in enumerate(((unet, scheduler | {"num_train_timesteps": 10**11}), (unet | {"layers_per_block": 10**7}, scheduler))):
        parts = {"unet/config.json": json.dumps(u).encode(), "scheduler/scheduler_config.json": json.dumps(s).encode()}
        edit(f"org/moon{number}", {**parts, "unet/diffusion_pytorch_model.safetensors": weights})
        refused(InputError, lambda: DiffusionDissolver.from_pretrained(f"org/moon{number}"), "no network's")
    """)
