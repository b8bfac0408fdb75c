"""How log lines look: to a machine, to a person at a terminal, and to one who wants no colour."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.serving import PROGRAM, StartServing, environment, run, start_serving

_TEXT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) +[\w.]+: .+")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


def test_what_serve_logs_where_nobody_looks_is_json_line_by_line(serve: StartServing, dsn: str) -> None:
    serving = serve("--dsn", dsn, variables={"OTEL_PG_EXPORTER_LOG_FORMAT": "auto", "OTEL_PG_EXPORTER_NONSENSE": "é"})
    serving.process.terminate()
    assert serving.wait() == 0
    records = [json.loads(line) for line in serving.stderr.splitlines()]
    assert {"WARNING", "INFO"} == {record["level"] for record in records}
    for record in records:
        assert list(record) == ["timestamp", "level", "logger", "message", "thread"]
        at = datetime.fromisoformat(record["timestamp"])
        assert (at.utcoffset(), abs(datetime.now(UTC) - at) < timedelta(minutes=10)) == (timedelta(0), True)
    assert any(record["message"].startswith("statistics: ") for record in records)


def test_why_serve_could_not_start_is_json_too_with_what_to_do() -> None:
    done = run("serve", "--dsn", "host=127.0.0.1 port=1", "--no-spool", OTEL_PG_EXPORTER_LOG_FORMAT="auto")
    assert done.returncode == 1
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert last["level"] == "CRITICAL"
    assert re.search("no connection to PostgreSQL .*; check that the server is up", last["message"])


def test_an_exception_is_part_of_its_json_line() -> None:
    script = (
        "import logging\n"
        "from otel_pg_exporter.cli import logs\n"
        "from otel_pg_exporter.config import MonitoringSettings\n"
        "logs.set_up(MonitoringSettings(), attended=False)\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.getLogger('x').exception('two\\nlines')\n"
    )
    done = subprocess.run([PROGRAM[0], "-c", script], capture_output=True, text=True, check=True, timeout=60)
    (line,) = done.stderr.splitlines()
    record = json.loads(line)
    assert record["message"] == "two\nlines"
    assert "ZeroDivisionError" in record["exception"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_what_ends_a_thread_or_the_program_unexpectedly_is_a_record_with_the_exception(form: str) -> None:
    script = (
        "import sys, threading\n"
        "from otel_pg_exporter.cli import logs\n"
        "from otel_pg_exporter.config import MonitoringSettings\n"
        f"logs.set_up(MonitoringSettings(log_format={form!r}), attended=False)\n"
        "for name, run in (('divides', lambda: 1 / 0), ('leaves', sys.exit)):\n"
        "    thread = threading.Thread(target=run, name=name)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "{}['missing']\n"
    )
    done = subprocess.run([PROGRAM[0], "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    said = ["the thread divides was ended by an unexpected error", "ended by an unexpected error"]
    if form == "json":
        records = [json.loads(line) for line in done.stderr.splitlines()]
        assert [record["message"] for record in records] == said
        assert [record["thread"] for record in records] == ["divides", "MainThread"]
        traces = [record["exception"] for record in records]
    else:
        texts = re.split(r"^(?=\d{4}-)", done.stderr, flags=re.MULTILINE)[1:]
        firsts = [text.split("\n", 1)[0] for text in texts]
        assert all(_TEXT.fullmatch(first) for first in firsts)
        assert [first.rsplit(": ", 1)[1] for first in firsts] == said
        traces = [text.split("\n", 1)[1] for text in texts]
    assert all(trace.startswith("Traceback (most recent call last):\n") for trace in traces)
    assert [trace.strip().rsplit("\n", 1)[1] for trace in traces] == [
        "ZeroDivisionError: division by zero",
        "KeyError: 'missing'",
    ]


def test_a_message_with_line_breaks_and_control_characters_is_one_line_of_text() -> None:
    script = (
        "import logging\n"
        "from otel_pg_exporter.cli import logs\n"
        "from otel_pg_exporter.config import MonitoringSettings\n"
        "logs.set_up(MonitoringSettings(), attended=True)\n"
        "logging.getLogger('x').warning('said\\nWARNING \\x1b[2J é')\n"
    )
    done = subprocess.run([PROGRAM[0], "-c", script], capture_output=True, text=True, check=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert line.endswith(r"said\nWARNING \u001b[2J é")
    assert _TEXT.fullmatch(line)


@pytest.mark.parametrize(("form", "is_json"), [("auto", False), ("text", False), ("json", True)])
def test_other_commands_log_text_unless_json_is_asked_for(form: str, is_json: bool) -> None:
    done = run("migrate", "--dsn", "host=127.0.0.1 port=1 password=x", OTEL_PG_EXPORTER_LOG_FORMAT=form)
    warning = done.stderr.splitlines()[0]
    assert warning.startswith("{") is is_json
    assert is_json or _TEXT.fullmatch(warning)


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_levels_are_coloured_unless_no_color_is_set(colour: bool) -> None:
    ours, theirs = pty.openpty()
    variables = environment(OTEL_PG_EXPORTER_LOG_FORMAT="auto", TERM="xterm", NO_COLOR="" if colour else "1")
    with subprocess.Popen(
        [*PROGRAM, "serve", "--dsn", "host=127.0.0.1 port=1 password=x", "--no-spool"],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ):
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 65_536):
                said += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
        os.close(ours)
    line = said.decode().splitlines()[0]
    assert ("\x1b[33mWARNING\x1b[0m" in line) is colour
    assert _TEXT.fullmatch(re.sub(r"\x1b\[\d*m", "", line))
