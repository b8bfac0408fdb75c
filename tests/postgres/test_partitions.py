import datetime as dt
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from otel_pg_exporter.postgres.partitions import ahead, ensure_partitions
from tests.postgres.samples import (
    DAY,
    EPOCH,
    NOON,
    TRACE,
    Connection,
    fetch,
    insert,
    log,
    minute_of,
    open_connection,
    partitions,
    span,
)
from tests.proxy import proxy_for
from tests.support import wait_until

DAY_NUMBER = (DAY - EPOCH.date()).days


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        yield connection


def test_days_get_partitions_of_both_tables_once(connection: Connection) -> None:
    days = {DAY_NUMBER, DAY_NUMBER + 1, DAY_NUMBER + 5}
    for _ in range(2):
        assert ensure_partitions(connection, "otel", days) == days
        assert partitions(connection, "spans") == {
            *("spans_default", "spans_p20261123", "spans_p20261124", "spans_p20261128"),
        }
        assert partitions(connection, "logs") == {
            *("logs_default", "logs_p20261123", "logs_p20261124", "logs_p20261128"),
        }
    assert ensure_partitions(connection, "otel", []) == frozenset()


def test_many_days_are_split_into_several_calls(connection: Connection) -> None:
    today = (dt.datetime.now(dt.UTC) - EPOCH).days
    days = frozenset(range(today - 64, today))
    assert ensure_partitions(connection, "otel", days) == days


def test_today_and_the_days_ahead_get_partitions(connection: Connection) -> None:
    days = ahead(connection, "otel", days_ahead=3)
    assert len(days) == 4
    assert abs(min(days) - (dt.datetime.now(dt.UTC) - EPOCH).days) <= 1


@pytest.mark.parametrize("timezone", ["Pacific/Auckland", "America/Anchorage"])
def test_days_are_utc_whatever_the_session_says(timezone: str, connection: Connection) -> None:
    connection.execute(f"SET timezone = '{timezone}'; SET datestyle = 'SQL, DMY'".encode())
    insert(connection, "spans", span(1, NOON.replace(hour=0)), span(2, NOON.replace(hour=23, minute=59)))
    ensure_partitions(connection, "otel", [DAY_NUMBER])
    assert fetch(connection, "SELECT DISTINCT tableoid::regclass::text FROM spans") == [("spans_p20261123",)]
    connection.execute("SET timezone = 'UTC'; SET datestyle = 'ISO'")
    [(bounds,)] = fetch(
        connection, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'spans_p20261123'"
    )
    assert bounds == "FOR VALUES FROM ('2026-11-23 00:00:00+00') TO ('2026-11-24 00:00:00+00')"


def test_rows_that_wait_in_default_move_as_they_are(connection: Connection) -> None:
    insert(connection, "spans", span(1), span(2, NOON + dt.timedelta(days=1)), span(3, EPOCH))
    insert(connection, "logs", log(), log(NOON + dt.timedelta(days=1)))
    rows = "SELECT s::text FROM spans AS s UNION ALL SELECT l::text FROM logs AS l ORDER BY 1"
    before = fetch(connection, rows)
    ensure_partitions(connection, "otel", [DAY_NUMBER])
    assert fetch(connection, rows) == before
    placed = "SELECT tableoid::regclass::text, count(*) FROM {} GROUP BY 1 ORDER BY 1"
    assert fetch(connection, placed.format("spans")) == [("spans_default", 2), ("spans_p20261123", 1)]
    assert fetch(connection, placed.format("logs")) == [("logs_default", 1), ("logs_p20261123", 1)]


def test_a_partition_has_the_parents_indexes_and_needs_no_check_of_its_own(connection: Connection) -> None:
    ensure_partitions(connection, "otel", [DAY_NUMBER])
    counts = "SELECT count(*) FROM pg_index WHERE indrelid = '{}'::regclass"
    assert fetch(connection, counts.format("spans_p20261123")) == fetch(connection, counts.format("spans")) == [(4,)]
    assert fetch(connection, counts.format("logs_p20261123")) == fetch(connection, counts.format("logs")) == [(3,)]
    assert (
        fetch(
            connection,
            "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = ANY (ARRAY["
            "'spans', 'logs', 'spans_p20261123', 'logs_p20261123']::regclass[])",
        )
        == []
    )


def test_partitions_are_made_while_ingest_runs_and_no_row_is_lost(dsn: str, connection: Connection) -> None:
    days = [NOON + dt.timedelta(days=n) for n in range(3)]
    stop = threading.Event()
    columns = ", ".join(span(1))

    def ingest(writer: int) -> int:
        done = 0
        with open_connection(dsn) as mine:
            while not stop.is_set():
                with mine.transaction(), mine.cursor().copy(f"COPY spans ({columns}) FROM STDIN".encode()) as copy:
                    for number in range(60):
                        copy.write_row(list(span((writer << 32) + done + number, days[number % 3]).values()))
                done += 60
        return done

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(ingest, number) for number in range(4)]
        wait_until(lambda: fetch(connection, "SELECT count(*) > 1000 FROM spans_default") == [(True,)])
        for n in range(3):
            wait_until(lambda n=n: ensure_partitions(connection, "otel", [DAY_NUMBER + n]))  # type: ignore[misc] # n=n binds early
            filled = f"SELECT count(*) FROM spans_p202611{23 + n}"
            before = fetch(connection, filled)
            wait_until(lambda filled=filled, before=before: fetch(connection, filled) > before)  # type: ignore[misc]
        stop.set()
        sent = sum(writer.result() for writer in writers)
    assert fetch(connection, "SELECT count(*), count(DISTINCT span_id) FROM spans") == [(sent, sent)]
    assert fetch(connection, "SELECT count(*) FROM spans_default") == [(0,)]


