from otel_pg_exporter.receiver.body_deadline import BodyDeadline


class Call:
    def __init__(self) -> None:
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_calls_that_are_still_reading_after_their_time_are_cancelled_and_once() -> None:
    clock = Clock()
    deadline = BodyDeadline(10, clock)
    early, done, late = Call(), Call(), Call()
    with deadline.watch(early):
        with deadline.watch(done):
            pass
        clock.now = 5
        with deadline.watch(late):
            clock.now = 9
            assert deadline.cancel_overdue() == 0
            clock.now = 10
            assert deadline.cancel_overdue() == 1
            assert deadline.cancel_overdue() == 0
            clock.now = 15
            assert deadline.cancel_overdue() == 1
    assert (early.cancelled, done.cancelled, late.cancelled) == (1, 0, 1)


def test_stopping_is_harmless_before_the_start_and_twice() -> None:
    BodyDeadline(10).stop()
    deadline = BodyDeadline(10)
    deadline.start()
    deadline.stop()
    deadline.stop()
