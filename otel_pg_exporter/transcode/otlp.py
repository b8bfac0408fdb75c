"""Values back to OTLP: the cold path of the SDK exporters, for dead letters and for the spool.

The SDK's own OTLP encoder raises or drops an attribute where Python holds more than OTLP can, and leaves out the
sampled flag and a link's trace state. Nothing may get lost on the way, so here what OTLP can't
hold is replaced: lone surrogates by U+FFFD, integers beyond int64 by their digits, and a value that nests deeper
than protobuf allows by a string that says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from otel_pg_exporter.transcode.values import (
    BODY_LEVEL,
    EVENT_LEVEL,
    INT8_MAX,
    INT8_MIN,
    ITEM_LEVEL,
    RESOURCE_LEVEL,
    Event,
    Link,
    LogRecord,
    Resource,
    Scope,
    Span,
    nests_too_deep,
    repair_text,
    saturate,
    spell_integer,
)

_UINT32_MAX = 2**32 - 1


def export_request(resource: Resource, scope: Scope, items: Sequence[Span] | Sequence[LogRecord]) -> bytes:
    """Encode an export request with spans or log records of one scope.

    Such requests, one after the other, are a request with the items of all: protobuf concatenates repeated fields.
    """
    resource_url, scope_url = _text(resource.schema_url), _text(scope.schema_url)
    if isinstance(items[0], Span):
        spans = trace_pb2.ScopeSpans(scope=_scope(scope), schema_url=scope_url)
        spans.spans.extend(_span(cast("Span", span)) for span in items)
        resource_spans = trace_pb2.ResourceSpans(
            resource=_resource(resource), schema_url=resource_url, scope_spans=[spans]
        )
        return ExportTraceServiceRequest(resource_spans=[resource_spans]).SerializeToString()
    logs = logs_pb2.ScopeLogs(scope=_scope(scope), schema_url=scope_url)
    logs.log_records.extend(_log_record(cast("LogRecord", record)) for record in items)
    resource_logs = logs_pb2.ResourceLogs(resource=_resource(resource), schema_url=resource_url, scope_logs=[logs])
    return ExportLogsServiceRequest(resource_logs=[resource_logs]).SerializeToString()


def _resource(resource: Resource) -> resource_pb2.Resource:
    return resource_pb2.Resource(
        attributes=_pairs(resource.attributes, RESOURCE_LEVEL),
        dropped_attributes_count=_uint32(resource.dropped_attributes_count),
    )


def _scope(scope: Scope) -> common_pb2.InstrumentationScope:
    return common_pb2.InstrumentationScope(
        name=_text(scope.name),
        version=_text(scope.version),
        attributes=_pairs(scope.attributes, ITEM_LEVEL),
        dropped_attributes_count=_uint32(scope.dropped_attributes_count),
    )


def _span(span: Span) -> trace_pb2.Span:
    return trace_pb2.Span(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        trace_state=_text(span.trace_state),
        flags=_uint32(span.flags),
        name=_text(span.name),
        kind=cast("trace_pb2.Span.SpanKind.ValueType", span.kind),
        start_time_unix_nano=span.start,
        end_time_unix_nano=span.end,
        attributes=_pairs(span.attributes, ITEM_LEVEL),
        dropped_attributes_count=_uint32(span.dropped_attributes_count),
        events=[_event(event) for event in span.events],
        dropped_events_count=_uint32(span.dropped_events_count),
        links=[_link(link) for link in span.links],
        dropped_links_count=_uint32(span.dropped_links_count),
        status=trace_pb2.Status(
            message=_text(span.status_message),
            code=cast("trace_pb2.Status.StatusCode.ValueType", span.status_code),
        ),
    )


def _event(event: Event) -> trace_pb2.Span.Event:
    return trace_pb2.Span.Event(
        time_unix_nano=event.time,
        name=_text(event.name),
        attributes=_pairs(event.attributes, EVENT_LEVEL),
        dropped_attributes_count=_uint32(event.dropped_attributes_count),
    )


def _link(link: Link) -> trace_pb2.Span.Link:
    return trace_pb2.Span.Link(
        trace_id=link.trace_id,
        span_id=link.span_id,
        trace_state=_text(link.trace_state),
        attributes=_pairs(link.attributes, EVENT_LEVEL),
        dropped_attributes_count=_uint32(link.dropped_attributes_count),
        flags=_uint32(link.flags),
    )


def _log_record(record: LogRecord) -> logs_pb2.LogRecord:
    return logs_pb2.LogRecord(
        time_unix_nano=record.time,
        observed_time_unix_nano=record.observed_time,
        severity_number=cast("logs_pb2.SeverityNumber.ValueType", record.severity_number),
        severity_text=_text(record.severity_text),
        event_name=_text(record.event_name),
        body=None if record.body is None else _bounded_value(record.body, BODY_LEVEL),
        attributes=_pairs(record.attributes, ITEM_LEVEL),
        dropped_attributes_count=_uint32(record.dropped_attributes_count),
        flags=_uint32(record.flags),
        trace_id=record.trace_id,
        span_id=record.span_id,
    )


def _pairs(attributes: Mapping[str, Any], level: int) -> list[common_pb2.KeyValue]:
    return [
        common_pb2.KeyValue(key=_text(str(key)), value=_bounded_value(value, level))
        for key, value in attributes.items()
    ]


def _bounded_value(value: Any, level: int) -> common_pb2.AnyValue:  # noqa: ANN401 - a value tree
    return _value("(nested deeper than OTLP allows)" if nests_too_deep(value, level) else value)


def _value(value: Any) -> common_pb2.AnyValue:  # noqa: ANN401, PLR0911 - a value tree; one line a type
    match value:
        case None:
            return common_pb2.AnyValue()
        case bool():
            return common_pb2.AnyValue(bool_value=value)
        case str():
            return common_pb2.AnyValue(string_value=_text(value))
        case int():
            if INT8_MIN <= value <= INT8_MAX:
                return common_pb2.AnyValue(int_value=value)
            return common_pb2.AnyValue(string_value=spell_integer(value))
        case float():
            return common_pb2.AnyValue(double_value=value)
        case bytes():
            return common_pb2.AnyValue(bytes_value=value)
        case Mapping():
            pairs = [common_pb2.KeyValue(key=_text(str(key)), value=_value(inner)) for key, inner in value.items()]
            return common_pb2.AnyValue(kvlist_value=common_pb2.KeyValueList(values=pairs))
        case Sequence():
            values = [_value(element) for element in value]
            return common_pb2.AnyValue(array_value=common_pb2.ArrayValue(values=values))
        case _:
            return common_pb2.AnyValue(string_value=_text(str(value)))


def _text(text: str) -> str:
    """Return `text` as protobuf can hold it: NUL is fine here, lone surrogates are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return repair_text(text)
    return text


def _uint32(value: int) -> int:
    return saturate(value, 0, _UINT32_MAX)
