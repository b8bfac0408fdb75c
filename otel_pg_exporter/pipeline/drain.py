"""The drain: writes what is in the spool, oldest first, as soon as PostgreSQL takes it."""

import logging
import threading
import time
from collections.abc import Callable

from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.telemetry import ItemCounters, RateLimitedLogger

_logger = logging.getLogger(__name__)

_LOOK_INTERVAL = 0.2  # seconds between two looks whether a spool is empty still, at a number in memory


class Drain:
    """Empties a spool in a thread of its own, each signal apart from the other, at a pace that leaves others room."""

    def __init__(
        self,
        spool: Spool,
        writer: SpoolWriter,
        counters: ItemCounters,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._writer = writer
        self._counters = counters
        self._clock = clock
        self._notices = RateLimitedLogger(_logger)
        self._told = 0  # items of which was said that they were written; used by the thread alone, as is:
        self._due = dict.fromkeys(Signal, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spool-drain", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Stop after the transaction that runs, within `timeout` seconds; tell whether it did."""
        self._stop.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(max(0.0, min(self._due.values()) - self._clock())):
            for signal, due in self._due.items():
                if due <= self._clock() and not self._stop.is_set():
                    self._due[signal] = self._advance(signal)

    def _advance(self, signal: Signal) -> float:
        """Drain a few requests of one signal, and say when to come again."""
        began = self._clock()
        pause = self._writer.advance(self._spool, signal)
        if pause is None:
            self._tell_of_the_end()
            pause = _LOOK_INTERVAL
        return self._clock() + (pause or self._courtesy(began))

    def _tell_of_the_end(self) -> None:
        drained = self._counters.snapshot().drained
        if drained > self._told and not self._spool.level.requests:
            what = f"the spool is empty: {drained - self._told:,} items were written from it"
            self._notices.log(logging.INFO, "empty", what)
            self._told = drained

    def _courtesy(self, began: float) -> float:
        """Leave live traffic, where there is any, at least half of the time."""
        return self._clock() - began if self._counters.snapshot().in_flight else 0.0
