# ruff: noqa: ANN401 - telemetry's values have any type
"""Hostile log records through the socket: stored exactly or refused alone with a reason; neighbours never care."""

import base64
import itertools
import json
import time
from typing import Any

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter.model import Anomaly, Signal
from tests.e2e.support import OK, Receiver
from tests.e2e.wire import delimited, enclosed, nested_attribute
from tests.workload import log_body, record

NONE = Anomaly(0)
TEN_MB = 10_000_000

_requests = itertools.count()
now = time.time_ns()


def between_good_ones(hostile: bytes) -> tuple[str, bytes]:
    """Put a record between two good ones; return what marks the good ones in the tables, and the request."""
    mark = f"good {next(_requests)}"
    good = record("hello", event_name=mark).SerializeToString()
    return mark, enclosed([good, hostile, good])


def stored(receiver: Receiver, hostile: LogRecord | bytes, *columns: str) -> tuple[Any, ...]:
    """Send a record between two good ones; check those, and return columns of the hostile one."""
    mark, body = between_good_ones(hostile if isinstance(hostile, bytes) else hostile.SerializeToString())
    assert receiver.send(Signal.LOGS, body) == OK
    request = "(SELECT request_id FROM logs WHERE event_name = %s LIMIT 1)"
    rows = receiver.database.rows(
        f"SELECT event_name = %s, anomalies, {', '.join(columns)} FROM logs"
        f" WHERE request_id = {request} ORDER BY event_name = %s",
        *(mark,) * 3,
    )
    assert [row[:2] for row in rows[1:]] == [(True, 0)] * 2
    is_good, *found = rows[0]
    assert not is_good
    return tuple(found)


def pair(key: str, **value: Any) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))


