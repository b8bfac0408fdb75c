"""`bench`, each time as a process of its own. What it measures is nobody's to assert, but that it adds up."""

import datetime as dt
import json
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.serving import PROGRAM, environment, run
from tests.support import wait_until

BRIEF = ("bench", "--seconds", "0.3", "--items", "50", "--senders", "4", "--writers", "2")


def schemas(dsn: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        rows = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'otel%' ORDER BY 1").fetchall()
    return [name for (name,) in rows]


def shares(stages: dict[str, Any]) -> float:
    return float(sum(stage["share"] for stage in stages.values()))


@pytest.fixture
def powerless(empty_dsn: str) -> Iterator[str]:
    """Return the DSN of a role that may connect, and no more."""
    role = f"bench_{secrets.token_hex(4)}"
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'powerless'".encode())
        yield make_conninfo(empty_dsn, user=role, password="powerless")
        connection.execute(f"DROP ROLE {role}".encode())


def test_the_figures_add_up_and_the_schema_is_gone_afterwards(dsn: str) -> None:
    done = run(*BRIEF, "--parts", "latency,logs-mixed", "--json", OTEL_PG_EXPORTER_DSN=dsn)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"for about \d+ seconds and writes at most 20,000,000 rows, about 39.2 GB with indexes and WAL, to\n"
        r"the schema otel_bench_\w+, which is dropped at the end",
        done.stderr,
    )
    assert "\r" not in done.stderr  # no progress where nobody looks
    assert schemas(dsn) == ["otel"]

    figures = json.loads(done.stdout)
    assert (figures["writers"], figures["senders"], figures["seconds"], figures["items"]) == (2, 4, 0.3, 50)
    assert figures["version"] == "0.1.0"
    assert dt.datetime.fromisoformat(figures["measured_at"]).tzinfo is not None
    assert (figures["settings"]["writers"], figures["settings"]["synchronous_commit"]) == (2, "on")
    assert "dsn" not in figures["settings"]
    assert [part["part"] for part in figures["parts"]] == ["spans-mixed", "logs-mixed"]
    for part in figures["parts"]:
        assert part["failures"] == {}
        assert part["rows"] == pytest.approx(part["rows_per_batch"] * part["batches"])
        assert part["rows"] % 50 == 0 < part["rows"]
        assert shares(part["request"]) == pytest.approx(1)
        assert shares(part["batch"]) == pytest.approx(1)
        batch_seconds = sum(stage["mean_ms"] for stage in part["batch"].values()) * part["batches"] / 1e3
        assert part["writers_busy"] * 2 * part["receiver_seconds"] == pytest.approx(batch_seconds)
        cpu_seconds = part["receiver_cpu_us_per_item"] * part["rows"] / 1e6
        assert part["cores"]["receiver"] * part["receiver_seconds"] == pytest.approx(cpu_seconds)
        assert part["cores"]["generator"] > 0
        assert part["cores"]["postgres"] is None
        assert 0 < part["p50_ms"] <= part["p99_ms"]
        assert part["bounds"]
    capacity = figures["parts"][0]["items_per_second"]
    assert [each["share_of_capacity"] for each in figures["latency"]] == [0.01, 0.5, 0.9]
    for each in figures["latency"]:
        assert each["due_items_per_second"] == pytest.approx(capacity * each["share_of_capacity"])
        assert each["requests"] > 0


