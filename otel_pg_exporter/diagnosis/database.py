"""The database as a whole: the way to it, what kind it is, how it is set, and what strains it."""

import datetime as dt
import time
from collections.abc import Iterator
from contextlib import closing

from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.diagnosis.asking import Database
from otel_pg_exporter.diagnosis.finding import Check, Finding, findings_of, ok, problem, warning
from otel_pg_exporter.diagnosis.load import load_checks
from otel_pg_exporter.diagnosis.tables import table_checks
from otel_pg_exporter.errors import DatabaseUnavailableError
from otel_pg_exporter.postgres.connection import connect
from otel_pg_exporter.postgres.encryption import encryption_is_optional
from otel_pg_exporter.postgres.libpq import CHECK_DSN, variables
from otel_pg_exporter.service.database import OTHER_CONNECTIONS

_OLDEST, _NEWEST = 13, 18  # major versions of PostgreSQL that the tests know
_CLOCK_TOLERANCE = 1.0  # seconds
_LEAST_SHARED_BUFFERS = 128 * 2**20
_LEAST_MAX_WAL_SIZE = 2**30


def examine_database(settings: ServeSettings, *, own: bool) -> Iterator[Finding]:
    """Connect, and yield what is found; changes nothing. `own`: it is the PostgreSQL that `serve` brings along."""
    started = time.monotonic()
    try:
        connection = connect(settings.database)
    except DatabaseUnavailableError as exc:
        yield problem("connection", str(exc), exc.remedy or CHECK_DSN)
        return
    seconds = time.monotonic() - started
    with closing(connection):
        database = Database(connection, settings.database, own=own)
        checks: list[tuple[str, Check]] = [
            ("connection", lambda: _connection(database, seconds)),
            ("encryption", lambda: _encryption(database)),
            ("server", lambda: _server(database)),
            ("clock", lambda: _clock(database)),
            ("durability", lambda: _durability(database, settings)),
            ("server settings", lambda: _server_settings(database)),
            ("connections", lambda: _connections(database, settings)),
            *table_checks(database, settings),
            *load_checks(database),
        ]
        yield from findings_of(checks)


def _connection(database: Database, seconds: float) -> Iterator[Finding]:
    info = database.connection.info
    place = f"{info.host}:{info.port}" + (f" ({info.hostaddr})" if info.hostaddr not in {"", info.host} else "")
    names = variables()
    hints = f", with {', '.join(names)} from the environment" if names else ""
    yield ok("connection", f"user {info.user}, database {info.dbname} at {place}, in {seconds * 1e3:.0f} ms{hints}")
    # PgBouncer hands out process ids of its own.
    if database.value("SELECT pg_backend_pid()") != info.backend_pid:
        yield ok("pooler", "a pooler such as PgBouncer stands in between, which is supported")


def _encryption(database: Database) -> Iterator[Finding]:
    connection = database.connection
    options = {option.keyword.decode(): (option.val or b"").decode() for option in connection.pgconn.info}
    used, sslmode = connection.pgconn.ssl_in_use, options.get("sslmode", "")
    state = f"TLS {'is' if used else 'is not'} in use, sslmode={sslmode}"
    if encryption_is_optional(connection.info.hostaddr, sslmode):
        yield warning(
            "encryption",
            f"{state}, which does not insist on it, and the server is another machine",
            "set sslmode=verify-full and sslrootcert in the DSN, or at least sslmode=require",
        )
    else:
        yield ok("encryption", state)


def _server(database: Database) -> Iterator[Finding]:
    name = database.connection.info.parameter_status("server_version")
    major = database.connection.info.server_version // 10_000
    if major < _OLDEST:
        yield problem("version", f"PostgreSQL {name} is too old", f"upgrade it to {_OLDEST} or later")
    elif major > _NEWEST:
        yield warning("version", f"PostgreSQL {name} is newer than what was tested, {_OLDEST} to {_NEWEST}")
    else:
        yield ok("version", f"PostgreSQL {name}")
    standby, read_only, encoding = database.row(
        "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')::bool,"
        " current_setting('server_encoding')"
    )
    if standby:
        yield problem(
            "primary",
            "this server is a standby, which takes no rows",
            "name all servers in the DSN, and add target_session_attrs=read-write",
        )
    elif read_only:
        yield problem(
            "primary",
            "transactions are read-only by default (default_transaction_read_only)",
            "find out who set it and why; ALTER ROLE … or ALTER DATABASE … RESET default_transaction_read_only",
        )
    else:
        yield ok("primary", "a primary, which takes rows")
    if encoding == "UTF8":
        yield ok("encoding", "UTF8")
    else:
        yield problem(
            "encoding", f"the database's encoding is {encoding}", "make another one: CREATE DATABASE … ENCODING 'UTF8'"
        )


