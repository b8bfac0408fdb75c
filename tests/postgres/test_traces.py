"""`merge_service_names`, `traces_exact`, `trace_spans`, `trace_tree` and `trace_logs`."""

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_pg_exporter.postgres.partitions import ensure_partitions
from tests.postgres.samples import (
    EPOCH,
    NOON,
    OTHER_TRACE,
    TRACE,
    Connection,
    fetch,
    insert,
    insert_traces,
    log,
    minute_of,
    open_connection,
    span,
)

FAR_FUTURE = dt.datetime(2554, 7, 21, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)

Names = list[str | None]

# A database for each example would take minutes; these statements leave nothing behind.
shared_database = settings(max_examples=60)
names = st.lists(st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=8)
many_names = st.integers(0, 300).map(lambda first: [f"s{number:03}" for number in range(first, first + 90)])


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        yield connection


def merge(connection: Connection, a: Names | None, b: Names | None) -> Names:
    [(merged,)] = fetch(connection, "SELECT merge_service_names(%s::text[], %s::text[])", a, b)
    assert isinstance(merged, list)
    return merged


@shared_database
@given(a=names | many_names, b=names | many_names, c=names | many_names)
def test_service_names_merge_in_any_order(connection: Connection, a: Names, b: Names, c: Names) -> None:
    everything = sorted({name for name in a + b + c if name is not None}, key=lambda name: name.encode())
    merged = merge(connection, merge(connection, a, b), c)
    assert merged == everything[:100]
    assert merge(connection, merge(connection, c, b), a) == merged
    assert merge(connection, a, merge(connection, c, b)) == merged


def test_service_names_merge_with_nothing(connection: Connection) -> None:
    assert merge(connection, None, None) == []
    assert merge(connection, ["b", "a", "b"], None) == ["a", "b"]
    assert merge(connection, [None], [None]) == []
    assert merge(connection, ["a"], ["a"]) == ["a"]


