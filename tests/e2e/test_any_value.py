"""Any value, through the socket into PostgreSQL and back; any damage to items, counted to the last one."""

import hashlib
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter.model import Signal
from tests.e2e.support import OK, Receiver
from tests.e2e.values import keys, normalised, normalised_pairs, same, trees
from tests.e2e.wire import enclosed
from tests.workload import log_body, record, span, trace_body

# Many values travel in one request, so that an example costs one round trip to PostgreSQL.
_THOROUGH = settings(max_examples=60)


def test_any_attributes_of_a_span_come_back_equal(receiver: Receiver) -> None:
    @given(st.lists(st.lists(st.builds(KeyValue, key=keys, value=trees), max_size=3), min_size=1, max_size=12))
    @_THOROUGH
    def check(lists: list[list[KeyValue]]) -> None:
        spans = [span(number, attributes={}) for number in range(len(lists))]
        for each, attributes in zip(spans, lists, strict=True):
            each.attributes.extend(attributes)
        receiver.database.execute("DELETE FROM spans", "DELETE FROM traces")
        assert receiver.send(Signal.TRACES, trace_body(spans)) == OK
        rows = receiver.database.rows("SELECT attributes FROM spans ORDER BY span_id")
        assert_same([stored or {} for (stored,) in rows], [normalised_pairs(each) for each in lists])

    check()


def test_any_body_of_a_log_record_comes_back_equal(receiver: Receiver) -> None:
    @given(st.lists(trees, min_size=1, max_size=25))
    @_THOROUGH
    def check(bodies: list[AnyValue]) -> None:
        now = time.time_ns()
        records = [LogRecord(time_unix_nano=now + number * 1000, body=body) for number, body in enumerate(bodies)]
        receiver.database.execute("DELETE FROM logs")
        assert receiver.send(Signal.LOGS, log_body(records)) == OK
        rows = receiver.database.rows("SELECT body, body_json FROM logs ORDER BY time")
        for (text, _), body in zip(rows, bodies, strict=True):
            assert (text is not None) == body.HasField("string_value")
        assert_same([document if text is None else text for text, document in rows], [normalised(b) for b in bodies])

    check()


def assert_same(stored: list[Any], expected: list[Any]) -> None:
    assert len(stored) == len(expected)
    for each, other in zip(stored, expected, strict=True):
        assert same(each, other), f"{each!r} is not {other!r}"


# What happens to the bytes of one item: (position, replacement) of each damage, both taken modulo its length and 256.
damages = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)


def damaged(item: bytes, damage: list[tuple[int, int]]) -> bytes:
    changed = bytearray(item)
    for position, value in damage:
        changed[position % len(changed)] = value
    return bytes(changed)


def test_of_a_request_with_damaged_spans_each_one_is_stored_or_refused_with_a_dead_letter(receiver: Receiver) -> None:
    @given(st.lists(damages, min_size=1, max_size=20))
    @_THOROUGH
    def check(plan: list[list[tuple[int, int]]]) -> None:
        items = []
        for number, damage in enumerate(plan):
            sound = span(number, attributes={"key": "v\u00e4lue", "number": number})
            sound.trace_id, sound.span_id = scattered(number, 16), scattered(number, 8)
            sound.events.add(name="event", time_unix_nano=1).attributes.add(key="k").value.double_value = 2.5
            items.append(damaged(sound.SerializeToString(), damage))
        assert_adds_up(receiver, Signal.TRACES, enclosed(items), len(items))
        receiver.database.assert_traces_exact()

    check()


def test_of_a_request_with_damaged_log_records_each_one_is_stored_or_refused_with_a_dead_letter(
    receiver: Receiver,
) -> None:
    @given(st.lists(damages, min_size=1, max_size=20))
    @_THOROUGH
    def check(plan: list[list[tuple[int, int]]]) -> None:
        sound = [record(f"l\u00efne {number}", event_name="event") for number in range(len(plan))]
        items = [damaged(each.SerializeToString(), damage) for each, damage in zip(sound, plan, strict=True)]
        assert_adds_up(receiver, Signal.LOGS, enclosed(items), len(items))

    check()


def scattered(number: int, size: int) -> bytes:
    """Make ids of which damage can hardly make others."""
    return hashlib.blake2b(number.to_bytes(4, "big"), digest_size=size).digest()


def assert_adds_up(receiver: Receiver, signal: Signal, body: bytes, sent: int) -> None:
    tables = ("spans", "traces", "logs", "ingest_requests", "dead_letters")
    receiver.database.execute(*(f"DELETE FROM {table}" for table in tables))
    answer = rejected, message = receiver.send(signal, body)
    assert bool(message) == bool(rejected)
    # A retry hears the same, and changes nothing.
    assert receiver.send(signal, body) == answer
    letters = receiver.database.rows(
        f"SELECT reason <> '', otlp, (SELECT count(*) FROM {signal.table}) FROM dead_letters"
        f" UNION ALL SELECT NULL, NULL, count(*) FROM {signal.table}"
    )
    assert letters.pop()[2] + rejected == sent
    assert [reason for reason, _, _ in letters] == [True] * rejected
    # What was refused once is refused again, alone: that is what the dead letter holds.
    for _, otlp, _ in letters[:2]:
        assert receiver.send(signal, otlp)[0] == 1
