"""`hf-anomaly demo MODEL`"""

from argparse import Namespace
from importlib.util import find_spec

from ..errors import INSTALL_DEMO, NO_GRADIO, InputError
from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "hf-anomaly demo",
        "Opens a page on which one drops an image and sees what a detector says of it. It needs gradio: " + INSTALL_DEMO,
    )
    parser.add_argument("model", help="a detector: a folder or a Hub id")
    parser.option("revision", "branch, tag or commit of a Hub model")
    parser.option("port", "default: the first free one from 7860 on", type=int)
    parser.option("host", "the address to listen on; default: this machine only")
    parser.option(
        "share", "also reachable from anywhere for a week, through a tunnel of gradio's makers: mind whose images", action="store_true"
    )
    parser.option("open_browser", "open the page in the browser", action="store_true")
    parser.option("device", "such as cpu or cuda; default: a GPU if there is one")
    parser.window_option("as in training")
    args = parser.parse(argv)
    if find_spec("gradio") is None:  # before seconds of imports
        raise InputError(NO_GRADIO)
    return args


def run(args: Namespace) -> None:
    from ..data.formats import parse_window
    from ..demo import run_demo

    settings = vars(args) | {"window": parse_window(args.window)}
    run_demo(settings.pop("model"), **settings)
