"""Waiting between two attempts: exponential backoff with full jitter, which a shutdown interrupts."""

import random
import threading
import time
from collections.abc import Callable

INITIAL = 0.05  # seconds
CEILING = 1.0  # seconds


class Backoff:
    """The pauses of one retried operation; not shared between threads.

    Full jitter: each pause is drawn evenly from zero to a limit that doubles, so that a thousand clients of a server
    that comes back don't knock all at once.
    """

    def __init__(
        self,
        stop: threading.Event,
        *,
        initial: float = INITIAL,
        ceiling: float = CEILING,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._stop = stop
        self._limit = initial
        self._ceiling = ceiling
        self._clock = clock
        self._uniform = uniform

    def wait(self, deadline: float | None = None) -> bool:
        """Pause, then tell whether another attempt is due.

        False when `stop` is set, at once, or when the pause would end after `deadline` (by `clock`), without it.
        """
        pause = self._uniform(0.0, self._limit)
        self._limit = min(self._limit * 2, self._ceiling)
        if deadline is not None and self._clock() + pause >= deadline:
            return False
        return not self._stop.wait(pause)
