"""What would cost too much to decode, decoding in pieces, and whose turn it is."""

import contextlib
import gc
import os
import threading
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter.errors import OverloadedError, TooLargeError, UndecodableError
from otel_pg_exporter.model import Anomaly, RowBatch, Signal
from otel_pg_exporter.transcode import rows, transcode
from otel_pg_exporter.transcode.limits import DECODING, Limits, Turns
from otel_pg_exporter.transcode.protobuf_wire import delimited
from tests.frames import item_frame, resource_frame, scope_frame
from tests.support import wait_until
from tests.transcode.cores import plain
from tests.transcode.support import NOW, log_request, plan, span, traces
from tests.transcode.test_every_field import full

EMPTY_ITEM = b"\x12\0"
EMPTY_ATTRIBUTE = b"\x4a\0"
EMPTY_EVENT = b"\x5a\0"


def request(*spans: bytes, resource: bytes = b"", scope: bytes = b"") -> bytes:
    return resource_frame(resource, scope_frame(scope, b"".join(map(item_frame, spans))))


def named(name: str = "work", **others: Any) -> bytes:  # noqa: ANN401 - protobuf's own
    return span(name=name, **others).SerializeToString()


def content(signal: Signal, body: bytes, limits: Limits) -> dict[str, Any] | str:
    """Transcode; return all that a batch holds, or what is said in place of it."""
    try:
        batch = transcode(plan(signal), body, now_ns=NOW, limits=limits)
    except (TooLargeError, UndecodableError) as exc:
        return str(exc)
    return {**plain(batch), "otlp": [batch.otlp(index) for index in range(batch.item_count)]}


ODD = [
    named("a"),
    named("ü" * 50),
    named("c", attributes=[{"key": "k", "value": {"string_value": "v" * 200}}]),
    b"",
    b"\xff",
    named("@@").replace(b"@@", b"\xff\xfe"),
    named("d") + b"\x7b\x08\x01\x7c",
]
UNKNOWN = [b"", b"\x18\x05", b"\x7b\x08\x01\x7c", b"\x1a\x03url", b"\x92\x00\x00"]
RESTS = [*UNKNOWN, b"\x0a\x02\x0a\x00", b"\x0a\x01\xff", delimited(1, delimited(1, delimited(1, b"\xff")))]

scopes = st.builds(
    lambda before, spans, between, rest, after: scope_frame(
        before, b"".join(map(item_frame, spans)) + between + b"".join(map(item_frame, rest)) + after
    ),
    st.sampled_from(RESTS),
    st.lists(st.sampled_from(ODD), max_size=6),
    st.sampled_from(UNKNOWN),
    st.lists(st.sampled_from(ODD), max_size=3),
    st.sampled_from(RESTS),
)
resources = st.builds(
    lambda before, inside, after: resource_frame(before, b"".join(inside) + after),
    st.sampled_from(RESTS),
    st.lists(scopes, max_size=3),
    st.sampled_from(RESTS),
)
bodies = st.lists(resources | st.sampled_from(UNKNOWN), max_size=4).map(b"".join)


@given(bodies, st.integers(0, 600))
def test_pieces_of_any_size_make_the_same_rows_as_the_whole(body: bytes, piece_bytes: int) -> None:
    whole = content(Signal.TRACES, body, Limits())

    assert content(Signal.TRACES, body, Limits(piece_bytes=piece_bytes)) == whole


@given(st.sampled_from(list(Signal)), st.integers(1, 5), st.integers(0, 3000), st.binary(max_size=40), st.data())
def test_pieces_of_broken_requests_make_the_same_rows_as_the_whole(
    signal: Signal, copies: int, piece_bytes: int, junk: bytes, data: st.DataObject
) -> None:
    body = full(signal).SerializeToString() * copies
    where = data.draw(st.integers(0, len(body)))
    body = body[:where] + junk + body[where + data.draw(st.integers(0, len(junk))) :]

    assert content(signal, body, Limits(piece_bytes=piece_bytes)) == content(signal, body, Limits(piece_bytes=2**20))


def test_thirty_two_million_empty_spans_are_refused_before_they_are_made() -> None:
    body = resource_frame(b"", scope_frame(b"", EMPTY_ITEM * 2**25))

    with pytest.raises(TooLargeError, match="more than 700,000 items, scopes and resources; send smaller requests"):
        traces(body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x0a\0" * 101, id="resources"),
        pytest.param(resource_frame(b"", b"\x12\0" * 100), id="scopes"),
        pytest.param(resource_frame(b"", scope_frame(b"", EMPTY_ITEM * 99)), id="items"),
        pytest.param(resource_frame(b"", scope_frame(b"\x18\x01" * 99)), id="unknown fields"),
    ],
)
def test_parts_of_every_kind_count(body: bytes) -> None:
    with pytest.raises(TooLargeError, match="more than 100 items"):
        transcode(plan(Signal.TRACES), body, now_ns=NOW, limits=Limits(piece_bytes=16, parts=100))
    transcode(plan(Signal.TRACES), body, now_ns=NOW, limits=Limits(piece_bytes=16, parts=101))


