"""The rungs of the ladder: ways to write one batch in one transaction, from the plainest to ours.

All write into the same tables with all their indexes. The rungs of psycopg get Python values that are ready, JSON
included, and write the rows alone; ours brings the resources, the ledger and the trace summaries too.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from psycopg import sql

from benchmarks.bench import Bench
from benchmarks.server import Database
from benchmarks.workload import Batch
from otel_pg_exporter.config import WriterSettings
from otel_pg_exporter.model import Signal, Table, Window
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.telemetry import Statistics
from otel_pg_exporter.transcode.core import Core, choose

T = TypeVar("T")
Write = Callable[[Batch], None]

INSERT_PER_ROW = "INSERT per row"
WRITE_ROW = "binary COPY, write_row"

_ROWS_A_STATEMENT = 50  # of a multi-row INSERT, the best of 10 to 1,000 for both tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung(Generic[T]):
    """One way to write a `T`. `open` prepares it anew after its tables were emptied."""

    name: str
    open: Callable[[], Callable[[T], None]]
    slow: bool = False


def rungs(bench: Bench, table: Table) -> list[Rung[Batch]]:
    """List the ways to write spans or logs."""
    plain = _Plain(bench.database, bench.connection, table)
    return [
        Rung(name=INSERT_PER_ROW, open=lambda: plain.insert_per_row, slow=True),
        Rung(name="INSERT, multi-row VALUES", open=lambda: plain.insert_values, slow=True),
        Rung(name="executemany", open=lambda: plain.executemany, slow=True),
        Rung(name="text COPY, write_row", open=lambda: plain.copy_text),
        Rung(name=WRITE_ROW, open=lambda: plain.copy_binary),
        Rung(name="ours: Writer", open=lambda: writer(bench)),
        Rung(name="ours: Writer, write_method=insert", open=lambda: writer(bench, "insert")),
        *(
            Rung(name=f"ours: OTLP bytes to COMMIT, {core.name}", open=functools.partial(_from_otlp, bench, core))
            for core in cores()
        ),
        Rung(name="floor: COPY of ready buffers, rows alone", open=lambda: plain.copy_buffers),
    ]


def writer(bench: Bench, method: Literal["auto", "copy", "insert"] = "auto") -> Write:
    """Return our writer, as `serve` uses it."""
    ours = Writer(bench.pool, bench.database.mapping, WriterSettings(write_method=method), Statistics())

    def write(batch: Batch) -> None:
        ours.write(batch.requests)

    return write


def cores() -> list[Core]:
    """List the cores that there are: the reference, and the native one where it is installed."""
    reference, found = choose("python"), choose("auto")
    return [reference] if found.name == reference.name else [reference, found]


def _from_otlp(bench: Bench, core: Core) -> Write:
    ours = Writer(bench.pool, bench.database.mapping, WriterSettings(), Statistics())
    plans = {signal: core.compile_plan(bench.database.mapping, signal, Window()) for signal in Signal}

    def write(batch: Batch) -> None:
        plan = plans[batch.requests[0].signal]
        ours.write([core.transcode(plan, body, now_ns=time.time_ns()) for body in batch.bodies])

    return write


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Run BEGIN and COMMIT around; what fails inside is rolled back."""
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


class _Plain:
    """What psycopg offers, used as its documentation shows."""

    def __init__(self, database: Database, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._types = [column.type.value for column in table.columns]
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
        into = sql.SQL("{} ({})").format(database.name(table.name), names)
        self._row = sql.SQL("({})").format(sql.SQL(", ").join([sql.Placeholder()] * len(table.columns)))
        self._head = sql.SQL("INSERT INTO {} VALUES ").format(into)
        self._insert = (self._head + self._row).as_string(connection).encode()
        self._text = sql.SQL("COPY {} FROM STDIN").format(into)
        self._binary = sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(into)
        self._multi_row: dict[int, bytes] = {}

    def insert_per_row(self, batch: Batch) -> None:
        with transaction(self._connection):
            for row in batch.values:
                self._connection.execute(self._insert, row)

    def insert_values(self, batch: Batch) -> None:
        with transaction(self._connection):
            for first in range(0, len(batch.values), _ROWS_A_STATEMENT):
                chunk = batch.values[first : first + _ROWS_A_STATEMENT]
                self._connection.execute(self._values(len(chunk)), [value for row in chunk for value in row])

    def _values(self, rows: int) -> bytes:
        if rows not in self._multi_row:
            statement = self._head + sql.SQL(", ").join([self._row] * rows)
            self._multi_row[rows] = statement.as_string(self._connection).encode()
        return self._multi_row[rows]

    def executemany(self, batch: Batch) -> None:
        with transaction(self._connection), self._connection.cursor() as cursor:
            cursor.executemany(self._insert, batch.values)

    def copy_text(self, batch: Batch) -> None:
        with transaction(self._connection), self._connection.cursor() as cursor, cursor.copy(self._text) as copy:
            for row in batch.values:
                copy.write_row(row)

    def copy_binary(self, batch: Batch) -> None:
        with transaction(self._connection), self._connection.cursor() as cursor, cursor.copy(self._binary) as copy:
            copy.set_types(self._types)
            for row in batch.values:
                copy.write_row(row)

    def copy_buffers(self, batch: Batch) -> None:
        with transaction(self._connection), self._connection.cursor() as cursor, cursor.copy(self._binary) as copy:
            copy.write(batch.buffer)
