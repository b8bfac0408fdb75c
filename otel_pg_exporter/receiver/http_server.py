"""An HTTP/1.1 server in a thread of its own: uvicorn, with the bounds that it lacks, on sockets that we open.

uvicorn leaves signals alone outside the main thread, so `serve` goes on to own them.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import socket
import ssl
import sys
import threading
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from otel_pg_exporter.receiver.endpoint import Endpoint, listen
from otel_pg_exporter.receiver.handshake import Listener
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__name__)

# Seconds that a connection may take to bring the next request's headers, however it uses them: to be idle, to send
# header by header, or to go on with a body that was refused; and to read an answer. SDKs come back after 5 (spans,
# logs) and 60 (metrics).
_IDLE_TIMEOUT = 75.0

# Requests that may follow one that is not answered yet. Each takes some 3 KB, were it 18 bytes long; no SDK sends any.
_MOST_PIPELINED = 100

_LAST_WAIT = 5.0  # seconds for the loop to end once all is cut

_LOOK_INTERVAL = 0.1  # seconds between two looks at whether a stop has come to its end, as uvicorn's

# Bytes that may come in a row and be neither a whole header block nor a piece of body; uvicorn reads on for ever.
_LARGEST_HEAD = 2**16

_TOO_LARGE_A_HEAD = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HttpServer:
    """Serves an ASGI app on an endpoint, by an event loop in one thread, which `stop` joins.

    The app must not block: everything that takes time belongs into other threads. With `tls` it speaks HTTPS; that
    context may load another certificate at any time, which counts for connections from then on.
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoint: Endpoint,
        *,
        setting: str,
        reuse_port: bool = False,
        tls: ssl.SSLContext | None = None,
        idle_timeout: float = _IDLE_TIMEOUT,
    ) -> None:
        """Prepare to serve; `setting` is how a StartupError names the endpoint to the user."""
        self._endpoint = endpoint
        self._setting = setting
        self._reuse_port = reuse_port
        self._server = _Server(_config(app, tls), _State(idle_timeout, leaves_port=reuse_port))
        self._thread = threading.Thread(target=self._run, name="http-server", daemon=True)
        self._listeners: list[socket.socket] = []

    def start(self) -> int:
        """Listen and serve; return the port, which the system chose if the endpoint's is 0.

        Raises StartupError when the endpoint cannot be had.
        """
        bound = listen(self._endpoint, setting=self._setting, reuse_port=self._reuse_port)
        self._listeners = [Listener(fileno=each.detach()) for each in bound]
        port: int = self._listeners[0].getsockname()[1]
        self._thread.start()  # who connects before it is ready waits in the backlog
        return port

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def part(self) -> None:
        """Let the next answer on each connection be its last, by `Connection: close`; go on to serve.

        A shared port is left to the other processes.
        """
        self._server.part()

    def stop(self, grace: float) -> None:
        """Stop: take no connection, close idle ones, finish what is in flight within `grace` seconds, cut the rest.

        May be repeated, and called without `start()`.
        """
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(grace)
            self._server.force_exit = True
            self._thread.join(_LAST_WAIT)  # a bug in there must not hold up the spool and PostgreSQL, which stop next

    def _run(self) -> None:
        self._server.run(sockets=self._listeners)


