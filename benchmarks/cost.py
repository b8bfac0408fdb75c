"""What the receiver costs: CPU microseconds a span and a log record, by the system's accounts of its process.

    .venv/bin/python benchmarks/cost.py [--sizes 100,512,1000,8000] [--gzip-sizes 1000] [--signals traces] [--rounds 2]

Two receivers take turns: `serve`, and one that does all that `serve` does with a request but for PostgreSQL. Each run
is of a number of requests, and its costs are all that was computed until the last one was answered. Takes some three
minutes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.checks import check, in_turns, remarks
from benchmarks.hollow import hollow
from benchmarks.processes import GENERATOR_CORE
from benchmarks.race import median
from benchmarks.receiver import Measured, Receiver, receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, LoadProcess
from otel_pg_exporter.bench.requests import Content
from otel_pg_exporter.model import Signal

_TITLE = "What the receiver costs"
_HOLLOW, _SERVE = "hollow", "serve"
_TEXT = (
    "CPU microseconds an item: first of a receiver that has no PostgreSQL, for receiving, transcoding and merging; then"
    " of `serve`, which sends COPY too; and of PostgreSQL beside it. Both were sent the same numbers of items in turns;"
    " figures are medians of {rounds} rounds. The goals, for requests of 1,000 spans: below 2.5 without sending, below"
    " 3.5 with it."
)
_ITEM_BYTES = {Content.SMALL: 100, Content.MIXED: 500, Content.GENAI: 5_300}
_IN_FLIGHT = 48 * 10**6  # bytes of requests; but never fewer than two of them
_SENDERS = 32
_TEMPLATES = 8  # but no more than have this many items together
_TEMPLATES_ITEMS = 8_000
_GENAI_SHARE = 4  # of the items, one in so many is sent where items are so large
_SECONDS = 60.0  # that a run may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of request."""

    signal: Signal
    content: Content
    items: int
    gzip: bool

    def __str__(self) -> str:
        return f"{self.content}, {self.items:,} a request{', gzip' if self.gzip else ''}"

    def load(self, items: int) -> Load:
        """Return the load of a run that is to send so many items, fewer where they are large."""
        share = _GENAI_SHARE if self.content is Content.GENAI else 1
        return Load(
            endpoint="",
            signal=self.signal.value,
            content=self.content.value,
            items=self.items,
            senders=max(2, min(_SENDERS, _IN_FLIGHT // (self.items * _ITEM_BYTES[self.content]))),
            seconds=_SECONDS,
            warm_up=0.0,
            requests=max(2, items // share // self.items),
            gzip=self.gzip,
            templates=max(1, min(_TEMPLATES, _TEMPLATES_ITEMS // self.items)),
            core=GENERATOR_CORE,
        )


def lap(receiver: Receiver, load: Load, *, stores: bool) -> Measured:
    """Send all of a load; return what was computed from its first request to its last answer, for all its items."""
    assert load.requests is not None
    receiver.tables.truncate()
    with LoadProcess(replace(load, endpoint=receiver.endpoint)) as process:
        process.wait_ready()
        computed, postgres = receiver.cpu(), receiver.tables.cpu()
        sent = process.result()
        computed, postgres = receiver.cpu() - computed, receiver.tables.cpu() - postgres
    if sent.requests < load.requests:
        raise RuntimeError(f"{sent.requests:,} of {load.requests:,} requests were acknowledged; {sent.failures}")
    if stores:
        check(receiver.tables, load, sent, least=sent.items)
    return Measured(sent=sent, receiver_cpu=computed, postgres_cpu=postgres)


def row(case: Case, receivers: Mapping[str, Receiver], options: argparse.Namespace) -> list[str]:
    """Let the receivers take turns; return the table's row."""
    load = case.load(options.items)
    laps: dict[str, list[Measured]] = {name: [] for name in receivers}
    for _, name in in_turns(list(receivers), options.rounds):
        laps[name].append(lap(receivers[name], load, stores=name == _SERVE))
    cost = {name: median([each.receiver_cost for each in of_one]) for name, of_one in laps.items()}
    sent = [each.sent for of_one in laps.values() for each in of_one]
    return [
        str(case),
        f"{cost[_HOLLOW]:.2f}",
        f"{cost[_SERVE]:.2f}",
        f"{cost[_SERVE] / cost[_HOLLOW]:.2f}",
        f"{median([each.postgres_cost for each in laps[_SERVE]]):.1f}",
        f"{max(each.cpu_share for each in sent):.2f}",
        remarks(sent),
    ]


def cases(signal: Signal, options: argparse.Namespace) -> list[Case]:
    """List what is sent."""
    return [
        Case(signal=signal, content=content, items=items, gzip=gzip)
        for content in Content
        for items in options.sizes
        for gzip in ((False, True) if items in options.gzip_sizes else (False,))
    ]


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    made = []
    with receiving(tables) as serve, hollow(tables) as without:
        receivers = {_HOLLOW: without, _SERVE: serve}
        for signal in options.signals:
            first = Case(signal=signal, content=Content.SMALL, items=100, gzip=False).load(10_000)
            for name, receiver in receivers.items():
                lap(receiver, first, stores=name == _SERVE)  # connects, and writes the resources
            rows = []
            for case in cases(signal, options):
                say(f"{signal.items}: {case}")
                rows.append(row(case, receivers, options))
            header = [signal.items, "merged", "and sent", "ratio", "PostgreSQL", "generator's core", "remarks"]
            made.append(Table(header=header, rows=rows))
    return [Section(title="", text=_TEXT.format(**vars(options)), tables=made)]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--sizes", type=_numbers, default=[100, 512, 1_000, 8_000], help="items a request")
    made.add_argument("--gzip-sizes", type=_numbers, default=[1_000], help="those that are sent compressed, too")
    made.add_argument("--signals", type=lambda text: [Signal(each) for each in text.split(",")], default=list(Signal))
    made.add_argument("--items", type=int, default=100_000, help="a run; a quarter of it where contents are GenAI")
    made.add_argument("--rounds", type=int, default=2)
    options = made.parse_args(arguments)
    if options.quick:
        options.sizes, options.items, options.rounds = [100, 1_000], 4_000, 1
    run(_TITLE, options, measure)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    main()
