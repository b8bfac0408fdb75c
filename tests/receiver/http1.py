"""OTLP/HTTP as tests speak it: a client that keeps its connection, and bare bytes for what no client would send."""

import http.client
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from google.protobuf.json_format import Parse
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships its stubs without py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

PATHS = {name: f"/v1/{name}" for name in ("traces", "logs", "metrics")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a request was answered with."""

    status: int
    headers: Mapping[str, str]  # by lower-case name
    body: bytes

    @property
    def refusal(self) -> Any:  # noqa: ANN401 - google.rpc.Status has no types
        """The body of a refusal; fails unless it says when to come again exactly if one should."""
        assert self.status != 200, self
        if self.headers["content-type"] == JSON:
            status = Parse(self.body, Status())
        else:
            assert self.headers["content-type"] == PROTOBUF
            status = Status.FromString(self.body)
        if self.status == 503:
            info = RetryInfo()
            assert status.details[0].Unpack(info)
            assert info.retry_delay.seconds == int(self.headers["retry-after"]) == 1
        else:
            assert "retry-after" not in self.headers
            assert not status.details
        return status


class HttpClient:
    """Sends one request after the other on one connection, for as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=200)

    def post(
        self,
        path: str,
        body: bytes | Iterable[bytes],
        *,
        content_type: str = PROTOBUF,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a body, in chunks if it is no bytes."""
        return self.request("POST", path, body, {"content-type": content_type, **(headers or {})})

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        self._connection.request(method, path, body, dict(headers or {}))
        answer = self._connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(status=answer.status, headers=names, body=answer.read())

    @property
    def local_port(self) -> int:
        return int(self._connection.sock.getsockname()[1])

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RawConnection:
    """A connection that sends what it is told, whole or not."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=200)
        self._answers = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> Reply:
        """Read one answer."""
        status = int(self._answers.readline().split()[1])
        names = {name.lower(): value for name, value in http.client.parse_headers(self._answers).items()}
        return Reply(status=status, headers=names, body=self._answers.read(int(names["content-length"])))

    @property
    def reply_status(self) -> int:
        """Of the next answer, whoever gave it."""
        return int(self._answers.readline().split()[1])

    @property
    def over(self) -> bool:
        """Whether the server has closed it; waits for that, or for more bytes."""
        try:
            return self._answers.read(1) == b""
        except ConnectionResetError:
            return True

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        self._answers.close()
        self.socket.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def head(path: str, *lines: str) -> bytes:
    """Return the headers of a POST of protobuf."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: x", f"content-type: {PROTOBUF}", *lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
