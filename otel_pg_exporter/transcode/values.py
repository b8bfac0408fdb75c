"""Values: from telemetry's types to what a row holds, and what had to be repaired on the way.

A value tree is made of None, bool, int, float, str, bytes, sequences and mappings. Almost every tree becomes JSON
as it stands; `encode_json` tries that first, and only a tree that JSON or PostgreSQL cannot hold is rebuilt by
`repair`, which applies the normalisations and reports them as bits of `Anomaly`.
"""

import base64
import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from json.encoder import (  # type: ignore[attr-defined] # c_make_encoder is CPython's own
    JSONEncoder,
    c_make_encoder,
    encode_basestring,
)
from typing import Any, NamedTuple

from otel_pg_exporter.model import Anomaly

INT2_MIN, INT2_MAX = -(2**15), 2**15 - 1
INT8_MIN, INT8_MAX = -(2**63), 2**63 - 1

MAX_LEVEL = 100
"""How deep protobuf lets messages nest, counted from the request."""

# The level of an AnyValue: how many messages lie between the request and it, itself included.
RESOURCE_LEVEL = 4  # ResourceSpans > Resource > KeyValue > AnyValue
BODY_LEVEL = 4  # ResourceLogs > ScopeLogs > LogRecord > AnyValue
ITEM_LEVEL = 5  # ResourceSpans > ScopeSpans > Span, LogRecord or scope > KeyValue > AnyValue
EVENT_LEVEL = 6  # ResourceSpans > ScopeSpans > Span > Event or Link > KeyValue > AnyValue
TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8
NOT_HEX = b"not hexadecimal: "
"""What an id begins with that a text should have held in hex, but did not: by itself longer than any id."""

NS_PER_MINUTE = 60_000_000_000
MINUTES_PER_DAY = 1440

_PG_EPOCH_US = 946_684_800_000_000  # 2000-01-01 UTC, in microseconds since 1970
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_NUL_IN_JSON = "\\u0000"  # jsonb refuses it
_MAX_DECIMAL_BITS = 1024  # CPython refuses to spell much longer integers in decimal

SCALARS = frozenset({bool, bytes, float, int, str, type(None)})


def _encoder(*, sort_keys: bool) -> Callable[[Any], str]:
    """Return a `JSONEncoder.encode` that leaves text as it stands, has no blanks, and refuses NaN and infinities.

    The true one makes its encoder in C anew for each tree: a quarter of what ten attributes take.
    """
    default, markers, indent, skip_keys, allow_nan = JSONEncoder().default, None, None, False, False
    chunks = c_make_encoder(markers, default, encode_basestring, indent, ":", ",", sort_keys, skip_keys, allow_nan)
    return lambda tree: "".join(chunks(tree, 0))


_dumps = _encoder(sort_keys=False)
_dumps_sorted = _encoder(sort_keys=True)


class Event(NamedTuple):
    """A span event."""

    time: int  # nanoseconds since 1970, as all times here
    name: str
    attributes: dict[str, Any]
    dropped_attributes_count: int


class Link(NamedTuple):
    """A span link."""

    trace_id: bytes
    span_id: bytes
    trace_state: str
    attributes: dict[str, Any]
    dropped_attributes_count: int
    flags: int


class Span(NamedTuple):
    """One span in Python's own types, whichever reader it came through."""

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    trace_state: str
    flags: int
    name: str
    kind: int  # OTLP's number
    status_code: int
    status_message: str
    start: int
    end: int
    attributes: dict[str, Any]
    dropped_attributes_count: int
    events: Sequence[Event]
    dropped_events_count: int
    links: Sequence[Link]
    dropped_links_count: int
    anomalies: int  # what the reader itself found


class LogRecord(NamedTuple):
    """One log record in Python's own types, whichever reader it came through."""

    time: int
    observed_time: int
    severity_number: int
    severity_text: str
    event_name: str
    body: Any  # None when absent
    attributes: dict[str, Any]
    dropped_attributes_count: int
    flags: int
    trace_id: bytes
    span_id: bytes
    anomalies: int


class EntityRef(NamedTuple):
    """One entity that a resource's attributes describe; the fields are OTLP's, in the order of their JSON."""

    schema_url: str
    type: str
    id_keys: list[str]
    description_keys: list[str]


class Resource(NamedTuple):
    """One resource in Python's own types."""

    attributes: dict[str, Any]
    dropped_attributes_count: int
    entity_refs: Sequence[EntityRef]
    schema_url: str
    anomalies: int


