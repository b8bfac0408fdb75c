"""Salvage: a request that protobuf refuses as a whole, taken apart item by item.

protobuf parses all of a request or nothing, so that one span with a broken string would cost its neighbours. Here
the framing is walked by hand; every item, resource and scope is parsed alone, at the depth it has in the request;
invalid UTF-8 is repaired in those that have it; and what still does not parse is refused alone. The same walk cuts
single items out of a request, for `dead_letters`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from otel_pg_exporter.errors import UndecodableError
from otel_pg_exporter.model import Rejection, Signal
from otel_pg_exporter.transcode.protobuf_wire import (
    MalformedError,
    ResourceFrame,
    ScopeFrame,
    item_frame,
    repair_utf8,
    resource_frame,
    scope_frame,
    split,
)


class _Part(NamedTuple):
    """What salvage parses alone: its descriptor, the level it lies at, and how to put it where it lies."""

    descriptor: Descriptor
    level: int
    enclose: Callable[[bytes], bytes]


class _Schema(NamedTuple):
    """The messages of one signal."""

    request: type[Message]
    resource: _Part
    scope: _Part
    item: _Part


def _schema(request: type[Message], resource: Descriptor, scope: Descriptor, item: Descriptor) -> _Schema:
    return _Schema(
        request,
        _Part(resource, 1, resource_frame),
        _Part(scope, 2, lambda data: resource_frame(b"", scope_frame(data))),
        _Part(item, 3, lambda data: resource_frame(b"", scope_frame(b"", item_frame(data)))),
    )


_SCHEMAS = {
    Signal.TRACES: _schema(ExportTraceServiceRequest, ResourceSpans.DESCRIPTOR, ScopeSpans.DESCRIPTOR, Span.DESCRIPTOR),
    Signal.LOGS: _schema(ExportLogsServiceRequest, ResourceLogs.DESCRIPTOR, ScopeLogs.DESCRIPTOR, LogRecord.DESCRIPTOR),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What is left of a request."""

    body: bytes  # parses, and holds the good items alone
    items: tuple[int, ...]  # which item of the original request each item of `body` is
    repaired: frozenset[int]  # items of the original request that are UTF-8 only since their repair
    rejected: tuple[Rejection, ...]


def salvage(signal: Signal, body: bytes) -> Salvaged:
    """Repair what can be repaired, and refuse the items that can't be.

    Raises UndecodableError when the body can't be split into items.
    """
    return _Salvage(signal, body).run()


class OneItemRequests:
    """Cuts single items out of a request: same resource, scope and schema URLs, the item's own bytes.

    Keeps the body alive, and finds the items when it is called first: few requests ever need it.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._items: list[tuple[ResourceFrame, ScopeFrame, int, int]] | None = None

    def __call__(self, index: int) -> bytes:
        """Return a request that holds only the item of this index."""
        if self._items is None:
            self._items = [
                (resource, scope, start, end)
                for resource in _split(self._body)
                for scope in resource.scopes
                for start, end in scope.items
            ]
        resource, scope, start, end = self._items[index]
        return resource_frame(resource.rest, scope_frame(scope.rest, item_frame(self._body[start:end])))


class _Mended(NamedTuple):
    data: bytes
    repaired: bool
    fault: str | None  # why the part is refused


class _Salvage:
    """One run over one request."""

    def __init__(self, signal: Signal, body: bytes) -> None:
        self._schema = _SCHEMAS[signal]
        self._body = body
        self._seen = 0
        self._items: list[int] = []
        self._repaired: list[int] = []
        self._rejected: list[Rejection] = []

    def run(self) -> Salvaged:
        body = b"".join([self._resource(resource) for resource in _split(self._body)])
        return Salvaged(
            body=body,
            items=tuple(self._items),
            repaired=frozenset(self._repaired),
            rejected=tuple(self._rejected),
        )

    def _resource(self, frame: ResourceFrame) -> bytes:
        rest = self._mend(frame.rest, self._schema.resource)
        scopes = b"".join([self._scope(scope, rest) for scope in frame.scopes])
        return b"" if rest.fault else resource_frame(rest.data, scopes)

    def _scope(self, frame: ScopeFrame, resource: _Mended) -> bytes:
        rest = self._mend(frame.rest, self._schema.scope)
        if fault := resource.fault or rest.fault:
            part = "resource" if resource.fault else "scope"
            for _ in frame.items:
                self._reject(f"its {part} is not decodable: {fault}")
            return b""
        around = resource.repaired or rest.repaired
        items = [self._item(self._body[start:end], around) for start, end in frame.items]
        return scope_frame(rest.data, b"".join(items))

    def _item(self, data: bytes, repaired_around: bool) -> bytes:
        item = self._mend(data, self._schema.item)
        if item.fault:
            self._reject(f"not decodable: {item.fault}")
            return b""
        if item.repaired or repaired_around:
            self._repaired.append(self._seen)
        self._items.append(self._seen)
        self._seen += 1
        return item_frame(item.data)

    def _reject(self, reason: str) -> None:
        self._rejected.append(Rejection(item=self._seen, reason=reason))
        self._seen += 1

    def _mend(self, data: bytes, part: _Part) -> _Mended:
        """Parse one part alone; if that fails, repair its UTF-8 and try once more."""
        if self._parses(part.enclose(data)):
            return _Mended(data, repaired=False, fault=None)
        try:
            repaired = repair_utf8(data, part.descriptor, part.level)
        except MalformedError as error:
            return _Mended(data, repaired=False, fault=str(error))
        if self._parses(part.enclose(repaired)):
            return _Mended(repaired, repaired=True, fault=None)
        return _Mended(data, repaired=False, fault="protobuf refuses it")

    def _parses(self, request: bytes) -> bool:
        try:
            self._schema.request.FromString(request)
        except DecodeError:
            return False
        return True


def _split(body: bytes) -> list[ResourceFrame]:
    try:
        return split(body)
    except MalformedError as error:
        raise UndecodableError(f"the body of {len(body):,} bytes is not OTLP: {error}") from error
