"""Requests that protobuf refuses as a whole: one bad item never costs its neighbours."""

import contextlib
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter.errors import UndecodableError
from otel_pg_exporter.model import Anomaly, RowBatch, Signal
from otel_pg_exporter.transcode import transcode
from otel_pg_exporter.transcode.protobuf_wire import delimited
from tests.frames import item_frame, resource_frame, scope_frame
from tests.transcode.support import NOW, columns, log_request, nested, plan, read, resource_row, row, span, traces
from tests.transcode.test_every_field import full

MARK = b"@@@@"  # stands where broken bytes of the same length go


def request_of(*spans: bytes, resource: bytes = b"", scope: bytes = b"") -> bytes:
    """Frame encoded spans as a request."""
    return resource_frame(resource, scope_frame(scope, b"".join(map(item_frame, spans))))


def encoded(name: str = "work", **fields: object) -> bytes:
    return span(name=name, **fields).SerializeToString()


def names(batch: RowBatch) -> list[str]:
    return [read(columns().spans, data)["name"] for data in batch.rows]


def test_invalid_utf8_in_one_span_repairs_that_span_alone() -> None:
    bad = encoded(f"b{MARK.decode()}d").replace(MARK, b"\xff\xc3\x28\xe2")
    batch = traces(request_of(encoded("a"), bad, encoded("c")))

    assert names(batch) == ["a", "b\ufffd\ufffd(\ufffdd", "c"]
    assert [row(batch, index)["anomalies"] for index in range(3)] == [0, Anomaly.INVALID_UTF8, 0]
    assert batch.repairs == {Anomaly.INVALID_UTF8: 1}


def test_invalid_utf8_deep_inside_a_value_is_repaired() -> None:
    value = nested(29)
    inner = value
    for _ in range(29):
        inner = inner.kvlist_value.values[0].value
    inner.string_value = MARK.decode()
    bad = span(name="deep")
    bad.attributes.add(key=MARK.decode()).value.CopyFrom(value)
    batch = traces(request_of(bad.SerializeToString().replace(MARK, b"\xf0\x9f\x98x")))

    (key,) = row(batch)["attributes"]
    assert key == "\ufffdx"
    assert row(batch)["anomalies"] == Anomaly.INVALID_UTF8


@pytest.mark.parametrize("part", ["resource", "scope"])
def test_invalid_utf8_in_a_resource_or_scope_marks_all_its_items(part: str) -> None:
    request = ExportTraceServiceRequest()
    for name in ("x", MARK.decode()):
        group = request.resource_spans.add()
        scope = group.scope_spans.add()
        if part == "resource":
            group.resource.attributes.add(key="service.name").value.string_value = name
        else:
            scope.scope.name = name
        scope.spans.extend([span(), span()])
    batch = traces(request.SerializeToString().replace(MARK, b"\xff\xff\xff\xff"))

    marks = [row(batch, index)["anomalies"] for index in range(4)]
    assert marks == [0, 0, Anomaly.INVALID_UTF8, Anomaly.INVALID_UTF8]
    column = "service_name" if part == "resource" else "scope_name"
    assert row(batch, 3)[column] == "\ufffd" * 4


def with_attribute(value: AnyValue) -> bytes:
    """Encode a span around a value that protobuf could serialize, but never parse."""
    pair = delimited(1, b"k") + delimited(2, value.SerializeToString())
    return encoded("deep") + delimited(Span.ATTRIBUTES_FIELD_NUMBER, pair)


def kvlists(levels: int) -> bytes:
    """Encode so many kvlists inside each other, inmost first."""
    value = b"\x18\x07"
    for _ in range(levels):
        value = delimited(6, delimited(1, delimited(1, b"k") + delimited(2, value)))
    return value


def test_thirty_nested_kvlists_arrive_exactly() -> None:
    stored = row(traces(request_of(with_attribute(nested(30)))))

    value = stored["attributes"]
    for _ in range(31):
        value = value["k"]
    assert value == 7


@pytest.mark.parametrize("levels", [32, 100, 10_000])
def test_deeper_nesting_is_refused_alone(levels: int) -> None:
    bad = encoded("b") + delimited(9, delimited(1, b"k") + delimited(2, kvlists(levels)))
    batch = traces(request_of(encoded("a"), bad, encoded("c")))

    assert names(batch) == ["a", "c"]
    assert batch.items == [0, 2]
    assert [(item.item, item.reason) for item in batch.rejected] == [
        (1, "not decodable: messages nest deeper than 100 levels")
    ]
    assert batch.repairs == {}


def test_a_refused_item_can_be_cut_out_as_it_came() -> None:
    bad = encoded("b") + b"\xff"
    batch = traces(request_of(encoded("a"), bad, resource=b"\x1a\x01u", scope=b"\x1a\x01v"))

    assert batch.otlp(1) == request_of(bad, resource=b"\x1a\x01u", scope=b"\x1a\x01v")
    assert batch.rejected[0].reason.startswith("not decodable: ")