def _clock(database: Database) -> Iterator[Finding]:
    before = dt.datetime.now(dt.UTC)
    theirs = database.value("SELECT clock_timestamp()")
    after = dt.datetime.now(dt.UTC)
    trip = (after - before).total_seconds()
    ahead = (theirs - before).total_seconds() - trip / 2
    if abs(ahead) <= _CLOCK_TOLERANCE + trip / 2:
        yield ok("clock", f"the server's and this machine's agree within {abs(ahead) + trip / 2:.3f} s")
        return
    yield warning(
        "clock",
        f"the server's is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: partitions are "
        "made by the one, rows are judged by the other",
        "keep both in time by NTP (timedatectl status)",
    )


def _durability(database: Database, settings: ServeSettings) -> Iterator[Finding]:
    fsync, full_page_writes, servers = database.row(
        "SELECT current_setting('fsync')::bool, current_setting('full_page_writes')::bool,"
        " current_setting('synchronous_commit')"
    )
    off = [name for name, on in (("fsync", fsync), ("full_page_writes", full_page_writes)) if not on]
    for name in off:
        yield warning(
            "durability",
            f"{name} is off: a crash of the machine may cost the whole database",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();",
        )
    ours = settings.database.synchronous_commit
    waits_for = servers if ours == "server" else ours
    if waits_for == "off":
        yield warning(
            "durability",
            "synchronous_commit is off: an OK is given for what a crash may still take back",
            "set --synchronous-commit on",
        )
    elif not off:
        yield ok("durability", f"fsync and full_page_writes are on, a COMMIT waits for {waits_for}")


def _server_settings(database: Database) -> Iterator[Finding]:
    [(buffers, wal, lz4)] = database.rows(
        "SELECT pg_size_bytes(current_setting('shared_buffers')), pg_size_bytes(current_setting('max_wal_size')),"
        " EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals))"
    )
    low = []
    if buffers < _LEAST_SHARED_BUFFERS:
        low.append(("shared_buffers", f"{buffers // 2**20} MB", "a quarter of the memory; takes a restart"))
    if wal < _LEAST_MAX_WAL_SIZE:
        low.append(("max_wal_size", f"{wal // 2**20} MB", "4GB; checkpoints are frequent else"))
    for name, value, better in low:
        yield warning("server settings", f"{name} is {value}", f"ALTER SYSTEM SET {name} = …, better: {better}")
    if not lz4:
        said = "this PostgreSQL has no lz4: long attributes, such as prompts, are stored two to three times slower"
        if database.own:  # as it was built; nothing is wrong with it
            yield ok("server settings", said)
        else:
            yield warning("server settings", said, "version 14 and later have it, where they are built with it")
    if not low and lz4:
        yield ok("server settings", "shared_buffers, max_wal_size and lz4 are fine")


def _connections(database: Database, settings: ServeSettings) -> Iterator[Finding]:
    limit, used, role_limit, role_used = database.row(
        "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,"
        " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()),"
        " (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),"
        " (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user AND pid <> pg_backend_pid())"
    )
    needed = settings.pipeline.writer_count + OTHER_CONNECTIONS
    free = limit - used
    if role_limit >= 0:
        free = min(free, role_limit - role_used)
    said = f"{free} of {limit} are free, and one `serve` takes up to {needed}"
    if free < needed:
        yield warning(
            "connections",
            f"{said}; one that runs already is among those in use",
            "lower --writers, raise max_connections or the role's CONNECTION LIMIT, or put PgBouncer in front",
        )
    else:
        yield ok("connections", said)
