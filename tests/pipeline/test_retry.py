import threading

from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.pipeline.retry import Backoff


class RecordingEvent(threading.Event):
    """Notes how long it was asked to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        return self.is_set()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_each_pause_is_drawn_from_zero_to_a_limit_that_doubles_up_to_the_ceiling(draws: list[float]) -> None:
    stop = RecordingEvent()
    drawn = iter(draws)
    backoff = Backoff(stop, initial=0.1, ceiling=1.5, uniform=lambda low, high: low + next(drawn) * (high - low))
    for _ in draws:
        assert backoff.wait()
    limits = [min(0.1 * 2**attempt, 1.5) for attempt in range(len(draws))]
    assert stop.pauses == [draw * limit for draw, limit in zip(draws, limits, strict=True)]


def test_a_pause_that_would_end_after_the_deadline_is_not_begun() -> None:
    stop = RecordingEvent()
    backoff = Backoff(stop, initial=1.0, clock=lambda: 100.0, uniform=lambda low, high: high)
    assert not backoff.wait(deadline=101.0)
    assert stop.pauses == []


def test_a_stop_interrupts_the_pause_and_ends_the_attempts() -> None:
    stop = threading.Event()
    backoff = Backoff(stop, initial=3600.0, uniform=lambda low, high: high)
    threading.Timer(0.05, stop.set).start()
    assert not backoff.wait()
