"""GenAI: spans with prompts of 2 to 8 KB, by how PostgreSQL compresses them.

    .venv/bin/python benchmarks/genai.py [--dsn postgresql://…] [--items 200] [--senders 16] [--seconds 6] [--rounds 5]

The embedded PostgreSQL has no lz4; name one that has it by `--dsn`, as Debian's. Takes some two minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from otel_pg_exporter.bench.load import Load
from otel_pg_exporter.bench.requests import Content

_TITLE = "GenAI"
_TEXT = (
    "Chats with language models, {items:,} spans a request from {senders} senders, in tables whose columns are"
    " compressed by {methods}. MB are 10^6 bytes of OTLP; on disk are the table, its TOAST and its indexes; CPU in"
    " microseconds a span. In turns, medians of {rounds} rounds of {seconds:g} s. lz4 is what `migrate` chooses where"
    " the server has it, which is right if it wins here.{missing}"
)
_MISSING = " This server has no lz4: run the script with --dsn on one that has it for a comparison."
_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One run."""

    measured: Measured
    stored_bytes: float  # a span


def methods(tables: Database) -> list[str]:
    """List the compressions that the server has."""
    query = "SELECT unnest(enumvals) FROM pg_settings WHERE name = 'default_toast_compression' ORDER BY 1"
    return [name for (name,) in tables.admin.execute(query).fetchall()] or ["pglz"]  # before 14 there was no other


def compress(tables: Database, method: str) -> None:
    """Set the compression of all that `migrate` sets it for in `spans`: partitions have settings of their own."""
    query = (
        "SELECT a.attrelid::regclass::text, a.attname FROM pg_attribute AS a"
        " JOIN pg_partition_tree(%s::regclass) AS t ON t.relid = a.attrelid"
        " WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attstorage IN ('x', 'm')"
    )
    alter = sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET COMPRESSION {}")
    columns = tables.admin.execute(query, [tables.name("spans").as_string(tables.admin)]).fetchall()
    for relation, column in columns:
        # The first is quoted already.
        tables.admin.execute(alter.format(sql.SQL(relation), sql.Identifier(column), sql.SQL(method)))


def lap(receiver: Receiver, load: Load) -> Lap:
    """Send a load, and look at what it takes on the disk."""
    measured = send(receiver, load)
    tables = receiver.tables
    query = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree(%s::regclass)"
    size = tables.admin.execute(query, [tables.name("spans").as_string(tables.admin)]).fetchall()[0][0]
    return Lap(measured=measured, stored_bytes=float(size) / tables.count("spans"))


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    load = Load(
        endpoint="",
        content=Content.GENAI.value,
        items=options.items,
        senders=options.senders,
        seconds=options.seconds,
    )
    known = methods(tables)
    laps: dict[str, list[Lap]] = {method: [] for method in known}
    with receiving(tables, "--writers", str(options.writers)) as receiver:
        for turn, method in in_turns(known, options.rounds):
            say(f"{method}, round {turn + 1}")
            if len(known) > 1:
                compress(tables, method)
            laps[method].append(lap(receiver, load))
    rates = {method: _rate(of_one) for method, of_one in laps.items()}
    header = ["compression", "spans/s", "MB/s", "ratio to pglz", "bytes on disk", "CPU: receiver", "PostgreSQL"]
    rows = [_row(method, of_one, rates[method] / rates["pglz"]) for method, of_one in laps.items()]
    missing = "" if len(known) > 1 else _MISSING
    text = _TEXT.format(**vars(options), methods=" and ".join(known), missing=missing)
    return [Section(title="", text=text, tables=[Table(header=[*header, "generator's core", "remarks"], rows=rows)])]


def _rate(laps: Sequence[Lap]) -> float:
    return median([each.measured.sent.items_per_second for each in laps])


def _row(method: str, laps: Sequence[Lap], ratio: float) -> list[str]:
    sent = [each.measured.sent for each in laps]
    return [
        method,
        f"{_rate(laps):,.0f}",
        f"{median([each.bytes / each.seconds for each in sent]) / _MB:,.1f}",
        f"{ratio:.2f}",
        f"{median([each.stored_bytes for each in laps]):,.0f}",
        f"{median([each.measured.receiver_cost for each in laps]):.1f}",
        f"{median([each.measured.postgres_cost for each in laps]):.1f}",
        f"{max(each.cpu_share for each in sent):.2f}",
        remarks(sent),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--items", type=int, default=200, help="a request")
    made.add_argument("--senders", type=int, default=16, help="requests in flight")
    made.add_argument("--writers", type=int, default=3, help="connections of the receiver")
    made.add_argument("--seconds", type=float, default=6.0, help="a run")
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args(arguments)
    if options.quick:
        options.seconds, options.rounds = 2.0, 1
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
