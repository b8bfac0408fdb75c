"""Salvage: what protobuf refuses as a whole is parsed part by part, so that one broken span costs no other.

A part is a resource, a scope or an item. It is parsed alone, at the depth it has in the request; invalid UTF-8 is
repaired in one that has it; and what still does not parse, or would cost too much, is refused alone.
"""

from typing import NamedTuple

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from otel_pg_exporter.model import Signal
from otel_pg_exporter.transcode.framing import ITEM_PATH, RESOURCE_PATH, SCOPE_PATH
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.protobuf_wire import MalformedError, nested, repair_utf8, weigh


class Part(NamedTuple):
    """A kind of message that is parsed alone: where it lies in which request."""

    request: type[Message]
    path: tuple[int, ...]  # the fields' numbers, from the request
    descriptor: Descriptor


class Parts(NamedTuple):
    """The parts of one signal's request."""

    resource: Part  # with all its fields but the scopes
    scope: Part  # with all its fields but the items
    item: Part


def _parts(request: type[Message], resource: Descriptor, scope: Descriptor, item: Descriptor) -> Parts:
    return Parts(
        Part(request, RESOURCE_PATH, resource), Part(request, SCOPE_PATH, scope), Part(request, ITEM_PATH, item)
    )


PARTS = {
    Signal.TRACES: _parts(ExportTraceServiceRequest, ResourceSpans.DESCRIPTOR, ScopeSpans.DESCRIPTOR, Span.DESCRIPTOR),
    Signal.LOGS: _parts(ExportLogsServiceRequest, ResourceLogs.DESCRIPTOR, ScopeLogs.DESCRIPTOR, LogRecord.DESCRIPTOR),
}


class Mended(NamedTuple):
    """What came of a part."""

    request: Message | None  # that holds nothing else; None when it is refused
    repaired: bool = False  # it is UTF-8 only now
    fault: str = ""  # why it is refused: what it is


def mend(part: Part, data: bytes, limits: Limits) -> Mended:
    """Parse a part alone; if that fails, repair its UTF-8 and try once more."""
    try:
        if (fault := _excess(part, data, limits)) is not None:
            return Mended(None, fault=f"too large: {fault}")
        request = _parse(part, data)
        if request is not None:
            return Mended(request)
        if len(data) > limits.repair_bytes:
            return Mended(
                None, fault=f"not decodable: protobuf refuses it; {len(data):,} bytes are too many for a repair"
            )
        request = _parse(part, repair_utf8(data, part.descriptor, len(part.path)))
    except MalformedError as error:
        return Mended(None, fault=f"not decodable: {error}")
    if request is None:
        return Mended(None, fault="not decodable: protobuf refuses it")
    return Mended(request, repaired=True)


def _excess(part: Part, data: bytes, limits: Limits) -> str | None:
    if part.path != ITEM_PATH and len(data) > limits.shared_bytes:
        return f"{len(data):,} bytes; at most {limits.shared_bytes:,} are allowed"
    if len(data) <= 2 * limits.fields:  # a field takes two bytes at least
        return None
    return weigh(data, part.descriptor, fields_limit=limits.fields, text_limit=limits.text_bytes)


def _parse(part: Part, data: bytes) -> Message | None:
    try:
        return part.request.FromString(nested(part.path, data))
    except DecodeError:
        return None
