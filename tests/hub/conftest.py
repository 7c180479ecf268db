"""A Hub for the session, and processes that use it through the real client."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from forks import Forks

from .emulator import Hub, serve

HERE = Path(__file__).parent

# What every script may use.
PRELUDE = (HERE / "prelude.py").read_text()


class HubSession:
    """`hub.run(code)`: in a process that has imported hf_anomaly. `hub.run_fresh(code)`: in a new interpreter.

    `hub.state` is the Hub itself.
    """

    def __init__(self, url: str, state: Hub, home: Path):
        self.url, self.state, self.home = url, state, home
        self._forks = Forks(self.environment(), home)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Variables under which the client talks to this Hub alone; None takes one away."""
        variables = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE") and name != "HF_TOKEN"}
        variables |= {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(self.home),
            "HF_DATASETS_CACHE": str(self.home / "datasets"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # which datasets has elsewhere
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "20",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        variables.update(changes)
        return {name: value for name, value in variables.items() if value is not None}

    def run(self, code: str) -> str:
        """Runs the prelude and a script; the script fails the test by an exception. Returns what it printed."""
        (status,), output = self._forks.run(PRELUDE + textwrap.dedent(code))
        assert status == 0, output
        return output

    def run_fresh(self, code: str, prelude: bool = False, **environment: str | None) -> str:
        script = (PRELUDE if prelude else "") + textwrap.dedent(code)
        result = subprocess.run(
            [sys.executable, "-c", script], env=self.environment(**environment), capture_output=True, text=True, cwd=self.home
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def close(self):
        self._forks.close()


@pytest.fixture(scope="session")
def hub_session(tmp_path_factory):
    server, state = serve()
    session = HubSession(f"http://127.0.0.1:{server.server_address[1]}", state, tmp_path_factory.mktemp("hub-home"))
    yield session
    session.close()
    server.shutdown()


@pytest.fixture
def hub(hub_session):
    yield hub_session
    hub_session.state.faults.clear()
