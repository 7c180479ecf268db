"""Serving the page."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.formats import Window
from ..dissolving import Dissolver
from ..errors import InputError, one_line
from ..hub import hub_errors
from ..loading import load_detector
from .page import build_demo, import_gradio

if TYPE_CHECKING:
    import gradio


def run_demo(
    model_name: str,
    *,
    revision: str | None = None,
    port: int | None = None,
    host: str | None = None,
    share: bool = False,
    open_browser: bool = False,
    device: str | None = None,
    window: Window = None,
    block: bool = True,
) -> gradio.Blocks:
    """Serves the page of a saved detector, with its dissolver if there is one beside it, until it is interrupted.

    Args:
        model_name: folder or Hub id.
        revision: branch, tag or commit of a Hub model.
        port: default the first free one from 7860 on.
        host: the address to listen on; default this machine only, or what a Space of the Hub says.
        share: also make it reachable from anywhere, for a week, through a tunnel of gradio's makers. Mind whose images come and go there.
        open_browser: open the page in the browser.
        device: default the first GPU, else the CPU.
        window: of images of more than 8 bits, see `hf_anomaly.data.formats.Reading`; None: the one of the training.
        block: False returns at once; `.close()` then ends it.

    Raises:
        InputError: gradio is not installed, there is no such detector, its dissolver is damaged, the port is taken or none, or the host is no address of
            this machine.
        NotFittedError: a detector that was never fitted.
    """
    _check_address(host, port)
    gr = import_gradio()
    import torch

    model, processor = load_detector(model_name, revision, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor.window = window or processor.window
    name = Path(model_name).resolve().name if Path(model_name).is_dir() else model_name
    demo = build_demo(model, processor, load_dissolver(model_name, revision), name=name)
    try:
        demo.launch(
            server_name=f"[{host.strip('[]')}]" if host and ":" in host else host,  # as IPv6 is written in a URL
            server_port=port,
            share=share,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,  # it would speak of its own `launch()`
            max_file_size="50mb",
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),  # none from elsewhere
        )
    except OSError as error:
        if "port" not in str(error):
            raise
        wanted = "the ports from 7860 on are" if port is None else f"port {port} is"
        raise InputError(f"{wanted} taken on this machine: choose another with --port") from error
    if block:
        print(f"running on {demo.local_url}", flush=True)  # that of --share is told anyway
        demo.block_thread()
    return demo


def _check_address(host: str | None, port: int | None) -> None:
    """Refuses an address that nothing can listen on: gradio would try a hundred ports of a wrong host, minutes long, and then say that they are taken."""
    if port is not None and not 0 < port < 2**16:
        raise InputError(f"--port {port}: ports are numbers from 1 to {2**16 - 1}")
    if not host:
        return
    try:
        family, kind, *_, address = min(socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM))  # IPv4 if there is a choice
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host}: that is no address of this machine ({one_line(error)}); leave it out, or give 0.0.0.0 for all that it has"
        ) from error


def load_dissolver(model_name: str, revision: str | None = None) -> Dissolver | None:
    """The dissolver beside a saved detector, None if there is none.

    Raises:
        InputError: it is damaged.
        HubError: the Hub cannot be reached.
    """
    folder = Path(model_name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with hub_errors(model_name, reading=True):
            patterns = ["dissolver/*.json", "dissolver/*.safetensors"]
            folder = Path(snapshot_download(model_name, revision=revision, allow_patterns=patterns))
    return Dissolver.from_pretrained(folder / "dissolver") if (folder / "dissolver").is_dir() else None
