"""Exports wait for their commit, give up in time, and count every item once."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import DatabaseUnavailableError, OverloadedError, UndecodableError
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.answer import Answer
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts, Repeated, Statistics, uncounted
from otel_pg_exporter.transcode import compile_plan
from tests.workload import span, trace_body

_PLANS = {signal: compile_plan(mapping.load(), signal, Window()) for signal in Signal}
_BODY = trace_body([span(0), span(1)])


def answering(settle: Callable[[Answer], None]) -> tuple[Export, ItemCounters]:
    counters = ItemCounters()

    def submit(_batch: RowBatch) -> Answer:
        answer = Answer()
        settle(answer)
        return answer

    return Export(_PLANS, submit, counters, ack_timeout=0.05, availability=Availability()), counters


def test_an_export_returns_what_was_committed() -> None:
    outcome = Outcome(stored=1, rejected=1, error_message="why")
    export, counters = answering(lambda answer: answer.settle(outcome))
    assert export(Signal.TRACES, _BODY) == outcome
    assert counters.snapshot() == ItemCounts(received=2, stored=1, rejected=1)


def test_an_export_that_is_not_committed_in_time_is_given_up() -> None:
    waiting: list[Answer] = []
    export, counters = answering(waiting.append)
    with pytest.raises(DatabaseUnavailableError, match=r"did not commit within 0\.05 seconds"):
        export(Signal.TRACES, _BODY)
    assert waiting[0].cancelled
    assert counters.snapshot() == ItemCounts(received=2, refused=2)


def test_a_refused_export_is_settled_once() -> None:
    export, counters = answering(lambda answer: answer.settle(OverloadedError("full")))
    with pytest.raises(OverloadedError):
        export(Signal.TRACES, _BODY)
    assert counters.snapshot() == ItemCounts(received=2, refused=2)


def test_an_empty_request_needs_no_database() -> None:
    def never(_answer: Answer) -> None:
        raise AssertionError

    export, counters = answering(never)
    assert export(Signal.LOGS, b"") == Outcome()
    assert counters.snapshot() == ItemCounts()


def test_a_body_that_is_not_otlp_is_refused() -> None:
    export, counters = answering(lambda answer: answer.settle(Outcome()))
    with pytest.raises(UndecodableError):
        export(Signal.TRACES, b"\xff\xff\xff")
    assert counters.snapshot() == ItemCounts()


def test_a_request_that_fails_unexpectedly_is_settled_too() -> None:
    export, counters = answering(lambda answer: answer.settle(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        export(Signal.TRACES, _BODY)
    assert counters.snapshot() == ItemCounts(received=2, refused=2)


class Room:
    """A `Hold` whose end can be seen."""

    def __call__(self, _size: int) -> None:
        """Have as much room as it takes."""


def test_a_request_that_fails_leaves_nothing_that_only_a_garbage_collection_frees() -> None:
    export, _ = answering(lambda answer: answer.settle(OverloadedError("shutting down")))
    room = Room()
    left = weakref.ref(room)
    gc.disable()
    try:
        with pytest.raises(OverloadedError):
            export(Signal.TRACES, _BODY, room)
        del room
        assert left() is None
    finally:
        gc.enable()


def spooling(
    folder: Path, settle: Callable[[Answer], None], *, max_bytes: int = 2**20, repeated: Repeated = uncounted
) -> tuple[Export, ItemCounters, Availability, Spool]:
    counters, availability = ItemCounters(), Availability()
    spool = Spool(folder, max_bytes=max_bytes)

    def submit(_batch: RowBatch) -> Answer:
        answer = Answer()
        settle(answer)
        return answer

    export = Export(
        _PLANS, submit, counters, ack_timeout=0.05, availability=availability, spool=spool, repeated=repeated
    )
    return export, counters, availability, spool


def test_what_is_not_committed_in_time_is_spooled_and_the_next_at_once(tmp_path: Path) -> None:
    waiting: list[Answer] = []
    export, counters, availability, spool = spooling(tmp_path, waiting.append)
    assert export(Signal.TRACES, _BODY) == Outcome(spooled=2)
    assert availability.is_down(Signal.TRACES)
    assert not availability.is_down(Signal.LOGS)
    assert export(Signal.TRACES, trace_body([span(7)])) == Outcome(spooled=1)
    assert len(waiting) == 1
    assert counters.snapshot() == ItemCounts(received=3, in_spool=3, spooled=3)
    spool.close()


def test_a_retry_of_what_is_in_the_spool_is_a_duplicate(tmp_path: Path) -> None:
    export, counters, _, spool = spooling(tmp_path, lambda _: None)
    assert [export(Signal.TRACES, _BODY) for _ in range(3)] == [
        Outcome(spooled=2),
        Outcome(duplicate=2),
        Outcome(duplicate=2),
    ]
    assert counters.snapshot() == ItemCounts(received=6, duplicate=4, in_spool=2, spooled=2)
    assert spool.level.requests == 1
    spool.close()


def test_items_that_were_refused_at_the_door_are_named_although_the_rest_is_spooled(tmp_path: Path) -> None:
    export, counters, _, spool = spooling(tmp_path, lambda _: None)
    bad = span(1)
    bad.span_id = b"short"
    outcome = export(Signal.TRACES, trace_body([span(0), bad]))
    assert (outcome.spooled, outcome.rejected) == (2, 1)
    assert "1 of 2 spans refused: item 1" in outcome.error_message
    assert counters.snapshot() == ItemCounts(received=2, in_spool=2, spooled=2)  # rejected when it is drained
    spool.close()


def test_what_a_retry_of_a_spooled_request_hears_to_be_rejected_has_a_reason_in_the_counts(tmp_path: Path) -> None:
    statistics = Statistics()
    export, counters, _, spool = spooling(tmp_path, lambda _: None, repeated=statistics.repeated)
    bad = span(1)
    bad.span_id = b"short"
    body = trace_body([span(0), bad])
    first, again = export(Signal.TRACES, body), export(Signal.TRACES, body)
    assert again == replace(first, spooled=0, duplicate=1)
    assert counters.snapshot().rejected == 1
    assert statistics.snapshot().rejections == {"repeated": 1}
    spool.close()


@pytest.mark.parametrize("written", [False, True])
def test_a_request_is_spooled_in_doubt_if_it_was_being_written(tmp_path: Path, written: bool) -> None:
    def settle(answer: Answer) -> None:
        answer.being_written = written

    export, _, _, spool = spooling(tmp_path, settle)
    export(Signal.TRACES, _BODY)
    [stored] = spool.following(0)
    assert (stored.in_doubt_since is not None) is written
    spool.close()


def test_with_a_full_spool_postgresql_is_tried_all_the_same(tmp_path: Path) -> None:
    away = threading.Event()
    away.set()

    def settle(answer: Answer) -> None:
        if not away.is_set():
            answer.settle(Outcome(stored=2))

    export, counters, availability, spool = spooling(tmp_path, settle, max_bytes=1)
    with pytest.raises(OverloadedError, match="the spool is full: 0 of 1 bytes; 2 items refused"):
        export(Signal.TRACES, _BODY)
    assert availability.is_down(Signal.TRACES)
    away.clear()
    assert export(Signal.TRACES, _BODY) == Outcome(stored=2)
    assert counters.snapshot() == ItemCounts(received=4, stored=2, refused=2)
    spool.close()
