"""OTLP bytes to rows: the reference implementation, over protobuf.

Extraction is kept plain: every message is read once, into the types of `values`, and all that has a meaning happens
behind that, in code that the SDK's reader shares. A small request is parsed at once, a larger one in pieces, with the
same result (see `limits`).
"""

import hashlib
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from otel_pg_exporter.model import Anomaly, Hold, RowBatch, Signal, unbounded
from otel_pg_exporter.transcode.framing import SCOPE_PATH, OneItemRequests, Run, check_frame, check_signal, items, split
from otel_pg_exporter.transcode.limits import DECODING, Limits
from otel_pg_exporter.transcode.plan import Plan
from otel_pg_exporter.transcode.protobuf_wire import nested
from otel_pg_exporter.transcode.rows import EncodedResource, RowBuilder, Shared
from otel_pg_exporter.transcode.salvage import PARTS, mend
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
LIMITS = Limits()


def transcode(
    plan: Plan,
    body: bytes,
    *,
    now_ns: int,
    request_id: bytes | None = None,
    hold: Hold = unbounded,
    limits: Limits = LIMITS,
) -> RowBatch:
    """Make rows of an OTLP export request.

    Unless it is given one, the request's id is the BLAKE2b-128 of the signal's name and the body: a client's retry
    has the same. The batch keeps `body` alive. Raises UndecodableError, TooLargeError, what `hold` raises, and nothing
    else whatever the body holds.
    """
    if request_id is None:
        request_id = identify(plan.signal, body)
    builder = RowBuilder(plan, request_id=request_id, now_ns=now_ns, hold=lambda size: hold(len(body) + size))
    if len(body) > limits.piece_bytes:
        check_frame(body, parts=limits.parts, piece_bytes=limits.piece_bytes)
        check_signal(plan.signal, body)
        _Pieces(builder, plan.signal, body, limits).read()
    else:
        check_signal(plan.signal, body)
        if not _read_whole(builder, plan.signal, body):
            check_frame(body, parts=limits.parts, piece_bytes=limits.piece_bytes)
            _Pieces(builder, plan.signal, body, limits).read()
    return builder.finish(otlp=OneItemRequests(body, hold), held=len(body))


def identify(signal: Signal, body: bytes) -> bytes:
    """Return a request's id, unless it comes with one."""
    identity = hashlib.blake2b(signal.value.encode(), digest_size=16)
    identity.update(body)
    return identity.digest()


def _read_whole(builder: RowBuilder, signal: Signal, body: bytes) -> bool:
    """Hand all items of a small request to the builder; say whether protobuf takes it as a whole."""
    schema = _SCHEMAS[signal]
    add = _adder(builder, signal)
    indices = count()
    with DECODING:
        try:
            request = schema.request.FromString(body)
        except DecodeError:
            return False
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
                    add(index, item, 0, shared)
    return True


def _adder(builder: RowBuilder, signal: Signal) -> Callable[[int, Any, int, Shared], None]:
    """Return what reads one item of a signal, repaired or not, and adds it to the builder."""
    if signal is Signal.TRACES:
        return lambda index, span, found, shared: builder.add_span(index, _span(span, found), shared)
    return lambda index, record, found, shared: builder.add_log(index, _log_record(record, found), shared)


class _ReadResource(NamedTuple):
    encoded: EncodedResource | None
    repaired: bool
    fault: str  # why its items are refused


class _ReadScope(NamedTuple):
    shared: Shared | None
    found: int  # what all its items are marked with
    fault: str  # why its items are refused


