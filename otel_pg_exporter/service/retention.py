"""Retention beside the requests: rounds of it, in a thread of their own, and how the last ones went."""

import logging
import random
import threading
import time
from dataclasses import dataclass, replace

from otel_pg_exporter.errors import DatabaseUnavailableError
from otel_pg_exporter.monitoring.groups import Expired
from otel_pg_exporter.pipeline.ticker import Job, Ticker
from otel_pg_exporter.postgres.retention import Removed, Retention
from otel_pg_exporter.service.database import Database
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__package__)

_INTERVAL = 300.0  # seconds between two rounds, a fifth more or less, so that replicas don't meet
_FIRST = 30.0  # seconds until the first one, likewise
_LONGEST = 120.0  # seconds; what is left then, the next one takes
_NOTICE_INTERVAL = 3600.0  # seconds between two warnings of one kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionStatus:
    """What retention has done in this process; times in seconds since 1970, None while there was none."""

    succeeded_at: float | None = None  # when a round last ended well
    failed_at: float | None = None
    failure: str = ""  # why
    partitions: int = 0  # dropped in all
    rows: int = 0  # deleted in all


class RetentionRounds:
    """Removes what is expired, now and then. The lock guards the status."""

    def __init__(self, database: Database, *, interval: float = _INTERVAL, first: float = _FIRST) -> None:
        """Start; the database is prepared, or will be by one of its jobs."""
        self._database = database
        self._retention = Retention(database.borrow, lambda: database.settings)
        self._notices = RateLimitedLogger(_logger, interval=_NOTICE_INTERVAL)
        self._lock = threading.Lock()
        self._status = RetentionStatus()
        spread = random.uniform(0.8, 1.2)  # noqa: S311 - spreads replicas, guards nothing
        job = Job(name="retention", interval=interval * spread, first=first * spread, run=self._run)
        self._ticker = Ticker([job], name="retention")

    @property
    def status(self) -> RetentionStatus:
        """How it went so far."""
        with self._lock:
            return self._status

    @property
    def succeeded(self) -> dict[str, float]:
        """When it last went well, as the `Ticker` tells it of jobs."""
        at = self.status.succeeded_at
        return {} if at is None else {"retention": at}

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._ticker.alive

    @property
    def expired(self) -> Expired:
        """How much was removed so far."""
        status = self.status
        return Expired(partitions=status.partitions, rows=status.rows)

    def stop(self, timeout: float) -> None:
        """End after the transaction that is under way, if it takes no longer than `timeout` seconds."""
        self._retention.stop()
        self._ticker.stop(timeout)

    def _run(self) -> None:
        if not self._database.prepared:
            return
        done = Removed()

        def note(removed: Removed) -> None:
            nonlocal done
            done = removed

        failure = ""
        try:
            self._retention.run(within=_LONGEST, report=note)
        except DatabaseUnavailableError as exc:
            failure = str(exc)
            self._notices.log(logging.WARNING, type(exc).__name__, failure)
        if done:
            _logger.info("retention: %s", done)
        self._note(done, failure)

    def _note(self, done: Removed, failure: str) -> None:
        now = time.time()
        with self._lock:
            status = replace(
                self._status,
                partitions=self._status.partitions + len(done.partitions),
                rows=self._status.rows + sum(done.rows.values()),
            )
            self._status = (
                replace(status, failed_at=now, failure=failure) if failure else replace(status, succeeded_at=now)
            )
