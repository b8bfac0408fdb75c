"""HTTP requests that wait, stall, break off or are strung together; starting and stopping."""

import logging
import threading
from contextlib import ExitStack

import pytest

from otel_pg_exporter.errors import ConfigurationError, StartupError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.receiver.front_door import FrontDoor
from tests.receiver.http1 import RawConnection, chunk, head
from tests.receiver.support import (
    TRACES as GRPC_TRACES,
)
from tests.receiver.support import (
    Blocker,
    Connect,
    ConnectHttp,
    Recorder,
    Running,
    Serve,
    in_background,
    settings,
)
from tests.support import wait_until

TRACES = "/v1/traces"


def idle(running: Running) -> bool:
    return (running.server.calls_in_flight, running.budget.level) == (0, 0)


def test_refusals_answer_at_once_while_every_place_is_taken_by_either_protocol(
    serve: Serve, connect: Connect, connect_http: ConnectHttp
) -> None:
    blocker = Blocker()
    running = serve(blocker, settings(max_calls=8))
    by_grpc = connect(running.address)
    waiting = [by_grpc.future(GRPC_TRACES, b"%d" % number) for number in range(4)]
    posted = [in_background(lambda: connect_http(running).post(TRACES, b"x").status) for _ in range(4)]
    wait_until(lambda: len(blocker.calls) == 8)
    client = connect_http(running)
    for _ in range(20):
        reply = client.post(TRACES, b"one more")
        assert (reply.status, reply.refusal.message) == (503, "call limit is reached: 8 of 8 calls in flight")
    assert "8 of 8 calls in flight" in by_grpc.refused(GRPC_TRACES, b"one more").details
    blocker.released.set()
    assert [future.result() for future in waiting] == [b""] * 4
    assert [status() for status in posted] == [200] * 4


@pytest.mark.parametrize("framing", ["content-length: 100000", "transfer-encoding: chunked"])
def test_a_client_that_vanishes_in_the_middle_of_a_body_leaves_nothing_behind(
    serve: Serve, caplog: pytest.LogCaptureFixture, framing: str
) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with caplog.at_level(logging.WARNING), RawConnection(running.http_port) as client:
        client.send(head(TRACES, framing) + chunk(b"x" * 50_000))
        wait_until(lambda: running.server.calls_in_flight == 1)
        assert running.budget.level > 0
        client.close()
        wait_until(lambda: idle(running))
    assert recorder.calls == []
    assert "has gone before its request was whole" in caplog.text


def test_a_client_that_vanishes_while_it_waits_for_its_commit_is_finished_with_all_the_same(serve: Serve) -> None:
    blocker = Blocker()
    running = serve(blocker)
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 4") + b"body")
        wait_until(lambda: len(blocker.calls) == 1)
    assert running.server.calls_in_flight == 1
    blocker.released.set()
    wait_until(lambda: idle(running))


@pytest.mark.parametrize("framing", ["content-length: 100000", "transfer-encoding: chunked"])
def test_a_body_that_stalls_is_given_up_after_its_timeout_and_may_be_sent_again(serve: Serve, framing: str) -> None:
    recorder = Recorder()
    running = serve(recorder, body_timeout=0.2)
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, framing) + chunk(b"x" * 1_000))
        reply = client.reply()
        assert reply.status == 503
        assert "it came too slowly" in reply.refusal.message
        wait_until(lambda: idle(running))
        if "chunked" in framing:  # the rest is let pass, and the connection is as good as new
            client.send(chunk(b"y" * 100_000) + chunk(b"") + head(TRACES, "content-length: 4") + b"next")
            assert client.reply().status == 200
    assert recorder.calls in ([], [(Signal.TRACES, b"next")])


