# ruff: noqa: ANN401 - telemetry's values have any type
"""What the tests of `transcode` share: plans, sample requests, and rows read back into Python."""

import functools
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter import mapping
from otel_pg_exporter.model import Column, ColumnType, RowBatch, Signal, Table, Window
from otel_pg_exporter.transcode import Plan, compile_plan, transcode
from otel_pg_exporter.transcode.copy_format import split

NOW = 1_760_000_000_123_456_789
TRACE_ID = bytes(range(16))
SPAN_ID = bytes(range(1, 9))

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

Row = dict[str, Any]


@functools.cache
def columns() -> mapping.Mapping:
    return mapping.load()


@functools.cache
def plan(signal: Signal) -> Plan:
    return compile_plan(columns(), signal, Window())


def traces(body: bytes) -> RowBatch:
    return transcode(plan(Signal.TRACES), body, now_ns=NOW)


def logs(body: bytes) -> RowBatch:
    return transcode(plan(Signal.LOGS), body, now_ns=NOW)


def span(**fields: Any) -> Span:
    return Span(
        **{"trace_id": TRACE_ID, "span_id": SPAN_ID, "name": "work", "start_time_unix_nano": NOW - 1_000_000, **fields}
    )


def trace_request(*spans: Span) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "shop"
    group.scope_spans.add().spans.extend(spans)
    return request


def log_request(*records: LogRecord) -> ExportLogsServiceRequest:
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    group.resource.attributes.add(key="service.name").value.string_value = "shop"
    group.scope_logs.add().log_records.extend(records)
    return request


def nested(kvlists: int) -> AnyValue:
    """Return a value inside so many kvlists."""
    value = AnyValue()
    inner = value
    for _ in range(kvlists):
        inner = inner.kvlist_value.values.add(key="k").value
    inner.int_value = 7
    return value


def span_row(**fields: Any) -> Row:
    """Transcode one span and read its row back."""
    batch = traces(trace_request(span(**fields)).SerializeToString())
    assert not batch.rejected
    return row(batch)


def log_row(**fields: Any) -> Row:
    """Transcode one log record and read its row back."""
    batch = logs(log_request(LogRecord(**{"time_unix_nano": NOW, **fields})).SerializeToString())
    assert not batch.rejected
    return row(batch)


def row(batch: RowBatch, index: int = 0) -> Row:
    return read(columns().table(batch.signal), batch.rows[index])


def resource_row(batch: RowBatch) -> Row:
    (only,) = batch.resources.values()
    return read(columns().resources, only)


def read(table: Table, data: bytes) -> Row:
    contents = split(data)
    assert len(contents) == len(table.columns)
    return {column.name: _value(column, content) for column, content in zip(table.columns, contents, strict=True)}


def _value(column: Column, content: bytes | None) -> Any:  # noqa: PLR0911 - one line a type
    if content is None:
        return None
    match column.type:
        case ColumnType.BOOL:
            return struct.unpack(">?", content)[0]
        case ColumnType.INT2 | ColumnType.INT4 | ColumnType.INT8:
            assert len(content) == int(column.type[-1])
            return int.from_bytes(content, "big", signed=True)
        case ColumnType.FLOAT8:
            return struct.unpack(">d", content)[0]
        case ColumnType.JSONB:
            assert content[0] == 1
            return json.loads(content[1:].decode(), parse_constant=_no_constant)
        case ColumnType.TEXT:
            assert b"\0" not in content
            return content.decode()
        case ColumnType.TIMESTAMPTZ:
            return _EPOCH + timedelta(microseconds=int.from_bytes(content, "big", signed=True))
        case ColumnType.UUID:
            assert len(content) == 16
            return content
        case ColumnType.BYTEA:
            return content


def _no_constant(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
