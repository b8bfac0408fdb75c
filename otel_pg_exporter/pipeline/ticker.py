"""Jobs that run beside the requests, at intervals, in one thread."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from otel_pg_exporter.errors import DatabaseUnavailableError, ExporterError
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__name__)

_LAST_JOB = 5.0  # seconds that a stop waits for the job that runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something to be done again and again."""

    name: str
    interval: float  # seconds
    run: Callable[[], None]
    first: float | None = None  # seconds until it is run for the first time; None: an interval


class Ticker:
    """Runs jobs at intervals, in one thread, until `stop`. A job that fails is run again when it is due again."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        name: str = "ticker",
        notices: RateLimitedLogger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start; `notices` tell of failures."""
        self._clock = clock
        self._notices = notices or RateLimitedLogger(_logger)
        self.succeeded: dict[str, float] = {}
        """When each job last went well, in seconds since the epoch."""
        self._stopping = threading.Event()
        self._due = [(clock() + (job.interval if job.first is None else job.first), job) for job in jobs]
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def stop(self, timeout: float = _LAST_JOB) -> None:
        """End after the job that is being run, if it takes no longer than `timeout` seconds."""
        self._stopping.set()
        self._thread.join(min(timeout, _LAST_JOB))

    def _run(self) -> None:
        while not self._stopping.wait(max(0.0, min(due for due, _ in self._due) - self._clock())):
            self._run_due()

    def _run_due(self) -> None:
        now = self._clock()
        for index, (due, job) in enumerate(self._due):
            if due <= now:
                self._try(job)
                self._due[index] = (self._clock() + job.interval, job)

    def _try(self, job: Job) -> None:
        try:
            job.run()
            self.succeeded[job.name] = time.time()
        except ExporterError as exc:
            if not self._stopping.is_set():
                level = logging.WARNING if isinstance(exc, DatabaseUnavailableError) else logging.ERROR
                self._notices.log(level, f"{job.name}: {type(exc).__name__}", f"{job.name}: {exc.with_remedy}")
        except Exception as exc:  # noqa: BLE001 - a bug in one job must not end the others
            self._notices.log(logging.CRITICAL, job.name, f"{job.name} failed unexpectedly", exc_info=exc)