class _State(ServerState):
    """What the connections of a server share."""

    def __init__(self, idle_timeout: float, *, leaves_port: bool) -> None:
        super().__init__()
        self.idle_timeout = idle_timeout
        self.leaves_port = leaves_port  # once parting
        self.parting = False  # set by another thread; each connection asks when headers have come

    @property
    def open(self) -> list["_Connection"]:
        """The connections that there are."""
        return [each for each in self.connections if isinstance(each, _Connection)]


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, state: _State) -> None:
        super().__init__(config)
        self.server_state: _State = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notices = RateLimitedLogger(_logger)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._log)
        await super().startup(sockets)

    def part(self) -> None:
        """Do what `HttpServer.part` says; for any thread."""
        self.server_state.parting = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                # Elsewhere than in its thread, it would cut off who was told to stay.
                self._loop.call_soon_threadsafe(self._part)

    def _part(self) -> None:
        for listener in self.servers if self.server_state.leaves_port else ():
            listener.close()
        for connection in self.server_state.open:
            connection.let_go()

    def _log(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what the loop complains of; a lack of descriptors, met 10,000 times a second, only now and then."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            self._notices.log(logging.ERROR, "accept", f"HTTP connections have to wait: {error.strerror} (`ulimit -n`)")
        else:
            loop.default_exception_handler(context)

    async def _wait_tasks_to_complete(self) -> None:
        """Wait until all is answered and closed, then cut what is not.

        uvicorn's own goes on to wait for the listeners. Since Python 3.12 these wait for every connection, also for one
        that is to be cut, or whose TLS handshake stalls.
        """
        state = self.server_state
        while (state.connections or state.tasks) and not self.force_exit:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(_LOOK_INTERVAL)
        for connection in state.open:
            connection.transport.abort()
        await asyncio.sleep(0)  # the loop, which ends now, tells them


class _Connection(HttpToolsProtocol):
    """A connection whose headers are bounded, in size, number and the time that they take, and its answers in time."""

    server_state: _State

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's business
        super().__init__(*args, **kwargs)
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._unparsed = 0
        self._data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's is narrower
        super().connection_made(transport)
        transport.set_write_buffer_limits(1)  # so that what is not taken at once pauses; 0 would always, with TLS
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cease_to_wait()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait only so long for the other side to read: a transport that is closed would wait for ever."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.server_state.idle_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._unparsed > _LARGEST_HEAD and not self.transport.is_closing():
            self._refuse_head()

    def _refuse_head(self) -> None:
        if not self._owes_answers:
            self.transport.write(_TOO_LARGE_A_HEAD)
        self.transport.close()

    @property
    def _owes_answers(self) -> bool:
        """Whether requests before the one that comes now wait for theirs, for which any other would be taken."""
        return bool(self.pipeline) or not (self.cycle is None or self.cycle.response_complete or self.cycle.more_body)

    def send_400_response(self, msg: str) -> None:
        if self._owes_answers or self.transport.is_closing():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _should_upgrade(self) -> bool:
        return True  # so that uvicorn leaves the request to the next method

    def handle_websocket_upgrade(self) -> None:
        """Read a request that offers another protocol (Java's client: HTTP/2) as if it did not.

        After such an offer httptools takes the request for one without a body.
        """
        offer, method = sys.exc_info()[1], self.parser.get_method()
        if not isinstance(offer, httptools.HttpParserUpgrade) or method == b"CONNECT":
            self.send_400_response("This is no proxy.")
            return
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self.url, b"".join(kept))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.data_received(head + self._data[offer.args[0] :])

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._unparsed = 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _LARGEST_HEAD:
            self._refuse_head()
            raise httptools.HttpParserError("the headers are too large")  # for the parser, which is to stop
        self._cease_to_wait()
        super().on_headers_complete()
        self.headers = []  # for trailers, which uvicorn takes for headers: credentials among them
        if len(self.pipeline) > _MOST_PIPELINED:
            raise httptools.HttpParserError(f"more than {_MOST_PIPELINED} requests wait for their answers")
        if self.server_state.parting:
            self.let_go()

    def let_go(self) -> None:
        """Let the answer to the last request that came be the connection's last, if it can still be told so."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()

    def _await_headers(self) -> None:
        self._patience = self.loop.call_later(self.server_state.idle_timeout, self.timeout_keep_alive_handler)

    def _cease_to_wait(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


async def _serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    with contextlib.suppress(asyncio.CancelledError):  # by a stop: no fault, which uvicorn would log as one
        await app(scope, receive, send)


def _config(app: ASGIApp, tls: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        functools.partial(_serve, app),
        interface="asgi3",
        http=_Connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        timeout_keep_alive=int(_IDLE_TIMEOUT) + 1,  # ours, which also runs while data comes, is there first
        proxy_headers=False,  # they would replace the peer's address by whatever a sender says
        server_header=False,
        access_log=False,
        log_config=None,  # logging is set up by the process
        log_level="error",  # its warnings come by the request, from whoever sends nonsense
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
    )
