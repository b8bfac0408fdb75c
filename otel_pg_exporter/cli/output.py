"""What commands print, and how they end in failure."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

from otel_pg_exporter.errors import ExporterError

if TYPE_CHECKING:
    from tqdm import tqdm

PROGRAM = "otel-pg-exporter"


def version() -> str:
    """Return the installed package's version."""
    import importlib.metadata

    return importlib.metadata.version(PROGRAM)


class OutputError(ExporterError):
    """What is printed goes nowhere: stdout is full or closed, or `unread`, since its reader has gone (`| head`)."""

    def __init__(self, message: str, *, unread: bool = False) -> None:
        super().__init__(message)
        self.unread = unread


def reserve_stdout() -> None:
    """Keep the place of a stdout that is closed (`>&-`): no file of ours is to get it, and what goes there, to fail."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")


def print_lines(lines: Iterable[str]) -> None:
    """Print to stdout. Raises OutputError, which ends a command."""
    text = "\n".join(lines)
    with _stdout() as stdout:
        print(text, file=stdout)


def print_bytes(data: bytes) -> None:
    """Write to stdout as it is. Raises OutputError."""
    with _stdout() as stdout:
        stdout.buffer.write(data)


@contextlib.contextmanager
def _stdout() -> Iterator[TextIO]:
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as exc:
        # Python flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        unread = isinstance(exc, BrokenPipeError)
        raise OutputError(f"cannot write to stdout: {exc.strerror}", unread=unread) from exc


def fail(error: Exception, remedy: str = "", *, status: int) -> int:
    """Say on stderr what went wrong, and what to do about it; return the exit code."""
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    if remedy:
        print(remedy, file=sys.stderr)
    return status


def printable(text: str) -> str:
    """Escape what senders may have put there to play tricks on a terminal."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def as_json(value: object, *, indent: int | None = None) -> str:
    """Write JSON, readable and harmless on a terminal."""
    text = json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8", indent=indent)
    return "\n".join(map(printable, text.split("\n")))


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: 1 span, 1,000 spans."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Container[str] = ()) -> list[str]:
    """Lay out a table; a last column of words is cut to the width of the terminal, if that is where it goes."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    words = titles[-1] not in right  # part of a number would be another one
    room = shutil.get_terminal_size().columns if words and sys.stdout.isatty() else None
    lines = []
    for row in (titles, *rows):
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        lines.append(line if room is None or len(line) <= room else line[: room - 1] + "…")
    return lines


def progress(what: str, *, total: float | None = None, form: str | None = None) -> "tqdm[NoReturn]":
    """Return a bar on stderr, which is gone in the end; where nobody looks there is none.

    `form` is tqdm's bar_format. Clear it before anything else is printed.
    """
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    return tqdm(desc=what, total=total, bar_format=form, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True)


def confirmed(question: str) -> bool:
    """Ask on the terminal; only yes means yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
