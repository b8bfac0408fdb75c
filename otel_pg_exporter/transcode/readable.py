"""The SDK's own objects to rows, without protobuf: what `wire` makes of them after OTLP encoding, and a little more.

The SDK's OTLP encoder leaves out the low byte of `flags` (the sampled flag), a link's trace state and the dropped
counts of resource and scope. Here they keep their true values.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar, cast

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource as SdkResource
from opentelemetry.sdk.trace import Event as SdkEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SdkLink
from opentelemetry.trace import SpanContext

from otel_pg_exporter.model import RowBatch
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.plan import Plan
from otel_pg_exporter.transcode.rows import EncodedResource, RowBuilder, Shared
from otel_pg_exporter.transcode.values import (
    BODY_LEVEL,
    EVENT_LEVEL,
    ITEM_LEVEL,
    MAX_LEVEL,
    RESOURCE_LEVEL,
    SPAN_ID_BYTES,
    TRACE_ID_BYTES,
    Event,
    Link,
    LogRecord,
    Resource,
    Scope,
    Span,
    nests_too_deep,
    repair_text,
    saturate,
)
from otel_pg_exporter.transcode.weight import LIGHT, cut, rough_size, weigh

V = TypeVar("V", bound=Span | LogRecord | Resource | Scope)

_FLAGS_HAS_IS_REMOTE = 0x100
_FLAGS_IS_REMOTE = 0x200
_UINT64_MAX = 2**64 - 1
_LIMITS = Limits()
_TRANSACTION_BYTES = 32 * 2**20  # of rows; a single larger one still goes whole
_HELD_BYTES = 2_000  # what an item that waits for its commit holds in the SDK's objects, roughly


def transcode(
    plan: Plan, items: Sequence[ReadableSpan] | Sequence[ReadableLogRecord], *, request_id: bytes, now_ns: int
) -> RowBatch:
    """Make rows of the SDK's spans or log records: of the first ones, when all would be too much for one transaction.

    The batch's `item_count` says how many these are. It keeps `items` alive.
    """
    builder = RowBuilder(plan, request_id=request_id, now_ns=now_ns)
    surroundings = _Surroundings(builder)
    readables: Sequence[ReadableSpan | ReadableLogRecord] = items
    count = 0
    for index, item in enumerate(readables):
        if builder.row_bytes > _TRANSACTION_BYTES:
            break
        count += 1
        try:
            shared = surroundings.of(item)
            if isinstance(item, ReadableSpan):
                builder.add_span(index, _checked_span(item), shared)
            else:
                builder.add_log(index, _checked_log_record(item), shared)
        except Exception as error:  # noqa: BLE001 - an application's objects may raise anything; neighbours must not pay
            builder.reject(index, _unreadable(error))
    return builder.finish(otlp=lambda index: _one_item_request(items[index]), held=count * _HELD_BYTES)


def otlp_request(items: Sequence[ReadableSpan] | Sequence[ReadableLogRecord]) -> bytes:
    """Encode the SDK's spans or log records as one OTLP export request, in their order.

    What OTLP can't hold is replaced (see `otlp`); an item of which nothing can be read is there with the reason.
    """
    return b"".join([_group_request(list(group)) for _, group in groupby(items, _surroundings_of)])


def _surroundings_of(item: ReadableSpan | ReadableLogRecord) -> tuple[int, int]:
    return id(item.resource), id(item.instrumentation_scope)


def _group_request(items: Sequence[ReadableSpan | ReadableLogRecord]) -> bytes:
    try:
        return _request(items)
    except Exception:  # noqa: BLE001 - one of them is to blame, and the others must not pay
        return b"".join(map(_one_item_request, items))


class _UnfitError(ValueError):
    """A value that is readable, but cannot be stored: it nests deeper than protobuf allows, or weighs too much."""


class _Surroundings:
    """The resources and scopes of one batch, each encoded once. The SDK shares these objects between its items."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder
        self._resources: dict[int, EncodedResource] = {}
        self._shared: dict[tuple[int, int], Shared] = {}

    def of(self, item: ReadableSpan | ReadableLogRecord) -> Shared:
        """Return what the item has in common with its scope."""
        resource, scope = item.resource, item.instrumentation_scope
        # By identity: hashing a resource means serializing it. The items keep both alive.
        found = self._shared.get((id(resource), id(scope)))
        if found is None:
            found = self._builder.share(self._resource(resource), _checked_scope(scope))
            self._shared[id(resource), id(scope)] = found
        return found

    def _resource(self, resource: SdkResource) -> EncodedResource:
        found = self._resources.get(id(resource))
        if found is None:
            found = self._builder.resource(_checked_resource(resource))
            self._resources[id(resource)] = found
        return found


