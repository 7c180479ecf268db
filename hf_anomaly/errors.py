"""The errors that are meant for people: one line, the culprit, the remedy."""

INSTALL_DEMO = "pip install 'hf-anomaly[demo]'"
NO_GRADIO = f"the demo needs gradio, which is not installed: {INSTALL_DEMO}"  # here, where nothing heavy is imported


class InputError(ValueError):
    """Bad input from the user. The message names the file, row, column or field and the remedy; scripts print it without a traceback."""


class NotFittedError(RuntimeError):
    """A detector was asked for scores before `fit_reference`, or for a decision before `calibrate`."""


class HubError(OSError):
    """The Hub refused something or cannot be reached. The message names the repository and the remedy; scripts print it without a traceback."""


def one_line(error: Exception) -> str:
    """Its message on one line, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
