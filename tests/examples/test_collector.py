"""The OpenTelemetry Collector in front of us, built and run by the commands of the example's README."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from examples.python import shop
from tests.examples.quickstart import EXAMPLES, environment, fetch, run, sending_to
from tests.serving import Serving, start_serving
from tests.support import free_port, wait_until

pytestmark = [
    pytest.mark.quickstart(language="collector"),
    pytest.mark.toolchain,
    pytest.mark.timeout(900),
]

FOLDER = EXAMPLES / "collector"
PROGRAM = FOLDER / "build" / "otelcol-quickstart"
SPANS = 4 * shop.ORDERS + 1
LOGS = shop.ORDERS + len(shop.BANK_IS_DOWN_AT) + 1  # one a request, one more for a failure, and the sum


Files = tuple[str, ...]
VARIANTS: tuple[Files, ...] = (("config.yaml",), ("config.yaml", "http.yaml"))


@pytest.fixture(scope="module", autouse=True)
def build() -> None:
    """Build the collector, as the README says."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (command,) = (line for line in readme.splitlines() if line.startswith("go run "))
    fetch(FOLDER, *command.split())


def options(files: Files) -> list[str]:
    """Return the command line's options that name configuration files."""
    return [f"--config={each}" for each in files]


def address_for(receiver: Serving, files: Files) -> str:
    """Return where a collector of that configuration sends to."""
    return receiver.http_address if "http.yaml" in files else receiver.address


@contextlib.contextmanager
def collecting(folder: Path, files: Files, address: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """Run the collector with its queue in `folder`; yield its OTLP/gRPC endpoint, and end it by that signal.

    `address` is where the collector itself sends to.
    """
    own = f"127.0.0.1:{free_port()}"
    settings = environment(
        {
            "COLLECTOR_GRPC_ENDPOINT": own,
            "COLLECTOR_HTTP_ENDPOINT": "127.0.0.1:0",
            "COLLECTOR_QUEUE_DIR": str(folder / "queue"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}",
        }
    )
    with (folder / "collector").open("a+") as said:
        process = subprocess.Popen([PROGRAM, *options(files)], cwd=FOLDER, env=settings, stderr=said)
        try:
            log = Path(said.name)
            wait_until(lambda: log.read_text().count("Everything is ready") or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield f"http://{own}"
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
        variables=sending_to(endpoint) | {"OTEL_SERVICE_NAME": "shop"},
    )


def stored(dsn: str) -> tuple[int, int]:
    """Count the spans and the log records that are stored."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            b"SELECT (SELECT count(*) FROM otel.spans), (SELECT count(*) FROM otel.logs)"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.parametrize("files", VARIANTS, ids="+".join)
def test_the_configuration_is_valid(files: Files) -> None:
    run(FOLDER, PROGRAM, "validate", *options(files), variables={})


@pytest.mark.parametrize("files", VARIANTS, ids="+".join)
def test_what_an_app_sends_to_the_collector_arrives_through_it(
    files: Files, serving: Serving, dsn: str, tmp_path: Path
) -> None:
    with collecting(tmp_path, files, address_for(serving, files)) as endpoint:
        send_shop(endpoint)
        wait_until(lambda: stored(dsn) == (SPANS, LOGS))


@pytest.mark.parametrize("files", VARIANTS, ids="+".join)
def test_an_outage_of_ours_and_a_crash_of_the_collector_lose_and_double_nothing(
    files: Files, dsn: str, tmp_path: Path
) -> None:
    with start_serving(tmp_path) as start:
        receiver = {"OTEL_PG_EXPORTER_DSN": dsn}
        first = start(variables=receiver)
        address = address_for(first, files)
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        with collecting(tmp_path, files, address, end=signal.SIGKILL) as endpoint:
            send_shop(endpoint)
        assert stored(dsn) == (0, 0)
        with collecting(tmp_path, files, address):
            door = "HTTP" if "http.yaml" in files else "GRPC"
            start(variables=receiver | {f"OTEL_PG_EXPORTER_{door}_ENDPOINT": address})
            wait_until(lambda: stored(dsn) == (SPANS, LOGS), timeout=120)
        assert stored(dsn) == (SPANS, LOGS)
