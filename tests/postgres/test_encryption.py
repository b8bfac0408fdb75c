"""The warning about a way to PostgreSQL that need not be encrypted."""

import pytest
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import Connections, connect
from otel_pg_exporter.postgres.encryption import encryption_is_optional


@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer"])
def test_another_machine_is_to_be_reached_by_tls_for_certain(sslmode: str) -> None:
    assert encryption_is_optional("192.0.2.1", sslmode)
    assert encryption_is_optional("2001:db8::1", sslmode)
    assert encryption_is_optional("::ffff:192.0.2.1", sslmode)


@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
def test_a_mode_that_insists_on_tls_is_enough(sslmode: str) -> None:
    assert not encryption_is_optional("192.0.2.1", sslmode)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_sockets_and_loopback_need_no_tls(address: str) -> None:
    assert not encryption_is_optional(address, "prefer")


def test_a_connection_to_this_machine_is_not_warned_about(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(DatabaseSettings(dsn=dsn)) as connection:
        assert connection.pgconn.hostaddr == b"127.0.0.1"
    assert caplog.messages == []


def test_connections_of_a_pool_are_warned_about_once(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    # No machine's address, nor loopback, by which the kernel nevertheless reaches this one.
    pool = Connections(DatabaseSettings(dsn=make_conninfo(dsn, hostaddr="0.0.0.0", sslmode="prefer")), size=2)
    with pool.borrow(timeout=30), pool.borrow(timeout=30):
        pool.close()
    (message,) = caplog.messages
    assert "is on another machine, and sslmode=prefer does not insist on encryption" in message
