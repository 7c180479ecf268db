"""Set before Hugging Face libraries are imported: neither the network nor the user's cache is touched."""

import gc
import json
import os
import runpy
import tempfile
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pytest
from forks import Forks

_home = tempfile.TemporaryDirectory(prefix="hf-anomaly-tests-")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HOME"] = _home.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_home.name, "datasets")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """Each training looks for garbage a few times. Among all that has been imported, a million objects, that took longer than most trainings."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Processes that have imported the libraries and done nothing else."""
    forks = Forks(dict(os.environ), tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def refused():
    """`with refused("culprit", …)`: an error for people, in one line that holds these words."""
    from hf_anomaly import InputError

    @contextmanager
    def refused(*words, error=InputError):
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    return refused


@pytest.fixture
def run_evaluation(monkeypatch, capsys):
    """`run_evaluation(model, dataset, …)`: exit status, results and standard error of scripts/evaluate.py with these and further words."""

    def run_evaluation(model, dataset, *argv):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(model), "--dataset_name", str(dataset), *argv])
        status = 0
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "evaluate.py"), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return run_evaluation


@pytest.fixture
def peak_bytes():
    """`peak_bytes(action)`: the most that tensors made during the action hold at once on the CPU, temporary ones inside of operators too."""
    from torch.profiler import ProfilerActivity, profile

    def peak_bytes(action):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            action()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)

    return peak_bytes
