"""Runs pieces of Python, each in a process forked from one that has imported the libraries and done nothing else.

The Hub's address and cache are frozen when huggingface_hub is imported, so they must be in this process's environment; importing costs seconds,
a fork does not, as long as garbage is not looked for among what was imported. One JSON line in, {"code": …}; one out, {"status": …, "output": …}.
"""

import gc
import json
import linecache
import os
import sys
import tempfile
import traceback


def run_forked(code: str) -> dict:
    with tempfile.TemporaryFile("w+") as output:
        if (pid := os.fork()) == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            status = 1
            linecache.cache["<hub test>"] = (len(code), None, code.splitlines(True), "<hub test>")  # so that a traceback shows its lines
            try:
                exec(compile(code, "<hub test>", "exec"), {"__name__": "__main__"})
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return {"status": status, "output": output.read()}


if __name__ == "__main__":
    import kornia  # noqa: F401
    import sklearn.datasets
    import sklearn.metrics  # noqa: F401
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: F401
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, Trainer  # noqa: F401

    import hf_anomaly.training.denoising  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run_forked(json.loads(line)["code"])), flush=True)
