"""Values as OTLP/JSON has them to fields in protobuf's wire format.

https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding, https://protobuf.dev/programming-guides/json/.

One writer a message, made of its descriptor. `google.protobuf.json_format` knows neither hex ids nor a part of a
message that is wrong alone, and takes five times as long (measured).
"""

import base64
import binascii
import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from otel_pg_exporter.transcode.protobuf_wire import DELIMITED, FIXED32, FIXED64, VARINT, encode_varint
from otel_pg_exporter.transcode.values import MAX_LEVEL, NOT_HEX

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_SURROGATE = re.compile("[\ud800-\udfff]")
_URL_SAFE = str.maketrans("-_", "+/")
_SHOWN = 50  # characters of a value in a message about it

# The fields that are hex, where all other bytes are base64.
_IDS = frozenset({"trace_id", "span_id", "parent_span_id"})

Encode = Callable[[Any], bytes]  # a value, without the field's tag
Write = Callable[[Any, int], bytes]  # a whole field; the level is its message's, counted from the request


class ConversionError(ValueError):
    """A value that its field cannot hold."""


class MessageWriter:
    """Writes the fields of a message."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._name = descriptor.name
        _WRITERS[descriptor.full_name] = self  # before its fields: a message may hold itself
        self._fields: Mapping[str, Write] = {
            name: write
            for field in descriptor.fields
            for write in (_field(field),)
            for name in (field.name, field.json_name)
        }

    def write(self, value: object, level: int) -> bytes:
        """Return the fields of a message that lies `level` messages deep in the request.

        Unknown keys and nulls are left out. Raises ConversionError.
        """
        if type(value) is not dict:
            raise ConversionError(f"{self._name} must be an object, not {_shown(value)}")
        if level > MAX_LEVEL:
            raise ConversionError(f"messages nest deeper than {MAX_LEVEL} levels")
        known = self._fields
        return b"".join([known[key](each, level) for key, each in value.items() if each is not None and key in known])


def writer(descriptor: Descriptor) -> MessageWriter:
    """Return the writer of a kind of message; it is made once."""
    return _WRITERS.get(descriptor.full_name) or MessageWriter(descriptor)


_WRITERS: dict[str, MessageWriter] = {}


def utf8(text: str) -> bytes:
    """Encode text; each lone surrogate becomes a byte that is no UTF-8, to be repaired and marked as such are."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\udcff", text).encode(errors="surrogateescape")


def _field(field: FieldDescriptor) -> Write:
    one = _message(field) if field.message_type is not None else _scalar(field)
    if not field.is_repeated:
        return one
    # A place in a list counts, so that null is there what an absent value is elsewhere.
    empty: object = {} if field.message_type is not None else None

    def write(value: Any, level: int) -> bytes:  # noqa: ANN401 - parsed JSON
        if type(value) is not list:
            raise ConversionError(f"{field.json_name} must be an array, not {_shown(value)}")
        return b"".join([one(empty if each is None else each, level) for each in value])

    return write


def _message(field: FieldDescriptor) -> Write:
    assert field.message_type is not None
    inner, tag = writer(field.message_type), _tag(field, DELIMITED)

    def write(value: Any, level: int) -> bytes:  # noqa: ANN401 - parsed JSON
        content = inner.write(value, level + 1)
        return tag + encode_varint(len(content)) + content

    return write


def _scalar(field: FieldDescriptor) -> Write:
    name, kind = field.json_name, field.type
    if kind in _INTEGERS:
        wire_type, low, high = _INTEGERS[kind]
        encode = _integer(name, wire_type, low, high)
    else:
        wire_type, encode = _OTHERS[kind](field)
    tag = _tag(field, wire_type)
    return lambda value, _level: tag + encode(value)


def _tag(field: FieldDescriptor, wire_type: int) -> bytes:
    return encode_varint(field.number << 3 | wire_type)


def _sized(content: bytes) -> bytes:
    return encode_varint(len(content)) + content


def _text(field: FieldDescriptor) -> tuple[int, Encode]:
    name = field.json_name

    def encode(value: object) -> bytes:
        if type(value) is not str:
            raise ConversionError(f"{name} must be a string, not {_shown(value)}")
        return _sized(utf8(value))

    return DELIMITED, encode


def _bytes(field: FieldDescriptor) -> tuple[int, Encode]:
    name = field.json_name
    decode = _from_hex if field.name in _IDS else _from_base64

    def encode(value: object) -> bytes:
        if type(value) is not str:
            raise ConversionError(f"{name} must be a string, not {_shown(value)}")
        try:
            return _sized(decode(value))
        except binascii.Error:
            raise ConversionError(f"{name} must be base64, not {_shown(value)}") from None

    return DELIMITED, encode


