"""PostgreSQL killed, stopped and restarted in the middle of a COPY and at a COMMIT, under load.

The servers run without fsync (tests.support.FAST). That is sound here: processes are killed and not the machine, and
what they have written to the page cache outlives them.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from tests.faults.conftest import Receive
from tests.faults.gates import COMMIT, COPY, GATES, held, wait_for_backend
from tests.faults.judge import judge
from tests.faults.load import Ledger, Load, load, refuse_poison
from tests.faults.servers import connect_when_ready, end_and_revive, processes_of, restartable, stopped
from tests.support import FAST


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
        connection.execute(GATES.encode())
    ledger = Ledger()
    service = receive(dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for gate in (COPY, COMMIT) * rounds:
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
    with restartable(open_folder, binaries=binaries, settings=settings) as server:
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
                    backend = wait_for_backend(connection, "^COMMIT", "SyncRep")
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
