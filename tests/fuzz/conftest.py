"""Fixtures and hypothesis' profile: `pytest tests/fuzz --hypothesis-profile=fuzz` runs long."""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import settings

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.e2e.support import Receiver, receiving

settings.register_profile("fuzz", max_examples=10_000)


@pytest.fixture(scope="session")
def fuzzed_receivers(server: EmbeddedServer, migrated: str) -> Iterator[dict[str, Receiver]]:
    """Return a receiver with a database that nobody else writes to, by the protocol that its client speaks."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE fuzzed TEMPLATE {migrated}".encode())
    with receiving(server.url("fuzzed")) as running, running.speaking("http") as by_http:
        yield {"grpc": running, "http": by_http}
