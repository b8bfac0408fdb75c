"""Admission: what bounds the work taken in, in bytes (`ByteBudget`, `SenderEstimates`) and in calls (`CallGate`)."""

import threading
from collections import OrderedDict
from types import TracebackType
from typing import Self

from otel_pg_exporter.errors import OverloadedError

# Seconds that one request at a time waits for room for its rows: until those before it are committed or spooled.
_GROWTH_TIMEOUT = 10.0


class ByteBudget:
    """The bytes that all requests in flight may hold together.

    `spare` of them are for small reservations alone, those of at most a quarter of it: a few large requests would else
    shut all small ones out. `_lock` guards everything, and the size of every reservation. A thread may take it twice:
    the garbage collector, which may run anywhere, lets go of shares.
    """

    def __init__(self, limit: int, *, spare: int = 0) -> None:
        self.limit = limit
        self.largest = limit - spare
        """The largest reservation that there may be."""
        self._small = spare // 4
        self._level = 0
        self._large_level = 0  # what reservations that are not small hold
        self._patient: Reservation | None = None  # the one that waits to grow, before which no other may
        self._waiting = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def level(self) -> int:
        """How many bytes are reserved now."""
        return self._level

    def reserve(self, size: int, *, timeout: float = 0) -> "Reservation":
        """Reserve `size` bytes until the reservation is released, best by a `with` statement.

        Raises OverloadedError, with nothing reserved, when they don't fit within `timeout` seconds.
        """
        reservation = Reservation(self)
        with self._lock:
            self._await_room(reservation, size, timeout)
            self._resize(reservation, size)
        return reservation

    # For reservations, which hold the lock.

    def _await_room(self, reservation: "Reservation", size: int, timeout: float) -> None:
        if timeout > 0 and not self._fits(reservation, size):
            self._waiting += 1
            self._changed.wait_for(lambda: self._fits(reservation, size), timeout)
            self._waiting -= 1

    def _fits(self, reservation: "Reservation", size: int) -> bool:
        old = reservation.size
        if size <= old:
            return True
        if self._level - old + size > self.limit:
            return False
        if size <= self._small:
            return True
        return self._patient in {None, reservation} and self._large_level - self._large(old) + size <= self.largest

    def _resize(self, reservation: "Reservation", size: int) -> None:
        old = reservation.size
        if size < 0:
            raise ValueError(f"cannot reserve {size} bytes")
        if not self._fits(reservation, size):
            raise OverloadedError(
                f"memory budget is full: {self._level - old:,} of {self.limit:,} bytes are in use, {size:,} more needed"
            )
        self._level += size - old
        growth = self._large(size) - self._large(old)  # not below: a call in it may run a finalizer, which comes here
        self._large_level += growth
        reservation._size = size  # noqa: SLF001 - a reservation is part of its budget
        if size < old and self._waiting:
            self._changed.notify_all()

    def _large(self, size: int) -> int:
        return size if size > self._small else 0


class Reservation:
    """A share of a `ByteBudget`, held until `release()`."""

    __slots__ = ("_budget", "_released", "_size")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._size = 0
        self._released = False

    @property
    def size(self) -> int:
        """How many bytes are held; 0 after the release."""
        return self._size

    @property
    def largest(self) -> int:
        """How many bytes it may ever hold."""
        return self._budget.largest

    def correct(self, size: int, *, timeout: float = 0) -> None:
        """Hold `size` bytes from now on, more or less than before.

        Raises OverloadedError when they don't fit; then the whole reservation is released. One reservation at a time
        may wait for room, `timeout` seconds: were none to wait, large requests that grow at once would fail for ever;
        if two did, each would wait for the other.
        """
        budget = self._budget
        with budget._lock:  # noqa: SLF001 - a reservation is part of its budget
            if self._released:
                raise RuntimeError("the reservation is already released")
            if timeout > 0 and budget._patient is None and not budget._fits(self, size):  # noqa: SLF001
                budget._patient = self  # noqa: SLF001
                budget._await_room(self, size, timeout)  # noqa: SLF001
                budget._patient = None  # noqa: SLF001
                budget._changed.notify_all()  # noqa: SLF001
            try:
                budget._resize(self, size)  # noqa: SLF001
            except OverloadedError:
                self._give_back()
                raise

    def release(self) -> None:
        """Give the bytes back. A second release does nothing."""
        with self._budget._lock:  # noqa: SLF001
            self._give_back()

    def _give_back(self) -> None:
        self._budget._resize(self, 0)  # noqa: SLF001
        self._released = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Share:
    """What a request holds of the budget, for as long as anything refers to this: a `Hold`.

    A batch that a writer is busy with outlives its call, which leaves it to the spool after `ack_timeout`.
    """

    __slots__ = ("_reservation",)

    def __init__(self, reservation: Reservation) -> None:
        self._reservation = reservation

    def __call__(self, size: int) -> None:
        """Reserve as much as the request is known to hold by now; at most what one may have, or it could never be."""
        if (size := min(size, self._reservation.largest)) > self._reservation.size:
            self._reservation.correct(size, timeout=_GROWTH_TIMEOUT)

    def __del__(self) -> None:
        self._reservation.release()


