"""Requests made to hurt, through the socket: refused with a reason as a whole or in part, and others are served."""

import time

import grpc
import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter.model import Signal
from otel_pg_exporter.receiver.body_watch import resident_bytes
from otel_pg_exporter.transcode.protobuf_wire import delimited
from tests.e2e.support import METHODS, OK, Receiver
from tests.frames import item_frame, resource_frame, scope_frame
from tests.workload import log_body, record, span, trace_body

pytestmark = pytest.mark.parametrize("protocol", ["grpc", "http"])

MIB = 2**20
MANY = "too large: more than 131,072 fields (attributes, events, links, and what they hold)"
NESTED = "not decodable: messages nest deeper than 100 levels"


def request(*items: bytes) -> bytes:
    return resource_frame(b"", scope_frame(b"", b"".join(map(item_frame, items))))


def good(trace: int) -> bytes:
    return span(0, trace=trace).SerializeToString()


def with_attribute(value: bytes) -> bytes:
    return delimited(9, delimited(1, b"k") + delimited(2, value))


def kvlists(levels: int) -> bytes:
    value = b"\x18\x07"
    for _ in range(levels):
        value = delimited(6, delimited(1, delimited(1, b"k") + delimited(2, value)))
    return value


def arrays(levels: int) -> bytes:
    value = b"\x18\x07"
    for _ in range(levels):
        value = delimited(5, delimited(1, value))
    return value


def attributes(count: int) -> bytes:
    return b"".join(
        delimited(9, delimited(1, b"key %d" % number) + delimited(2, b"\x18\x07")) for number in range(count)
    )


def events(count: int) -> bytes:
    return delimited(11, b"\x09" + time.time_ns().to_bytes(8, "little") + delimited(2, b"event")) * count


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        pytest.param(with_attribute(kvlists(10_000)), NESTED, id="10,000 kvlists"),
        pytest.param(with_attribute(arrays(10_000)), NESTED, id="10,000 arrays"),
        pytest.param(attributes(1_000_000), MANY, id="a million attributes"),
        pytest.param(events(100_000), MANY, id="100,000 events"),
        pytest.param(b"\x4a\0" * 30 * MIB, MANY, id="31 million empty attributes"),
        pytest.param(b"\x2a\xff\xff\xff\xff\x0f", "not decodable: the field at byte", id="cut off"),
    ],
)
def test_a_span_made_to_hurt_is_refused_alone(shared_receiver: Receiver, more: bytes, reason: str) -> None:
    trace = time.time_ns()
    before = resident_bytes()
    rejected, message = shared_receiver.send(
        Signal.TRACES, request(good(trace), span(1, trace=trace).SerializeToString() + more, good(trace + 1))
    )
    assert rejected == 1
    assert message.startswith(f"1 of 3 spans refused: item 1: {reason}")
    assert resident_bytes() - before < 500 * MIB  # with the client, which holds the body several times
    stored = shared_receiver.database.rows("SELECT 1 FROM spans WHERE trace_id = %s", f"{trace:032x}")
    assert len(stored) == 1


@pytest.mark.parametrize(
    ("more", "column", "length"),
    [
        pytest.param(attributes(30_000), "SELECT count(*) FROM jsonb_object_keys(attributes)", 30_000, id="attributes"),
        pytest.param(events(30_000), "jsonb_array_length(events)", 30_000, id="events"),
    ],
)
def test_a_span_with_tens_of_thousands_is_stored(
    shared_receiver: Receiver, more: bytes, column: str, length: int
) -> None:
    trace = time.time_ns()
    assert shared_receiver.send(Signal.TRACES, request(good(trace) + more)) == OK
    query = f"SELECT ({column}) FROM spans WHERE trace_id = %s"
    assert shared_receiver.database.rows(query, f"{trace:032x}") == [(length,)]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param(
            resource_frame(b"", scope_frame(b"", b"\x12\0" * 30 * MIB)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "more than 700,000 items, scopes and resources; send smaller requests",
            id="31 million empty spans",
        ),
        pytest.param(
            b"\x0a\0" * 30 * MIB,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "more than 700,000 items, scopes and resources; send smaller requests",
            id="31 million empty resources",
        ),
        pytest.param(request(good(1))[:-1], grpc.StatusCode.INVALID_ARGUMENT, "is not OTLP", id="cut off"),
        pytest.param(b"hello, world", grpc.StatusCode.INVALID_ARGUMENT, "is not OTLP", id="text"),
        pytest.param(
            log_body([record("hello")]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "the body holds log records, not spans; send them to opentelemetry.proto.collector.logs.v1.LogsService",
            id="logs",
        ),
    ],
)
def test_a_request_made_to_hurt_is_refused_as_a_whole(
    shared_receiver: Receiver, body: bytes, code: grpc.StatusCode, words: str
) -> None:
    refused = shared_receiver.client.refused(METHODS[Signal.TRACES], body)
    assert (refused.code, refused.trailers) == (code, {})
    assert words in refused.details
    assert shared_receiver.send(Signal.TRACES, request(good(time.time_ns()))) == OK


def test_spans_sent_to_the_logs_endpoint_are_refused_with_a_hint(shared_receiver: Receiver) -> None:
    refused = shared_receiver.client.refused(METHODS[Signal.LOGS], trace_body([span(1)]))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "TraceService/Export (over HTTP: /v1/traces)" in refused.details
    assert shared_receiver.send(Signal.LOGS, log_body([LogRecord()])) == OK


def test_fields_of_the_wrong_type_are_unknown_fields(shared_receiver: Receiver) -> None:
    trace = time.time_ns()
    name_as_number, kind_as_text = b"\x28\x07", b"\x32\x04kind"
    assert shared_receiver.send(Signal.TRACES, request(good(trace) + name_as_number + kind_as_text)) == OK
    query = "SELECT name, kind FROM spans WHERE trace_id = %s"
    assert shared_receiver.database.rows(query, f"{trace:032x}") == [("operation 0", 0)]


def test_a_thousand_refused_spans_do_not_repeat_a_large_resource_a_thousand_times(shared_receiver: Receiver) -> None:
    resource = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, delimited(1, b"x" * MIB))))
    marker = b"\x2a\x10%016x" % time.time_ns()  # its name, and too short an id
    body = resource_frame(resource, scope_frame(b"", item_frame(b"\x0a\x01x" + marker) * 1000))
    rejected, _ = shared_receiver.send(Signal.TRACES, body)
    assert rejected == 1000
    ((count, size),) = shared_receiver.database.rows(
        "SELECT count(*), sum(length(otlp)) FROM dead_letters WHERE position(%s::bytea IN otlp) > 0", marker
    )
    assert count == 1000
    assert size < 65 * MIB
