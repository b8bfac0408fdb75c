"""A PgBouncer that loses its connections, or its life, in the middle of a COPY and at a COMMIT, under load."""

import logging
from collections.abc import Callable

import psycopg
import pytest

from tests.faults.conftest import Receive
from tests.faults.gates import COMMIT, COPY, GATES, held
from tests.faults.judge import judge
from tests.faults.load import Ledger, load
from tests.pgbouncer import PgBouncer
from tests.support import as_role

_BACKENDS = "FROM pg_stat_activity WHERE usename = 'otel_writer' AND datname = current_database()"


def terminate_all(dsn: str, pgbouncer: PgBouncer, backend: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) {_BACKENDS}".encode())


def terminate_one(dsn: str, pgbouncer: PgBouncer, backend: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [backend])


def restart_pgbouncer(dsn: str, pgbouncer: PgBouncer, backend: int) -> None:
    pgbouncer.restart()


@pytest.mark.parametrize("harm", [terminate_all, terminate_one, restart_pgbouncer])
def test_nothing_is_lost_or_doubled_and_no_error_is_unexpected(
    prepared: str,
    pgbouncer: PgBouncer,
    receive: Receive,
    harm: Callable[[str, PgBouncer, int], None],
    rounds: int,
    *,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with psycopg.connect(prepared, autocommit=True) as connection:
        connection.execute(GATES.encode())
    ledger = Ledger()
    service = receive(pgbouncer.route(as_role("otel_writer", prepared)))
    with load(ledger, str(service.grpc_endpoint)) as running:
        for gate in (COPY, COMMIT) * rounds:
            running.wait_for_more()
            with held(prepared, gate) as backend:
                harm(prepared, pgbouncer, backend)
            running.wait_for_more()
    judge(prepared, ledger, services=[service])
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR] == []
