"""Made-up telemetry: OTLP requests, and the same rows in every shape that a write method wants.

A span carries ten attributes of all types and takes about 1 KB of OTLP; ten spans make a trace, over four services.
Requests hold at most 512 items, the SDK's default, so a larger batch is several requests, as the receiver's batcher
merges them. Everything comes from a seeded generator: two runs write the same rows.
"""

import functools
import random
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO, LogRecord
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from psycopg.types.json import Jsonb

from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import ColumnType, RowBatch, Signal, Table, Window
from otel_pg_exporter.postgres.statements import copy_data
from otel_pg_exporter.transcode import Plan, compile_plan, transcode
from otel_pg_exporter.transcode.copy_format import split

REQUEST_ITEMS = 512
SPANS_PER_TRACE = 10
BAD_NAME = "bad"  # the name of a span, or the body of a log record, that a constraint of the benchmark refuses

_SERVICES = ("frontend", "checkout", "payment", "inventory")
_PG_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36"
_STATEMENT = (
    "SELECT o.id, o.customer_id, o.status, o.total, o.created_at FROM orders AS o JOIN order_lines AS l ON"
    " l.order_id = o.id LEFT JOIN shipments AS s ON s.order_id = o.id WHERE o.customer_id = $1 AND o.created_at > $2"
    " AND (s.delivered_at IS NULL OR s.delivered_at > $3) ORDER BY o.created_at DESC LIMIT 50"
)


@dataclass(frozen=True)
class Batch:
    """What one transaction writes."""

    table: Table
    rows: Sequence[bytes]  # binary COPY tuples
    requests: tuple[RowBatch, ...] = ()  # that the rows come from
    bodies: tuple[bytes, ...] = ()  # the same in OTLP

    @functools.cached_property
    def buffer(self) -> bytes:
        """One stream of binary COPY."""
        return b"".join(copy_data(self.rows, range(len(self.rows))))

    @functools.cached_property
    def values(self) -> list[tuple[Any, ...]]:
        """Rows of Python values, as psycopg's own dumpers take them."""
        readers = [_READERS[column.type] for column in self.table.columns]
        return [
            tuple(None if content is None else read(content) for read, content in zip(readers, split(row), strict=True))
            for row in self.rows
        ]


