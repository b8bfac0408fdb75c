"""Colour on a terminal: whether, and which."""

import argparse
import os
import sys
from typing import TextIO

_CHOICES = ("auto", "always", "never")
_CODES = {"red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36", "grey": "90"}


def add_colour(parser: argparse.ArgumentParser) -> None:
    """Add `--color`."""
    parser.add_argument(
        "--color", choices=_CHOICES, default="auto", help="auto: on a terminal, unless NO_COLOR is set; default: auto"
    )


class Colour:
    """Colours text, or leaves it as it is."""

    def __init__(self, choice: str, stream: TextIO | None = None) -> None:
        """Decide by what was chosen, and by the stream that the text goes to; default: stdout."""
        # https://no-color.org: set to anything but nothing.
        wanted = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._on = choice == "always" or (choice == "auto" and wanted)

    def __call__(self, text: str, colour: str) -> str:
        """Return the text in a colour; an empty one is none."""
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self._on and colour and text else text
