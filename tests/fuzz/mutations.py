"""Hostile variants of requests. Randomness comes from outside: from hypothesis, or from atheris' seed."""

import random
from typing import NamedTuple

from tests.e2e.wire import delimited, varint

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_EXTREMES = (0, 1, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70 - 1)
_DESCENTS = 0.85  # share of the mutations of a message that happen inside one of its fields
_MAX_COPIES = 64
_MAX_GROUPS = 100  # inside each other


def kvlists(levels: int) -> bytes:
    """Encode an AnyValue with so many kvlists inside each other."""
    value = b"\x18\x07"
    for _ in range(levels):
        value = delimited(6, delimited(1, delimited(1, b"k") + delimited(2, value)))
    return value


def arrays(levels: int, value: bytes = b"\x18\x07") -> bytes:
    """Encode an AnyValue with so many arrays around another, the integer 7."""
    for _ in range(levels):
        value = delimited(5, delimited(1, value))
    return value


_HOSTILE_TEXTS = (
    b"\0",
    b"\xff\xc3\x28\xe2",  # not UTF-8
    b"\xed\xa0\x80",  # a surrogate
    b"\xc0\x80",  # NUL, spelled too long
    b"\\u0000",
    "\U0010ffff\uffff".encode(),
    "é".encode() * 1_001,  # longer than an index can hold
)
_CONTENTS = (
    *_HOSTILE_TEXTS,
    b"",
    bytes(8),
    bytes(16),
    b"\xff" * 8,
    bytes(range(1, 17)),
    b"\x21\0\0\0\0\0\0\xf8\x7f",  # an AnyValue: NaN
    b"\x3a\x01\xff",  # an AnyValue: bytes
    b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an AnyValue: -1
    b"\x0b\x0c",  # a group
    *map(kvlists, (1, 28, 29, 30, 31, 32, 33, 100)),
    *map(arrays, (1, 46, 47, 48, 49, 50, 150)),
)


class Field(NamedTuple):
    """One field of an encoded message."""

    number: int
    kind: int  # wire type
    content: bytes  # without the length of a delimited one


def mutate(data: bytes, chance: random.Random, times: int = 1) -> bytes:
    """Return `data` with so many changes: most inside a message at any depth, around which all lengths stay true."""
    for _ in range(times):
        data = _mutate_message(data, chance) if chance.random() < 0.9 else mutate_bytes(data, chance)
    return data


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with a change that knows nothing of messages."""
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.randrange(1, 9))
    match chance.randrange(6):
        case 0:  # flip a bit
            flipped = bytes([data[start] ^ 1 << chance.randrange(8)]) if start < end else b""
            return data[:start] + flipped + data[start + 1 :]
        case 1:  # overwrite
            return data[:start] + chance.randbytes(end - start) + data[end:]
        case 2:  # insert
            return data[:start] + chance.randbytes(chance.randrange(1, 9)) + data[start:]
        case 3:  # remove
            return data[:start] + data[end:]
        case 4:  # cut off
            return data[:start]
        case _:  # splice
            other = chance.randrange(len(data) + 1)
            return data[:start] + data[other:]


def parse(data: bytes) -> list[Field] | None:
    """Return the fields of an encoded message, a group and what is in it as one; None when it is no message."""
    fields = []
    position = 0
    while position < len(data):
        tag, start = _number(data, position)
        field, position = _field(data, tag, start)
        if not tag >> 3 or position > len(data):
            return None
        fields.append(field)
    return fields


def children(data: bytes, number: int) -> list[bytes]:
    """Return the contents of a message's delimited fields with this number."""
    return [field.content for field in parse(data) or () if (field.number, field.kind) == (number, _DELIMITED)]


def _field(data: bytes, tag: int, start: int, groups: int = 0) -> tuple[Field, int]:
    """Return the field whose tag ends at `start`, and where it ends; beyond the data when it is cut off or none.

    It lies inside so many groups.
    """
    number, kind = tag >> 3, tag & 7
    match kind:
        case 0:
            _, end = _number(data, start)
        case 2:
            length, start = _number(data, start)
            end = start + length
        case 3 if groups < _MAX_GROUPS:
            end = start
            inner = -1
            while end <= len(data) and inner != number << 3 | 4:
                inner, end = _number(data, end)
                if inner & 7 != 4:
                    _, end = _field(data, inner, end, groups + 1)
                elif inner != number << 3 | 4:
                    end = len(data) + 1
        case 1 | 5:
            end = start + _FIXED_BYTES[kind]
        case _:
            end = len(data) + 1
    return Field(number, kind, data[start:end]), end


def _number(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position`, and where it ends; beyond the data when it is cut off."""
    value = 0
    for count, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, position + count + 1
    return value, len(data) + 1


def _encode(field: Field) -> bytes:
    length = varint(len(field.content)) if field.kind == _DELIMITED else b""
    return varint(field.number << 3 | field.kind) + length + field.content


def _mutate_message(data: bytes, chance: random.Random) -> bytes:
    fields = parse(data)
    if not fields:
        return _mutate_content(data, chance)
    (index,) = chance.choices(range(len(fields)), [len(field.content) + 4 for field in fields])
    field = fields[index]
    if field.kind == _DELIMITED and chance.random() < _DESCENTS:
        changed = _encode(field._replace(content=_mutate_message(field.content, chance)))
    else:
        changed = _mutate_field(field, chance.choice(fields), chance)
    encoded = [_encode(each) for each in fields]
    encoded[index] = changed
    return b"".join(encoded)


def _mutate_content(data: bytes, chance: random.Random) -> bytes:
    match chance.randrange(3):
        case 0:
            return mutate_bytes(data, chance)
        case 1:
            return chance.choice(_CONTENTS)
        case _:
            start = chance.randrange(len(data) + 1)
            return data[:start] + chance.choice(_HOSTILE_TEXTS) + data[start:]


def _mutate_field(field: Field, other: Field, chance: random.Random) -> bytes:  # noqa: PLR0911 - one line a mutation
    whole = _encode(field)
    match chance.randrange(10):
        case 0:
            return b""
        case 1:
            return whole * chance.randrange(2, _MAX_COPIES if len(whole) < 100 else 3)
        case 2:
            return _encode(other) + whole
        case 3:
            return _encode(field._replace(content=other.content))
        case 4:
            return _encode(field._replace(number=chance.choice((*range(20), 2**29 - 1, 2**29, 2**40))))
        case 5:
            return _encode(field._replace(kind=chance.randrange(8)))
        case 6 | 7:
            return _encode(_other_value(field.number, chance))
        case 8:  # a length that lies
            length = chance.choice((*_EXTREMES, len(field.content) + chance.randrange(-3, 4)))
            return varint(field.number << 3 | _DELIMITED) + varint(max(0, length)) + field.content
        case _:  # inside groups
            depth = chance.choice((1, 2, 50, 99, 100, 101, 150))
            number = chance.choice((field.number, 19, 2**29 - 1))
            return varint(number << 3 | 3) * depth + whole + varint(number << 3 | 4) * depth


def _other_value(number: int, chance: random.Random) -> Field:
    """Return a field of any wire type, with a value of that type."""
    kind = chance.choice((_VARINT, _FIXED64, _DELIMITED, _FIXED32))
    match kind:
        case 0:
            return Field(number, kind, varint(chance.choice(_EXTREMES)))
        case 2:
            return Field(number, kind, chance.choice(_CONTENTS))
        case _:
            size = _FIXED_BYTES[kind]
            return Field(number, kind, chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size))))
