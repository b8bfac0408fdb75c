"""Retention beside the requests: rounds of it, in a thread of their own."""

import logging
import random

from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.monitoring.groups import Expired
from otel_pg_exporter.pipeline.ticker import Job, Ticker
from otel_pg_exporter.postgres.retention import Removed, Retention
from otel_pg_exporter.service.database import Database
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__package__)

_INTERVAL = 300.0  # seconds between two rounds, a fifth more or less, so that replicas don't meet
_FIRST = 30.0  # seconds until the first one, likewise
_LONGEST = 120.0  # seconds; what is left then, the next one takes
_NOTICE_INTERVAL = 3600.0  # seconds between two warnings: what keeps a round from its work seldom passes soon


class RetentionRounds:
    """Removes what is expired, now and then."""

    def __init__(self, database: Database, *, interval: float = _INTERVAL, first: float = _FIRST) -> None:
        """Start; the database is prepared, or will be by one of its jobs."""
        self._database = database
        self.expired = Expired(partitions=0, rows=0)
        """How much was removed so far; changed by the rounds' thread alone."""
        self._retention = Retention(database.borrow, lambda: database.settings)
        spread = random.uniform(0.8, 1.2)  # noqa: S311 - spreads replicas, guards nothing
        job = Job(name="retention", interval=interval * spread, first=first * spread, run=self._run)
        notices = RateLimitedLogger(_logger, interval=_NOTICE_INTERVAL)
        self._ticker = Ticker([job], name="retention", notices=notices)
        self.succeeded = self._ticker.succeeded

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._ticker.alive

    def stop(self, timeout: float) -> None:
        """End after the transaction that is under way, if it takes no longer than `timeout` seconds."""
        self._retention.stop()
        self._ticker.stop(timeout)

    def _run(self) -> None:
        if not self._database.prepared:  # what the settings say of retention may not be in force yet
            raise OutageError("nothing is removed before the tables are prepared")
        before, done = self.expired, Removed()

        def note(removed: Removed) -> None:
            nonlocal done
            done = removed
            self.expired = Expired(
                partitions=before.partitions + len(done.partitions), rows=before.rows + sum(done.rows.values())
            )

        try:
            self._retention.run(within=_LONGEST, report=note)
        finally:
            if done:
                _logger.info("retention: %s", done)
