"""OTLP requests from items that no message class would serialise: broken, hostile or too deep ones."""

from collections.abc import Sequence


def delimited(number: int, content: bytes) -> bytes:
    """Encode a string, bytes or message field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def enclosed(items: Sequence[bytes]) -> bytes:
    """Encode a request whose one scope holds these spans or log records: their field numbers are the same."""
    return delimited(1, delimited(2, b"".join(delimited(2, item) for item in items)))


def nested_attribute(key: bytes, kvlists: int) -> bytes:
    """Encode a KeyValue whose value lies inside so many kvlists; the innermost is the integer 7."""
    value = b"\x18\x07"
    for _ in range(kvlists):
        value = delimited(6, delimited(1, delimited(1, b"k") + delimited(2, value)))
    return delimited(1, key) + delimited(2, value)
