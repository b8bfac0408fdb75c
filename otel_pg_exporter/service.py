"""The receiver put together: what is started in which order, what is stopped in which order, and what runs beside.

::

    PostgreSQL (embedded) → tables → partitions ahead → connections → spool → ticker → drain → batcher → gRPC → SERVING

Stopping goes the other way round, all of it within `shutdown_timeout`: the front door first, then what waits in the
batcher is written or spooled, then the last statistics are logged, and PostgreSQL goes last.
"""

import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from otel_pg_exporter import mapping
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, StartupError
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.admission import ByteBudget, Share
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.batcher import Batcher
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders, default_spool_dir, folder_of
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.pipeline.ticker import Job, Ticker
from otel_pg_exporter.postgres import partitions
from otel_pg_exporter.postgres.connection import Connections, connect, target_of, watchdog
from otel_pg_exporter.postgres.embedded import EmbeddedServer, default_data_dir
from otel_pg_exporter.postgres.migrate import check, migrate
from otel_pg_exporter.postgres.sqlstate import unavailable
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.receiver.endpoint import Endpoint, check_free, parse_endpoint
from otel_pg_exporter.receiver.grpc import ENDPOINT_SETTING, GrpcServer
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts, Statistics, StatisticsSnapshot
from otel_pg_exporter.transcode import compile_plan, extension

_logger = logging.getLogger(__name__)

_REVIVE_INTERVAL = 1.0  # seconds between two looks at whether PostgreSQL is back
_PARTITIONS_INTERVAL = 3600.0  # seconds; days are created far enough ahead for a week of failures
_ADOPTION_INTERVAL = 5.0  # seconds between two looks for spools that dead processes have left
_PROBE_TIMEOUT = 2.0  # seconds; a spool is to follow PostgreSQL's return within about that
_LEAST_PATIENCE = 4.0  # seconds
_MARGIN = 5.0  # seconds that a statement may outlast its own timeout before its socket is cut

# Of the byte budget, the share that large requests leave to small ones.
_SPARE_SHARE = 1 / 16

# Of the time that a stop may take, the share kept for writing what waits and for PostgreSQL's own end.
_RESERVED_SHARE = 0.25
# What is being written and is nobody's to wait for, since its sender has its answer, gets no longer than this.
_UNAWAITED_TIMEOUT = 2.0  # seconds
# PostgreSQL gets this many seconds for its last checkpoint, even if the drain has used up all the time.
_LEAST_POSTGRES_TIMEOUT = 2.0


