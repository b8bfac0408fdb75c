import logging
import os

import pytest

from otel_pg_exporter.errors import ExporterError, InternalError, RetryableError
from otel_pg_exporter.receiver.unexpected import UnexpectedErrors


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def judge(unexpected: UnexpectedErrors, body: bytes | None, key: str = "a secret") -> ExporterError:
    with pytest.raises(KeyError) as info:
        os.environ[key]
    return unexpected.judge(info.value, body)


def test_the_third_failure_of_the_same_body_is_final_and_other_bodies_keep_their_chances() -> None:
    unexpected = UnexpectedErrors()
    assert isinstance(judge(unexpected, b"poison"), RetryableError)
    assert isinstance(judge(unexpected, b"other"), RetryableError)
    assert isinstance(judge(unexpected, b"poison"), RetryableError)
    final = judge(unexpected, b"poison")
    assert isinstance(final, InternalError)
    assert "this request of 6 bytes has now failed 3 times" in str(final)
    assert isinstance(judge(unexpected, b"other"), RetryableError)


def test_a_failure_before_the_body_was_read_always_asks_for_a_retry() -> None:
    unexpected = UnexpectedErrors()
    assert all(isinstance(judge(unexpected, None), RetryableError) for _ in range(10))


def test_the_sender_hears_the_class_of_the_exception_and_nothing_else_of_it() -> None:
    unexpected = UnexpectedErrors()
    answers = [str(judge(unexpected, b"x")) for _ in range(3)]
    assert all("KeyError" in answer and "a secret" not in answer for answer in answers)


def test_one_stack_trace_a_minute_and_kind_is_logged_with_the_number_of_those_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    unexpected = UnexpectedErrors(clock)
    with caplog.at_level(logging.ERROR):
        for number in range(5):
            judge(unexpected, None, f"message {number}")
        clock.now += 60
        judge(unexpected, None)
        unexpected.judge(ValueError("never raised"), None)
    said = "unexpected error in an export call"
    assert caplog.messages == [said, f"{said} (4 more like this since)", said]
    assert "message 0" in caplog.text
    assert "Traceback" in caplog.text


def test_what_is_remembered_of_failing_bodies_is_bounded() -> None:
    unexpected = UnexpectedErrors()
    for number in range(2_000):
        judge(unexpected, b"%d" % number)
    assert len(unexpected._failures) == 1_024