def test_without_a_dsn_it_measures_a_postgresql_of_its_own_and_removes_it() -> None:
    done = run(*BRIEF, "--parts", "spans-small", "--max-rows", "100000", PGDATABASE="nowhere", PGSERVICE="nowhere")
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"at most 100,000 rows, about 0.1 GB with indexes and WAL, to\n(\S+), which is removed at the end", done.stderr
    )
    assert found is not None
    assert not Path(found[1]).exists()
    for expected in ("items/s", "rows/batch", "generator  PostgreSQL\n", "request receive", "batch   merge", "commit"):
        assert expected in done.stdout
    assert re.search(r"^spans-small +[1-9][\d,]*  ", done.stdout, re.MULTILINE)
    assert re.search(r"^spans-small: \S", done.stdout, re.MULTILINE)
    assert "Time to an OK" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing_behind(dsn: str, number: signal.Signals) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:

        def rows_are_written() -> bool:
            (own,) = [name for name in schemas(dsn) if name.startswith("otel_bench_")] or [""]
            (there,) = connection.execute("SELECT to_regclass(%s || '.logs') IS NOT NULL", [own]).fetchone() or [False]
            query = f"SELECT EXISTS (SELECT FROM {own}.spans)".encode()
            return bool(there) and bool((connection.execute(query).fetchone() or [False])[0])

        with subprocess.Popen(
            [*PROGRAM, "bench", "--seconds", "60", "--items", "50"],
            env=environment(OTEL_PG_EXPORTER_DSN=dsn),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as bench:
            try:
                wait_until(rows_are_written)
                bench.send_signal(number)
                stdout, stderr = bench.communicate(timeout=60)
            finally:
                bench.kill()
        assert (bench.returncode, stdout) == (128 + number, "")
        assert stderr.endswith(f"otel-pg-exporter: stopped by {number.name}\n")
        assert "Traceback" not in stderr
        assert schemas(dsn) == ["otel"]
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'otel-pg-exporter bench'"
        query += " AND datname = current_database()"
        assert connection.execute(query.encode()).fetchone() == (0,)


def test_a_part_that_comes_to_nothing_is_an_error_and_leaves_nothing_behind(dsn: str) -> None:
    done = run(*BRIEF, "--parts", "spans-small", "--max-rows", "50", OTEL_PG_EXPORTER_DSN=dsn)
    assert (done.returncode, done.stdout) == (1, "")
    assert "spans-small: --max-rows was used up before the time that is measured; raise it" in done.stderr
    assert schemas(dsn) == ["otel"]


def test_a_role_that_may_not_create_schemas_is_told_so_before_anything_starts(powerless: str) -> None:
    done = run(*BRIEF, OTEL_PG_EXPORTER_DSN=powerless)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert re.search(r'may not create one in database (\w+): GRANT CREATE ON DATABASE "\1" TO "bench_', done.stderr)


def test_a_wrong_flag_gets_one_line() -> None:
    for arguments, message in (
        (["--parts", "spans-smal"], "'spans-smal' is no part, did you mean spans-small?"),
        (["--parts", "x"], "they are spans-small, spans-mixed, spans-genai, logs-mixed, latency"),
        (["--seconds", "0"], "'0' is no number of seconds from 0.1 to 3600"),
        (["--items", "0"], "--items"),
        (["--schema", "otel"], "--schema is a setting of serve, which this command does not use"),
    ):
        done = run("bench", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
    assert "examples:\n  otel-pg-exporter bench --dsn " in run("bench", "--help").stdout


def test_fewer_rows_than_one_request_a_load_are_refused(dsn: str) -> None:
    done = run("bench", "--parts", "spans-small", "--max-rows", "999", OTEL_PG_EXPORTER_DSN=dsn)
    assert done.returncode == 2
    assert "--max-rows (999) is less than one request of 1,000 for each of 1 loads, 1,000" in done.stderr


def test_requests_larger_than_the_receiver_takes_are_refused_before_anything_starts(dsn: str) -> None:
    for items, part, most, message in (
        ("1000000", "spans-small", "64MiB", "MiB for spans-small, and the receiver takes 64.0 MiB at most"),
        ("1000", "spans-genai", "200KiB", "MiB for spans-genai, and the receiver takes 0.2 MiB at most"),
    ):
        arguments = ("bench", "--items", items, "--parts", part)
        done = run(*arguments, OTEL_PG_EXPORTER_DSN=dsn, OTEL_PG_EXPORTER_MAX_REQUEST_BYTES=most)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_a_schema_that_a_killed_bench_has_left_is_named_with_the_sql_that_drops_it(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA otel_bench_0123456789ab; CREATE SCHEMA otel_bench_mine")
        done = run(*BRIEF, "--parts", "spans-small", "--max-rows", "50", OTEL_PG_EXPORTER_DSN=dsn)
        statement = re.search(r"has left a schema behind: (DROP SCHEMA .*)\n", done.stderr)
        assert statement is not None
        connection.execute(statement[1].encode())
    assert schemas(dsn) == ["otel", "otel_bench_mine"]


def test_its_processes_take_nothing_from_the_current_folder(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grpc.py").write_text("raise SystemExit('taken from the current folder')")
    monkeypatch.chdir(tmp_path)
    program = Path(sys.executable).parent / "otel-pg-exporter"
    done = subprocess.run(
        [program, *BRIEF, "--parts", "spans-small"],
        env=environment(OTEL_PG_EXPORTER_DSN=dsn),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
