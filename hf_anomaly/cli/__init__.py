"""The command line, `hf-anomaly`: one module a command, imported when it is asked for."""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..errors import InputError
from ..version import __version__

COMMANDS = {  # name -> what it does; its module has `parse(argv)`, without heavy imports, and `run(arguments)`
    "train": "learn from normal images what is normal",
    "evaluate": "measure a detector on labelled images",
    "compare": "put the results of several detectors into one table: methods, settings, mean over seeds",
    "report": "write a page on how a detector does: curves, thresholds, its best and worst images",
    "calibrate": "set a detector's threshold by normal images of the place where it is used",
    "predict": "score images: a table with score, p-value and verdict, and maps of where the anomaly is",
    "dissolve": "show what a dissolver leaves of an image",
    "group": "list image files so that near copies, such as frames of one sequence, can be kept together",
    "info": "tell what a detector is, on what it was trained, and how well it does",
    "card": "write a detector's model card anew: licence, results of other seeds; your own words in it stay",
    "demo": "open a page in the browser on which a detector judges images",
    "space": "put that page on the Hugging Face Hub",
    "push": "put a detector or dissolver on the Hugging Face Hub",
}

HELP = f"""usage: hf-anomaly COMMAND …

Finds images that are not like the normal ones.

{"".join(f"  {name:10}{what}{chr(10)}" for name, what in COMMANDS.items())}
  hf-anomaly COMMAND --help   tells more of one
  hf-anomaly --version        the version

From nothing to a verdict:

  hf-anomaly train shared_ae --dataset_name folder/of/normal/images --output_dir my-detector
  hf-anomaly predict my-detector some/*.png --output scores.csv --save_maps maps
"""


def show_any_text() -> None:
    """A character that the terminal's encoding does not have, in a help or a file's name, is printed as its number, and ends no run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C in the block is one line, with what it tells, and ends the process with status 130."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        print(": ".join(["\ninterrupted", *map(str, interruption.args)]), file=sys.stderr)
        sys.exit(130)


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. Exits with 2 after an error, which is printed as one line."""
    show_any_text()
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
    elif name == "--version":
        print(f"hf-anomaly {__version__}")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        with interruptible():  # also while it imports
            _run(name, argv[1:])


def _run(name: str, argv: list[str]) -> None:
    command = import_module(f".{name}", __name__)
    try:
        arguments = command.parse(argv)  # before torch is imported: --help and a misspelt option are answered at once
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import_module("..registry", __name__)
    from .running import run_script

    run_script(lambda: command.run(arguments))