@pytest.mark.parametrize("many", [EMPTY_ATTRIBUTE, EMPTY_EVENT], ids=["attributes", "events"])
def test_a_span_of_millions_of_fields_is_refused_alone(many: bytes) -> None:
    batch = traces(request(named("a"), named("b") + many * 2**21, named("c")))

    assert batch.items == [0, 2]
    assert [rejection.reason for rejection in batch.rejected] == [
        "too large: more than 131,072 fields (attributes, events, links, and what they hold)"
    ]
    assert batch.rejected[0].kind == "limit"


def test_a_span_of_thirty_thousand_attributes_arrives() -> None:
    pairs = [{"key": f"key {number}", "value": {"int_value": number}} for number in range(30_000)]

    assert len(traces(request(named("a", attributes=pairs))).rows) == 1


def test_a_resource_of_millions_of_attributes_refuses_its_own_items_alone() -> None:
    resource = delimited(1, b"\x0a\0" * 2**20)
    batch = traces(request(named("a"), named("b"), resource=resource) + request(named("c")))

    assert batch.items == [2]
    assert {rejection.reason for rejection in batch.rejected} == {
        "its resource is too large: more than 131,072 fields (attributes, events, links, and what they hold)"
    }
    assert {rejection.kind for rejection in batch.rejected} == {"limit"}


def test_items_for_whose_rows_there_is_no_room_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_BATCH_BYTES", 10_000)
    body = request(*[named("x" * 1000)] * 20, b"\xff")
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW, limits=Limits(piece_bytes=0))

    assert 5 < len(batch.rows) < 10
    assert {rejection.reason for rejection in batch.rejected} == {
        "the rows of this request exceed 10,000 bytes; send smaller requests"
    }
    assert {rejection.kind for rejection in batch.rejected} == {"limit"}


def test_a_huge_resource_refuses_its_items() -> None:
    resource = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, delimited(1, b"x" * 2**22))))
    batch = traces(request(named("a"), resource=resource) + request(named("b")))

    assert batch.items == [1]
    assert [rejection.reason for rejection in batch.rejected] == [
        "its resource is too large: 4,194,327 bytes; at most 4,194,304 are allowed"
    ]


def test_a_scope_that_would_make_every_row_large_refuses_its_items_and_a_large_resource_does_not() -> None:
    large = delimited(1, delimited(1, b"x" * 2**20))
    resource = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, delimited(1, b"x" * 2**20))))
    batch = traces(request(named("a"), scope=large) + request(named("b"), resource=resource))

    assert batch.items == [1]
    assert [rejection.reason for rejection in batch.rejected] == [
        "its scope adds 1,048,628 bytes to every row; at most 1,048,576 are allowed"
    ]
    assert batch.rejected[0].kind == "limit"


@pytest.mark.parametrize(
    ("text", "size"),
    [("x" * 1000, 1_004), ("\x01" * 1000, 6_004), ("ü" * 500, 2_008), ("\U0001f600" * 250, 4_016)],
    ids=["ASCII", "control characters", "two bytes", "four bytes"],
)
def test_text_is_reckoned_as_python_holds_it(text: str, size: int) -> None:
    body = request(span(name=text, trace_id=b"", span_id=b"").SerializeToString() + b"\x1a\x04abcd")

    def reasons(text_bytes: int) -> list[str]:
        limits = Limits(piece_bytes=0, fields=10, text_bytes=text_bytes)
        return [
            rejection.reason for rejection in transcode(plan(Signal.TRACES), body, now_ns=NOW, limits=limits).rejected
        ]

    assert reasons(size) == ["trace_id is empty; span_id is empty"]
    assert reasons(size - 1) == [
        f"too large: its text takes {size:,} bytes once decoded; at most {size - 1:,} are allowed"
    ]


def test_a_huge_item_that_is_not_utf8_is_refused_and_a_smaller_one_repaired() -> None:
    body = request(named("@@" + "x" * 100).replace(b"@@", b"\xff\xff"))

    def transcoded(repair_bytes: int) -> RowBatch:
        return transcode(plan(Signal.TRACES), body, now_ns=NOW, limits=Limits(repair_bytes=repair_bytes))

    assert transcoded(1000).repairs == {Anomaly.INVALID_UTF8: 1}
    (rejection,) = transcoded(100).rejected
    assert rejection.reason.endswith("bytes are too many for a repair")


