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
    SCALARS,
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
from otel_pg_exporter.transcode.weight import cut, weigh

V = TypeVar("V", bound=Span | LogRecord | Resource | Scope)

_FLAGS_HAS_IS_REMOTE = 0x100
_FLAGS_IS_REMOTE = 0x200
_UINT64_MAX = 2**64 - 1
_LIMITS = Limits()
_LIGHT = 16_384  # characters and values; with no more, no item can exceed the limits
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
            values = _resource(resource)
            _check_weight(values, _checked_size(values.attributes, RESOURCE_LEVEL))
            found = self._builder.resource(values)
            self._resources[id(resource)] = found
        return found


def _checked_scope(scope: InstrumentationScope | None) -> Scope:
    values = _scope(scope)
    _check_weight(values, _checked_size(values.attributes, ITEM_LEVEL))
    return values


def _checked_span(span: ReadableSpan) -> Span:
    values = _span(span)
    size = len(values.name) + len(values.status_message) + len(values.trace_state)
    size += _checked_size(values.attributes, ITEM_LEVEL)
    for event in values.events:
        size += len(event.name) + _checked_size(event.attributes, EVENT_LEVEL)
    for link in values.links:
        size += len(link.trace_state) + _checked_size(link.attributes, EVENT_LEVEL)
    _check_weight(values, size)
    return values


def _checked_log_record(readable: ReadableLogRecord) -> LogRecord:
    values = _log_record(readable)
    size = len(values.severity_text) + len(values.event_name)
    size += _checked_size(values.attributes, ITEM_LEVEL)
    size += _checked_size({"body": values.body}, BODY_LEVEL)
    _check_weight(values, size)
    return values


def _checked_size(attributes: Mapping[str, Any], level: int) -> int:
    """Return about how many characters and values there are. Raises _UnfitError for what nests too deep."""
    try:
        size = len("".join(attributes)) + len(attributes)
    except TypeError:  # keys of other types
        size = _LIGHT + 1
    for value in attributes.values():
        kind = type(value)
        if kind is str or kind is bytes:
            size += len(value)
        elif kind not in SCALARS:
            _check_nesting(attributes, level)
            return size + _LIGHT  # never mind how much more
    return size


def _check_nesting(attributes: Mapping[str, Any], level: int) -> None:
    for key, value in attributes.items():
        if nests_too_deep(value, level):
            raise _UnfitError(f"messages nest deeper than {MAX_LEVEL} levels in {key!r}")


def _check_weight(values: Span | LogRecord | Resource | Scope, size: int) -> None:
    if size > _LIGHT and (reason := weigh(values, _LIMITS)):
        raise _UnfitError(f"{reason} (what is kept of it is cut)")


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
        [_event(event) for event in span.events],
        span.dropped_events,
        [_link(link) for link in span.links],
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
    if not attributes:
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
    return value.to_bytes(max(size, (value.bit_length() + 7) // 8), "big")


def _time(value: int | None) -> int:
    return 0 if value is None else saturate(value, 0, _UINT64_MAX)


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
