"""The OpenTelemetry Collector in front of us, built and run by the commands of the example's README."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from examples.python import shop
from tests.examples.quickstart import EXAMPLES, environment, fetch, run, variables
from tests.serving import Serving, start_serving
from tests.support import wait_until

pytestmark = [pytest.mark.quickstart(language="collector"), pytest.mark.toolchain, pytest.mark.timeout(900)]

FOLDER = EXAMPLES / "collector"
PROGRAM = FOLDER / "build" / "otelcol-quickstart"
SPANS = 4 * shop.ORDERS + 1
LOGS = shop.ORDERS + len(shop.BANK_IS_DOWN_AT) + 1  # one a request, one more for a failure, and the sum


@pytest.fixture(scope="module", autouse=True)
def build() -> None:
    """Build the collector, as the README says."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (command,) = (line for line in readme.splitlines() if line.startswith("go run "))
    fetch(FOLDER, *command.split())


@contextlib.contextmanager
def collecting(folder: Path, endpoint: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Run the collector with its queue in `folder`; yield its OTLP/gRPC endpoint, and end it by that signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = environment(
        {
            "COLLECTOR_GRPC_ENDPOINT": address,
            "COLLECTOR_HTTP_ENDPOINT": "127.0.0.1:0",
            "COLLECTOR_QUEUE_DIR": str(folder / "queue"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        }
    )
    with (folder / "collector").open("a+") as said:
        process = subprocess.Popen([PROGRAM, "--config", "config.yaml"], cwd=FOLDER, env=settings, stderr=said)
        try:
            log = Path(said.name)
            wait_until(lambda: log.read_text().count("Everything is ready") or process.poll() is not None, timeout=60)
            assert process.poll() is None, log.read_text()
            yield f"http://{address}"
        finally:
            process.send_signal(end)
            process.wait(60)
            said.truncate(0)


def send_shop(endpoint: str) -> None:
    """Run the Python shop, without a line of code, against an endpoint."""
    run(
        EXAMPLES.parent,
        Path(sys.executable).with_name("opentelemetry-instrument"),
        sys.executable,
        "examples/python/shop.py",
        variables=variables(endpoint, "shop"),
    )


def stored(dsn: str) -> tuple[int, int]:
    """Count the spans and the log records that are stored."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            b"SELECT (SELECT count(*) FROM otel.spans), (SELECT count(*) FROM otel.logs)"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.parametrize("files", [["config.yaml"], ["config.yaml", "http.yaml"]], ids="+".join)
def test_the_configuration_is_valid(files: list[str]) -> None:
    run(FOLDER, PROGRAM, "validate", *(f"--config={each}" for each in files), variables={})


def test_what_an_app_sends_to_the_collector_arrives_through_it(serving: Serving, dsn: str, tmp_path: Path) -> None:
    with collecting(tmp_path, f"http://{serving.address}") as endpoint:
        send_shop(endpoint)
        wait_until(lambda: stored(dsn) == (SPANS, LOGS), timeout=60)


def test_an_outage_of_ours_and_a_crash_of_the_collector_lose_and_double_nothing(dsn: str, tmp_path: Path) -> None:
    with start_serving(tmp_path) as start:
        receiver = {"OTEL_PG_EXPORTER_DSN": dsn}
        first = start(variables=receiver)
        address = first.address
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        with collecting(tmp_path, f"http://{address}", end=signal.SIGKILL) as endpoint:
            send_shop(endpoint)
        assert stored(dsn) == (0, 0)
        with collecting(tmp_path, f"http://{address}"):
            start(variables=receiver | {"OTEL_PG_EXPORTER_GRPC_ENDPOINT": address})
            wait_until(lambda: stored(dsn) == (SPANS, LOGS), timeout=120)
        assert stored(dsn) == (SPANS, LOGS)
