"""The PostgreSQL that a service writes to: started if it is its own, prepared, connected to, and looked after."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psycopg

from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, SchemaError, StartupError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import Outcome, RowBatch
from otel_pg_exporter.pipeline.ticker import Job
from otel_pg_exporter.postgres import partitions, retention_policy
from otel_pg_exporter.postgres.connection import Connection, Connections, connect, watchdog
from otel_pg_exporter.postgres.dsn import target_of
from otel_pg_exporter.postgres.embedded import EmbeddedServer, default_data_dir
from otel_pg_exporter.postgres.migrate import check, check_objects, migrate
from otel_pg_exporter.postgres.roles import reader_instead
from otel_pg_exporter.postgres.sqlstate import unavailable
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.telemetry import Statistics

_logger = logging.getLogger(__package__)

_REVIVE_INTERVAL = 1.0  # seconds between two looks at whether PostgreSQL is back
_PARTITIONS_INTERVAL = 3600.0  # seconds; days are created far enough ahead for a week of failures
_PROBE_TIMEOUT = 2.0  # seconds; a spool is to follow PostgreSQL's return within about that

# PostgreSQL gets this many seconds for its last checkpoint, even if the drain has used up all the time.
_LEAST_POSTGRES_TIMEOUT = 2.0

OTHER_CONNECTIONS = 4
"""Connections beside the writers': for the ticker, the retention, the drain, and to ask whether PostgreSQL answers."""

STATEMENT_MARGIN = 5.0
"""Seconds that a statement may outlast its own timeout before its socket is cut."""


