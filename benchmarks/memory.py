"""Memory: what is resident of the receiver at rest, under full load, and some seconds later.

    .venv/bin/python benchmarks/memory.py [--senders 32] [--items 1000] [--seconds 8] [--after 10] [--rounds 3]

Each run has a receiver of its own, whose memory is looked at ten times a second. Takes some two minutes and a half.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.checks import check, in_turns, remarks
from benchmarks.processes import GENERATOR_CORE
from benchmarks.race import median
from benchmarks.receiver import receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, LoadProcess, Sent
from otel_pg_exporter.bench.requests import Content

_TITLE = "Memory"
_TEXT = (
    "Resident memory of the receiver in MB (10^6 bytes): after its start, under a load of {senders} requests of"
    " {items:,} spans in flight for {seconds:g} s (median and peak of looks 0.1 s apart), and {after:g} s after that."
    " Each run has a new receiver; medians of {rounds} rounds, but for the peak, which is the greatest. The goal: below"
    " 250 MB at full speed."
)
_CONTENTS = [Content.MIXED, Content.GENAI]
_LOOK_INTERVAL = 0.1  # seconds
_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """What was resident in one run, in bytes."""

    rest: int
    median: float
    peak: int
    after: int
    sent: Sent


def look(tables: Database, content: Content, options: argparse.Namespace) -> Looks:
    """Start a receiver, put load on it, and look at its memory all the while."""
    tables.truncate()
    with receiving(tables) as receiver:
        load = Load(
            endpoint=receiver.endpoint,
            content=content.value,
            items=options.items,
            senders=options.senders,
            seconds=options.seconds,
            core=GENERATOR_CORE,
        )
        rest = receiver.resident()
        with LoadProcess(load) as process:
            process.wait_ready()
            under_load = []
            end = time.monotonic() + load.warm_up + load.seconds
            while time.monotonic() < end:
                time.sleep(_LOOK_INTERVAL)
                under_load.append(receiver.resident())
            sent = process.result()
        time.sleep(options.after)
        after = receiver.resident()
        check(tables, load, sent, least=sent.items)
    return Looks(rest=rest, median=statistics.median(under_load), peak=max(under_load), after=after, sent=sent)


def row(content: Content, runs: Sequence[Looks]) -> list[str]:
    """Return the table's row for one content."""
    sent = [each.sent for each in runs]
    size = sum(each.bytes for each in sent) / sum(each.requests for each in sent)
    figures = [
        median([each.rest for each in runs]),
        median([each.median for each in runs]),
        max(each.peak for each in runs),
        median([each.after for each in runs]),
    ]
    return [
        content.value,
        f"{size / _MB:.2f}",
        f"{median([each.items_per_second for each in sent]):,.0f}",
        *(f"{figure / _MB:.0f}" for figure in figures),
        f"{max(each.cpu_share for each in sent):.2f}",
        remarks(sent),
    ]


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    runs: dict[str, list[Looks]] = {content.value: [] for content in _CONTENTS}
    for turn, name in in_turns(list(runs), options.rounds):
        say(f"{name}, round {turn + 1}")
        runs[name].append(look(tables, Content(name), options))
    header = [
        "content",
        "MB a request",
        "spans/s",
        "at rest",
        "under load",
        "peak",
        "after it",
        "generator's core",
        "remarks",
    ]
    table = Table(header=header, rows=[row(content, runs[content.value]) for content in _CONTENTS])
    return [Section(title="", text=_TEXT.format(**vars(options)), tables=[table])]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--senders", type=int, default=32, help="requests in flight")
    made.add_argument("--items", type=int, default=1_000, help="a request")
    made.add_argument("--seconds", type=float, default=8.0, help="of load, a run")
    made.add_argument("--after", type=float, default=10.0, help="seconds between the load and the last look")
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args(arguments)
    if options.quick:
        options.seconds, options.after, options.rounds = 2.0, 1.0, 1
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