class Scope(NamedTuple):
    """One instrumentation scope in Python's own types."""

    name: str
    version: str
    attributes: dict[str, Any]
    dropped_attributes_count: int
    schema_url: str
    anomalies: int


def pg_time(nanoseconds: int) -> int:
    """Return a time as PostgreSQL's timestamptz has it: whole microseconds since 2000-01-01 UTC."""
    return nanoseconds // 1000 - _PG_EPOCH_US


def saturate(value: int, low: int, high: int) -> int:
    """Return the number between `low` and `high` that is nearest to `value`."""
    return low if value < low else min(value, high)


def repair_text(text: str) -> str:
    """Return `text` with U+FFFD for each NUL and lone surrogate: the same object when there is none."""
    if text.isascii():
        return text.replace("\0", _REPLACEMENT) if "\0" in text else text
    return _UNSTORABLE.sub(_REPLACEMENT, text) if _UNSTORABLE.search(text) else text


def cut_text(text: str, max_bytes: int) -> str:
    """Return the longest beginning of `text` with at most `max_bytes` bytes of UTF-8."""
    data = text.encode()
    return text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore")


def encode_json(tree: Any, *, sort_keys: bool = False) -> tuple[bytes, int]:  # noqa: ANN401 - a value tree
    """Encode a value tree as UTF-8 JSON that jsonb accepts, and say which repairs that took."""
    dumps = _dumps_sorted if sort_keys else _dumps
    try:
        text = dumps(tree)
        if _NUL_IN_JSON not in text:
            return text.encode(), 0
    except (TypeError, ValueError):
        # Bytes, a mapping that is no dict, NaN, an infinity, a lone surrogate: all rare, all for `repair`.
        pass
    repaired, anomalies = repair(tree)
    return dumps(repaired).encode(), anomalies


def repair(value: Any) -> tuple[Any, int]:  # noqa: ANN401, PLR0911 - a value tree; one line a type
    """Rebuild a value tree with what JSON and jsonb can hold alone, and say which repairs that took."""
    match value:
        case None | bool():
            return value, 0
        case str():
            text = repair_text(value)
            return text, 0 if text is value else Anomaly.TEXT_REPAIRED
        case int():
            # Only an SDK can hand over more than int64; jsonb keeps it exactly.
            return (value if value.bit_length() <= _MAX_DECIMAL_BITS else spell_integer(value)), 0
        case float():
            return (value, 0) if math.isfinite(value) else (non_finite(value), Anomaly.NON_FINITE)
        case bytes():
            return base64.b64encode(value).decode("ascii"), Anomaly.BYTES_VALUE
        case Mapping():
            return _repair_mapping(value)
        case Sequence():
            pairs = [repair(element) for element in value]
            return [element for element, _ in pairs], union(bits for _, bits in pairs)
        case _:
            return repair(str(value))


def spell_integer(value: int) -> str:
    """Spell an integer as a string, however long it is."""
    return str(value) if value.bit_length() <= _MAX_DECIMAL_BITS else hex(value)


def nests_too_deep(value: object, level: int) -> bool:
    """Say whether protobuf refuses a value for its nesting; `level` is the level of its AnyValue."""
    if type(value) in SCALARS or isinstance(value, str | bytes):
        return False
    if isinstance(value, Mapping):  # AnyValue > KeyValueList > KeyValue > AnyValue
        return level + (3 if value else 1) > MAX_LEVEL or any(
            nests_too_deep(inner, level + 3) for inner in value.values()
        )
    if isinstance(value, Sequence):  # AnyValue > ArrayValue > AnyValue
        return level + (2 if value else 1) > MAX_LEVEL or any(nests_too_deep(inner, level + 2) for inner in value)
    return False


def non_finite(value: float) -> str:
    """Spell a double that JSON has no number for, as ProtoJSON does."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _repair_mapping(mapping: Mapping[Any, Any]) -> tuple[dict[str, Any], int]:
    result: dict[str, Any] = {}
    anomalies = 0
    for key, value in mapping.items():
        text = key if isinstance(key, str) else str(key)
        name = repair_text(text)
        if name is not text:
            anomalies |= Anomaly.TEXT_REPAIRED
        if name in result:  # two keys became one
            anomalies |= Anomaly.DUPLICATE_KEY
        result[name], bits = repair(value)
        anomalies |= bits
    return result, anomalies


def union(masks: Iterable[int]) -> int:
    """Return all bits that are set in any of the masks."""
    return functools.reduce(operator.or_, masks, 0)
