"""A whole span, a whole log record: every column by name."""

from datetime import UTC, datetime

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_WARN, LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_pg_exporter.model import Rejection, Signal
from otel_pg_exporter.transcode import transcode
from otel_pg_exporter.transcode.framing import ITEM_PATH
from otel_pg_exporter.transcode.protobuf_wire import nested
from tests.transcode.support import (
    NOW,
    SPAN_ID,
    TRACE_ID,
    columns,
    log_request,
    logs,
    plan,
    read,
    resource_row,
    row,
    span,
    trace_request,
    traces,
)

TIME = datetime(2025, 10, 9, 8, 53, 20, 123456, tzinfo=UTC)  # NOW without its last three digits
SECOND = 1_000_000_000
MINUTE = NOW // (60 * SECOND)


def text(key: str, value: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=value))


def number(key: str, value: int) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(int_value=value))


def full_request() -> ExportTraceServiceRequest:
    request = trace_request(
        Span(
            trace_id=TRACE_ID,
            span_id=SPAN_ID,
            parent_span_id=b"parentid",
            trace_state="a=b",
            flags=0xFFFFFFFF,
            name="GET /",
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=NOW,
            end_time_unix_nano=NOW + 1_500,
            attributes=[text("http.method", "GET"), number("gen_ai.usage.input_tokens", 12)],
            dropped_attributes_count=1,
            events=[Span.Event(time_unix_nano=NOW + 1, name="retry", attributes=[number("n", 2)])],
            dropped_events_count=2,
            links=[Span.Link(trace_id=TRACE_ID, span_id=SPAN_ID, trace_state="c=d", flags=1)],
            dropped_links_count=0xFFFFFFFF,
            status=Status(code=Status.STATUS_CODE_ERROR, message="boom"),
        )
    )
    group = request.resource_spans[0]
    group.schema_url = "https://resource"
    scope = group.scope_spans[0]
    scope.schema_url = "https://scope"
    scope.scope.name, scope.scope.version = "lib", "1.2"
    scope.scope.attributes.append(text("short", "s"))
    scope.scope.dropped_attributes_count = 5
    return request


def test_a_span_fills_every_column() -> None:
    batch = traces(full_request().SerializeToString())

    own = {name: value for name, value in row(batch).items() if not name.startswith("gen_ai_")}
    assert own == {
        "start_minute": MINUTE,
        "trace_id": TRACE_ID,
        "span_id": SPAN_ID,
        "start_time": TIME,
        "start_time_ns": 789,
        "end_time": TIME.replace(microsecond=123458),
        "duration_ns": 1_500,
        "parent_span_id": b"parentid",
        "name": "GET /",
        "kind": 2,
        "status_code": 2,
        "status_message": "boom",
        "service_name": "shop",
        "scope_name": "lib",
        "scope_version": "1.2",
        "scope_attributes": {"short": "s"},
        "scope_dropped_attributes_count": 5,
        "trace_state": "a=b",
        "flags": 0xFFFFFFFF,
        "attributes": {"http.method": "GET", "gen_ai.usage.input_tokens": 12},
        "dropped_attributes_count": 1,
        "events": [{"time_unix_nano": NOW + 1, "name": "retry", "attributes": {"n": 2}, "dropped_attributes_count": 0}],
        "dropped_events_count": 2,
        "links": [
            {
                "trace_id": TRACE_ID.hex(),
                "span_id": SPAN_ID.hex(),
                "trace_state": "c=d",
                "attributes": {},
                "dropped_attributes_count": 0,
                "flags": 1,
            }
        ],
        "dropped_links_count": 0xFFFFFFFF,
        "resource_id": batch.resource_ids[0],
        "schema_url": "https://scope",
        "anomalies": 0,
    }
    assert row(batch)["gen_ai_input_tokens"] == 12


def test_a_resource_is_stored_beside_its_spans() -> None:
    batch = traces(full_request().SerializeToString())

    assert resource_row(batch) == {
        "resource_id": batch.resource_ids[0],
        "service_name": "shop",
        "attributes": {"service.name": "shop"},
        "schema_url": "https://resource",
        "dropped_attributes_count": 0,
        "entity_refs": None,
    }
    assert list(batch.resources) == list(batch.resource_ids)


