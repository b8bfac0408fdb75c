# ruff: noqa: ANN401 - telemetry's values have any type
"""Odd, broken and extreme values: what arrives, and which bit says so."""

import base64
from typing import Any

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter.model import Anomaly
from otel_pg_exporter.transcode import rows
from tests.transcode.support import (
    NOW,
    SPAN_ID,
    TRACE_ID,
    log_request,
    log_row,
    logs,
    resource_row,
    row,
    span,
    span_row,
    trace_request,
    traces,
)

NONE = Anomaly(0)


def pair(key: str, **value: Any) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))


def kvlist(*pairs: KeyValue) -> KeyValueList:
    return KeyValueList(values=pairs)


ATTRIBUTE_VALUES = [
    pytest.param(AnyValue(string_value="a\0b"), "a\ufffdb", Anomaly.TEXT_REPAIRED, id="NUL"),
    pytest.param(AnyValue(string_value="\\u0000"), "\\u0000", NONE, id="the text of a NUL escape"),
    pytest.param(AnyValue(string_value="\U0001f600\ud7ff\uffff"), "\U0001f600\ud7ff\uffff", NONE, id="Unicode"),
    pytest.param(AnyValue(string_value="\x01\x1f\x7f"), "\x01\x1f\x7f", NONE, id="control characters"),
    pytest.param(AnyValue(double_value=float("nan")), "NaN", Anomaly.NON_FINITE, id="NaN"),
    pytest.param(AnyValue(double_value=float("inf")), "Infinity", Anomaly.NON_FINITE, id="infinity"),
    pytest.param(AnyValue(double_value=float("-inf")), "-Infinity", Anomaly.NON_FINITE, id="-infinity"),
    pytest.param(AnyValue(double_value=5e-324), 5e-324, NONE, id="smallest double"),
    pytest.param(AnyValue(double_value=1.7976931348623157e308), 1.7976931348623157e308, NONE, id="greatest double"),
    pytest.param(AnyValue(int_value=-(2**63)), -(2**63), NONE, id="smallest int64"),
    pytest.param(AnyValue(int_value=2**63 - 1), 2**63 - 1, NONE, id="greatest int64"),
    pytest.param(AnyValue(bytes_value=b"\xff\0"), "/wA=", Anomaly.BYTES_VALUE, id="bytes"),
    pytest.param(AnyValue(bytes_value=b""), "", Anomaly.BYTES_VALUE, id="no bytes"),
    pytest.param(AnyValue(), None, NONE, id="unset"),
    pytest.param(AnyValue(string_value_strindex=3), None, NONE, id="index into a profile's strings"),
    pytest.param(AnyValue(array_value=ArrayValue()), [], NONE, id="empty array"),
    pytest.param(AnyValue(kvlist_value=kvlist()), {}, NONE, id="empty kvlist"),
    pytest.param(
        AnyValue(kvlist_value=kvlist(pair("k", int_value=1), pair("k", int_value=2))),
        {"k": 2},
        Anomaly.DUPLICATE_KEY,
        id="duplicate key inside",
    ),
    pytest.param(
        AnyValue(kvlist_value=kvlist(pair("a\0", int_value=1), pair("a\ufffd", int_value=2))),
        {"a\ufffd": 2},
        Anomaly.TEXT_REPAIRED | Anomaly.DUPLICATE_KEY,
        id="keys that collide once repaired",
    ),
    pytest.param(
        AnyValue(array_value=ArrayValue(values=[AnyValue(double_value=float("nan")), AnyValue(bytes_value=b"x")])),
        ["NaN", "eA=="],
        Anomaly.NON_FINITE | Anomaly.BYTES_VALUE,
        id="two repairs in one array",
    ),
]

SPAN_FIELDS: list[Any] = [
    ({"name": "a\0"}, "name", "a\ufffd", Anomaly.TEXT_REPAIRED),
    ({"trace_state": "\0"}, "trace_state", "\ufffd", Anomaly.TEXT_REPAIRED),
    ({"kind": 2**31 - 1}, "kind", 2**15 - 1, Anomaly.ENUM_SATURATED),
    ({"kind": -(2**31)}, "kind", -(2**15), Anomaly.ENUM_SATURATED),
    ({"flags": 2**32 - 1}, "flags", 2**32 - 1, NONE),
    ({"dropped_events_count": 2**32 - 1}, "dropped_events_count", 2**32 - 1, NONE),
    ({"parent_span_id": bytes(8)}, "parent_span_id", None, Anomaly.INVALID_ID),
    ({"parent_span_id": b"abc"}, "parent_span_id", b"abc", Anomaly.INVALID_ID),
    ({"parent_span_id": b""}, "parent_span_id", None, NONE),
    ({"start_time_unix_nano": 0}, "start_minute", 0, Anomaly.TIME_OUTSIDE_WINDOW),
    ({"start_time_unix_nano": 2**64 - 1}, "start_minute", 307_445_734, Anomaly.TIME_OUTSIDE_WINDOW),
    ({"end_time_unix_nano": 0}, "duration_ns", None, NONE),
    ({"end_time_unix_nano": NOW - 2_000_000}, "duration_ns", -1_000_000, NONE),
    (
        {"start_time_unix_nano": 0, "end_time_unix_nano": 2**64 - 1},
        "duration_ns",
        2**63 - 1,
        Anomaly.DURATION_SATURATED | Anomaly.TIME_OUTSIDE_WINDOW,
    ),
    (
        {"start_time_unix_nano": 2**64 - 1, "end_time_unix_nano": 1},
        "duration_ns",
        -(2**63),
        Anomaly.DURATION_SATURATED | Anomaly.TIME_OUTSIDE_WINDOW,
    ),
    ({"attributes": [pair("k", int_value=1)] * 2}, "attributes", {"k": 1}, Anomaly.DUPLICATE_KEY),
    ({"attributes": [pair("", int_value=1)]}, "attributes", {"": 1}, NONE),
    ({"attributes": [KeyValue(key_strindex=3)]}, "attributes", {"": None}, NONE),
]