class Database:
    """Where rows go. Set up from one thread; then the ticker's jobs alone change it, and any thread may write."""

    def __init__(self, settings: ServeSettings, mapping: Mapping, statistics: Statistics) -> None:
        self._settings = settings
        self._mapping = mapping
        self._statistics = statistics
        self.settings = settings.database
        """How it is reached; changes with the embedded server's port."""
        self.server: EmbeddedServer | None = None
        """The embedded server, if that is what runs."""
        self.version = "not reached yet"
        """What the server calls its version, as `18.4` or `15.14 (Debian 15.14-0+deb12u1)`."""
        self.reader_instead: str | None = None
        """A role to look at the spans with, if its own is known not to do for that."""
        self.prepared = False
        """Whether the tables were found, or made, as they must be."""

    @property
    def dsn(self) -> str:
        """The DSN; the embedded one's holds no password, but names the passfile."""
        return self._settings.database.dsn if self.server is None else self.server.dsn

    @property
    def target(self) -> str:
        """What server, database and schema are known by to their spools."""
        # The embedded server's port may change, its folder is what it is known by.
        server = self.server
        return target_of(self.settings) if server is None else f"{server.data_dir} {self.settings.schema}"

    # How it starts.

    def start_server(self, stack: ExitStack, remaining: Callable[[], float]) -> None:
        """Start PostgreSQL, if it is our own; `stack` stops it. Raises StartupError."""
        if self._settings.database.dsn:
            return
        server = self.server = EmbeddedServer(self._settings.data_dir or default_data_dir())
        stack.callback(lambda: server.stop(max(remaining(), _LEAST_POSTGRES_TIMEOUT)))
        # In a thread of its own: what a signal raises in the main thread must not come between the fork and the note
        # of the child's process id, or the child would be left behind.
        with ThreadPoolExecutor(1, thread_name_prefix="postgresql-start") as starter:
            started = starter.submit(server.start)
            try:
                started.result()
            except BaseException:
                server.cancel()
                raise
        self.settings = replace(self.settings, dsn=server.own_dsn)

    def prepare(self) -> None:
        """Migrate, or check that somebody has; and create partitions for the days to come.

        Raises StartupError or DatabaseUnavailableError, which say what to do.
        """
        settings = self.settings
        owner = self.server is not None or self._settings.migrate
        if owner:
            applied = migrate(settings, self._mapping)
            _logger.info("the tables are up to date%s", f"; applied: {', '.join(applied)}" if applied else "")
        with connect(settings) as connection, watchdog(connection, settings.statement_timeout + STATEMENT_MARGIN):
            self.version = connection.info.parameter_status("server_version") or "of unknown version"
            check(connection, settings.schema, self._mapping)
            try:
                check_objects(connection, settings.schema, self._mapping)
            except SchemaError as exc:  # no reason not to receive
                _logger.warning("%s", exc)
            try:
                self.reader_instead = reader_instead(connection, settings.schema)
            except psycopg.Error as exc:
                raise unavailable(exc, phase="asking for privileges", broken=connection.broken) from exc
            self._agree_on_retention(connection, owner=owner)
            try:
                self._create_partitions_by(connection)
            except DatabaseUnavailableError as exc:
                raise StartupError(exc.with_remedy) from exc
        self.prepared = True

    def _agree_on_retention(self, connection: Connection, *, owner: bool) -> None:
        """Write what the settings say of retention into the database, or say that it has something else."""
        schema = self.settings.schema
        wanted = retention_policy.wanted(self._settings.retention, ledger_ttl=self._settings.spool.ledger_ttl)
        if owner:
            for change in retention_policy.write(connection, schema, wanted):
                _logger.info("%s", change)
            return
        try:
            different = retention_policy.differences(connection, schema, wanted)
        except SchemaError as exc:  # no reason not to receive
            _logger.warning("%s", exc)
            return
        for change in different:
            _logger.warning(
                "the retention of %s is %s in the settings, but %s in the database, which counts; the owner of its "
                "tables changes it, by `otel-pg-exporter migrate` with these settings",
                change.item,
                retention_policy.shown(change.after),
                retention_policy.shown(change.before),
            )

    def connect(self) -> None:
        """Make the pool and the writer; nothing is connected before it is used."""
        size = self._settings.pipeline.writer_count + OTHER_CONNECTIONS
        self.connections = Connections(self.settings, size=size)
        self.writer = Writer(self.connections, self._mapping, self._settings.writer, self._statistics)
        if not self.prepared:
            self.writer.note_absence()

    # What it does.

    def write(self, batches: Sequence[RowBatch], *, deadline: float | None = None) -> list[Outcome]:
        """Write whole requests in one transaction; see `Writer.write`."""
        return self.writer.write(batches, deadline=deadline)

    def probe(self) -> None:
        """Raise DatabaseUnavailableError unless PostgreSQL answers."""
        self.connections.probe(_PROBE_TIMEOUT)

    @contextmanager
    def borrow(self) -> Iterator[Connection]:
        """Lend a connection to a job, on which no statement outlasts its time by much."""
        settings = self.settings
        with (
            self.connections.borrow(settings.connect_timeout) as connection,
            watchdog(connection, settings.statement_timeout + STATEMENT_MARGIN),
        ):
            yield connection

    def jobs(self) -> list[Job]:
        """Return what is to be done now and then."""
        jobs = [Job(name="partitions ahead", interval=_PARTITIONS_INTERVAL, run=self._create_partitions)]
        if self.server is not None:
            jobs.append(Job(name="embedded PostgreSQL", interval=_REVIVE_INTERVAL, run=self._revive))
        if not self.prepared:
            jobs.append(Job(name="preparing the tables", interval=_REVIVE_INTERVAL, run=self._prepare_late))
        return jobs

    def _create_partitions(self) -> None:
        with self.borrow() as connection:
            complete = self._create_partitions_by(connection)
        if not complete:
            raise DatabaseUnavailableError(
                "not all of the days to come have partitions yet; the next try is in an hour"
            )

    def _create_partitions_by(self, connection: Connection) -> bool:
        """Return whether all days that are wanted have partitions now."""
        try:
            days = partitions.ahead(connection, self.settings.schema, self._settings.partitions_ahead)
            return len(days) == self._settings.partitions_ahead + 1  # today, too
        except psycopg.Error as exc:
            raise unavailable(exc, phase="ensure_partitions", broken=connection.broken) from exc

    def _prepare_late(self) -> None:
        if not self.prepared:
            self.prepare()

    def _revive(self) -> None:
        server = self.server
        if server is None or not server.revive():
            return
        if server.own_dsn != self.settings.dsn:  # its port was taken meanwhile
            _logger.warning("the embedded PostgreSQL has a new port: %s", server.dsn)
            self.settings = replace(self.settings, dsn=server.own_dsn)
            self.connections.lead_to(self.settings)  # those to the old port have ended with what listened there
