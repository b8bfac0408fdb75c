"""OTLP requests framed by hand, around items that no message class would serialise."""

from otel_pg_exporter.transcode.protobuf_wire import delimited


def resource_frame(rest: bytes, scopes: bytes = b"") -> bytes:
    """Encode one resource as a field of a request; `scopes` are encoded fields."""
    return delimited(1, rest + scopes)


def scope_frame(rest: bytes, items: bytes = b"") -> bytes:
    """Encode one scope as a field of a resource; `items` are encoded fields."""
    return delimited(2, rest + items)


def item_frame(item: bytes) -> bytes:
    """Encode one item as a field of a scope."""
    return delimited(2, item)
