"""What becomes of a command whose output goes nowhere."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.serving import PROGRAM, environment
from tests.support import wait_until

_WITHOUT_STDOUT = 'exec "$@" >&-'


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["--version"],
        ["check"],
        ["completion", "bash"],
        ["config", "show"],
        ["dead-letters", "list"],
        ["migrate", "--print"],
        ["partitions", "list", "--json"],
        ["verify", "--since", "1d"],
    ],
    ids=lambda command: command[0],
)
def test_a_full_disk_is_said_in_a_line(command: list[str], dsn: str, tmp_path: Path) -> None:
    variables = {"OTEL_PG_EXPORTER_DSN": dsn, "OTEL_PG_EXPORTER_SPOOL_DIR": str(tmp_path)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, *command], env=environment(**variables), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.stderr == b"otel-pg-exporter: cannot write to stdout: No space left on device\n"
    assert done.returncode == 1


def test_a_closed_stdout_is_said_in_a_line() -> None:
    done = subprocess.run(
        ["sh", "-c", _WITHOUT_STDOUT, "sh", *PROGRAM, "config", "show"],
        env=environment(),
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.stderr == b"otel-pg-exporter: cannot write to stdout: Bad file descriptor\n"
    assert done.returncode == 1


@pytest.mark.parametrize("command", [["--help"], ["completion", "bash"], ["migrate", "--print"]])
def test_a_command_whose_reader_has_gone_ends_without_a_word(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as unread:
        done = subprocess.run(
            [*PROGRAM, *command], env=environment(), stdout=unread, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_serve_goes_on_although_nobody_reads_its_banner(dsn: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        serving = subprocess.Popen(
            ["sh", "-c", _WITHOUT_STDOUT, "sh", *PROGRAM, "serve", "--dsn", dsn, "--no-spool"],
            env=environment(),
            stderr=stderr,
        )
    try:
        wait_until(lambda: "ready: serving" in log.read_text() or serving.poll() is not None)
    finally:
        serving.terminate()
        status = serving.wait(60)
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text()
