"""`tail`, as a process of its own, while telemetry is written."""

import contextlib
import datetime as dt
import json
import os
import pty
import re
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from otel_pg_exporter.postgres.partitions import ensure_partitions
from tests.proxy import proxy_for
from tests.serving import PROGRAM, environment, run
from tests.support import as_role, wait_until
from tests.workload import Database, database, logs, record, span, traces


@pytest.fixture
def written(dsn: str) -> Iterator[Database]:
    with database(dsn) as opened:
        yield opened


@pytest.fixture
def reader(dsn: str) -> str:
    return as_role("otel_reader", dsn)


def said(body: str, severity: int = 9, **fields: object) -> LogRecord:
    made = record(body)
    made.MergeFrom(LogRecord(severity_number=severity, **fields))  # type: ignore[arg-type] # protobuf's own
    return made


class Following:
    """`tail` that runs; what it prints goes to files."""

    def __init__(self, folder: Path, dsn: str, *arguments: str) -> None:
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [*PROGRAM, "tail", "--interval", "0.1", *arguments],
                env=environment(OTEL_PG_EXPORTER_DSN=dsn),
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def lines(self) -> list[str]:
        return self._stdout.read_text().splitlines()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def said(self) -> list[str]:
        """What stands on stderr, but for what it says of a slow machine."""
        return [line for line in self.stderr.splitlines() if "PostgreSQL is busy" not in line]

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self._stdout.read_text() or self.process.poll() is not None)
        assert text in self._stdout.read_text(), self.stderr


