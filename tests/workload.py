"""Loads for tests that write: requests as OTLP bytes, a writer on a database, and what the tables then say."""

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, WriterSettings
from otel_pg_exporter.model import RowBatch, Signal, Window
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.telemetry import Statistics
from otel_pg_exporter.transcode import compile_plan, transcode

_MAPPING = mapping.load()
_PLANS = {signal: compile_plan(_MAPPING, signal, Window()) for signal in Signal}


def span(number: int, *, trace: int = 1, **fields: Any) -> Span:  # noqa: ANN401 - protobuf's own
    """Return a span that started `number` microseconds before now; number 0 of a trace is its root."""
    start = fields.pop("start", time.time_ns() - number * 1000)
    made = Span(
        trace_id=trace.to_bytes(16, "big"),
        span_id=(number + 1).to_bytes(8, "big"),
        parent_span_id=b"" if number == 0 else (1).to_bytes(8, "big"),
        name=f"operation {number}",
        start_time_unix_nano=start,
        end_time_unix_nano=start + 1_000_000,
    )
    for key, value in fields.pop("attributes", {}).items():
        made.attributes.add(key=key).value.CopyFrom(_any(value))
    made.MergeFrom(Span(**fields))
    return made


def _any(value: object) -> AnyValue:
    return AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=str(value))


def record(body: str, **fields: Any) -> LogRecord:  # noqa: ANN401 - protobuf's own
    made = LogRecord(time_unix_nano=time.time_ns(), severity_number=SeverityNumber.SEVERITY_NUMBER_INFO, **fields)
    made.body.string_value = body
    return made


def trace_body(spans: Iterable[Span], *, service: str = "shop") -> bytes:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = service
    group.scope_spans.add().spans.extend(spans)
    return request.SerializeToString()


def log_body(records: Iterable[LogRecord], *, service: str = "shop") -> bytes:
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    group.resource.attributes.add(key="service.name").value.string_value = service
    group.scope_logs.add().log_records.extend(records)
    return request.SerializeToString()


def decoded(signal: Signal, body: bytes) -> RowBatch:
    return transcode(_PLANS[signal], body, now_ns=time.time_ns())


def traces(*spans: Span, service: str = "shop") -> RowBatch:
    return decoded(Signal.TRACES, trace_body(spans, service=service))


def logs(*records: LogRecord, service: str = "shop") -> RowBatch:
    return decoded(Signal.LOGS, log_body(records, service=service))


def shuffled(spans: Sequence[Span], seed: int) -> list[Span]:
    return random.Random(seed).sample(list(spans), len(spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """A migrated database, seen by a reader, and a writer on it."""

    dsn: str
    writer: Writer
    statistics: Statistics

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("SET search_path = otel")
            return connection.execute(query.encode(), parameters).fetchall()

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("SET search_path = otel")
            for statement in statements:
                connection.execute(statement.encode())

    def drop_views(self) -> None:
        """Drop all views, which else hold on to their columns."""
        for (name,) in self.rows("SELECT table_name FROM information_schema.views WHERE table_schema = 'otel'"):
            self.execute(f"DROP VIEW IF EXISTS {name} CASCADE")

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def assert_traces_exact(self) -> None:
        """Hold every row of `traces` against its spans."""
        assert (
            self.rows("(TABLE traces EXCEPT TABLE traces_exact) UNION ALL (TABLE traces_exact EXCEPT TABLE traces)")
            == []
        )


@contextlib.contextmanager
def database(
    dsn: str,
    *,
    read_dsn: str = "",
    method: str = "auto",
    settings: DatabaseSettings | None = None,
    size: int = 4,
    statistics: Statistics | None = None,
) -> Iterator[Database]:
    """Yield a writer on a migrated database, read through `read_dsn` (default: the same); close its connections."""
    statistics = statistics or Statistics()
    connections = Connections(replace(settings or DatabaseSettings(), dsn=dsn), size=size)
    writer = Writer(connections, _MAPPING, WriterSettings(write_method=method), statistics)  # type: ignore[arg-type] # tests pass plain words
    try:
        yield Database(dsn=read_dsn or dsn, writer=writer, statistics=statistics)
    finally:
        connections.close()
