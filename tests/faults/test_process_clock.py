"""A wall clock that jumps, by days and by years, there and back."""

import contextlib
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter import mapping
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import compile_plan, transcode
from tests.faults.judge import judge
from tests.faults.load import Ledger, load
from tests.faults.test_process_stop import stalled
from tests.serving import StartServing, start_serving
from tests.support import wait_until
from tests.workload import Database, database, log_body, record, span, trace_body

_DAY = 86_400  # seconds
_YEAR = 365 * _DAY


def _timeless(body: str) -> LogRecord:
    """Return a log record that gets the time of its receipt."""
    made = record(body)
    made.ClearField("time_unix_nano")
    return made


_PLANS = {signal: compile_plan(mapping.load(), signal, Window()) for signal in Signal}
_BODIES = {
    Signal.TRACES: trace_body([span(number) for number in range(5)]),
    Signal.LOGS: log_body([_timeless(f"line {number}") for number in range(5)]),
}

# Puts itself in front of the C library's clocks, and adds the seconds that a file says; monotonic clocks stay.
_SHIM = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;

__attribute__((constructor)) static void map_offset(void) {
    offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, open(getenv("CLOCK_OFFSET"), O_RDONLY), 0);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


class Clock:
    """The wall clock of processes that run with `variables`."""

    def __init__(self, folder: Path) -> None:
        source, library, self._offset = folder / "shim.c", folder / "shim.so", folder / "offset"
        source.write_text(_SHIM)
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            pytest.skip(f"no C compiler for a clock that jumps: {exc}")
        self._offset.write_bytes(bytes(8))
        self.variables = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}

    def set(self, offset: int) -> None:
        """Let the clock be this many seconds ahead."""
        with self._offset.open("r+b") as file:
            file.write(struct.pack("q", offset))


def test_a_clock_that_jumps_under_load_loses_doubles_and_delays_nothing(
    serve: StartServing, tmp_path: Path, prepared: str
) -> None:
    clock = Clock(tmp_path)
    serving = serve(
        *("--dsn", prepared, "--ack-timeout", "0.5", "--spool-dir", tmp_path / "spool"), variables=clock.variables
    )
    ledger = Ledger()
    with load(ledger, serving.address) as running:
        for offset in (10 * _YEAR, -40 * _YEAR, 2 * _DAY, -_DAY, 0):
            clock.set(offset)
            running.wait_for_more()
        for offset in (2 * _DAY, -_DAY):
            with stalled(prepared):
                running.wait_for_more(8)  # into the spool
                clock.set(offset)
                running.wait_for_more(8)
            running.wait_for_more()
    judge(prepared, ledger)


def after(seconds: float) -> int:
    """Return the time after so many seconds from now, in nanoseconds."""
    return time.time_ns() + int(seconds * 1e9)


def test_a_request_is_stored_once_whatever_the_clock_says_when_it_comes_again(dsn: str) -> None:
    with database(dsn) as at:
        for offset in (0, 10 * _YEAR, -10 * _YEAR, -_DAY, 40 * _DAY):
            for signal, body in _BODIES.items():
                (outcome,) = at.writer.write([transcode(_PLANS[signal], body, now_ns=after(offset))])
                assert (outcome.stored, outcome.duplicate) == ((5, 0) if offset == 0 else (0, 5))
        assert (at.count("spans"), at.count("logs")) == (5, 5)
        at.assert_traces_exact()


@contextlib.contextmanager
def drained(at: Database, folder: Path, *, received_at: int, in_doubt: bool, now: int) -> Iterator[Spool]:
    """Put a request of each signal into a spool, and yield it when all are drained that can be at a time."""
    folder.mkdir(mode=0o700)
    spool = Spool(folder, max_bytes=2**20)
    for signal, body in _BODIES.items():
        request = transcode(_PLANS[signal], body, now_ns=received_at)
        made = SpoolRecord(
            signal=signal,
            request_id=request.request_id,
            received_at=received_at,
            item_count=request.item_count,
            in_doubt=in_doubt,
            otlp=body,
        )
        assert spool.append(made)
    counters = ItemCounters()
    drain = Drain(
        spool,
        SpoolWriter(
            _PLANS,
            at.writer.write,
            probe=lambda: None,
            counters=counters,
            availability=Availability(),
            ledger_ttl=7 * _DAY,
            now_ns=lambda: now,
        ),
        counters,
    )
    try:
        wait_until(lambda: spool.level.requests == spool.level.set_aside)
        yield spool
    finally:
        assert drain.stop(10)
        spool.close()


@pytest.mark.parametrize("offset", [2 * _DAY, 10 * _YEAR])
def test_what_was_spooled_by_a_clock_that_was_ahead_is_drained_and_keeps_its_time(
    dsn: str, tmp_path: Path, offset: int
) -> None:
    received_at = after(offset)
    with (
        database(dsn) as at,
        drained(at, tmp_path / "spool", received_at=received_at, in_doubt=True, now=after(0)) as spool,
    ):
        assert spool.level.set_aside == 0
        assert (at.count("spans"), at.count("logs")) == (5, 5)
        times = at.rows("SELECT DISTINCT floor(extract(epoch FROM time))::int8 FROM logs")
        assert times == [(received_at // 1_000_000_000,)]
        at.assert_traces_exact()


@pytest.mark.parametrize("in_doubt", [True, False])
def test_after_a_jump_ahead_only_log_requests_in_doubt_are_set_aside_and_none_is_lost(
    dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, in_doubt: bool
) -> None:
    with (
        database(dsn) as at,
        drained(at, tmp_path / "spool", received_at=after(0), in_doubt=in_doubt, now=after(10 * _YEAR)) as spool,
    ):
        assert at.count("spans") == 5
        assert at.count("logs") == (0 if in_doubt else 5)
        assert spool.level.set_aside == in_doubt
        assert ("is kept in the spool, but not written" in caplog.text) == in_doubt


# Where the wall clock may be read, and what for. Whatever waits or is timed goes by the monotonic clock.
_WALL_CLOCK = {
    "bench/load.py": "when made-up items began",
    "cli/bench_report.py": "when it was measured",
    "cli/verify.py": "how far a bar is",
    "diagnosis/database.py": "how far the server's clock is from ours",
    "cli/forms.py": "what `--since 2h` means",
    "monitoring/groups.py": "how old the spool's oldest request is",
    "pipeline/ticker.py": "when a job last went well",
    "pipeline/export.py": "when a request came",
    "pipeline/spool.py": "the name of a damaged file",
    "pipeline/spool_folder.py": "the name of a process's folder",
    "pipeline/spool_writer.py": "how old a request in doubt is",
    "postgres/replay.py": "when a dead letter is sent again",
    "postgres/writer.py": "how old the spans are that were committed, and whether the machine slept",
    "postgres/retention.py": "whether the server's clock is to be believed",
    "receiver/tls.py": "when the certificate ends",
    "sdk/exporters.py": "when items were exported",
}


def test_no_timeout_goes_by_the_wall_clock() -> None:
    package = Path(mapping.__file__).parent
    reads = re.compile(r"\btime\.time(_ns)?\b|\bdatetime\.(now|utcnow|today)\b|\bdate\.today\b")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if reads.search(path.read_text())}
    assert found == _WALL_CLOCK.keys()