def test_bodies_that_stall_on_many_connections_keep_nobody_else_waiting(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    recorder = Recorder()
    running = serve(recorder, body_timeout=2)
    with ExitStack() as connections:
        stalling = [connections.enter_context(RawConnection(running.http_port)) for _ in range(150)]
        for hostile in stalling:
            hostile.send(head(TRACES, "content-length: 60000000") + b"x")
        neighbour = connect_http(running)
        wait_until(lambda: neighbour.post(TRACES, b"small").status == 200)
        wait_until(lambda: running.server.calls_in_flight == 0)
    assert set(recorder.calls) == {(Signal.TRACES, b"small")}


def test_pipelined_requests_are_answered_one_after_the_other(serve: Serve) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with RawConnection(running.http_port) as client:
        requests = [head(TRACES, "content-length: 3") + b"%03d" % number for number in range(50)]
        requests[7] = head(TRACES, "transfer-encoding: chunked") + chunk(b"00") + chunk(b"7") + chunk(b"")
        requests[9] = head("/nowhere", "content-length: 3") + b"009"
        client.send(b"".join(requests))
        statuses = [client.reply().status for _ in requests]
    assert statuses == [404 if number == 9 else 200 for number in range(50)]
    assert [body for _, body in recorder.calls] == [b"%03d" % number for number in range(50) if number != 9]


def test_a_client_that_asks_first_is_told_to_go_on_unless_it_is_refused(serve: Serve) -> None:
    recorder = Recorder()
    running = serve(recorder, settings(max_request_bytes=1_024))
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 2000", "expect: 100-continue"))
        assert client.reply().status == 413
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 4", "expect: 100-continue"))
        assert client.socket.recv(1_000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"body")
        assert client.reply().status == 200


def test_a_body_beside_an_offer_to_change_to_http_2_is_read(serve: Serve) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with RawConnection(running.http_port) as client:
        offer = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAAA")
        client.send(head(TRACES, "content-length: 4", *offer) + b"body")
        assert client.reply().status == 200
    assert recorder.calls == [(Signal.TRACES, b"body")]


def test_a_stop_refuses_new_requests_finishes_those_in_flight_and_closes_connections(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    blocker = Blocker()
    running = serve(blocker)
    in_flight = in_background(lambda: connect_http(running).post(TRACES, b"in flight"))
    wait_until(lambda: len(blocker.calls) == 1)
    stopping = threading.Thread(target=running.server.stop, args=(60,))
    stopping.start()
    wait_until(lambda: running.server._intake.gate._closed)
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 1") + b"x")
        reply = client.reply()
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert "shutting down: 1 calls are being finished" in reply.refusal.message
        assert client.over
    assert stopping.is_alive()
    blocker.released.set()
    stopping.join()
    reply = in_flight()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    with pytest.raises(ConnectionRefusedError):
        RawConnection(running.http_port)


def test_a_body_that_stalls_does_not_hold_a_stop_up_for_long(serve: Serve) -> None:
    running = serve(Recorder(), body_timeout=600)
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 4") + b"sta")
        wait_until(lambda: running.server.calls_in_flight == 1)
        stopping = threading.Thread(target=running.server.stop, args=(600,), daemon=True)
        stopping.start()
        assert client.reply().status == 503
        stopping.join(30)
        assert not stopping.is_alive()


def test_a_stop_cuts_what_outlives_the_grace_period(serve: Serve) -> None:
    blocker = Blocker()
    running = serve(blocker)
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 4") + b"slow")
        wait_until(lambda: len(blocker.calls) == 1)
        running.server.stop(0.05)
        assert client.over
    blocker.released.set()


def test_a_stop_on_a_shared_port_serves_on_open_connections_and_sends_their_clients_to_the_next_process() -> None:
    recorder = Recorder()
    old = FrontDoor(recorder, ByteBudget(2**30), settings(reuse_port=True), connection_age=30)
    old.start()
    assert old.endpoints.http is not None
    port = old.endpoints.http.port
    with RawConnection(port) as client:
        client.send(head(TRACES, "content-length: 5") + b"first")
        assert "connection" not in client.reply().headers
        stopping = threading.Thread(target=old.stop, args=(60,))
        stopping.start()
        wait_until(lambda: not _takes_connections(port))
        successor = Recorder()
        new = FrontDoor(
            successor, ByteBudget(2**30), settings(http_endpoint=f"127.0.0.1:{port}", reuse_port=True), connection_age=1
        )
        new.start()
        client.send(head(TRACES, "content-length: 6") + b"second")
        reply = client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
    with RawConnection(port) as client:
        client.send(head(TRACES, "content-length: 5") + b"third")
        assert client.reply().status == 200
    stopping.join(60)
    assert not stopping.is_alive()
    new.stop(10)
    assert [body for _, body in recorder.calls] == [b"first", b"second"]
    assert [body for _, body in successor.calls] == [b"third"]


def _takes_connections(port: int) -> bool:
    try:
        RawConnection(port).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the latter in the moment of the end
        return False
    return True


def test_either_protocol_can_be_left_out(connect: Connect) -> None:
    for grpc, http in (("none", "127.0.0.1:0"), ("127.0.0.1:0", "none")):
        server = FrontDoor(Recorder(), ByteBudget(2**20), settings(grpc, http_endpoint=http))
        server.start()
        server.set_serving(True)
        assert [server.endpoints.grpc is None, server.endpoints.http is None] == [grpc == "none", http == "none"]
        server.stop(10)


def test_one_of_both_protocols_must_be_served() -> None:
    with pytest.raises(ConfigurationError, match="both none"):
        FrontDoor(Recorder(), ByteBudget(2**20), settings("none", http_endpoint="none"))


def test_a_busy_or_malformed_http_endpoint_fails_the_start_naming_the_setting(serve: Serve) -> None:
    port = serve(Recorder()).http_port
    server = FrontDoor(Recorder(), ByteBudget(2**20), settings(http_endpoint=f"127.0.0.1:{port}"))
    with pytest.raises(StartupError, match=rf"cannot listen on 127.0.0.1:{port}: .*--http-endpoint \(OTEL_PG_"):
        server.start()
    with pytest.raises(ConfigurationError, match="OTEL_PG_EXPORTER_HTTP_ENDPOINT"):
        FrontDoor(Recorder(), ByteBudget(2**20), settings(http_endpoint="4318"))
