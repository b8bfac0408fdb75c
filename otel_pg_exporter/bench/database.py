"""Where a bench writes: tables of its own, which are gone afterwards whatever happens."""

import contextlib
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
from psycopg import sql

from otel_pg_exporter.bench.signals import undisturbed
from otel_pg_exporter.config import DatabaseSettings, ServeSettings
from otel_pg_exporter.errors import ExporterError, StartupError
from otel_pg_exporter.postgres.connection import connect, watchdog
from otel_pg_exporter.postgres.sqlstate import unavailable

_logger = logging.getLogger(__name__)

_ASK_TIMEOUT = 10.0  # seconds
_DROP_TIMEOUT = 120.0  # seconds, for some gigabytes that are unlinked

# While another bench runs, nobody can tell whose they are. Ours is connected already.
_LEFT = (
    "SELECT nspname FROM pg_namespace WHERE nspname ~ '^otel_bench_[0-9a-f]{12}$' AND NOT EXISTS (SELECT FROM"
    " pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid() AND datname = current_database())"
)


@contextlib.contextmanager
def own_tables(settings: ServeSettings) -> Iterator[ServeSettings]:
    """Yield the settings of a receiver that makes its tables where they harm nobody; then remove them.

    With a DSN that is a schema which nothing else has, without one a PostgreSQL in a temporary folder. The receiver
    must have ended when the block does. Raises StartupError where schemas may not be created, and OutageError.
    """
    if not settings.database.dsn:
        folder = Path(tempfile.mkdtemp(prefix="otel-pg-exporter-bench-"))
        try:
            yield replace(settings, data_dir=folder)
        finally:
            with undisturbed():
                shutil.rmtree(folder, ignore_errors=True)
        return
    own = replace(
        settings.database, schema=f"otel_bench_{secrets.token_hex(6)}", application_name="otel-pg-exporter bench"
    )
    _require_create(own)
    try:
        yield replace(settings, database=own, migrate=True)
    finally:
        with undisturbed():
            _drop(own)


def _require_create(settings: DatabaseSettings) -> None:
    """Raise StartupError where schemas may not be created; tell of those that a bench left which was killed."""
    query = "SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE')"
    with connect(settings) as connection, watchdog(connection, _ASK_TIMEOUT):
        try:
            ((user, database, allowed),) = connection.execute(query).fetchall()
            left = connection.execute(_LEFT, [settings.application_name]).fetchall()
        except psycopg.Error as exc:
            raise unavailable(exc, phase="asking for privileges", broken=connection.broken) from exc
    for (schema,) in left:
        _logger.warning("a bench that was killed has left a schema behind: %s", _drop_statement(schema).as_string())
    if not allowed:
        raise StartupError(
            f"bench makes a schema of its own, and user {user} may not create one in database {database}: "
            f'GRANT CREATE ON DATABASE "{database}" TO "{user}", or name the database\'s owner or an administrator'
        )


def _drop_statement(schema: str) -> sql.Composed:
    return sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema))


def _drop(settings: DatabaseSettings) -> None:
    drop = _drop_statement(settings.schema)
    try:
        with connect(settings) as connection, watchdog(connection, _DROP_TIMEOUT):
            connection.execute("SET statement_timeout = 0")  # a role may have its own
            connection.execute(drop)
    except (psycopg.Error, ExporterError) as exc:  # not to hide what else went wrong, nor the figures
        reason = " ".join(str(exc).split())
        _logger.error("the schema is left behind (%s); once you can: %s", reason, drop.as_string())  # noqa: TRY400 - as above
