"""A deadline for request bodies, which grpcio reads without one."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Cancellable(Protocol):
    """A call that can be cancelled from another thread."""

    def cancel(self) -> object:
        """Cancel the call."""


class BodyDeadline:
    """Cancels calls whose body takes longer than `timeout` seconds to arrive, within a quarter of that.

    Each such call holds a thread and a place among the calls in flight: without a deadline, a few hundred senders that
    stall in the middle of a body would shut all others out for good. A cancelled sender hears CANCELLED, which OTLP
    counts among the statuses to retry.

    `_lock` guards `_reading`. The thread is started by `start()` and joined by `stop()`.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._reading: dict[Cancellable, float] = {}  # call to deadline, in order of both
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-body-deadline", daemon=True)

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to watch; harmless before `start()` and when repeated."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, call: Cancellable) -> Iterator[None]:
        """Cancel `call` if the `with` block is not left in time."""
        with self._lock:
            self._reading[call] = self._clock() + self._timeout
        try:
            yield
        finally:
            with self._lock:
                self._reading.pop(call, None)

    def cancel_overdue(self) -> int:
        """Cancel what is overdue now; return how many calls that were."""
        overdue = []
        now = self._clock()
        with self._lock:
            for call, deadline in self._reading.items():
                if deadline > now:
                    break
                overdue.append(call)
            for call in overdue:
                del self._reading[call]
        for call in overdue:
            call.cancel()
        return len(overdue)

    def _run(self) -> None:
        # Looking four times per timeout is cheaper than a wake-up per call, and exact enough.
        while not self._stopped.wait(self._timeout / 4):
            self.cancel_overdue()
