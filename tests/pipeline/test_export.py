"""Exports wait for their commit, give up in time, and count every item once."""

from collections.abc import Callable

import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import DatabaseUnavailableError, OverloadedError, UndecodableError
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.batcher import Answer
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts
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
    export, counters = answering(lambda answer: answer.set_result(outcome))
    assert export(Signal.TRACES, _BODY) == outcome
    assert counters.snapshot() == ItemCounts(received=2, stored=1, rejected=1)


def test_an_export_that_is_not_committed_in_time_is_given_up() -> None:
    waiting: list[Answer] = []
    export, counters = answering(waiting.append)
    with pytest.raises(DatabaseUnavailableError, match=r"did not commit within 0\.05 seconds"):
        export(Signal.TRACES, _BODY)
    assert waiting[0].cancelled()
    assert counters.snapshot() == ItemCounts(received=2, refused=2)


def test_a_refused_export_is_settled_once() -> None:
    export, counters = answering(lambda answer: answer.set_exception(OverloadedError("full")))
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
    export, counters = answering(lambda answer: answer.set_result(Outcome()))
    with pytest.raises(UndecodableError):
        export(Signal.TRACES, b"\xff\xff\xff")
    assert counters.snapshot() == ItemCounts()
