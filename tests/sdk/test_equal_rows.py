"""The same telemetry through the SDK objects, and through the OTLP encoder and the wire: equal rows."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, WriterSettings
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
from otel_pg_exporter.telemetry import Statistics
from otel_pg_exporter.transcode import compile_plan
from otel_pg_exporter.transcode.wire import transcode
from tests.proxy import proxy_for
from tests.sdk.conftest import Query
from tests.sdk.support import RESOURCE
from tests.support import wait_until

ATTRIBUTES: dict[str, Any] = {
    "text": "grüße, \N{SNOWMAN}",
    "nul": "a\0b",
    "flag": True,
    "number": -(2**63),
    "ratio": 0.1,
    "minus zero": -0.0,
    "odd": float("nan"),
    "texts": ["a", "b"],
    "numbers": [1, 2, 3],
    "empty": [],
    "bytes": b"\x00\xff",
    "gen_ai.usage.input_tokens": 12,
}


def ended_spans() -> Sequence[ReadableSpan]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(
        resource=RESOURCE, shutdown_on_exit=False, span_limits=SpanLimits(max_events=3, max_links=2)
    )
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("scope", "1", schema_url="https://example.org/scope", attributes={"s": [1, 2]})
    remote = SpanContext(
        trace_id=2**127 + 5,
        span_id=2**63 + 7,
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState([("vendor", "x"), ("other", "y")]),
    )
    for kind in SpanKind:
        span = tracer.start_span(
            f"{kind.name} span",
            context=trace.set_span_in_context(trace.NonRecordingSpan(remote)) if kind is SpanKind.SERVER else None,
            kind=kind,
            attributes=ATTRIBUTES,
            links=[Link(remote, {"n": number}) for number in range(4)] if kind is SpanKind.CONSUMER else [],
        )
        for number in range(5):
            span.add_event(f"event {number}", {"n": number, "odd": float("inf")}, timestamp=time.time_ns() + number)
        if kind is SpanKind.CLIENT:
            span.set_status(StatusCode.ERROR, "why")
        span.end()
    provider.get_tracer("").start_span("").end()
    return memory.get_finished_spans()


def emitted_records() -> Sequence[ReadableLogRecord]:
    memory = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # upstream's has no annotations
    provider = LoggerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(memory))
    logger = provider.get_logger("scope", "1", schema_url="https://example.org/scope", attributes={"s": "t"})
    now = time.time_ns()
    bodies: list[Any] = ["text", "", None, 1, 1.5, True, ["a", 1, None], {"k": {"deep": [1, {"x": None}]}}, b"\x01"]
    context = ended_spans()[0].context
    assert context is not None
    with trace.use_span(trace.NonRecordingSpan(context)):
        for number, body in enumerate(bodies):
            logger.emit(
                LogRecord(
                    timestamp=now + number,
                    observed_timestamp=now + 10 + number,
                    severity_number=SeverityNumber.ERROR3,
                    severity_text="bad",
                    body=body,
                    attributes=ATTRIBUTES | {"nested": {"a": [1, {"b": None}]}},
                    event_name="event" if number % 2 else None,
                )
            )
    logger.emit(LogRecord(observed_timestamp=now, body="no time, no severity"))
    logger.emit(LogRecord(timestamp=now, body="no observed time"))
    return list(memory.get_finished_logs())


def encoded(batch: Sequence[ReadableSpan]) -> bytes:
    """Encode spans as the SDK does, and add what its encoder leaves out: the trace flags, and links' trace state."""
    request = encode_spans(batch)
    flags = {context.span_id.to_bytes(8, "big"): context.trace_flags for span in batch if (context := span.context)}
    for scope_spans in request.resource_spans[0].scope_spans:
        for span in scope_spans.spans:
            span.flags |= flags[span.span_id]
            for link in span.links:
                link.flags |= TraceFlags.SAMPLED
                link.trace_state = "vendor=x,other=y"
    return request.SerializeToString()


def write_wire(dsn: str, signal: Signal, body: bytes) -> None:
    columns = mapping.load()
    connections = Connections(DatabaseSettings(dsn=dsn), size=1)
    writer = Writer(connections, columns, WriterSettings(), Statistics())
    batch = transcode(compile_plan(columns, signal, Window()), body, now_ns=time.time_ns())
    [outcome] = writer.write([batch], deadline=time.monotonic() + 60)
    assert outcome.rejected == 0, outcome
    connections.close()


def contents(query: Query, table: str) -> list[dict[str, Any]]:
    rows = query(f"SELECT to_jsonb(t) - 'ingested_at' - 'request_id' - 'last_seen' FROM {table} t")
    return sorted((row for (row,) in rows), key=str)


def test_spans_are_the_same_rows_both_ways(dsn: str, query: Query) -> None:
    batch = ended_spans()
    exporter = PostgresSpanExporter(dsn=dsn)
    assert exporter.export(batch) is SpanExportResult.SUCCESS
    exporter.shutdown()
    direct = [contents(query, table) for table in ("spans", "resources", "traces")]
    query("TRUNCATE spans, resources, traces, ingest_requests")
    write_wire(dsn, Signal.TRACES, encoded(batch))
    assert len(direct[0]) == len(batch)
    assert direct == [contents(query, table) for table in ("spans", "resources", "traces")]


def test_log_records_are_the_same_rows_both_ways(dsn: str, query: Query) -> None:
    batch = emitted_records()
    exporter = PostgresLogRecordExporter(dsn=dsn)
    exporter.export(batch)
    exporter.shutdown()
    direct = [contents(query, table) for table in ("logs", "resources")]
    query("TRUNCATE logs, resources, ingest_requests")
    write_wire(dsn, Signal.LOGS, encode_logs(batch).SerializeToString())
    assert len(direct[0]) == len(batch)
    assert direct == [contents(query, table) for table in ("logs", "resources")]


@pytest.mark.parametrize("signal", Signal)
def test_what_went_through_the_spool_is_the_same_rows(dsn: str, query: Query, tmp_path: Path, signal: Signal) -> None:
    exporter: Any = PostgresSpanExporter if signal is Signal.TRACES else PostgresLogRecordExporter
    batch = ended_spans() if signal is Signal.TRACES else emitted_records()
    tables = [signal.table, "resources", "traces"]
    direct = exporter(dsn=dsn)
    direct.export(batch)
    direct.shutdown()
    rows = [contents(query, table) for table in tables]
    query("TRUNCATE spans, logs, resources, traces, ingest_requests")
    with proxy_for(dsn) as proxy:
        proxy.refuse()
        spooling = exporter(dsn=proxy.dsn, timeout=0.3, spool_dir=tmp_path)
        spooling.export(batch)
        assert spooling.counts.in_spool == len(batch)
        proxy.up()
        wait_until(lambda: spooling.force_flush() and spooling.counts.in_spool == 0)
        spooling.shutdown()
    assert spooling.counts.stored == len(batch) == len(rows[0])
    assert [contents(query, table) for table in tables] == rows
