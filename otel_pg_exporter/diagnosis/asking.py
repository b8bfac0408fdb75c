"""Questions to PostgreSQL, each in a short transaction of its own."""

from dataclasses import replace
from typing import Any, LiteralString

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction

_TIMEOUT = 10.0  # seconds that one question may take


class Database:
    """A PostgreSQL that is being examined, over one connection."""

    def __init__(self, connection: Connection, settings: DatabaseSettings, *, own: bool) -> None:
        self.connection = connection
        self.own = own
        """Whether it is the PostgreSQL that `serve` brings along."""
        self.schema = settings.schema
        timeout = min(_TIMEOUT, settings.statement_timeout)
        # As the server has it: whoever only asks commits nothing that could be lost.
        self._settings = replace(settings, statement_timeout=timeout, lock_timeout=1.0, synchronous_commit="server")

    def rows(self, query: str | sql.Composed, *parameters: object) -> list[tuple[Any, ...]]:
        """Return what a query returns. Raises DatabaseUnavailableError."""
        statement = query.encode() if isinstance(query, str) else query
        with transaction(self.connection, self._settings, doing="a question of the check") as connection:
            return connection.execute(statement, parameters or None).fetchall()

    def row(self, query: str | sql.Composed, *parameters: object) -> tuple[Any, ...]:
        """Return the one row that a query returns."""
        [row] = self.rows(query, *parameters)
        return row

    def value(self, query: str | sql.Composed, *parameters: object) -> Any:  # noqa: ANN401 - the caller knows the type
        """Return the one value that a query returns."""
        [value] = self.row(query, *parameters)
        return value

    def table(self, name: str) -> sql.Identifier:
        """Name a table of ours."""
        return sql.Identifier(self.schema, name)


def composed(query: LiteralString, *parts: sql.Composable) -> sql.Composed:
    """Fill in a query's names."""
    return sql.SQL(query).format(*parts)
