"""Connections to PostgreSQL: a pool that survives forks, a watchdog.

Nothing here needs session state, so PgBouncer in transaction mode works: no prepared statements, no `options=`.
Nothing here starts a thread either: the SDK exports once more while the interpreter shuts down, and from then on
Python 3.12 starts none ("can't create new thread at interpreter shutdown"), which rules psycopg_pool out.
"""

import contextlib
import math
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self, TypeVar

import psycopg
from psycopg.pq import TransactionStatus, abc

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError, OutageError
from otel_pg_exporter.postgres import libpq
from otel_pg_exporter.postgres.dsn import mask_dsn, parse_dsn
from otel_pg_exporter.postgres.encryption import warn_if_encryption_is_optional
from otel_pg_exporter.telemetry import PoolState

Connection = psycopg.Connection[tuple[Any, ...]]
R = TypeVar("R")

# Held while libpq takes a step of connecting, and by whoever forks. The resolver, Kerberos and OpenSSL have locks of
# their own, which Python knows nothing of: held at a fork, they would stay so in the child, for ever.
_connecting = threading.RLock()
os.register_at_fork(before=_connecting.acquire, after_in_parent=_connecting.release, after_in_child=_connecting.release)

_MAX_IDLE = 300.0  # seconds; load balancers forget a silent connection soon after (AWS: 350 s)
_MAX_AGE = 3600.0  # seconds; a connection this old is replaced, so that a failover or a new address is noticed


def connect(settings: DatabaseSettings) -> Connection:
    """Open one connection, in autocommit mode; the caller closes it.

    Raises OutageError with libpq's reason, which names no password, and the remedy where a file is to blame.
    """
    try:
        return _DeadlineConnection.open(_arguments(settings))
    except psycopg.Error as exc:
        raise _unreachable(settings, exc) from exc


def _arguments(settings: DatabaseSettings) -> dict[str, Any]:
    defaults = {
        "application_name": settings.application_name,
        "connect_timeout": math.ceil(settings.connect_timeout),
        "tcp_user_timeout": math.ceil(settings.statement_timeout * 1000),
    }
    arguments: dict[str, Any] = defaults | parse_dsn(settings.dsn)
    try:
        arguments["connect_timeout"] = int(arguments["connect_timeout"])
    except ValueError:
        value = arguments["connect_timeout"]
        raise ConfigurationError(f"connect_timeout in the DSN: {value!r} is no whole number of seconds") from None
    return arguments | {"autocommit": True, "client_encoding": "UTF8", "prepare_threshold": None}


def _unreachable(settings: DatabaseSettings, exc: psycopg.Error) -> OutageError:
    needs_password = exc.pgconn is not None and exc.pgconn.needs_password
    return OutageError(
        f"no connection to PostgreSQL ({mask_dsn(settings.dsn) or 'libpq defaults'}): {' '.join(str(exc).split())}",
        remedy=libpq.remedy(parse_dsn(settings.dsn), needs_password=needs_password),
    )


class SilenceError(psycopg.OperationalError):
    """PostgreSQL did not answer in time, and we cut the connection; see `watchdog`."""


