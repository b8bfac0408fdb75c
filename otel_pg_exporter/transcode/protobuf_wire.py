"""protobuf's wire format, walked by hand: fields, the framing of an OTLP request, and invalid UTF-8.

https://protobuf.dev/programming-guides/encoding/. Every walk is bounded and linear in the bytes it walks.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from otel_pg_exporter.transcode.values import MAX_LEVEL

_VARINT, _FIXED64, _DELIMITED, _GROUP, _GROUP_END, _FIXED32 = range(6)
_MAX_TAG = 2**32 - 1
_MAX_VARINT_BYTES = 10

# Traces and logs have the same numbers: request.resource_*, resource_*.scope_*, scope_*.spans or .log_records.
_RESOURCES, _SCOPES, _ITEMS = 1, 2, 2


class MalformedError(ValueError):
    """The bytes are not protobuf's wire format."""


class Field(NamedTuple):
    """One field of a message; positions count from the beginning of the bytes that were walked."""

    number: int
    delimited: bool  # a string, bytes or message: only these have contents that are walked further
    start: int  # of the tag
    content: int  # of the value, behind the length of a delimited one
    end: int


class ScopeFrame(NamedTuple):
    """One ScopeSpans or ScopeLogs."""

    rest: bytes  # all its fields but the items
    items: list[tuple[int, int]]  # start and end in the body


class ResourceFrame(NamedTuple):
    """One ResourceSpans or ResourceLogs."""

    rest: bytes  # all its fields but the scopes
    scopes: list[ScopeFrame]


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of the message in `data[start:end]`."""
    position = start
    while position < end:
        tag, content = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if not number or tag > _MAX_TAG:
            raise MalformedError(f"byte {position:,} begins no field")
        if kind == _DELIMITED:
            length, content = _varint(data, content, end)
            after = content + length
        else:
            after = _skip(data, content, end, kind, number)
        if after > end:
            raise MalformedError(f"the field at byte {position:,} is cut off: it ends {after - end:,} bytes too late")
        yield Field(number, kind == _DELIMITED, position, content, after)
        position = after


def delimited(number: int, content: bytes) -> bytes:
    """Encode a string, bytes or message field."""
    return _encode_varint(number << 3 | _DELIMITED) + _encode_varint(len(content)) + content


def split(body: bytes) -> list[ResourceFrame]:
    """Find the items of an OTLP request. Raises MalformedError when its framing is broken."""
    resources = []
    for resource in fields(body, 0, len(body)):
        if not (resource.delimited and resource.number == _RESOURCES):
            continue
        others, scopes = _part(body, resource, _SCOPES)
        frames = []
        for scope in scopes:
            rest, items = _part(body, scope, _ITEMS)
            frames.append(ScopeFrame(rest, [(item.content, item.end) for item in items]))
        resources.append(ResourceFrame(others, frames))
    return resources


def resource_frame(rest: bytes, scopes: bytes = b"") -> bytes:
    """Encode one resource as a field of a request; `scopes` are encoded fields."""
    return delimited(_RESOURCES, rest + scopes)


def scope_frame(rest: bytes, items: bytes = b"") -> bytes:
    """Encode one scope as a field of a resource; `items` are encoded fields."""
    return delimited(_SCOPES, rest + items)


def item_frame(item: bytes) -> bytes:
    """Encode one item as a field of a scope."""
    return delimited(_ITEMS, item)


def repair_utf8(data: bytes, descriptor: Descriptor, level: int) -> bytes:
    """Return a message with U+FFFD for what is not UTF-8 in its strings: `data` itself when there is none.

    `level` is how deep the message lies in its request. Raises MalformedError, also when it nests too deep.
    """
    return _Utf8Repair(data).message(0, len(data), descriptor, level) or data


class _Utf8Repair:
    """Walks one message; submessages are walked in place, so that depth costs no copies unless there is a repair."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def message(self, start: int, end: int, descriptor: Descriptor, level: int) -> bytes | None:
        """Return the repaired message; None when nothing had to be repaired."""
        if level > MAX_LEVEL:
            raise MalformedError(f"messages nest deeper than {MAX_LEVEL} levels")
        known = descriptor.fields_by_number
        pieces: list[bytes] = []
        copied = start
        for field in fields(self._data, start, end):
            schema = known.get(field.number)
            if schema is None or not field.delimited:
                continue
            repaired = self._content(field, schema, level)
            if repaired is not None:
                pieces += (self._data[copied : field.start], delimited(field.number, repaired))
                copied = field.end
        if not pieces:
            return None
        return b"".join((*pieces, self._data[copied:end]))

    def _content(self, field: Field, schema: FieldDescriptor, level: int) -> bytes | None:
        if schema.message_type is not None:
            return self.message(field.content, field.end, schema.message_type, level + 1)
        if schema.type != FieldDescriptor.TYPE_STRING:
            return None
        content = self._data[field.content : field.end]
        try:
            content.decode()
        except UnicodeDecodeError:
            return content.decode(errors="replace").encode()
        return None


def _part(body: bytes, parent: Field, number: int) -> tuple[bytes, list[Field]]:
    """Part a message's fields: the children with this number, and all others as they stand."""
    others: list[bytes] = []
    children: list[Field] = []
    for field in fields(body, parent.content, parent.end):
        if field.delimited and field.number == number:
            children.append(field)
        else:
            others.append(body[field.start : field.end])
    return b"".join(others), children


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return the number at `position`, and where it ends."""
    if position < end and data[position] < 0x80:  # noqa: PLR2004 - the continuation bit
        return data[position], position + 1
    value = 0
    for count, byte in enumerate(data[position : min(end, position + _MAX_VARINT_BYTES)]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:  # noqa: PLR2004 - the continuation bit
            return value, position + count + 1
    raise MalformedError(f"the number at byte {position:,} has no end")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _skip(data: bytes, position: int, end: int, kind: int, number: int) -> int:
    """Return where the value of a field that is not delimited ends."""
    if kind == _GROUP:
        return _skip_group(data, position, end, number)
    skip = _SKIP.get(kind)
    if skip is None:
        raise MalformedError(f"byte {position:,} has wire type {kind}, which does not exist here")
    return skip(data, position, end)


_SKIP: dict[int, Callable[[bytes, int, int], int]] = {
    _VARINT: lambda data, position, end: _varint(data, position, end)[1],
    _FIXED64: lambda _data, position, _end: position + 8,
    _FIXED32: lambda _data, position, _end: position + 4,
}


def _skip_group(data: bytes, position: int, end: int, number: int) -> int:
    """Skip a group, a wire type of old that protobuf still tolerates in fields it doesn't know."""
    open_groups = [number]
    while open_groups:
        if len(open_groups) > MAX_LEVEL:
            raise MalformedError(f"groups nest deeper than {MAX_LEVEL} levels")
        tag, content = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == _GROUP:
            open_groups.append(number)
            position = content
        elif kind == _GROUP_END:
            if open_groups.pop() != number:
                raise MalformedError(f"byte {position:,} ends a group that is not open")
            position = content
        elif kind == _DELIMITED:
            length, content = _varint(data, content, end)
            position = content + length
        else:
            position = _skip(data, content, end, kind, number)
        if position > end:
            raise MalformedError("a group is cut off")
    return position
