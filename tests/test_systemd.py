"""`serve` under systemd: what arrives at its notification socket, by path and by abstract name."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_pg_exporter.cli.systemd import Systemd
from tests.serving import StartServing, start_serving
from tests.support import wait_until


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@otel-pg-exporter-{os.urandom(8).hex()}"


class Supervisor:
    """Listens as systemd does."""

    def __init__(self, address: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listening.bind("\0" + address[1:] if address.startswith("@") else address)
        self._listening.setblocking(False)
        self.heard: list[dict[str, str]] = []

    def hears(self, name: str) -> bool:
        try:
            while True:
                message = self._listening.recv(65_536).decode()
                self.heard.append(dict(line.split("=", 1) for line in message.splitlines()))
        except BlockingIOError:
            return any(name in each for each in self.heard)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def supervisor(address: str) -> Iterator[Supervisor]:
    listening = Supervisor(address)
    yield listening
    listening.close()


def test_serve_tells_that_it_is_ready_alive_and_stopping(
    writer_dsn: str, serve: StartServing, address: str, supervisor: Supervisor
) -> None:
    watched = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"}
    serving = serve(variables={"OTEL_PG_EXPORTER_DSN": writer_dsn, **watched})
    wait_until(lambda: supervisor.hears("READY"))
    [ready] = [each for each in supervisor.heard if "READY" in each]
    assert ready["READY"] == "1"
    assert ready["STATUS"].startswith(f"serving OTLP/gRPC on {serving.address}, OTLP/HTTP on 127.0.0.1:")
    wait_until(lambda: supervisor.hears("WATCHDOG") and supervisor.heard.count({"WATCHDOG": "1"}) >= 3)
    assert not supervisor.hears("STOPPING")
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert supervisor.hears("STOPPING")
    assert "WATCHDOG" not in supervisor.heard[-1]


def test_a_start_that_fails_is_never_ready(
    empty_dsn: str, serve: StartServing, address: str, supervisor: Supervisor
) -> None:
    serving = serve(ready=False, variables={"OTEL_PG_EXPORTER_DSN": empty_dsn, "NOTIFY_SOCKET": address})
    assert serving.wait() == 1
    assert not supervisor.hears("READY")


@pytest.mark.parametrize(
    ("watchdog", "timeout"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_only_where_it_waits_for_this_process(
    watchdog: dict[str, str], timeout: float | None
) -> None:
    assert Systemd({**watchdog}).watchdog_timeout == timeout


def test_what_is_meant_for_this_process_is_not_handed_on_to_children(address: str, supervisor: Supervisor) -> None:
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/"}
    systemd = Systemd(environment)
    assert environment == {"PATH": "/"}
    systemd.alive()
    assert supervisor.hears("WATCHDOG")


def test_a_socket_that_is_gone_costs_a_warning_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Systemd({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("serving")
    assert "systemd, which is to be told READY=1, does not listen" in caplog.text


def test_without_systemd_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Systemd({}).ready("serving")
    assert caplog.records == []
