"""Whether it makes sense to wait for PostgreSQL: what the last attempts to write tell."""

from collections.abc import Callable, Sequence

from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.model import Outcome, RowBatch, Signal

Write = Callable[[Sequence[RowBatch]], Sequence[Outcome]]
"""Commits requests of one signal together; raises RetryableError when the same may be tried again."""


class Availability:
    """Knows for which signals PostgreSQL is down. A set's own operations are atomic, so no lock is needed."""

    def __init__(self) -> None:
        self._down: set[Signal] = set()

    def is_down(self, signal: Signal) -> bool:
        """Tell whether the last attempt to write failed so that the next one will, too."""
        return signal in self._down

    def note_silence(self, signal: Signal) -> None:
        """Note that no answer came in time; the next commit, whoever's it is, puts that right."""
        self._down.add(signal)

    def observe(self, write: Write) -> Write:
        """Return `write`, watched: each of its commits and outages is noted."""

        def observed(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
            try:
                outcomes = write(batches)
            except OutageError:
                self._down.add(batches[0].signal)
                raise
            self._down.discard(batches[0].signal)
            return outcomes

        return observed
