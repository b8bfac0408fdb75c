"""Daily partitions, on demand and ahead, through the one SQL function that the writer's role may call."""

import logging
from collections.abc import Iterable, Iterator

import psycopg
from psycopg import sql

from otel_pg_exporter.postgres.connection import Connection

_logger = logging.getLogger(__name__)

LET_GO = sql.SQL("SET LOCAL idle_in_transaction_session_timeout = '2s'")
"""For who locks a whole table: everybody waits until it commits, be it that it is frozen, or its machine is gone."""

_DAYS_A_CALL = 30  # writers wait while a call creates partitions (some 15 ms a day), so none may take long


def ensure_partitions(
    connection: Connection, schema: str, days: Iterable[int], *, lock_timeout: float = 0.5
) -> frozenset[int]:
    """Give `days`, counted from 1970-01-01 UTC, partitions of their own; return those that have them now.

    The connection must be outside a transaction. A day is left out, with a warning, when its lock is not to be had in
    time: its rows go to the DEFAULT partition, and a later call moves them. So is one that is older than the retention,
    without a word: its rows stay in DEFAULT, and are pruned there. While it waits, writers queue behind it,
    so callers should not ask for the same day again at once.
    """
    done: set[int] = set()
    for first, last in _ranges(days):
        try:
            done |= _ensure(connection, schema, first, last, lock_timeout)
        except (
            psycopg.errors.LockNotAvailable,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.InvalidParameterValue,
        ) as exc:
            _logger.warning(
                "no partitions yet for days %d to %d since 1970 (%s); their rows go to the DEFAULT partition",
                first,
                last,
                exc.diag.message_primary,
            )
    return frozenset(done)


def ahead(connection: Connection, schema: str, days_ahead: int = 7) -> frozenset[int]:
    """Give today, by the server's clock, and the next `days_ahead` days partitions; return as `ensure_partitions`."""
    query = "SELECT (now() AT TIME ZONE 'UTC')::date - date '1970-01-01'"
    today: int = connection.execute(query).fetchall()[0][0]
    return ensure_partitions(connection, schema, range(today, today + days_ahead + 1))


def _ensure(connection: Connection, schema: str, first: int, last: int, lock_timeout: float) -> set[int]:
    # Said in full: the function needs READ COMMITTED, whatever the user's default is.
    limits = sql.SQL("SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {}; {}").format(
        f"{max(1, round(lock_timeout * 1000))}ms", LET_GO
    )
    call = sql.SQL(
        "SELECT day - date '1970-01-01' FROM {}(date '1970-01-01' + %s::int4, date '1970-01-01' + %s::int4) AS day"
    ).format(sql.Identifier(schema, "ensure_partitions"))
    with connection.transaction():
        connection.execute(limits)
        return {row[0] for row in connection.execute(call, [first, last])}


def _ranges(days: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Group days to ranges without gaps, none longer than one call is to take."""
    wanted = sorted(set(days))
    start = 0
    for index in range(1, len(wanted) + 1):
        if index == len(wanted) or wanted[index] != wanted[index - 1] + 1 or index - start == _DAYS_A_CALL:
            yield wanted[start], wanted[index - 1]
            start = index
