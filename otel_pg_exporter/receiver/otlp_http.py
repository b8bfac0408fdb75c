"""The OTLP/HTTP front door: /v1/traces, /v1/logs and /v1/metrics, in protobuf and JSON.

The event loop reads bodies and writes answers; whatever takes time, decompression included, is done in threads, of
which a call uses at most one at a time. So refusals, which need none, are answered at once however many calls wait.
"""

import asyncio
import contextlib
import functools
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPMethod
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import grpc
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.errors import ExporterError, OverloadedError, RetryableError, UnauthenticatedError
from otel_pg_exporter.model import Hold
from otel_pg_exporter.receiver.endpoint import Endpoint
from otel_pg_exporter.receiver.http_content import Content, MediaType, answer_type, content, decode, too_large, write
from otel_pg_exporter.receiver.http_server import HttpServer
from otel_pg_exporter.receiver.intake import Call, Intake, Take
from otel_pg_exporter.receiver.status import RETRY_AFTER, Answer, answer_to, status_message
from otel_pg_exporter.transcode.otlp_json import to_protobuf

P = ParamSpec("P")
T = TypeVar("T")

ENDPOINT_SETTING = "--http-endpoint (OTEL_PG_EXPORTER_HTTP_ENDPOINT)"

_MESSAGES: Mapping[str, tuple[type[Message], type[Message]]] = MappingProxyType(
    {
        "traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
        "logs": (ExportLogsServiceRequest, ExportLogsServiceResponse),
        "metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse),
    }
)

# What no error of ours stands for: the paths and methods that HTTP has beside OTLP's.
_ELSEWHERE = {
    404: Answer(grpc=grpc.StatusCode.NOT_FOUND, http=404),
    405: Answer(grpc=grpc.StatusCode.UNIMPLEMENTED, http=405),
}
_NOBODY_LISTENS = 499  # nginx's number for a client that has gone; it is told to nobody but our metrics
_PREFLIGHT_AGE = 7200  # seconds that a browser may remember what it is allowed; Chromium takes no more


