"""Retention: drops and prunes what is older than the database's policy says, in short transactions beside ingest.

The functions of migrations/0004_retention.sql decide what goes; here is only when, and how gently. Each transaction
holds an advisory lock, so that of many replicas one works at a time; between two of them, whoever comes first goes on.

To drop a partition, its table must be locked for a moment, against everybody. While that lock is waited for, every COPY
waits behind it: so the wait is short, and tried again after a pause, in which they catch up.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction
from otel_pg_exporter.postgres.partitions import LET_GO

# What waits for no lock of others first; rows of DEFAULT before the traces and resources that they keep.
_STEPS = (
    ("prune", "ingest_requests"),
    ("prune", "dead_letters"),
    ("drop", "spans"),
    ("drop", "logs"),
    ("prune", "spans"),
    ("prune", "logs"),
    ("prune", "traces"),
    ("prune", "resources"),
)
_LABELS = {"spans": "spans_default", "logs": "logs_default"}  # what is pruned row by row of them

_LOCK_TIMEOUTS = (0.05, 0.1, 0.2)  # seconds; the last one from the third attempt on
_ATTEMPTS = 20
_PAUSE = 1.0  # seconds between two attempts, half more or less
_CLOCKS_APART = 86_400.0  # seconds; what goes, goes by the server's clock, and a leap of it would take everything
_LEAST_PAUSE = 0.01  # seconds between two batches, which otherwise pause for as long as they took


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What a round removed."""

    partitions: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # by table, none that is zero

    def __bool__(self) -> bool:
        return bool(self.partitions or self.rows)

    def __str__(self) -> str:
        parts = [f"dropped {', '.join(self.partitions)}"] if self.partitions else []
        parts += [f"deleted {count:,} rows of {table}" for table, count in self.rows.items()]
        return "; ".join(parts) or "nothing to remove"


class Retention:
    """Works off what is expired; of one thread, but for `stop`."""

    def __init__(
        self,
        borrow: Callable[[], AbstractContextManager[Connection]],
        settings: Callable[[], DatabaseSettings],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`borrow` lends a connection outside of a transaction; `settings` may change with it."""
        self._borrow = borrow
        self._settings = settings
        self._now = now
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let the round that is under way end after its transaction."""
        self._stopping.set()

    def run(self, *, within: float, report: Callable[[Removed], None] = lambda _removed: None) -> Removed:
        """Remove what is expired, and stop after `within` seconds; `report` hears what is done so far.

        What fails keeps nothing else from being done; then the first failure is raised, a DatabaseUnavailableError that
        says what to do.
        """
        deadline = time.monotonic() + within
        self._compare_clocks()
        done = _Done(report)
        failed: DatabaseUnavailableError | None = None
        for verb, name in _STEPS:
            try:
                (self._drop if verb == "drop" else self._prune)(name, deadline, done)
            except DatabaseUnavailableError as exc:
                if not isinstance(exc, _LockedError) and getattr(exc.__cause__, "sqlstate", None) is None:
                    raise  # PostgreSQL is away
                failed = failed or exc
        if failed is not None:
            raise failed
        return done.removed

    def _compare_clocks(self) -> None:
        """Raise DatabaseUnavailableError where nobody can tell what is old."""
        with self._borrow() as connection, transaction(connection, self._settings(), doing="retention"):
            [(servers,)] = connection.execute("SELECT extract(epoch FROM now())::float8").fetchall()
        if abs(ahead := servers - self._now()) > _CLOCKS_APART:
            raise DatabaseUnavailableError(
                f"the clock of PostgreSQL is {abs(ahead) / 86_400:,.1f} days "
                f"{'ahead of' if ahead > 0 else 'behind'} this machine's; nothing is removed until they agree"
            )

    def _drop(self, table: str, deadline: float, done: "_Done") -> None:
        while self._in_time(deadline):
            [(dropped,)] = self._attempt("SELECT {}(%s)", "drop_expired_partition", table, deadline)
            if dropped is None:
                return
            done.partition(dropped)
            self._stopping.wait(_LEAST_PAUSE)

    def _prune(self, item: str, deadline: float, done: "_Done") -> None:
        finished = False
        while not finished and self._in_time(deadline):
            began = time.monotonic()
            [(count, finished)] = self._attempt("SELECT * FROM {}(%s)", "prune_expired", item, deadline)
            done.rows(_LABELS.get(item, item), count)
            self._stopping.wait(max(time.monotonic() - began, _LEAST_PAUSE))

    def _in_time(self, deadline: float) -> bool:
        return time.monotonic() < deadline and not self._stopping.is_set()

    def _attempt(self, template: LiteralString, function: str, argument: str, deadline: float) -> list[tuple[Any, ...]]:
        """Call a function until it gets its locks."""
        settings = self._settings()
        call = sql.SQL(template).format(sql.Identifier(settings.schema, function))
        attempt, busy = 0, ""
        while True:
            patience = _LOCK_TIMEOUTS[min(attempt, len(_LOCK_TIMEOUTS) - 1)]
            try:
                rows = self._call(replace(settings, lock_timeout=patience), call, argument)
            except DatabaseUnavailableError as exc:
                if not isinstance(exc.__cause__, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
                    raise
                busy = (
                    f"{argument} stays locked; end what holds it (pg_stat_activity and pg_locks show it), as long "
                    "queries and transactions that are idle"
                )
            else:
                if rows:
                    return rows
                # After attempts that met a locked table, it may as well be another receiver, which meets the same.
                busy = busy or "another session holds its advisory lock, and is no receiver, which would let go"
            attempt += 1
            if attempt == _ATTEMPTS or not self._in_time(deadline):
                raise _LockedError(f"{function}() got no lock in {attempt} attempts: {busy}")
            self._stopping.wait(random.uniform(0.5, 1.5) * _PAUSE)  # noqa: S311 - spreads replicas, guards nothing

    def _call(self, settings: DatabaseSettings, call: sql.Composed, argument: str) -> list[tuple[Any, ...]]:
        """Call in a transaction of its own; return nothing where another replica is at work."""
        election = "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"
        # Nobody is to wait, behind our locks, until a standby has what we do.
        settings = replace(settings, synchronous_commit="local")
        with self._borrow() as connection, transaction(connection, settings, doing="retention"):
            connection.execute(LET_GO)
            [(elected,)] = connection.execute(election, [f"otel-pg-exporter retention {settings.schema}"]).fetchall()
            return connection.execute(call, [argument]).fetchall() if elected else []


class _LockedError(DatabaseUnavailableError):
    """A lock was not to be had; other work may be possible."""


class _Done:
    """What a round has removed so far."""

    def __init__(self, report: Callable[[Removed], None]) -> None:
        self._report = report
        self._partitions: list[str] = []
        self._rows: Counter[str] = Counter()

    @property
    def removed(self) -> Removed:
        return Removed(partitions=tuple(self._partitions), rows=dict(self._rows))

    def partition(self, name: str) -> None:
        self._partitions.append(name)
        self._report(self.removed)

    def rows(self, table: str, count: int) -> None:
        if count:
            self._rows[table] += count
            self._report(self.removed)
