"""Fixtures: front doors on free ports, and channels to them."""

from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.receiver.front_door import FrontDoor
from otel_pg_exporter.receiver.security import Security
from otel_pg_exporter.telemetry import Answered, unobserved
from tests.receiver.http1 import HttpClient
from tests.receiver.support import Client, Connect, ConnectHttp, Export, Running, Serve, settings


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that are stopped, and checked for leaks, when the test is over."""
    with ExitStack() as stack:

        def start(
            export: Export,
            values: ReceiverSettings | None = None,
            *,
            budget: int = 512 * 2**20,
            body_timeout: float = 120,
            security: Security | None = None,
            answered: Answered = unobserved,
        ) -> Running:
            byte_budget = ByteBudget(budget)
            server = FrontDoor(
                export,
                byte_budget,
                values or settings(),
                security=security,
                answered=answered,
                body_timeout=body_timeout,
            )
            server.start()
            server.set_serving(True)

            def stop() -> None:
                server.stop(10)
                assert (server.calls_in_flight, byte_budget.level) == (0, 0)

            stack.callback(stop)
            return Running(server=server, budget=byte_budget)

        yield start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open channels, each with a connection of its own, that are closed when the test is over."""
    with ExitStack() as stack:

        def open_channel(address: str) -> Client:
            # Without the first option, channels to the same address would share one connection.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
            return Client(stack.enter_context(grpc.insecure_channel(address, options=options)))

        yield open_channel


@pytest.fixture
def connect_http() -> Iterator[ConnectHttp]:
    """Make HTTP clients, each with a connection of its own, that are closed when the test is over."""
    with ExitStack() as stack:
        yield lambda running: stack.enter_context(HttpClient(running.http_port))
