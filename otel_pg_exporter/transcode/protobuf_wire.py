"""protobuf's wire format, walked by hand: fields, what they will cost once decoded, and invalid UTF-8.

https://protobuf.dev/programming-guides/encoding/. Every walk is bounded and linear in the bytes it walks.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from otel_pg_exporter.transcode.values import MAX_LEVEL

VARINT, FIXED64, DELIMITED, _GROUP, _GROUP_END, FIXED32 = range(6)
_MAX_TAG = 2**32 - 1
_MAX_VARINT_BYTES = 10

_NOTE = b"\7note:"  # a tag of field 0 and wire type 7, neither of which exists
_REASON_BYTES = 200

_CONTROLS = bytes(range(0x20))
_ESCAPED = 5  # bytes more that JSON takes for a control character
_BEYOND_BMP = re.compile(b"[\xf0-\xff]")  # begins a character of four bytes


class MalformedError(ValueError):
    """The bytes are not protobuf's wire format."""


class Field(NamedTuple):
    """One field of a message; positions count from the beginning of the bytes that were walked."""

    number: int
    delimited: bool  # a string, bytes or message: only these have contents that are walked further
    start: int  # of the tag
    content: int  # of the value, behind the length of a delimited one
    end: int


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of the message in `data[start:end]`."""
    position = start
    while position < end:
        tag, content = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if not number or tag > _MAX_TAG:
            raise MalformedError(_reason_noted(data, position, end) or f"byte {position:,} begins no field")
        if kind == DELIMITED:
            length, content = _varint(data, content, end)
            after = content + length
        else:
            after = _skip(data, content, end, kind, number)
        if after > end:
            raise MalformedError(f"the field at byte {position:,} is cut off: it ends {after - end:,} bytes too late")
        yield Field(number, kind == DELIMITED, position, content, after)
        position = after


def delimited(number: int, content: bytes) -> bytes:
    """Encode a string, bytes or message field."""
    return nested((number,), content)


def note(reason: str, content: bytes) -> bytes:
    """Return what stands in place of a message that could not be made of `content`: no decoder takes it.

    `fields` gives the reason, which is cut to 200 bytes.
    """
    return b"".join((_NOTE, reason.encode(errors="replace")[:_REASON_BYTES].replace(b"\0", b""), b"\0", content))


def _reason_noted(data: bytes, position: int, end: int) -> str:
    if not data.startswith(_NOTE, position, end):
        return ""
    start = position + len(_NOTE)
    reason = data[start : min(end, start + _REASON_BYTES + 1)]
    return reason.partition(b"\0")[0].decode(errors="replace")


def opening(number: int, size: int) -> bytes:
    """Encode what comes before the content of a string, bytes or message field."""
    return encode_varint(number << 3 | DELIMITED) + encode_varint(size)


def nested(path: Sequence[int], content: bytes | memoryview) -> bytes:
    """Encode a message inside a message and so on: `path` has the fields' numbers, outermost first. Copies it once."""
    heads: list[bytes] = []
    size = len(content)
    for number in reversed(path):
        head = opening(number, size)
        heads.insert(0, head)
        size += len(head)
    return b"".join((*heads, content))


def run_of(data: bytes, position: int, end: int, number: int, size: int) -> tuple[int, int]:
    """Follow fields with this number (below 16) from `position`: at most `size` bytes, or one; say how far, how many.

    Four times as quick as `fields`, and none the less exact: it stops, if need be at once, before what is not
    delimited, not in its shortest spelling, or not whole.
    """
    tag = number << 3 | DELIMITED
    start, count = position, 0
    while position + 2 < end and data[position] == tag:
        length, content = data[position + 1], position + 2
        if length > 0x7F:  # noqa: PLR2004 - seven bits a byte
            if data[content] < 0x80:  # noqa: PLR2004 - the continuation bit
                length += (data[content] - 1) << 7
                content += 1
            else:
                length, content = _varint(data, position + 1, end)
        after = content + length
        if after > end or (count and after - start > size):
            break
        count += 1
        position = after
        if position - start >= size:
            break
    return position, count


def weigh(data: bytes, descriptor: Descriptor, *, fields_limit: int, text_limit: int) -> str | None:
    """Say why a message would cost too much to decode; None when it would not.

    Text is reckoned as CPython will hold its JSON, where one wide character makes all others as wide. Raises
    MalformedError.
    """
    found = size = 0
    width = 1
    pending = [(0, len(data), descriptor)]
    while pending:
        start, end, message = pending.pop()
        known = message.fields_by_number
        for field in fields(data, start, end):
            found += 1
            if found > fields_limit:
                return f"more than {fields_limit:,} fields (attributes, events, links, and what they hold)"
            schema = known.get(field.number)
            if schema is None or not field.delimited:
                continue
            if schema.message_type is not None:
                pending.append((field.content, field.end, schema.message_type))
            elif schema.type == FieldDescriptor.TYPE_STRING:
                content = data[field.content : field.end]
                size += len(content) + _ESCAPED * (len(content) - len(content.translate(None, _CONTROLS)))
                if not content.isascii():
                    width = max(width, 4 if _BEYOND_BMP.search(content) else 2)
            else:
                size += (field.end - field.content) * 4 // 3  # base64
    if size * width > text_limit:
        return f"its text takes {size * width:,} bytes once decoded; at most {text_limit:,} are allowed"
    return None


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


def encode_varint(value: int) -> bytes:
    """Encode a number that is not negative."""
    if value < 0x80:  # noqa: PLR2004 - the continuation bit
        return bytes((value,))
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
    VARINT: lambda data, position, end: _varint(data, position, end)[1],
    FIXED64: lambda _data, position, _end: position + 8,
    FIXED32: lambda _data, position, _end: position + 4,
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
        elif kind == DELIMITED:
            length, content = _varint(data, content, end)
            position = content + length
        else:
            position = _skip(data, content, end, kind, number)
        if position > end:
            raise MalformedError("a group is cut off")
    return position
