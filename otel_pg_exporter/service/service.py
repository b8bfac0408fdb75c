"""What is started in which order, what is stopped in which order, and what runs beside.

::

    metrics and health → PostgreSQL (embedded) → tables → partitions ahead → connections → spool → ticker → drain
    → batcher → gRPC → HTTP → SERVING

Stopping goes the other way round, all of it within `shutdown_timeout`: the front door first, then what waits in the
batcher is written or spooled, then the last statistics are logged, PostgreSQL ends, and metrics and health go last.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from otel_pg_exporter import mapping
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import DatabaseUnavailableError
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.monitoring import groups
from otel_pg_exporter.monitoring.groups import Queue
from otel_pg_exporter.pipeline.admission import ByteBudget, Share
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.batcher import Batcher
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.pipeline.ticker import Job, Ticker
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.receiver.endpoint import Endpoint
from otel_pg_exporter.receiver.exposure import exposure_warnings
from otel_pg_exporter.receiver.front_door import Endpoints, FrontDoor
from otel_pg_exporter.receiver.security import Security
from otel_pg_exporter.service.database import Database
from otel_pg_exporter.service.deadline import Deadline
from otel_pg_exporter.service.retention import RetentionRounds
from otel_pg_exporter.service.spooling import Spooling, was_used
from otel_pg_exporter.service.watching import Watching
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts, Statistics, StatisticsSnapshot
from otel_pg_exporter.transcode import compile_plan, extension

_logger = logging.getLogger(__package__)

# Of the byte budget, the share that large requests leave to small ones.
_SPARE_SHARE = 1 / 16

# Of the time that a stop may take, the share kept for writing what waits and for PostgreSQL's own end.
_RESERVED_SHARE = 0.25
# What is being written and is nobody's to wait for, since its sender has its answer, gets no longer than this.
_UNAWAITED_TIMEOUT = 2.0  # seconds


class Service:
    """A receiver with its PostgreSQL, as `otel-pg-exporter serve` runs it; a context manager that starts and stops it.

    Used once, and from one thread: `start`, then `stop`. What is here for other threads' eyes is set before they start.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Read the mapping and check the endpoint's spelling; nothing is touched before `start`."""
        self._settings = settings
        self._mapping = mapping.load(settings.mapping.mappings)
        self._endpoints = Endpoints.of(settings.receiver)
        self._statistics = Statistics()
        self._counters = ItemCounters()
        self._availability = Availability()
        self._database = Database(settings, self._mapping, self._statistics)
        self._spooling: Spooling | None = None
        self._retention: RetentionRounds | None = None
        self._running = ExitStack()
        self._deadline = Deadline(settings.shutdown_timeout)
        self.security = Security(settings.security)
        self._watching = Watching(settings)

    @property
    def grpc_endpoint(self) -> Endpoint | None:
        """Where OTLP/gRPC is served, with the real port; None if it is not."""
        return self._endpoints.grpc

    @property
    def http_endpoint(self) -> Endpoint | None:
        """Where OTLP/HTTP is served, with the real port; None if it is not."""
        return self._endpoints.http

    @property
    def dsn(self) -> str:
        """The DSN of the database; the embedded one's holds no password, but names the passfile."""
        return self._database.dsn

    @property
    def postgres_version(self) -> str:
        """What the server calls its version, as `18.4` or `15.14 (Debian 15.14-0+deb12u1)`."""
        return self._database.version

    @property
    def reader_instead(self) -> str | None:
        """A role to look at the spans with, if its own is known not to do for that."""
        return self._database.reader_instead

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The embedded PostgreSQL, if that is what runs."""
        return self._database.server

    @property
    def stopping(self) -> bool:
        """Whether a stop has begun, be it because the start failed: nothing may interrupt it, or something is left."""
        return self._deadline.begun

    @property
    def spool_folder(self) -> Path | None:
        """The folder with the spools for this PostgreSQL, if there is a spool."""
        return None if self._spooling is None else self._spooling.path

    @property
    def metrics_endpoint(self) -> Endpoint | None:
        """Where `/metrics`, `/healthz` and `/readyz` are served, with the real port; None if nowhere."""
        return self._watching.endpoint

    @property
    def healthy(self) -> bool:
        """Whether all threads live that nothing works without, as `/healthz` answers."""
        return not self._watching.vitals.dead

    def statistics(self) -> StatisticsSnapshot:
        """Return what was committed so far, and how fast."""
        return self._statistics.snapshot()

    def counts(self) -> ItemCounts:
        """Return where the received items are."""
        return self._counters.snapshot()

    def start(self) -> None:
        """Start everything, or nothing.

        A PostgreSQL that was reached before may be away, if there is a spool. Raises StartupError or
        DatabaseUnavailableError, which say what to do.
        """
        with ExitStack() as stack:
            # Asked before PostgreSQL starts, which may take a while and would have been for nothing.
            self._endpoints.check_free(reuse_port=self._settings.receiver.reuse_port)
            watching, database, remaining = self._watching, self._database, self._deadline.remaining
            watching.start(stack, remaining, self._counters, self._statistics)
            if (tls := self.security.tls) is not None:
                watching.metrics.observe(groups.CERTIFICATE, lambda: tls.expires)
            database.start_server(stack, remaining)
            self._prepare_tables_or_go_without()
            database.connect()
            stack.callback(lambda: database.connections.close(min(remaining(), _UNAWAITED_TIMEOUT)))
            if self._settings.spool.spool:
                self._spooling = Spooling(self._settings.spool, database, self._counters, stack)
            spool = None if self._spooling is None else self._spooling.spool
            watching.metrics.observe(groups.POOL, lambda: database.connections.state)
            watching.look(stack, remaining, self._availability, database.probe, spool)
            stack.callback(self._log_statistics)
            ticker = Ticker(self._jobs())
            stack.callback(lambda: ticker.stop(remaining()))
            retention = self._retention = RetentionRounds(database)
            stack.callback(lambda: retention.stop(remaining()))
            watching.metrics.observe(groups.JOBS, lambda: {**ticker.succeeded, **retention.succeeded})
            watching.metrics.observe(groups.RETENTION, lambda: retention.expired)
            watching.vitals.add("ticker", lambda: ticker.alive)
            watching.vitals.add("retention", lambda: retention.alive)
            if database.server is not None:
                stack.callback(database.server.cancel)  # the ticker's thread may be waiting for it to come back
            self._open_front_door(stack)
            self._running = stack.pop_all()
        if extension is None:
            _logger.info(
                "rows are made by the Python reference, which is slower: there is no native core, which Rust 1.85 or "
                "newer builds when this package is installed, or OTEL_PG_EXPORTER_CORE is python"
            )

    def stop(self) -> None:
        """Finish what is in flight and stop, within `shutdown_timeout`. A second call does nothing."""
        self._running.close()

    def abandon(self) -> None:
        """Tell the embedded PostgreSQL to end by itself, and wait for nothing; the process is to be ended at once."""
        if self._database.server is not None:
            self._database.server.abandon()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # How it starts.

    def _prepare_tables_or_go_without(self) -> None:
        """Prepare the tables; if PostgreSQL is away, leave that to the ticker and take requests for the spool.

        But only if this PostgreSQL was reached before, as its spool's folder tells: a DSN that never worked is wrong.
        """
        try:
            self._database.prepare()
        except DatabaseUnavailableError as exc:
            if not was_used(self._settings.spool, self._database.target):
                raise
            _logger.warning("until there is a connection to PostgreSQL, requests go to the spool: %s", exc.with_remedy)
            for signal in Signal:
                self._availability.note_silence(signal)

    def _start_pipeline(self, stack: ExitStack, budget: ByteBudget) -> Export:
        """Start what writes: the drain of the spool, if there is one, and the batcher."""
        settings, remaining = self._settings, self._deadline.remaining
        window = Window(past=settings.mapping.window_past, future=settings.mapping.window_future)
        plans = {signal: compile_plan(self._mapping, signal, window) for signal in Signal}
        if self._spooling is not None:
            drain = self._spooling.start_drain(plans, self._availability, holds=lambda: Share(budget.reserve(0)))
            stack.callback(lambda: drain.stop(min(remaining(), _UNAWAITED_TIMEOUT)))
            self._watching.vitals.add("spool-drain", lambda: drain.alive)
        batcher = Batcher(
            self._availability.observe(self._database.write), settings.pipeline, took=self._statistics.took
        )
        stack.callback(lambda: self._shut_down(batcher))
        self._watching.vitals.add("writers", lambda: batcher.alive)
        return Export(
            plans,
            batcher.submit,
            self._counters,
            ack_timeout=settings.pipeline.ack_timeout,
            availability=self._availability,
            spool=None if self._spooling is None else self._spooling.spool,
            took=self._statistics.took,
            repeated=self._statistics.repeated,
        )

    def _open_front_door(self, stack: ExitStack) -> None:
        settings, remaining = self._settings, self._deadline.remaining
        bound = settings.pipeline.max_inflight_bytes
        budget = ByteBudget(bound, spare=int(bound * _SPARE_SHARE))
        export = self._start_pipeline(stack, budget)
        for warning in exposure_warnings(settings):
            _logger.warning("%s", warning)
        self.security.follow(stack)
        front_door = FrontDoor(
            export,
            budget,
            settings.receiver,
            security=self.security,
            took=self._statistics.took,
            answered=self._watching.metrics.answered,
        )
        self._watching.metrics.observe(
            groups.QUEUE,
            lambda: Queue(
                bytes=budget.level,
                max_bytes=budget.limit,
                calls=front_door.calls_in_flight,
                max_calls=settings.receiver.max_calls,
            ),
        )
        stack.callback(lambda: front_door.stop(remaining() * (1 - _RESERVED_SHARE)))
        front_door.start()
        self._endpoints = front_door.endpoints
        self._watching.vitals.add("http-server", lambda: front_door.alive)
        self._watching.watch.open(front_door.set_serving)
        stack.callback(self._watching.watch.drain)

    # How it stops.

    def _shut_down(self, batcher: Batcher) -> None:
        awaited = self._counters.snapshot().in_flight
        patience = self._deadline.remaining() * (1 - _RESERVED_SHARE)
        if not batcher.shutdown(patience if awaited else min(patience, _UNAWAITED_TIMEOUT)) and awaited:
            _logger.warning("stopped before all was written; its senders were not told OK, and will send it again")

    # What runs beside.

    def _jobs(self) -> list[Job]:
        jobs = self._database.jobs()
        if interval := self._settings.monitoring.statistics_interval:
            jobs.append(Job(name="statistics", interval=interval, run=self._log_statistics))
        if self._spooling is not None:
            jobs += self._spooling.jobs()
        return jobs

    def _log_statistics(self) -> None:
        _logger.info("statistics: %s", self._statistics.snapshot())
        if self._spooling is not None:
            self._spooling.log_level()
        counts = self._counters.snapshot()
        if counts.received != counts.stored or counts.spooled or counts.recovered_from_spool:
            _logger.info("items: %s", counts)
