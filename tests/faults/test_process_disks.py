"""Disks that are full: PostgreSQL's, and the spool's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, SpoolSettings
from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from otel_pg_exporter.service import Service
from tests.e2e.support import client_of
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, load, refuse_poison, spans_request
from tests.faults.machines import filled, small_disk
from tests.faults.servers import restartable
from tests.proxy import proxy_for
from tests.receiver.support import TRACES
from tests.support import FAST, wait_until

_MEBIBYTE = 2**20


@pytest.fixture
def cramped(binaries: Path) -> Iterator[EmbeddedServer]:
    """Return a PostgreSQL with migrated tables, all of it on a disk of 300 MiB."""
    with (
        small_disk(300) as folder,
        restartable(folder / "data", binaries=binaries, settings=FAST) as server,
    ):
        migrate(DatabaseSettings(dsn=server.dsn), mapping.load())
        refuse_poison(server.dsn)
        yield server


@pytest.fixture
def spool_disk() -> Iterator[Path]:
    with small_disk(12) as folder:
        yield folder


def revived(server: EmbeddedServer) -> bool:
    """Start the server again if it has ended; tell whether it takes connections."""
    try:
        server.revive()
        psycopg.connect(server.dsn, connect_timeout=5).close()
    except (EmbeddedServerError, psycopg.OperationalError):
        return False
    return True


def panicked(server: EmbeddedServer) -> bool:
    """Have the server ask for a new file of its log; tell whether it ever died of having none."""
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_switch_wal()")
    return "PANIC" in (server.data_dir / "postgres.log").read_text()


@pytest.mark.parametrize("panic", [False, True], ids=["tables", "log"])
def test_nothing_acknowledged_is_lost_when_postgresqls_disk_is_full_for_a_while(
    cramped: EmbeddedServer, receive: Receive, caplog: pytest.LogCaptureFixture, panic: bool
) -> None:
    ledger = Ledger()
    service = receive(cramped.dsn)
    with load(ledger, str(service.grpc_endpoint), items=100) as running:
        running.wait_for_more()
        with filled(cramped.data_dir.parent, leave=2 * _MEBIBYTE):
            wait_until(lambda: panicked(cramped) if panic else "(53100)" in caplog.text)
            running.wait_for_more()  # into the spool
        wait_until(lambda: revived(cramped))
        running.wait_for_more()
    judge(cramped.dsn, ledger, services=[service])


def test_a_spool_whose_disk_is_full_asks_senders_to_come_again_and_loses_nothing(
    prepared: str, spool_disk: Path, receive: Receive
) -> None:
    ledger = Ledger()
    with proxy_for(prepared) as proxy:
        service = receive(proxy.dsn, spool=SpoolSettings(spool_dir=spool_disk / "spool"))
        address = str(service.grpc_endpoint)
        with load(ledger, address, items=200) as running:
            running.wait_for_more()
            proxy.refuse()
            with filled(spool_disk, leave=_MEBIBYTE):
                assert_refused_for_now(ledger, service)
            running.wait_for_more()  # on the disk that has space again
            assert service.counts().in_spool > 0
            proxy.up()
            running.wait_for_more()
        judge(prepared, ledger, services=[service])


def test_a_spool_that_has_filled_its_disk_by_itself_gets_empty_when_postgresql_is_back(
    prepared: str, spool_disk: Path, receive: Receive
) -> None:
    ledger = Ledger()
    with proxy_for(prepared) as proxy:
        service = receive(proxy.dsn, spool=SpoolSettings(spool_dir=spool_disk / "spool"))
        with load(ledger, str(service.grpc_endpoint), items=200) as running:
            running.wait_for_more()
            proxy.refuse()
            assert_refused_for_now(ledger, service)
            proxy.up()
            running.wait_for_more()
        judge(prepared, ledger, services=[service])


def assert_refused_for_now(ledger: Ledger, service: Service) -> None:
    """Wait until senders are refused, and see how."""
    before = service.counts().refused
    wait_until(lambda: service.counts().refused > before)
    request = spans_request(ledger, client=10_000, number=0, part=0, count=2_000)
    ledger.send(request)
    with client_of(str(service.grpc_endpoint)) as client:
        heard = client.refused(TRACES, request.body)
    assert (heard.code, heard.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
