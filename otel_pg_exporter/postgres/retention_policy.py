"""What is kept how long: the table `retention`, one policy for all that write there, and settings held against it."""

from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
from psycopg import sql

from otel_pg_exporter.config import RetentionSettings
from otel_pg_exporter.errors import ExporterError, SchemaError
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, reason, unavailable

_DAY = 86_400

Policy = Mapping[str, float | None]
"""Seconds by item of the table; None: for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An item that is, or should be, kept for another time than the database has it."""

    item: str
    before: float | None  # seconds; None: for ever
    after: float | None

    def __str__(self) -> str:
        return f"the retention of {self.item} is {shown(self.after)} now; it was {shown(self.before)}"


def shown(seconds: float | None) -> str:
    """Write a time as the settings take it, `30d`."""
    if seconds is None:
        return "for ever"
    for unit, length in (("d", _DAY), ("h", 3600), ("m", 60)):
        if seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"


def read(connection: Connection, schema: str) -> Policy:
    """Read the policy; raise psycopg.Error."""
    query = sql.SQL("SELECT item, extract(epoch FROM keep)::float8 FROM {} ORDER BY item").format(
        sql.Identifier(schema, "retention")
    )
    return dict(connection.execute(query).fetchall())


def wanted(settings: RetentionSettings, *, ledger_ttl: float | None = None) -> Policy:
    """Return what settings say; what they leave to the database is not in it."""
    values = {
        "spans": settings.retention_spans,
        "logs": settings.retention_logs,
        "dead_letters": settings.retention_dead_letters,
    }
    given: Policy = {item: value or None for item, value in values.items() if value is not None}
    return given if ledger_ttl is None else {**given, "ingest_requests": ledger_ttl}


def changes(policy: Policy, wanted: Policy) -> list[Change]:
    """Return what differs.

    The ledger is never kept shorter than somebody counts on, so a time that is longer than wanted is none.
    """
    return [
        Change(item=item, before=policy.get(item), after=after)
        for item, after in wanted.items()
        if policy.get(item) != after and not (item == "ingest_requests" and (policy.get(item) or 0) >= (after or 0))
    ]


def differences(connection: Connection, schema: str, wanted: Policy) -> list[Change]:
    """Return what the database has otherwise, without changing it; raise as `write`."""
    try:
        return changes(read(connection, schema), wanted)
    except psycopg.Error as exc:
        raise _failed(exc, connection, f"the retention in schema {schema} can't be read") from exc


def write(connection: Connection, schema: str, wanted: Policy) -> list[Change]:
    """Bring the database's policy in line; return what was changed. Only the tables' owner may.

    Raises SchemaError and DatabaseUnavailableError.
    """
    try:
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            made = changes(read(connection, schema), wanted)
            for change in made:
                connection.execute(update(schema, change.item, change.after))
    except psycopg.Error as exc:
        raise _failed(
            exc, connection, f"the retention in schema {schema} can't be changed, which its owner may"
        ) from exc
    return made


def update(schema: str, item: str, seconds: float | None) -> sql.Composed:
    """Compile the change of one item."""
    keep = (
        sql.SQL("NULL")
        if seconds is None
        else sql.SQL("justify_hours(make_interval(secs => {}))").format(sql.Literal(seconds))
    )
    return sql.SQL(
        "INSERT INTO {} (item, keep) VALUES ({}, {}) ON CONFLICT (item) DO UPDATE SET keep = EXCLUDED.keep"
    ).format(sql.Identifier(schema, "retention"), sql.Literal(item), keep)


def _failed(error: psycopg.Error, connection: Connection, what: str) -> ExporterError:
    broken = connection.closed or connection.broken
    if classify(error, broken=broken) is Verdict.RETRY:
        return unavailable(error, phase="retention", broken=broken)
    return SchemaError(
        f"{what}: {reason(error)} ({error.sqlstate}); `otel-pg-exporter migrate --roles` grants the rights"
    )