@contextlib.contextmanager
def following(folder: Path, dsn: str, *arguments: str) -> Iterator[Following]:
    started = Following(folder, dsn, *arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def once(dsn: str, *arguments: str) -> list[str]:
    """Return what there is, without the times and the blanks of the columns."""
    done = run("tail", "--once", "--since", "1h", *arguments, OTEL_PG_EXPORTER_DSN=dsn)
    assert done.returncode == 0
    assert done.stderr == ("" if done.stdout else "otel-pg-exporter: nothing is stored that fits\n")
    return [" ".join(line.split()[1:]) for line in done.stdout.splitlines()]


def test_each_item_appears_once_soon_after_it_is_stored(written: Database, reader: str, tmp_path: Path) -> None:
    written.writer.write([logs(said("before"))])
    with following(tmp_path, reader) as tail:
        tail.wait_for("before")
        for number in range(5):
            written.writer.write([traces(span(number))])
            written.writer.write([logs(said(f"line {number}"))])
            tail.wait_for(f"operation {number}")
            tail.wait_for(f"line {number}")
        tail.process.send_signal(signal.SIGINT)
        assert tail.process.wait(30) == 128 + signal.SIGINT
        assert tail.said == []
        texts = [line.split("  ")[-1].strip() for line in tail.lines]
        assert sorted(texts) == sorted(
            ["before", *(f"operation {n}" for n in range(5)), *(f"line {n}" for n in range(5))]
        )


def test_a_transaction_that_commits_late_is_not_missed(written: Database, reader: str, tmp_path: Path) -> None:
    written.writer.write([logs(said("first"))])
    columns = "time_minute, time, time_ns, severity_number, severity_text, event_name, body, flags, scope_name,"
    columns += " scope_version, scope_dropped_attributes_count, dropped_attributes_count, resource_id, schema_url,"
    columns += " anomalies, request_id"
    copy = f"INSERT INTO otel.logs ({columns}) SELECT {columns} FROM otel.logs LIMIT 1"
    with psycopg.connect(written.dsn) as late, following(tmp_path, reader) as tail:
        tail.wait_for("first")
        late.execute(copy.encode())
        late.execute("UPDATE otel.logs SET body = 'late' WHERE xmin::text::int8 = txid_current() % 4294967296")
        written.writer.write([logs(said("second"))])
        tail.wait_for("second")
        late.commit()
        tail.wait_for("late")


def test_a_line_says_when_what_where_how_long_and_why(written: Database, reader: str) -> None:
    failed = span(0, trace=0xABCDEF << 104, status=Status(code=Status.STATUS_CODE_ERROR, message="no stock"))
    failed.end_time_unix_nano = failed.start_time_unix_nano + 2_500_000_000
    written.writer.write([traces(failed, service="checkout")])
    written.writer.write([logs(said("two\nlines \x1b[31m", 13), service="a")])
    done = run("tail", "--once", OTEL_PG_EXPORTER_DSN=reader)
    lines = sorted(done.stdout.splitlines(), key=lambda line: "SPAN" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  WARN    a         +two\\nlines \\u001b\[31m", lines[0])
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3}  SPAN    checkout  abcdef00     2\.50 s  operation 0: no stock", lines[1]
    )


def test_filters_choose_and_must_all_hold(written: Database, reader: str) -> None:
    bad = Status(code=Status.STATUS_CODE_ERROR)
    first = span(0, trace=1 << 120, attributes={"http.route": "/cart", "size": 5})
    written.writer.write([traces(first, span(1, trace=2 << 120, status=bad), service="shop")])
    written.writer.write([logs(said("All Fine", 9), said("broken", 17), said("worse", 21), service="bank")])
    spans, texts = ["operation 0", "operation 1"], ["All Fine", "broken", "worse"]
    for arguments, expected in (
        ((), spans + texts),
        (("--spans",), spans),
        (("--logs",), texts),
        (("--service", "bank"), texts),
        (("--service", "shop", "--errors"), ["operation 1"]),
        (("--errors",), ["operation 1", "broken", "worse"]),
        (("--min-severity", "fatal"), ["worse"]),
        (("--grep", "ALL f"), ["All Fine"]),
        (("--name", "Operation 1"), ["operation 1"]),
        (("--trace-id", "02"), ["operation 1"]),
        (("--trace-id", f"{1 << 120:032x}"), ["operation 0"]),
        (("--attribute", "http.route=/cart", "--attribute", "size=5"), ["operation 0"]),
        (("--attribute", "http.route=/cart", "--attribute", "size=6"), []),
        (("--attribute", "service.name=bank", "--grep", "o"), ["broken", "worse"]),
    ):
        found = once(reader, *arguments)
        assert len(found) == len(expected)
        assert {each for each in spans + texts for line in found if line.endswith(each)} == set(expected)
    assert len(once(reader, "-n", "1")) == 1


def test_json_has_all_of_an_item_one_object_a_line(written: Database, reader: str) -> None:
    made = span(3, trace=7, attributes={"text": "\x1b[31mred", "number": 5}, kind=2)
    made.start_time_unix_nano = made.start_time_unix_nano // 1000 * 1000 + 123
    made.end_time_unix_nano = made.start_time_unix_nano + 42
    written.writer.write([traces(made)])
    done = run("tail", "--once", "--json", OTEL_PG_EXPORTER_DSN=reader)
    (line,) = done.stdout.splitlines()
    assert "\x1b" not in line
    found = json.loads(line)
    assert found["time"].endswith("123Z")
    assert found.pop("ingested_at")
    assert {key: value for key, value in found.items() if key != "time"} == {
        "signal": "traces",
        "service_name": "shop",
        "trace_id": f"{7:032x}",
        "span_id": f"{4:016x}",
        "parent_span_id": f"{1:016x}",
        "name": "operation 3",
        "kind": "server",
        "status": "unset",
        "duration_ns": 42,
        "attributes": {"text": "\x1b[31mred", "number": 5},
    }


def test_where_too_much_arrives_the_last_are_shown_and_that_is_said(
    written: Database, reader: str, tmp_path: Path
) -> None:
    with following(tmp_path, reader, "--json") as tail:
        written.writer.write([logs(said("first"))])
        tail.wait_for("first")
        written.writer.write([logs(*(said(f"line {number}") for number in range(1_500)))])
        written.writer.write([logs(said("last"))])
        tail.wait_for('"last"')
        bodies = [json.loads(line)["body"] for line in tail.lines]
        assert len(bodies) == len(set(bodies)) <= 1_502
        assert tail.said == ["otel-pg-exporter: more than 1,000 arrived at once; the last are shown"]


def test_an_outage_is_told_once_and_survived(written: Database, reader: str, tmp_path: Path) -> None:
    with proxy_for(reader) as proxy, following(tmp_path, proxy.dsn) as tail:
        written.writer.write([logs(said("before"))])
        tail.wait_for("before")
        proxy.refuse()
        wait_until(lambda: "waiting for it" in tail.stderr)
        written.writer.write([logs(said("meanwhile"))])
        proxy.up()
        tail.wait_for("meanwhile")
        wait_until(lambda: "PostgreSQL is back\n" in tail.stderr)
        assert len(tail.said) == 2
        assert [line.split()[-1] for line in tail.lines] == ["before", "meanwhile"]


def test_a_look_that_takes_long_looks_through_less_the_next_time(
    written: Database, reader: str, tmp_path: Path
) -> None:
    old = span(0, start=time.time_ns() - 2_000_000_000_000)
    with psycopg.connect(written.dsn) as holder, following(tmp_path, reader, "--lock-timeout", "60") as tail:
        written.writer.write([logs(said("before"))])
        tail.wait_for("before")
        holder.execute("LOCK TABLE otel.logs IN ACCESS EXCLUSIVE MODE")
        wait_until(lambda: "PostgreSQL is busy: from now on without what began more than" in tail.stderr)
        holder.rollback()
        written.writer.write([traces(old)])
        written.writer.write([logs(said("after"))])
        tail.wait_for("after")
        assert [line.split()[-1] for line in tail.lines] == ["before", "after"]


def test_it_ends_when_nobody_reads_any_more(written: Database, reader: str) -> None:
    written.writer.write([logs(said("line"))])
    with subprocess.Popen(
        [*PROGRAM, "tail"],
        env=environment(OTEL_PG_EXPORTER_DSN=reader),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert tail.stdout.readline().endswith("line\n")
        tail.stdout.close()
        assert tail.wait(30) == 128 + signal.SIGPIPE
        assert tail.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "variables", "coloured"),
    [
        ((), {}, True),
        (("--color", "never"), {}, False),
        ((), {"NO_COLOR": "1"}, False),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
        ((), {"TERM": "dumb"}, False),
    ],
)
def test_on_a_terminal_lines_are_coloured_and_cut_to_its_width(
    written: Database, reader: str, arguments: tuple[str, ...], variables: dict[str, str], *, coloured: bool
) -> None:
    written.writer.write([logs(said("x" * 200, 17))])
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    variables = {"OTEL_PG_EXPORTER_DSN": reader, "TERM": "xterm", "COLUMNS": "", **variables}
    done = subprocess.run(
        [*PROGRAM, "tail", "--once", *arguments], env=environment(**variables), stdout=theirs, check=True
    )
    assert done.returncode == 0
    shown = os.read(ours, 65_536).decode()
    os.close(theirs)
    os.close(ours)
    assert ("\x1b[31mERROR \x1b[0m" in shown) == coloured
    line = re.sub(r"\x1b\[\d+m", "", shown).rstrip("\r\n")
    assert len(line) == 60
    assert line.endswith("x…")


