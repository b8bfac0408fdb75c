"""Fields: one message's values, encoded in the order of `mapping.FIELDS`.

Each function returns the encoded fields and the repairs they took. `anomalies`, the last field of a span and of a
log record, is left to the caller, who alone knows all repairs.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from otel_pg_exporter.model import Anomaly
from otel_pg_exporter.transcode.copy_format import (
    EMPTY_TEXT,
    NULL,
    bytea_field,
    int2_field,
    int4_field,
    int8_field,
    jsonb_field,
    text_field,
)
from otel_pg_exporter.transcode.plan import Fields, Fitted
from otel_pg_exporter.transcode.values import (
    INT2_MAX,
    INT2_MIN,
    INT8_MAX,
    INT8_MIN,
    NS_PER_MINUTE,
    SPAN_ID_BYTES,
    TRACE_ID_BYTES,
    Event,
    Link,
    LogRecord,
    Resource,
    Scope,
    Span,
    encode_json,
    pg_time,
    repair_text,
    saturate,
)

_ZERO = int8_field(0)
_KNOWN_TEXT = 256  # characters of a description that is kept: all that are kept take 1 MB at most
_CANONICAL_V1 = b"otel-pg-exporter resource 1\n"


def span_fields(span: Span) -> tuple[Fields, int]:
    """Encode a span, whose ids are known to be valid."""
    start, trace_state, name, message = span.start, span.trace_state, span.name, span.status_message
    describe = _known_description if len(trace_state) + len(name) + len(message) <= _KNOWN_TEXT else _description
    description, found = describe(trace_state, span.flags, name, span.kind, span.status_code, message)
    parent, bits = _parent(span.parent_span_id)
    found |= bits
    end_time, duration, bits = _end(start, span.end)
    found |= bits
    attributes, bits = _object(span.attributes)
    found |= bits
    events, bits = _array([_event(event) for event in span.events]) if span.events else (NULL, 0)
    found |= bits
    links, bits = _links(span.links) if span.links else (NULL, 0)
    found |= bits
    return (
        bytea_field(span.trace_id),
        bytea_field(span.span_id),
        parent,
        *description,
        int4_field(start // NS_PER_MINUTE),
        int8_field(pg_time(start)),
        int2_field(start % 1000),
        end_time,
        duration,
        attributes,
        _count(span.dropped_attributes_count),
        events,
        _count(span.dropped_events_count),
        links,
        _count(span.dropped_links_count),
    ), found


def log_fields(record: LogRecord, time: int) -> tuple[Fields, int]:
    """Encode a log record; `time` is its own, or what takes its place."""
    severity_number, found = _enum(record.severity_number)
    severity_text, bits = _text(record.severity_text)
    found |= bits
    event_name, bits = _text(record.event_name)
    found |= bits
    body_text, body_json, bits = _body(record.body)
    found |= bits
    attributes, bits = _object(record.attributes)
    found |= bits
    trace_id, bits = _optional_id(record.trace_id, TRACE_ID_BYTES)
    found |= bits
    span_id, bits = _optional_id(record.span_id, SPAN_ID_BYTES)
    found |= bits
    observed = record.observed_time
    return (
        int4_field(time // NS_PER_MINUTE),
        int8_field(pg_time(time)),
        int2_field(time % 1000),
        int8_field(pg_time(observed)) if observed else NULL,
        int2_field(observed % 1000) if observed else NULL,
        severity_number,
        severity_text,
        event_name,
        body_text,
        body_json,
        trace_id,
        span_id,
        int8_field(record.flags),
        attributes,
        _count(record.dropped_attributes_count),
    ), found


def scope_fields(scope: Scope) -> tuple[Fields, int]:
    """Encode an instrumentation scope."""
    name, found = _text(scope.name)
    version, bits = _text(scope.version)
    found |= bits
    attributes, bits = _object(scope.attributes)
    found |= bits
    schema_url, bits = _text(scope.schema_url)
    found |= bits
    return (name, version, attributes, _count(scope.dropped_attributes_count), schema_url), found


def resource_fields(resource: Resource) -> tuple[Fields, int]:
    """Encode a resource.

    The id is the BLAKE2b-128 of the line `otel-pg-exporter resource 1` and the JSON object of the keys attributes,
    dropped_attributes_count, entity_refs and schema_url: keys sorted by code point at every level, no blanks, text
    as UTF-8, doubles in their shortest form as Python spells them, all values after their normalisations.
    """
    entity_refs = [reference._asdict() for reference in resource.entity_refs]
    attributes, found = _object(resource.attributes)
    references, bits = _array(entity_refs)
    found |= bits
    schema_url, bits = _text(resource.schema_url)
    found |= bits
    canonical, _ = encode_json(
        {
            "attributes": resource.attributes,
            "dropped_attributes_count": resource.dropped_attributes_count,
            "entity_refs": entity_refs,
            "schema_url": resource.schema_url,
        },
        sort_keys=True,
    )
    identity = hashlib.blake2b(_CANONICAL_V1 + canonical, digest_size=16).digest()
    dropped = _count(resource.dropped_attributes_count)
    return (bytea_field(identity), attributes, dropped, references, schema_url), found


def _description(  # noqa: PLR0917 - by value, so that equal ones are found again
    trace_state: str, flags: int, name: str, kind: int, status_code: int, status_message: str
) -> tuple[Fields, int]:
    """Encode what the spans of one operation have alike."""
    trace_state_field, found = _text(trace_state)
    name_field, bits = _text(name)
    found |= bits
    kind_field, bits = _enum(kind)
    found |= bits
    status_code_field, bits = _enum(status_code)
    found |= bits
    status_message_field, bits = _text(status_message)
    found |= bits
    return (
        trace_state_field,
        int8_field(flags),
        name_field,
        kind_field,
        status_code_field,
        status_message_field,
    ), found


_known_description = functools.lru_cache(maxsize=256)(_description)


def _text(value: str) -> Fitted:
    if not value:
        return EMPTY_TEXT, 0
    text = repair_text(value)
    return text_field(text), 0 if text is value else Anomaly.TEXT_REPAIRED


def _count(value: int) -> bytes:
    return int8_field(value) if value else _ZERO


def _enum(value: int) -> Fitted:
    if INT2_MIN <= value <= INT2_MAX:
        return int2_field(value), 0
    return int2_field(saturate(value, INT2_MIN, INT2_MAX)), Anomaly.ENUM_SATURATED


def _object(tree: Mapping[str, Any]) -> Fitted:
    if not tree:
        return NULL, 0
    document, found = encode_json(tree)
    return jsonb_field(document), found


def _array(elements: list[dict[str, Any]]) -> Fitted:
    if not elements:
        return NULL, 0
    document, found = encode_json(elements)
    return jsonb_field(document), found


def _body(body: Any) -> tuple[bytes, bytes, int]:  # noqa: ANN401 - a value tree
    if body is None:
        return NULL, NULL, 0
    if isinstance(body, str):
        text, found = _text(body)
        return text, NULL, found
    document, found = encode_json(body)
    return NULL, jsonb_field(document), found


def _parent(parent_span_id: bytes) -> Fitted:
    if not parent_span_id:
        return NULL, 0
    if not any(parent_span_id):
        return NULL, Anomaly.INVALID_ID
    return bytea_field(parent_span_id), 0 if len(parent_span_id) == SPAN_ID_BYTES else Anomaly.INVALID_ID


def _optional_id(identity: bytes, size: int) -> Fitted:
    if not identity:
        return NULL, 0
    if len(identity) != size or not any(identity):
        return NULL, Anomaly.INVALID_ID
    return bytea_field(identity), 0


def _end(start: int, end: int) -> tuple[bytes, bytes, int]:
    """Encode end time and duration; both are NULL for a span whose sender left the end at 0."""
    if not end:
        return NULL, NULL, 0
    duration = end - start
    saturated = saturate(duration, INT8_MIN, INT8_MAX)
    return (
        int8_field(pg_time(end)),
        int8_field(saturated),
        0 if saturated == duration else Anomaly.DURATION_SATURATED,
    )


def _event(event: Event) -> dict[str, Any]:
    return {
        "time_unix_nano": event.time,
        "name": event.name,
        "attributes": event.attributes,
        "dropped_attributes_count": event.dropped_attributes_count,
    }


def _links(links: Sequence[Link]) -> Fitted:
    field, found = _array([_link(link) for link in links])
    for link in links:
        if (
            _optional_id(link.trace_id, TRACE_ID_BYTES)[0] == NULL
            or _optional_id(link.span_id, SPAN_ID_BYTES)[0] == NULL
        ):
            found |= Anomaly.INVALID_ID
    return field, found


def _link(link: Link) -> dict[str, Any]:
    return {
        "trace_id": link.trace_id.hex(),
        "span_id": link.span_id.hex(),
        "trace_state": link.trace_state,
        "attributes": link.attributes,
        "dropped_attributes_count": link.dropped_attributes_count,
        "flags": link.flags,
    }
