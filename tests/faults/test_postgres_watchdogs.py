"""No call to PostgreSQL hangs for ever, and rows are written again soon after it is back."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psycopg
import pytest

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, OutageError
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.statements import begin
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, load
from tests.faults.servers import processes_of, stopped
from tests.proxy import Proxy, proxy_for
from tests.support import wait_until
from tests.workload import Database, database, span, traces

_MARGIN = 20.0  # seconds that a machine which is busy with other tests may take longer


@contextlib.contextmanager
def freed_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + _MARGIN


@pytest.fixture
def written(dsn: str, proxy: Proxy) -> Iterator[Database]:
    """Return a writer behind the proxy that has a connection already."""
    with database(proxy.dsn) as it:
        it.writer.write([traces(span(0, trace=100))])
        yield it


def test_a_server_that_accepts_connections_and_is_silent_is_given_up(proxy: Proxy) -> None:
    proxy.stall()
    connections = Connections(DatabaseSettings(dsn=proxy.dsn, connect_timeout=1), size=1)
    with freed_within(2), pytest.raises(OutageError), connections.borrow(60):  # libpq takes no less than 2
        pass
    proxy.flow()
    with connections.borrow(60) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    connections.close()


def test_a_copy_that_the_server_does_not_take_is_given_up_and_leaves_nothing(proxy: Proxy, written: Database) -> None:
    batch = traces(*(span(number) for number in range(5_000)))
    proxy.stall_after(300_000)
    with freed_within(1), pytest.raises(DatabaseUnavailableError) as caught:
        written.writer.write([batch], deadline=time.monotonic() + 1)
    assert not caught.value.in_doubt
    proxy.flow()
    (outcome,) = written.writer.write([batch])
    assert outcome.stored == 5_000
    written.assert_traces_exact()


@pytest.mark.parametrize("handed_on", [False, True])
def test_a_commit_that_is_not_answered_is_given_up_and_in_doubt(
    proxy: Proxy, written: Database, *, handed_on: bool
) -> None:
    batch = traces(*(span(number) for number in range(50)))
    proxy.stall_at_commit(handed_on=handed_on)
    with freed_within(1), pytest.raises(DatabaseUnavailableError) as caught:
        written.writer.write([batch], deadline=time.monotonic() + 1)
    assert caught.value.in_doubt
    proxy.flow()  # only now the COMMIT arrives, where it had not
    (outcome,) = written.writer.write([batch])
    assert (outcome.stored, outcome.duplicate) in {(0, 50), (50, 0)}
    assert written.count("spans") == 51
    written.assert_traces_exact()


def test_postgresql_asks_within_a_statements_time_whether_a_writers_machine_is_there(dsn: str) -> None:
    limits = begin(DatabaseSettings(statement_timeout=12))
    with psycopg.connect(dsn, autocommit=True) as connection:

        def asked() -> list[str]:
            names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
            return [connection.execute(f"SHOW {name}".encode()).fetchall()[0][0] for name in names]

        before = asked()
        connection.execute(limits)
        assert asked() == ["6", "2", "3"]
        connection.execute("ROLLBACK")
        assert asked() == before


# What PostgreSQL suffers, until the context ends: then it is ready again.


@contextlib.contextmanager
def refused(server: EmbeddedServer, proxy: Proxy) -> Iterator[None]:
    proxy.refuse()
    yield
    proxy.up()


@contextlib.contextmanager
def silent(server: EmbeddedServer, proxy: Proxy) -> Iterator[None]:
    proxy.stall()
    yield
    proxy.flow()


@contextlib.contextmanager
def silent_on_old_connections(server: EmbeddedServer, proxy: Proxy) -> Iterator[None]:
    proxy.stall()
    yield
    proxy.freeze()
    # While PostgreSQL waits for a COPY's data it heeds no time-out, and keeps its ledger's entries locked: TCP's
    # keepalives end that, which a proxy answers.
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE state = 'active' AND wait_event = 'ClientRead' AND query LIKE 'COPY%'"
        )
    proxy.flow()


@contextlib.contextmanager
def paused(server: EmbeddedServer, proxy: Proxy) -> Iterator[None]:
    with stopped(processes_of(server)):
        yield


@contextlib.contextmanager
def restarted(server: EmbeddedServer, proxy: Proxy) -> Iterator[None]:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGINT)
    yield
    wait_until(server.revive)


@pytest.mark.parametrize("outage", [refused, silent, silent_on_old_connections, paused, restarted])
def test_the_first_commit_follows_soon_after_postgresql_is_ready_again(
    own_postgres: EmbeddedServer,
    receive: Receive,
    outage: "type[contextlib.AbstractContextManager[None]]",
    rounds: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dsn = own_postgres.dsn
    ledger = Ledger()
    with proxy_for(dsn) as proxy:
        service = receive(proxy.dsn, database=DatabaseSettings(statement_timeout=5, lock_timeout=5))
        try:
            with load(ledger, str(service.grpc_endpoint)) as running:
                for _ in range(rounds):
                    running.wait_for_more()
                    with outage(own_postgres, proxy):  # type: ignore[call-arg] # any of the functions above
                        spooled = service.counts().spooled
                        wait_until(lambda spooled=spooled: service.counts().spooled > spooled)  # type: ignore[misc] # its own
                        running.wait_for_more(60)  # until attempts have become seldom
                    measured = seconds_to_first_commit(dsn)
                    with capsys.disabled():
                        print(f" {measured:.2f} s", end="", flush=True)  # noqa: T201 - the figure is wanted
                    assert measured < 2 + _MARGIN
                running.wait_for_more()
            judge(dsn, ledger, services=[service])
        finally:
            service.stop()


def seconds_to_first_commit(dsn: str) -> float:
    """Wait until more rows are there than now."""
    began = time.monotonic()
    rows = "SELECT (SELECT count(*) FROM otel.spans) + (SELECT count(*) FROM otel.logs)"
    with psycopg.connect(dsn, autocommit=True) as connection:
        before = connection.execute(rows).fetchone()
        wait_until(lambda: connection.execute(rows).fetchone() != before)
    return time.monotonic() - began
