# ruff: noqa: ANN401 - telemetry's values have any type
"""Hostile spans through the socket: stored exactly or refused alone with a reason; neighbours never care."""

import base64
import datetime as dt
import itertools
import json
import time
from typing import Any

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_pg_exporter.model import Anomaly, Signal
from tests.e2e.support import OK, Receiver
from tests.e2e.wire import delimited, enclosed, nested_attribute
from tests.workload import span, trace_body

NONE = Anomaly(0)
INT64_MIN, INT64_MAX, UINT32_MAX, UINT64_MAX = -(2**63), 2**63 - 1, 2**32 - 1, 2**64 - 1
TEN_MB = 10_000_000

_traces = itertools.count(1000)
now = time.time_ns()


def attribute(key: str, **value: Any) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))


def stored(receiver: Receiver, hostile: Span | bytes, *columns: str) -> list[tuple[Any, ...]]:
    """Send a span between two good ones; check those, and return columns of the hostile one."""
    trace = next(_traces)
    body = enclosed([span(1, trace=trace).SerializeToString(), _in(hostile, trace), _last(trace)])
    assert receiver.send(Signal.TRACES, body) == OK
    rows = receiver.database.rows(
        f"SELECT span_id, anomalies, {', '.join(columns)} FROM spans WHERE trace_id = %s ORDER BY span_id", _uuid(trace)
    )
    assert [(span_id[-1], anomalies == 0) for span_id, anomalies, *_ in rows[::2]] == [(2, True), (4, True)]
    assert rows[1][0][-1] == 3
    return [rows[1][1:]]


def refused(receiver: Receiver, hostile: Span | bytes) -> str:
    """Send a span between two good ones; check that it alone is refused, and return the reason."""
    trace = next(_traces)
    item = _in(hostile, trace)
    rejected, message = receiver.send(
        Signal.TRACES, enclosed([span(1, trace=trace).SerializeToString(), item, _last(trace)])
    )
    prefix = "1 of 3 spans refused: item 1: "
    assert (rejected, message[: len(prefix)]) == (1, prefix)
    assert receiver.database.rows("SELECT span_count FROM traces WHERE trace_id = %s", _uuid(trace)) == [(2,)]
    # The dead letter is a request with this item, byte for byte.
    assert receiver.database.rows(
        "SELECT item_index, signal, reason, sqlstate FROM dead_letters WHERE otlp = %s", enclosed([item])
    ) == [(1, "traces", message.removeprefix(prefix), None)]
    return message.removeprefix(prefix)


def _last(trace: int) -> bytes:
    return span(3, trace=trace).SerializeToString()


def _in(hostile: Span | bytes, trace: int) -> bytes:
    """Return the hostile item, as the third span of this trace unless its ids say something else."""
    base = span(2, trace=trace)
    if isinstance(hostile, bytes):
        return base.SerializeToString() + hostile
    for field, value in hostile.ListFields():
        base.ClearField(field.name)  # type: ignore[arg-type] # any field's name
        getattr(base, field.name).extend(value) if field.is_repeated else _put(base, field.name, value)
    return base.SerializeToString()


def _put(message: Span, name: str, value: Any) -> None:
    if isinstance(value, Status):
        message.status.CopyFrom(value)
    else:
        setattr(message, name, value)


def _uuid(trace: int) -> str:
    return f"{trace:032x}"


