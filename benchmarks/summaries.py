"""The rungs for trace summaries: the upsert into `traces`, alone.

Half of a batch's traces are in the table already, so both arms of the upsert run. All rungs share one ON CONFLICT
clause, ours; what differs is how the values get there.
"""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import sql

from benchmarks.bench import Bench
from benchmarks.rungs import Rung, transaction
from otel_pg_exporter.model import SpanFacts
from otel_pg_exporter.postgres import statements, traces

UPSERT_PER_ROW = "upsert per row"
EXECUTEMANY = "upsert by executemany"
UNNEST = "ours: upsert from unnest"

_PG_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_COLUMNS = (
    *("trace_id", "start_time", "end_time", "span_count", "error_count", "root_span_id", "root_start_time"),
    *("root_name", "root_service_name", "service_names"),
)


@dataclass(frozen=True, slots=True)
class Summaries:
    """The trace summaries of one transaction, as aggregates and as rows of Python values."""

    aggregates: dict[bytes, traces.TraceAggregate]
    values: list[tuple[Any, ...]]


def make(count: int, batches: int, sum_count: int, *, seed: int) -> list[Summaries]:
    """Make batches of `count` summaries, of which each shares half with the one before."""
    chance = random.Random(seed)
    step = max(1, count // 2)
    ids = [chance.randbytes(16) for _ in range(step * (batches - 1) + count)]
    return [
        _summaries([_facts(chance, trace_id, sum_count) for trace_id in ids[first : first + count]])
        for first in range(0, step * batches, step)
    ]


def _facts(chance: random.Random, trace_id: bytes, sum_count: int) -> SpanFacts:
    start = 830_000_000_000_000 + chance.randrange(10**12)
    return SpanFacts(
        trace_id=trace_id,
        span_id=chance.randbytes(8),
        start=start,
        end=start + chance.randrange(10**6),
        error=False,
        root=True,
        name="GET /api/v1/customers/{id}/orders/{order}",
        service_name=chance.choice(("frontend", "checkout")),
        sums=(None,) * sum_count,
    )


def _summaries(facts: Sequence[SpanFacts]) -> Summaries:
    return Summaries(traces.aggregate(facts), [_values(each) for each in facts])


def _values(facts: SpanFacts) -> tuple[Any, ...]:
    start = _PG_EPOCH + timedelta(microseconds=facts.start)
    end = _PG_EPOCH + timedelta(microseconds=facts.end)
    return (
        *(uuid.UUID(bytes=facts.trace_id), start, end, 1, int(facts.error), facts.span_id, start),
        *(facts.name, facts.service_name, [facts.service_name], *facts.sums),
    )


def upserts(bench: Bench) -> list[Rung[Summaries]]:
    """List the ways to write trace summaries."""
    database, connection = bench.database, bench.connection
    sums = database.mapping.spans.sums
    ours = statements.upsert_traces(database.settings.schema, sums)
    _, _, on_conflict = ours.as_string(connection).partition(" ON CONFLICT ")
    names = [*_COLUMNS, *(column.name for column in sums)]
    per_row = (
        sql.SQL("INSERT INTO {} AS t ({}) VALUES ({})")
        .format(
            database.name("traces"),
            sql.SQL(", ").join(map(sql.Identifier, names)),
            sql.SQL(", ").join([sql.Placeholder()] * len(names)),
        )
        .as_string(connection)
        + f" ON CONFLICT {on_conflict}"
    ).encode()

    def upsert_per_row(batch: Summaries) -> None:
        with transaction(connection):
            for row in batch.values:
                connection.execute(per_row, row)

    def executemany(batch: Summaries) -> None:
        with transaction(connection), connection.cursor() as cursor:
            cursor.executemany(per_row, batch.values)

    def unnest(batch: Summaries) -> None:
        with transaction(connection):
            connection.execute(ours, traces.parameters(batch.aggregates, len(sums)))

    return [
        Rung(name=UPSERT_PER_ROW, open=lambda: upsert_per_row, slow=True),
        Rung(name=EXECUTEMANY, open=lambda: executemany, slow=True),
        Rung(name=UNNEST, open=lambda: unnest),
    ]
