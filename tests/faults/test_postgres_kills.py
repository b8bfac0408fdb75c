"""PostgreSQL killed, stopped and restarted in the middle of a COPY and at a COMMIT, under load.

The servers run without fsync (tests.support.FAST). That is sound here: processes are killed and not the machine, and
what they have written to the page cache outlives them.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, Load, load, refuse_poison
from tests.faults.servers import connect_when_ready, end_and_revive, processes_of, stopped
from tests.support import FAST, wait_until

# Rows and COMMITs wait for a lock each, which is free unless a test holds it. Log records come with an entry in the
# ledger, spans with one in `traces`.
_COPY, _COMMIT = 1, 2
_GATES = f"""
    CREATE FUNCTION otel.gate() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock_shared(TG_ARGV[0]::int8); RETURN NEW; END';
    CREATE TRIGGER gate BEFORE INSERT ON otel.spans FOR EACH ROW EXECUTE FUNCTION otel.gate({_COPY});
    CREATE TRIGGER gate BEFORE INSERT ON otel.logs FOR EACH ROW EXECUTE FUNCTION otel.gate({_COPY});
    CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON otel.traces
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION otel.gate({_COMMIT});
    CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON otel.ingest_requests
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION otel.gate({_COMMIT});
"""
_HELD = """
    SELECT pid FROM pg_stat_activity WHERE query ~ %s AND state = 'active' AND wait_event = %s
"""


def _wait_for_backend(connection: psycopg.Connection[tuple[int]], statement: str, wait_event: str) -> int:
    """Return the process id of a backend that waits in such a statement."""
    found: set[int] = set()

    def look() -> bool:
        found.update(backend for (backend,) in connection.execute(_HELD, [statement, wait_event]))
        return bool(found)

    wait_until(look, timeout=60)
    return found.pop()


@contextlib.contextmanager
def held(dsn: str, gate: int) -> Iterator[int]:
    """Hold every COPY, or every COMMIT, as soon as it has begun; yield the process id of such a backend."""
    connection = connect_when_ready(dsn)
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [gate])
        # INSERT: rows may take the way by a temporary table.
        yield _wait_for_backend(connection, "^(COPY|INSERT)" if gate == _COPY else "^COMMIT", "advisory")
    finally:
        connection.close()  # if it is not dead already; with it goes the lock


def kill_postmaster(server: EmbeddedServer, backend: int, running: Load) -> None:
    end_and_revive(server, signal.SIGKILL)


def restart_at_once(server: EmbeddedServer, backend: int, running: Load) -> None:
    end_and_revive(server, signal.SIGQUIT)


def restart_fast(server: EmbeddedServer, backend: int, running: Load) -> None:
    end_and_revive(server, signal.SIGINT)


def kill_backend(server: EmbeddedServer, backend: int, running: Load) -> None:
    os.kill(backend, signal.SIGKILL)  # the postmaster then restarts all others


def terminate_backend(server: EmbeddedServer, backend: int, running: Load) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [backend])


def stop_backend(server: EmbeddedServer, backend: int, running: Load) -> None:
    with stopped([backend]):
        running.wait_for_more(8)  # taken by the spool


def stop_server(server: EmbeddedServer, backend: int, running: Load) -> None:
    with stopped(processes_of(server)):
        running.wait_for_more(8)


@pytest.mark.parametrize(
    "harm",
    [kill_postmaster, restart_at_once, restart_fast, kill_backend, terminate_backend, stop_backend, stop_server],
)
def test_nothing_is_lost_or_doubled_when_postgresql_is_harmed_in_a_copy_or_at_a_commit(
    own_postgres: EmbeddedServer,
    receive: Receive,
    harm: Callable[[EmbeddedServer, int, Load], None],
    rounds: int,
) -> None:
    dsn = own_postgres.dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_GATES.encode())
    ledger = Ledger()
    service = receive(dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for gate in (_COPY, _COMMIT) * rounds:
            running.wait_for_more()
            with held(dsn, gate) as backend:
                harm(own_postgres, backend, running)
        running.wait_for_more()
    judge(dsn, ledger, services=[service])


@pytest.mark.parametrize("harm", [kill_postmaster, terminate_backend, stop_backend])
def test_a_commit_that_waits_for_a_missing_standby_is_not_acknowledged_and_not_doubled(
    binaries: Path,
    open_folder: Path,
    receive: Receive,
    harm: Callable[[EmbeddedServer, int, Load], None],
    rounds: int,
) -> None:
    settings = {**FAST, "wal_level": "replica", "max_wal_senders": "2"}
    with EmbeddedServer(open_folder, binaries=binaries, settings=settings) as server:
        dsn = server.dsn
        migrate(DatabaseSettings(dsn=dsn), mapping.load())
        refuse_poison(dsn)
        ledger = Ledger()
        service = receive(dsn, database=DatabaseSettings(lock_timeout=0.5))
        with load(ledger, str(service.grpc_endpoint)) as running:
            for _ in range(rounds):
                running.wait_for_more()
                _expect_standby(dsn, "nobody")
                with connect_when_ready(dsn) as connection:
                    backend = _wait_for_backend(connection, "^COMMIT", "SyncRep")
                before = service.counts().stored
                harm(server, backend, running)
                running.wait_for_more()
                assert service.counts().stored == before  # what was acknowledged lies in the spool
                _expect_standby(dsn, "")
            running.wait_for_more()
        judge(dsn, ledger, services=[service])


def _expect_standby(dsn: str, name: str) -> None:
    with connect_when_ready(dsn) as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
        connection.execute("SELECT pg_reload_conf()")
