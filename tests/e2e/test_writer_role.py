"""The whole of ingest as the role that docs/how-to/roles.md makes for it, to add rows and read next to nothing."""

import time
from collections.abc import Iterator

import psycopg
import pytest

from otel_pg_exporter.model import Signal
from tests.e2e.support import OK, Receiver, receiving
from tests.support import as_role
from tests.workload import log_body, record, span, trace_body


@pytest.fixture
def receiver(granted: str) -> Iterator[Receiver]:
    with receiving(as_role("otel_writer", granted), read_dsn=granted) as running:
        yield running


def test_the_receiver_writes_as_the_role_that_it_is_given(receiver: Receiver) -> None:
    with psycopg.connect(receiver.service.dsn) as connection:
        assert connection.info.user == "otel_writer"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT attributes FROM otel.spans")


def test_spans_and_log_records_of_any_day_are_stored(receiver: Receiver) -> None:
    days = [time.time_ns() - day * 86_400 * 10**9 for day in (0, 3, 20)]
    spans = [span(number, start=start) for number, start in enumerate([*days, 1])]
    assert receiver.send(Signal.TRACES, trace_body(spans)) == OK
    assert receiver.send(Signal.LOGS, log_body([record("hello"), record("world")])) == OK
    assert receiver.database.rows("SELECT count(*), count(DISTINCT tableoid) FROM spans") == [(4, 4)]
    assert receiver.database.count("logs") == 2
    assert receiver.database.count("resources") == 1
    receiver.database.assert_traces_exact()


@pytest.mark.parametrize("signal", list(Signal))
def test_duplicates_are_stored_once(receiver: Receiver, signal: Signal) -> None:
    spans = [span(number, start=time.time_ns() - number * 1000) for number in range(60)]
    bodies = {
        Signal.TRACES: trace_body(spans[:50]),
        Signal.LOGS: log_body([record(f"line {number}") for number in range(50)]),
    }
    for _ in range(3):
        assert receiver.send(signal, bodies[signal]) == OK
    if signal is Signal.TRACES:  # old and new ones in one request
        assert receiver.send(signal, trace_body(spans[40:])) == OK
    counts = receiver.service.counts()
    assert receiver.database.count(signal.table) == counts.stored
    assert (counts.stored, counts.duplicate) == ((60, 110) if signal is Signal.TRACES else (50, 100))
    receiver.database.assert_traces_exact()


@pytest.mark.parametrize("signal", list(Signal))
def test_bad_items_among_duplicates_are_isolated_and_kept(receiver: Receiver, signal: Signal) -> None:
    receiver.database.execute(
        "ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')",
        "ALTER TABLE logs ADD CONSTRAINT no_poison CHECK (body <> 'poison')",
    )
    if signal is Signal.TRACES:
        spans = [span(number, start=time.time_ns() - number * 1000) for number in range(500)]
        assert receiver.send(signal, trace_body(spans[:50])) == OK
        spans[400].name = spans[60].name = "poison"
        body = trace_body(spans)
    else:
        body = log_body([record("poison" if number in {60, 400} else f"line {number}") for number in range(500)])
    answer = receiver.send(signal, body)
    assert answer[0] == 2
    assert receiver.database.count(signal.table) == 498
    assert receiver.database.rows("SELECT item_index, sqlstate FROM dead_letters ORDER BY item_index") == [
        (60, "23514"),
        (400, "23514"),
    ]
    assert receiver.send(signal, body) == answer
    assert receiver.database.count("dead_letters") == 2
    receiver.database.assert_traces_exact()
