"""What commands print, and how they end in failure."""

import importlib.metadata
import os
import sys
from collections.abc import Iterable

PROGRAM = "otel-pg-exporter"


def version() -> str:
    """Return the installed package's version."""
    return importlib.metadata.version(PROGRAM)


def print_lines(lines: Iterable[str]) -> None:
    """Print to stdout; what nobody reads any more (`| head`) is no error."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Python flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: Exception, remedy: str = "", *, status: int) -> int:
    """Say on stderr what went wrong, and what to do about it; return the exit code."""
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    if remedy:
        print(remedy, file=sys.stderr)
    return status
