"""Rounds of retention: by the writer's role, by several replicas, beside those who read, write and hold locks."""

import contextlib
import datetime as dt
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings, RetentionSettings
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError, DeploymentError, SchemaError
from otel_pg_exporter.postgres import retention_policy
from otel_pg_exporter.postgres.connection import connect
from otel_pg_exporter.postgres.partitions import ensure_partitions
from otel_pg_exporter.postgres.retention import Removed, Retention
from otel_pg_exporter.postgres.retention_policy import Change
from otel_pg_exporter.postgres.verify import Verification
from tests.postgres.samples import (
    EPOCH,
    RESOURCE,
    Connection,
    fetch,
    insert,
    insert_traces,
    log,
    minute_of,
    open_connection,
    partitions,
    span,
    today,
)
from tests.proxy import proxy_for
from tests.support import as_role, wait_until

DAY = dt.timedelta(days=1)
FAR_FUTURE = dt.datetime(2554, 7, 21, tzinfo=dt.UTC)


@pytest.fixture
def owner(dsn: str) -> Iterator[Connection]:
    """Ten days, of which those from the eighth on are too old."""
    with open_connection(dsn) as connection:
        number = minute_of(today()) // 1440
        assert ensure_partitions(connection, "otel", range(number - 10, number + 2))
        connection.execute("UPDATE retention SET keep = '7 days'")
        yield connection


@contextlib.contextmanager
def retention(dsn: str, role: str = "otel_writer", *, ahead: dt.timedelta = dt.timedelta()) -> Iterator[Retention]:
    settings = DatabaseSettings(dsn=as_role(role, dsn))
    with connect(settings) as connection:
        yield Retention(
            lambda: contextlib.nullcontext(connection),
            lambda: settings,
            now=lambda: time.time() + ahead.total_seconds(),
        )


def fill(connection: Connection) -> None:
    for days in range(10):
        moment = today() - days * DAY
        insert(connection, "spans", span(1, moment, trace_id=f"{days + 1:032x}", ingested_at=moment))
        insert(connection, "spans", span(2, EPOCH, trace_id=f"{days + 101:032x}", ingested_at=moment))
        insert(connection, "spans", span(3, FAR_FUTURE, trace_id=f"{days + 1:032x}", ingested_at=moment))
        insert(connection, "logs", log(moment, ingested_at=moment), log(EPOCH, ingested_at=moment))
        connection.execute(
            "INSERT INTO dead_letters (received_at, signal, request_id, item_index, reason, otlp)"
            " VALUES (%s, 'logs', %s, %s, '', '')",
            [moment, RESOURCE, days],
        )
        connection.execute(
            "INSERT INTO ingest_requests (request_id, received_at) VALUES (md5(%s)::uuid, %s)", [str(days), moment]
        )
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact ON CONFLICT DO NOTHING")


def expired() -> set[str]:
    return {f"{table}_p{today() - days * DAY:%Y%m%d}" for table in ("spans", "logs") for days in (8, 9, 10)}


def test_one_round_by_the_writer_removes_all_that_is_expired_and_nothing_else(dsn: str, owner: Connection) -> None:
    fill(owner)
    before = fetch(owner, "SELECT count(*) FROM spans")
    with retention(dsn) as ours:
        seen: list[Removed] = []
        removed = ours.run(within=60, report=seen.append)
        assert removed == seen[-1]
        assert not ours.run(within=60)
    assert set(removed.partitions) == expired()
    # The ledger and dead letters go to the second, and today's midnight is past; all else by whole days.
    assert removed.rows == {
        "ingest_requests": 3,
        "dead_letters": 3,
        "spans_default": 4,
        "logs_default": 2,
        "traces": 2,  # those of which time 0 was all
    }
    assert before == [(30,)]
    assert fetch(owner, "SELECT count(*) FROM spans") == [(24,)]
    assert fetch(
        owner,
        "SELECT min(ingested_at) FROM (SELECT ingested_at FROM spans UNION ALL SELECT ingested_at FROM logs) AS r",
    ) == [(today() - 7 * DAY,)]
    assert str(removed).startswith("dropped spans_p")


def test_verify_neither_reports_nor_repairs_what_retention_has_cut(dsn: str, owner: Connection) -> None:
    fill(owner)
    insert_traces(owner, *[span(n, today() - n * DAY, trace_id=f"{200:032x}") for n in range(10)])
    settings = DatabaseSettings(dsn=dsn)
    with retention(dsn) as ours:
        ours.run(within=60)
    kept = sorted(fetch(owner, "TABLE traces"))
    for fix in (False, True):
        with connect(settings) as connection:
            walk = Verification(connection, settings, since=EPOCH)
            assert list(walk.run(fix=fix)) == []
            assert walk.skipped
    assert sorted(fetch(owner, "TABLE traces")) == kept
    owner.execute("UPDATE traces SET span_count = 77 WHERE trace_id = %s", [f"{103:032x}"])  # time 0, two days ago
    owner.execute("INSERT INTO traces SELECT md5('')::uuid, now(), now(), 1, 0")
    with connect(settings) as connection:
        kinds = {each.kind.value for each in Verification(connection, settings, since=EPOCH).run()}
    assert kinds == {"superfluous"}  # of those with a time that is far off nobody can tell any more