def test_traces_exact_has_the_columns_of_traces(connection: Connection) -> None:
    columns = (
        "SELECT attname, atttypid::regtype::text FROM pg_attribute"
        " WHERE attrelid = '{}'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    assert fetch(connection, columns.format("traces_exact")) == fetch(connection, columns.format("traces"))


def test_traces_exact_says_what_the_spans_say(connection: Connection) -> None:
    parent = span(1)["span_id"]
    insert(
        connection,
        "spans",
        span(9, NOON + SECOND, milliseconds=9000, name="late root", service_name="b"),
        span(3, NOON, name="root", service_name="web", gen_ai_input_tokens=2**63 - 1),
        span(4, NOON, name="root of a greater id"),
        span(5, NOON - SECOND, parent_span_id=parent, status_code=2, service_name="Z", gen_ai_input_tokens=2**63 - 1),
        span(6, NOON + 60 * SECOND, parent_span_id=parent, end_time=None, duration_ns=None, service_name=None),
        span(7, NOON, trace_id=OTHER_TRACE, parent_span_id=parent, service_name=None),
    )
    rows = fetch(
        connection,
        "SELECT replace(trace_id::text, '-', ''), start_time, end_time, span_count, error_count, root_span_id,"
        " root_start_time, root_name, root_service_name, service_names, gen_ai_input_tokens, gen_ai_output_tokens"
        " FROM traces_exact ORDER BY 1",
    )
    root = (span(3)["span_id"], NOON, "root", "web")
    assert rows == [
        (TRACE, NOON - SECOND, NOON + 60 * SECOND, 5, 1, *root, ["Z", "b", "shop", "web"], 2 * (2**63 - 1), None),
        (OTHER_TRACE, NOON, NOON + 5 * SECOND / 1000, 1, 0, None, None, None, None, [], None, None),
    ]


def found(connection: Connection, trace: str = TRACE) -> list[int]:
    rows = fetch(connection, "SELECT span_id FROM trace_spans(%s)", trace)
    return sorted(int.from_bytes(span_id, "big") for (span_id,) in rows)


def some_days(connection: Connection, first: int, last: int) -> None:
    noon = minute_of(NOON) // 1440
    days = range(noon + first, noon + last + 1)
    assert ensure_partitions(connection, "otel", days) == frozenset(days)


def test_a_trace_is_found_across_minutes_and_days(connection: Connection) -> None:
    some_days(connection, -10, 10)
    offsets = [0, 1, 59, 61, 599, 600, 601, 3600, 40_000, 86_400, 200_000, 864_000]
    spans = [span(number, NOON - 4 * 86_400 * SECOND + offset * SECOND) for number, offset in enumerate(offsets, 1)]
    insert_traces(connection, *spans, span(99, trace_id=OTHER_TRACE))
    assert found(connection) == list(range(1, len(offsets) + 1))
    assert found(connection, OTHER_TRACE) == [99]
    assert found(connection, "00000000-0000-0000-0000-000000000001") == []


@pytest.mark.parametrize("with_root", [True, False])
@pytest.mark.parametrize("outliers", [(EPOCH,), (FAR_FUTURE,), (EPOCH, FAR_FUTURE)])
def test_outliers_and_what_surrounds_no_outlier_are_found_once(
    connection: Connection, outliers: tuple[dt.datetime, ...], *, with_root: bool
) -> None:
    some_days(connection, -10, 10)
    parent = None if with_root else span(1)["span_id"]
    strange = [span(100 + number, time, parent_span_id=span(1)["span_id"]) for number, time in enumerate(outliers)]
    offsets = (-300_000, -7200, 0, 7200, 300_000)
    usual = [span(n, NOON + offset * SECOND, parent_span_id=parent) for n, offset in enumerate(offsets, 1)]
    insert_traces(connection, *strange, *usual)
    assert found(connection) == [*range(1, 6), *range(100, 100 + len(outliers))]


def test_a_trace_whose_day_has_no_partition_yet_is_found(connection: Connection) -> None:
    insert_traces(connection, span(1), span(2, NOON + SECOND))
    assert found(connection) == [1, 2]
    some_days(connection, 0, 0)
    assert found(connection) == [1, 2]
    insert(connection, "spans", span(3, NOON + 86_400 * SECOND))
    connection.execute("DELETE FROM traces")
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact")
    assert found(connection) == [1, 2, 3]


def pages(connection: Connection, trace: str) -> int:
    """Return how many pages a look-up of a trace touches, caches of the session being warm."""
    query = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM trace_spans('{trace}')"
    fetch(connection, query)
    [(plan,)] = fetch(connection, query)
    top = (plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def test_a_span_at_time_0_does_not_slow_the_look_up(connection: Connection) -> None:
    [(now,)] = fetch(connection, "SELECT now()")
    today = minute_of(now) // 1440
    ensure_partitions(connection, "otel", range(today - 30, today + 2))
    columns = ", ".join(span(1))
    values = ", ".join(
        {
            "start_minute": "minute_of(t)",
            "trace_id": "md5(n::text)::uuid",
            "span_id": "int8send(n)",
            "start_time": "t",
            "end_time": "t",
        }.get(name, f"'{value}'")
        for name, value in span(1).items()
    )
    connection.execute(
        f"INSERT INTO spans ({columns}) SELECT {values} FROM generate_series(1, 31 * 1440) AS n,"
        " LATERAL (SELECT now() - n * interval '1 minute' AS t) AS at".encode()
    )
    for trace in (TRACE, OTHER_TRACE):
        insert(connection, "spans", span(1, now, trace_id=trace), span(2, now + SECOND, trace_id=trace))
    parent = span(1)["span_id"]
    outliers = [span(3, EPOCH, parent_span_id=parent), span(4, FAR_FUTURE, parent_span_id=parent)]
    insert(connection, "spans", *[each | {"trace_id": OTHER_TRACE} for each in outliers])
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact WHERE span_count < 5")
    connection.execute("VACUUM ANALYZE")
    assert found(connection, OTHER_TRACE) == [1, 2, 3, 4]
    usual, strange = pages(connection, TRACE), pages(connection, OTHER_TRACE)
    # At most some minutes more around the root, where the whole range has 44,640.
    assert strange < usual + 200


def tree(connection: Connection, *columns: str) -> list[tuple[Any, ...]]:
    return fetch(connection, f"SELECT {', '.join(columns)} FROM trace_tree(%s)", TRACE)


def test_a_trace_reads_as_a_tree(connection: Connection) -> None:
    some_days(connection, 0, 0)

    def child(number: int, parent: int, at: int, **columns: object) -> dict[str, Any]:
        return span(number, NOON + at * SECOND, parent_span_id=span(parent)["span_id"], name=f"s{number}") | columns

    insert_traces(
        connection,
        child(4, 1, 3, status_code=2, status_message="boom"),
        child(3, 2, 2, end_time=None, duration_ns=None),
        child(2, 1, 1),
        span(1, NOON, name="s1", milliseconds=9000),
        child(5, 77, 0),
    )
    assert tree(connection, "depth", "operation", "offset_ms", "duration_ms", "error", "status_message") == [
        (0, "s1", 0, 9000, False, ""),
        (1, "  s2", 1000, 5, False, ""),
        (2, "    s3", 2000, None, False, ""),
        (1, "  s4", 3000, 5, True, "boom"),
        (0, "s5", 0, 5, False, ""),
    ]
    assert tree(connection, "path")[2] == (["0000000000000001", "0000000000000002", "0000000000000003"],)


def test_hostile_trees_are_read_whole_and_once(connection: Connection) -> None:
    some_days(connection, 0, 0)
    chain = [span(n, parent_span_id=span(n - 1)["span_id"] if n > 1 else None) for n in range(1, 301)]
    itself = span(1000, parent_span_id=span(1000)["span_id"])
    circle = [span(2000, parent_span_id=span(2001)["span_id"]), span(2001, parent_span_id=span(2000)["span_id"])]
    # Twins at each level, which would double their children level by level.
    twins = [each | {"start_time": each["start_time"] + SECOND} for each in chain[:100]]
    insert_traces(connection, *chain, itself, *circle, *twins)
    depths = [depth for (depth,) in tree(connection, "depth")]
    assert len(depths) == 300 + 1 + 2 + 100
    assert depths.count(None) == 300 - 256 + 3
    assert max(depth for depth in depths if depth is not None) == 255


def test_the_logs_of_a_trace_are_found(connection: Connection) -> None:
    some_days(connection, -1, 1)
    insert_traces(
        connection,
        span(1, NOON, milliseconds=300_000),
        span(2, EPOCH, anomalies=128),
        span(3, trace_id=OTHER_TRACE),
    )
    insert(
        connection,
        "logs",
        log(NOON, trace_id=TRACE, body="first"),
        log(NOON + 299 * SECOND, trace_id=TRACE, body="last"),
        log(EPOCH, trace_id=TRACE, body="timeless"),
        log(NOON, trace_id=OTHER_TRACE, body="another's"),
        log(NOON, body="nobody's"),
    )
    assert sorted(fetch(connection, "SELECT body FROM trace_logs(%s)", TRACE)) == [("first",), ("last",), ("timeless",)]
