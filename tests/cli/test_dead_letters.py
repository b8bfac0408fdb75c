"""`dead-letters`, each time as a process of its own."""

import contextlib
import json
import os
import pty
import subprocess
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serving import PROGRAM, environment, run
from tests.workload import Database, database, logs, record, span, traces

REFUSALS = (
    "ALTER TABLE spans ADD CONSTRAINT refused CHECK (name NOT LIKE 'bad%') NOT VALID",
    "ALTER TABLE logs ADD CONSTRAINT refused CHECK (body NOT LIKE 'bad%') NOT VALID",
)
ACCEPTANCES = ("ALTER TABLE spans DROP CONSTRAINT refused", "ALTER TABLE logs DROP CONSTRAINT refused")


@pytest.fixture
def opened(dsn: str) -> Iterator[Database]:
    """A database with a stored span, two refused ones, and two equal refused log records."""
    with database(dsn) as opened:
        opened.execute(*REFUSALS)
        linked = span(1, name="bad", attributes={"traceId": "bm90IGFuIGlk"})
        linked.links.add(trace_id=b"l" * 16, span_id=b"m" * 8)
        opened.writer.write([traces(span(0), linked, span(2, span_id=bytes(8)))])
        opened.writer.write([logs(record("bad"), record("bad"))])
        yield opened


def dead_letters(opened: Database, *arguments: str, status: int = 0) -> str:
    done = run("dead-letters", *arguments, OTEL_PG_EXPORTER_DSN=opened.dsn)
    assert done.returncode == status, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(dsn: str, *arguments: str, status: int = 2) -> str:
    done = run("dead-letters", *arguments, OTEL_PG_EXPORTER_DSN=dsn)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def listed(opened: Database, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in dead_letters(opened, "list", "--json", *arguments).splitlines()]