def _checked_resource(resource: SdkResource) -> Resource:
    values = _resource(resource)
    if rough_size(values.attributes, RESOURCE_LEVEL) > LIGHT:
        _check(values, [(values.attributes, RESOURCE_LEVEL)])
    return values


def _checked_scope(scope: InstrumentationScope | None) -> Scope:
    values = _scope(scope)
    if rough_size(values.attributes, ITEM_LEVEL) > LIGHT:
        _check(values, [(values.attributes, ITEM_LEVEL)])
    return values


def _checked_span(span: ReadableSpan) -> Span:
    values = _span(span)
    size = len(values.name) + len(values.status_message) + len(values.trace_state)
    size += rough_size(values.attributes, ITEM_LEVEL)
    for event in values.events:
        size += 1 + len(event.name) + rough_size(event.attributes, EVENT_LEVEL)
    for link in values.links:
        size += 1 + len(link.trace_state) + rough_size(link.attributes, EVENT_LEVEL)
    if size > LIGHT:
        events = [(event.attributes, EVENT_LEVEL) for event in values.events]
        links = [(link.attributes, EVENT_LEVEL) for link in values.links]
        _check(values, [(values.attributes, ITEM_LEVEL), *events, *links])
    return values


def _checked_log_record(readable: ReadableLogRecord) -> LogRecord:
    values = _log_record(readable)
    body = values.body
    size = len(values.severity_text) + len(values.event_name) + rough_size(values.attributes, ITEM_LEVEL)
    size += len(body) if type(body) is str else rough_size({"body": body}, BODY_LEVEL)
    if size > LIGHT:
        _check(values, [(values.attributes, ITEM_LEVEL), ({"body": body}, BODY_LEVEL)])
    return values


def _check(values: Span | LogRecord | Resource | Scope, trees: Sequence[tuple[Mapping[str, Any], int]]) -> None:
    """Look closer at what may be too much. `trees` are its attributes, and their level."""
    if reason := weigh(values, _LIMITS):  # first: what is left can be walked in no time
        raise _UnfitError(f"{reason} (what is kept of it is cut)")
    for attributes, level in trees:
        for key, value in attributes.items():
            if nests_too_deep(value, level):
                raise _UnfitError(f"messages nest deeper than {MAX_LEVEL} levels in {key!r}")


def _resource(resource: SdkResource) -> Resource:
    return Resource(
        _attributes(resource.attributes), _dropped(resource.attributes), (), _string(resource.schema_url), 0
    )


def _scope(scope: InstrumentationScope | None) -> Scope:
    if scope is None:
        return Scope("", "", {}, 0, "", 0)
    return Scope(
        _string(scope.name),
        _string(scope.version),
        _attributes(scope.attributes),
        _dropped(scope.attributes),
        _string(scope.schema_url),
        0,
    )


def _span(span: ReadableSpan) -> Span:
    context, parent, status = span.get_span_context(), span.parent, span.status
    events, links = span.events, span.links
    return Span(
        _id(context.trace_id, TRACE_ID_BYTES) if context else b"",
        _id(context.span_id, SPAN_ID_BYTES) if context else b"",
        b"" if parent is None else _id(parent.span_id, SPAN_ID_BYTES),
        _trace_state(context),
        _flags(context, parent),
        _string(span.name),
        span.kind.value + 1,
        status.status_code.value,
        _string(status.description),
        _time(span.start_time),
        _time(span.end_time),
        _attributes(span.attributes),
        span.dropped_attributes,
        [_event(event) for event in events] if events else (),
        span.dropped_events,
        [_link(link) for link in links] if links else (),
        span.dropped_links,
        0,
    )


