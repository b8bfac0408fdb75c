"""COPY FROM STDIN: what psycopg takes for granted about its end, PgBouncer does not keep."""

from collections.abc import Iterable

import psycopg

from otel_pg_exporter.postgres.connection import Connection


def copy_in(connection: Connection, statement: bytes, data: Iterable[bytes]) -> int:
    """Send the data of a COPY; return how many bytes that were. Raises psycopg.Error, and what `data` raises."""
    sent, complete = 0, False
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            for piece in data:
                sent += len(piece)
                copy.write(piece)
            complete = True
    except ValueError as exc:
        # psycopg unpacks a single answer; PgBouncer adds one of its own to the last words of a server's process.
        if not (complete or isinstance(exc.__context__, psycopg.Error)):
            raise  # of `data`
        raise psycopg.OperationalError("the server's process ended in the middle of a COPY") from exc
    return sent
