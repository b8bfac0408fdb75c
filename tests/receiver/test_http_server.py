import asyncio
import contextlib
import http.client
import logging
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import trustme
from starlette.types import ASGIApp, Receive, Scope, Send

from otel_pg_exporter.errors import StartupError
from otel_pg_exporter.receiver.endpoint import Endpoint
from otel_pg_exporter.receiver.http_server import HttpServer
from tests.support import wait_until

SETTING = "--http-endpoint"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, whatever the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


class Gated:
    """An app that answers once it is released."""

    def __init__(self) -> None:
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        await self._released.wait()
        await hello(scope, receive, send)

    @property
    def waiting(self) -> bool:
        return self._loop is not None

    def release(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._released.set)


Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def run(app: ASGIApp = hello, *, host: str = "127.0.0.1", idle_timeout: float = 60, **more: object) -> int:
            endpoint = Endpoint(host=host, port=0)
            server = HttpServer(app, endpoint, setting=SETTING, idle_timeout=idle_timeout, **more)  # type: ignore[arg-type] # a test's shortcut
            stack.callback(server.stop, 10)
            return server.start()

        yield run


def heard(port: int, *parts: bytes) -> bytes:
    """Send, and return what comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65_536):
                answer += data
    return answer


def test_it_serves_on_every_address_of_a_name_with_the_same_port(start: Start) -> None:
    port = start(host="localhost")
    for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        connection = http.client.HTTPConnection(str(address[0]), port, timeout=120)
        connection.request("POST", "/", b"x" * 100_000)
        assert connection.getresponse().read() == b"hello"
        connection.close()


def test_a_busy_port_is_a_startup_error_and_a_shared_one_is_none(start: Start) -> None:
    port = start(reuse_port=True)
    with pytest.raises(StartupError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use.*{SETTING}"):
        HttpServer(hello, Endpoint(host="127.0.0.1", port=port), setting=SETTING).start()
    other = HttpServer(hello, Endpoint(host="127.0.0.1", port=port), setting=SETTING, reuse_port=True)
    assert other.start() == port
    other.stop(10)


def test_a_connection_that_brings_no_whole_headers_in_time_is_closed(start: Start) -> None:
    port = start(idle_timeout=1)
    assert heard(port) == b""
    assert heard(port, b"GET / HTTP/1.1\r\nhost") == b""
    assert heard(port, GET, b"GET").endswith(b"hello")


def test_a_body_that_goes_on_and_on_after_the_answer_is_cut_off(start: Start) -> None:
    port = start(idle_timeout=0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000000\r\n\r\n")
        wait_until(lambda: refused(connection))


def test_headers_of_any_kind_that_never_end_are_cut_off(start: Start) -> None:
    port = start()
    for beginning in (b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n", b"GE"):
        line = b"n: v\r\n" if beginning.endswith(b"\r\n") else b"x" * 6
        with contextlib.suppress(ConnectionError):  # it may be closed while we still send
            answer = heard(port, beginning, *([line * 1_000] * 100))
            assert answer[:12] in {b"", b"HTTP/1.1 431", b"HTTP/1.1 400"}


def test_headers_are_measured_however_they_come(start: Start) -> None:
    port = start()
    last = b"connection: close\r\n\r\n"
    for most in (b"x: " + b"v" * 60_000 + b"\r\n", b"name: v\r\n" * 7_000):
        assert heard(port, GET[:-2] + most + last).startswith(b"HTTP/1.1 200")
        assert heard(port, GET[:-2] + most * 2 + last).startswith(b"HTTP/1.1 431")


def test_pipelined_requests_are_answered_in_their_order_and_the_connection_lives_on(start: Start) -> None:
    port = start()
    answer = heard(port, GET * 100 + GET.replace(b"host: x", b"connection: close"))
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"hello") == 101


def test_requests_strung_together_without_end_are_cut_off(start: Start) -> None:
    assert heard(start(), b"GET / HTTP/1.1\r\n\r\n" * 10_000).count(b"hello") < 200


def test_nonsense_after_a_request_is_not_answered_in_its_place(start: Start) -> None:
    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    for nonsense in (b"\0", b"GET / HTTP/1.1\r\nx: " + b"x" * 1_000_000):
        assert heard(start(patient), GET, nonsense) == b""


def test_who_does_not_read_answers_is_cut_off(start: Start) -> None:
    async def talkative(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})

    with socket.create_connection(("127.0.0.1", start(talkative, idle_timeout=0.3)), timeout=120) as connection:
        connection.sendall(GET)
        wait_until(lambda: refused(connection))


def test_a_lack_of_descriptors_is_logged_once_and_connections_are_taken_when_it_is_over(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    port = start()
    assert heard(port, GET.replace(b"host: x", b"connection: close")).endswith(b"hello")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as connection:
        connection.settimeout(120)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            connection.connect(("127.0.0.1", port))
            wait_until(lambda: bool(caplog.records))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        connection.sendall(GET.replace(b"host: x", b"connection: close"))
        assert b"".join(iter(lambda: connection.recv(65_536), b"")).endswith(b"hello")
    (record,) = caplog.records
    assert record.message == "HTTP connections have to wait: Too many open files (`ulimit -n`)"


def refused(connection: socket.socket) -> bool:
    """Send something; tell whether the connection is closed on the other side."""
    try:
        connection.sendall(b"x" * 10_000)
    except ConnectionError:
        return True
    return False


def test_nonsense_is_answered_with_400_and_logged_nowhere(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    port = start()
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    ):
        assert heard(port, nonsense).startswith(b"HTTP/1.1 400")
    assert [each.message for each in caplog.records if each.levelno > logging.DEBUG] == []


def test_a_stop_closes_idle_connections_finishes_what_is_in_flight_and_then_refuses_connections() -> None:
    app = Gated()
    server = HttpServer(app, Endpoint(host="127.0.0.1", port=0), setting=SETTING)
    port = server.start()
    with (
        socket.create_connection(("127.0.0.1", port), timeout=120) as idle,
        socket.create_connection(("127.0.0.1", port), timeout=120) as busy,
    ):
        busy.sendall(GET)
        wait_until(lambda: app.waiting)
        stopping = threading.Thread(target=server.stop, args=[30])
        stopping.start()
        assert idle.recv(1) == b""
        app.release()
        answer = b"".join(iter(lambda: busy.recv(65_536), b""))
        assert answer.endswith(b"hello")
        assert b"connection: close" in answer
        stopping.join()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    server.stop(0)  # once more does no harm


def test_a_stop_cuts_what_does_not_end_within_its_grace(caplog: pytest.LogCaptureFixture) -> None:
    app = Gated()
    server = HttpServer(app, Endpoint(host="127.0.0.1", port=0), setting=SETTING)
    port = server.start()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as busy:
        busy.sendall(GET)
        wait_until(lambda: app.waiting)
        server.stop(0.1)
        with contextlib.suppress(ConnectionResetError):
            assert b"hello" not in busy.recv(65_536)
    assert not caplog.records


def test_a_stop_does_not_wait_for_a_handshake_that_stalls() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = HttpServer(hello, Endpoint(host="127.0.0.1", port=0), setting=SETTING, tls=context)
    with socket.create_connection(("127.0.0.1", server.start()), timeout=120) as stalling:
        stalling.sendall(b"\x16\x03\x01")
        stopping = threading.Thread(target=server.stop, args=[0.1], daemon=True)
        stopping.start()
        stopping.join(30)
        assert not stopping.is_alive()


def test_once_parting_every_connection_gets_one_more_answer() -> None:
    server = HttpServer(hello, Endpoint(host="127.0.0.1", port=0), setting=SETTING)
    port = server.start()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(GET)
        answer = b""
        while not answer.endswith(b"hello"):
            answer += connection.recv(65_536)
        assert b"connection: close" not in answer
        server.part()
        connection.sendall(GET)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert b"connection: close" in answer
    server.stop(10)


def test_with_tls_it_speaks_https(start: Start) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    connection = http.client.HTTPSConnection("127.0.0.1", start(tls=context), context=trusting, timeout=120)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b"hello"
    connection.close()