def test_ten_callers_at_once_make_each_partition_once(dsn: str, connection: Connection) -> None:
    start = threading.Barrier(10)
    days = frozenset(range(DAY_NUMBER, DAY_NUMBER + 5))

    def call(_: int) -> frozenset[int]:
        with open_connection(dsn) as mine:
            start.wait()
            return ensure_partitions(mine, "otel", days, lock_timeout=10)

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(call, range(10)))
    assert results.count(days) >= 1
    assert set(results) <= {days, frozenset()}
    assert len(partitions(connection)) == 6


def test_a_writer_in_the_way_costs_a_warning_and_its_rows_move_later(
    dsn: str, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with open_connection(dsn) as other:
        with other.transaction():
            insert(other, "spans", span(1))
            with caplog.at_level(logging.WARNING):
                assert ensure_partitions(connection, "otel", [DAY_NUMBER], lock_timeout=0.05) == frozenset()
        assert "their rows go to the DEFAULT partition" in caplog.text
        assert ensure_partitions(connection, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
    assert fetch(connection, "SELECT tableoid::regclass::text FROM spans") == [("spans_p20261123",)]


def test_a_copy_that_began_earlier_is_waited_for(dsn: str, connection: Connection) -> None:
    columns = ", ".join(span(1))
    waits = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'otel.spans'::regclass"
    with open_connection(dsn) as other, open_connection(dsn) as third, ThreadPoolExecutor(1) as pool:
        with other.cursor().copy(f"COPY spans ({columns}) FROM STDIN".encode()) as copy:
            wait_until(lambda: fetch(connection, "SELECT FROM pg_locks WHERE mode = 'RowExclusiveLock' AND granted"
                " AND relation = 'otel.spans'::regclass"))  # fmt: skip
            call = pool.submit(ensure_partitions, third, "otel", [DAY_NUMBER], lock_timeout=0.8)
            wait_until(lambda: fetch(connection, waits) or call.done())
            # It holds the partitions as they were: had ATTACH gone ahead, this row would fail.
            copy.write_row(list(span(1).values()))
        call.result()
    assert ensure_partitions(connection, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
    assert fetch(connection, "SELECT tableoid::regclass::text FROM spans") == [("spans_p20261123",)]


def test_existing_partitions_are_found_without_any_lock(dsn: str, connection: Connection) -> None:
    ensure_partitions(connection, "otel", [DAY_NUMBER])
    with open_connection(dsn) as other, other.transaction():
        insert(other, "spans", span(1))
        assert ensure_partitions(connection, "otel", [DAY_NUMBER], lock_timeout=0.05) == {DAY_NUMBER}


@pytest.mark.parametrize(
    "arguments",
    [
        "'1970-12-31', '1971-01-02'",
        "'2000-01-01', '2001-02-04'",
        "current_date + 402, current_date + 402",
        "'-infinity', 'infinity'",
        "NULL, '2026-11-23'",
    ],
)
def test_senseless_days_are_refused(arguments: str, connection: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="days must lie between"):
        fetch(connection, f"SELECT ensure_partitions({arguments})")
    assert partitions(connection) == {"spans_default"}


def test_days_out_of_range_cost_a_warning(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    assert ensure_partitions(connection, "otel", [0, DAY_NUMBER]) == {DAY_NUMBER}
    assert "no partitions yet for days 0 to 0" in caplog.text


def test_a_snapshot_that_would_miss_rows_is_refused(connection: Connection) -> None:
    connection.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.InvalidTransactionState, match="READ COMMITTED, not in REPEATABLE READ"):
        fetch(connection, "SELECT ensure_partitions('2026-11-23', '2026-11-23')")
    assert ensure_partitions(connection, "otel", [DAY_NUMBER]) == {DAY_NUMBER}


def test_the_callers_lock_timeout_is_left_as_it_was(connection: Connection) -> None:
    with connection.transaction():
        connection.execute("SET LOCAL lock_timeout = '7s'")
        fetch(connection, "SELECT ensure_partitions('2026-11-23', '2026-11-23')")
        assert fetch(connection, "SHOW lock_timeout") == [("7s",)]


def test_objects_in_the_callers_search_path_are_not_trusted(connection: Connection) -> None:
    connection.execute(
        "CREATE SCHEMA evil; CREATE TABLE evil.spans (start_time text); CREATE TEMP TABLE logs (time text)"
    )
    connection.execute("SET search_path = evil, pg_temp, otel")
    assert ensure_partitions(connection, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
    assert fetch(connection, "SELECT * FROM otel.trace_spans(%s)", TRACE) == []
    connection.execute("SET search_path = otel")
    assert partitions(connection, "otel.logs") == {"logs_default", "logs_p20261123"}


def test_minutes_agree_with_the_sql_function(connection: Connection) -> None:
    for moment in (EPOCH, NOON, NOON + dt.timedelta(seconds=59)):
        assert fetch(connection, "SELECT minute_of(%s)", moment) == [(minute_of(moment),)]
    assert fetch(connection, "SELECT minute_of('-infinity'), minute_of('infinity'), minute_of(NULL)") == [
        (-(2**31), 2**31 - 1, None)
    ]


def test_who_is_cut_off_with_the_locks_lets_go_soon(dsn: str, connection: Connection) -> None:
    with ThreadPoolExecutor(1) as pool, proxy_for(dsn) as proxy, open_connection(proxy.dsn) as ours:
        proxy.stall_at_commit(handed_on=False)
        call = pool.submit(ensure_partitions, ours, "otel", [DAY_NUMBER])
        wait_until(lambda: proxy.stalled)
        connection.execute("SET lock_timeout = '20s'")
        insert(connection, "spans", span(1, NOON))
        proxy.flow()
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            call.result()
    assert ensure_partitions(connection, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
