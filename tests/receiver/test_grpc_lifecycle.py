"""Calls that wait, stall, or are cut; health; starting and stopping."""

import socket
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from otel_pg_exporter.errors import ConfigurationError, StartupError
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.receiver.front_door import FrontDoor
from tests.receiver.support import (
    LOGS,
    METRICS,
    TRACES,
    Blocker,
    Client,
    Connect,
    Export,
    Recorder,
    Serve,
    Wire,
    refusal,
    settings,
)
from tests.support import wait_until

SERVICES = ["", *(method.split("/")[1] for method in (TRACES, LOGS, METRICS))]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(client: Client, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(client.channel).Check(request, timeout=120).status)


def make(endpoint: str, export: Export | None = None, *, shared: bool = False) -> FrontDoor:
    """Return a server that has not started; its connections live for a second if its port is shared."""
    values = settings(endpoint, reuse_port=shared)
    return FrontDoor(export or Recorder(), ByteBudget(2**30), values, connection_age=1)


def opened(server: FrontDoor) -> str:
    """Start a server, and return the address of its gRPC."""
    server.start()
    return str(server.endpoints.grpc)


def assert_refused_for_now(client: Client, words: str) -> None:
    error = client.refused(TRACES, b"one more")
    assert (error.code, error.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
    assert words in error.details


def test_health_follows_set_serving_for_the_server_and_each_service(serve: Serve, connect: Connect) -> None:
    running = serve(Recorder())
    client = connect(running.address)
    assert [health(client, service) for service in SERVICES] == [SERVING] * 4
    running.server.set_serving(False)
    assert [health(client, service) for service in SERVICES] == [NOT_SERVING] * 4
    running.server.set_serving(True)
    assert [health(client, service) for service in SERVICES] == [SERVING] * 4
    with pytest.raises(grpc.RpcError) as info:
        health(client, "no.such.Service")
    assert refusal(info.value).code is grpc.StatusCode.NOT_FOUND


def test_health_is_not_serving_until_told_otherwise(connect: Connect) -> None:
    server = make("127.0.0.1:0")
    client = connect(opened(server))
    assert [health(client, service) for service in SERVICES] == [NOT_SERVING] * 4
    server.stop(0)


def test_a_health_watcher_is_told_of_changes_and_does_not_hold_up_the_stop(serve: Serve, connect: Connect) -> None:
    running = serve(Recorder())
    watch = health_pb2_grpc.HealthStub(connect(running.address).channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=120
    )
    assert next(watch).status == SERVING
    running.server.set_serving(False)
    assert next(watch).status == NOT_SERVING
    running.server.stop(1_000)


@pytest.mark.parametrize("max_calls", [1, 256])
def test_refusals_and_health_answer_at_once_while_every_handler_waits(
    serve: Serve, connect: Connect, max_calls: int
) -> None:
    blocker = Blocker()
    running = serve(blocker, settings(max_calls=max_calls))
    client = connect(running.address)
    waiting = [client.future(TRACES, b"%d" % number) for number in range(max_calls)]
    wait_until(lambda: len(blocker.calls) == max_calls)
    assert health(client) == SERVING
    for _ in range(20):
        assert_refused_for_now(client, f"{max_calls} of {max_calls} calls in flight")
    assert not any(future.done() for future in waiting)
    blocker.released.set()
    assert [future.result() for future in waiting] == [b""] * max_calls


def test_a_call_that_is_cancelled_before_its_body_came_leaves_nothing_behind(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    running = serve(recorder)
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(60)
        yield b"too late"

    future = connect(running.address).stream(TRACES, messages())
    wait_until(lambda: running.server.calls_in_flight == 1)
    assert running.budget.level > 0
    future.cancel()
    wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))
    never.set()
    assert recorder.calls == []


def test_a_client_that_vanishes_in_the_middle_of_a_body_leaves_nothing_behind(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with Wire(running.port, forward=50_000) as wire:
        future = connect(wire.address).future(TRACES, bytes(10 * 2**20))
        wait_until(lambda: wire.forwarded == 50_000 and running.server.calls_in_flight == 1)
        wire.cut()
        wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))
        future.cancel()
    assert recorder.calls == []


def test_a_body_that_stalls_is_given_up_after_its_timeout(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    running = serve(recorder, body_timeout=0.1)
    with Wire(running.port, forward=50_000) as wire:
        error = connect(wire.address).refused(TRACES, bytes(10 * 2**20))
        assert error.code is grpc.StatusCode.CANCELLED
        wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))
    assert recorder.calls == []


