"""PostgreSQL that answers but takes no rows, under load: nothing is lost, and no good item becomes a dead letter."""

import contextlib
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import connect
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from otel_pg_exporter.postgres.partitions import ahead
from otel_pg_exporter.service import Service
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, load, more_spans, refuse_poison
from tests.postgres.test_roles import granted
from tests.support import FAST, as_role, wait_until

__all__ = ["granted"]

_WRITER = "otel_pg_exporter.postgres.writer"
_LOCK_TRACE = "SELECT FROM otel.traces WHERE trace_id = %s::uuid FOR UPDATE"


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET search_path = otel")
        for statement in statements:
            connection.execute(statement.encode())


def test_connections_that_others_take_away_are_waited_for(
    binaries: Path, open_folder: Path, receive: Receive, rounds: int
) -> None:
    settings = {**FAST, "max_connections": "16", "superuser_reserved_connections": "0"}
    with EmbeddedServer(open_folder, binaries=binaries, settings=settings) as server:
        dsn = server.dsn
        migrate(DatabaseSettings(dsn=dsn), mapping.load())
        refuse_poison(dsn)
        ledger = Ledger()
        service = receive(dsn)
        with load(ledger, str(service.grpc_endpoint)) as running:
            for _ in range(rounds):
                running.wait_for_more()
                with contextlib.ExitStack() as stack:
                    take_all_connections(dsn, stack)
                    running.wait_for_more()
            running.wait_for_more()
        judge(dsn, ledger, services=[service])


def take_all_connections(dsn: str, stack: contextlib.ExitStack) -> None:
    """End the receiver's connections and take them all; they are free again when the stack ends."""
    end_others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'otel-pg-exporter'"
    first = stack.enter_context(psycopg.connect(dsn, autocommit=True))

    def are_taken() -> bool:
        first.execute(end_others)
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(dsn, autocommit=True))
        return not first.execute(end_others).fetchall()

    wait_until(are_taken)


