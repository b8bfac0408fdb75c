"""The time that a stop may take."""

import time
from collections.abc import Callable


class Deadline:
    """Counts down the seconds of a stop, which begins with the first question for them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._end: float | None = None

    @property
    def begun(self) -> bool:
        """Whether the stop has begun."""
        return self._end is not None

    def remaining(self) -> float:
        """Return the seconds left, never fewer than 0."""
        now = self._clock()
        if self._end is None:
            self._end = now + self._seconds
        return max(0.0, self._end - now)
