"""What the end-to-end scripts have in common: their arguments, their tables, and where their results go."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.processes import pin, split
from benchmarks.report import Section, facts, markdown, plain, publish
from benchmarks.server import Database, database
from otel_pg_exporter.transcode import CORE

Measure = Callable[[Database, argparse.Namespace], Sequence[Section]]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of a script; `doc` is its docstring."""
    made = argparse.ArgumentParser(
        description=(doc or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--quick", action="store_true", help="does it run? no figures to quote")
    made.add_argument("--dsn", help="a PostgreSQL to measure on; it gets a schema of its own, dropped later")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="put the results into a file, too")
    return made


def run(
    title: str, options: argparse.Namespace, measure: Measure, *, configuration: dict[str, str] | None = None
) -> None:
    """Measure on empty tables, print what came of it, and put it into the file of results if that is wanted."""
    load = os.getloadavg()[0]
    pin()
    with database(options.dsn, day=today(), configuration=configuration) as tables:
        sections = measure(tables, options)
        known = facts(tables.version(), load)
    known |= {"Cores": split(), "Core that makes rows": CORE}
    print(plain(known, sections))
    if options.markdown is not None:
        command = " ".join(["python", *_relative(sys.argv)])
        publish(options.markdown, title, markdown(known, sections, title=title, command=command))


def today() -> int:
    """Return the day, in days since 1970."""
    return int(datetime.now(UTC).timestamp()) // 86_400


def say(what: str) -> None:
    """Tell on stderr what is being measured."""
    print(f"… {what}", file=sys.stderr, flush=True)


def _relative(arguments: Sequence[str]) -> list[str]:
    """Return the command as it is typed in the project's folder, without what is about this machine alone."""
    script, *rest = arguments
    places = {"--dsn": "$DSN", "--markdown": "benchmarks/RESULTS.md"}
    shown = [places.get(before, each) for before, each in zip(["", *rest], rest, strict=False)]
    return [f"benchmarks/{Path(script).name}", *shown]
