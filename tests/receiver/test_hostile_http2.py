"""HTTP/2 floods: what gRPC's own defences do, and that others are served meanwhile.

PINGs are punished by GOAWAY (too_many_pings); SETTINGS are all acknowledged, at the flooder's pace; streams that are
reset at once cost their neighbours a retry, since for a moment they fill the call limit or gRPC's own queue of 1,000
calls; idle connections cost little more than their sockets.
"""

import struct
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from otel_pg_exporter.receiver.body_watch import resident_bytes
from tests.receiver.http2 import ACK, DATA, PING, SETTINGS, WINDOW_UPDATE, Connection, call, frame, reset
from tests.receiver.support import TRACES, Client, Connect, Recorder, Running, Serve, persist
from tests.support import wait_until

MIB = 2**20


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(Recorder(), budget=2**32)  # this process holds the flooder's memory, too


@pytest.fixture
def neighbour(running: Running, connect: Connect) -> Client:
    client = connect(running.address)
    client.export(TRACES, b"before")
    return client


def flood(connection: Connection, frames: Callable[[int], bytes], count: int, neighbour: Client) -> bool:
    """Send frames while a neighbour is served; say whether the server bore it all."""
    before = resident_bytes()
    for start in range(0, count, 1000):
        try:
            connection.send(b"".join(map(frames, range(start, start + 1000))))
        except OSError:
            break
        persist(neighbour, b"during")  # the flood may hold all places among the calls in flight for a moment
    persist(neighbour, b"after")
    assert resident_bytes() - before < 100 * MIB
    return not connection.closed.is_set()


def test_a_ping_flood_is_punished(running: Running, neighbour: Client) -> None:
    with Connection(running.port) as hostile:
        flood(hostile, lambda _: frame(PING, 0, 0, bytes(8)), 20_000, neighbour)
        wait_until(hostile.closed.is_set)
        assert hostile.goaway == b"too_many_pings"


def test_a_settings_flood_is_acknowledged_and_no_more(running: Running, neighbour: Client) -> None:
    count = 20_000
    with Connection(running.port) as hostile:
        value = struct.pack(">HI", 4, 65_535)
        assert flood(hostile, lambda _: frame(SETTINGS, 0, 0, value), count, neighbour)
        acknowledged = (SETTINGS, ACK)
        wait_until(lambda: sum(each[:2] == acknowledged for each in hostile.frames()) > count)


def test_streams_that_are_reset_at_once_leave_nothing_behind(running: Running, neighbour: Client) -> None:
    with Connection(running.port) as hostile:
        flood(hostile, lambda number: call(2 * number + 1, TRACES) + reset(2 * number + 1), 10_000, neighbour)
        wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)), id="windows"),
        pytest.param(frame(DATA, 0, 1), id="empty data"),
        pytest.param(frame(0xFE, 0, 0, b"x"), id="unknown frames"),
    ],
)
def test_frames_that_say_nothing_cost_nothing(running: Running, neighbour: Client, frames: bytes) -> None:
    with Connection(running.port) as hostile:
        hostile.send(call(1, TRACES))
        flood(hostile, lambda _: frames, 50_000, neighbour)


def test_hundreds_of_idle_connections_keep_nobody_waiting(running: Running, neighbour: Client) -> None:
    before = resident_bytes()
    with ExitStack() as connections:
        idle = [connections.enter_context(Connection(running.port)) for _ in range(400)]
        neighbour.export(TRACES, b"during")
        assert not any(each.closed.is_set() for each in idle)
        assert resident_bytes() - before < 100 * MIB
    neighbour.export(TRACES, b"after")