BODIES = [
    ("NUL", {"string_value": "a\0b"}, "a\ufffdb", Anomaly.TEXT_REPAIRED),
    ("empty text", {"string_value": ""}, "", NONE),
    ("beyond the BMP", {"string_value": "\U0001f600"}, "\U0001f600", NONE),
    ("10 MB", {"string_value": "\u00fcx" * (TEN_MB // 3)}, "\u00fcx" * (TEN_MB // 3), NONE),
    ("NaN", {"double_value": float("nan")}, "NaN", Anomaly.NON_FINITE),
    ("infinity", {"double_value": float("inf")}, "Infinity", Anomaly.NON_FINITE),
    ("smallest int64", {"int_value": -(2**63)}, -(2**63), NONE),
    ("greatest int64", {"int_value": 2**63 - 1}, 2**63 - 1, NONE),
    ("false", {"bool_value": False}, False, NONE),
    ("bytes", {"bytes_value": b"\0\xff"}, base64.b64encode(b"\0\xff").decode(), Anomaly.BYTES_VALUE),
    (
        "duplicate keys",
        {"kvlist_value": KeyValueList(values=[pair("k", int_value=1), pair("k", string_value="\0")])},
        {"k": "\ufffd"},
        Anomaly.DUPLICATE_KEY | Anomaly.TEXT_REPAIRED,
    ),
    ("empty key", {"kvlist_value": KeyValueList(values=[pair("", int_value=1)])}, {"": 1}, NONE),
    ("empty kvlist", {"kvlist_value": KeyValueList()}, {}, NONE),
]


@pytest.mark.parametrize(("body", "arrives", "anomalies"), [c[1:] for c in BODIES], ids=[c[0] for c in BODIES])
def test_a_body_is_stored_exactly_or_as_the_normalisations_say(
    shared_receiver: Receiver, body: dict[str, Any], arrives: Any, anomalies: Anomaly
) -> None:
    hostile = LogRecord(time_unix_nano=now, body=AnyValue(**body))
    is_text = "string_value" in body
    assert stored(shared_receiver, hostile, "body", "body_json") == (
        anomalies,
        arrives if is_text else None,
        None if is_text else arrives,
    )


FIELDS: list[tuple[str, LogRecord, dict[str, Any], Anomaly]] = [
    (
        "no time but an observed one",
        LogRecord(observed_time_unix_nano=now),
        {"time = observed_time": True, "time_ns": now % 1000, "observed_time_ns": now % 1000},
        Anomaly.TIME_SUBSTITUTED,
    ),
    (
        "no time at all",
        LogRecord(),
        {"time > now() - interval '10 minutes'": True, "observed_time": None, "observed_time_ns": None},
        Anomaly.TIME_SUBSTITUTED,
    ),
    (
        "greatest time",
        LogRecord(time_unix_nano=2**64 - 1),
        {"extract(year FROM time)": 2554, "time_ns": 615, "tableoid::regclass::text": "logs_default"},
        Anomaly.TIME_OUTSIDE_WINDOW,
    ),
    (
        "first nanosecond",
        LogRecord(time_unix_nano=1, observed_time_unix_nano=2**64 - 1),
        {"extract(epoch FROM time)": 0, "time_ns": 1, "observed_time_ns": 615},
        Anomaly.TIME_OUTSIDE_WINDOW,
    ),
    ("greatest severity", LogRecord(severity_number=2**31 - 1), {"severity_number": 2**15 - 1}, Anomaly.ENUM_SATURATED),  # type: ignore[arg-type] # enums are open
    ("greatest flags", LogRecord(flags=2**32 - 1), {"flags": 2**32 - 1}, NONE),
    (
        "greatest count",
        LogRecord(dropped_attributes_count=2**32 - 1),
        {"dropped_attributes_count": 2**32 - 1},
        NONE,
    ),
    ("no ids", LogRecord(), {"trace_id": None, "span_id": None}, NONE),
    (
        "ids of zeros",
        LogRecord(trace_id=bytes(16), span_id=bytes(8)),
        {"trace_id": None, "span_id": None},
        Anomaly.INVALID_ID,
    ),
    (
        "ids too long",
        LogRecord(trace_id=b"x" * 17, span_id=b"x" * 9),
        {"trace_id": None, "span_id": None},
        Anomaly.INVALID_ID,
    ),
    ("NUL in the event name", LogRecord(event_name="\0"), {"event_name": "\ufffd"}, Anomaly.TEXT_REPAIRED),
    ("100 KB of event name", LogRecord(event_name="\u00fc" * 50_000), {"event_name": "\u00fc" * 50_000}, NONE),
    (
        "duplicate keys",
        LogRecord(attributes=[pair("k", int_value=1), pair("k", int_value=2)]),
        {"attributes": {"k": 2}},
        Anomaly.DUPLICATE_KEY,
    ),
]


@pytest.mark.parametrize(("hostile", "arrives", "anomalies"), [c[1:] for c in FIELDS], ids=[c[0] for c in FIELDS])
def test_a_field_is_stored_exactly_or_as_the_normalisations_say(
    shared_receiver: Receiver, hostile: LogRecord, arrives: dict[str, Any], anomalies: Anomaly
) -> None:
    timed = LogRecord()
    timed.CopyFrom(hostile)
    if not anomalies & Anomaly.TIME_SUBSTITUTED and not hostile.time_unix_nano:
        timed.time_unix_nano = now
    assert stored(shared_receiver, timed, *arrives) == (anomalies, *arrives.values())


def test_invalid_utf8_in_one_record_is_repaired_in_that_record_alone(shared_receiver: Receiver) -> None:
    body = LogRecord(time_unix_nano=now).SerializeToString() + delimited(5, delimited(1, b"he\xffllo"))
    assert stored(shared_receiver, body, "body") == (Anomaly.INVALID_UTF8, "he\ufffdllo")


def test_30_nested_kvlists_are_stored_exactly(shared_receiver: Receiver) -> None:
    hostile = LogRecord(time_unix_nano=now).SerializeToString() + delimited(6, nested_attribute(b"deep", 30))
    anomalies, attributes = stored(shared_receiver, hostile, "attributes")
    assert anomalies == 0
    assert json.dumps(attributes) == '{"deep": ' + '{"k": ' * 30 + "7" + "}" * 31


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (delimited(6, nested_attribute(b"deep", 10_000)), "not decodable: messages nest deeper than 100 levels"),
        (b"\xff\xff", "not decodable: the number at byte 0 has no end"),
    ],
    ids=["10,000 nested kvlists", "no protobuf"],
)
def test_a_record_that_cannot_be_decoded_is_refused_alone_and_kept(
    shared_receiver: Receiver, hostile: bytes, reason: str
) -> None:
    mark, body = between_good_ones(hostile)
    answer = (1, f"1 of 3 log records refused: item 1: {reason}")
    assert shared_receiver.send(Signal.LOGS, body) == answer
    letters = "SELECT item_index, signal, reason, sqlstate FROM dead_letters WHERE otlp = %s"
    for _ in range(2):  # a retry hears the same, and changes nothing
        assert shared_receiver.database.rows("SELECT count(*) FROM logs WHERE event_name = %s", mark) == [(2,)]
        assert shared_receiver.database.rows(letters, enclosed([hostile])) == [(1, "logs", reason, None)]
        assert shared_receiver.send(Signal.LOGS, body) == answer


def test_a_service_name_of_10_000_bytes_is_cut_in_columns_and_whole_in_the_resource(shared_receiver: Receiver) -> None:
    mark, name = f"good {next(_requests)}", "\u00fc" * 5_000
    assert shared_receiver.send(Signal.LOGS, log_body([record("hello", event_name=mark)], service=name)) == OK
    assert shared_receiver.database.rows(
        "SELECT l.anomalies, l.service_name, r.service_name, r.attributes"
        " FROM logs l JOIN resources r USING (resource_id) WHERE event_name = %s",
        mark,
    ) == [(Anomaly.TEXT_CUT, name[:1000], name[:1000], {"service.name": name})]