def test_a_server_that_is_read_only_for_a_while_is_waited_for(
    own_postgres: EmbeddedServer, receive: Receive, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    dsn = own_postgres.dsn
    ledger = Ledger()
    service = receive(dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(rounds):
            running.wait_for_more()
            _set(dsn, "default_transaction_read_only = on")
            with psycopg.connect(dsn) as connection:
                wait_until(lambda: service.counts().in_spool > 0)
                rows = "SELECT (SELECT count(*) FROM otel.spans) + (SELECT count(*) FROM otel.logs)"
                before = connection.execute(rows).fetchone()
                running.wait_for_more()
                assert connection.execute(rows).fetchone() == before
            _set(dsn, "default_transaction_read_only = off")
        running.wait_for_more()
    judge(dsn, ledger, services=[service])
    assert "25006" in caplog.text


def _set(dsn: str, setting: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET {setting}".encode())
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize(
    ("limit", "sqlstate"),
    [(DatabaseSettings(statement_timeout=2), "57014"), (DatabaseSettings(lock_timeout=2), "55P03")],
    ids=["statement", "lock"],
)
@pytest.mark.parametrize("table", ["spans", "traces", "ingest_requests"])
def test_a_lock_that_is_held_longer_than_a_statement_may_take_is_waited_for(
    prepared: str,
    receive: Receive,
    rounds: int,
    caplog: pytest.LogCaptureFixture,
    *,
    limit: DatabaseSettings,
    sqlstate: str,
    table: str,
) -> None:
    ledger = Ledger()
    service = receive(prepared, database=limit)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(rounds):
            running.wait_for_more()
            with psycopg.connect(prepared) as connection:
                connection.execute(f"LOCK TABLE otel.{table} IN ACCESS EXCLUSIVE MODE".encode())
                spooled = service.counts().spooled
                wait_until(lambda spooled=spooled: service.counts().spooled > spooled)  # type: ignore[misc] # its own
                running.wait_for_more(8)
                wait_until(lambda: sqlstate in caplog.text)
        running.wait_for_more()
    judge(prepared, ledger, services=[service])


def test_the_victim_of_a_deadlock_is_stored_all_the_same(own_postgres: EmbeddedServer, receive: Receive) -> None:
    dsn = own_postgres.dsn
    _set(dsn, "deadlock_timeout = '5s'")
    ledger = Ledger()
    service = receive(dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more()
        with psycopg.connect(dsn) as other, ThreadPoolExecutor(1) as pool:
            known = "SELECT trace_id FROM otel.traces ORDER BY trace_id"
            traces = [trace.bytes for (trace,) in other.execute(known)]
            # Who waits longer than this looks for deadlocks, and is the victim: the receiver.
            other.execute("SET LOCAL deadlock_timeout = '60s'")
            other.execute(_LOCK_TRACE, [traces[-1].hex()])
            sent = pool.submit(running.deliver, more_spans(ledger, [traces[0], traces[-1]]))
            with psycopg.connect(dsn, autocommit=True) as looking:
                waits = "SELECT FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
                wait_until(lambda: looking.execute(waits, [other.info.backend_pid]).fetchone() is not None)
            other.execute(_LOCK_TRACE, [traces[0].hex()])
            other.rollback()
            sent.result()
        running.wait_for_more()
    judge(dsn, ledger, services=[service])
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    with psycopg.connect(dsn, autocommit=True) as connection:
        wait_until(lambda: connection.execute(deadlocks).fetchone() != (0,))


def test_a_day_without_partition_goes_to_default_and_from_there_into_its_own(prepared: str, receive: Receive) -> None:
    ledger = Ledger()
    service = receive(prepared)
    _drop_partitions(prepared)
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more()
        # The writer would ask for the day in a while; somebody else is quicker.
        with connect(DatabaseSettings(dsn=prepared)) as connection:
            wait_until(lambda: len(ahead(connection, "otel")) == 8)
        running.wait_for_more()
    judge(prepared, ledger, services=[service])
    with psycopg.connect(prepared) as connection:
        left = "SELECT (SELECT count(*) FROM otel.spans_default), (SELECT count(*) FROM otel.logs_default)"
        assert connection.execute(left).fetchone() == (0, 0)


def _drop_partitions(dsn: str) -> None:
    """Drop all partitions by day, which must be empty."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        days = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = ANY (%s::regclass[])"
        for (partition,) in connection.execute(days, [["otel.spans", "otel.logs"]]).fetchall():
            if not partition.endswith("_default"):
                connection.execute(f"DROP TABLE {partition}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with the tables, what mends it, and what the log has to say."""

    damage: str
    mending: str
    said: str


_DROP_VIEWS = """
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT table_name FROM information_schema.views WHERE table_schema = 'otel'
        LOOP EXECUTE format('DROP VIEW IF EXISTS %I CASCADE', name); END LOOP;
    END $$;
"""
_MIGRATE = "run `otel-pg-exporter migrate`"
_CHECK = "compare the tables with `otel-pg-exporter migrate --check`"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            damage=_DROP_VIEWS + "ALTER TABLE logs ALTER severity_number TYPE uuid USING gen_random_uuid()",
            mending="ALTER TABLE logs ALTER severity_number TYPE int2 USING 9; SELECT follow_promoted_columns()",
            said=f"at logs: .*{_CHECK}",
        ),
        Fault(
            damage="ALTER TABLE logs ADD owner text NOT NULL DEFAULT ''; ALTER TABLE logs ALTER owner DROP DEFAULT",
            mending="ALTER TABLE logs DROP owner",
            said=f"every row of logs, valid ones too: .*{_CHECK}",
        ),
        Fault(
            damage="ALTER TABLE traces ADD owner text NOT NULL DEFAULT ''; ALTER TABLE traces ALTER owner DROP DEFAULT",
            mending="ALTER TABLE traces DROP owner",
            said=f"every row of traces, valid ones too: .*{_CHECK}",
        ),
        Fault(
            damage="ALTER TABLE spans RENAME trace_state TO state",
            mending="ALTER TABLE spans RENAME state TO trace_state",
            said=f"at spans: .*42703.*{_MIGRATE}",
        ),
        Fault(
            damage="ALTER TABLE ingest_requests RENAME TO requests",
            mending="ALTER TABLE requests RENAME TO ingest_requests",
            said=f"at ledger: .*42P01.*{_MIGRATE}",
        ),
        Fault(
            damage="ALTER TABLE dead_letters RENAME otlp TO request",
            mending="ALTER TABLE dead_letters RENAME request TO otlp",
            said=f"at dead letters: .*42703.*{_MIGRATE}",
        ),
    ],
    ids=["type", "not null", "traces", "column", "ledger", "dead letters"],
)
def test_tables_that_drifted_hold_rows_back_until_they_are_mended(
    prepared: str, receive: Receive, fault: Fault, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    service = receive(prepared)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(rounds):
            running.wait_for_more()
            execute(prepared, fault.damage)
            wait_until(lambda: held(service) and was_said(caplog, fault.said))
            running.wait_for_more(30)
            execute(prepared, fault.mending)
        running.wait_for_more()
    judge(prepared, ledger, services=[service])
    assert_said(caplog, fault.said)


def held(service: Service) -> bool:
    """Tell whether requests that no writer can write are in the spool."""
    return service.counts().in_spool > 0


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == _WRITER and each.levelno == logging.ERROR]


def was_said(caplog: pytest.LogCaptureFixture, pattern: str) -> bool:
    return any(re.search(pattern, line) for line in errors(caplog))


def assert_said(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    """Hold that the log named the remedy, and that it did so seldom."""
    lines = errors(caplog)
    assert was_said(caplog, pattern), lines
    assert len(lines) <= 4, lines  # one a table and reason


def test_rows_without_any_partition_are_held_until_default_is_attached_again(
    prepared: str, receive: Receive, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    service = receive(prepared)
    _drop_partitions(prepared)
    for table in ("spans", "logs"):
        execute(prepared, f"ALTER TABLE {table} DETACH PARTITION {table}_default")
    with load(ledger, str(service.grpc_endpoint)) as running:
        wait_until(lambda: was_said(caplog, "23514"))
        execute(
            prepared, *(f"ALTER TABLE {table} ATTACH PARTITION {table}_default DEFAULT" for table in ("spans", "logs"))
        )
        running.wait_for_more()
    judge(prepared, ledger, services=[service])
    assert_said(caplog, "23514.*attach the DEFAULT partition")


def test_tables_that_were_dropped_are_written_to_once_they_are_there_again(
    dsn: str, receive: Receive, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    service = receive(dsn)
    execute(dsn, "DROP SCHEMA otel CASCADE")
    with load(ledger, str(service.grpc_endpoint), poison=False) as running:
        wait_until(lambda: was_said(caplog, _MIGRATE))
        migrate(DatabaseSettings(dsn=dsn), mapping.load())
        running.wait_for_more()
    judge(dsn, ledger, services=[service])
    assert_said(caplog, _MIGRATE)


def test_rights_that_were_revoked_hold_rows_back_until_they_are_granted_again(
    granted: str, receive: Receive, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_poison(granted)
    ledger = Ledger()
    service = receive(as_role("otel_writer", granted))
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(rounds):
            for right in ("INSERT ON spans", "UPDATE ON traces", "INSERT ON logs"):
                running.wait_for_more()
                execute(granted, f"REVOKE {right} FROM otel_writer")
                wait_until(lambda: held(service))
                running.wait_for_more()
                execute(granted, f"GRANT {right} TO otel_writer")
        running.wait_for_more()
    judge(granted, ledger, services=[service])
    assert_said(caplog, "42501.*docs/how-to/roles.md")
