import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from otel_pg_exporter.errors import OverloadedError
from otel_pg_exporter.pipeline.admission import ByteBudget, CallGate, Reservation, SenderEstimates, SizeEstimate
from tests.support import wait_until

LIMIT = 1_000
SIZES = st.integers(min_value=0, max_value=LIMIT + 10)


class BudgetMachine(RuleBasedStateMachine):
    """Any order of reservations, corrections and releases, held against a dict of what each should hold."""

    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.budget = ByteBudget(LIMIT)
        self.held: dict[Reservation, int] = {}

    @rule(target=reservations, size=SIZES)
    def reserve(self, size: int) -> object:
        free = LIMIT - sum(self.held.values())
        if size > free:
            with pytest.raises(OverloadedError):
                self.budget.reserve(size)
            return multiple()
        reservation = self.budget.reserve(size)
        self.held[reservation] = size
        return reservation

    @rule(reservation=reservations, size=SIZES)
    def correct(self, reservation: Reservation, size: int) -> None:
        if reservation not in self.held:
            with pytest.raises(RuntimeError, match="already released"):
                reservation.correct(size)
        elif size - self.held[reservation] > LIMIT - sum(self.held.values()):
            with pytest.raises(OverloadedError):
                reservation.correct(size)
            del self.held[reservation]
        else:
            reservation.correct(size)
            self.held[reservation] = size

    @rule(reservation=reservations)
    def release_and_keep_the_object(self, reservation: Reservation) -> None:
        reservation.release()
        self.held.pop(reservation, None)

    @rule(reservation=consumes(reservations), fails=st.booleans())
    def leave_a_with_block(self, reservation: Reservation, fails: bool) -> None:
        with contextlib.suppress(KeyError), reservation:
            if fails:
                raise KeyError
        self.held.pop(reservation, None)

    @invariant()
    def level_is_what_the_reservations_hold(self) -> None:
        assert self.budget.level == sum(self.held.values())
        assert 0 <= self.budget.level <= LIMIT
        assert all(reservation.size == size for reservation, size in self.held.items())


TestAnyOrderOfReservationsLeavesTheLevelExact = BudgetMachine.TestCase


def test_a_full_budget_says_how_many_bytes_of_how_many_are_in_use() -> None:
    budget = ByteBudget(268_435_456)
    budget.reserve(268_000_000)
    with pytest.raises(OverloadedError, match="268,000,000 of 268,435,456 bytes are in use, 1,000,000 more needed"):
        budget.reserve(1_000_000)


def test_a_correction_that_does_not_fit_releases_everything() -> None:
    budget = ByteBudget(100)
    other = budget.reserve(60)
    with budget.reserve(30) as reservation:
        with pytest.raises(OverloadedError, match="60 of 100 bytes are in use, 41 more needed"):
            reservation.correct(41)
        assert (budget.level, reservation.size) == (60, 0)
    assert budget.level == other.size == 60


def test_a_negative_size_is_refused_and_changes_nothing() -> None:
    budget = ByteBudget(100)
    with pytest.raises(ValueError, match="cannot reserve -1 bytes"):
        budget.reserve(-1)
    reservation = budget.reserve(5)
    with pytest.raises(ValueError, match="cannot reserve -1 bytes"):
        reservation.correct(-1)
    assert budget.level == 5


def test_threads_never_push_the_level_above_the_limit_and_leave_zero_behind() -> None:
    budget = ByteBudget(50)
    levels: list[int] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for size in range(500):
            with contextlib.suppress(OverloadedError), budget.reserve(size % 13) as reservation:
                levels.append(budget.level)
                reservation.correct(size % 29)
                levels.append(budget.level)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.level == 0
    assert min(levels) >= 0
    assert max(levels) <= 50


def test_who_waits_for_the_budget_gets_what_another_gives_back() -> None:
    budget = ByteBudget(100)
    first = budget.reserve(100)
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(budget.reserve(60, timeout=30).size))
    waiter.start()
    wait_until(lambda: budget._waiting == 1)
    first.correct(70)
    assert got == []
    first.correct(40)
    waiter.join()
    assert got == [60]
    with pytest.raises(OverloadedError, match="100 of 100 bytes are in use, 1 more needed"):
        budget.reserve(1, timeout=0.01)
    assert (budget.level, budget._waiting) == (100, 0)