@pytest.mark.parametrize(("ahead", "where"), [(-40 * DAY, "40.0 days ahead of"), (2 * DAY, "2.0 days behind")])
def test_a_clock_that_has_leapt_removes_nothing(dsn: str, owner: Connection, ahead: dt.timedelta, where: str) -> None:
    fill(owner)
    with retention(dsn, ahead=ahead) as ours, pytest.raises(DatabaseUnavailableError, match=f"PostgreSQL is {where}"):
        ours.run(within=60)
    assert fetch(owner, "SELECT count(*) FROM ingest_requests") == [(10,)]
    assert name(10) in partitions(owner)


def test_replicas_at_once_remove_each_thing_once(dsn: str, owner: Connection) -> None:
    fill(owner)
    for number in range(3000):
        owner.execute(
            "INSERT INTO ingest_requests (request_id, received_at) VALUES (md5(%s)::uuid, '2020-01-01')",
            [f"old {number}"],
        )
    start = threading.Barrier(6)

    def replica(_: int) -> Removed:
        with retention(dsn) as ours:
            start.wait()
            return ours.run(within=120)

    with ThreadPoolExecutor(6) as pool:
        rounds = list(pool.map(replica, range(6)))
    assert Counter(name for each in rounds for name in each.partitions) == Counter(expired())
    rows: Counter[str] = Counter()
    for each in rounds:
        rows.update(each.rows)
    assert rows == {"ingest_requests": 3003, "dead_letters": 3, "spans_default": 4, "logs_default": 2, "traces": 2}


def test_who_holds_a_lock_keeps_the_rest_from_nothing_and_is_named(dsn: str, owner: Connection) -> None:
    fill(owner)
    with retention(dsn) as ours:
        with open_connection(dsn) as reader, reader.transaction():
            reader.execute("SELECT FROM spans LIMIT 1")
            with pytest.raises(DatabaseUnavailableError, match=r"spans stays locked; end what holds it \(pg_stat"):
                ours.run(within=6)
            insert(owner, "spans", span(9, today()))  # nobody waits for us meanwhile
        assert fetch(owner, "SELECT count(*) FROM ingest_requests") == [(7,)]
        assert name(8) in partitions(owner)
        assert set(ours.run(within=60).partitions) == expired()


def name(days_ago: int) -> str:
    return f"spans_p{today() - days_ago * DAY:%Y%m%d}"


def test_an_advisory_lock_that_is_never_free_is_told(dsn: str, owner: Connection) -> None:
    with open_connection(dsn) as holder, holder.transaction(), retention(dsn) as ours:
        holder.execute("SELECT pg_advisory_xact_lock(hashtextextended('otel-pg-exporter retention otel', 0))")
        with pytest.raises(DatabaseUnavailableError, match="another session holds its advisory lock"):
            ours.run(within=1)


def test_who_is_cut_off_while_dropping_lets_go_soon(dsn: str, owner: Connection) -> None:
    fill(owner)
    with ThreadPoolExecutor(1) as pool, proxy_for(dsn) as proxy, retention(proxy.dsn) as ours:
        proxy.stall_at_commit(handed_on=False)
        call = pool.submit(
            ours._call, DatabaseSettings(), sql.SQL("SELECT otel.drop_expired_partition(%s)").format(), "spans"
        )
        wait_until(lambda: proxy.stalled)
        owner.execute("SET lock_timeout = '20s'")
        insert(owner, "spans", span(9, today()))
        proxy.flow()
        with pytest.raises(DatabaseUnavailableError):
            call.result()


def test_of_a_locked_table_and_of_another_replica_that_meets_it_too_the_table_is_named(
    dsn: str, owner: Connection
) -> None:
    fill(owner)
    with open_connection(dsn) as reader, open_connection(dsn) as other, retention(dsn) as ours:
        reader.execute("BEGIN; SELECT FROM spans LIMIT 1")
        with ThreadPoolExecutor(1) as pool:
            round_ = pool.submit(ours.run, within=8)
            wait_until(lambda: fetch(owner, "SELECT FROM pg_locks WHERE NOT granted AND relation = 'spans'::regclass"))
            with other.transaction():
                other.execute("SELECT pg_advisory_xact_lock(hashtextextended('otel-pg-exporter retention otel', 0))")
                with pytest.raises(DatabaseUnavailableError, match="spans stays locked"):
                    round_.result()
        reader.execute("ROLLBACK")


def test_a_role_without_the_right_hears_what_to_do(dsn: str, owner: Connection) -> None:
    with retention(dsn, "otel_reader") as ours, pytest.raises(DeploymentError, match=r"permission denied.*roles\.md"):
        ours.run(within=60)


