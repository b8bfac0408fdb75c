"""The spool of a service: its folder, what dead processes have left, and the drain that writes it all."""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from otel_pg_exporter.config import SpoolSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, StartupError
from otel_pg_exporter.model import Hold, Outcome, RowBatch, Signal
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders, default_spool_dir, folder_of
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.pipeline.ticker import Job
from otel_pg_exporter.service.database import STATEMENT_MARGIN, Database
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import Plan

_logger = logging.getLogger(__package__)

_ADOPTION_INTERVAL = 5.0  # seconds between two looks for spools that dead processes have left
_LEAST_PATIENCE = 4.0  # seconds


def was_used(settings: SpoolSettings, target: str) -> bool:
    """Tell whether there was a spool for `target` before: then that PostgreSQL was reached before, too."""
    folder = folder_of(settings.spool_dir or default_spool_dir(), target)
    try:
        return settings.spool and folder.is_dir()
    except OSError:  # above it is one that we may not look into
        return False


class Spooling:
    """The spool for one PostgreSQL; opened once, and closed by the stack that it was opened with."""

    def __init__(self, settings: SpoolSettings, database: Database, counters: ItemCounters, stack: ExitStack) -> None:
        """Take a folder and open the spool in it. Raises StartupError."""
        self._settings = settings
        self._database = database
        self._counters = counters
        self._patience = _LEAST_PATIENCE  # seconds that the drain waits for one transaction; its thread's alone
        self._folders = SpoolFolders(settings.spool_dir or default_spool_dir(), database.target)
        for other in self._folders.others():
            _logger.info(
                "requests for another PostgreSQL may be left in %s; a receiver for that one will write them", other
            )
        self._folder = self._folders.acquire()
        stack.callback(self._folder.release)
        self.spool = Spool(self._folder.path, max_bytes=settings.spool_max_bytes)
        stack.callback(self._close)
        self._recovered({signal: self.spool.items(signal) for signal in Signal})

    @property
    def path(self) -> Path:
        """The folder with the spools for this PostgreSQL."""
        return self._folders.path

    def start_drain(self, plans: Mapping[Signal, Plan], availability: Availability, holds: Callable[[], Hold]) -> Drain:
        """Start to write what is spooled, whenever PostgreSQL takes it; the caller stops the drain."""
        writer = SpoolWriter(
            plans,
            availability.observe(self._write),
            probe=self._database.probe,
            counters=self._counters,
            availability=availability,
            ledger_ttl=self._settings.ledger_ttl,
            holds=holds,
        )
        return Drain(self.spool, writer, self._counters)

    def jobs(self) -> list[Job]:
        """Return what is to be done now and then."""
        return [Job(name="spools of dead processes", interval=_ADOPTION_INTERVAL, run=self._adopt)]

    def log_level(self) -> None:
        """Log how full it is, if it is not empty."""
        if (level := self.spool.level).requests:
            _logger.info("spool: %s, of %s at most", level, f"{self._settings.spool_max_bytes:,}")

    def _write(self, batches: Sequence[RowBatch]) -> list[Outcome]:
        """Write what the drain has, waiting briefly unless that has proved too short.

        So the drain tries another connection soon when the old ones are silent for ever, as behind a load balancer
        that forgot them. What live traffic waits for is cut by its own, longer time-outs.
        """
        try:
            outcomes = self._database.write(batches, deadline=time.monotonic() + self._patience)
        except DatabaseUnavailableError:
            self._patience = min(self._patience * 2, self._database.settings.statement_timeout + STATEMENT_MARGIN)
            raise
        self._patience = max(_LEAST_PATIENCE, self._patience / 2)
        return outcomes

    def _adopt(self) -> None:
        failed = None
        if self.spool.level.bytes * 2 > self._settings.spool_max_bytes:
            return  # others' requests are safe where they are until ours are written
        for folder in self._folders.of_dead_processes():
            try:
                self._recovered(self.spool.adopt(Spool(folder.path, max_bytes=sys.maxsize)))
                self._folder.take_corrupt_files(folder)
            except StartupError as exc:  # not to keep the other folders waiting
                failed = exc
            finally:
                folder.release()
        if failed is not None:
            raise failed

    def _recovered(self, items: Mapping[Signal, int]) -> None:
        for signal, count in items.items():
            if count:
                _logger.info(
                    "found %s %s in the spool of a process that is dead; what is not set aside will be written",
                    f"{count:,}",
                    signal.items,
                )
                self._counters.add(signal, recovered_from_spool=count, in_spool=count)

    def _close(self) -> None:
        level = self.spool.close()
        if level.requests and self.spool.lost:
            _logger.error(
                "%s items were in the spool %s still, which was deleted or moved: what is not there at the next start"
                " is lost",
                f"{level.items:,}",
                self._folder.path,
            )
        elif level.requests:
            _logger.warning(
                "%s items stay in the spool %s; the next start with the same settings writes them",
                f"{level.items:,}",
                self._folder.path,
            )
