"""Requests that come again: what is left of the throughput when senders repeat what was acknowledged.

    .venv/bin/python benchmarks/dedup.py [--shares 0,0.01,0.1,1] [--signals traces,logs] [--rounds 3] [--seconds 3]

A share of 1 means that each request is sent once more. Takes some two and a half minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from psycopg import sql

from benchmarks.checks import in_turns, remarks
from benchmarks.checks import run as send
from benchmarks.race import median
from benchmarks.receiver import Measured, Receiver, receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, Sent
from otel_pg_exporter.model import Signal

_TITLE = "Requests that come again"
_TEXT = (
    "{senders} senders of {items:,} items a request send a share of their requests a second time, right after the OK."
    " Items a second that were stored, and that were duplicates; the ratio is that of both together to 0 %. In turns,"
    " medians of {rounds} rounds of {seconds:g} s; CPU in microseconds an item, whether stored or not. There is no goal"
    " but that nothing is stored twice, and that a few retries cost about what as many other requests do."
)


def again(sent: Sent) -> float:
    """Return how many items a second were duplicates."""
    return sent.items_per_second * sent.resent / sent.requests


def race(receiver: Receiver, signal: Signal, options: argparse.Namespace) -> Table:
    """Let the shares take turns."""
    load = Load(endpoint="", signal=signal.value, items=options.items, senders=options.senders, seconds=options.seconds)
    shares = {f"{share:.0%}": share for share in options.shares}
    runs: dict[str, list[Measured]] = {name: [] for name in shares}
    for turn, name in in_turns(list(shares), options.rounds):
        say(f"{signal.items}, {name}, round {turn + 1}")
        runs[name].append(send(receiver, replace(load, resent=shares[name])))
        _compare(receiver.tables, signal, options.items)
    rates = {name: median([each.sent.items_per_second for each in of_one]) for name, of_one in runs.items()}
    rows = []
    for name, of_one in runs.items():
        sent = [each.sent for each in of_one]
        duplicates = median([again(each) for each in sent])
        rows.append(
            [
                name,
                f"{median([each.items_per_second - again(each) for each in sent]):,.0f}",
                f"{duplicates:,.0f}",
                f"{rates[name] / next(iter(rates.values())):.2f}",
                f"{median([each.receiver_cost for each in of_one]):.1f}",
                f"{median([each.postgres_cost for each in of_one]):.1f}",
                f"{max(each.cpu_share for each in sent):.2f}",
                remarks(sent),
            ]
        )
    header = [f"{signal.items} sent again", "stored/s", "duplicates/s", "ratio", "CPU: receiver", "PostgreSQL"]
    return Table(header=[*header, "generator's core", "remarks"], rows=rows)


def _compare(tables: Database, signal: Signal, items: int) -> None:
    """See to it that what is written beside the rows tells the same: nothing was stored twice."""
    beside = "sum(span_count)" if signal is Signal.TRACES else f"count(*) * {items}"
    table = "traces" if signal is Signal.TRACES else "ingest_requests"
    query = sql.SQL("SELECT (SELECT count(*) FROM {}), (SELECT {} FROM {})").format(
        tables.name(signal.table), sql.SQL(beside), tables.name(table)
    )
    rows, told = tables.admin.execute(query).fetchall()[0]
    if rows != told:
        raise RuntimeError(f"there are {rows:,} {signal.items}, and {told:,} by {table}")


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    with receiving(tables) as receiver:
        made = [race(receiver, signal, options) for signal in options.signals]
    return [Section(title="", text=_TEXT.format(**vars(options)), tables=made)]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument(
        "--shares",
        type=lambda text: [float(each) for each in text.split(",")],
        default=[0.0, 0.01, 0.1, 1.0],
        help="of the requests; the first is what the others are compared with",
    )
    made.add_argument("--signals", type=lambda text: [Signal(each) for each in text.split(",")], default=list(Signal))
    made.add_argument("--items", type=int, default=1_000, help="a request")
    made.add_argument("--senders", type=int, default=32, help="requests in flight")
    made.add_argument("--seconds", type=float, default=3.0, help="a run")
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args(arguments)
    if options.quick:
        options.seconds, options.rounds = 2.0, 1
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
