"""`verify`, each time as a process of its own."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.serving import run
from tests.workload import Database, database, span, traces


@pytest.fixture
def opened(dsn: str) -> Iterator[Database]:
    with database(dsn) as opened:
        opened.writer.write([traces(*[span(n, trace=trace) for trace in range(1, 6) for n in range(3)])])
        yield opened


def verify(opened: Database, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run("verify", *arguments, OTEL_PG_EXPORTER_DSN=opened.dsn)
    assert done.stderr == ""
    return done


def damage(opened: Database) -> None:
    opened.execute(
        "UPDATE traces SET span_count = 7, root_name = E'\\x1b[2J' WHERE right(trace_id::text, 1) = '1'",
        "DELETE FROM traces WHERE right(trace_id::text, 1) = '2'",
        "INSERT INTO traces (trace_id, start_time, end_time, span_count, error_count)"
        " VALUES ('000000000000000000000000000000ff', now(), now(), 1, 0)",
    )


def test_verify_says_that_nothing_differs(opened: Database) -> None:
    done = verify(opened, "--since", "1h")
    assert (done.returncode, done.stdout) == (0, "5 traces compared: 0 differences, 0 of them fixed\n")


def test_verify_lists_what_differs_and_with_fix_mends_it(opened: Database) -> None:
    damage(opened)
    done = verify(opened, "--since", "1h")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "00000000000000000000000000000001 different",
        "    span_count: 7, the spans say 3",
        "    root_name: \\u001b[2J, the spans say operation 0",
        "00000000000000000000000000000002 missing",
        "000000000000000000000000000000ff superfluous",
        "5 traces compared: 3 differences, 0 of them fixed",
    ]
    done = verify(opened, "--since", "1h", "--fix")
    assert done.returncode == 0
    assert done.stdout.count("fixed\n") == 4
    opened.assert_traces_exact()
    assert verify(opened, "--since", "1h").returncode == 0


def test_scripts_get_a_line_of_json_a_difference(opened: Database) -> None:
    damage(opened)
    done = verify(opened, "--since", "1h", "--json", "--limit", "2")
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "trace_id": "00000000000000000000000000000001",
        "kind": "different",
        "fixed": False,
        "columns": {
            "span_count": {"stored": "7", "exact": "3"},
            "root_name": {"stored": "\x1b[2J", "exact": "operation 0"},
        },
    }
    assert (second["kind"], second["columns"]["span_count"]) == ("missing", {"stored": None, "exact": "3"})
    done = verify(opened, "--since", "1h", "--fix", "--limit", "1")
    assert done.returncode == 1
    assert done.stdout.endswith("stopped by --limit, there may be more\n")


def test_verify_counts_what_began_before_the_oldest_partition(opened: Database) -> None:
    opened.execute("UPDATE traces SET start_time = '2020-01-01' WHERE right(trace_id::text, 1) = '1'")
    done = verify(opened, "--since", "1h")
    assert done.returncode == 0
    assert "; 1 skipped of which spans may have been dropped" in done.stdout


def test_verify_needs_to_know_since_when_and_where() -> None:
    for arguments, message in (
        (["verify"], "required: --since"),
        (["verify", "--since", "-1h"], "--since"),
        (["verify", "--since", "1h", "--until", "2h"], "does not lie before --until"),
        (["verify", "--since", "1h"], "--dsn or OTEL_PG_EXPORTER_DSN"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
    assert "examples:\n  otel-pg-exporter verify --since 2h\n" in run("verify", "--help").stdout
