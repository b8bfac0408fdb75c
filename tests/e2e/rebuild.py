"""Rows back into OTLP: what the tables hold, as the messages that were sent.

Everything is compared one item at a time: a request with one resource, one scope and one item, whose lists of
attributes are sorted by key, since jsonb keeps no order of keys. The one thing that jsonb can't tell apart is a bytes
value from the base64 string that stands for it.
"""

import base64
import datetime as dt
from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, EntityRef, InstrumentationScope, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_pg_exporter.model import Anomaly

M = TypeVar("M", bound=Message)
Row = dict[str, Any]

SELECT = """
    SELECT i.*, r.attributes AS resource_attributes, r.dropped_attributes_count AS resource_dropped_attributes_count,
        r.entity_refs AS resource_entity_refs, r.schema_url AS resource_schema_url
    FROM otel.{table} AS i JOIN otel.resources AS r USING (resource_id)
"""

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


def sent_spans(request: ExportTraceServiceRequest) -> Iterator[ExportTraceServiceRequest]:
    """Take a request apart, one span each, as `span_request` rebuilds it."""
    for group in request.resource_spans:
        for part in group.scope_spans:
            for span in part.spans:
                alone = ExportTraceServiceRequest()
                target = alone.resource_spans.add(resource=group.resource, schema_url=group.schema_url)
                target.scope_spans.add(scope=part.scope, schema_url=part.schema_url).spans.append(span)
                target.scope_spans[0].spans[0].status.SetInParent()
                yield as_stored(alone)


def sent_logs(request: ExportLogsServiceRequest) -> Iterator[ExportLogsServiceRequest]:
    """Take a request apart, one log record each, as `log_request` rebuilds it."""
    for group in request.resource_logs:
        for part in group.scope_logs:
            for record in part.log_records:
                alone = ExportLogsServiceRequest()
                target = alone.resource_logs.add(resource=group.resource, schema_url=group.schema_url)
                target.scope_logs.add(scope=part.scope, schema_url=part.schema_url).log_records.append(record)
                target.scope_logs[0].log_records[0].body.SetInParent()
                yield as_stored(alone)


def as_stored(message: M) -> M:
    """Apply, in place, what jsonb does not keep."""
    if isinstance(message, AnyValue) and message.HasField("bytes_value"):
        message.string_value = base64.b64encode(message.bytes_value).decode()
    for field, value in message.ListFields():
        if field.message_type is None or _is_bytes_body(message, value):
            continue
        for each in value if field.is_repeated else [value]:
            as_stored(each)
        if field.is_repeated and field.message_type is KeyValue.DESCRIPTOR:
            value.sort(key=lambda pair: pair.key)
    return message


def _is_bytes_body(message: Message, value: object) -> bool:
    """Recognise the one bytes value that can be told from text: a body, which is JSON only when it is no text."""
    return isinstance(message, LogRecord) and isinstance(value, AnyValue) and value.HasField("bytes_value")


def span_request(row: Row) -> ExportTraceServiceRequest:
    """Rebuild the request that brought a row of `spans`."""
    start = _nanoseconds(row["start_time"], row["start_time_ns"])
    span = Span(
        trace_id=row["trace_id"].bytes,
        span_id=row["span_id"],
        trace_state=row["trace_state"],
        parent_span_id=row["parent_span_id"] or b"",
        flags=row["flags"],
        name=row["name"],
        kind=row["kind"],
        start_time_unix_nano=start,
        end_time_unix_nano=0 if row["end_time"] is None else start + row["duration_ns"],
        attributes=_pairs(row["attributes"]),
        dropped_attributes_count=row["dropped_attributes_count"],
        events=[
            Span.Event(**each | {"attributes": _pairs(each["attributes"])})  # its keys are OTLP's
            for each in row["events"] or ()
        ],
        dropped_events_count=row["dropped_events_count"],
        links=[
            Span.Link(
                **each
                | {
                    "trace_id": bytes.fromhex(each["trace_id"]),
                    "span_id": bytes.fromhex(each["span_id"]),
                    "attributes": _pairs(each["attributes"]),
                }
            )
            for each in row["links"] or ()
        ],
        dropped_links_count=row["dropped_links_count"],
        status=Status(code=row["status_code"], message=row["status_message"]),
    )
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add(resource=_resource(row), schema_url=row["resource_schema_url"])
    group.scope_spans.add(scope=_scope(row), schema_url=row["schema_url"], spans=[span])
    return request


def log_request(row: Row) -> ExportLogsServiceRequest:
    """Rebuild the request that brought a row of `logs`."""
    observed = row["observed_time"]
    record = LogRecord(
        time_unix_nano=_nanoseconds(row["time"], row["time_ns"]),
        observed_time_unix_nano=0 if observed is None else _nanoseconds(observed, row["observed_time_ns"]),
        severity_number=row["severity_number"],
        severity_text=row["severity_text"],
        body=_body(row),
        attributes=_pairs(row["attributes"]),
        dropped_attributes_count=row["dropped_attributes_count"],
        flags=row["flags"],
        trace_id=b"" if row["trace_id"] is None else row["trace_id"].bytes,
        span_id=row["span_id"] or b"",
        event_name=row["event_name"],
    )
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add(resource=_resource(row), schema_url=row["resource_schema_url"])
    group.scope_logs.add(scope=_scope(row), schema_url=row["schema_url"], log_records=[record])
    return request


def _resource(row: Row) -> Resource:
    return Resource(
        attributes=_pairs(row["resource_attributes"]),
        dropped_attributes_count=row["resource_dropped_attributes_count"],
        entity_refs=[EntityRef(**each) for each in row["resource_entity_refs"] or ()],
    )


def _scope(row: Row) -> InstrumentationScope:
    return InstrumentationScope(
        name=row["scope_name"],
        version=row["scope_version"],
        attributes=_pairs(row["scope_attributes"]),
        dropped_attributes_count=row["scope_dropped_attributes_count"],
    )


def _body(row: Row) -> AnyValue:
    if row["body"] is not None:
        return AnyValue(string_value=row["body"])
    if isinstance(row["body_json"], str):
        assert row["anomalies"] & Anomaly.BYTES_VALUE
        return AnyValue(bytes_value=base64.b64decode(row["body_json"]))
    return _any_value(row["body_json"])


def _pairs(stored: dict[str, Any] | None) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(value)) for key, value in sorted((stored or {}).items())]


def _any_value(stored: object) -> AnyValue:
    value = AnyValue()
    match stored:
        case bool():
            value.bool_value = stored
        case int():
            value.int_value = stored
        case float():
            value.double_value = stored
        case str():
            value.string_value = stored
        case list():
            value.array_value.values.extend(map(_any_value, stored))
            value.array_value.SetInParent()
        case dict():
            value.kvlist_value.values.extend(_pairs(stored))
            value.kvlist_value.SetInParent()
        case _:
            assert stored is None
    return value


def _nanoseconds(time: dt.datetime, rest: int) -> int:
    return (time - _EPOCH) // _MICROSECOND * 1000 + rest
