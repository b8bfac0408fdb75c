"""PostgreSQL killed in the middle of a COPY, under load: nothing acknowledged is missing or doubled.

The server runs without fsync (tests.support.FAST). That is sound here: processes are killed and not the machine, and
what they have written to the page cache outlives them.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, PipelineSettings
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from tests.e2e.support import OK, Receiver, persist, receiving
from tests.support import wait_until
from tests.workload import log_body, record, span, trace_body

_CLIENTS = 4
_ITEMS = 50  # in one request

# Every row waits for this lock, which is free unless a test holds it.
_GATE = """
    CREATE FUNCTION otel.gate() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END';
    CREATE TRIGGER gate BEFORE INSERT ON otel.spans FOR EACH ROW EXECUTE FUNCTION otel.gate();
    CREATE TRIGGER gate BEFORE INSERT ON otel.logs FOR EACH ROW EXECUTE FUNCTION otel.gate();
"""
_COPYING = """
    SELECT pid FROM pg_stat_activity
    WHERE query LIKE 'COPY %' AND state = 'active' AND wait_event = 'advisory'
"""


@dataclass(slots=True)
class Ledger:
    """What clients were told is stored; they go on until `stop` is set. Appending to a list needs no lock."""

    traces: list[int] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, receiver: Receiver, number: int) -> None:
        """Send requests with spans and log records that nobody else sends, each until it is acknowledged."""
        with receiver.sender() as sender:
            request = 0
            while not self.stop.is_set():
                request += 1
                trace = number * 1_000_000 + request
                body = trace_body([span(item, trace=trace) for item in range(_ITEMS)])
                assert persist(sender, Signal.TRACES, body) == OK
                self.traces.append(trace)
                lines = [f"{trace}.{item}" for item in range(_ITEMS)]
                assert persist(sender, Signal.LOGS, log_body(map(record, lines))) == OK
                self.logs.extend(lines)


def kill_postmaster(server: EmbeddedServer, backend: int) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(server.revive, timeout=60)


def kill_backend(server: EmbeddedServer, backend: int) -> None:
    os.kill(backend, signal.SIGKILL)  # the postmaster then restarts all others


def terminate_backend(server: EmbeddedServer, backend: int) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [backend])


@contextlib.contextmanager
def copy_held(dsn: str) -> Iterator[int]:
    """Hold every COPY as soon as it has begun; yield the process id of a backend in the middle of one."""
    connection = psycopg.connect(dsn, autocommit=True)
    held: set[int] = set()

    def look() -> bool:
        held.update(backend for (backend,) in connection.execute(_COPYING))
        return bool(held)

    try:
        connection.execute("SELECT pg_advisory_lock(1)")
        wait_until(look, timeout=60)
        yield held.pop()
    finally:
        connection.close()  # if it is not dead already; with it goes the lock


def wait_for_more(ledger: Ledger, clients: Sequence[Future[None]]) -> None:
    """Wait until 20 requests more are acknowledged, or a client has failed."""
    reached = len(ledger.traces) + 20
    wait_until(lambda: len(ledger.traces) >= reached or any(client.done() for client in clients), timeout=120)


@pytest.mark.parametrize("harm", [kill_postmaster, kill_backend, terminate_backend])
def test_what_was_acknowledged_is_there_once_after_postgresql_was_killed_in_the_middle_of_a_copy(
    own_server: EmbeddedServer, harm: Callable[[EmbeddedServer, int], None]
) -> None:
    dsn = own_server.dsn
    migrate(DatabaseSettings(dsn=dsn), mapping.load())
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_GATE)
    ledger = Ledger()
    with (
        receiving(dsn, pipeline=PipelineSettings(ack_timeout=1.0)) as receiver,
        ThreadPoolExecutor(_CLIENTS) as pool,
    ):
        clients = [pool.submit(ledger.client, receiver, number) for number in range(1, _CLIENTS + 1)]
        try:
            for _ in range(2):
                wait_for_more(ledger, clients)
                with copy_held(dsn) as backend:
                    harm(own_server, backend)
            wait_for_more(ledger, clients)
        finally:
            ledger.stop.set()
        for client in clients:
            client.result()
        assert_stored(receiver, ledger)


def assert_stored(receiver: Receiver, ledger: Ledger) -> None:
    """Hold the tables against the ledger. Nobody gave up, so nothing else may be there either."""
    assert len(ledger.traces) >= 60
    spans = receiver.database.rows("SELECT trace_id, count(*) FROM spans GROUP BY 1")
    assert {trace.int: count for trace, count in spans} == dict.fromkeys(ledger.traces, _ITEMS)
    lines = receiver.database.rows("SELECT body FROM logs")
    assert sorted(line for (line,) in lines) == sorted(ledger.logs)
    assert receiver.database.count("dead_letters") == 0
    receiver.database.assert_traces_exact()
