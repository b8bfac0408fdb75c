"""What the receiver's tests share: what plays the pipeline, and a wire to listen on and to cut."""

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships its stubs without py.typed
from grpc_status import rpc_status

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.model import Hold, Outcome, Signal, unbounded
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.receiver.front_door import FrontDoor
from otel_pg_exporter.receiver.security import Security
from otel_pg_exporter.telemetry import Answered
from tests.receiver.http1 import HttpClient
from tests.support import wait_until

Export = Callable[[Signal, bytes, Hold], Outcome]

TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
LOGS = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


class Recorder:
    """An export function that keeps what it is given and answers with `outcome`."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.outcome = outcome or Outcome(stored=1)
        self.calls: list[tuple[Signal, bytes]] = []

    def __call__(self, signal: Signal, body: bytes, hold: Hold = unbounded) -> Outcome:
        self.calls.append((signal, body))
        return self.outcome


class Blocker(Recorder):
    """A recorder that answers only when `released` is set, as if PostgreSQL took its time."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def __call__(self, signal: Signal, body: bytes, hold: Hold = unbounded) -> Outcome:
        outcome = super().__call__(signal, body, hold)
        assert self.released.wait(60)
        return outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A front door that is open."""

    server: FrontDoor
    budget: ByteBudget

    @property
    def port(self) -> int:
        """The port of OTLP/gRPC."""
        assert self.server.endpoints.grpc is not None
        return self.server.endpoints.grpc.port

    @property
    def http_port(self) -> int:
        """The port of OTLP/HTTP."""
        assert self.server.endpoints.http is not None
        return self.server.endpoints.http.port

    @property
    def address(self) -> str:
        """Of OTLP/gRPC."""
        return f"127.0.0.1:{self.port}"


class Serve(Protocol):
    """Start a server on a free port, unless the settings say otherwise."""

    def __call__(
        self,
        export: Export,
        values: ReceiverSettings | None = ...,
        *,
        budget: int = ...,
        body_timeout: float = ...,
        security: Security | None = ...,
        answered: Answered = ...,
    ) -> Running: ...


def settings(
    endpoint: str = "127.0.0.1:0",
    *,
    max_calls: int = 256,
    max_request_bytes: int = 64 * 2**20,
    reuse_port: bool = False,
    http_endpoint: str = "127.0.0.1:0",
    cors_origins: tuple[str, ...] = (),
) -> ReceiverSettings:
    return ReceiverSettings(
        grpc_endpoint=endpoint,
        http_endpoint=http_endpoint,
        max_calls=max_calls,
        max_request_bytes=max_request_bytes,
        reuse_port=reuse_port,
        cors_origins=cors_origins,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a call heard in place of an OK."""

    code: grpc.StatusCode
    details: str
    initial: tuple[object, ...]
    trailers: Mapping[str, bytes]
    rich: Any  # google.rpc.Status, or None

    @property
    def retry_delay(self) -> float:
        """The seconds that both trailers agree on; there must be no other trailer."""
        assert set(self.trailers) == {"grpc-status-details-bin", "google.rpc.retryinfo-bin"}
        nested = RetryInfo()
        assert self.rich.details[0].Unpack(nested)
        assert RetryInfo.FromString(self.trailers["google.rpc.retryinfo-bin"]) == nested
        return float(nested.retry_delay.ToTimedelta().total_seconds())


def refusal(error: Any) -> Refusal:  # noqa: ANN401 - grpc's RpcError has no type for what it carries
    """Take an RpcError apart; fails if its rich status says something else than the plain one."""
    assert isinstance(error, grpc.RpcError)
    call: Any = error
    return Refusal(
        code=call.code(),
        details=call.details(),
        initial=tuple(call.initial_metadata() or ()),
        trailers=dict(call.trailing_metadata() or ()),
        rich=rpc_status.from_call(call),
    )


class Client:
    """A raw client: bytes in, bytes out."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def export(
        self, method: str, body: bytes, *, compression: grpc.Compression | None = None, timeout: float = 200
    ) -> bytes:
        return bytes(self._unary(method)(body, compression=compression, timeout=timeout))

    def refused(self, method: str, body: bytes, *, compression: grpc.Compression | None = None) -> Refusal:
        with pytest.raises(grpc.RpcError) as info:
            self._unary(method)(body, compression=compression, timeout=200)
        return refusal(info.value)

    def with_call(self, method: str, body: bytes) -> tuple[bytes, Any]:
        answer, call = self._unary(method).with_call(body, timeout=200)
        return answer, call

    def future(self, method: str, body: bytes) -> Any:  # noqa: ANN401 - grpc's type of it is incomplete
        return self._unary(method).future(body, timeout=200)

    def stream(self, method: str, bodies: Iterator[bytes]) -> Any:  # noqa: ANN401 - as above
        return self.channel.stream_unary(method, None, None).future(bodies, timeout=200)

    def _unary(self, method: str) -> "grpc.UnaryUnaryMultiCallable[bytes, bytes]":
        return self.channel.unary_unary(method, None, None)


def persist(client: Client, body: bytes) -> None:
    """Export until it is taken, as SDKs do while they are asked to come again.

    CANCELLED is gRPC's own answer while more than a thousand calls wait for a thread; OTLP counts it among those.
    """

    def taken() -> bool:
        try:
            client.export(TRACES, body)
        except grpc.RpcError as exc:
            heard = refusal(exc)
            return heard.code is not grpc.StatusCode.CANCELLED and heard.retry_delay != 1
        return True

    wait_until(taken)


Connect = Callable[[str], Client]

ConnectHttp = Callable[[Running], HttpClient]

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Callable[[], T]:
    """Call a function in a thread; return one that waits for its result."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return functools.partial(future.result, 200)


class Wire:
    """A TCP proxy for one connection: keeps what the server says, and lets `forward` bytes of the client's through."""

    def __init__(self, port: int, *, forward: int | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = socket.create_connection(("127.0.0.1", port))
        self._client: socket.socket | None = None
        self._forward = forward
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.forwarded = 0
        self.answered = b""
        self._threads = [threading.Thread(target=self._upstream)]
        self._threads[0].start()

    def _upstream(self) -> None:
        self._client, _ = self._listener.accept()
        downstream = threading.Thread(target=self._downstream)
        self._threads.append(downstream)
        downstream.start()
        with contextlib.suppress(OSError):  # the wire was cut
            while data := self._client.recv(65_536):
                allowed = data if self._forward is None else data[: self._forward - self.forwarded]
                self._server.sendall(allowed)
                self.forwarded += len(allowed)

    def _downstream(self) -> None:
        assert self._client is not None
        with contextlib.suppress(OSError):  # the wire was cut
            while data := self._server.recv(65_536):
                self.answered += data
                self._client.sendall(data)

    def cut(self) -> None:
        """Close the connection on the server's side alone: to the server, its client is gone."""
        self._server.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for end in (self._client, self._server):
            if end is not None:
                with contextlib.suppress(OSError):  # the peer may have closed it
                    end.shutdown(socket.SHUT_RDWR)  # wakes up the thread that reads from it
        for thread in self._threads:
            thread.join()
        for end in (self._client, self._server):
            if end is not None:
                end.close()

    def frames(self) -> list[tuple[int, int, int]]:
        """Return (type, flags, stream) of each HTTP/2 frame that the server sent."""
        found, rest = [], self.answered
        while len(rest) >= 9:
            length = int.from_bytes(rest[:3], "big")
            found.append((rest[3], rest[4], int.from_bytes(rest[5:9], "big")))
            rest = rest[9 + length :]
        return found
