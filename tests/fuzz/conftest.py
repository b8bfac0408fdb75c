"""Fixtures and hypothesis' profile: `pytest tests/fuzz --hypothesis-profile=fuzz` runs long."""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import settings

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.e2e.support import Receiver, receiving

settings.register_profile("fuzz", max_examples=10_000, deadline=None)


@pytest.fixture(scope="session")
def fuzzed_receiver(server: EmbeddedServer, migrated: str) -> Iterator[Receiver]:
    """Return a receiver with a database that nobody else writes to."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE fuzzed TEMPLATE {migrated}".encode())
    with receiving(server.url("fuzzed")) as running:
        yield running
