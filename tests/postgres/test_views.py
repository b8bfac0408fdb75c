import datetime as dt
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from otel_pg_exporter.model import Anomaly
from otel_pg_exporter.postgres.partitions import ensure_partitions
from tests.postgres.samples import (
    EPOCH,
    NOON,
    RESOURCE,
    TRACE,
    Connection,
    fetch,
    insert,
    log,
    minute_of,
    open_connection,
    span,
)

SPAN_ID = "0000000000000001"


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        ensure_partitions(connection, "otel", [minute_of(NOON) // 1440])
        insert(
            connection,
            "resources",
            {
                "resource_id": RESOURCE,
                "service_name": "shop",
                "attributes": '{"service.name": "shop", "host.name": "h1"}',
                "schema_url": "",
                "dropped_attributes_count": 0,
            },
        )
        yield connection


def test_span_details_reads_for_people(connection: Connection) -> None:
    insert(connection, "spans", span(1, kind=3, status_code=2, anomalies=5, parent_span_id=b"\1" * 8))
    assert fetch(
        connection,
        "SELECT trace_id_hex, span_id_hex, parent_span_id_hex, kind, status, duration_ms, anomalies,"
        " resource_attributes ->> 'host.name', gen_ai_request_model FROM span_details",
    ) == [(TRACE, SPAN_ID, "01" * 8, "client", "error", 5, ["text_repaired", "non_finite"], "h1", None)]


def test_log_details_reads_for_people(connection: Connection) -> None:
    insert(
        connection,
        "logs",
        log(trace_id=TRACE, span_id=bytes.fromhex(SPAN_ID), severity_number=18),
        log(NOON + dt.timedelta(seconds=1), severity_text="Oops", body=None, body_json='{"a": 1}'),
    )
    assert fetch(
        connection,
        "SELECT severity, body, trace_id_hex, span_id_hex, resource_attributes ->> 'host.name' FROM log_details"
        " ORDER BY time",
    ) == [("error2", "hello", TRACE, SPAN_ID, "h1"), ("Oops", '{"a": 1}', None, None, "h1")]


def test_anomalies_are_named_as_in_the_model(connection: Connection) -> None:
    [(names,)] = fetch(connection, "SELECT anomaly_names(-1)")
    assert names == [str(bit.name).lower() for bit in Anomaly]
    assert fetch(connection, "SELECT anomaly_names(0)") == [([],)]


def test_severities_have_otlps_names(connection: Connection) -> None:
    rows = fetch(connection, "SELECT severity_name(n::int2) FROM generate_series(-1, 25) AS n")
    names = [
        f"{level}{number}" for level in ("trace", "debug", "info", "warn", "error", "fatal") for number in ("", 2, 3, 4)
    ]
    assert [name for (name,) in rows] == ["-1", "unspecified", *names, "25"]


def test_red_metrics_count_by_minute_service_and_operation(connection: Connection) -> None:
    insert(
        connection,
        "spans",
        *[span(n, name="buy", milliseconds=n, status_code=2 if n <= 3 else 0) for n in range(1, 61)],
    )
    insert(connection, "spans", span(99, NOON + dt.timedelta(minutes=1), name="buy"))
    assert fetch(
        connection,
        "SELECT minute, service_name, operation, kind, spans, rate_per_second, errors, error_ratio, p50_ms"
        " FROM red_metrics WHERE start_minute < minute_of(%s)",
        NOON + dt.timedelta(minutes=1),
    ) == [(NOON, "shop", "buy", "server", 60, 1, 3, Decimal("0.0500"), 30.5)]


def test_a_condition_on_the_minute_uses_the_primary_key(connection: Connection) -> None:
    connection.execute("SET enable_seqscan = off")
    plan = fetch(
        connection,
        "EXPLAIN (COSTS OFF) SELECT * FROM red_metrics WHERE start_minute >= minute_of(now() - interval '1 hour')",
    )
    assert any("Index Cond: (start_minute >=" in line for (line,) in plan)


def test_the_service_map_says_who_calls_whom(connection: Connection) -> None:
    parent = span(1)["span_id"]
    insert(
        connection,
        "spans",
        span(1, service_name="web"),
        span(2, service_name="shop", parent_span_id=parent, status_code=2),
        span(3, service_name="shop", parent_span_id=parent),
        span(4, service_name="web", parent_span_id=parent),
    )
    assert fetch(connection, "SELECT minute, caller, callee, calls, errors, p50_ms FROM service_map") == [
        (NOON, "web", "shop", 2, 1, 5)
    ]


# A range of time.

RANGES = {
    "red_metrics": "red_metrics(%s, %s)",
    "service_map": "service_map(%s, %s)",
    "genai_usage": "genai_usage(%s, %s)",
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_of_time_reads_its_days_partitions_alone(name: str, connection: Connection) -> None:
    day_number = minute_of(NOON) // 1440
    ensure_partitions(connection, "otel", range(day_number - 3, day_number + 4))
    plan = fetch(
        connection, f"EXPLAIN SELECT * FROM {RANGES[name]}", NOON - dt.timedelta(days=1), NOON + dt.timedelta(hours=1)
    )
    assert set(re.findall(r"spans_(?:p\d+|default)(?= )", str(plan))) == {"spans_p20261122", "spans_p20261123"}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_that_now_ends_prunes_partitions_when_it_runs(name: str, connection: Connection) -> None:
    ensure_partitions(connection, "otel", range(20_000, 20_005))  # long ago
    plan = fetch(connection, f"EXPLAIN (ANALYZE, COSTS OFF) SELECT * FROM {name}(now() - interval '1 hour')")
    assert "Subplans Removed" in str(plan)
    assert not re.search("spans_p2024", str(plan))


@pytest.mark.parametrize("name", RANGES)
def test_a_range_uses_the_primary_key(name: str, connection: Connection) -> None:
    connection.execute("SET enable_seqscan = off")
    plan = fetch(connection, f"EXPLAIN SELECT * FROM {RANGES[name]}", NOON, NOON + dt.timedelta(hours=1))
    conditions = [line for (line,) in plan if "Index Cond: ((start_minute >= " in line]
    tables = 2 if name == "service_map" else 1
    assert len(conditions) >= tables
    assert not any("Function Scan" in line for (line,) in plan)


@pytest.mark.parametrize("name", RANGES)
def test_all_time_shows_what_the_view_shows(name: str, connection: Connection) -> None:
    call: dict[str, Any] = {"gen_ai_request_model": "m", "gen_ai_input_tokens": 7}
    insert(
        connection,
        "spans",
        span(1, service_name="web", **call),
        span(2, NOON + dt.timedelta(minutes=3), parent_span_id=span(1)["span_id"], **call),
        span(3, NOON + dt.timedelta(days=1), **call),
        span(4, EPOCH, **call),
    )
    view = fetch(connection, f"SELECT * FROM {name} ORDER BY 1, 2, 3, 4, 5")
    assert view
    assert fetch(connection, f"SELECT * FROM {RANGES[name]} ORDER BY 1, 2, 3, 4, 5", "-infinity", "infinity") == view


def test_a_range_takes_in_its_beginning_and_leaves_out_its_end(connection: Connection) -> None:
    minute = dt.timedelta(minutes=1)
    insert(
        connection,
        "spans",
        *[span(n, NOON + n * minute / 2, name="buy", gen_ai_request_model="m") for n in range(1, 7)],
    )
    for count in ("sum(spans) FROM red_metrics", "sum(calls) FROM genai_usage"):
        assert fetch(connection, f"SELECT {count}(%s, %s)", NOON + minute, NOON + 2 * minute) == [(2,)]
    assert fetch(connection, "SELECT count(*) FROM red_metrics(%s, NULL)", NOON) == [(0,)]


def test_neighbouring_ranges_of_the_service_map_add_up(connection: Connection) -> None:
    minute = dt.timedelta(minutes=1)
    parent = span(1)["span_id"]
    insert(
        connection,
        "spans",
        span(1, service_name="web"),
        *[span(2 + n, NOON + n * minute, parent_span_id=parent) for n in (-2, -1, 0, 4, 5, 10, 11)],
    )

    def calls(since: int, until: int, reach: str = "10 minutes") -> int:
        [(total,)] = fetch(
            connection,
            "SELECT coalesce(sum(calls), 0) FROM service_map(%s, %s, %s)",
            *(NOON + since * minute, NOON + until * minute, reach),
        )
        return int(total)

    assert calls(-60, 60) == 5, "from a minute before the caller until ten after it"
    assert calls(-60, 0) + calls(0, 5) + calls(5, 60) == 5
    assert calls(-60, 60, "1 hour") == 6
    assert calls(-60, 60, "4 minutes") == 3


def test_a_range_needs_no_search_path(connection: Connection) -> None:
    connection.execute("SET search_path = ''")
    for call in RANGES.values():
        assert fetch(connection, f"SELECT * FROM otel.{call}", NOON, NOON) == []


def test_slow_spans_come_slowest_first(connection: Connection) -> None:
    insert(connection, "spans", span(1, milliseconds=1000), span(2, milliseconds=5000), span(3, milliseconds=999))
    assert fetch(
        connection, "SELECT operation, duration_ms, error FROM slow_spans WHERE start_time > '2026-11-23'"
    ) == [
        ("operation 2", 5000, False),
        ("operation 1", 1000, False),
    ]


def test_genai_usage_adds_up_tokens_by_day_and_model(connection: Connection) -> None:
    call: dict[str, Any] = {
        "gen_ai_provider_name": "acme",
        "gen_ai_request_model": "m",
        "gen_ai_operation_name": "chat",
    }
    insert(
        connection,
        "spans",
        span(1, **call, gen_ai_input_tokens=2**63 - 1, gen_ai_output_tokens=3),
        span(2, **call, gen_ai_input_tokens=2**63 - 1, status_code=2),
        span(3),
    )
    assert fetch(
        connection,
        "SELECT day, provider, model, operation, calls, errors, input_tokens, output_tokens FROM genai_usage",
    ) == [(NOON.date(), "acme", "m", "chat", 2, 1, 2 * (2**63 - 1), 3)]


def test_grafana_reads_traces(connection: Connection) -> None:
    events = '[{"time_unix_nano": 1795435200000000500, "name": "e", "attributes": {"k": [1]}}, {"name": "bare"}]'
    insert(connection, "spans", span(1, attributes='{"b": 1, "a": "x"}', events=events))
    columns = '"traceID", "spanID", "parentSpanID", "operationName", "serviceName", "startTime", "duration", "tags"'
    assert fetch(connection, f'SELECT {columns}, "serviceTags" FROM grafana_traces') == [
        (
            *(TRACE, SPAN_ID, "", "operation 1", "shop", NOON.timestamp() * 1000, 5.0),
            [{"key": "a", "value": "x"}, {"key": "b", "value": 1}],
            [{"key": "host.name", "value": "h1"}, {"key": "service.name", "value": "shop"}],
        )
    ]
    [(logs,)] = fetch(connection, 'SELECT "logs" FROM grafana_traces')
    assert logs == [
        {"timestamp": 1795435200000.0005, "name": "e", "fields": [{"key": "k", "value": [1]}]},
        {"timestamp": None, "name": "bare", "fields": []},
    ]


def test_grafana_reads_logs(connection: Connection) -> None:
    insert(connection, "logs", log(attributes='{"a": 1}', trace_id=TRACE), log(body=None, event_name="login"))
    assert fetch(connection, 'SELECT body, level, labels, "traceID" FROM grafana_logs ORDER BY 1') == [
        ("hello", "info", {"a": 1, "service_name": "shop", "scope_name": "tests"}, TRACE),
        ("login", "info", {"event_name": "login", "service_name": "shop", "scope_name": "tests"}, None),
    ]
    assert fetch(connection, "SELECT count(DISTINCT id) FROM grafana_logs") == [(2,)]
