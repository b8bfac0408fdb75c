"""SIGTERM with calls in flight and PostgreSQL stalled: the process ends in time, and what it acknowledged is stored."""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.judge import judge
from tests.faults.load import Ledger, load
from tests.serving import Serving, StartServing, start_serving
from tests.support import free_port, wait_until

_CLIENTS = 24
_ITEMS = 20  # in one request
_SHUTDOWN_TIMEOUT = 5.0  # seconds
_MARGIN = 10.0  # seconds that a process may need to end beside others


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


@contextlib.contextmanager
def stalled(dsn: str) -> Iterator[None]:
    """Keep every COMMIT of both signals waiting."""
    with contextlib.closing(psycopg.connect(dsn)) as connection:
        connection.execute("LOCK TABLE otel.spans, otel.logs IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


def a_writer_waits(dsn: str) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchone() is not None


def last_balance(serving: Serving) -> dict[str, int]:
    """Return what the last log line about items says, by name; its two sides must be equal."""
    *_, line = re.findall(r"items: (.*)", serving.stderr)
    counts = {
        name: int(figure.replace(",", "")) for figure, name in re.findall(r"([\d,]+) ([a-z ]+?)(?= [=+] |$)", line)
    }
    came = counts["received"] + counts.get("recovered from the spool", 0)
    assert came == sum(counts.values()) - came, line
    return counts


@pytest.mark.parametrize("spool", ["--spool", "--no-spool"])
@pytest.mark.parametrize("released", [True, False], ids=["released", "held"])
def test_a_stop_with_many_calls_in_flight_ends_in_time_and_every_ok_holds(
    serve: StartServing, tmp_path: Path, prepared: str, spool: str, released: bool
) -> None:
    address = f"127.0.0.1:{free_port()}"
    places = ("--dsn", prepared, spool, "--spool-dir", tmp_path / "spool", "--grpc-endpoint", address)
    times = ("--ack-timeout", "1", "--shutdown-timeout", str(_SHUTDOWN_TIMEOUT))
    old = serve(*places, *times)
    ledger = Ledger()
    with load(ledger, address, clients=_CLIENTS, items=_ITEMS) as running:
        running.wait_for_more(2 * _CLIENTS)
        with contextlib.ExitStack() as lock:
            lock.enter_context(stalled(prepared))
            wait_until(lambda: a_writer_waits(prepared))
            old.send(signal.SIGTERM)
            wait_until(lambda: "stopping" in old.stderr)
            if released:
                lock.close()
            assert old.wait(_SHUTDOWN_TIMEOUT + _MARGIN) == 0
        counts = last_balance(old)
        assert counts["in flight"] == 0
        if not released:
            assert counts["in the spool" if spool == "--spool" else "refused"] >= _ITEMS
        new = serve(*places, *times)
        running.wait_for_more(2 * _CLIENTS)
    judge(prepared, ledger)
    new.send(signal.SIGTERM)
    assert new.wait() == 0
    assert last_balance(new).get("in the spool", 0) == 0
