"""An answer is settled or cancelled, whichever comes first, and keeps nothing that it need not."""

import gc
import threading
import weakref

import pytest

from otel_pg_exporter.errors import OverloadedError
from otel_pg_exporter.model import Outcome
from otel_pg_exporter.pipeline.answer import Answer


def test_an_outcome_wakes_who_waits_and_can_be_asked_for_again() -> None:
    answer = Answer()
    assert not answer.settled
    thread = threading.Thread(target=answer.settle, args=(Outcome(stored=3),))
    thread.start()
    assert answer.result(30) == answer.result(0) == Outcome(stored=3)
    assert answer.settled
    thread.join()


def test_who_waits_too_long_is_told_so() -> None:
    with pytest.raises(TimeoutError):
        Answer().result(0.01)


def test_an_outcome_stays_whatever_comes_later() -> None:
    answer = Answer()
    answer.settle(Outcome(stored=1))
    assert not answer.cancel()
    answer.settle(OverloadedError("too late"))
    assert answer.result() == Outcome(stored=1)
    assert not answer.cancelled


def test_a_cancelled_answer_is_forgotten_once_and_takes_no_outcome() -> None:
    forgotten: list[Answer] = []
    answer = Answer(forgotten.append)
    assert answer.cancel()
    assert answer.cancel()
    answer.settle(Outcome(stored=1))
    assert answer.cancelled
    assert not answer.settled
    assert forgotten == [answer]


def test_of_a_cancellation_and_an_outcome_at_the_same_time_exactly_one_wins() -> None:
    for _ in range(200):
        answer, start = Answer(), threading.Barrier(2)

        def settle(answer: Answer = answer, start: threading.Barrier = start) -> None:
            start.wait()
            answer.settle(Outcome(stored=1))

        thread = threading.Thread(target=settle)
        thread.start()
        start.wait()
        if not answer.cancel():
            assert answer.result(30) == Outcome(stored=1)
        thread.join()
        assert answer.settled != answer.cancelled


def test_an_error_that_is_raised_does_not_keep_its_answer() -> None:
    class Watched(Answer):
        __slots__ = ("__weakref__",)

    def ask() -> weakref.ref[Watched]:
        answer = Watched()
        answer.settle(OverloadedError("full"))
        kept = weakref.ref(answer)
        try:
            with pytest.raises(OverloadedError):
                answer.result()
        finally:
            del answer  # the error keeps this frame, too
        return kept

    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()