@given(st.lists(st.integers(0, 10_000)), st.integers(0, 1_000), st.integers(0, 1_000))
def test_an_estimate_stays_between_its_bounds_and_starts_at_the_upper_one(
    sizes: list[int], floor: int, cap: int
) -> None:
    estimate = SizeEstimate(floor=floor, cap=cap)
    assert estimate.value == cap
    for size in sizes:
        estimate.learn(size)
        assert min(floor, cap) <= estimate.value <= cap


def test_an_estimate_comes_close_to_sizes_that_repeat() -> None:
    estimate = SizeEstimate(floor=10, cap=1_000_000)
    for _ in range(100):
        estimate.learn(5_000)
    assert abs(estimate.value - 5_000) < 50
    for _ in range(100):
        estimate.learn(200_000)
    assert abs(estimate.value - 200_000) < 50


def test_the_gate_refuses_calls_above_its_limit_with_both_figures() -> None:
    gate = CallGate(2)
    with gate, gate:
        assert gate.in_flight == 2
        with pytest.raises(OverloadedError, match="2 of 2 calls in flight"), gate:
            pass
    with gate:
        assert gate.in_flight == 1
    assert gate.in_flight == 0


def test_a_call_that_raises_leaves_the_gate() -> None:
    gate = CallGate(1)
    with pytest.raises(KeyError), gate:
        raise KeyError
    assert gate.in_flight == 0


def test_a_closed_gate_refuses_new_calls_and_waits_for_those_inside() -> None:
    gate = CallGate(10)
    gate.__enter__()
    gate.close()
    with pytest.raises(OverloadedError, match="shutting down: 1 calls are being finished"), gate:
        pass
    assert not gate.wait_idle(0)
    idle: list[bool] = []
    waiter = threading.Thread(target=lambda: idle.append(gate.wait_idle(30)))
    waiter.start()
    gate.__exit__(None, None, None)
    waiter.join()
    assert idle == [True]


def test_large_reservations_leave_the_spare_bytes_to_small_ones() -> None:
    budget = ByteBudget(1000, spare=100)
    assert budget.largest == 900
    large = budget.reserve(880)
    with pytest.raises(OverloadedError):
        budget.reserve(26)
    small = [budget.reserve(25) for _ in range(4)]
    assert budget.level == 980
    with pytest.raises(OverloadedError):
        budget.reserve(25)
    with pytest.raises(OverloadedError):
        small[0].correct(26)
    large.release()
    assert budget.reserve(26).size == 26


def test_one_reservation_at_a_time_waits_to_grow_and_no_large_one_overtakes_it() -> None:
    budget = ByteBudget(1000, spare=100)
    first, growing, other = (budget.reserve(300) for _ in range(3))
    grown = threading.Thread(target=growing.correct, args=(600,), kwargs={"timeout": 60})
    grown.start()
    wait_until(lambda: budget._patient is growing)
    with pytest.raises(OverloadedError):
        other.correct(301, timeout=60)
    with pytest.raises(OverloadedError):
        budget.reserve(100)
    assert budget.reserve(25).size == 25
    first.release()
    grown.join()
    assert growing.size == 600
    assert budget.reserve(100).size == 100


def test_a_reservation_that_waits_in_vain_is_released() -> None:
    budget = ByteBudget(100)
    budget.reserve(60)
    with budget.reserve(30) as growing, pytest.raises(OverloadedError):
        growing.correct(41, timeout=0.01)
    assert budget.level == 60
    assert budget.reserve(40).size == 40


def test_each_sender_is_judged_by_its_own_requests_and_a_new_one_by_all() -> None:
    estimates = SenderEstimates(floor=10, cap=1000)
    assert estimates.value("new") == 1000
    for _ in range(50):
        estimates.learn("small", 20)
        estimates.learn("large", 900)
    assert estimates.value("small") == 20
    assert 890 <= estimates.value("large") <= 900
    assert 20 < estimates.value("new") < 900


def test_senders_that_were_not_heard_of_for_long_are_forgotten() -> None:
    estimates = SenderEstimates(floor=10, cap=1000)
    estimates.learn("once", 20)
    for number in range(SenderEstimates._KEPT):
        estimates.learn(str(number), 1000)
    assert estimates.value("once") > 900
