"""`verify`: what it finds, what it leaves alone, and how it repairs beside writers."""

import contextlib
import datetime as dt
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import connect
from otel_pg_exporter.postgres.partitions import ahead, ensure_partitions
from otel_pg_exporter.postgres.verify import Difference, Kind, Verification
from tests.postgres.samples import (
    EPOCH,
    NOON,
    OTHER_TRACE,
    TRACE,
    Connection,
    fetch,
    insert,
    insert_traces,
    minute_of,
    open_connection,
    span,
)
from tests.support import wait_until
from tests.workload import Database, database, traces
from tests.workload import span as workload_span

DAY = dt.timedelta(days=1)
HOUR = dt.timedelta(hours=1)
DAY_NUMBER = minute_of(NOON) // 1440
FAR_FUTURE = dt.datetime(2554, 7, 21, tzinfo=dt.UTC)
AGO = NOON - 10 * DAY


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        ensure_partitions(connection, "otel", range(DAY_NUMBER - 3, DAY_NUMBER + 2))
        yield connection


@contextlib.contextmanager
def verification(dsn: str, since: dt.datetime = AGO, until: dt.datetime | None = None) -> Iterator[Verification]:
    settings = DatabaseSettings(dsn=dsn)
    with connect(settings) as connection:
        yield Verification(connection, settings, since=since, until=until)


def differences(
    dsn: str, since: dt.datetime = AGO, until: dt.datetime | None = None, *, fix: bool = False
) -> list[Difference]:
    with verification(dsn, since, until) as walk:
        return list(walk.run(fix=fix))


def names(found: list[Difference]) -> list[tuple[str, Kind, set[str]]]:
    return sorted((each.trace_id.hex, each.kind, {column.name for column in each.columns}) for each in found)


def assert_exact(connection: Connection) -> None:
    assert fetch(connection, "SELECT * FROM (TABLE traces EXCEPT TABLE traces_exact) AS t") == []
    assert fetch(connection, "SELECT * FROM (TABLE traces_exact EXCEPT TABLE traces) AS t") == []


def trace(number: int) -> str:
    return uuid.UUID(int=number).hex


def every_kind_of_trace(connection: Connection) -> None:
    """Insert traces that differ in length, place and content, and their rows."""
    parent = span(1)["span_id"]
    insert_traces(
        connection,
        # Within a minute, with several roots, errors, services and sums.
        span(1, trace_id=trace(1), name="root", service_name="web", gen_ai_input_tokens=2**63 - 1),
        span(2, trace_id=trace(1), gen_ai_input_tokens=2**63 - 1, status_code=2),
        span(3, NOON + dt.timedelta(seconds=1), trace_id=trace(1), parent_span_id=parent, service_name=None),
        # Over hours and days, with gaps.
        *[span(n + 10, NOON + n * 7 * HOUR, trace_id=trace(2), parent_span_id=parent) for n in range(-9, 4)],
        # An end long after the last start, no end at all, and an end before the start.
        span(1, trace_id=trace(3), milliseconds=9 * 3600 * 1000),
        span(1, trace_id=trace(4), end_time=None, duration_ns=None),
        span(1, trace_id=trace(5), milliseconds=-5000),
        # Outliers alone, and with usual spans.
        span(1, EPOCH, trace_id=trace(6)),
        span(1, FAR_FUTURE, trace_id=trace(7)),
        span(1, EPOCH, trace_id=trace(8)),
        span(2, NOON, trace_id=trace(8), parent_span_id=parent),
        span(3, FAR_FUTURE, trace_id=trace(8), parent_span_id=parent),
        # On the edges of an hour and of a day, and on a day without a partition.
        span(1, NOON, trace_id=trace(9)),
        span(2, NOON.replace(hour=0), trace_id=trace(9)),
        span(3, NOON + 3 * DAY, trace_id=trace(9)),
        span(1, NOON + 4 * DAY, trace_id=trace(10)),
    )


def test_traces_that_are_what_their_spans_say_make_no_alarm(dsn: str, connection: Connection) -> None:
    every_kind_of_trace(connection)
    assert_exact(connection)
    with verification(dsn, since=EPOCH) as walk:
        assert list(walk.run()) == []
        assert walk.checked + 1 == 10  # the one at time 0 alone lies before the first slice
        assert walk.skipped == 0