def hostile_spans() -> list[Span]:
    """Return a span for each odd value above, each with an id of its own."""
    fields = [dict(entry[0]) for entry in SPAN_FIELDS]
    values: list[Any] = [entry.values[0] for entry in ATTRIBUTE_VALUES]
    fields += [{"attributes": [KeyValue(key="k", value=value)]} for value in values]
    return [span(span_id=number.to_bytes(8, "big"), **entry) for number, entry in enumerate(fields, 1)]


@pytest.mark.parametrize(("value", "arrives", "anomalies"), ATTRIBUTE_VALUES)
def test_an_attribute_arrives_normalised_and_flagged(value: AnyValue, arrives: Any, anomalies: Anomaly) -> None:
    stored = span_row(attributes=[KeyValue(key="k", value=value)])

    assert stored["attributes"] == {"k": arrives}
    assert repr(stored["attributes"]["k"]) == repr(arrives)  # 1 is not 1.0, nor true
    assert Anomaly(stored["anomalies"]) == anomalies


@pytest.mark.parametrize(("fields", "column", "arrives", "anomalies"), SPAN_FIELDS)
def test_a_span_field_arrives_normalised_and_flagged(
    fields: dict[str, Any], column: str, arrives: Any, anomalies: Anomaly
) -> None:
    stored = span_row(**fields)

    assert stored[column] == arrives
    assert Anomaly(stored["anomalies"]) == anomalies


@pytest.mark.parametrize(
    ("fields", "column", "arrives", "anomalies"),
    [
        ({"trace_id": b"", "span_id": b""}, "trace_id", None, NONE),
        ({"trace_id": bytes(16)}, "trace_id", None, Anomaly.INVALID_ID),
        ({"trace_id": b"x" * 17}, "trace_id", None, Anomaly.INVALID_ID),
        ({"span_id": b"x" * 7}, "span_id", None, Anomaly.INVALID_ID),
        ({"severity_number": 40_000}, "severity_number", 2**15 - 1, Anomaly.ENUM_SATURATED),
        ({"body": AnyValue(string_value="a\0")}, "body", "a\ufffd", Anomaly.TEXT_REPAIRED),
        ({"body": AnyValue(string_value="")}, "body", "", NONE),
        ({"body": AnyValue()}, "body_json", None, NONE),
        ({"body": AnyValue(bool_value=False)}, "body_json", False, NONE),
        ({"body": AnyValue(kvlist_value=kvlist())}, "body_json", {}, NONE),
        ({"body": AnyValue(bytes_value=b"x")}, "body_json", "eA==", Anomaly.BYTES_VALUE),
        ({"body": AnyValue(double_value=float("nan"))}, "body_json", "NaN", Anomaly.NON_FINITE),
        ({"observed_time_unix_nano": 0}, "observed_time", None, NONE),
    ],
)
def test_a_log_field_arrives_normalised_and_flagged(
    fields: dict[str, Any], column: str, arrives: Any, anomalies: Anomaly
) -> None:
    stored = log_row(**fields)

    assert stored[column] == arrives
    assert type(stored[column]) is type(arrives)
    assert Anomaly(stored["anomalies"]) == anomalies


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"span_id": b""}, "span_id is empty"),
        ({"span_id": b"1234567"}, "span_id has 7 bytes, not 8"),
        ({"span_id": bytes(8)}, "span_id is all zeros"),
        ({"trace_id": b"x" * 17}, "trace_id has 17 bytes, not 16"),
        ({"trace_id": bytes(16)}, "trace_id is all zeros"),
        ({"span_id": b"not hexadecimal: "}, "span_id is not 16 hexadecimal digits"),
        ({"trace_id": b"", "span_id": b"x"}, "trace_id is empty; span_id has 1 bytes, not 8"),
    ],
)
def test_a_span_with_a_bad_id_is_refused_with_a_reason(fields: dict[str, Any], reason: str) -> None:
    batch = traces(trace_request(span(**fields)).SerializeToString())

    assert [rejection.reason for rejection in batch.rejected] == [reason]
    assert batch.rows == []
    assert batch.resources == {}
    assert batch.days == frozenset()


