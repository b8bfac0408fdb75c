"""Connections to PostgreSQL: DSNs that never show a password, a pool that survives forks, a watchdog.

Nothing here needs session state, so PgBouncer in transaction mode works: no prepared statements, no `options=`.
"""

import contextlib
import math
import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import psycopg_pool
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError

Connection = psycopg.Connection[tuple[Any, ...]]


def parse_dsn(dsn: str) -> dict[str, Any]:
    """Split a DSN into libpq's keywords.

    Raises ConfigurationError. Its message never repeats the DSN: libpq's own would print the password.
    """
    try:
        return dict(conninfo_to_dict(dsn))
    except psycopg.ProgrammingError:
        # No `from`: the cause's text holds pieces of the DSN.
        raise ConfigurationError(
            "the DSN is malformed: it must read postgresql://user@host:port/database or key=value pairs"
        ) from None


def mask_dsn(dsn: str) -> str:
    """Return the DSN as key=value pairs with `***` in place of the password."""
    return make_conninfo(**{key: "***" if key == "password" else value for key, value in parse_dsn(dsn).items()})


def connect(settings: DatabaseSettings) -> Connection:
    """Open one connection, in autocommit mode; the caller closes it.

    Raises DatabaseUnavailableError with libpq's reason, which names no password.
    """
    try:
        return psycopg.connect(**_arguments(settings))
    except psycopg.Error as exc:
        raise DatabaseUnavailableError(_unreachable(settings, exc)) from exc


def _arguments(settings: DatabaseSettings) -> dict[str, Any]:
    defaults = {
        "application_name": settings.application_name,
        "connect_timeout": math.ceil(settings.connect_timeout),
        "tcp_user_timeout": math.ceil(settings.statement_timeout * 1000),
    }
    return (
        defaults
        | parse_dsn(settings.dsn)
        | {
            "autocommit": True,
            "client_encoding": "UTF8",
            "prepare_threshold": None,
        }
    )


def _unreachable(settings: DatabaseSettings, exc: BaseException | None) -> str:
    reason = " ".join(str(exc).split()) if exc is not None else "no connection became free"
    return f"PostgreSQL cannot be reached ({mask_dsn(settings.dsn) or 'libpq defaults'}): {reason}"


def _discard_if_closed(connection: Connection) -> None:
    """Fail for an idle connection that the server has closed; costs no round trip.

    An idle connection has nothing to read, unless the server said good-bye.
    """
    readable, _, _ = select.select([connection.fileno()], [], [], 0)
    if readable:
        connection.pgconn.consume_input()  # raises OperationalError at end of file


class Connections:
    """A bounded pool of connections; opens itself in the process that first borrows.

    A forked child gets a pool of its own, and leaves the parent's connections untouched. The lock guards the choice
    of the pool.
    """

    def __init__(self, settings: DatabaseSettings, *, size: int) -> None:
        self.settings = settings
        self._arguments = _arguments(settings)
        self._size = size
        self._lock = threading.Lock()
        self._pool: psycopg_pool.ConnectionPool[Connection] | None = None
        self._pid = os.getpid()
        self._inherited: list[object] = []  # a parent's pools: closing them would close the parent's sockets
        self._closed = False
        self._last_error: BaseException | None = None

    @contextlib.contextmanager
    def borrow(self, timeout: float) -> Iterator[Connection]:
        """Lend a connection; raise DatabaseUnavailableError when none can be had within `timeout` seconds."""
        pool = self._open()
        try:
            connection = pool.getconn(timeout=timeout)
        except (psycopg_pool.PoolTimeout, psycopg_pool.PoolClosed) as exc:
            raise DatabaseUnavailableError(_unreachable(self.settings, self._last_error)) from exc
        try:
            yield connection
        finally:
            pool.putconn(connection)

    def close(self, timeout: float = 5.0) -> None:
        """Close the pool; waits at most `timeout` seconds for its threads."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close(timeout=timeout)

    def _open(self) -> psycopg_pool.ConnectionPool[Connection]:
        with self._lock_after_fork():
            if self._closed:
                raise DatabaseUnavailableError("the connection pool is closed")
            if self._pool is None:
                self._pool = psycopg_pool.ConnectionPool(
                    connection_class=self._connection_class(),
                    kwargs=self._arguments,
                    min_size=0,
                    max_size=self._size,
                    check=_discard_if_closed,
                    # The default gives up for minutes after an outage; this one is back at once.
                    reconnect_timeout=2.0,
                    num_workers=min(self._size, 3),
                    open=True,
                )
            return self._pool

    def _lock_after_fork(self) -> threading.Lock:
        if self._pid != os.getpid():
            # Another thread of the parent may have held the lock at the fork; the child has one thread here.
            self._lock = threading.Lock()
            self._pid = os.getpid()
            if self._pool is not None:
                self._inherited.append(self._pool)
                self._pool = None
        return self._lock

    def _connection_class(self) -> type[Connection]:
        pool_owner = self

        class RememberingConnection(psycopg.Connection[tuple[Any, ...]]):
            """Keeps the reason of the last failure, which psycopg_pool only logs."""

            @classmethod
            def connect(cls, conninfo: str = "", **kwargs: Any) -> "RememberingConnection":  # noqa: ANN401 - psycopg's own signature is wider than we need
                try:
                    return super().connect(conninfo, **kwargs)
                except psycopg.Error as exc:
                    pool_owner._last_error = exc
                    raise

        return RememberingConnection


@contextlib.contextmanager
def watchdog(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut the connection's socket after `seconds`, so that no call on it can hang for ever.

    A server that is stopped or unplugged answers no keepalive in time, and libpq waits; a socket that is shut down
    frees the call at once, with an OperationalError.
    """
    # A duplicate of our own: the connection may be closed, and its descriptor reused, before the time is up.
    with socket.socket(fileno=os.dup(connection.fileno())) as endpoint:
        timer = threading.Timer(seconds, _cut, [endpoint])
        timer.name = "postgres-watchdog"
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _cut(endpoint: socket.socket) -> None:
    with contextlib.suppress(OSError):
        endpoint.shutdown(socket.SHUT_RDWR)
