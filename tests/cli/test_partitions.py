"""`partitions`, and the retention that `migrate` sets, each time as a process of its own."""

import datetime as dt
import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from otel_pg_exporter.postgres.partitions import ensure_partitions
from tests.postgres.samples import EPOCH, Connection, insert, minute_of, open_connection, partitions, span, today
from tests.serving import run
from tests.support import as_role

DAY = dt.timedelta(days=1)


@pytest.fixture
def owner(dsn: str) -> Iterator[Connection]:
    number = minute_of(today()) // 1440
    with open_connection(dsn) as connection:
        ensure_partitions(connection, "otel", [number - 9, number - 8, number, number + 5])
        insert(connection, "spans", *[span(n, today() - 9 * DAY) for n in range(50)])
        insert(connection, "spans", span(1, EPOCH, ingested_at=today() - 20 * DAY))
        # What was inserted is counted now; after ANALYZE, it would be added to what that has found.
        connection.execute("SELECT pg_stat_force_next_flush()")
        connection.execute("ANALYZE")
        yield connection


def command(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(*arguments, OTEL_PG_EXPORTER_DSN=dsn)


def test_the_reader_lists_partitions_their_sizes_and_what_is_kept(dsn: str, owner: Connection) -> None:
    owner.execute("UPDATE retention SET keep = '7 days' WHERE item = 'spans'")
    done = command(as_role("otel_reader", dsn), "partitions", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    old = today() - 9 * DAY
    assert any(
        re.fullmatch(rf"spans_p{old:%Y%m%d} {old:%Y-%m-%d} 50 [\d.]+ KiB [\d.]+ KiB [\d.]+ KiB expired", line)
        for line in lines
    ), done.stdout
    assert [line.split()[-1] for line in lines if line.startswith("logs_p")] == ["past", "past", "current", "ahead"]
    assert any(line.startswith("spans_default 1 ") for line in lines)
    assert lines[-1] == "kept: dead_letters for ever, ingest_requests 7d, logs for ever, spans 7d; rows are estimates"


def test_scripts_get_an_object_of_json(dsn: str, owner: Connection) -> None:
    done = command(as_role("otel_reader", dsn), "partitions", "list", "--json")
    found = json.loads(done.stdout)
    assert found["retention_seconds"] == {
        "dead_letters": None,
        "ingest_requests": 604_800,
        "logs": None,
        "spans": None,
    }
    assert len(found["partitions"]) == 10
    assert found["total_bytes"] == sum(each["total_bytes"] for each in found["partitions"])
    [oldest] = [each for each in found["partitions"] if each["name"] == f"spans_p{today() - 9 * DAY:%Y%m%d}"]
    assert oldest["from"] == (today() - 9 * DAY).isoformat()
    assert oldest["state"] == "past"
    assert oldest["rows_estimate"] == 50


def test_rows_are_estimated_by_the_tables_growth_where_a_crash_has_reset_what_was_counted(
    dsn: str, owner: Connection
) -> None:
    insert(owner, "spans", *[span(n, today() - 9 * DAY) for n in range(50, 500)])
    owner.execute("ANALYZE")
    insert(owner, "spans", *[span(n, today() - 9 * DAY) for n in range(500, 1000)])
    owner.execute("SELECT pg_stat_force_next_flush()")
    owner.execute("SELECT pg_stat_reset()")
    found = json.loads(command(as_role("otel_reader", dsn), "partitions", "list", "--json").stdout)
    (rows,) = [
        each["rows_estimate"] for each in found["partitions"] if each["name"] == f"spans_p{today() - 9 * DAY:%Y%m%d}"
    ]
    assert 800 <= rows <= 1200


def test_a_dry_run_tells_what_enforce_then_removes(dsn: str, owner: Connection) -> None:
    set_ = command(dsn, "migrate", "--retention-spans", "7d")
    assert set_.returncode == 0
    assert "the retention of spans is 7d now; it was for ever" in set_.stdout
    days = [f"spans_p{today() - n * DAY:%Y%m%d}" for n in (9, 8)]
    dry = command(as_role("otel_reader", dsn), "partitions", "enforce", "--dry-run")
    assert dry.returncode == 0
    assert re.sub(r"about .*", "", dry.stdout).splitlines() == [
        *(f"would drop {day}: " for day in days),
        "would delete 1 rows of spans_default",
        "and then traces and resources without a row left",
    ]
    assert set(days) <= partitions(owner)
    for said in (f"dropped {', '.join(days)}; deleted 1 rows of spans_default\n", "nothing to remove\n"):
        done = command(as_role("otel_writer", dsn), "partitions", "enforce")
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert not set(days) & partitions(owner)
    assert command(as_role("otel_reader", dsn), "partitions", "enforce", "--dry-run").stdout == "nothing to remove\n"


def test_a_role_without_the_right_hears_what_to_do(dsn: str, owner: Connection) -> None:
    done = command(as_role("otel_reader", dsn), "partitions", "enforce")
    assert done.returncode == 1
    assert "docs/how-to/roles.md" in done.stderr
    done = command(as_role("otel_writer", dsn), "migrate", "--retention-spans", "7d")
    assert done.returncode == 1


def test_the_script_for_a_dba_sets_the_retention_too(empty_dsn: str) -> None:
    script = run("migrate", "--print", "--retention-logs", "36h", "--retention-spans", "0").stdout
    with open_connection(empty_dsn) as connection:
        connection.execute(script.encode())
        assert connection.execute("SELECT item, keep::text FROM otel.retention WHERE keep IS NOT NULL").fetchall() == [
            ("ingest_requests", "7 days"),
            ("logs", "1 day 12:00:00"),
        ]