@contextlib.contextmanager
def on_a_terminal(opened: Database, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run with a terminal for everything; yield its other end, and the process."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, "dead-letters", *arguments],
        env=environment(OTEL_PG_EXPORTER_DSN=opened.dsn),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            os.close(ours)


def test_letters_are_listed_as_a_table_the_newest_first(opened: Database) -> None:
    *lines, last = dead_letters(opened, "list").splitlines()
    assert lines[0].split() == ["id", "received", "(UTC)", "signal", "sqlstate", "bytes", "reason"]
    assert [line.split()[0] for line in lines[1:]] == sorted((line.split()[0] for line in lines[1:]), reverse=True)
    assert 'violates check constraint "refused"' in lines[1]
    assert "span_id is all zeros" in "".join(lines)
    assert last == "4 of 4 dead letters"
    assert dead_letters(opened, "list", "--limit", "1").splitlines()[-1] == "1 of 4 dead letters"


def test_scripts_get_a_line_of_json_a_letter(opened: Database) -> None:
    assert len(listed(opened)) == 4
    assert len(listed(opened, "--sqlstate", "23514", "--since", "1h", "--signal", "logs")) == 2
    [letter] = listed(opened, "--reason", "ALL ZEROS")
    assert letter.keys() == {
        *("id", "received_at", "signal", "request_id", "item_index", "reason", "sqlstate", "bytes"),
    }
    assert (letter["signal"], letter["item_index"], letter["sqlstate"]) == ("traces", 2, None)


def test_the_summary_counts_by_reason(opened: Database) -> None:
    lines = dead_letters(opened, "list", "--summary").splitlines()
    assert lines[0].split() == ["count", "signal", "sqlstate", "last", "(UTC)", "reason"]
    assert [line.split()[:2] for line in lines[1:]] == [["2", "logs"], ["1", "traces"], ["1", "traces"]]
    rows = [json.loads(line) for line in dead_letters(opened, "list", "--summary", "--json").splitlines()]
    assert [row["count"] for row in rows] == [2, 1, 1]


def test_what_a_sender_wrote_cannot_drive_the_terminal(opened: Database) -> None:
    opened.execute("UPDATE dead_letters SET reason = E'\\x1b[2J\\u009b1mred\\u202e\\nsecond'")
    for arguments in (["list"], ["list", "--json"], ["list", "--summary"]):
        shown = dead_letters(opened, *arguments)
        assert not {"\x1b", "\u009b", "\u202e"} & set(shown)
        if "--json" in arguments:
            assert json.loads(shown.splitlines()[0])["reason"] == "\x1b[2J\u009b1mred\u202e\nsecond"


def test_a_letter_is_shown_with_its_item_as_otlp_json(opened: Database) -> None:
    [letter] = listed(opened, "--signal", "traces", "--sqlstate", "23514")
    shown = json.loads(dead_letters(opened, "show", str(letter["id"])))
    otlp = shown.pop("otlp")
    assert shown == letter
    [item] = otlp["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert (item["traceId"], item["spanId"]) == ("00000000000000000000000000000001", "0000000000000002")
    assert item["links"] == [{"traceId": "6c" * 16, "spanId": "6d" * 8}]
    assert item["attributes"] == [{"key": "traceId", "value": {"stringValue": "bm90IGFuIGlk"}}]
    raw = subprocess.run(
        [*PROGRAM, "dead-letters", "show", str(letter["id"]), "--raw"],
        env=environment(OTEL_PG_EXPORTER_DSN=opened.dsn),
        capture_output=True,
        check=True,
    )
    request = ExportTraceServiceRequest.FromString(raw.stdout)
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "bad"


def test_a_letter_that_is_no_otlp_is_shown_as_bytes(opened: Database) -> None:
    opened.execute("UPDATE dead_letters SET otlp = '\\xff'")
    shown = json.loads(dead_letters(opened, "show", str(listed(opened)[0]["id"])))
    assert shown["otlp_base64"] == "/w=="


def test_letters_are_replayed_by_id_by_condition_and_all(opened: Database) -> None:
    opened.execute(*ACCEPTANCES)
    first = str(listed(opened, "--signal", "logs")[0]["id"])
    assert dead_letters(opened, "replay", first, "--dry-run").startswith("1 dead letter (")
    told = dead_letters(opened, "replay", first)
    assert told == "1 dead letter replayed: 1 stored, 0 stored before, 0 refused again\n"
    dead_letters(opened, "replay", "--signal", "logs")
    assert opened.count("logs") == 2
    told = dead_letters(opened, "replay", "--all", status=1)
    assert told == (
        "2 dead letters replayed: 1 stored, 0 stored before, 1 refused again; `dead-letters list` tells why\n"
    )
    assert [letter["reason"] for letter in listed(opened)] == ["span_id is all zeros"]
    opened.assert_traces_exact()


def test_a_purge_wants_yes_where_there_is_nobody_to_ask(opened: Database) -> None:
    assert "give --yes" in refused(opened.dsn, "purge", "--all")
    assert dead_letters(opened, "purge", "--signal", "logs", "--dry-run").startswith("2 dead letters (")
    assert opened.count("dead_letters") == 4
    assert dead_letters(opened, "purge", "--signal", "logs", "--yes") == "2 dead letters deleted\n"
    assert dead_letters(opened, "purge", "--all", "--yes", "--limit", "1") == "1 dead letter deleted\n"
    assert opened.count("dead_letters") == 1


@pytest.mark.parametrize(("answer", "left"), [(b"\n", 4), (b"no\n", 4), (b"y\n", 0)])
def test_a_purge_asks_on_a_terminal(opened: Database, answer: bytes, left: int) -> None:
    with on_a_terminal(opened, "purge", "--all") as (terminal, process):
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(terminal, 1024)
        assert b"Delete 4 dead letters for good?" in asked
        os.write(terminal, answer)
        assert process.wait(30) == (0 if left == 0 else 1)
    assert opened.count("dead_letters") == left


def test_protobuf_is_not_written_to_a_terminal(opened: Database) -> None:
    with on_a_terminal(opened, "show", str(listed(opened)[0]["id"]), "--raw") as (terminal, process):
        assert b"not for a terminal" in os.read(terminal, 1024)
        assert process.wait(30) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay"], "say which dead letters"),
        (["purge"], "say which dead letters"),
        (["replay", "--all", "--signal", "logs"], "contradict each other"),
        (["replay", "7x"], "'7x' is no whole number from 1 on"),
        (["show"], "required: ID"),
        (["list", "--since", "yesterday"], "'yesterday' is neither a duration"),
        (["list", "--signal", "metrics"], "invalid choice: 'metrics'"),
        (
            ["purge", "--since", "2026-11-02", "--until", "2026-11-01"],
            "does not lie before --until (2026-11-01 00:00:00)",
        ),
        (["list", "--limit", "0"], "'0' is no whole number from 1 on"),
        (["purge", "--sinse=1d"], "unknown argument --sinse, did you mean --since?"),
        (["lst"], "did you mean list?; see otel-pg-exporter dead-letters --help"),
    ],
)
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    assert message in refused("postgresql://127.0.0.1:1/nowhere", *arguments)


def test_what_keeps_a_command_from_its_work_is_one_line_and_exit_code_1(opened: Database) -> None:
    assert refused(opened.dsn, "show", "999", status=1) == "otel-pg-exporter: there is no dead letter 999"
    opened.execute("DROP TABLE dead_letters")
    line = refused(opened.dsn, "list", status=1)
    assert 'relation "otel.dead_letters" does not exist (42P01); run `otel-pg-exporter migrate`' in line


def test_a_server_that_takes_no_rows_is_told_from_one_that_is_away(opened: Database) -> None:
    with psycopg.connect(opened.dsn, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on".encode())
    done = run("dead-letters", "purge", "--all", "--yes", OTEL_PG_EXPORTER_DSN=opened.dsn)
    assert done.returncode == 1
    error, remedy = done.stderr.splitlines()
    assert "cannot execute DELETE in a read-only transaction (25006)" in error
    assert remedy == "`otel-pg-exporter check` tells whether this is a standby, or was made read-only"


def test_without_a_dsn_the_command_says_what_it_needs() -> None:
    done = run("dead-letters", "list")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--dsn or OTEL_PG_EXPORTER_DSN" in done.stderr


def test_the_help_of_every_action_has_examples() -> None:
    for action in ("list", "show", "replay", "purge"):
        done = run("dead-letters", action, "--help")
        assert done.returncode == 0
        assert f"usage: otel-pg-exporter dead-letters {action} " in done.stdout
        assert f"examples:\n  otel-pg-exporter dead-letters {action} " in done.stdout