class _DeadlineConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which no call can outlast `deadline`, see `watchdog`."""

    deadline: float | None = None  # by time.monotonic
    opened = 0.0
    returned = 0.0

    @classmethod
    def open(cls, arguments: dict[str, Any]) -> Self:
        """Connect, past whatever an application's instrumentation put in place of psycopg's own method.

        An instrumentation that was removed again leaves one that opens connections of psycopg's own class, not of ours.
        """
        connect: Callable[..., Self] = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]
        connection = connect(cls, **arguments)
        warn_if_encryption_is_optional(connection.pgconn)
        return connection

    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:  # noqa: ANN401 - psycopg's versions differ
        steps = super()._connect_gen(*args, **kwargs)
        try:
            with _connecting:
                state = next(steps)
            while True:
                ready = yield state  # psycopg waits for the server here, where a fork does no harm
                with _connecting:
                    state = steps.send(ready)
        except StopIteration as stop:
            return stop.value

    def wait(self, gen: Generator[Any, Any, R], *args: Any, **kwargs: Any) -> R:  # noqa: ANN401 - as above
        """Wait for the server, as every call of psycopg does; cut the socket when the deadline passes."""
        return super().wait(gen if self.deadline is None else self._until(gen, self.deadline), *args, **kwargs)

    def _until(self, gen: Generator[Any, Any, R], deadline: float) -> Generator[Any, Any, R]:
        cut = False
        try:
            state = next(gen)
            while True:
                ready = yield state  # psycopg comes back at least every 0.1 s, ready or not
                if time.monotonic() >= deadline:
                    cut = True
                    _cut(self)
                state = gen.send(ready)
        except StopIteration as stop:
            result: R = stop.value
            return result
        except psycopg.OperationalError as exc:
            if not cut:
                raise
            # libpq's own text would say that the server has crashed.
            raise SilenceError("no answer in time, so the connection was given up") from exc


class Connections:
    """A bounded pool of connections, which opens them where they are borrowed: in the caller's thread.

    A forked child starts with an empty pool, and leaves the parent's connections untouched. The condition `_changed`
    guards all other attributes and wakes those who wait for a connection.
    """

    def __init__(self, settings: DatabaseSettings, *, size: int) -> None:
        self.lead_to(settings)
        self._size = size
        self._inherited: list[abc.PGconn] = []
        self._closed = False
        self._start_empty()
        run_after_fork(self._forget_the_parents)

    def lead_to(self, settings: DatabaseSettings) -> None:
        """Open all further connections by these settings. Raises ConfigurationError."""
        self.settings, self._arguments = settings, _arguments(settings)

    def _start_empty(self) -> None:
        # A new condition, too: a thread that holds the old one at the fork does not exist in the child.
        self._changed = threading.Condition()
        self._free = self._size
        self._idle: list[_DeadlineConnection] = []
        self._waiting = self._opened = self._failed = self._timeouts = 0
        self._lent: set[_DeadlineConnection] = set()

    @contextlib.contextmanager
    def borrow(self, timeout: float) -> Iterator[Connection]:
        """Lend a connection; raise DatabaseUnavailableError when none can be had within `timeout` seconds.

        That is at once when the server refuses: whether to try again, and when, is the caller's business. A
        connection that comes back inside a transaction, broken, or by an OutageError is closed, not lent again.
        """
        deadline = time.monotonic() + timeout
        changed = self._changed
        with changed:
            self._waiting += 1
            free = changed.wait_for(lambda: self._free > 0 or self._closed, timeout)
            self._waiting -= 1
            if not free:
                self._timeouts += 1
                raise DatabaseUnavailableError(
                    f"all {self._size} connections to PostgreSQL were busy for {timeout:.1f} seconds"
                )
            if self._closed:
                raise DatabaseUnavailableError("the connection pool is closed")
            self._free -= 1
        connection = None
        try:
            connection = self._take_idle() or self._connect(deadline - time.monotonic())
            yield connection
        except OutageError:
            if connection is not None:  # it works, but leads to a standby: a new one may reach the primary
                connection.close()
            raise
        finally:
            if changed is self._changed:  # not when the borrower itself forked
                self._give_back(connection)

    @property
    def state(self) -> PoolState:
        """What the pool holds, and how it has fared."""
        with self._changed:
            return PoolState(
                limit=self._size,
                idle=len(self._idle),
                used=self._size - self._free,
                waiting=self._waiting,
                opened=self._opened,
                failed=self._failed,
                timeouts=self._timeouts,
            )

    def probe(self, timeout: float) -> None:
        """Raise DatabaseUnavailableError unless PostgreSQL answers within `timeout` seconds."""
        with self.borrow(timeout) as connection, watchdog(connection, timeout):
            try:
                connection.execute("SELECT 1")
            except psycopg.Error as exc:
                raise _unreachable(self.settings, exc) from exc

    def close(self, timeout: float = 5.0) -> None:
        """Close the pool: the idle connections now, those on loan when they come back.

        After `timeout` seconds those still on loan are cut, and their borrowers meet an OperationalError.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            idle, self._idle = self._idle, []
            for connection in idle:
                connection.close()
            if not self._changed.wait_for(lambda: not self._lent, timeout):
                for connection in self._lent:
                    _cut(connection)

    def _take_idle(self) -> _DeadlineConnection | None:
        while True:
            with self._changed:
                if not self._idle:
                    return None
                connection = self._idle.pop()
                self._lent.add(connection)
            if _is_usable(connection):
                return connection
            with self._changed:
                self._lent.discard(connection)
            connection.close()

    def _connect(self, timeout: float) -> _DeadlineConnection:
        own: int = self._arguments["connect_timeout"]
        within = min(own, timeout) if own > 0 else timeout  # libpq: 0 and less mean for ever
        try:
            connection = _DeadlineConnection.open(
                self._arguments | {"connect_timeout": max(math.ceil(within), 1)}  # psycopg makes it 2 at least
            )
        except psycopg.Error as exc:
            with self._changed:
                self._failed += 1
            raise _unreachable(self.settings, exc) from exc
        connection.opened = time.monotonic()
        with self._changed:
            self._opened += 1
            self._lent.add(connection)
        return connection

    def _give_back(self, connection: _DeadlineConnection | None) -> None:
        with self._changed:
            keep = (
                connection is not None
                and not self._closed
                and not connection.closed
                and connection.pgconn.transaction_status == TransactionStatus.IDLE
            )
            if connection is not None:
                self._lent.discard(connection)
                if keep:
                    connection.returned = time.monotonic()
                    self._idle.append(connection)
            self._free += 1
            self._changed.notify_all()
        if connection is not None and not keep:
            connection.close()

    def _forget_the_parents(self) -> None:
        parents = [*self._idle, *self._lent]
        self._start_empty()
        for connection in parents:
            # Closing the descriptor, unlike the connection, says nothing to the server, so the parent's goes on; and
            # a backend does not outlive a parent that died because a child still holds its socket.
            with contextlib.suppress(OSError, psycopg.Error):
                os.close(connection.fileno())
            # libpq's handle is kept but never used again; without it psycopg's object complains to nobody.
            self._inherited.append(connection.pgconn)
            del connection.pgconn