class Service:
    """A receiver with its PostgreSQL, as `otel-pg-exporter serve` runs it; a context manager that starts and stops it.

    Used once, and from one thread: `start`, then `stop`. What is here for other threads' eyes is set before they start.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Read the mapping and check the endpoint's spelling; nothing is touched before `start`."""
        self._settings = settings
        self._mapping = mapping.load(settings.mapping.mappings)
        self._endpoint = parse_endpoint(settings.receiver.grpc_endpoint, setting=ENDPOINT_SETTING)
        self._database = settings.database
        self._statistics = Statistics()
        self._counters = ItemCounters()
        self._availability = Availability()
        self._patience = _LEAST_PATIENCE  # seconds that the drain waits for one transaction; its thread's alone
        self._spool: Spool | None = None
        self._server: EmbeddedServer | None = None
        self._port = 0
        self._postgres_version = "not reached yet"
        self._prepared = False
        self._running = ExitStack()
        self._deadline: float | None = None  # of the stop, by time.monotonic

    @property
    def grpc_endpoint(self) -> Endpoint:
        """Where OTLP/gRPC is served, with the real port."""
        return Endpoint(host=self._endpoint.host, port=self._port)

    @property
    def grpc_port(self) -> int:
        """The port of OTLP/gRPC."""
        return self._port

    @property
    def dsn(self) -> str:
        """The DSN of the database; the embedded one's holds no password, but names the passfile."""
        return self._settings.database.dsn if self._server is None else self._server.dsn

    @property
    def postgres_version(self) -> str:
        """What the server calls its version, as `18.4` or `15.14 (Debian 15.14-0+deb12u1)`."""
        return self._postgres_version

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The embedded PostgreSQL, if that is what runs."""
        return self._server

    @property
    def stopping(self) -> bool:
        """Whether a stop has begun, be it because the start failed: nothing may interrupt it, or something is left."""
        return self._deadline is not None

    @property
    def spool_folder(self) -> Path | None:
        """The folder with the spools for this PostgreSQL, if there is a spool."""
        return None if self._spool is None else self._folders.path

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
            check_free(self._endpoint, setting=ENDPOINT_SETTING, reuse_port=self._settings.receiver.reuse_port)
            if not self._settings.database.dsn:
                self._start_postgres(stack)
            self._prepare_tables_or_go_without()
            self._connect()
            stack.callback(lambda: self._connections.close(min(self._remaining(), _UNAWAITED_TIMEOUT)))
            if not self._prepared:
                self._writer.note_absence()
            self._open_spool(stack)
            ticker = Ticker(self._jobs())
            stack.callback(self._log_statistics)
            stack.callback(lambda: ticker.stop(self._remaining()))
            if self._server is not None:
                stack.callback(self._server.cancel)  # the ticker's thread may be waiting for it to come back
            self._open_front_door(stack)
            self._running = stack.pop_all()
        if extension is None:
            _logger.info("rows are made by the Python reference: a native core is not installed, or not wanted")

    def stop(self) -> None:
        """Finish what is in flight and stop, within `shutdown_timeout`. A second call does nothing."""
        self._running.close()

    def abandon(self) -> None:
        """Tell the embedded PostgreSQL to end by itself, and wait for nothing; the process is to be ended at once."""
        if self._server is not None:
            self._server.abandon()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # How it starts.

    def _start_postgres(self, stack: ExitStack) -> None:
        server = self._server = EmbeddedServer(self._settings.data_dir or default_data_dir())
        stack.callback(lambda: server.stop(max(self._remaining(), _LEAST_POSTGRES_TIMEOUT)))
        # In a thread of its own: what a signal raises in the main thread must not come between the fork and the note
        # of the child's process id, or the child would be left behind.
        with ThreadPoolExecutor(1, thread_name_prefix="postgresql-start") as starter:
            started = starter.submit(server.start)
            try:
                started.result()
            except BaseException:
                server.cancel()
                raise
        self._database = replace(self._settings.database, dsn=server.own_dsn)

    def _prepare_tables_or_go_without(self) -> None:
        """Prepare the tables; if PostgreSQL is away, leave that to the ticker and take requests for the spool.

        But only if this PostgreSQL was reached before, as its spool's folder tells: a DSN that never worked is wrong.
        """
        try:
            self._prepare_tables()
        except DatabaseUnavailableError as exc:
            if not self._settings.spool.spool or not folder_of(self._spool_dir, self._target).is_dir():
                raise
            _logger.warning("until there is a connection to PostgreSQL, requests go to the spool: %s", exc)
            for signal in Signal:
                self._availability.note_silence(signal)

    def _prepare_tables(self) -> None:
        """Migrate, or check that somebody has; and create partitions for the days to come."""
        database = self._database
        if self._server is not None or self._settings.migrate:
            applied = migrate(database, self._mapping)
            _logger.info("the tables are up to date%s", f"; applied: {', '.join(applied)}" if applied else "")
        with connect(database) as connection, watchdog(connection, database.statement_timeout + _MARGIN):
            self._postgres_version = connection.info.parameter_status("server_version") or "of unknown version"
            check(connection, database.schema, self._mapping)
            try:
                partitions.ahead(connection, database.schema, self._settings.partitions_ahead)
            except psycopg.Error as exc:
                raise StartupError(str(unavailable(exc, phase="ensure_partitions", broken=connection.broken))) from exc
        self._prepared = True

    def _connect(self) -> None:
        # Two more than writers: the ticker's and the drain's.
        self._connections = Connections(self._database, size=self._settings.pipeline.writer_count + 2)
        self._writer = Writer(self._connections, self._mapping, self._settings.writer, self._statistics)

    def _open_front_door(self, stack: ExitStack) -> None:
        settings = self._settings
        window = Window(past=settings.mapping.window_past, future=settings.mapping.window_future)
        plans = {signal: compile_plan(self._mapping, signal, window) for signal in Signal}
        bound = settings.pipeline.max_inflight_bytes
        budget = ByteBudget(bound, spare=int(bound * _SPARE_SHARE))
        if self._spool is not None:
            writer = SpoolWriter(
                plans,
                self._availability.observe(self._write_spooled),
                probe=self._probe,
                counters=self._counters,
                availability=self._availability,
                ledger_ttl=settings.spool.ledger_ttl,
                holds=lambda: Share(budget.reserve(0)),
            )
            drain = Drain(self._spool, writer, self._counters)
            stack.callback(lambda: drain.stop(min(self._remaining(), _UNAWAITED_TIMEOUT)))
        batcher = Batcher(self._availability.observe(self._write), settings.pipeline, took=self._statistics.took)
        stack.callback(lambda: self._shut_down(batcher))
        export = Export(
            plans,
            batcher.submit,
            self._counters,
            ack_timeout=settings.pipeline.ack_timeout,
            availability=self._availability,
            spool=self._spool,
            took=self._statistics.took,
        )
        receiver = GrpcServer(export, budget, settings.receiver, took=self._statistics.took)
        stack.callback(lambda: receiver.stop(self._remaining() * (1 - _RESERVED_SHARE)))
        self._port = receiver.start()
        receiver.set_serving(True)

    def _open_spool(self, stack: ExitStack) -> None:
        settings = self._settings.spool
        if not settings.spool:
            return
        self._folders = SpoolFolders(self._spool_dir, self._target)
        for other in self._folders.others():
            _logger.info(
                "requests for another PostgreSQL may be left in %s; a receiver for that one will write them", other
            )
        folder = self._folder = self._folders.acquire()
        stack.callback(folder.release)
        spool = self._spool = Spool(folder.path, max_bytes=settings.spool_max_bytes)
        stack.callback(lambda: self._close_spool(spool))
        self._recovered(spool.level.items)

    @property
    def _spool_dir(self) -> Path:
        return self._settings.spool.spool_dir or default_spool_dir()

    @property
    def _target(self) -> str:
        # The embedded server's port may change, its folder is what it is known by.
        server = self._server
        return target_of(self._database) if server is None else f"{server.data_dir} {self._database.schema}"

    def _recovered(self, items: int) -> None:
        if items:
            _logger.info(
                "found %s items in the spool of a process that is dead; what is not set aside will be written",
                f"{items:,}",
            )
            self._counters.add(recovered_from_spool=items, in_spool=items)

    def _probe(self) -> None:
        self._connections.probe(_PROBE_TIMEOUT)

    def _write(self, batches: Sequence[RowBatch]) -> list[Outcome]:
        return self._writer.write(batches)

    def _write_spooled(self, batches: Sequence[RowBatch]) -> list[Outcome]:
        """Write what the drain has, waiting briefly unless that has proved too short.

        So the drain tries another connection soon when the old ones are silent for ever, as behind a load balancer
        that forgot them. What live traffic waits for is cut by its own, longer time-outs.
        """
        try:
            outcomes = self._writer.write(batches, deadline=time.monotonic() + self._patience)
        except DatabaseUnavailableError:
            self._patience = min(self._patience * 2, self._settings.database.statement_timeout + _MARGIN)
            raise
        self._patience = max(_LEAST_PATIENCE, self._patience / 2)
        return outcomes

    # How it stops.

    def _remaining(self) -> float:
        """Return the seconds left for the stop, which begins with the first question."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._settings.shutdown_timeout
        return max(0.0, self._deadline - now)

    def _shut_down(self, batcher: Batcher) -> None:
        awaited = self._counters.snapshot().in_flight
        patience = self._remaining() * (1 - _RESERVED_SHARE)
        if not batcher.shutdown(patience if awaited else min(patience, _UNAWAITED_TIMEOUT)) and awaited:
            _logger.warning("stopped before all was written; its senders were not told OK, and will send it again")

    def _close_spool(self, spool: Spool) -> None:
        level = spool.close()
        if level.requests:
            _logger.warning(
                "%s items stay in the spool %s; the next start with the same settings writes them",
                f"{level.items:,}",
                self._folder.path,
            )

    # What runs beside.

    def _jobs(self) -> list[Job]:
        jobs = [Job(name="partitions ahead", interval=_PARTITIONS_INTERVAL, run=self._create_partitions)]
        if interval := self._settings.monitoring.statistics_interval:
            jobs.append(Job(name="statistics", interval=interval, run=self._log_statistics))
        if self._server is not None:
            jobs.append(Job(name="embedded PostgreSQL", interval=_REVIVE_INTERVAL, run=self._revive))
        if not self._prepared:
            jobs.append(Job(name="preparing the tables", interval=_REVIVE_INTERVAL, run=self._prepare_tables_late))
        if self._spool is not None:
            jobs.append(Job(name="spools of dead processes", interval=_ADOPTION_INTERVAL, run=self._adopt))
        return jobs

    def _adopt(self) -> None:
        spool, failed = self._spool, None
        if spool is None or spool.level.bytes * 2 > self._settings.spool.spool_max_bytes:
            return  # others' requests are safe where they are until ours are written
        for folder in self._folders.of_dead_processes():
            try:
                self._recovered(spool.adopt(Spool(folder.path, max_bytes=sys.maxsize)))
                self._folder.take_corrupt_files(folder)
            except StartupError as exc:  # not to keep the other folders waiting
                failed = exc
            finally:
                folder.release()
        if failed is not None:
            raise failed

    def _prepare_tables_late(self) -> None:
        if not self._prepared:
            self._prepare_tables()

    def _create_partitions(self) -> None:
        database = self._database
        with (
            self._connections.borrow(database.connect_timeout) as connection,
            watchdog(connection, database.statement_timeout + _MARGIN),
        ):
            try:
                partitions.ahead(connection, database.schema, self._settings.partitions_ahead)
            except psycopg.Error as exc:
                raise unavailable(exc, phase="ensure_partitions", broken=connection.broken) from exc

    def _log_statistics(self) -> None:
        _logger.info("statistics: %s", self._statistics.snapshot())
        if self._spool is not None and (level := self._spool.level).requests:
            _logger.info("spool: %s, of %s at most", level, f"{self._settings.spool.spool_max_bytes:,}")
        counts = self._counters.snapshot()
        if counts.received != counts.stored or counts.spooled or counts.recovered_from_spool:
            _logger.info("items: %s", counts)

    def _revive(self) -> None:
        server = self._server
        if server is None or not server.revive():
            return
        if server.own_dsn != self._database.dsn:  # its port was taken meanwhile
            _logger.warning("the embedded PostgreSQL has a new port: %s", server.dsn)
            old = self._connections
            self._database = replace(self._database, dsn=server.own_dsn)
            self._connect()
            old.close(0)
