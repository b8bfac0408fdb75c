"""A client of OTLP/HTTP that tests use as they use gRPC's, so that one test serves both protocols."""

import functools
import gzip
import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships its stubs without py.typed
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_pg_exporter.cli.otlp_json import otlp_json
from otel_pg_exporter.receiver.status import ANSWERS
from tests.receiver.http1 import JSON, PROTOBUF, Reply
from tests.receiver.support import LOGS, TRACES, Client

_NAMES = {TRACES: "traces", LOGS: "logs"}
_RESPONSES: dict[str, type[Message]] = {"traces": ExportTraceServiceResponse, "logs": ExportLogsServiceResponse}
_STATUSES = {answer.grpc: answer.http for answer in ANSWERS.values()}


class Refused(grpc.RpcError):
    """A refusal by HTTP, which `refusal()` takes apart as it does one by gRPC."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self._status = reply.refusal
        (self._code,) = (each for each in grpc.StatusCode if each.value[0] == self._status.code)
        assert _STATUSES[self._code] == reply.status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return str(self._status.message)

    def initial_metadata(self) -> None: ...

    def trailing_metadata(self) -> Any:  # noqa: ANN401 - pairs, for which the stubs have a class
        if not self._status.details:
            return ()
        info = RetryInfo()
        self._status.details[0].Unpack(info)
        return (
            ("grpc-status-details-bin", self._status.SerializeToString()),
            ("google.rpc.retryinfo-bin", info.SerializeToString()),
        )


class HttpSender(Client):
    """Sends by HTTP, from any thread; protobuf, or the same as JSON."""

    def __init__(self, address: str, *, as_json: bool) -> None:
        self._http = httpx.Client(base_url=f"http://{address}", timeout=200)
        self._as_json = as_json

    def close(self) -> None:
        self._http.close()

    def _unary(self, method: str) -> Any:  # noqa: ANN401 - what of grpc's callable tests use
        return _Unary(functools.partial(self._post, _NAMES[method]))

    def _post(
        self, name: str, body: bytes, *, compression: grpc.Compression | None = None, timeout: float = 200
    ) -> bytes:
        headers = {"content-type": JSON if self._as_json else PROTOBUF}
        if self._as_json:
            body = json.dumps(otlp_json(name, body)).encode()
        if compression is not None:
            headers["content-encoding"] = "gzip"
            body = gzip.compress(body)
        answer = self._http.post(f"/v1/{name}", content=body, headers=headers, timeout=timeout)
        reply = Reply(status=answer.status_code, headers=answer.headers, body=answer.content)
        if reply.status != 200:
            raise Refused(reply)
        return Parse(reply.body, _RESPONSES[name]()).SerializeToString() if self._as_json else reply.body


class _Unary:
    def __init__(self, post: Any) -> None:  # noqa: ANN401 - a bound `_post`
        self._post = post

    def __call__(self, body: bytes, **options: Any) -> bytes:  # noqa: ANN401 - `_post`'s
        return bytes(self._post(body, **options))

    def future(self, body: bytes, **options: Any) -> "Future[bytes]":  # noqa: ANN401 - as above
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self, body, **options)
        pool.shutdown(wait=False)
        return future