def test_a_call_that_is_cancelled_while_it_waits_for_its_commit_is_finished_all_the_same(
    serve: Serve, connect: Connect
) -> None:
    blocker = Blocker()
    running = serve(blocker)
    future = connect(running.address).future(TRACES, b"body")
    wait_until(lambda: len(blocker.calls) == 1)
    future.cancel()
    assert running.server.calls_in_flight == 1
    blocker.released.set()
    wait_until(lambda: running.server.calls_in_flight == 0)


def test_a_stop_tells_health_refuses_new_calls_and_finishes_those_in_flight(serve: Serve, connect: Connect) -> None:
    blocker = Blocker()
    running = serve(blocker)
    client = connect(running.address)
    in_flight = client.future(TRACES, b"in flight")
    wait_until(lambda: len(blocker.calls) == 1)
    stopping = threading.Thread(target=running.server.stop, args=(60,))
    stopping.start()
    wait_until(lambda: health(client) == NOT_SERVING)
    running.server.set_serving(True)
    assert health(client) == NOT_SERVING
    wait_until(lambda: running.server._intake.gate._closed)
    assert_refused_for_now(client, "shutting down: 1 calls are being finished")
    assert stopping.is_alive()
    blocker.released.set()
    stopping.join()
    assert in_flight.result() == b""
    assert [body for _, body in blocker.calls] == [b"in flight"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", running.port)).close()


def test_a_stop_cancels_what_outlives_the_grace_period(serve: Serve, connect: Connect) -> None:
    blocker = Blocker()
    running = serve(blocker)
    future = connect(running.address).future(TRACES, b"slow")
    wait_until(lambda: len(blocker.calls) == 1)
    running.server.stop(0.05)
    assert refusal(future.exception()).code in {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    blocker.released.set()
    wait_until(lambda: running.server.calls_in_flight == 0)


def test_stopping_is_harmless_before_the_start_and_twice() -> None:
    make("127.0.0.1:0").stop(0)
    server = make("127.0.0.1:0")
    server.start()
    server.stop(0)
    server.stop(0)


def test_a_busy_port_fails_the_start_naming_the_endpoint_and_the_setting(serve: Serve) -> None:
    running = serve(Recorder())
    server = make(running.address)
    with pytest.raises(StartupError, match=rf"cannot listen on {running.address}: .*--grpc-endpoint \(OTEL_PG_"):
        server.start()
    server.stop(0)


def test_two_servers_share_a_port_only_when_both_say_so(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    first = serve(recorder, settings(reuse_port=True))
    stranger = make(first.address)
    with pytest.raises(StartupError, match="in use"):
        stranger.start()
    stranger.stop(0)
    second = serve(recorder, settings(first.address, reuse_port=True))
    assert second.port == first.port
    connect(first.address).export(TRACES, b"to either")
    assert len(recorder.calls) == 1


def test_a_stop_on_a_shared_port_serves_what_comes_on_open_connections_until_their_clients_have_gone(
    connect: Connect,
) -> None:
    recorder = Recorder()
    old = make("127.0.0.1:0", recorder, shared=True)
    address = opened(old)
    client = connect(address)
    client.export(TRACES, b"first")
    stopping = threading.Thread(target=old.stop, args=(60,))
    stopping.start()
    wait_until(lambda: not _takes_connections(address))
    client.export(TRACES, b"still taken")
    assert len(recorder.calls) == 2
    successor = Recorder()
    new = make(address, successor, shared=True)
    new.start()
    while not successor.calls:  # none of these is refused
        client.export(TRACES, b"to either")
    stopping.join(60)
    assert not stopping.is_alive()
    assert client.export(TRACES, b"last") == b""
    client.channel.close()
    new.stop(10)


def test_a_stop_on_a_shared_port_ends_in_time_though_a_client_has_not_gone(connect: Connect) -> None:
    blocker = Blocker()
    server = FrontDoor(blocker, ByteBudget(2**30), settings(reuse_port=True))
    client = connect(opened(server))
    in_flight = client.future(TRACES, b"in flight")
    wait_until(lambda: len(blocker.calls) == 1)
    stopping = threading.Thread(target=server.stop, args=(0.5,))
    stopping.start()
    wait_until(lambda: server._intake.gate._closed)
    stopping.join(60)
    assert not stopping.is_alive()
    assert in_flight.exception() is not None
    blocker.released.set()
    wait_until(lambda: server.calls_in_flight == 0)


def _takes_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the latter in the moment of the end
        return False
    return True


def test_ipv6_loopback_is_served(serve: Serve, connect: Connect) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    recorder = Recorder()
    running = serve(recorder, settings("[::1]:0"))
    assert connect(f"[::1]:{running.port}").export(TRACES, b"six") == b""
    assert len(recorder.calls) == 1


def test_a_malformed_endpoint_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="OTEL_PG_EXPORTER_GRPC_ENDPOINT"):
        make("4317")
