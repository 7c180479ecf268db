"""What a command or script is run in: errors that a person can mend become one line and an exit status."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ..errors import HubError, InputError, NotFittedError
from . import interruptible, show_any_text

_ELSEWHERE = "choose an output and a cache (HF_HOME) that can be written to"
_REMEDIES = {  # of what a disk refuses
    errno.ENOENT: "check the name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make room, or choose another disk for the output and the cache (HF_HOME)",
    errno.EROFS: _ELSEWHERE,
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"check its permissions, or {_ELSEWHERE}"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "a file lies where a folder is to be, or a folder where a file: choose another output"
    ),
}
_FULL = re.compile("No space left|inline_container.*unexpected pos")  # as safetensors says it, and torch of a checkpoint's optimizer


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function; what the user can mend is printed as one line, with exit status 2, and so is an interruption, with 130."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("hf_anomaly").setLevel(logging.INFO)
    show_any_text()
    hub_logging.disable_propagation()  # it prints by itself
    _hide_bars_of_files()
    try:
        with interruptible():
            main()
    except (HubError, InputError, NotFittedError, StrictDataclassError, HfHubHTTPError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        refuse(str(reason))
    except BrokenPipeError:  # who reads the output has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        sys.exit(141)  # as a shell tells it
    except (OSError, SafetensorError, RuntimeError) as error:
        remedy = _REMEDIES.get(getattr(error, "errno", None)) or (_FULL.search(str(error)) and _REMEDIES[errno.ENOSPC])
        if not remedy:
            raise
        refuse(f"{error}; {remedy}")


def _hide_bars_of_files() -> None:
    """transformers' own, of a moment's reading or writing; those of downloads and of the training stay."""
    downloads_are_hidden = are_progress_bars_disabled()
    disable_progress_bar()
    if not downloads_are_hidden:
        enable_progress_bars()


def refuse(reason: str) -> NoReturn:
    """Prints one line, and ends the process with status 2."""
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)