def test_what_is_asked_wrongly_or_not_allowed_gets_a_line(dsn: str) -> None:
    for arguments, message in (
        (["--spans", "--min-severity", "warn"], "--min-severity is for log records"),
        (["--trace-id", "xyz"], "'xyz' is not the beginning of a trace id"),
        (["--attribute", "novalue"], "'novalue' does not read KEY=VALUE"),
        (["--interval", "0"], "'0' is no number of seconds from 0.1 to 3600"),
    ):
        done = run("tail", *arguments, OTEL_PG_EXPORTER_DSN=dsn)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
    writer = run("tail", "--once", OTEL_PG_EXPORTER_DSN=as_role("otel_writer", dsn))
    assert (writer.returncode, writer.stdout) == (1, "")
    assert "permission denied" in writer.stderr
    away = run("tail", OTEL_PG_EXPORTER_DSN="postgresql://otel:s3cret@127.0.0.1:1/otel")
    assert away.returncode == 1
    assert "s3cret" not in away.stderr


def test_a_clock_that_is_ahead_of_the_servers_keeps_nothing_back(
    written: Database, reader: str, tmp_path: Path
) -> None:
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    with following(tmp_path, reader, "--since", tomorrow.isoformat()) as tail:
        wait_until(
            lambda: written.rows("SELECT FROM pg_stat_activity WHERE usename = 'otel_reader' AND state = 'idle'"),
            timeout=30,
        )
        written.writer.write([logs(said("now"))])
        tail.wait_for("now")