@pytest.mark.parametrize("since", [NOON - HOUR, NOON, NOON + dt.timedelta(seconds=1), NOON + 9 * HOUR])
def test_a_trace_that_began_before_since_makes_no_alarm(dsn: str, connection: Connection, since: dt.datetime) -> None:
    every_kind_of_trace(connection)
    assert differences(dsn, since) == []
    assert differences(dsn, since, since + dt.timedelta(minutes=90)) == []


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ("start_time = start_time - interval '1 second'", {"start_time"}),
        ("start_time = start_time + interval '3 days'", {"start_time"}),
        ("start_time = '2026-11-23 12:30+00'", {"start_time"}),
        ("end_time = end_time + interval '1 microsecond'", {"end_time"}),
        ("end_time = 'infinity'", {"end_time"}),
        ("span_count = span_count - 1", {"span_count"}),
        (
            "error_count = 77, root_name = 'x', root_service_name = 'y'",
            {"error_count", "root_name", "root_service_name"},
        ),
        ("root_span_id = '\\x01', root_start_time = '-infinity'", {"root_span_id", "root_start_time"}),
        ("service_names = '{}', gen_ai_input_tokens = 'NaN'", {"service_names", "gen_ai_input_tokens"}),
    ],
)
def test_every_damage_to_every_kind_of_trace_is_found_once_and_repaired(
    dsn: str, connection: Connection, change: str, columns: set[str]
) -> None:
    every_kind_of_trace(connection)
    damaged = set(range(1, 11))
    if "start_time = start_time" in change:
        damaged -= {6, 8}  # begin at time 0, which is before the oldest partition: see the horizon
    ids = sorted(trace(number) for number in damaged)
    connection.execute(f"UPDATE traces SET {change} WHERE trace_id = ANY (%s::uuid[])".encode(), [ids])
    found = names(differences(dsn))
    assert [(trace_id, kind) for trace_id, kind, _ in found] == [(each, Kind.DIFFERENT) for each in ids]
    assert found[0][2] == columns
    assert [each.fixed for each in differences(dsn, fix=True)] == [True] * len(ids)
    assert_exact(connection)


def test_missing_rows_are_found_and_put_back(dsn: str, connection: Connection) -> None:
    every_kind_of_trace(connection)
    connection.execute("DELETE FROM traces")
    found = differences(dsn)
    assert sorted((each.trace_id.hex, each.kind) for each in found) == [(trace(n), Kind.MISSING) for n in range(1, 11)]
    assert all(column.stored is None for each in found for column in each.columns)
    assert len(differences(dsn, fix=True)) == 10
    assert_exact(connection)


def test_a_row_without_spans_is_superfluous(dsn: str, connection: Connection) -> None:
    every_kind_of_trace(connection)
    connection.execute("DELETE FROM spans WHERE trace_id = %s", [trace(1)])
    [found] = differences(dsn)
    assert (found.trace_id.hex, found.kind, found.fixed) == (trace(1), Kind.SUPERFLUOUS, False)
    assert {column.name: column.stored for column in found.columns}["span_count"] == "3"
    assert all(column.exact is None for column in found.columns)
    assert [each.fixed for each in differences(dsn, fix=True)] == [True]
    assert_exact(connection)


def test_both_values_of_a_column_are_told_in_utc(dsn: str, connection: Connection) -> None:
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET timezone = 'Asia/Tokyo'".encode())
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET datestyle = 'German'".encode())
    insert_traces(connection, span(1))
    connection.execute("UPDATE traces SET start_time = start_time - interval '1 minute', root_name = 'other'")
    [found] = differences(dsn)
    assert [tuple(column) for column in found.columns] == [
        ("start_time", "2026-11-23 11:59:00+00", "2026-11-23 12:00:00+00"),
        ("root_name", "other", "operation 1"),
    ]


def test_a_lost_update_is_found_in_whichever_slice_its_spans_lie(dsn: str, connection: Connection) -> None:
    insert_traces(connection, span(1), span(2, NOON + HOUR / 60))
    insert(connection, "spans", span(3, NOON + 20 * HOUR))
    for since in (AGO, NOON + 19 * HOUR):
        [found] = differences(dsn, since)
        assert [tuple(column) for column in found.columns if column.name == "span_count"] == [("span_count", "2", "3")]
    assert differences(dsn, AGO, NOON + HOUR) == []  # nothing is wrong there


