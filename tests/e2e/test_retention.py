"""Retention while a receiver takes all that it can, and as `serve` runs it."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import (
    DatabaseSettings,
    MonitoringSettings,
    ReceiverSettings,
    RetentionSettings,
    ServeSettings,
    SpoolSettings,
)
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.partitions import ensure_partitions
from otel_pg_exporter.postgres.retention import Removed, Retention
from otel_pg_exporter.service import Service
from otel_pg_exporter.service.database import Database as ServedDatabase
from otel_pg_exporter.service.retention import RetentionRounds
from otel_pg_exporter.telemetry import Statistics
from tests.e2e.support import METHODS, OK, Receiver, client_of, heard, receiving
from tests.postgres.samples import fetch, minute_of, open_connection, today
from tests.support import as_role, wait_until
from tests.workload import log_body, record, span, trace_body

DAY_NS = 86_400 * 10**9
SENDERS, REPLICAS = 4, 3


@pytest.fixture
def receiver(dsn: str) -> Iterator[Receiver]:
    with receiving(as_role("otel_writer", dsn), read_dsn=dsn) as running:
        yield running


def test_under_load_nothing_younger_is_lost_and_what_is_kept_is_exact(receiver: Receiver) -> None:
    old = [span(0, trace=900 + days, start=time.time_ns() - days * DAY_NS) for days in range(1, 26)]
    assert receiver.send(Signal.TRACES, trace_body(old)) == OK
    assert receiver.send(Signal.LOGS, log_body([record("old")])) == OK
    receiver.database.execute("UPDATE retention SET keep = '7 days' WHERE item IN ('spans', 'logs')")
    stop = threading.Event()

    def send(sender: int) -> int:
        sent = 0
        with client_of(receiver.address) as client:
            while not stop.is_set():
                spans = [span(sent + n, trace=sender + 1) for n in range(200)]
                assert heard(client.export(METHODS[Signal.TRACES], trace_body(spans))) == OK
                sent += 200
        return sent

    def replica(_: int) -> Removed:
        settings = DatabaseSettings(dsn=as_role("otel_writer", receiver.database.dsn))
        with contextlib.closing(Connections(settings, size=1)) as connections:
            return Retention(lambda: connections.borrow(5), lambda: settings).run(within=200)

    with ThreadPoolExecutor(SENDERS + REPLICAS) as pool:
        senders = [pool.submit(send, number) for number in range(SENDERS)]
        wait_until(lambda: receiver.database.count("traces") >= SENDERS)
        rounds = [each.result(240) for each in [pool.submit(replica, number) for number in range(REPLICAS)]]
        stop.set()
        sent = [each.result(60) for each in senders]
    dropped = [name for each in rounds for name in each.partitions]
    assert len(dropped) == len(set(dropped)) == 2 * 18  # a day that has a partition of spans has one of log records
    assert receiver.database.rows(
        "SELECT span_count FROM traces WHERE trace_id <= '00000000-0000-0000-0000-0000000000ff' ORDER BY trace_id"
    ) == [(each,) for each in sent]
    assert receiver.database.count("traces") == SENDERS + 7
    receiver.database.assert_traces_exact()


def served(dsn: str, *, migrate: bool = False, retention: RetentionSettings) -> ServeSettings:
    return ServeSettings(
        database=DatabaseSettings(dsn=dsn),
        spool=SpoolSettings(spool=False),
        receiver=ReceiverSettings(grpc_endpoint="127.0.0.1:0", http_endpoint="127.0.0.1:0"),
        monitoring=MonitoringSettings(metrics_endpoint="127.0.0.1:0"),
        migrate=migrate,
        retention=retention,
    )


def test_a_receiver_that_owns_the_tables_writes_its_retention_into_them(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Service(served(dsn, migrate=True, retention=RetentionSettings(retention_logs=86_400))):
        pass
    assert "the retention of logs is 1d now; it was for ever" in caplog.messages
    with open_connection(dsn) as connection:
        assert fetch(connection, "SELECT keep::text FROM retention WHERE item = 'logs'") == [("1 day",)]


def test_one_that_does_not_own_them_says_that_the_database_counts(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with Service(served(as_role("otel_writer", dsn), retention=RetentionSettings(retention_logs=86_400))):
        pass
    assert [message for message in caplog.messages if "retention of logs is 1d in the settings" in message]
    caplog.clear()
    with Service(served(as_role("otel_writer", dsn), retention=RetentionSettings())):
        pass
    assert not [message for message in caplog.messages if "retention" in message]


def test_rounds_beside_the_requests_log_what_they_removed_and_keep_the_score(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = served(as_role("otel_writer", dsn), retention=RetentionSettings())
    database = ServedDatabase(settings, mapping.load(), Statistics())
    database.prepare()
    database.connect()
    with open_connection(dsn) as owner, contextlib.closing(database.connections):
        ensure_partitions(owner, "otel", [minute_of(today()) // 1440 - 9])
        owner.execute("UPDATE retention SET keep = '7 days'")
        rounds = RetentionRounds(database, interval=0.1, first=0)
        try:
            wait_until(lambda: rounds.succeeded)
            assert rounds.expired.partitions == 2
            assert [each for each in caplog.messages if each.startswith("retention: dropped spans_p")]
            owner.execute("REVOKE EXECUTE ON FUNCTION prune_expired(text, int4) FROM otel_writer")
            kind = "retention: DeploymentError"
            wait_until(lambda: rounds._ticker._notices._last.get(kind, (0, 0))[1])  # failures after the first
            assert len([each for each in caplog.messages if "permission denied" in each]) == 1
        finally:
            rounds.stop(5)


def test_nothing_is_removed_before_the_settings_retention_is_in_force(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    longer = RetentionSettings(retention_spans=30 * 86_400, retention_logs=30 * 86_400)
    database = ServedDatabase(served(dsn, migrate=True, retention=longer), mapping.load(), Statistics())
    database.connect()
    with open_connection(dsn) as owner, contextlib.closing(database.connections):
        ensure_partitions(owner, "otel", [minute_of(today()) // 1440 - 9])
        owner.execute("UPDATE retention SET keep = '7 days'")
        rounds = RetentionRounds(database, interval=0.1, first=0)
        try:
            wait_until(lambda: "retention: nothing is removed before the tables are prepared" in caplog.messages)
            database.prepare()
            wait_until(lambda: rounds.succeeded)
            assert rounds.expired.partitions == 0
        finally:
            rounds.stop(5)


def test_what_was_removed_shows_before_the_round_is_over(dsn: str) -> None:
    settings = served(as_role("otel_writer", dsn), retention=RetentionSettings())
    database = ServedDatabase(settings, mapping.load(), Statistics())
    database.prepare()
    database.connect()
    with open_connection(dsn) as owner, open_connection(dsn) as reader, contextlib.closing(database.connections):
        ensure_partitions(owner, "otel", [minute_of(today()) // 1440 - 9])
        owner.execute("UPDATE retention SET keep = '7 days'")
        reader.execute("BEGIN; SELECT FROM logs LIMIT 1")
        rounds = RetentionRounds(database, interval=3600, first=0)
        try:
            wait_until(lambda: rounds.expired.partitions == 1)
            assert not rounds.succeeded
        finally:
            reader.execute("ROLLBACK")
            rounds.stop(5)
