"""Fixtures: receivers that write as the writer: one that all tests of a worker share, and one of a test's own."""

from collections.abc import Iterator

import psycopg
import pytest

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.e2e.support import Protocol, Receiver, receiving
from tests.pgbouncer import Route
from tests.postgres.test_roles import granted

__all__ = ["granted", "receiver", "shared_receiver"]


@pytest.fixture
def protocol() -> Protocol:
    """Return what clients speak; a test that is parametrised by `protocol` speaks that instead."""
    return "grpc"


@pytest.fixture
def receiver(dsn: str, writer_dsn: str, protocol: Protocol) -> Iterator[Receiver]:
    with receiving(writer_dsn, read_dsn=dsn, protocol=protocol) as running:
        yield running


@pytest.fixture
def shared_receiver(receiver_of_all: Receiver, protocol: Protocol) -> Iterator[Receiver]:
    with receiver_of_all.speaking(protocol) as running:
        yield running


@pytest.fixture(scope="session")
def receiver_of_all(server: EmbeddedServer, migrated: str, as_writer: Route) -> Iterator[Receiver]:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE shared TEMPLATE {migrated}".encode())
    dsn = server.url("shared")
    with receiving(as_writer(dsn), read_dsn=dsn) as running:
        yield running
