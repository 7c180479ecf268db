"""argparse with this package's manners: one line for an error, the nearest option for a misspelt one."""

import argparse
import difflib
import re
import sys

from .errors import InputError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`, and which takes no abbreviations."""

    def __init__(self, *args, **settings):
        super().__init__(*args, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # of later Pythons: before 3.14 -1e-3 is an option

    def refuse_unknown(self, words: list[str]) -> None:
        """Raises InputError if there are words that the parser left over."""
        if words:
            close = difflib.get_close_matches(words[0].split("=")[0], self._option_string_actions, n=1)
            if close:
                raise InputError(f"unknown argument {words[0]!r}: did you mean {close[0]}?")
            self.error(f"unknown argument {words[0]!r}")

    def error(self, message):
        raise InputError(f"{message}; see --help")


class Parser(OneLineParser):
    """Of options that are written with underscores, as everywhere in the package; hyphens work too."""

    def __init__(self, program: str, description: str):
        super().__init__(prog=program, description=description)

    def option(self, name: str, help: str, **settings) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, help=help, **settings)

    def window_option(self, default: str) -> None:
        """`--window`, see `parse_window`."""
        what = "images of more than 8 bits: the values that become black and white, or full, the whole range"
        self.option("window", f"{what} (default: {default})", nargs="+", metavar=("LOW", "HIGH"))

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Raises InputError: an unknown option or a bad value."""
        parsed, rest = self.parse_known_intermixed_args(argv)
        self.refuse_unknown(rest)
        return parsed


def model_first(argv: list[str], help: str) -> list[str]:
    """The words for a parser of dataclasses, in which `MODEL …` stands for `--model MODEL …`. Asked for help it prints `help` and exits, unless for all."""
    if not argv or argv in (["-h"], ["--help"]):
        print(help, end="")
        sys.exit()
    if argv == ["--help", "all"]:
        return ["--help"]
    return argv if argv[0].startswith("-") else ["--model", *argv]
