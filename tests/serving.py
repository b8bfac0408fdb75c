"""The command line in processes of its own: `from tests.serving import Serving, run`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.receiver.support import TRACES, Client, Refusal, refusal
from tests.support import wait_until

PROGRAM = (sys.executable, "-m", "otel_pg_exporter")


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which nothing of ours or of libpq's is set but `variables` and free ports."""
    others = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PG"))}
    own = {f"OTEL_PG_EXPORTER_{each}_ENDPOINT": "127.0.0.1:0" for each in ("GRPC", "HTTP", "METRICS")}
    return {**others, **own, "OTEL_PG_EXPORTER_LOG_FORMAT": "text", **variables}


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `variables` are its environment's."""
    return subprocess.run(
        [*PROGRAM, *arguments], env=environment(**variables), capture_output=True, text=True, timeout=120, check=False
    )


class Serving:
    """`serve` in a process of its own; what it prints goes to files in `folder`."""

    def __init__(self, folder: Path, *arguments: str | Path, variables: Mapping[str, str]) -> None:
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [*PROGRAM, "serve", *arguments],
                env=environment(**{"OTEL_PG_EXPORTER_SPOOL_DIR": str(folder / "spool"), **variables}),
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_ready(self) -> None:
        """Wait for the whole banner; fail with what was said instead if the process ends."""
        wait_until(lambda: "python app.py" in self.stdout or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr

    @property
    def address(self) -> str:
        """Where it listens, as its banner says."""
        return self._found(r"OTLP/gRPC +(\S+)")

    @property
    def http_address(self) -> str:
        """Where it listens for OTLP/HTTP, as its banner says."""
        return self._found(r"OTLP/HTTP +(\S+)")

    @property
    def metrics_url(self) -> str:
        """Where `/metrics`, `/healthz` and `/readyz` are, without these."""
        return self._found(r"Metrics +(\S+)/metrics,")

    @property
    def psql(self) -> str:
        """The banner's psql line."""
        return self._found(r"^ *(\S*psql '.*')$")

    def _found(self, pattern: str) -> str:
        match = re.search(pattern, self.stdout, re.MULTILINE)
        assert match is not None, self.stdout
        return match[1]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(timeout)


class StartServing(Protocol):
    """Start `serve` on a free port; it is stopped when the test is over."""

    def __call__(
        self, *arguments: str | Path, ready: bool = ..., variables: Mapping[str, str] | None = ...
    ) -> Serving: ...


@contextlib.contextmanager
def start_serving(folder: Path) -> Iterator[StartServing]:
    """Yield a function that starts `serve`; what still runs at the end must stop in good order."""
    started: list[Serving] = []

    def start(*arguments: str | Path, ready: bool = True, variables: Mapping[str, str] | None = None) -> Serving:
        place = folder / f"serve-{len(started)}"
        place.mkdir()
        serving = Serving(place, *arguments, variables=variables or {})
        started.append(serving)
        if ready:
            serving.wait_ready()
        return serving

    try:
        yield start
    finally:
        for serving in started:
            if serving.process.poll() is None:
                serving.send(signal.SIGTERM)
                try:
                    serving.wait()
                except subprocess.TimeoutExpired:
                    serving.process.kill()
                    raise


def span_request(count: int = 1) -> bytes:
    """Return an OTLP request with that many spans, all of them new."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "shop"
    spans = group.scope_spans.add().spans
    now = time.time_ns()
    for _ in range(count):
        spans.add(
            trace_id=os.urandom(16),
            span_id=os.urandom(8),
            name="work",
            start_time_unix_nano=now - 1_000_000,
            end_time_unix_nano=now,
        )
    return request.SerializeToString()


def refusal_once_draining(client: Client) -> Refusal:
    """Send requests without items, which are answered at once, until one is refused; return the refusal."""
    heard: list[Refusal] = []

    def refused() -> bool:
        try:
            client.export(TRACES, b"")
        except grpc.RpcError as exc:
            heard.append(refusal(exc))
        return bool(heard)

    wait_until(refused)
    return heard[0]