def _from_hex(text: str) -> bytes:
    """Read an id. What is no hex becomes an id of a wrong length, with which all others of that kind are judged."""
    try:
        return binascii.unhexlify(text)
    except ValueError:
        return NOT_HEX + utf8(text)


def _from_base64(text: str) -> bytes:
    standard = utf8(text.translate(_URL_SAFE)).rstrip(b"=")
    return base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)


def _bool(field: FieldDescriptor) -> tuple[int, Encode]:
    name = field.json_name

    def encode(value: object) -> bytes:
        if type(value) is not bool:
            raise ConversionError(f"{name} must be true or false, not {_shown(value)}")
        return b"\1" if value else b"\0"

    return VARINT, encode


def _double(field: FieldDescriptor) -> tuple[int, Encode]:
    name, pack = field.json_name, struct.Struct("<d").pack

    def encode(value: object) -> bytes:
        if type(value) is str:
            if value in _SPECIAL:
                return pack(_SPECIAL[value])
            if _NUMBER.fullmatch(value):
                return pack(float(value))
        elif type(value) is float or type(value) is int:
            try:
                return pack(value)
            except OverflowError:
                pass
        raise ConversionError(f"{name} must be a number, not {_shown(value)}")

    return FIXED64, encode


def _enum(field: FieldDescriptor) -> tuple[int, Encode]:
    assert field.enum_type is not None
    names = {value.name: encode_varint(value.number) for value in field.enum_type.values}
    number = _integer(field.json_name, VARINT, -(2**31), 2**31 - 1)

    def encode(value: Any) -> bytes:  # noqa: ANN401 - parsed JSON
        return names[value] if type(value) is str and value in names else number(value)

    return VARINT, encode


def _integer(name: str, wire_type: int, low: int, high: int) -> Encode:
    pack = {FIXED32: struct.Struct("<I").pack, FIXED64: struct.Struct("<Q").pack, VARINT: encode_varint}[wire_type]
    mask = 2**32 - 1 if wire_type == FIXED32 else 2**64 - 1  # two's complement

    def encode(value: object) -> bytes:
        if type(value) is str and _INTEGER.fullmatch(value):
            number = int(value)
        elif type(value) is int:
            number = value
        elif type(value) is float and value.is_integer():
            number = int(value)
        else:
            raise ConversionError(f"{name} must be an integer, not {_shown(value)}")
        if not low <= number <= high:
            raise ConversionError(f"{name} must be within {low} and {high}, not {_shown(value)}")
        return pack(number & mask)

    return encode


_INTEGERS: Mapping[int, tuple[int, int, int]] = MappingProxyType(
    {
        FieldDescriptor.TYPE_INT32: (VARINT, -(2**31), 2**31 - 1),
        FieldDescriptor.TYPE_INT64: (VARINT, -(2**63), 2**63 - 1),
        FieldDescriptor.TYPE_UINT32: (VARINT, 0, 2**32 - 1),
        FieldDescriptor.TYPE_UINT64: (VARINT, 0, 2**64 - 1),
        FieldDescriptor.TYPE_FIXED32: (FIXED32, 0, 2**32 - 1),
        FieldDescriptor.TYPE_FIXED64: (FIXED64, 0, 2**64 - 1),
        FieldDescriptor.TYPE_SFIXED64: (FIXED64, -(2**63), 2**63 - 1),
    }
)


def _zigzag(field: FieldDescriptor) -> tuple[int, Encode]:
    plain = _integer(field.json_name, FIXED32, -(2**31), 2**31 - 1)  # for its checks

    def encode(value: object) -> bytes:
        (number,) = struct.unpack("<i", plain(value))
        return encode_varint(2 * number if number >= 0 else -2 * number - 1)

    return VARINT, encode


_OTHERS: Mapping[int, Callable[[FieldDescriptor], tuple[int, Encode]]] = MappingProxyType(
    {
        FieldDescriptor.TYPE_BOOL: _bool,
        FieldDescriptor.TYPE_BYTES: _bytes,
        FieldDescriptor.TYPE_DOUBLE: _double,
        FieldDescriptor.TYPE_ENUM: _enum,
        FieldDescriptor.TYPE_SINT32: _zigzag,
        FieldDescriptor.TYPE_STRING: _text,
    }
)


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = "null" if value is None else repr(value) if isinstance(value, str) else f"{value}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