def _event(event: SdkEvent) -> Event:
    return Event(_time(event.timestamp), _string(event.name), _attributes(event.attributes), event.dropped_attributes)


def _link(link: SdkLink) -> Link:
    context = link.context
    return Link(
        _id(context.trace_id, TRACE_ID_BYTES),
        _id(context.span_id, SPAN_ID_BYTES),
        _trace_state(context),
        _attributes(link.attributes),
        link.dropped_attributes,
        _flags(context, context),
    )


def _log_record(readable: ReadableLogRecord) -> LogRecord:
    record = readable.log_record
    severity = record.severity_number
    return LogRecord(
        _time(record.timestamp),
        _time(record.observed_timestamp),
        0 if severity is None else severity.value,
        _string(record.severity_text),
        _string(record.event_name),
        record.body,
        _attributes(record.attributes),
        readable.dropped_attributes,
        int(record.trace_flags or 0),
        _id(record.trace_id, TRACE_ID_BYTES) if record.trace_id else b"",
        _id(record.span_id, SPAN_ID_BYTES) if record.span_id else b"",
        0,
    )


def _attributes(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the attributes as a dict of our own."""
    if attributes is None:
        return {}
    # The SDK's BoundedAttributes copies its inner dict at once; dict() would go through its Python methods.
    copy = getattr(attributes, "copy", None)
    copied = attributes if copy is None else copy()
    return copied if isinstance(copied, dict) else dict(copied)


def _dropped(attributes: Mapping[str, Any] | None) -> int:
    return int(getattr(attributes, "dropped", 0))


def _string(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else str(value)


def _id(value: int, size: int) -> bytes:
    """Return an id's bytes: more than `size` where it is too large, so that it is refused as what it is."""
    try:
        return value.to_bytes(size, "big")
    except OverflowError:
        return value.to_bytes((value.bit_length() + 7) // 8, "big")


def _time(value: int | None) -> int:
    if value is None:
        return 0
    return value if 0 <= value <= _UINT64_MAX else saturate(value, 0, _UINT64_MAX)


def _trace_state(context: SpanContext | None) -> str:
    if context is None or not context.trace_state:
        return ""
    return ",".join([f"{key}={value}" for key, value in context.trace_state.items()])


def _flags(context: SpanContext | None, remote: SpanContext | None) -> int:
    flags = _FLAGS_HAS_IS_REMOTE if context is None else _FLAGS_HAS_IS_REMOTE | context.trace_flags
    return flags | _FLAGS_IS_REMOTE if remote is not None and remote.is_remote else flags


def _one_item_request(item: ReadableSpan | ReadableLogRecord) -> bytes:
    try:
        return _request([item])
    except Exception as error:  # noqa: BLE001 - see transcode; what is kept then holds at least the reason
        return _placeholder(item, _unreadable(error))


def _request(items: Sequence[ReadableSpan | ReadableLogRecord]) -> bytes:
    # Needs protobuf, which the hot path does without.
    from otel_pg_exporter.transcode.otlp import export_request

    values: Any = [_fitting(_span(item) if isinstance(item, ReadableSpan) else _log_record(item)) for item in items]
    first = items[0]
    return export_request(_fitting(_resource(first.resource)), _fitting(_scope(first.instrumentation_scope)), values)


def _fitting(values: V) -> V:
    return cast("V", cut(values)) if weigh(values, _LIMITS) else values


def _placeholder(item: ReadableSpan | ReadableLogRecord, text: str) -> bytes:
    from otel_pg_exporter.transcode.otlp import export_request

    values: Any = LogRecord(0, 0, 0, "", "", text, {}, 0, 0, b"", b"", 0)
    if isinstance(item, ReadableSpan):
        values = Span(b"", b"", b"", "", 0, text, 0, 0, "", 0, 0, {}, 0, (), 0, (), 0, 0)
    return export_request(Resource({}, 0, (), "", 0), _scope(None), [values])


def _unreadable(error: Exception) -> str:
    if isinstance(error, _UnfitError):
        return repair_text(str(error))
    return repair_text(f"not readable: {type(error).__name__}: {error}")
