"""OTLP bytes to rows: the reference implementation, over protobuf.

Extraction is kept plain: every message is read once, into the types of `values`, and all that has a meaning happens
behind that, in code that the SDK's reader shares.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from otel_pg_exporter.errors import UndecodableError
from otel_pg_exporter.model import Anomaly, Hold, RowBatch, Signal, unbounded
from otel_pg_exporter.transcode.plan import Plan
from otel_pg_exporter.transcode.rows import RowBuilder
from otel_pg_exporter.transcode.salvage import OneItemRequests, Salvaged, salvage
from otel_pg_exporter.transcode.values import EntityRef, Event, Link, LogRecord, Resource, Scope, Span, union


class _Schema(NamedTuple):
    """Where one signal's items lie in a request."""

    request: type[Message]
    resources: str
    scopes: str
    items: str


_SCHEMAS = {
    Signal.TRACES: _Schema(ExportTraceServiceRequest, "resource_spans", "scope_spans", "spans"),
    Signal.LOGS: _Schema(ExportLogsServiceRequest, "resource_logs", "scope_logs", "log_records"),
}


def transcode(
    plan: Plan, body: bytes, *, now_ns: int, request_id: bytes | None = None, hold: Hold = unbounded
) -> RowBatch:
    """Make rows of an OTLP export request.

    Unless it is given one, the request's id is the BLAKE2b-128 of the signal's name and the body: a client's retry
    has the same. The batch keeps `body` alive. Raises UndecodableError, what `hold` raises, and nothing else whatever
    the body holds.
    """
    schema = _SCHEMAS[plan.signal]
    if request_id is None:
        request_id = hashlib.blake2b(plan.signal.value.encode() + body, digest_size=16).digest()
    builder = RowBuilder(plan, request_id=request_id, now_ns=now_ns, hold=hold)
    request, salvaged = _parse(plan.signal, schema.request, body)
    if salvaged is None:
        _add(builder, plan.signal, request, count(), frozenset())
    else:
        for rejection in salvaged.rejected:
            builder.reject(rejection.item, rejection.reason)
        _add(builder, plan.signal, request, iter(salvaged.items), salvaged.repaired)
    return builder.finish(otlp=OneItemRequests(body), held=len(body))


def _parse(signal: Signal, request: type[Message], body: bytes) -> tuple[Message, Salvaged | None]:
    try:
        return request.FromString(body), None
    except DecodeError:
        salvaged = salvage(signal, body)
    try:
        return request.FromString(salvaged.body), salvaged
    except DecodeError as error:
        raise UndecodableError(f"the body of {len(body):,} bytes is not OTLP: {error}") from error


def _add(
    builder: RowBuilder, signal: Signal, request: Message, indices: Iterator[int], repaired: frozenset[int]
) -> None:
    """Hand all items to the builder; `indices` says which item of the original request each one is."""
    schema = _SCHEMAS[signal]
    read: Callable[[Any, int], Any] = _span if signal is Signal.TRACES else _log_record
    add: Callable[[int, Any, Any], None] = builder.add_span if signal is Signal.TRACES else builder.add_log
    for group in getattr(request, schema.resources):
        resource = None
        for part in getattr(group, schema.scopes):
            items = getattr(part, schema.items)
            if not items:
                continue
            if resource is None:
                resource = builder.resource(_resource(group.resource, group.schema_url))
            shared = builder.share(resource, _scope(part.scope, part.schema_url))
            for item, index in zip(items, indices, strict=False):
                add(index, read(item, Anomaly.INVALID_UTF8 if index in repaired else 0), shared)


def _resource(resource: resource_pb2.Resource, schema_url: str) -> Resource:
    found: list[Anomaly] = []
    attributes = _attributes(resource.attributes, found)
    references = [
        EntityRef(reference.schema_url, reference.type, list(reference.id_keys), list(reference.description_keys))
        for reference in resource.entity_refs
    ]
    return Resource(attributes, resource.dropped_attributes_count, references, schema_url, union(found))


def _scope(scope: common_pb2.InstrumentationScope, schema_url: str) -> Scope:
    found: list[Anomaly] = []
    attributes = _attributes(scope.attributes, found)
    return Scope(scope.name, scope.version, attributes, scope.dropped_attributes_count, schema_url, union(found))


def _span(span: trace_pb2.Span, anomalies: int) -> Span:
    found: list[Anomaly] = []
    attributes = _attributes(span.attributes, found)
    events = [
        Event(
            event.time_unix_nano,
            event.name,
            _attributes(event.attributes, found),
            event.dropped_attributes_count,
        )
        for event in span.events
    ]
    links = [
        Link(
            link.trace_id,
            link.span_id,
            link.trace_state,
            _attributes(link.attributes, found),
            link.dropped_attributes_count,
            link.flags,
        )
        for link in span.links
    ]
    status = span.status
    return Span(
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.trace_state,
        span.flags,
        span.name,
        span.kind,
        status.code,
        status.message,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        attributes,
        span.dropped_attributes_count,
        events,
        span.dropped_events_count,
        links,
        span.dropped_links_count,
        anomalies | union(found) if found else anomalies,
    )


def _log_record(record: logs_pb2.LogRecord, anomalies: int) -> LogRecord:
    found: list[Anomaly] = []
    attributes = _attributes(record.attributes, found)
    body = _value(record.body, found)
    return LogRecord(
        record.time_unix_nano,
        record.observed_time_unix_nano,
        record.severity_number,
        record.severity_text,
        record.event_name,
        body,
        attributes,
        record.dropped_attributes_count,
        record.flags,
        record.trace_id,
        record.span_id,
        anomalies | union(found) if found else anomalies,
    )


def _attributes(pairs: Any, found: list[Anomaly]) -> dict[str, Any]:  # noqa: ANN401 - protobuf's repeated field
    """Read a list of KeyValue; of equal keys the last wins."""
    result = {pair.key: _value(pair.value, found) for pair in pairs}
    if len(result) != len(pairs):
        found.append(Anomaly.DUPLICATE_KEY)
    return result


def _value(value: common_pb2.AnyValue, found: list[Anomaly]) -> Any:  # noqa: ANN401, PLR0911 - a value tree; one line a type
    """Read an AnyValue. One that is unset, or that only profiles may use, is None."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "int_value":
            return value.int_value
        case "bool_value":
            return value.bool_value
        case "double_value":
            return value.double_value
        case "array_value":
            return [_value(element, found) for element in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values, found)
        case "bytes_value":
            return value.bytes_value
        case _:
            return None