VALUES = [
    ("NUL", {"string_value": "a\0b"}, "a\ufffdb", Anomaly.TEXT_REPAIRED),
    ("the spelling of a NUL", {"string_value": "\\u0000"}, "\\u0000", NONE),
    ("beyond the BMP", {"string_value": "\U0001f600\U0010ffff"}, "\U0001f600\U0010ffff", NONE),
    ("NaN", {"double_value": float("nan")}, "NaN", Anomaly.NON_FINITE),
    ("infinity", {"double_value": float("inf")}, "Infinity", Anomaly.NON_FINITE),
    ("-infinity", {"double_value": float("-inf")}, "-Infinity", Anomaly.NON_FINITE),
    ("-0.0", {"double_value": -0.0}, 0.0, NONE),
    ("smallest int64", {"int_value": INT64_MIN}, INT64_MIN, NONE),
    ("greatest int64", {"int_value": INT64_MAX}, INT64_MAX, NONE),
    ("10 MB", {"string_value": "\u00fcx" * (TEN_MB // 3)}, "\u00fcx" * (TEN_MB // 3), NONE),
    (
        "10 MB of bytes",
        {"bytes_value": b"\0\xff" * (TEN_MB // 2)},
        base64.b64encode(b"\0\xff" * (TEN_MB // 2)).decode(),
        Anomaly.BYTES_VALUE,
    ),
]


@pytest.mark.parametrize(
    ("value", "arrives", "anomalies"), [case[1:] for case in VALUES], ids=[case[0] for case in VALUES]
)
def test_an_attribute_is_stored_exactly_or_as_the_normalisations_say(
    shared_receiver: Receiver, value: dict[str, Any], arrives: Any, anomalies: Anomaly
) -> None:
    hostile = Span(attributes=[attribute("k", **value)])
    assert stored(shared_receiver, hostile, "attributes") == [(anomalies, {"k": arrives})]


def at(nanoseconds: int) -> dt.datetime:
    return dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=nanoseconds // 1000)


OUTSIDE = Anomaly.TIME_OUTSIDE_WINDOW
SATURATED = Anomaly.DURATION_SATURATED
FIELDS: list[tuple[str, Span, dict[str, Any], Anomaly]] = [
    ("NUL in the name", Span(name="a\0"), {"name": "a\ufffd"}, Anomaly.TEXT_REPAIRED),
    ("NUL in the trace state", Span(trace_state="\0=1"), {"trace_state": "\ufffd=1"}, Anomaly.TEXT_REPAIRED),
    (
        "NUL in the status message",
        Span(status=Status(message="\0")),
        {"status_message": "\ufffd"},
        Anomaly.TEXT_REPAIRED,
    ),
    (
        "NUL in a key",
        Span(attributes=[attribute("\0", bool_value=True)]),
        {"attributes": {"\ufffd": True}},
        Anomaly.TEXT_REPAIRED,
    ),
    ("NUL in an event", Span(events=[Span.Event(name="\0")]), {"events->0->>'name'": "\ufffd"}, Anomaly.TEXT_REPAIRED),
    ("100 KB of name", Span(name="\u00fc" * 50_000), {"name": "\u00fc" * 50_000}, NONE),
    ("beyond the BMP", Span(name="\U0001f600"), {"name": "\U0001f600"}, NONE),
    ("empty key", Span(attributes=[attribute("", int_value=1)]), {"attributes": {"": 1}}, NONE),
    (
        "duplicate keys",
        Span(attributes=[attribute("k", int_value=1), attribute("k", int_value=2)]),
        {"attributes": {"k": 2}},
        Anomaly.DUPLICATE_KEY,
    ),
    (
        "greatest uint32",
        Span(
            flags=UINT32_MAX,
            dropped_attributes_count=UINT32_MAX,
            dropped_events_count=UINT32_MAX,
            dropped_links_count=UINT32_MAX,
        ),
        dict.fromkeys(("flags", "dropped_attributes_count", "dropped_events_count", "dropped_links_count"), UINT32_MAX),
        NONE,
    ),
    ("greatest kind", Span(kind=2**31 - 1), {"kind": 2**15 - 1}, Anomaly.ENUM_SATURATED),  # type: ignore[arg-type] # enums are open
    ("least kind", Span(kind=-(2**31)), {"kind": -(2**15)}, Anomaly.ENUM_SATURATED),  # type: ignore[arg-type] # as above
    ("greatest status", Span(status=Status(code=2**31 - 1)), {"status_code": 2**15 - 1}, Anomaly.ENUM_SATURATED),  # type: ignore[arg-type] # as above
    (
        "greatest start",
        Span(start_time_unix_nano=UINT64_MAX, end_time_unix_nano=UINT64_MAX),
        {
            "start_time": at(UINT64_MAX),
            "start_time_ns": 615,
            "duration_ns": 0,
            "tableoid::regclass::text": "spans_default",
        },
        OUTSIDE,
    ),
    (
        "greatest end",
        Span(start_time_unix_nano=now, end_time_unix_nano=UINT64_MAX),
        {"end_time": at(UINT64_MAX), "duration_ns": INT64_MAX},
        SATURATED,
    ),
    (
        "end long before its start",
        Span(start_time_unix_nano=UINT64_MAX, end_time_unix_nano=1),
        {"end_time": at(0), "duration_ns": INT64_MIN},
        OUTSIDE | SATURATED,
    ),
    ("parent of zeros", Span(parent_span_id=bytes(8)), {"parent_span_id": None}, Anomaly.INVALID_ID),
    ("parent too short", Span(parent_span_id=b"abc"), {"parent_span_id": b"abc"}, Anomaly.INVALID_ID),
    (
        "link without ids",
        Span(links=[Span.Link()]),
        {"links->0->>'trace_id'": "", "links->0->>'span_id'": ""},
        Anomaly.INVALID_ID,
    ),
    (
        "event at the greatest time",
        Span(events=[Span.Event(time_unix_nano=UINT64_MAX)]),
        {"events->0->>'time_unix_nano'": str(UINT64_MAX)},
        NONE,
    ),
]


@pytest.mark.parametrize(("hostile", "arrives", "anomalies"), [c[1:] for c in FIELDS], ids=[c[0] for c in FIELDS])
def test_a_field_is_stored_exactly_or_as_the_normalisations_say(
    shared_receiver: Receiver, hostile: Span, arrives: dict[str, Any], anomalies: Anomaly
) -> None:
    assert stored(shared_receiver, hostile, *arrives) == [(anomalies, *arrives.values())]


# Fields that are zero are not on the wire: a later field of the same number overrides an earlier one there.
START_0, END_0 = b"\x39" + bytes(8), b"\x41" + bytes(8)


@pytest.mark.parametrize(
    ("override", "arrives", "anomalies"),
    [
        pytest.param(
            START_0 + END_0, (at(0), 0, None, None, "spans_default", 0), OUTSIDE, id="a span without any time"
        ),
        pytest.param(
            START_0 + b"\x41" + b"\xff" * 8,
            (at(0), 0, at(UINT64_MAX), INT64_MAX, "spans_default", 0),
            OUTSIDE | SATURATED,
            id="from the first to the last nanosecond",
        ),
    ],
)
def test_a_span_at_time_0_is_stored(
    shared_receiver: Receiver, override: bytes, arrives: tuple[Any, ...], anomalies: Anomaly
) -> None:
    columns = ("start_time", "start_time_ns", "end_time", "duration_ns", "tableoid::regclass::text", "start_minute")
    assert stored(shared_receiver, override, *columns) == [(anomalies, *arrives)]


def test_a_span_that_has_not_ended_has_no_duration(shared_receiver: Receiver) -> None:
    assert stored(shared_receiver, END_0, "end_time", "duration_ns") == [(NONE, None, None)]


def test_invalid_utf8_in_one_span_is_repaired_in_that_span_alone(shared_receiver: Receiver) -> None:
    key_value = delimited(1, b"k\xfe") + delimited(2, delimited(1, b"v\xff\xffv"))
    hostile = delimited(5, b"na\xc3me") + delimited(9, key_value)
    assert stored(shared_receiver, hostile, "name", "attributes") == [
        (Anomaly.INVALID_UTF8, "na\ufffdme", {"k\ufffd": "v\ufffd\ufffdv"})
    ]


def test_a_surrogate_on_the_wire_is_invalid_utf8(shared_receiver: Receiver) -> None:
    assert stored(shared_receiver, delimited(5, b"a\xed\xa0\x80b"), "name") == [
        (Anomaly.INVALID_UTF8, "a\ufffd\ufffd\ufffdb")
    ]


def test_30_nested_kvlists_are_stored_exactly(shared_receiver: Receiver) -> None:
    [(anomalies, attributes)] = stored(shared_receiver, delimited(9, nested_attribute(b"deep", 30)), "attributes")
    assert anomalies == 0
    assert json.dumps(attributes) == '{"deep": ' + '{"k": ' * 30 + "7" + "}" * 31


def test_10_000_nested_kvlists_are_refused_alone(shared_receiver: Receiver) -> None:
    reason = refused(shared_receiver, delimited(9, nested_attribute(b"deep", 10_000)))
    assert reason == "not decodable: messages nest deeper than 100 levels"


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (delimited(1, b""), "trace_id is empty"),
        (delimited(2, b""), "span_id is empty"),
        (delimited(1, b"") + delimited(2, b""), "trace_id is empty; span_id is empty"),
        (Span(trace_id=b"x" * 15), "trace_id has 15 bytes, not 16"),
        (Span(trace_id=b"x" * 17), "trace_id has 17 bytes, not 16"),
        (Span(span_id=b"x" * 7), "span_id has 7 bytes, not 8"),
        (Span(span_id=b"x" * 100_000), "span_id has 100,000 bytes, not 8"),
        (Span(trace_id=bytes(16)), "trace_id is all zeros"),
        (Span(span_id=bytes(8)), "span_id is all zeros"),
        (b"\xff\xff", "not decodable: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_span_that_cannot_be_stored_is_refused_alone_and_kept(
    shared_receiver: Receiver, hostile: Span | bytes, reason: str
) -> None:
    assert refused(shared_receiver, hostile).startswith(reason)


def test_a_service_name_of_10_000_bytes_is_cut_in_columns_and_whole_in_the_resource(shared_receiver: Receiver) -> None:
    trace, name = next(_traces), "\u00fc" * 5_000
    assert shared_receiver.send(Signal.TRACES, trace_body([span(0, trace=trace)], service=name)) == OK
    assert shared_receiver.database.rows(
        "SELECT s.anomalies, s.service_name, r.service_name, r.attributes, t.root_service_name, t.service_names"
        " FROM spans s JOIN resources r USING (resource_id) JOIN traces t USING (trace_id) WHERE trace_id = %s",
        _uuid(trace),
    ) == [(Anomaly.TEXT_CUT, name[:1000], name[:1000], {"service.name": name}, name[:1000], [name[:1000]])]


@pytest.mark.parametrize("signal", list(Signal))
@pytest.mark.parametrize(
    "body",
    [b"", delimited(1, b""), delimited(1, delimited(1, b"")), delimited(1, delimited(2, b""))],
    ids=["no bytes", "empty group", "resource alone", "empty scope"],
)
def test_a_request_without_items_is_ok_and_leaves_no_trace(receiver: Receiver, signal: Signal, body: bytes) -> None:
    assert receiver.send(signal, body) == OK
    for table in ("spans", "logs", "resources", "traces", "ingest_requests", "dead_letters"):
        assert receiver.database.count(table) == 0


def test_traces_stay_exact_among_all_that(shared_receiver: Receiver) -> None:
    hostile = [
        Span(start_time_unix_nano=1, end_time_unix_nano=UINT64_MAX),
        Span(parent_span_id=bytes(8), name="\0" * 1000),
        Span(status=Status(code=2**31 - 1)),  # type: ignore[arg-type] # enums are open
        Span(
            status=Status(code=Status.STATUS_CODE_ERROR),
            attributes=[attribute("gen_ai.usage.input_tokens", int_value=INT64_MAX)],
        ),
    ]
    for each in hostile:
        stored(shared_receiver, each, "name")
    shared_receiver.database.assert_traces_exact()
