"""Whether it makes sense to wait for PostgreSQL: what the last attempts to write tell."""

import math
import time
from collections.abc import Callable, Sequence

from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.model import Outcome, RowBatch, Signal

Write = Callable[[Sequence[RowBatch]], Sequence[Outcome]]
"""Commits requests of one signal together; raises RetryableError when the same may be tried again."""


class Availability:
    """Knows for which signals PostgreSQL is down. A dict's own operations are atomic, so no lock is needed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._down: dict[Signal, float] = {}  # when the last attempt failed
        self.committed_at = -math.inf
        """When rows were last committed, by the clock."""

    def is_down(self, signal: Signal) -> bool:
        """Tell whether the last attempt to write failed so that the next one will, too."""
        return signal in self._down

    def failed_at(self, signal: Signal) -> float:
        """Return when the last attempt to write failed; minus infinity if it didn't."""
        return self._down.get(signal, -math.inf)

    def note_silence(self, signal: Signal) -> None:
        """Note that no answer came in time; the next commit, whoever's it is, puts that right."""
        self._down[signal] = self._clock()

    def observe(self, write: Write) -> Write:
        """Return `write`, watched: each of its commits and outages is noted."""

        def observed(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
            try:
                outcomes = write(batches)
            except OutageError:
                self._down[batches[0].signal] = self._clock()
                raise
            self._down.pop(batches[0].signal, None)
            self.committed_at = self._clock()
            return outcomes

        return observed
