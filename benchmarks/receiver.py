"""`serve` in a process of its own, writing to a benchmark's tables: what loads are sent to, and what they cost."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.processes import GENERATOR_CORE, resident_bytes
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, LoadProcess, Sent
from otel_pg_exporter.bench.processes import cpu_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a load came to. CPU times are those of the system's accounts, in seconds, within the measured time."""

    sent: Sent
    receiver_cpu: float
    postgres_cpu: float

    @property
    def receiver_cost(self) -> float:
        """CPU microseconds of the receiver for an item."""
        return self.receiver_cpu / max(1, self.sent.items) * 1e6

    @property
    def postgres_cost(self) -> float:
        """CPU microseconds of PostgreSQL for an item."""
        return self.postgres_cpu / max(1, self.sent.items) * 1e6


class Receiver:
    """A receiver that runs."""

    def __init__(self, process: subprocess.Popen[str], endpoint: str, tables: Database) -> None:
        self.endpoint = endpoint
        self.pid = process.pid
        self.tables = tables

    def run(self, load: Load, *, empty: bool = True) -> Measured:
        """Send a load, whose endpoint is filled in here, into tables that are empty unless told otherwise."""
        if empty:
            self.tables.truncate()
        with LoadProcess(replace(load, endpoint=self.endpoint, core=GENERATOR_CORE)) as process:
            process.wait_ready()
            time.sleep(load.warm_up)
            receiver, postgres = self.cpu(), self.tables.cpu()
            time.sleep(load.seconds)
            receiver, postgres = self.cpu() - receiver, self.tables.cpu() - postgres
            return Measured(sent=process.result(), receiver_cpu=receiver, postgres_cpu=postgres)

    def cpu(self) -> float:
        """Return the seconds that the receiver has computed so far."""
        return cpu_seconds(self.pid)

    def resident(self) -> int:
        """Return its resident memory in bytes."""
        return resident_bytes(self.pid)


@contextlib.contextmanager
def receiving(tables: Database, *flags: str, variables: Mapping[str, str] | None = None) -> Iterator[Receiver]:
    """Start `serve` on a free port, with a spool, for the benchmark's tables; stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="otel-pg-exporter-benchmark-") as folder:
        environment = {
            **os.environ,
            "OTEL_PG_EXPORTER_DSN": tables.settings.dsn,
            "OTEL_PG_EXPORTER_SCHEMA": tables.settings.schema,
            "OTEL_PG_EXPORTER_GRPC_ENDPOINT": "127.0.0.1:0",
            "OTEL_PG_EXPORTER_HTTP_ENDPOINT": "127.0.0.1:0",
            "OTEL_PG_EXPORTER_METRICS_ENDPOINT": "none",
            "OTEL_PG_EXPORTER_SPOOL_DIR": folder,
            "OTEL_PG_EXPORTER_LOG_LEVEL": "warning",
            **(variables or {}),
        }
        command = [sys.executable, "-m", "otel_pg_exporter", "serve", *flags]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield Receiver(process, _endpoint(process), tables)
            finally:
                process.terminate()


def _endpoint(process: subprocess.Popen[str]) -> str:
    """Wait for the banner's last line; return where it listens."""
    assert process.stdout is not None
    endpoint = ""
    for line in process.stdout:
        if found := re.search(r"OTLP/gRPC +(\S+)", line):
            endpoint = found[1]
        if "python app.py" in line:
            return endpoint
    raise RuntimeError("the receiver did not start; it said why on stderr")