class OtlpHttpServer:
    """Serves OTLP/HTTP: hands each request to the intake, and answers with what became of it."""

    def __init__(
        self,
        intake: Intake,
        endpoint: Endpoint,
        settings: ReceiverSettings,
        *,
        tls: ssl.SSLContext | None,
        challenge: str,
    ) -> None:
        self._intake = intake
        self._routes = {f"/v1/{name}": name for name in intake.takes}
        self._challenge = challenge
        # As many as calls are let in, so that none ever waits for a thread.
        self._threads = ThreadPoolExecutor(settings.max_calls, thread_name_prefix="otlp-http")
        self._server = HttpServer(
            self._app(settings.cors_origins),
            endpoint,
            setting=ENDPOINT_SETTING,
            reuse_port=settings.reuse_port,
            tls=tls,
        )

    def start(self) -> int:
        """Listen and serve; return the port. Raises StartupError when the endpoint cannot be had."""
        return self._server.start()

    @property
    def alive(self) -> bool:
        """Whether its event loop runs."""
        return self._server.alive

    def part(self) -> None:
        """Let clients go after one more answer each, and leave a shared port to the other processes; go on to serve."""
        self._server.part()

    def stop(self, grace: float) -> None:
        """Stop: let answers leave within `grace` seconds, cut the rest; may be repeated."""
        self._server.stop(grace)
        # Exports that outlive the grace period end with their own timeout; nobody waits for them here.
        self._threads.shutdown(wait=grace > 0)

    def _app(self, origins: tuple[str, ...]) -> Starlette:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["POST"],
            allow_headers=["*"],
            # Browsers' `sendBeacon`, which SDKs use as a page goes away, insists; but "all" may mean no user's secrets.
            allow_credentials="*" not in origins,
            expose_headers=["Retry-After"],
            max_age=_PREFLIGHT_AGE,
        )
        app = Starlette(
            routes=[
                Route(route, functools.partial(self._export, name), methods=["POST"])
                for route, name in self._routes.items()
            ],
            middleware=[cors] if origins else [],
            exception_handlers={HTTPException: self._elsewhere},
        )
        app.router.redirect_slashes = False
        return app

    async def _export(self, name: str, request: Request) -> Response:
        """Serve one request, and tell how it was answered, whether its body was read or not."""
        began = time.perf_counter()
        answer = await self._answered(name, request)
        self._intake.answered(f"POST /v1/{name}", str(answer.status_code), time.perf_counter() - began)
        return answer

    def _elsewhere(self, request: Request, error: Exception) -> Response:
        """Answer what is for no path or method of OTLP's."""
        began = time.perf_counter()
        assert isinstance(error, HTTPException)
        media_type, answer = answer_type(request.headers), _ELSEWHERE[error.status_code]
        message = f"{request.method} {request.url.path}: there are POST /v1/traces, /v1/logs and /v1/metrics"
        refusal = _answer(media_type, answer.http, write(media_type, status_message(answer, message)))
        refusal.headers.update(error.headers or {})
        # What clients make up must not become label values.
        method = request.method if request.method in HTTPMethod.__members__ else "_OTHER"
        route = path if (path := request.scope["path"]) in self._routes else ""
        self._intake.answered(f"{method} {route}", str(answer.http), time.perf_counter() - began)
        return refusal

    async def _answered(self, name: str, request: Request) -> Response:
        sender = (
            "unknown" if request.client is None else str(Endpoint(host=request.client.host, port=request.client.port))
        )
        media_type = answer_type(request.headers)
        # The answer is made inside the `except` block, and no exception is kept, as in `GrpcServer`.
        try:
            return _answer(media_type, 200, await self._admit(name, sender, request))
        except ClientDisconnect:
            self._intake.note_loss(sender)
            return Response(status_code=_NOBODY_LISTENS)
        except Exception as exc:  # noqa: BLE001 - a request must be answered whatever happens; `judge` logs
            return self._refusal(media_type, self._intake.judge(exc, sender))

    async def _admit(self, name: str, sender: str, request: Request) -> bytes:
        if self._intake.authenticate is not None:
            self._intake.authenticate(request.headers.getlist("authorization"))
        largest = self._intake.largest
        body = content(request.headers, largest=largest)
        with self._intake.admit(sender) as call:
            announced = body.length if body.encoding == "identity" else None
            try:
                call.reserve(announced, timeout=0)
            except OverloadedError:
                await self._in_thread(call.reserve, announced)
            pieces = await self._read(call, request)
            return await self._in_thread(_take, call, functools.partial(self._decoded, name, body), pieces)

    async def _read(self, call: Call, request: Request) -> list[bytes]:
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(None) as deadline:
                with call.reading(_Reading(deadline)):
                    async for piece in request.stream():
                        size += len(piece)
                        if size > self._intake.largest:
                            raise too_large(f"more than {self._intake.largest:,}", self._intake.largest)
                        call.received(size)
                        pieces.append(piece)
        except TimeoutError:
            raise RetryableError(
                f"the body was given up after {size:,} bytes: it came too slowly, or memory is short"
            ) from None
        return pieces

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        whole = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, whole)

    def _decoded(self, name: str, content: Content, body: bytes, hold: Hold) -> bytes:
        """Be a `Take` for a body as it came."""
        largest, take = self._intake.largest, self._intake.takes[name]
        message = decode(content.encoding, body, hold, largest=largest)
        if content.media_type is MediaType.PROTOBUF:
            return take(message, hold)
        request, response = _MESSAGES[name]
        message = to_protobuf(request, message, hold)
        if len(message) > largest:
            raise too_large(f"{len(message):,}, as protobuf,", largest)
        return write(content.media_type, response.FromString(take(message, hold)))

    def _refusal(self, media_type: MediaType, error: ExporterError) -> Response:
        answer = answer_to(error)
        refusal = _answer(media_type, answer.http, write(media_type, status_message(answer, str(error))))
        if answer.retry:
            refusal.headers["Retry-After"] = str(RETRY_AFTER)
        if isinstance(error, UnauthenticatedError) and self._challenge:
            refusal.headers["WWW-Authenticate"] = self._challenge
        return refusal


class _Reading:
    """A body that is being read on an event loop, as another thread cancels it."""

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._expire)

    def _expire(self) -> None:
        with contextlib.suppress(RuntimeError):  # the body is there by now
            self._deadline.reschedule(0)


def _take(call: Call, take: Take, pieces: list[bytes]) -> bytes:
    body = b"".join(pieces)
    pieces.clear()
    return call.take(take, body)


def _answer(media_type: MediaType, status: int, body: bytes) -> Response:
    return Response(body, status, media_type=media_type.value)