def test_whichever_spans_a_row_lacks_or_has_lost_in_slices_and_in_default_it_is_found_once(dsn: str) -> None:
    places = [
        NOON - 8 * DAY,  # in DEFAULT, before all slices
        NOON - 2 * DAY,  # in DEFAULT, in a slice that ends on the day after
        NOON - DAY - 11 * HOUR,  # in that slice
        NOON - DAY,  # in the next one
        FAR_FUTURE,  # in DEFAULT
    ]
    # Alike but for their start, so that sums over different spans agree by chance. Each is in none, either or both of
    # what the row says and what is stored.
    alike: dict[str, Any] = {"parent_span_id": b"x", "end_time": NOON, "ingested_at": NOON, "gen_ai_input_tokens": 1}
    states = list(enumerate(itertools.product(range(4), repeat=len(places)), 1))
    told, stored = (
        [
            span(index, place, trace_id=trace(number), **alike)
            for number, state in states
            for index, place in enumerate(places)
            if state[index] & bit
        ]
        for bit in (1, 2)
    )
    with open_connection(dsn) as connection, connection.transaction():
        ensure_partitions(connection, "otel", [DAY_NUMBER - 3, DAY_NUMBER - 1, DAY_NUMBER])
        insert_traces(connection, *told)
        connection.execute("TRUNCATE spans")
        insert(connection, "spans", *stored)
        # What began before the horizon, and not with a span that is still there, cannot be judged.
        wrong = fetch(
            connection,
            "SELECT coalesce(t.trace_id, e.trace_id) FROM traces AS t FULL JOIN traces_exact AS e USING (trace_id)"
            " WHERE t IS DISTINCT FROM e AND (t.start_time < %s AND e.start_time IS DISTINCT FROM t.start_time)"
            " IS NOT TRUE",
            NOON.replace(hour=0) - 3 * DAY,
        )
    found = differences(dsn, EPOCH)
    assert sorted(each.trace_id for each in found) == sorted(trace_id for (trace_id,) in wrong)
    assert {each.kind for each in found} == set(Kind)


# The retention horizon.


def test_traces_that_began_in_a_dropped_partition_are_skipped_and_counted(dsn: str, connection: Connection) -> None:
    oldest = NOON - 3 * DAY
    insert_traces(
        connection,
        span(1, oldest, trace_id=trace(1)),
        span(2, oldest + DAY, trace_id=trace(1)),
        span(1, oldest, trace_id=trace(2)),
        span(1, oldest + DAY, trace_id=trace(3)),
    )
    connection.execute("ALTER TABLE spans DETACH PARTITION spans_p20261120")
    for since, skipped in ((AGO, 2), (NOON - 2 * DAY - HOUR, 1), (NOON, 0)):
        with verification(dsn, since) as walk:
            assert list(walk.run()) == []
            assert walk.skipped == skipped
    kept = fetch(connection, "TABLE traces")
    connection.execute("UPDATE traces SET span_count = 5 WHERE trace_id = %s", [trace(3)])
    assert names(differences(dsn, fix=True)) == [(trace(3), Kind.DIFFERENT, {"span_count"})]
    assert sorted(fetch(connection, "TABLE traces")) == sorted(kept)


def test_an_outlier_of_a_trace_whose_usual_spans_were_dropped_is_no_alarm(dsn: str, connection: Connection) -> None:
    oldest = NOON - 3 * DAY
    insert_traces(
        connection, span(1, EPOCH, ingested_at=oldest), span(2, oldest, parent_span_id=b"x", ingested_at=oldest)
    )
    connection.execute("ALTER TABLE spans DETACH PARTITION spans_p20261120")
    with verification(dsn) as walk:
        assert list(walk.run()) == []
        assert walk.skipped == 1


def test_late_spans_and_those_of_every_day_since_are_compared_and_repaired_as_one_trace(
    dsn: str, connection: Connection
) -> None:
    midnight, late = NOON.replace(hour=0), NOON - 8 * DAY
    edges = [midnight + n * DAY + offset for n in range(-2, 2) for offset in (dt.timedelta(microseconds=-1), 0 * DAY)]
    insert_traces(
        connection,
        *[
            span(n, start, trace_id=trace(number), parent_span_id=b"x")
            for number in range(1, 4)
            for n, start in enumerate([late, *edges, NOON + DAY])
        ],
    )
    assert differences(dsn, late) == []
    insert(connection, "spans", span(99, midnight, trace_id=trace(2), parent_span_id=b"x"))
    [found] = differences(dsn, late, fix=True)
    assert (found.trace_id.hex, found.kind, found.fixed) == (trace(2), Kind.DIFFERENT, True)
    counts = [tuple(column) for column in found.columns if column.name == "span_count"]
    assert counts == [("span_count", str(len(edges) + 2), str(len(edges) + 3))]
    assert_exact(connection)


# Beside writers.


BATCHES, WRITERS, TRACES = 40, 3, 24
DAMAGED = [trace(number) for number in range(1, 9)]
LATE = range(17, TRACES + 1)  # traces of which every fourth span lies in DEFAULT


def write(opened: Database, writer: int, start: int) -> None:
    """Write batches of spans, each with one span of every trace."""
    for batch in range(BATCHES):
        spans = [
            workload_span(
                batch * 10 + writer,
                trace=number,
                start=(0 if number in LATE and batch % 4 == 0 else start) + (batch * 71 + writer + 1) * 10**9,
                attributes={"gen_ai.usage.input_tokens": 1},
            )
            for number in range(1, TRACES + 1)
        ]
        opened.writer.write([traces(*spans, service=f"s{writer}")])