def test_a_broken_resource_refuses_its_own_items_alone() -> None:
    resource = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, kvlists(10_000))))
    broken = request_of(encoded("a"), encoded("b"), resource=resource)
    batch = traces(broken + request_of(encoded("c")))

    assert names(batch) == ["c"]
    assert batch.items == [2]
    assert [item.item for item in batch.rejected] == [0, 1]
    assert batch.rejected[0].reason.startswith("its resource is not decodable: ")


def test_a_broken_scope_refuses_its_own_items_alone() -> None:
    broken = scope_frame(delimited(1, b"\xff"), item_frame(encoded("a")))
    good = scope_frame(b"", item_frame(encoded("b")))
    batch = traces(resource_frame(b"", broken + good))

    assert names(batch) == ["b"]
    assert [(item.item, item.reason.split(":")[0]) for item in batch.rejected] == [(0, "its scope is not decodable")]


def test_log_records_are_salvaged_alike() -> None:
    body = log_request(LogRecord(severity_text=MARK.decode()), LogRecord(severity_text="ok")).SerializeToString()
    batch = transcode(plan(Signal.LOGS), body.replace(MARK, b"\xff\xff\xff\xff"), now_ns=NOW)

    assert [row(batch, index)["severity_text"] for index in range(2)] == ["\ufffd" * 4, "ok"]
    assert resource_row(batch)["service_name"] == "shop"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xff", id="no end of a number"),
        pytest.param(b"hello, world", id="text"),
        pytest.param(request_of(encoded())[:-1], id="cut off"),
        pytest.param(b"\x00\x00", id="field number 0"),
        pytest.param(b"\x0f", id="wire type 7"),
        pytest.param(b"\x0c", id="end of a group that is not open"),
        pytest.param(b"\x0b" * 1_000, id="groups that never end"),
        pytest.param(b"\x0a" + b"\xff" * 9 + b"\x7f", id="a length of 2^70"),
        pytest.param(b"\xff" * 10_000, id="many 0xff"),
    ],
)
def test_what_cannot_be_split_into_items_is_undecodable(body: bytes) -> None:
    with pytest.raises(UndecodableError, match=f"the body of {len(body):,} bytes is not OTLP"):
        traces(body)


@pytest.mark.parametrize("unknown", [b"\x7b\x08\x01\x7c", b"\x78\x05", b"\x79" + bytes(8), b"\x7d" + bytes(4)])
def test_unknown_fields_of_every_wire_type_are_skipped(unknown: bytes) -> None:
    bad = encoded(MARK.decode()).replace(MARK, b"\xff\xff\xff\xff")
    batch = traces(unknown + request_of(bad + unknown, encoded("b"), resource=unknown, scope=unknown))

    assert names(batch) == ["\ufffd" * 4, "b"]


@given(st.lists(st.binary(max_size=60) | st.just(None), max_size=6))
@example([None, b"\x0b\x0b", b"\x2a\x01\xff", None])
def test_accepted_and_rejected_are_all_that_was_sent(spans: list[bytes | None]) -> None:
    batch = traces(request_of(*[encoded() if data is None else encoded() + data for data in spans]))

    assert sorted([*batch.items, *[rejection.item for rejection in batch.rejected]]) == list(range(len(spans)))
    assert all(rejection.reason for rejection in batch.rejected)
    whole = {index for index, data in enumerate(spans) if data is None}
    assert whole <= set(batch.items)


@given(st.sampled_from(list(Signal)), st.randoms(use_true_random=False), st.integers(1, 8))
def test_mutated_bytes_raise_nothing_but_undecodable(signal: Signal, chance: random.Random, mutations: int) -> None:
    data = bytearray(full(signal).SerializeToString() * 2)
    for _ in range(mutations):
        where = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[where] = chance.randrange(256)
            case 1:
                del data[where : where + chance.randrange(1, 5)]
            case _:
                data[where:where] = chance.randbytes(chance.randrange(1, 5))
    with contextlib.suppress(UndecodableError):
        batch = transcode(plan(signal), bytes(data), now_ns=NOW)
        for index in range(batch.item_count):
            assert transcode(plan(signal), batch.otlp(index), now_ns=NOW).item_count == 1


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_undecodable(data: bytes) -> None:
    for signal in Signal:
        with contextlib.suppress(UndecodableError):
            transcode(plan(signal), data, now_ns=NOW)


def test_ten_thousand_spans_around_a_bad_one_and_a_large_resource_are_salvaged() -> None:
    large = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, delimited(1, b"x" * 1_000_000))))
    spans = [encoded()] * 10_000
    batch = traces(request_of(*spans, encoded("b") + b"\xff", resource=large))

    assert len(batch.rows) == 10_000
    assert [rejection.item for rejection in batch.rejected] == [10_000]
