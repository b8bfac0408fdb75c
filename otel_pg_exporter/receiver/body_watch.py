"""What grpcio has not for request bodies: a deadline to read them by, and a bound of the memory that they take."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_INTERVAL = 0.05  # seconds between two looks while bodies are being read
_STALLED = 0.5  # seconds after which a body is taken to stall
_KEPT = 4  # bodies that are read on when memory is short: some get through even then
_HASTE = 2.0  # seconds that a body may take once the end is near
_STATM = Path("/proc/self/statm")  # Linux alone has it; elsewhere there is only the deadline
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Cancellable(Protocol):
    """A call that can be cancelled from another thread."""

    def cancel(self) -> object:
        """Cancel the call."""


def resident_bytes() -> int:
    """Return the process's resident memory; 0 where the system does not tell."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0


class BodyWatch:
    """Cancels calls whose body takes too long to arrive, or too much memory.

    Each such call holds a thread and a place among the calls in flight: without a deadline, a few hundred senders that
    stall in the middle of a body would shut all others out for good. And nobody knows how large a body is before it is
    there: while the process takes more than `memory_limit` bytes, of the bodies that were not there at once all but the
    oldest four are given up. A cancelled sender hears CANCELLED, which OTLP counts among the statuses to retry.

    `_lock` guards `_reading`, and is held while `stalled` is called. The thread is started by `start()` and joined by
    `stop()`.
    """

    def __init__(
        self,
        timeout: float,
        *,
        memory_limit: int,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int] = resident_bytes,
    ) -> None:
        self._timeout = timeout
        self._memory_limit = memory_limit
        self._clock = clock
        self._memory = memory
        self._lock = threading.Lock()
        # Call to when it began, in order of both, and what is to be told when it stalls.
        self._reading: dict[Cancellable, tuple[float, Callable[[], None] | None]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-body-watch", daemon=True)

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def hurry(self) -> None:
        """Wait less from now on: whose body does not come is to come again, and not to hold a stop up."""
        self._timeout = min(self._timeout, _HASTE)

    def stop(self) -> None:
        """Stop to watch; harmless before `start()` and when repeated."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, call: Cancellable, stalled: Callable[[], None] | None = None) -> Iterator[None]:
        """Cancel `call` if the `with` block is not left in time; tell once, and only inside it, that it stalls."""
        with self._lock:
            self._reading[call] = self._clock(), stalled
        try:
            yield
        finally:
            with self._lock:
                self._reading.pop(call, None)

    def cancel_overdue(self) -> int:
        """Cancel what is overdue now, and what memory has no room for; return how many calls that were."""
        now = self._clock()
        with self._lock:
            slow = [(call, now - began) for call, (began, _) in self._reading.items() if now - began >= _INTERVAL]
            self._tell_stalled(now)
            given_up = [call for call, age in slow if age >= self._timeout]
            if len(slow) - len(given_up) > _KEPT and self._memory() > self._memory_limit:
                given_up = [*given_up, *(call for call, _ in slow[len(given_up) + _KEPT :])]
            for call in given_up:
                del self._reading[call]
        for call in given_up:
            call.cancel()
        return len(given_up)

    def _tell_stalled(self, now: float) -> None:
        for call, (began, stalled) in self._reading.items():
            if stalled is not None and now - began >= _STALLED:
                stalled()
                self._reading[call] = began, None  # another value for a key: the order stays

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            if self._reading:
                self.cancel_overdue()