def test_a_span_carries_its_key_and_its_facts() -> None:
    batch = traces(full_request().SerializeToString())

    start_us = NOW // 1000 - 946_684_800_000_000
    assert batch.keys == [MINUTE.to_bytes(4, "big") + TRACE_ID + SPAN_ID + start_us.to_bytes(8, "big")]
    (facts,) = batch.facts
    assert facts._asdict() == {
        "trace_id": TRACE_ID,
        "span_id": SPAN_ID,
        "start": start_us,
        "end": start_us + 2,
        "error": True,
        "root": False,
        "name": "GET /",
        "service_name": "shop",
        "sums": (12, None, None, None, None),
    }
    assert batch.days == {NOW // (86_400 * SECOND)}


def test_a_bare_span_has_nulls_for_what_is_absent() -> None:
    batch = traces(trace_request(span()).SerializeToString())

    stored = row(batch)
    absent = {"end_time", "duration_ns", "parent_span_id", "scope_attributes", "attributes", "events", "links"}
    assert {name for name in absent if stored[name] is None} == absent
    assert batch.facts[0].root
    assert batch.facts[0].end == batch.facts[0].start
    assert batch.facts[0].sums == (None,) * 5


def test_a_log_record_fills_every_column() -> None:
    request = log_request(
        LogRecord(
            time_unix_nano=NOW,
            observed_time_unix_nano=NOW + 1_001,
            severity_number=SEVERITY_NUMBER_WARN,
            severity_text="WARN",
            event_name="cart.full",
            body=AnyValue(string_value="no room"),
            attributes=[number("items", 3)],
            dropped_attributes_count=4,
            flags=1,
            trace_id=TRACE_ID,
            span_id=SPAN_ID,
        )
    )
    batch = logs(request.SerializeToString())

    assert row(batch) == {
        "time_minute": MINUTE,
        "time": TIME,
        "time_ns": 789,
        "observed_time": TIME.replace(microsecond=123457),
        "observed_time_ns": 790,
        "severity_number": 13,
        "severity_text": "WARN",
        "event_name": "cart.full",
        "body": "no room",
        "body_json": None,
        "trace_id": TRACE_ID,
        "span_id": SPAN_ID,
        "flags": 1,
        "service_name": "shop",
        "scope_name": "",
        "scope_version": "",
        "scope_attributes": None,
        "scope_dropped_attributes_count": 0,
        "attributes": {"items": 3},
        "dropped_attributes_count": 4,
        "resource_id": batch.resource_ids[0],
        "schema_url": "",
        "anomalies": 0,
        "request_id": batch.request_id,
    }
    assert batch.keys == []
    assert batch.facts == []


def test_a_request_without_items_makes_an_empty_batch() -> None:
    request = ExportTraceServiceRequest()
    request.resource_spans.add().scope_spans.add()

    for body in (b"", request.SerializeToString()):
        batch = traces(body)
        assert batch.item_count == 0
        assert batch.resources == {}
        assert batch.days == frozenset()


def test_equal_bodies_have_equal_request_ids_within_their_signal_alone() -> None:
    body = trace_request(span()).SerializeToString()

    assert traces(body).request_id == transcode(plan(Signal.TRACES), body, now_ns=NOW + 1).request_id
    assert traces(body).request_id != traces(body + body).request_id
    assert traces(b"").request_id != logs(b"").request_id


def test_items_and_rows_run_in_parallel_around_a_refused_span() -> None:
    request = trace_request(span(name="a"), span(name="b", span_id=b""), span(name="c"))
    batch = traces(request.SerializeToString())

    assert [read(columns().spans, data)["name"] for data in batch.rows] == ["a", "c"]
    assert batch.items == [0, 2]
    assert [rejection.item for rejection in batch.rejected] == [1]
    assert len(batch.keys) == len(batch.facts) == len(batch.resource_ids) == 2


def test_a_one_item_request_makes_the_same_row() -> None:
    request = full_request()
    other = request.resource_spans.add()
    other.schema_url = "other"
    other.scope_spans.add().spans.append(span(name="second"))
    batch = traces(request.SerializeToString())

    for index in (0, 1):
        alone = traces(batch.otlp(index))
        assert alone.rows == [batch.rows[index]]
        assert alone.resources.items() <= batch.resources.items()


def test_a_refused_span_can_be_cut_out_of_its_request() -> None:
    batch = traces(trace_request(span(), span(span_id=b"short")).SerializeToString())

    assert ExportTraceServiceRequest.FromString(batch.otlp(1)) == trace_request(span(span_id=b"short"))


def test_size_covers_the_rows_and_the_body() -> None:
    body = trace_request(*[span() for _ in range(100)]).SerializeToString()
    batch = traces(body)

    assert batch.size > len(body) + sum(map(len, batch.rows))


def test_a_rejection_is_of_one_of_few_kinds() -> None:
    request = trace_request(
        span(trace_id=b""), span(span_id=bytes(8)), span(trace_id=b"short", span_id=b"")
    ).SerializeToString()
    undecodable = nested(ITEM_PATH, b"\x0a\xff")

    assert [rejection.kind for rejection in traces(request).rejected] == ["invalid_id"] * 3
    assert [rejection.kind for rejection in traces(undecodable).rejected] == ["not_decodable"]
    assert Rejection(item=0, reason="x", sqlstate="22P02").kind == "sqlstate_22"