class Workload:
    """Makes batches, each of rows that no other batch has."""

    def __init__(self, mapping: Mapping, *, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._plans = {signal: compile_plan(mapping, signal, Window()) for signal in Signal}
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self.day = int(midnight.timestamp()) // 86_400  # since 1970: all rows lie in one partition
        self._time = int(midnight.timestamp()) * 10**9 + 3600 * 10**9
        self._now = time.time_ns()

    def plan(self, signal: Signal) -> Plan:
        """Return the compiled mapping."""
        return self._plans[signal]

    def batch(
        self, signal: Signal, rows: int, *, new_resource: bool = True, bad: AbstractSet[int] = frozenset()
    ) -> Batch:
        """Make a batch; with `new_resource` a resource is in it that no batch had before.

        `bad` are positions of rows that the benchmark's constraint refuses.
        """
        bodies = tuple(self._bodies(signal, rows, new_resource=new_resource, bad=bad))
        plan = self._plans[signal]
        requests = tuple(transcode(plan, body, now_ns=self._now) for body in bodies)
        tuples = [row for request in requests for row in request.rows]
        return Batch(table=plan.table, rows=tuples, requests=requests, bodies=bodies)

    def _bodies(self, signal: Signal, rows: int, *, new_resource: bool, bad: AbstractSet[int]) -> Iterator[bytes]:
        make = self._span_request if signal is Signal.TRACES else self._log_request
        instance = self._random.randbytes(8).hex() if new_resource else ""
        for first in range(0, rows, REQUEST_ITEMS):
            count = min(REQUEST_ITEMS, rows - first)
            here = {position - first for position in bad if first <= position < first + count}
            yield make(count, instance, here).SerializeToString()

    def _span_request(self, count: int, instance: str, bad: AbstractSet[int]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest()
        scopes = []
        for service in _SERVICES[:count]:
            group = request.resource_spans.add(resource=_resource(service, instance))
            scopes.append(group.scope_spans.add())
            scopes[-1].scope.name = "opentelemetry.instrumentation.asgi"
            scopes[-1].scope.version = "0.60b0"
        # Filled service by service, since that is the order in which the transcoder counts positions.
        trace_ids = [self._random.randbytes(16) for _ in range(0, count, SPANS_PER_TRACE)]
        root_ids = [self._random.randbytes(8) for _ in trace_ids]
        for position in range(count):
            scope = scopes[position * len(scopes) // count]
            trace = position % len(trace_ids)
            span = scope.spans.add()
            self._fill_span(span, trace_ids[trace], root_ids[trace], root=position < len(trace_ids))
            if position in bad:
                span.name = BAD_NAME
        return request

    def _fill_span(self, span: Span, trace_id: bytes, root_id: bytes, *, root: bool) -> None:
        chance = self._random
        self._time += 20_000  # 50,000 spans a second
        span.CopyFrom(_SPAN)
        span.trace_id = trace_id
        span.span_id = root_id if root else chance.randbytes(8)
        span.parent_span_id = b"" if root else root_id
        span.start_time_unix_nano = self._time + chance.randrange(10**6)
        span.end_time_unix_nano = span.start_time_unix_nano + chance.randrange(10**8)
        path = f"/api/v1/customers/{chance.randrange(10**6)}/orders/{chance.randrange(10**9)}"
        span.attributes.append(_pair("url.full", f"https://shop.example.com{path}?page={chance.randrange(100)}"))
        span.attributes.append(_pair("app.customer.id", chance.randrange(10**9)))
        span.attributes.append(_pair("app.score", chance.random()))
        if chance.random() < 0.02:  # noqa: PLR2004 - one span in fifty fails
            span.status.code = Status.STATUS_CODE_ERROR
            span.status.message = "upstream request timeout"
            event = span.events.add(time_unix_nano=span.end_time_unix_nano, name="exception")
            event.attributes.append(_pair("exception.type", "TimeoutError"))
            event.attributes.append(_pair("exception.message", "the payment service did not answer within 2.0 s"))

    def _log_request(self, count: int, instance: str, bad: AbstractSet[int]) -> ExportLogsServiceRequest:
        request = ExportLogsServiceRequest()
        scopes = []
        for service in _SERVICES[:count]:
            group = request.resource_logs.add(resource=_resource(service, instance))
            scopes.append(group.scope_logs.add())
            scopes[-1].scope.name = "shop.orders"
        for position in range(count):
            record = scopes[position * len(scopes) // count].log_records.add()
            self._fill_log_record(record)
            if position in bad:
                record.body.string_value = BAD_NAME
        return request

    def _fill_log_record(self, record: LogRecord) -> None:
        chance = self._random
        self._time += 20_000
        record.CopyFrom(_LOG_RECORD)
        record.time_unix_nano = self._time + chance.randrange(10**6)
        record.observed_time_unix_nano = record.time_unix_nano + 1000
        record.body.string_value = (
            f"order {chance.randrange(10**9)} of customer {chance.randrange(10**6)} was accepted with"
            f" {chance.randrange(20)} lines; payment {chance.randbytes(8).hex()} is pending since the provider asked"
            " for a second factor, and the stock is reserved for the next fifteen minutes"
        )
        record.trace_id = chance.randbytes(16)
        record.span_id = chance.randbytes(8)
        record.attributes.append(_pair("app.customer.id", chance.randrange(10**9)))


def _pair(key: str, value: str | float | list[str]) -> KeyValue:
    pair = KeyValue(key=key)
    match value:
        case bool():
            pair.value.bool_value = value
        case int():
            pair.value.int_value = value
        case float():
            pair.value.double_value = value
        case str():
            pair.value.string_value = value
        case list():
            for element in value:
                pair.value.array_value.values.add(string_value=element)
    return pair


# The seven attributes that are alike in every span; three more vary.
FIXED_ATTRIBUTES: dict[str, str | int | float | bool | list[str]] = {
    "http.request.method": "GET",
    "http.response.status_code": 200,
    "user_agent.original": _AGENT,
    "db.query.text": _STATEMENT,
    "app.cached": False,
    "app.duration_ratio": 0.375,
    "http.request.header.accept": ["text/html", "application/xhtml+xml", "application/xml;q=0.9", "*/*;q=0.8"],
}

_SPAN = Span(
    name="GET /api/v1/customers/{id}/orders/{order}",
    kind=Span.SPAN_KIND_SERVER,
    flags=0x101,
    trace_state="congo=t61rcWkgMzE",
    attributes=[_pair(key, value) for key, value in FIXED_ATTRIBUTES.items()],
)
_LOG_RECORD = LogRecord(
    severity_number=SEVERITY_NUMBER_INFO,
    severity_text="INFO",
    flags=1,
    attributes=[
        _pair("code.file.path", "/srv/shop/orders/service.py"),
        _pair("code.function.name", "shop.orders.service.accept"),
        _pair("code.line.number", 217),
        _pair("thread.name", "worker-3"),
        _pair("app.retry", False),
    ],
)


def _resource(service: str, instance: str) -> Resource:
    new = [_pair("service.instance.id", instance)] if instance and service == _SERVICES[0] else []
    return Resource(
        attributes=[
            _pair("service.name", service),
            _pair("service.version", "2.14.0"),
            _pair("deployment.environment.name", "production"),
            _pair("k8s.pod.name", f"{service}-5d7cbf79b4-x2x7k"),
            _pair("telemetry.sdk.language", "python"),
            *new,
        ]
    )


def _time(content: bytes) -> datetime:
    return _PG_EPOCH + timedelta(microseconds=int.from_bytes(content, "big", signed=True))


def _integer(content: bytes) -> int:
    return int.from_bytes(content, "big", signed=True)


def _double(content: bytes) -> float:
    value: float = struct.unpack(">d", content)[0]
    return value


def _json(content: bytes) -> Jsonb:
    # JSON that is ready, as it is in our rows: the ladder compares ways into a table, not JSON encoders.
    return Jsonb(content[1:].decode(), dumps=str)


_READERS: dict[ColumnType, Callable[[bytes], Any]] = {
    ColumnType.BOOL: any,
    ColumnType.BYTEA: bytes,
    ColumnType.FLOAT8: _double,
    ColumnType.INT2: _integer,
    ColumnType.INT4: _integer,
    ColumnType.INT8: _integer,
    ColumnType.JSONB: _json,
    ColumnType.TEXT: bytes.decode,
    ColumnType.TIMESTAMPTZ: _time,
    ColumnType.UUID: lambda content: uuid.UUID(bytes=content),
}
