"""What the operator's commands share: a transaction with limits, errors in the operator's terms, sizes."""

import contextlib
from collections.abc import Iterator

import psycopg

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError
from otel_pg_exporter.postgres import statements
from otel_pg_exporter.postgres.connection import Connection, watchdog
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, reason, remedy, unavailable

_STATEMENTS = 5  # no transaction of an operator's command has more
_MARGIN = 5.0  # seconds that the server's own timeouts get to strike first

# Values travel as text where a damaged row may hold what Python can't; so the text must be the same everywhere.
_SPELLING = "SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SET LOCAL bytea_output = 'hex'"
# To compile a statement over hundreds of partitions takes longer than to run it.
_NO_JIT = "SET LOCAL jit = off"

# Whoever may not repair needs no wider rights, but another role.
_ROLES = (
    "log in as a role that may: otel_reader looks, otel_operator repairs, otel_writer removes what has expired "
    "(docs/how-to/roles.md)"
)
_HINTS = {
    "57014": "allow it more time by --statement-timeout",
    "55P03": "try again, or allow it more time by --lock-timeout",
}


@contextlib.contextmanager
def transaction(connection: Connection, settings: DatabaseSettings, *, doing: str) -> Iterator[Connection]:
    """Run the block between BEGIN and COMMIT, with the limits of the settings; times are spelled in UTC.

    Raises DatabaseUnavailableError, which says what the command was `doing`.
    """
    with watchdog(connection, _STATEMENTS * settings.statement_timeout + _MARGIN):
        try:
            connection.execute(statements.begin(settings))
            connection.execute(f"{_SPELLING}; {_NO_JIT}")
            yield connection
            connection.execute("COMMIT")
        except BaseException as exc:
            broken = connection.closed or connection.broken
            if not broken:
                with contextlib.suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
            if isinstance(exc, psycopg.Error):
                raise _failed(exc, doing=doing, broken=broken) from exc
            raise


def _failed(error: psycopg.Error, *, doing: str, broken: bool) -> DatabaseUnavailableError:
    state = error.sqlstate or "no SQLSTATE"
    if classify(error, broken=broken) is not Verdict.RETRY:
        todo = _ROLES if state == "42501" else remedy(error)
        return DeploymentError(f"PostgreSQL refuses {doing}: {reason(error)} ({state}); {todo}")
    if state in _HINTS and not broken:
        return DatabaseUnavailableError(f"{doing}: {reason(error)} ({state}); {_HINTS[state]}")
    return unavailable(error, phase=doing, broken=broken)


def size(count: float) -> str:
    """Write a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:  # noqa: PLR2004 - as the units have it
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"
