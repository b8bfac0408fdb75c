"""The PostgreSQL that a benchmark writes to, and tables of its own in it."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import psycopg
from psycopg import sql

from otel_pg_exporter import mapping
from otel_pg_exporter.bench.processes import cpu_seconds
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.postgres.connection import Connection, connect
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from otel_pg_exporter.postgres.partitions import ensure_partitions

# What somebody who cares would set on a small server. All else, fsync, full_page_writes and synchronous_commit above
# all, keeps PostgreSQL's default: an answer here is as durable as it is in production.
PRODUCTION = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "wal_compression": "on",
}

_TABLES = ("spans", "logs", "traces", "resources", "ingest_requests", "dead_letters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """Migrated tables in a schema that the benchmark may empty and drop."""

    settings: DatabaseSettings
    mapping: Mapping
    admin: Connection
    postmaster: int | None  # its process, if that is on this machine

    def cpu(self) -> float:
        """Return the seconds that all of PostgreSQL's processes have computed; 0 for one elsewhere."""
        return 0.0 if self.postmaster is None else cpu_seconds(self.postmaster, with_children=True)

    def connect(self) -> Connection:
        """Open a plain connection of psycopg, with its defaults."""
        return psycopg.connect(self.settings.dsn, autocommit=True)

    def name(self, table: str) -> sql.Identifier:
        """Return a table's qualified name."""
        return sql.Identifier(self.settings.schema, table)

    def truncate(self) -> None:
        """Empty all tables: new files, so that no rung finds what another left behind."""
        self.admin.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(map(self.name, _TABLES))))

    def count(self, table: str) -> int:
        """Count a table's rows."""
        rows = self.admin.execute(sql.SQL("SELECT count(*) FROM {}").format(self.name(table))).fetchall()
        return int(rows[0][0])

    @contextlib.contextmanager
    def constraint(self, table: str, condition: LiteralString) -> Iterator[None]:
        """Add a CHECK constraint for a while."""
        target = self.name(table)
        self.admin.execute(
            sql.SQL("ALTER TABLE {} ADD CONSTRAINT benchmark CHECK ({})").format(target, sql.SQL(condition))
        )
        try:
            yield
        finally:
            self.admin.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT benchmark").format(target))

    def version(self) -> str:
        """Return the server's version."""
        return str(self.admin.execute("SHOW server_version").fetchall()[0][0])


@contextlib.contextmanager
def database(dsn: str | None, *, day: int, configuration: MappingOf[str, str] | None = None) -> Iterator[Database]:
    """Provide tables in a schema of their own, with a partition for `day`; the schema is dropped afterwards.

    Without a DSN a PostgreSQL is started for it, in a temporary folder, with `configuration` on top of `PRODUCTION`.
    """
    with contextlib.ExitStack() as stack:
        postmaster = None
        if dsn is None:
            folder = Path(tempfile.mkdtemp(prefix="otel-pg-exporter-benchmark-"))
            stack.callback(shutil.rmtree, folder)
            server = stack.enter_context(EmbeddedServer(folder, settings={**PRODUCTION, **(configuration or {})}))
            dsn, postmaster = server.dsn, server.pid
        settings = DatabaseSettings(dsn=dsn, schema=f"otel_benchmark_{os.getpid()}")
        columns = mapping.load()
        admin = stack.enter_context(contextlib.closing(connect(settings)))
        if postmaster is None:
            postmaster = _postmaster(admin)
        drop = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(settings.schema))
        stack.callback(admin.execute, drop)
        migrate(settings, columns)
        ensure_partitions(admin, settings.schema, [day])
        yield Database(settings=settings, mapping=columns, admin=admin, postmaster=postmaster)


def _postmaster(connection: Connection) -> int | None:
    """Return the parent of a connection's process, if that can be seen from here: the server may be anywhere."""
    pid = connection.info.backend_pid
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    database_ = re.escape(connection.info.dbname.encode())
    return int(status.partition("PPid:")[2].split()[0]) if re.match(rb"postgres: .* %b " % database_, command) else None