@pytest.mark.parametrize("signal", list(Signal))
def test_items_of_the_other_signal_are_refused_as_a_whole_with_a_hint(signal: Signal) -> None:
    other = next(each for each in Signal if each is not signal)
    service = "trace.v1.TraceService" if other is Signal.TRACES else "logs.v1.LogsService"
    hint = (
        f"the body holds {other.items}, not {signal.items}; send them to opentelemetry.proto.collector.{service}/Export"
    )

    with pytest.raises(UndecodableError, match=hint):
        transcode(plan(signal), full(other).SerializeToString(), now_ns=NOW)


def test_a_log_record_with_an_observed_time_alone_is_known_as_one() -> None:
    body = log_request(LogRecord(observed_time_unix_nano=NOW))

    with pytest.raises(UndecodableError, match="the body holds log records"):
        traces(body.SerializeToString())


def test_a_span_with_one_field_of_the_wrong_type_is_no_log_record() -> None:
    wrong = b"\x09" + bytes(8) + span(trace_id=b"").SerializeToString()
    batch = traces(request(wrong, named("a")))

    assert batch.items == [1]
    assert [rejection.reason for rejection in batch.rejected] == ["trace_id is empty"]


def test_hold_is_told_of_every_mebibyte_and_of_the_end() -> None:
    told: list[int] = []
    body = request(*[named(f"{number}" * 100, span_id=number.to_bytes(8, "big")) for number in range(1, 5000)])
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW, hold=told.append)

    assert told[-1] == batch.size
    steps = [second - first for first, second in zip([len(body), *told], told, strict=False)]
    assert all(2**20 <= step < 2**21 for step in steps[:-1])


def test_refused_items_are_held_too_and_share_their_reason() -> None:
    told: list[int] = []
    body = resource_frame(b"", scope_frame(b"", EMPTY_ITEM * 100_000))
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW, hold=told.append)

    assert told[0] > 2**20
    assert len(told) > 1
    assert len({id(rejection.reason) for rejection in batch.rejected}) == 1


def test_what_hold_raises_ends_the_request_and_the_turn() -> None:
    def refuse(_size: int) -> None:
        raise OverloadedError("full")

    with pytest.raises(OverloadedError):
        transcode(plan(Signal.TRACES), request(*[named("x" * 1000)] * 2000), now_ns=NOW, hold=refuse)
    assert len(traces(request(named("a"))).rows) == 1


def test_dead_letters_repeat_a_large_resource_only_so_often() -> None:
    resource = delimited(1, delimited(1, delimited(1, b"k") + delimited(2, delimited(1, b"x" * 2**20))))
    batch = traces(request(*[b""] * 100, resource=resource))

    for _ in range(2):  # a transaction that is tried again writes the same
        sizes = [len(batch.otlp(index)) for index in range(100)]
        assert sum(sizes) < 64 * 2**20 + 100 * 10
        assert [size > 2**20 for size in sizes] == [True] * 63 + [False] * 37
    assert len(batch.otlp(99)) > 2**20


def test_a_batch_keeps_what_counts_it_and_nothing_that_only_a_garbage_collection_frees() -> None:
    class Held:
        def __call__(self, size: int) -> None: ...

    held = Held()
    kept = weakref.ref(held)
    batch = transcode(plan(Signal.TRACES), request(named("a"), b"", b""), now_ns=NOW, hold=held)
    batch.otlp(1)
    del held
    assert kept() is not None
    gc.disable()
    try:
        del batch
        assert kept() is None
    finally:
        gc.enable()


def test_turns_go_to_who_came_first() -> None:
    turns = Turns()
    order: list[int] = []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda count=number + 1: len(turns._waiting) == count)  # type: ignore[misc] # a default binds it
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    with turns:
        assert not turns._waiting


def test_a_turn_ends_with_an_error() -> None:
    turns = Turns()
    with contextlib.suppress(ValueError), turns:
        raise ValueError
    with turns:
        pass


def test_a_forked_child_can_decode_although_its_parent_was_at_it() -> None:
    with DECODING:
        child = os.fork()
        if child == 0:
            os._exit(0 if len(traces(request(named("a"))).rows) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_item_that_looks_like_the_other_signal_s_costs_no_other() -> None:
    odd = b"\x10\x01"  # field 2 as a number: a severity
    for items in ((odd, named()), (named(), odd)):
        batch = traces(request(*items))
        assert (len(batch.rows), len(batch.rejected)) == (1, 1)