def test_a_partition_that_somebodys_view_needs_stays_and_all_else_goes(dsn: str, owner: Connection) -> None:
    fill(owner)
    owner.execute(f"CREATE VIEW mine AS SELECT * FROM {name(9)}".encode())
    with retention(dsn) as ours:
        with pytest.raises(DatabaseUnavailableError, match=name(9)):
            ours.run(within=60)
        assert name(9) in partitions(owner)
        assert not {each for each in partitions(owner, "logs") if each in expired()}
        owner.execute("DROP VIEW mine")
        assert set(ours.run(within=60).partitions) == {name(8), name(9)}


def test_a_stop_ends_a_round_soon(dsn: str, owner: Connection) -> None:
    with (
        open_connection(dsn) as reader,
        reader.transaction(),
        retention(dsn) as ours,
        ThreadPoolExecutor(1) as thread,
    ):
        reader.execute("SELECT FROM spans LIMIT 1")
        running = thread.submit(ours.run, within=600)
        wait_until(lambda: fetch(owner, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        ours.stop()
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError):
            running.result(30)
        assert time.monotonic() - began < 30


def test_partitions_that_are_made_and_dropped_at_once_disturb_nobody(dsn: str, owner: Connection) -> None:
    """Late rows ask for days that retention drops, writers write, and nothing is made and dropped in a circle."""
    stop = threading.Event()
    this_day = minute_of(today()) // 1440

    def write(number: int) -> int:
        done = 0
        with open_connection(as_role("otel_writer", dsn)) as writer:
            while not stop.is_set():
                days = [0, 9, 30]
                ensure_partitions(writer, "otel", [this_day - each for each in days])
                for each in days:
                    row = span((number << 32) + done, today() - each * DAY, trace_id=f"{number + 1:032x}")
                    with writer.transaction():
                        insert(writer, "spans", row)
                    done += 1
        return done

    with ThreadPoolExecutor(3) as pool, retention(dsn) as ours:
        writers = [pool.submit(write, number) for number in range(3)]
        wait_until(lambda: fetch(owner, "SELECT count(*) > 100 FROM spans") == [(True,)])
        removed = ours.run(within=120)
        assert ours.run(within=60).partitions == ()
        stop.set()
        sent = sum(each.result(60) for each in writers)
    assert set(removed.partitions) == expired()
    assert partitions(owner) & expired() == set()
    gone = sent - fetch(owner, "SELECT count(*) FROM spans")[0][0]
    assert 0 <= gone < sent
    assert fetch(owner, f"SELECT count(*) FROM {name(0)}") == [(sent // 3,)]


# The policy.


def test_settings_become_the_policy_of_the_database_and_say_what_they_change(dsn: str) -> None:
    settings = RetentionSettings(retention_spans=30 * 86_400, retention_logs=36 * 3600)
    wanted = retention_policy.wanted(settings, ledger_ttl=14 * 86_400)
    with connect(DatabaseSettings(dsn=dsn)) as connection:
        made = retention_policy.write(connection, "otel", wanted)
        assert [str(each) for each in made] == [
            "the retention of spans is 30d now; it was for ever",
            "the retention of logs is 36h now; it was for ever",
            "the retention of ingest_requests is 14d now; it was 7d",
        ]
        assert retention_policy.write(connection, "otel", wanted) == []
        assert fetch(connection, "SELECT item, keep::text FROM otel.retention ORDER BY item") == [
            ("dead_letters", None),
            ("ingest_requests", "14 days"),
            ("logs", "1 day 12:00:00"),
            ("spans", "30 days"),
        ]
        forever = retention_policy.wanted(RetentionSettings(retention_spans=0), ledger_ttl=86_400)
        assert retention_policy.write(connection, "otel", forever) == [
            Change(item="spans", before=30 * 86_400, after=None)  # and the ledger is not kept shorter
        ]


def test_a_policy_whose_rows_somebody_has_deleted_keeps_all_and_can_be_set_again(dsn: str, owner: Connection) -> None:
    fill(owner)
    owner.execute("DELETE FROM retention")
    with retention(dsn) as ours:
        assert not ours.run(within=60)
    wanted = retention_policy.wanted(RetentionSettings(retention_spans=86_400))
    with connect(DatabaseSettings(dsn=dsn)) as connection:
        [change] = retention_policy.write(connection, "otel", wanted)
        assert change == Change(item="spans", before=None, after=86_400)
        assert retention_policy.write(connection, "otel", wanted) == []


def test_the_writer_sees_what_differs_and_changes_nothing(dsn: str) -> None:
    wanted = retention_policy.wanted(RetentionSettings(retention_dead_letters=86_400))
    with connect(DatabaseSettings(dsn=as_role("otel_writer", dsn))) as connection:
        assert retention_policy.differences(connection, "otel", wanted) == [
            Change(item="dead_letters", before=None, after=86_400)
        ]
        with pytest.raises(SchemaError, match="its owner may"):
            retention_policy.write(connection, "otel", wanted)


def test_a_retention_below_an_hour_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--retention-logs must be an hour"):
        RetentionSettings(retention_logs=60)