class SizeEstimate:
    """How many bytes the next request will need, learned from the last ones: an exponentially weighted mean.

    The mean, not the maximum: what counts is the sum over many requests, and rare giants must not keep others out.
    It starts at `cap`, so that the first wave after a start, when senders empty their queues, is not underrated; or
    from what is known. `_lock` guards `_mean`.
    """

    _WEIGHT = 1 / 8

    def __init__(self, *, floor: int, cap: int, first: int | None = None) -> None:
        self._floor = min(floor, cap)
        self._cap = cap
        self._mean = float(cap if first is None else min(first, cap))
        self._lock = threading.Lock()

    @property
    def value(self) -> int:
        """The estimate, between `floor` and `cap`."""
        return max(self._floor, int(self._mean))

    def learn(self, size: int) -> None:
        """Take one request's real size into account."""
        with self._lock:
            self._mean += (min(size, self._cap) - self._mean) * self._WEIGHT


class SenderEstimates:
    """An estimate for each connection that was heard of lately, and one of them all for the others.

    Those who send small requests are not to wait for as much room as those beside them who send large ones. `_lock`
    guards `_of_each`.
    """

    _KEPT = 4_096

    def __init__(self, *, floor: int, cap: int) -> None:
        self._floor = floor
        self._cap = cap
        self._of_all = SizeEstimate(floor=floor, cap=cap)
        self._of_each: OrderedDict[str, SizeEstimate] = OrderedDict()
        self._lock = threading.Lock()

    def value(self, sender: str) -> int:
        """Return the estimate for the next request of a sender."""
        return self._of_each.get(sender, self._of_all).value

    def within(self, size: int) -> int:
        """Return a size that was announced as an estimate: nobody is held to an announcement."""
        return max(min(self._floor, self._cap), min(size, self._cap))

    def learn(self, sender: str, size: int) -> None:
        """Take one request's real size into account."""
        self._of_all.learn(size)
        with self._lock:
            estimate = self._of_each.pop(sender, None)
            if estimate is None:
                estimate = SizeEstimate(floor=self._floor, cap=self._cap, first=size)
            self._of_each[sender] = estimate
            if len(self._of_each) > self._KEPT:
                self._of_each.popitem(last=False)
        estimate.learn(size)


class CallGate:
    """Counts the calls in flight, refuses those above `limit`, and after `close()` all new ones.

    A call is inside for as long as a `with` block lasts, which never waits: it raises OverloadedError. `_lock` guards
    `_in_flight` and `_closed`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_flight = 0
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def in_flight(self) -> int:
        """How many calls are inside now."""
        return self._in_flight

    def __enter__(self) -> None:
        with self._lock:
            if self._closed:
                raise OverloadedError(f"shutting down: {self._in_flight:,} calls are being finished, no new ones taken")
            if self._in_flight >= self.limit:
                raise OverloadedError(f"call limit is reached: {self._in_flight:,} of {self.limit:,} calls in flight")
            self._in_flight += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new calls from now on; those inside go on."""
        with self._lock:
            self._closed = True

    def wait_idle(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds until no call is inside; say whether that came true."""
        with self._lock:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout)
