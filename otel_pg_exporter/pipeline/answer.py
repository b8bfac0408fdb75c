"""What becomes of a submitted request, handed from a writer's thread to the one that waits."""

import threading
from collections.abc import Callable

from otel_pg_exporter.model import Outcome


def _nothing(_answer: "Answer") -> None:
    pass


class Answer:
    """An outcome or an error, unless it was cancelled first; of these three the first one stays.

    Not a `Future`, which takes three times the time: its condition makes another lock for each that waits, and who is
    woken needs the first one again. Here are two bare locks: `_first` is taken by who settles or cancels, and never
    given back; `_unsettled` is held until there is something to return.
    """

    __slots__ = ("_cancelled", "_first", "_forget", "_outcome", "_unsettled", "being_written", "commit_lost")

    def __init__(self, forget: Callable[["Answer"], None] = _nothing) -> None:
        """Be unsettled; `forget` is called once it is cancelled."""
        self.being_written = False
        self.commit_lost = False
        self._cancelled = False
        self._forget = forget
        self._outcome: Outcome | Exception | None = None
        self._first = threading.Lock()
        self._unsettled = threading.Lock()
        self._unsettled.acquire()

    @property
    def in_doubt(self) -> bool:
        """Whether the request may be committed although no outcome has come; to be asked after a cancellation."""
        return self.being_written or self.commit_lost

    @property
    def cancelled(self) -> bool:
        """Whether the request was given up."""
        return self._cancelled

    @property
    def settled(self) -> bool:
        """Whether there is an outcome or an error."""
        return self._outcome is not None

    def settle(self, outcome: Outcome | Exception) -> None:
        """Give the outcome, or the error to raise; too late for a request that is settled or cancelled already."""
        if self._first.acquire(blocking=False):
            self._outcome = outcome
            self._unsettled.release()

    def cancel(self) -> bool:
        """Give the request up; return whether that came in time. If not, the outcome is there, or is just coming.

        For the one that waits: it asks once, and for no result after that came in time.
        """
        if not self._first.acquire(blocking=False):
            return self._cancelled
        self._cancelled = True
        self._forget(self)
        return True

    def result(self, timeout: float = -1) -> Outcome:
        """Wait, at most `timeout` seconds, and return the outcome or raise the error; else TimeoutError."""
        if not self._unsettled.acquire(timeout=timeout):
            raise TimeoutError
        self._unsettled.release()  # for who asks again
        assert self._outcome is not None
        try:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome
        finally:
            del self  # the error keeps this frame: that were a cycle, which only the garbage collector opens