class _Pieces:
    """Reads a request piece by piece, and item by item where a piece does not parse."""

    def __init__(self, builder: RowBuilder, signal: Signal, body: bytes, limits: Limits) -> None:
        self._builder = builder
        self._schema = _SCHEMAS[signal]
        self._parts = PARTS[signal]
        self._add = _adder(builder, signal)
        self._body = body
        self._limits = limits
        self._index = 0

    def read(self) -> None:
        """Hand all items to the builder, which accepts or refuses them."""
        for frame in split(self._body, piece_bytes=self._limits.piece_bytes):
            resource = None
            for part in frame.scopes:
                scope = None
                for run in part.runs:
                    with DECODING:
                        if scope is None:
                            resource = resource or self._resource(frame.rest)
                            scope = self._scope(part.rest, resource)
                        self._run(run, scope)
                    self._builder.tell()  # not before the turn is over: it may wait

    def _resource(self, rest: bytes) -> _ReadResource:
        mended = mend(self._parts.resource, rest, self._limits)
        if mended.request is None:
            return _ReadResource(None, repaired=False, fault=f"its resource is {mended.fault}")
        group = getattr(mended.request, self._schema.resources)[0]
        encoded = self._builder.resource(_resource(group.resource, group.schema_url))
        return _ReadResource(encoded, mended.repaired, fault="")

    def _scope(self, rest: bytes, resource: _ReadResource) -> _ReadScope:
        mended = mend(self._parts.scope, rest, self._limits)
        if resource.encoded is None or mended.request is None:
            return _ReadScope(None, 0, resource.fault or f"its scope is {mended.fault}")
        part = self._scope_of(mended.request)
        shared = self._builder.share(resource.encoded, _scope(part.scope, part.schema_url))
        return _ReadScope(shared, Anomaly.INVALID_UTF8 if resource.repaired or mended.repaired else 0, fault="")

    def _run(self, run: Run, scope: _ReadScope) -> None:
        # Without room they are not even decoded: what grows so that it fills the room is what takes longest.
        full = None if scope.shared is None else self._builder.lack_of_room(scope.shared)
        if scope.shared is None or full:
            for _ in range(run.children):
                self._reject(full or scope.fault)
        elif run.children == 1 or not self._read_run(run, scope.shared, scope.found):
            for data in items(self._body, run):
                self._item(data, scope.shared, scope.found)

    def _read_run(self, run: Run, shared: Shared, found: int) -> bool:
        """Hand a run of items to the builder; say whether protobuf takes it as a whole."""
        piece = nested(SCOPE_PATH, memoryview(self._body)[run.start : run.end])
        try:
            request = self._schema.request.FromString(piece)
        except DecodeError:
            return False
        for item in getattr(self._scope_of(request), self._schema.items):
            self._add(self._index, item, found, shared)
            self._index += 1
        return True

    def _item(self, data: bytes, shared: Shared, found: int) -> None:
        mended = mend(self._parts.item, data, self._limits)
        if mended.request is None:
            self._reject(mended.fault)
            return
        (item,) = getattr(self._scope_of(mended.request), self._schema.items)
        self._add(self._index, item, Anomaly.INVALID_UTF8 if mended.repaired else found, shared)
        self._index += 1

    def _reject(self, reason: str) -> None:
        self._builder.reject(self._index, reason)
        self._index += 1

    def _scope_of(self, request: Message) -> Any:  # noqa: ANN401 - either signal's scope
        return getattr(getattr(request, self._schema.resources)[0], self._schema.scopes)[0]


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
    events = [_event(event, found) for event in span.events] if span.events else ()
    links = [_link(link, found) for link in span.links] if span.links else ()
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


def _event(event: trace_pb2.Span.Event, found: list[Anomaly]) -> Event:
    attributes = _attributes(event.attributes, found)
    return Event(event.time_unix_nano, event.name, attributes, event.dropped_attributes_count)


def _link(link: trace_pb2.Span.Link, found: list[Anomaly]) -> Link:
    attributes = _attributes(link.attributes, found)
    return Link(link.trace_id, link.span_id, link.trace_state, attributes, link.dropped_attributes_count, link.flags)


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
    result: dict[str, Any] = {}
    for pair in pairs:
        value = pair.value
        # Most are text or a number. Whatever a value is not reads as empty or 0, so that these need not be asked first.
        result[pair.key] = value.string_value or value.int_value or _value(value, found)
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
