"""The functions that enforce the retention: what they remove, and that nobody makes them remove more."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.postgres.partitions import ensure_partitions
from otel_pg_exporter.postgres.statements import columns_of, upsert_resources
from otel_pg_exporter.transcode.copy_format import control_row
from tests.postgres.samples import (
    EPOCH,
    OTHER_TRACE,
    RESOURCE,
    TRACE,
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

DAY = dt.timedelta(days=1)
HOUR = dt.timedelta(hours=1)
FAR_FUTURE = dt.datetime(2554, 7, 21, tzinfo=dt.UTC)


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        yield connection


def day_number(moment: dt.datetime) -> int:
    return minute_of(moment) // 1440


def keep(connection: Connection, item: str, interval: str | None) -> None:
    connection.execute("UPDATE retention SET keep = %s WHERE item = %s", [interval, item])


def make(connection: Connection, *days_ago: int) -> None:
    numbers = {day_number(today() - n * DAY) for n in days_ago}
    assert ensure_partitions(connection, "otel", numbers) == numbers


def name(days_ago: int, table: str = "spans") -> str:
    return f"{table}_p{today() - days_ago * DAY:%Y%m%d}"


def drop(connection: Connection, table: str = "spans") -> list[str]:
    """Drop until nothing is expired; return what was dropped, in order."""
    dropped: list[str] = []
    while True:
        [(gone,)] = fetch(connection, "SELECT drop_expired_partition(%s)", table)
        if gone is None:
            return dropped
        dropped.append(gone)


def prune(connection: Connection, item: str, most: int = 1000) -> int:
    removed: int = 0
    while True:
        [(count, finished)] = fetch(connection, "SELECT removed, finished FROM prune_expired(%s, %s)", item, most)
        removed += count
        if finished:
            return removed


def test_nothing_goes_while_everything_is_kept_for_ever(connection: Connection) -> None:
    make(connection, 40, 0)
    insert_traces(connection, span(1, today() - 40 * DAY), span(2, EPOCH, ingested_at=EPOCH))
    insert(connection, "logs", log(EPOCH, ingested_at=EPOCH))
    for table in ("spans", "logs"):
        assert drop(connection, table) == []
    for item in ("spans", "logs", "traces", "resources", "dead_letters", "ingest_requests"):
        assert prune(connection, item) == 0


def test_whole_days_are_dropped_oldest_first_and_each_table_by_its_own_retention(connection: Connection) -> None:
    make(connection, 9, 8, 7, 1, 0)
    keep(connection, "spans", "7 days")
    assert drop(connection, "spans") == [name(9), name(8)]  # that of seven days ago still has younger rows
    assert drop(connection, "logs") == []
    keep(connection, "logs", "1 hour")
    now = dt.datetime.now(dt.UTC)
    yesterdays = [name(1, "logs")] if now - HOUR >= today() else []
    assert drop(connection, "logs") == [name(9, "logs"), name(8, "logs"), name(7, "logs"), *yesterdays]
    assert {name(0, "logs"), "logs_default"} <= partitions(connection, "logs")


@pytest.mark.parametrize("timezone", ["Pacific/Kiritimati", "Etc/GMT+12", "X0Y-24:59:59,0,365"])
def test_a_callers_time_zone_and_styles_make_nothing_older(timezone: str, connection: Connection) -> None:
    make(connection, 9, 8, 7, 6)
    keep(connection, "spans", "7 days")
    keep(connection, "dead_letters", "7 days")
    insert(connection, "spans", span(1, EPOCH, ingested_at=today() - 7 * DAY))
    connection.execute(
        "INSERT INTO dead_letters (received_at, signal, request_id, item_index, reason, otlp)"
        " VALUES (now() - interval '7 days' + interval '1 minute', 'logs', %s, 0, '', '')",
        [RESOURCE],
    )
    for setting in (f"timezone = '{timezone}'", "datestyle = 'SQL, DMY'", "standard_conforming_strings = off"):
        connection.execute(f"SET {setting}".encode())
    assert drop(connection) == [name(9), name(8)]
    assert prune(connection, "spans") == prune(connection, "dead_letters") == 0


def test_a_day_that_retention_let_go_of_is_not_made_again(connection: Connection) -> None:
    make(connection, 9, 8, 0)
    keep(connection, "spans", "7 days")
    drop(connection)
    nine, eight = day_number(today() - 9 * DAY), day_number(today() - 8 * DAY)
    assert ensure_partitions(connection, "otel", [nine - 1]) == {nine - 1}  # of log records, which are kept
    keep(connection, "logs", "7 days")
    assert ensure_partitions(connection, "otel", [nine, eight, eight + 1]) == {eight + 1}
    assert name(10, "logs") in partitions(connection, "logs")
    assert partitions(connection) == {"spans_default", name(7), name(0)}
    insert(connection, "spans", span(1, today() - 9 * DAY))
    assert fetch(connection, "SELECT count(*) FROM spans_default") == [(1,)]
    assert prune(connection, "spans") == 0  # it came today
    keep(connection, "spans", "30 days")
    assert ensure_partitions(connection, "otel", [nine]) == {nine}
    assert fetch(connection, f"SELECT count(*) FROM {name(9)}") == [(1,)]


def test_rows_of_default_go_by_the_time_at_which_they_came(connection: Connection) -> None:
    keep(connection, "spans", "7 days")
    keep(connection, "logs", "1 day")
    make(connection, 0)
    for number, (start, came) in enumerate(
        [(EPOCH, 9), (FAR_FUTURE, 8), (EPOCH, 6), (FAR_FUTURE, 0), (today() - 40 * DAY, 9)]
    ):
        insert(connection, "spans", span(number, start, ingested_at=today() - came * DAY))
        insert(connection, "logs", log(start, body=str(number), ingested_at=today() - came * DAY))
    assert prune(connection, "spans", 1) == 3
    assert prune(connection, "logs", 2) == 4
    assert fetch(connection, "SELECT get_byte(span_id, 7) FROM spans ORDER BY 1") == [(2,), (3,)]
    assert fetch(connection, "SELECT body FROM logs") == [("3",)]


def test_the_ledger_and_dead_letters_go_by_their_age_in_small_steps(connection: Connection) -> None:
    for days in range(12):
        connection.execute(
            "INSERT INTO ingest_requests (request_id, received_at) VALUES (md5(%s)::uuid, now() - %s)",
            [str(days), days * DAY - HOUR],
        )
        connection.execute(
            "INSERT INTO dead_letters (received_at, signal, request_id, item_index, reason, otlp)"
            " VALUES (now() - %s, 'logs', %s, %s, '', '')",
            [days * DAY - HOUR, RESOURCE, days],
        )
    assert prune(connection, "dead_letters") == 0
    keep(connection, "dead_letters", "10 days")
    assert prune(connection, "dead_letters", 1) == 1
    assert prune(connection, "ingest_requests", 3) == 4
    assert fetch(connection, "SELECT count(*) FROM ingest_requests") == [(8,)]


def trace(number: int) -> str:
    return f"{number:032x}"


def kept_traces(connection: Connection) -> list[int]:
    return [int(each.hex, 16) for (each,) in fetch(connection, "SELECT trace_id FROM traces ORDER BY trace_id")]


def test_traces_go_when_none_of_their_spans_can_be_left(connection: Connection) -> None:
    make(connection, 20, 12, 9, 8, 7, 6, 0)
    old, edge, young = today() - 9 * DAY, today() - 8 * DAY, today() - 6 * DAY

    def of(number: int, start: dt.datetime, came: dt.datetime, span_id: int = 1, **columns: Any) -> None:  # noqa: ANN401 - any column
        insert(connection, "spans", span(span_id, start, trace_id=trace(number), ingested_at=came, **columns))

    of(1, old, old)  # plainly old
    of(2, young, young)  # plainly young
    of(3, old, old)  # straddles the cut
    of(3, young, young, 2)
    of(4, EPOCH, old)  # time 0 alone, old
    of(5, EPOCH, young)  # and young
    of(6, FAR_FUTURE, old)
    of(7, FAR_FUTURE, young)
    of(8, EPOCH, old)  # time 0 and usual spans, old
    of(8, old, old, 2)
    of(9, EPOCH, old)  # and young
    of(9, young, old, 2)
    of(10, FAR_FUTURE, today() - 12 * DAY)  # far future and usual spans, old
    of(10, today() - 12 * DAY, today() - 12 * DAY, 2)
    of(11, FAR_FUTURE, old)  # and young
    of(11, young, young, 2)
    of(12, today() - 20 * DAY, today() - 20 * DAY, end_time=FAR_FUTURE)  # an end that is far off, old
    of(13, young, young, end_time=FAR_FUTURE)  # and young
    of(14, old, old, milliseconds=86_400_000 * 3)  # ends on a day that is kept
    of(15, edge, edge)  # the last day that goes
    of(16, today() - 40 * DAY, young)  # late, of a day without partition
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact")
    before = dict(fetch(connection, "SELECT trace_id, t::text FROM traces AS t"))

    keep(connection, "spans", "7 days")
    assert prune(connection, "traces") == 0  # nothing was dropped yet
    assert drop(connection) == [name(20), name(12), name(9), name(8)]
    assert prune(connection, "spans", 2) == 6
    prune(connection, "traces", 1)
    left = {number for (number,) in fetch(connection, "SELECT DISTINCT right(trace_id::text, 2) FROM spans")}
    assert left == {f"{each:02x}" for each in (2, 3, 5, 7, 9, 11, 13, 16)}
    assert kept_traces(connection) == [2, 3, 5, 7, 9, 11, 13, 14, 16]  # 14 until its end is as old
    after = dict(fetch(connection, "SELECT trace_id, t::text FROM traces AS t"))
    assert after.items() <= before.items()
    assert prune(connection, "traces") == 0

    keep(connection, "spans", "1 day")  # policy down: all but today's are old
    assert drop(connection) == [name(7), name(6)]
    prune(connection, "spans")
    prune(connection, "traces")
    assert kept_traces(connection) == []


def test_a_trace_that_a_writer_holds_is_left_alone_and_its_new_span_counts(dsn: str, connection: Connection) -> None:
    make(connection, 9, 0)
    insert_traces(connection, span(1, today() - 9 * DAY), span(1, today() - 9 * DAY, trace_id=OTHER_TRACE))
    keep(connection, "spans", "7 days")
    drop(connection)
    with open_connection(dsn) as writer, writer.transaction():
        insert(writer, "spans", span(2, today() - 9 * DAY))
        writer.execute("UPDATE traces SET span_count = span_count + 1 WHERE trace_id = %s", [TRACE])
        assert prune(connection, "traces") == 1
    assert fetch(connection, "SELECT trace_id FROM traces") == fetch(connection, "SELECT trace_id FROM spans")
    keep(connection, "spans", "6 days")
    assert prune(connection, "traces") == 0  # DEFAULT has the late span


def test_resources_go_after_the_last_rows_that_name_them(connection: Connection) -> None:
    make(connection, 0)

    def resource(number: int, last_seen: int, unseen_since: int | None = None) -> None:
        connection.execute(
            "INSERT INTO resources (resource_id, schema_url, dropped_attributes_count, last_seen, unseen_since)"
            " VALUES (%s, '', 0, now() - %s, now() - %s::interval)",
            [trace(number), last_seen * DAY, None if unseen_since is None else unseen_since * DAY],
        )

    def state() -> dict[int, bool]:
        rows = fetch(connection, "SELECT resource_id, unseen_since IS NOT NULL FROM resources ORDER BY 1")
        return {int(each.hex, 16): unseen for each, unseen in rows}

    resource(1, 0)
    resource(2, 1)
    resource(3, 400)  # says a writer, perhaps a stolen one
    resource(4, 14, 12)
    resource(5, 0, 12)  # is back
    resource(6, 8, 6)
    keep(connection, "spans", "7 days")
    assert prune(connection, "resources") == 0  # log records are kept for ever
    assert state() == {1: False, 2: False, 3: False, 4: True, 5: True, 6: True}
    keep(connection, "logs", "8 days")
    insert(connection, "logs", log(FAR_FUTURE, ingested_at=today() - 15 * DAY))
    assert prune(connection, "resources", 1) == 0  # DEFAULT has a row of that time
    assert state() == {1: False, 2: False, 3: True, 4: True, 5: False, 6: True}
    assert prune(connection, "logs") == 1
    assert prune(connection, "resources", 1) == 1
    assert set(state()) == {1, 2, 3, 5, 6}  # 6 has some days left
    make(connection, 7)
    keep(connection, "logs", "1 day")
    keep(connection, "spans", "1 day")
    assert prune(connection, "resources") == 0  # a partition that should be gone is there
    assert drop(connection)
    assert drop(connection, "logs")
    assert prune(connection, "resources") == 1
    assert set(state()) == {1, 2, 3, 5}


def sixteen_days_ago(connection: Connection, ahead: int) -> None:
    """Store a trace with spans of that day, of so many days later, and of the far future, and its resource."""
    came = today() - 16 * DAY
    make(connection, 16, 0)
    for span_id, start in enumerate([came, came + ahead * DAY, FAR_FUTURE]):
        insert(connection, "spans", span(span_id, start, trace_id=TRACE, ingested_at=came))
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact")
    connection.execute(
        "INSERT INTO resources (resource_id, schema_url, dropped_attributes_count, last_seen, unseen_since)"
        " VALUES (%s, '', 0, %s, %s)",
        [RESOURCE, came, today() - 14 * DAY],
    )


def round_of_retention(connection: Connection) -> dict[str, int]:
    drop(connection)
    drop(connection, "logs")
    return {item: prune(connection, item) for item in ("spans", "traces", "resources")}


@pytest.mark.parametrize("when_stored", [True, False], ids=["a wide window", "an outlier whose day has come"])
def test_a_span_that_came_long_before_its_day_keeps_its_trace_and_resource(
    when_stored: bool, connection: Connection
) -> None:
    if when_stored:
        make(connection, -4)
        connection.execute("UPDATE partitions SET rows_since = rows_since - interval '16 days'")
    sixteen_days_ago(connection, ahead=20)
    make(connection, -4)
    keep(connection, "spans", "7 days")
    keep(connection, "logs", "7 days")
    assert fetch(connection, f"SELECT count(*) FROM {name(-4)}") == [(1,)]
    assert round_of_retention(connection) == {"spans": 1, "traces": 0, "resources": 0}
    assert fetch(connection, "SELECT trace_id FROM traces") == fetch(connection, "SELECT trace_id FROM spans")
    # Its time is over.
    connection.execute(f"DROP TABLE {name(-4)}, {name(-4, 'logs')}".encode())
    connection.execute("UPDATE retention_progress SET traces_horizon = NULL")
    assert round_of_retention(connection) == {"spans": 0, "traces": 1, "resources": 1}


def test_a_day_that_lies_ahead_keeps_nothing_that_came_before_it_was_made(connection: Connection) -> None:
    sixteen_days_ago(connection, ahead=0)
    make(connection, *range(-30, 0))
    keep(connection, "spans", "7 days")
    keep(connection, "logs", "7 days")
    assert round_of_retention(connection) == {"spans": 1, "traces": 1, "resources": 1}


def test_what_is_known_of_a_partition_goes_with_it(connection: Connection) -> None:
    make(connection, 9, 0)
    insert(connection, "spans", span(1, today() - DAY, ingested_at=today() - 3 * DAY))
    connection.execute(f"DROP TABLE {name(0)}".encode())
    make(connection, 1, 0)
    keep(connection, "spans", "7 days")
    assert drop(connection) == [name(9)]
    early = "SELECT name, rows_since < now() - interval '2 days' FROM partitions WHERE name ~ '^spans' ORDER BY name"
    assert fetch(connection, early) == [(name(1), True), (name(0), False)]


def test_seeing_a_resource_again_never_makes_it_older(connection: Connection) -> None:
    table = mapping.load().resources
    upsert = upsert_resources("otel", table)
    rows = columns_of(table, [control_row(table)])
    connection.execute(upsert, rows)
    connection.execute("UPDATE resources SET last_seen = now() + interval '3 days'")
    connection.execute(upsert, rows)
    assert fetch(connection, "SELECT last_seen > now() + interval '2 days' FROM resources") == [(True,)]
    connection.execute("UPDATE resources SET last_seen = now() - interval '3 days'")
    connection.execute(upsert, rows)
    assert fetch(connection, "SELECT last_seen > now() - interval '1 minute' FROM resources") == [(True,)]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("drop_expired_partition('traces')", psycopg.errors.InvalidParameterValue),
        ("drop_expired_partition(NULL)", psycopg.errors.InvalidParameterValue),
        ("drop_expired_partition('spans; DROP TABLE spans')", psycopg.errors.InvalidParameterValue),
        ("drop_expired_partition('spans_default')", psycopg.errors.InvalidParameterValue),
        ("prune_expired('retention')", psycopg.errors.InvalidParameterValue),
        ("prune_expired('spans_default')", psycopg.errors.InvalidParameterValue),
        ("prune_expired(NULL)", psycopg.errors.InvalidParameterValue),
        ("prune_expired('spans', NULL)", psycopg.errors.InvalidParameterValue),
        ("prune_expired('spans', -1)", psycopg.errors.InvalidParameterValue),
        ("prune_expired('spans', 2147483647)", psycopg.errors.InvalidParameterValue),
    ],
)
def test_odd_arguments_are_refused(call: str, error: type[psycopg.Error], connection: Connection) -> None:
    with pytest.raises(error):
        connection.execute(f"SELECT {call}".encode())


def test_an_old_snapshot_with_an_old_policy_is_refused(connection: Connection) -> None:
    for call in ("drop_expired_partition('spans')", "prune_expired('spans')"):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(psycopg.errors.InvalidTransactionState):
            connection.execute(f"SELECT {call}".encode())
        connection.execute("ROLLBACK")


def test_objects_that_shadow_names_mislead_nobody(connection: Connection) -> None:
    make(connection, 9, 6)
    keep(connection, "spans", "7 days")
    insert(connection, "spans", span(1, EPOCH, ingested_at=today()))
    connection.execute("CREATE TEMPORARY TABLE retention AS SELECT 'spans'::text AS item, interval '1 hour' AS keep")
    connection.execute("CREATE TEMPORARY TABLE spans_default (ingested_at timestamptz)")
    connection.execute(
        "CREATE FUNCTION pg_temp.expired_before(text) RETURNS timestamptz LANGUAGE sql AS $$ SELECT now() $$"
    )
    connection.execute("SET search_path = pg_temp, otel")
    assert drop(connection) == [name(9)]
    assert prune(connection, "spans") == 0
    assert name(6) in {each for (each,) in fetch(connection, "SELECT name FROM daily_partitions('otel.spans')")}


def test_what_others_have_attached_is_theirs(connection: Connection) -> None:
    make(connection, 9)
    connection.execute(
        "CREATE TABLE archive PARTITION OF spans FOR VALUES FROM (MINVALUE) TO ('2001-01-01 00:00:00+00')"
    )
    connection.execute("CREATE SCHEMA elsewhere")
    theirs = ("archive_spans_p20010101", "spans_p20010201_old", "spans_p20010131", "elsewhere.spans_p20010401")
    for month, table in enumerate(theirs, start=1):
        connection.execute(
            f"CREATE TABLE {table} PARTITION OF spans"
            f" FOR VALUES FROM ('2001-{month:02}-01 00:00:00+00') TO ('2001-{month + 1:02}-01 00:00:00+00')".encode()
        )
    keep(connection, "spans", "7 days")
    assert drop(connection) == [name(9)]
    assert partitions(connection) == {"spans_default", "archive", *(each.rpartition(".")[2] for each in theirs)}
    assert prune(connection, "traces") == 0
    assert fetch(connection, "SELECT count(*), bool_or(ours) FROM daily_partitions('spans')") == [(5, False)]


@pytest.mark.parametrize("interval", ["59 minutes", "-1 day", "0", "200 years"])
def test_a_policy_that_would_keep_nothing_is_refused(interval: str, connection: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        keep(connection, "spans", interval)


def test_the_ledger_is_not_kept_for_ever(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        keep(connection, "ingest_requests", None)