def test_the_last_items_are_those_that_began_last_however_old_they_are(written: Database, reader: str) -> None:
    """Whatever transaction stored them, of both signals, and in the order of their times."""
    now = time.time_ns()
    ages = [30 * 3600, 7_000, 6_000, 450, 449, 448, 447]  # seconds
    for number, age in reversed(list(enumerate(ages))):  # the oldest is stored last
        start = now - age * 10**9
        if number % 2:
            written.writer.write([traces(span(number, trace=number + 1, start=start))])
        else:
            written.writer.write([logs(LogRecord(time_unix_nano=start, event_name=f"operation {number}"))])
    for arguments, expected in (
        ([], range(7)),
        (["-n", "3"], [4, 5, 6]),
        (["-n", "6", "--service", "shop"], range(1, 7)),
        (["--logs", "-n", "2"], [4, 6]),
        (["--since", "1h", "-n", "2"], [5, 6]),  # stored since
        (["--name", "operation 0"], [0]),
    ):
        done = run("tail", "--once", *arguments, OTEL_PG_EXPORTER_DSN=reader)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert [int(line.split()[-1]) for line in done.stdout.splitlines()] == list(expected), arguments


def test_where_nothing_fits_that_is_said(written: Database, reader: str) -> None:
    written.writer.write([logs(said("line"))])
    done = run("tail", "--once", "--service", "nobody", OTEL_PG_EXPORTER_DSN=reader)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "otel-pg-exporter: nothing is stored that fits\n"


def test_what_was_there_before_is_not_shown_later(written: Database, reader: str, tmp_path: Path) -> None:
    written.writer.write([logs(*(said(f"old {number}") for number in range(30)))])
    with following(tmp_path, reader, "-n", "2") as tail:
        tail.wait_for("old 29")
        written.writer.write([logs(said("new"))])
        tail.wait_for("new")
        assert [line.split("  ")[-1].strip() for line in tail.lines] == ["old 28", "old 29", "new"]


def test_where_more_was_stored_since_than_is_shown_that_is_said(written: Database, reader: str) -> None:
    written.writer.write([logs(*(said(f"line {number}") for number in range(1_001)))])
    done = run("tail", "--once", "--since", "1h", OTEL_PG_EXPORTER_DSN=reader)
    assert done.stdout.count("\n") == 1_000
    assert done.stderr == "otel-pg-exporter: more than 1,000 were stored since then; the last are shown (-n)\n"


def test_a_search_that_takes_too_long_ends_and_says_how_far_it_came(written: Database, reader: str, dsn: str) -> None:
    written.writer.write([logs(said("line"))])
    today = int(time.time() // 86_400)
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_partitions(connection, "otel", range(today - 1, today + 3))  # so that only older times are in DEFAULT
    with psycopg.connect(dsn) as holder:
        holder.execute("LOCK TABLE otel.logs_default IN ACCESS EXCLUSIVE MODE")
        done = run("tail", "--once", "--logs", "--lock-timeout", "1", OTEL_PG_EXPORTER_DSN=reader)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "looked back to" in done.stderr
