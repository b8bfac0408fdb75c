"""The receiver that is measured: a `Service` in a process of its own, as `serve` runs it, which tells its figures.

What passes between the two ends is pickled: the settings go in on stdin, then a line for each reading that is wanted;
what comes out on stdout is a `Started` and the readings, or the error that kept it from starting.
"""

import pickle
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self, TypeVar

from otel_pg_exporter.bench.processes import cpu_seconds
from otel_pg_exporter.bench.signals import undisturbed
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import ExporterError
from otel_pg_exporter.service import Service
from otel_pg_exporter.telemetry import StatisticsSnapshot
from otel_pg_exporter.transcode import CORE

T = TypeVar("T")

_STOP_TIMEOUT = 60.0  # seconds, beyond what the receiver itself may take; a start that goes on is finished first


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A receiver is up."""

    endpoint: str
    postgres_version: str
    core: str  # that makes rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The figures of one moment, counted from the receiver's start."""

    at: float  # seconds, by a clock that only differences of are good for
    cpu_seconds: float  # of the receiver
    postgres_cpu_seconds: float | None  # None where PostgreSQL is not the receiver's own
    statistics: StatisticsSnapshot


class ReceiverProcess:
    """A receiver that runs; a `with` block stops it in good order."""

    def __init__(self, settings: ServeSettings) -> None:
        """Start it and wait until it serves. Raises ExporterError, as `Service.start` does."""
        self._patience = settings.shutdown_timeout + _STOP_TIMEOUT
        # In a session of its own: a Ctrl-C is for us, who then stop it in good order.
        self._process = subprocess.Popen(  # noqa: S603 - this module, by this interpreter
            [sys.executable, "-P", "-c", f"import {__name__} as receiver; receiver.main()"],  # -P: as in bench.load
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._tell(pickle.dumps(settings))
            self.started = self._hear(Started)
        except BaseException:
            self.stop()
            raise

    def read(self) -> Reading:
        """Return its figures."""
        self._tell(b"\n")
        return self._hear(Reading)

    def stop(self) -> None:
        """Stop it; what it started ends with it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with undisturbed():
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(self._patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tell(self, words: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is heard next
            self._process.stdin.write(words)
            self._process.stdin.flush()

    def _hear(self, kind: type[T]) -> T:
        assert self._process.stdout is not None
        try:
            heard = pickle.load(self._process.stdout)  # noqa: S301 - written by this module
        except (EOFError, pickle.UnpicklingError):
            raise ExporterError("the receiver ended unexpectedly; what it said is above") from None
        if isinstance(heard, ExporterError):
            raise heard
        assert isinstance(heard, kind)
        return heard


def main() -> None:
    """Be the receiver: serve until stdin ends."""
    settings = pickle.load(sys.stdin.buffer)  # noqa: S301 - written by this module
    try:
        with Service(settings) as service:
            endpoint = str(service.grpc_endpoint)
            _say(Started(endpoint=endpoint, postgres_version=service.postgres_version, core=CORE))
            for _ in sys.stdin.buffer:
                _say(_reading(service))
    except ExporterError as exc:
        _say(exc)


def _say(answer: Started | Reading | ExporterError) -> None:
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.buffer.flush()


def _reading(service: Service) -> Reading:
    return Reading(
        at=time.perf_counter(),
        cpu_seconds=time.process_time(),
        postgres_cpu_seconds=_postgres_cpu_seconds(service),
        statistics=service.statistics(),
    )


def _postgres_cpu_seconds(service: Service) -> float | None:
    pid = None if service.embedded is None else service.embedded.pid
    try:
        return None if pid is None else cpu_seconds(pid, with_children=True)
    except OSError:  # not Linux
        return None