def damage(dsn: str, stop: threading.Event) -> int:
    """Damage a row of `traces` every hundredth of a second; return how many were."""
    statements = (
        "DELETE FROM traces WHERE trace_id = %s",
        "UPDATE traces SET span_count = span_count - 1, service_names = '{x}' WHERE trace_id = %s",
    )
    with open_connection(dsn) as connection:
        for number in itertools.count():
            connection.execute(statements[number % 3 > 0].encode(), [DAMAGED[number % len(DAMAGED)]])
            if stop.wait(0.01):
                return number
    raise AssertionError


def verify_again_and_again(dsn: str, since: dt.datetime, stop: threading.Event, *, fix: bool) -> list[Difference]:
    found: list[Difference] = []
    while not stop.is_set():
        found += differences(dsn, since, fix=fix)
    return found


def test_verify_repairs_beside_writers_and_without_a_false_alarm(dsn: str) -> None:
    with open_connection(dsn) as connection:
        ahead(connection, "otel", 1)
    since = dt.datetime.now(dt.UTC) - DAY
    stop = threading.Event()
    with database(dsn) as opened, ThreadPoolExecutor(6) as threads:
        writers = [threads.submit(write, opened, number, time.time_ns() - 3600 * 10**9) for number in range(WRITERS)]
        damaging = threads.submit(damage, dsn, stop)
        fixing = threads.submit(verify_again_and_again, dsn, since, stop, fix=True)
        watching = threads.submit(verify_again_and_again, dsn, since, stop, fix=False)
        try:
            for each in writers:
                each.result(120)
        finally:
            stop.set()
        assert damaging.result(60)
        fixed = fixing.result(60)
        assert fixed
        assert {each.trace_id.hex for each in [*fixed, *watching.result(60)]} <= set(DAMAGED)
        differences(dsn, since, fix=True)
        opened.assert_traces_exact()
        assert opened.rows("SELECT count(*), min(span_count), max(span_count) FROM traces") == [
            (TRACES, WRITERS * BATCHES, WRITERS * BATCHES)
        ]


def test_spans_that_move_into_a_new_partition_are_never_missed(dsn: str) -> None:
    days = range(DAY_NUMBER - 12, DAY_NUMBER + 1)
    with open_connection(dsn) as connection:
        ensure_partitions(connection, "otel", [DAY_NUMBER - 13])
        insert_traces(connection, *[span(n, EPOCH + day * DAY + n * HOUR) for day in days for n in range(1, 9)])
        stop = threading.Event()
        with ThreadPoolExecutor(2) as threads:
            watching = [
                threads.submit(verify_again_and_again, dsn, EPOCH, stop, fix=False),
                threads.submit(verify_again_and_again, dsn, EPOCH, stop, fix=True),
            ]
            try:
                for day in days:
                    wait_until(lambda day=day: ensure_partitions(connection, "otel", [day]), timeout=60)  # type: ignore[misc] # bound early
            finally:
                stop.set()
            assert [each.result(60) for each in watching] == [[], []]
        assert fetch(connection, "SELECT count(*) FROM spans_default") == [(0,)]
        assert_exact(connection)


def test_a_row_that_a_writer_is_about_to_insert_is_repaired_when_it_is_there(dsn: str, connection: Connection) -> None:
    insert(connection, "spans", span(1))
    with open_connection(dsn) as other, other.transaction(), ThreadPoolExecutor(1) as thread:
        insert(other, "spans", span(2))
        other.execute(
            "INSERT INTO traces (trace_id, start_time, end_time, span_count, error_count)"
            " VALUES (%s, now(), now(), 1, 0)",
            [TRACE],
        )
        fixing = thread.submit(differences, dsn, fix=True)
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: fetch(connection, waiting))
        other.execute("COMMIT")
        other.execute("BEGIN")
        assert [each.kind for each in fixing.result(60)] == [Kind.DIFFERENT]
    assert_exact(connection)


def test_nothing_is_found_in_an_empty_schema_nor_without_any_partition(dsn: str, connection: Connection) -> None:
    assert differences(dsn) == []
    for (name,) in fetch(
        connection, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'spans'::regclass"
    ):
        if name != "spans_default":
            connection.execute(f"ALTER TABLE spans DETACH PARTITION {name}".encode())
    insert_traces(connection, span(1), span(1, EPOCH, trace_id=OTHER_TRACE))
    assert differences(dsn) == []
    connection.execute("UPDATE traces SET span_count = 5")
    assert len(differences(dsn)) == 2
    differences(dsn, fix=True)
    assert_exact(connection)