def _is_usable(connection: _DeadlineConnection) -> bool:
    """Tell whether an idle connection is young and still open, without a round trip.

    It has nothing to read unless the server said good-bye. What else may come unasked (a changed server setting) is
    rare enough to pay for with a new connection.
    """
    now = time.monotonic()
    if now - connection.opened > _MAX_AGE or now - connection.returned > _MAX_IDLE:
        return False
    poll = select.poll()  # not select(), which knows no descriptor above 1023
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


def run_after_fork(method: Callable[[], None]) -> None:
    """Have `method` run in every child right after its fork, for as long as the method's object lives.

    In the order of registration, so an object's own hook comes after those of the objects it was built from, and
    before the hook by which the SDK's processors start their thread anew.
    """
    reference = weakref.WeakMethod(method)

    def run() -> None:
        alive = reference()
        if alive is not None:
            alive()

    os.register_at_fork(after_in_child=run)


@contextlib.contextmanager
def watchdog(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut the connection's socket after `seconds`, so that no call on it can hang for ever.

    A server that is stopped or unplugged answers no keepalive in time, and libpq waits; a socket that is shut down
    frees the call at once, with an OperationalError. The connection must come from `connect` or a `Connections`.
    """
    if not isinstance(connection, _DeadlineConnection):
        raise TypeError("watchdog needs a connection of connect() or Connections")
    outer = connection.deadline
    deadline = time.monotonic() + seconds
    connection.deadline = deadline if outer is None else min(deadline, outer)
    try:
        yield
    finally:
        connection.deadline = outer


def _cut(connection: _DeadlineConnection) -> None:
    with contextlib.suppress(OSError, psycopg.Error):
        endpoint = socket.socket(fileno=connection.fileno())
        try:
            endpoint.shutdown(socket.SHUT_RDWR)
        finally:
            endpoint.detach()  # libpq closes its descriptor itself