@pytest.mark.parametrize(
    ("record", "minute", "anomalies"),
    [
        (LogRecord(observed_time_unix_nano=NOW - 60_000_000_000), -1, Anomaly.TIME_SUBSTITUTED),
        (LogRecord(), 0, Anomaly.TIME_SUBSTITUTED),
        (LogRecord(time_unix_nano=1), -(NOW // 60_000_000_000), Anomaly.TIME_OUTSIDE_WINDOW),
    ],
)
def test_a_log_record_without_a_time_gets_one(record: LogRecord, minute: int, anomalies: Anomaly) -> None:
    batch = logs(log_request(record).SerializeToString())

    assert row(batch)["time_minute"] == NOW // 60_000_000_000 + minute
    assert Anomaly(row(batch)["anomalies"]) == anomalies


def test_links_with_odd_ids_keep_them_and_are_flagged() -> None:
    odd = [Span.Link(trace_id=b"\xab", span_id=SPAN_ID), Span.Link(trace_id=TRACE_ID), Span.Link(span_id=bytes(8))]
    for link in odd:
        stored = span_row(links=[link])
        assert stored["links"][0]["trace_id"] == link.trace_id.hex()
        assert stored["links"][0]["span_id"] == link.span_id.hex()
        assert stored["anomalies"] == Anomaly.INVALID_ID


def test_event_times_stay_exact_beyond_doubles() -> None:
    stored = span_row(events=[Span.Event(time_unix_nano=2**64 - 1)])

    assert stored["events"][0]["time_unix_nano"] == 2**64 - 1


def test_repairs_count_items_per_bit() -> None:
    batch = traces(
        trace_request(
            span(name="\0", attributes=[pair("k", string_value="\0"), pair("b", bytes_value=b"")]),
            span(name="\0"),
            span(start_time_unix_nano=0),
            span(),
        ).SerializeToString()
    )

    assert batch.repairs == {
        Anomaly.TEXT_REPAIRED: 2,
        Anomaly.BYTES_VALUE: 1,
        Anomaly.TIME_OUTSIDE_WINDOW: 1,
    }


def test_times_outside_the_window_ask_for_no_partition() -> None:
    day = 86_400 * 10**9
    batch = traces(
        trace_request(
            *[span(start_time_unix_nano=NOW + days * day) for days in (-31, -29, 0, 2)],
        ).SerializeToString()
    )

    assert batch.days == {(NOW - 29 * day) // day, NOW // day}
    assert batch.repairs == {Anomaly.TIME_OUTSIDE_WINDOW: 2}


def test_what_is_odd_in_a_resource_or_scope_marks_all_their_items() -> None:
    request = trace_request(span(), span())
    request.resource_spans[0].resource.attributes.append(pair("x", bytes_value=b""))
    request.resource_spans[0].scope_spans[0].scope.name = "\0"
    batch = traces(request.SerializeToString())

    assert row(batch, 1)["anomalies"] == Anomaly.BYTES_VALUE | Anomaly.TEXT_REPAIRED
    assert batch.repairs == {Anomaly.BYTES_VALUE: 2, Anomaly.TEXT_REPAIRED: 2}


@pytest.mark.parametrize(
    ("value", "service_name", "anomalies"),
    [
        (AnyValue(string_value="ü" * 1001), "ü" * 1000, Anomaly.TEXT_CUT),
        (AnyValue(string_value="x" + "ü" * 1000), "x" + "ü" * 999, Anomaly.TEXT_CUT),
        (AnyValue(string_value="ü" * 1000), "ü" * 1000, NONE),
        (AnyValue(string_value="\0"), "\ufffd", Anomaly.TEXT_REPAIRED),
        (AnyValue(string_value=""), "", NONE),
        (AnyValue(int_value=5), None, NONE),
    ],
)
def test_service_name_is_a_string_that_an_index_can_hold(
    value: AnyValue, service_name: str | None, anomalies: Anomaly
) -> None:
    request = trace_request(span())
    request.resource_spans[0].resource.attributes[0].value.CopyFrom(value)
    batch = traces(request.SerializeToString())

    assert row(batch)["service_name"] == service_name
    assert resource_row(batch)["service_name"] == service_name
    assert batch.facts[0].service_name == service_name
    assert row(batch)["anomalies"] == anomalies


def test_a_ten_megabyte_attribute_arrives() -> None:
    text = "ü\0" * 5_000_000

    assert span_row(attributes=[pair("k", string_value=text)])["attributes"] == {"k": text.replace("\0", "\ufffd")}
    data = bytes(10_000_000)
    assert span_row(attributes=[pair("k", bytes_value=data)])["attributes"]["k"] == base64.b64encode(data).decode()


def test_a_scope_too_large_to_be_repeated_in_every_row_refuses_what_exceeds_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "MAX_BATCH_BYTES", 250_000)
    request = trace_request(*[span() for _ in range(5)])
    request.resource_spans[0].scope_spans[0].scope.name = "x" * 100_000
    batch = traces(request.SerializeToString())

    assert len(batch.rows) == 2
    assert batch.rejected[0].reason == "the rows of this request exceed 250,000 bytes; send smaller requests"
    assert batch.item_count == 5
