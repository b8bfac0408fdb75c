"""Bodies that lie about their size, or never end, or are no protobuf: refused alone, and nobody else notices."""

import itertools
import zlib
from contextlib import ExitStack

import grpc
import pytest

from otel_pg_exporter.receiver.body_watch import resident_bytes
from tests.receiver.http2 import Connection, call, message
from tests.receiver.support import METRICS, TRACES, Connect, Recorder, Serve, persist
from tests.support import wait_until

MIB = 2**20
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, INTERNAL = 3, 8, 13


def bomb(mebibytes: int) -> bytes:
    """Compress so many MiB of zeros, a thousand to one."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(mebibytes)), packer.flush()])


GIBIBYTE = bomb(1024)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        pytest.param({"grpc_encoding": "gzip"}, message(GIBIBYTE, compressed=True), RESOURCE_EXHAUSTED, id="bomb"),
        pytest.param({"grpc_encoding": "identity"}, message(GIBIBYTE, compressed=True), None, id="said to be plain"),
        pytest.param({"grpc_encoding": "gzip"}, message(b"x" * 1000, compressed=True), INTERNAL, id="no gzip"),
        pytest.param({}, message(b"x", length=2**32 - 1), RESOURCE_EXHAUSTED, id="said to be 4 GiB"),
        pytest.param({}, message(b"x", length=60 * MIB), INVALID_ARGUMENT, id="said to be 60 MiB"),
        pytest.param({}, b"\0\0", INVALID_ARGUMENT, id="cut off in the prefix"),
        pytest.param({"grpc_encoding": "zstd"}, message(b"x", compressed=True), INTERNAL, id="unknown encoding"),
    ],
)
def test_a_body_that_lies_is_refused_within_bounds(
    serve: Serve, connect: Connect, headers: dict[str, str], body: bytes, status: int | None
) -> None:
    recorder = Recorder()
    running = serve(recorder)
    neighbour = connect(running.address)
    neighbour.export(TRACES, b"before")
    before = resident_bytes()
    with Connection(running.port) as hostile:
        hostile.send(call(1, TRACES, **headers))
        hostile.send_body(1, body)
        wait_until(lambda: hostile.over)
        assert hostile.status == status or (status is None and hostile.status is not None)
        assert resident_bytes() - before < 200 * MIB
    neighbour.export(TRACES, b"after")
    assert [body for _, body in recorder.calls if body in {b"before", b"after"}] == [b"before", b"after"]


def test_a_bomb_that_no_header_announces_is_so_many_bytes_of_no_protobuf(serve: Serve) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with Connection(running.port) as hostile:
        hostile.send(call(1, TRACES, grpc_encoding="gzip"))
        hostile.send_body(1, message(GIBIBYTE))
        wait_until(lambda: hostile.over)
    assert [len(body) for _, body in recorder.calls] == [len(GIBIBYTE)]


def test_bodies_that_stall_on_many_connections_keep_nobody_else_waiting(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    running = serve(recorder, body_timeout=2)
    neighbour = connect(running.address)
    neighbour.export(TRACES, b"first")
    with ExitStack() as connections:
        # By now it expects bodies of 117 MB, as after a start or many large ones.
        stalling = [connections.enter_context(Connection(running.port)) for _ in range(150)]
        for hostile in stalling:
            hostile.send(call(1, TRACES))
            hostile.send(b"\0\0\x06\0\0\0\0\0\1" + message(b"x", length=60 * MIB))
        for number in range(50):
            persist(neighbour, b"%d" % number)
        wait_until(lambda: running.server.calls_in_flight == 0)
        neighbour.export(TRACES, b"last")
    assert len(recorder.calls) == 52


def test_metrics_of_millions_of_empty_points_are_counted_and_refused(serve: Serve, connect: Connect) -> None:
    client = connect(serve(Recorder()).address)
    before = resident_bytes()
    refused = client.refused(METRICS, b"\x0a\0" * (30 * MIB))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details == "the request has more than 1,000,000 fields; metrics are not stored here"
    assert resident_bytes() - before < 500 * MIB  # with the client, which holds it several times


def test_an_oversized_body_is_refused_and_the_next_is_taken(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    client = connect(serve(recorder).address)
    for size in itertools.repeat(65 * MIB, 3):
        assert client.refused(TRACES, bytes(size)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    client.export(TRACES, bytes(64 * MIB))
    assert [len(body) for _, body in recorder.calls] == [64 * MIB]
