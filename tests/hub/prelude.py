# Goes before the scripts that the tests run in processes of their own.
# ruff: noqa: F401
import base64
import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_anomaly import AnomalyImageProcessor, CSIConfig, CSIModel, GaussianDissolver, HubError, InputError, SmallResNetConfig
from hf_anomaly.cards import write_card

api = HfApi()
tmp = Path(tempfile.mkdtemp())
os.chdir(tmp)


def call(path, content):
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + path, json.dumps(content).encode(), method="POST")
    return json.loads(urllib.request.urlopen(request).read())


def fault(method, path, **settings):
    call("/_faults", {"method": method, "path": path, **settings})


def edit(repo_id, files):
    """A commit made on the website."""
    contents = {name: None if content is None else base64.b64encode(content).decode() for name, content in files.items()}
    return call("/_edit", {"repo_id": repo_id, "files": contents})["sha"]


def images(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def detector(seed=0):
    torch.manual_seed(seed)
    backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
    model = CSIModel(CSIConfig(image_size=8, projection_size=4, num_test_views=2, backbone_config=backbone)).eval()
    model.fit_reference([images(6)], progress=False)
    return model.calibrate([images(39, 1)], progress=False)


def scores(model):
    with torch.no_grad():
        return model(images(5, 2).to(model.dtype)).scores


MEASURED = {
    "dataset": "x.npz",
    "normal_label": "good",
    "num_train": 6,
    "num_calibration": 39,
    "num_normal": 5,
    "num_anomalous": 5,
    "seed": 0,
}
MEASURED |= {"split_hash": "0123abcd", "steps": 1, "auroc": 0.8765}


def finished(name="detector", seed=0, dissolver=True):
    """The folder of a detector as a run leaves it."""
    folder, model = tmp / name, detector(seed)
    model.save_pretrained(folder)
    AnomalyImageProcessor.for_images(8, 1).save_pretrained(folder)
    if dissolver:
        GaussianDissolver(3).save_pretrained(folder / "dissolver")
    (folder / "eval_results.json").write_text(json.dumps(MEASURED))
    write_card(folder, model, MEASURED)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_text("")
    return folder


def files(repo_id, revision=None):
    return set(api.list_repo_files(repo_id, revision=revision))


def titles(repo_id, revision=None):
    return [commit.title for commit in api.list_repo_commits(repo_id, revision=revision)]


def changed(repo_id):
    """The files that the last commit changed, as they were and as they are."""
    new, old = (commit.commit_id for commit in api.list_repo_commits(repo_id)[:2])
    texts = {
        n: (text(repo_id, n, old), text(repo_id, n, new)) for n in files(repo_id, old) & files(repo_id, new) if not n.endswith("tensors")
    }
    return {name: pair for name, pair in texts.items() if pair[0] != pair[1]}


def text(repo_id, name="README.md", revision=None):
    return Path(api.hf_hub_download(repo_id, name, revision=revision)).read_text()


def refused(error, action, *words):
    try:
        action()
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"no {error.__name__}")
    assert "\n" not in message, message
    for word in words:
        assert word in message, message


def timed(action):
    started = time.monotonic()
    action()
    return time.monotonic() - started
