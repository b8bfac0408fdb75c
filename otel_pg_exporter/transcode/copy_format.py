"""Binary COPY: PostgreSQL's tuples, written and read field by field.

A tuple is an int16 count of fields, then for each field an int32 length and that many bytes; NULL has the length
-1 and no bytes. https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS
A *field* here is always the length and its bytes together, so that a row is the concatenation of its fields.
"""

import struct
from collections.abc import Iterable

from otel_pg_exporter.model import ColumnType, Table

NULL = b"\xff\xff\xff\xff"
EMPTY_TEXT = b"\0\0\0\0"

_LENGTH = struct.Struct(">i")
_JSONB_VERSION = 1

_pack_length = _LENGTH.pack
_pack_bool = struct.Struct(">i?").pack
_pack_int2 = struct.Struct(">ih").pack
_pack_int4 = struct.Struct(">ii").pack
_pack_int8 = struct.Struct(">iq").pack
_pack_float8 = struct.Struct(">id").pack
_pack_jsonb = struct.Struct(">iB").pack


def header(fields: int) -> bytes:
    """Begin a tuple of so many fields."""
    return struct.pack(">h", fields)


def bool_field(value: bool) -> bytes:
    """Encode a bool."""
    return _pack_bool(1, value)


def bytea_field(value: bytes) -> bytes:
    """Encode bytes; a uuid is its 16 bytes."""
    return _pack_length(len(value)) + value


def float8_field(value: float) -> bytes:
    """Encode a double."""
    return _pack_float8(8, value)


def int2_field(value: int) -> bytes:
    """Encode a 16-bit integer."""
    return _pack_int2(2, value)


def int4_field(value: int) -> bytes:
    """Encode a 32-bit integer."""
    return _pack_int4(4, value)


def int8_field(value: int) -> bytes:
    """Encode a 64-bit integer, or a timestamptz: microseconds since 2000-01-01 UTC."""
    return _pack_int8(8, value)


def jsonb_field(document: bytes) -> bytes:
    """Encode a JSON document, given as UTF-8."""
    return _pack_jsonb(len(document) + 1, _JSONB_VERSION) + document


def text_field(value: str) -> bytes:
    """Encode text that holds neither NUL nor lone surrogates."""
    if not value:
        return EMPTY_TEXT
    data = value.encode()
    return _pack_length(len(data)) + data


def content(field: bytes) -> bytes | None:
    """Return a field's bytes without their length; None for NULL."""
    return None if field == NULL else field[_LENGTH.size :]


def split(row: bytes) -> list[bytes | None]:
    """Return the contents of a tuple's fields; None for NULL."""
    (count,) = struct.unpack_from(">h", row)
    position = 2
    contents: list[bytes | None] = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(row, position)
        position += _LENGTH.size
        contents.append(None if length < 0 else row[position : position + length])
        position += max(length, 0)
    return contents


def join(fields: Iterable[bytes], count: int) -> bytes:
    """Build a tuple from its encoded fields."""
    return header(count) + b"".join(fields)


_HARMLESS = {
    ColumnType.BOOL: bool_field(False),
    ColumnType.BYTEA: bytea_field(bytes(8)),
    ColumnType.FLOAT8: float8_field(0.0),
    ColumnType.INT2: int2_field(0),
    ColumnType.INT4: int4_field(0),
    ColumnType.INT8: int8_field(0),
    ColumnType.JSONB: jsonb_field(b"{}"),
    ColumnType.TEXT: text_field("control"),
    ColumnType.TIMESTAMPTZ: int8_field(0),
    ColumnType.UUID: bytea_field(bytes(16)),
}


def control_row(table: Table) -> bytes:
    """Build a tuple with a valid, non-null value in every column.

    PostgreSQL refuses it only if the table differs from its mapping. Its ids are all zeros, which no stored span has.
    """
    return join((_HARMLESS[column.type] for column in table.columns), len(table.columns))
