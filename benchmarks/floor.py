"""OTLP/gRPC to committed rows, against what PostgreSQL takes from bare psycopg on as many connections.

    .venv/bin/python benchmarks/floor.py [--connections 1,2,4] [--rounds 3] [--seconds 4]

The floor sends the same rows by the same statements (COPY, the upsert of `traces`, the ledger), all made before the
clock runs, and knows no client, no protobuf and no batching. Below it, `rows alone` is the COPY without the rest.
Takes about three minutes.
"""

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.checks import in_turns
from benchmarks.processes import GENERATOR_CORE
from benchmarks.race import median
from benchmarks.receiver import Measured, receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load
from otel_pg_exporter.bench.requests import Content, templates
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.postgres import statements, traces
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.merge import Merged
from otel_pg_exporter.postgres.transaction import Statements
from otel_pg_exporter.transcode import compile_plan, transcode

_TITLE = "The floor"
_FLOOR, _ROWS_ALONE = "floor", "rows alone"
_TEXT = (
    "Items a second in PostgreSQL: {items:,} a request from {senders} senders for the receiver, {batch:,} a transaction"
    " for bare psycopg; {content} content, {seconds:g} s each, in turns, medians of {rounds} rounds. The generator and"
    " bare psycopg have a core to themselves. Ratios are the receiver's to the floor's and to that of the rows alone;"
    " the goal is 0.90 of the floor. CPU is in microseconds an item."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One transaction, ready to be sent."""

    items: int
    copy: Sequence[bytes]
    others: Sequence[tuple[bytes, Sequence[object]]]  # statements with their parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One contestant's turn."""

    rate: float  # items a second
    client_cost: float  # CPU microseconds an item: of the receiver, or of bare psycopg
    postgres_cost: float


def prepare(tables: Database, signal: Signal, options: argparse.Namespace, count: int) -> list[Prepared]:
    """Make transactions of `options.batch` items."""
    plan = compile_plan(tables.mapping, signal, Window())
    compiled = Statements(tables.settings, tables.mapping)
    made = itertools.cycle(templates(signal, options.content, options.items, number=8))
    prepared = []
    for _ in range(count):
        bodies = [next(made).fresh(time.time_ns()) for _ in range(max(1, options.batch // options.items))]
        merged = Merged([transcode(plan, body, now_ns=time.time_ns()) for body in bodies])
        if signal is Signal.TRACES:
            summary = traces.summarise(merged.facts, merged.survivors, compiled.sum_count)
            others = [(compiled.upsert_traces, summary.parameters(summary.ids))]
        else:
            ids = sorted(batch.request_id for batch in merged.batches)
            claims = statements.arrays(statements.REQUEST_TYPES, [(each, bytes(8), b"") for each in ids])
            others = [(compiled.claim_requests, claims)]
        copy = list(statements.copy_data(merged.rows, merged.survivors))
        prepared.append(Prepared(items=len(merged.survivors), copy=copy, others=others))
    return prepared


def bare(
    tables: Database,
    signal: Signal,
    prepared: Sequence[Prepared],
    connections: Sequence[Connection],
    *,
    all_of_it: bool,
) -> Lap:
    """Send transactions over all connections at once."""
    tables.truncate()
    compiled = Statements(tables.settings, tables.mapping)
    waiting = iter(prepared)  # a list's iterator hands each element to one thread

    def send(connection: Connection) -> None:
        if GENERATOR_CORE is not None:
            os.sched_setaffinity(0, {GENERATOR_CORE})  # of this thread
        while (transaction := next(waiting, None)) is not None:
            connection.execute(compiled.begin)
            with connection.cursor() as cursor, cursor.copy(compiled.tables[signal].copy) as copy:
                for piece in transaction.copy:
                    copy.write(piece)
            for statement, parameters in transaction.others if all_of_it else ():
                connection.execute(statement, parameters)
            connection.execute("COMMIT")

    threads = [threading.Thread(target=send, args=(connection,)) for connection in connections]
    postgres, computed, began = tables.cpu(), time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    items = sum(each.items for each in prepared)
    return Lap(
        rate=items / seconds,
        client_cost=(time.process_time() - computed) / items * 1e6,
        postgres_cost=(tables.cpu() - postgres) / items * 1e6,
    )


def _lap(measured: Measured) -> Lap:
    sent = measured.sent
    if sent.failures or sent.rejected:
        raise RuntimeError(f"not all was taken: {sent.failures}, {sent.rejected} items rejected")
    return Lap(rate=sent.items_per_second, client_cost=measured.receiver_cost, postgres_cost=measured.postgres_cost)


def race(tables: Database, signal: Signal, connections: int, options: argparse.Namespace) -> list[str]:
    """Let the receiver and bare psycopg take turns; return the table's row."""
    load = Load(
        endpoint="",
        signal=signal.value,
        content=options.content.value,
        items=options.items,
        senders=options.senders,
        seconds=options.seconds,
    )
    laps: dict[str, list[Lap]] = {_FLOOR: [], _ROWS_ALONE: [], "receiver": []}
    shares = []
    opened = [tables.connect() for _ in range(connections)]
    with receiving(tables, "--writers", str(connections)) as receiver:
        first = receiver.run(load)  # its rate says how much to prepare; nothing else is taken from it
        count = max(2 * connections, round(first.sent.items_per_second * options.seconds / options.batch))
        prepared = prepare(tables, signal, options, count)
        for turn, name in in_turns(list(laps), options.rounds):
            say(f"{signal.items}, {connections} connections, round {turn + 1}: {name}")
            if name == "receiver":
                measured = receiver.run(load)
                shares.append(measured.sent.cpu_share)
                laps[name].append(_lap(measured))
            else:
                laps[name].append(bare(tables, signal, prepared, opened, all_of_it=name == _FLOOR))
    for connection in opened:
        connection.close()
    rate = {name: median([lap.rate for lap in each]) for name, each in laps.items()}
    cost = {name: median([lap.client_cost for lap in each]) for name, each in laps.items()}
    postgres = {name: median([lap.postgres_cost for lap in each]) for name, each in laps.items()}
    return [
        f"{signal.items}, {connections}",
        f"{rate['receiver']:,.0f}",
        f"{rate[_FLOOR]:,.0f}",
        f"{rate[_ROWS_ALONE]:,.0f}",
        f"{rate['receiver'] / rate[_FLOOR]:.2f}",
        f"{rate['receiver'] / rate[_ROWS_ALONE]:.2f}",
        f"{cost['receiver']:.1f}",
        f"{postgres['receiver']:.1f}",
        f"{postgres[_FLOOR]:.1f}",
        f"{median(shares):.2f}",
    ]


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    header = [
        "connections",
        "receiver",
        "floor",
        "rows alone",
        "to the floor",
        "to rows alone",
        "CPU: receiver",
        "PostgreSQL",
        "at the floor",
        "generator's core",
    ]
    rows = [race(tables, signal, number, options) for signal in options.signals for number in options.connections]
    text = _TEXT.format(**vars(options))
    return [Section(title="", text=text, tables=[Table(header=header, rows=rows)])]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--connections", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4])
    made.add_argument("--signals", type=lambda text: [Signal(each) for each in text.split(",")], default=list(Signal))
    made.add_argument("--content", type=Content, choices=list(Content), default=Content.MIXED)
    made.add_argument("--items", type=int, default=1_000, help="a request")
    made.add_argument("--batch", type=int, default=10_000, help="items in a transaction of bare psycopg")
    made.add_argument("--senders", type=int, default=32)
    made.add_argument("--seconds", type=float, default=4.0)
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args(arguments)
    if options.quick:
        options.connections, options.rounds, options.seconds = [2], 1, 1.0
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
