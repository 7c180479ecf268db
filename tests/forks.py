"""Pieces of Python in processes of their own, each forked from one that has imported the libraries and done nothing else: importing costs seconds, a
fork does not, as long as garbage is not looked for among what was imported.

What libraries read when they are imported, such as the Hub's address and cache, must be in the environment of that one process.
"""

import gc
import json
import linecache
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback


class Forks:
    """The process that forks, started when it is first needed.

    Args:
        environment: its variables.
        cwd: its folder.
    """

    def __init__(self, environment: dict[str, str], cwd: os.PathLike):
        self.environment, self.cwd = environment, cwd
        self._server = None

    def run(self, code: str, processes: int = 1) -> tuple[list[int], str]:
        """The exit status of every process, and what they printed. Several find each other as those of torchrun do."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, text=True, cwd=self.cwd
            )
        self._server.stdin.write(json.dumps({"code": code, "processes": processes}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def run_script(self, path: os.PathLike, *argv, processes: int = 1) -> tuple[list[int], str]:
        """As `run`, of a script with its arguments."""
        words = [str(word) for word in (path, *argv)]
        return self.run(f"import runpy, sys\nsys.argv = {words}\nrunpy.run_path(sys.argv[0], run_name='__main__')", processes)

    def close(self):
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()


# In the process that forks: one JSON line in, one out ---------------------------------------------------------------------------


def fork(code: str, output: int, environment: dict[str, str]) -> int:
    """Returns the pid of a process that runs the code and writes to the file descriptor `output`."""
    if (pid := os.fork()) != 0:
        return pid
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    signal.alarm(300)  # ends one that waits for another in vain
    status = 1
    linecache.cache["<test>"] = (len(code), None, code.splitlines(True), "<test>")  # so that a traceback shows its lines
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def environments(processes: int) -> list[dict[str, str]]:
    """What torchrun sets; and without the last variable accelerate looks for GPUs."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(code: str, processes: int) -> tuple[list[int], str]:
    with tempfile.TemporaryFile("a+") as output:
        pids = [fork(code, output.fileno(), environment) for environment in environments(processes)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        output.seek(0)
        return statuses, output.read()


if __name__ == "__main__":
    import kornia  # noqa: F401
    import sklearn.datasets
    import sklearn.metrics  # noqa: F401
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: F401
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, Trainer  # noqa: F401

    import hf_anomaly.training.denoising  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
