"""Fixtures: receivers whose PostgreSQL is about to be harmed, and how often.

The environment variable OTEL_PG_EXPORTER_FAULT_ROUNDS multiplies the rounds of each fault (`make faults`).
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import (
    DatabaseSettings,
    MonitoringSettings,
    PipelineSettings,
    ReceiverSettings,
    ServeSettings,
    SpoolSettings,
)
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import migrate
from otel_pg_exporter.service import Service
from tests.faults.load import refuse_poison
from tests.proxy import Proxy, proxy_for


class Receive(Protocol):
    """Start a receiver in this process, with a spool; it is stopped when the test is over."""

    def __call__(
        self,
        dsn: str,
        *,
        database: DatabaseSettings | None = ...,
        pipeline: PipelineSettings | None = ...,
        spool: SpoolSettings | None = ...,
    ) -> Service: ...


@pytest.fixture
def rounds() -> int:
    """Return how often a test is to do its harm."""
    return int(os.environ.get("OTEL_PG_EXPORTER_FAULT_ROUNDS", "1"))


@pytest.fixture
def receive(tmp_path: Path) -> Iterator[Receive]:
    numbers = itertools.count(1)
    with contextlib.ExitStack() as running:

        def start(
            dsn: str,
            *,
            database: DatabaseSettings | None = None,
            pipeline: PipelineSettings | None = None,
            spool: SpoolSettings | None = None,
        ) -> Service:
            settings = ServeSettings(
                database=replace(database or DatabaseSettings(), dsn=dsn),
                pipeline=pipeline or PipelineSettings(ack_timeout=0.5),
                spool=spool or SpoolSettings(spool_dir=tmp_path / f"spool-{next(numbers)}"),
                receiver=ReceiverSettings(grpc_endpoint="127.0.0.1:0", http_endpoint="127.0.0.1:0"),
                monitoring=MonitoringSettings(metrics_endpoint="127.0.0.1:0"),
            )
            return running.enter_context(Service(settings))

        yield start


@pytest.fixture
def proxy(prepared: str) -> Iterator[Proxy]:
    """Return a proxy in front of a database; to be asked for before `receive`, so that it goes last."""
    with proxy_for(prepared) as running:
        yield running


@pytest.fixture
def prepared(dsn: str) -> str:
    """Return the DSN of a database that refuses poison."""
    refuse_poison(dsn)
    return dsn


@pytest.fixture
def own_postgres(own_server: EmbeddedServer) -> EmbeddedServer:
    """Return a PostgreSQL for one test alone, with tables that refuse poison."""
    migrate(DatabaseSettings(dsn=own_server.dsn), mapping.load())
    refuse_poison(own_server.dsn)
    return own_server
