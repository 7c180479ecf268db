"""Set before Hugging Face libraries are imported: neither the network nor the user's cache is touched."""

import os
import tempfile
from contextlib import contextmanager

import pytest

_home = tempfile.TemporaryDirectory(prefix="hf-anomaly-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _home.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(_home.name, "datasets")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
            assert word in message

    return refused
