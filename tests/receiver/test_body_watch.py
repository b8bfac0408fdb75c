from contextlib import ExitStack

from otel_pg_exporter.receiver.body_watch import BodyWatch, resident_bytes


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
    bodies = BodyWatch(10, memory_limit=2**40, clock=clock)
    early, done, late = Call(), Call(), Call()
    with bodies.watch(early):
        with bodies.watch(done):
            pass
        clock.now = 5
        with bodies.watch(late):
            clock.now = 9
            assert bodies.cancel_overdue() == 0
            clock.now = 10
            assert bodies.cancel_overdue() == 1
            assert bodies.cancel_overdue() == 0
            clock.now = 15
            assert bodies.cancel_overdue() == 1
    assert (early.cancelled, done.cancelled, late.cancelled) == (1, 0, 1)


def test_when_memory_is_short_all_but_the_oldest_four_are_given_up() -> None:
    clock = Clock()
    resident = 100
    bodies = BodyWatch(10, memory_limit=100, clock=clock, memory=lambda: resident)
    calls = [Call() for _ in range(10)]
    with ExitStack() as reading:
        for call in calls:
            clock.now += 1
            reading.enter_context(bodies.watch(call))
        assert bodies.cancel_overdue() == 0
        resident = 101
        assert bodies.cancel_overdue() == 5  # the newest may be there at once
        assert [call.cancelled for call in calls] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
        clock.now += 0.1
        assert bodies.cancel_overdue() == 1
        assert bodies.cancel_overdue() == 0


def test_a_body_that_stalls_is_told_of_once_and_never_when_it_is_there() -> None:
    clock = Clock()
    bodies = BodyWatch(10, memory_limit=2**40, clock=clock)
    told: list[str] = []
    with bodies.watch(Call(), lambda: told.append("stalled")):
        bodies.cancel_overdue()
        assert told == []
        clock.now = 1
        bodies.cancel_overdue()
        bodies.cancel_overdue()
        assert told == ["stalled"]
    with bodies.watch(Call(), lambda: told.append("there")):
        pass
    clock.now = 5
    bodies.cancel_overdue()
    assert told == ["stalled"]


def test_the_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = b"x" * (100 * 2**20)
    assert resident_bytes() - before > 90 * 2**20
    del held


def test_stopping_is_harmless_before_the_start_and_twice() -> None:
    BodyWatch(10, memory_limit=1).stop()
    bodies = BodyWatch(10, memory_limit=1)
    bodies.start()
    bodies.stop()
    bodies.stop()
