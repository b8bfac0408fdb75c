"""The values that travel between the rooms: signals, tables, row batches, outcomes."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_MESSAGE_LIMIT = 1000  # characters of `partial_success.error_message`
_REASONS_SHOWN = 3

# How both cores begin a reason, and what it is counted as; all others are of what cannot be decoded.
_KINDS = {
    "trace_id ": "invalid_id",
    "span_id ": "invalid_id",
    "too large: ": "limit",
    "its resource is too large: ": "limit",
    "its scope is too large: ": "limit",
    "its scope adds ": "limit",
    "the rows of this request exceed ": "limit",
}

_NOT_DECODABLE = "not_decodable"

REPEATED = "repeated"
"""The kind of what was refused when its request came first: a retry hears the same answer."""

KINDS_OF_REJECTION = (*dict.fromkeys(_KINDS.values()), _NOT_DECODABLE, REPEATED)
"""Every kind but the classes of SQLSTATEs."""


class Signal(enum.Enum):
    """An OTLP signal that has a table here. The value is OTLP's word (`/v1/traces`)."""

    TRACES = "traces"
    LOGS = "logs"

    @property
    def table(self) -> str:
        """Name of the table that takes one row per item."""
        return "spans" if self is Signal.TRACES else "logs"

    @property
    def items(self) -> str:
        """What one item is called, in the plural, as messages and `rejected_*` fields say it."""
        return "spans" if self is Signal.TRACES else "log records"


class ColumnType(enum.StrEnum):
    """The PostgreSQL types that a mapping may name."""

    BOOL = "bool"
    BYTEA = "bytea"
    FLOAT8 = "float8"
    INT2 = "int2"
    INT4 = "int4"
    INT8 = "int8"
    JSONB = "jsonb"
    TEXT = "text"
    TIMESTAMPTZ = "timestamptz"
    UUID = "uuid"


class Anomaly(enum.IntFlag):
    """Bits of the column `anomalies`: what was repaired or found odd on the way in."""

    TEXT_REPAIRED = 1  # NUL or a lone surrogate in text became U+FFFD
    INVALID_UTF8 = 2  # bytes that are not UTF-8 became U+FFFD
    NON_FINITE = 4  # NaN or an infinity became a JSON string
    BYTES_VALUE = 8  # a bytes value became a base64 JSON string
    DUPLICATE_KEY = 16  # an attribute key came twice; the last one won
    INVALID_ID = 32  # a trace, span, parent or link id has a wrong length or is all zeros
    TIME_SUBSTITUTED = 64  # a log record without a time got its observed time or the receipt
    TIME_OUTSIDE_WINDOW = 128  # the time lies outside the accepted window: DEFAULT partition
    DURATION_SATURATED = 256  # end minus start does not fit int8
    ENUM_SATURATED = 512  # kind, status or severity number does not fit int2
    TEXT_CUT = 1024  # service.name was cut to what an index can hold


class Source(NamedTuple):
    """One `from` of a column: `span.name`, or `resource.attributes["service.name"]` with a `key`."""

    message: str  # span | log | scope | resource | request
    field: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table, as a mapping file declares it."""

    name: str
    type: ColumnType
    sources: tuple[Source, ...]  # in order of preference; the first that has a fitting value wins
    key: bool = False
    promoted: bool = False  # declared in promoted/*.toml or a user's file: nullable, added online by `migrate`
    sum_in_traces: bool = False
    max_bytes: int | None = None  # text only: cut to this many UTF-8 bytes
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table, as the mapping files declare it: the COPY column list and the row order."""

    name: str
    columns: tuple[Column, ...]

    @property
    def key(self) -> tuple[Column, ...]:
        """The primary key's columns, in key order; empty for `logs`."""
        return tuple(column for column in self.columns if column.key)

    @property
    def sums(self) -> tuple[Column, ...]:
        """The columns that `traces` adds up."""
        return tuple(column for column in self.columns if column.sum_in_traces)


class SpanFacts(NamedTuple):
    """What one span contributes to its `traces` row. Times are PostgreSQL's: µs since 2000-01-01 UTC."""

    trace_id: bytes
    span_id: bytes
    start: int
    end: int  # the greater of start and end
    error: bool
    root: bool
    name: str
    service_name: str | None
    sums: tuple[int | None, ...]  # in the order of `Table.sums`


Hold = Callable[[int], None]
"""Told how many bytes a request holds in memory by now. May wait for room; raises OverloadedError if there is none."""


def unbounded(_size: int) -> None:
    """Be the `Hold` of a request that is the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """One refused item of a request."""

    item: int  # index of the item in its request, counted over all resources and scopes
    reason: str
    sqlstate: str | None = None  # when PostgreSQL refused it

    @property
    def kind(self) -> str:
        """Why, as one of few words, for counting: an SQLSTATE's class, or what transcoding found."""
        if self.sqlstate is not None:
            return f"sqlstate_{self.sqlstate[:2]}"
        return next((kind for start, kind in _KINDS.items() if self.reason.startswith(start)), _NOT_DECODABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """One request, transcoded: finished binary COPY tuples and what the writer must know about them.

    `rows`, `items` and `resource_ids` run in parallel, and for spans `keys` and `facts` too (empty for logs).
    """

    signal: Signal
    received_at: int  # ns since the epoch
    rows: Sequence[bytes]  # int16 field count, then int32 length and bytes per field, in `Table.columns` order
    keys: Sequence[bytes]  # the primary key's fields in binary format, concatenated
    facts: Sequence[SpanFacts]
    items: Sequence[int]  # which item of the request a row is
    resource_ids: Sequence[bytes]  # 16 bytes each
    resources: Mapping[bytes, bytes]  # resource id to binary COPY tuple of the table `resources`
    days: frozenset[int]  # days since 1970-01-01 UTC inside the accepted window: the partitions needed
    rejected: Sequence[Rejection]
    repairs: Mapping[Anomaly, int]  # how many items have each single bit
    size: int  # bytes that the batch holds in memory, for the byte budget
    otlp: Callable[[int], bytes]  # item index to a one-item OTLP export request, for dead letters
    identify: Callable[[], bytes]  # the request's id; a hash of megabytes, that most requests of spans never need

    @property
    def request_id(self) -> bytes:
        """The request's id, 16 bytes: a client's retry has the same."""
        return self.identify()

    @property
    def item_count(self) -> int:
        """How many items the request brought."""
        return len(self.rows) + len(self.rejected)


def rejection_message(batch: RowBatch, rejections: Sequence[Rejection]) -> str:
    """Say in one line how many items were refused and why; empty when none was."""
    if not rejections:
        return ""
    first: dict[str, int] = {}
    for each in sorted(rejections, key=lambda rejection: rejection.item):
        first.setdefault(each.reason, each.item)
    shown = "; ".join(f"item {item}: {reason}" for reason, item in list(first.items())[:_REASONS_SHOWN])
    more = f"; and {len(first) - _REASONS_SHOWN} other reasons" if len(first) > _REASONS_SHOWN else ""
    text = f"{len(rejections)} of {batch.item_count} {batch.signal.items} refused: {shown}{more}"
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request: `stored + duplicate + rejected` is its number of items, unless it was spooled."""

    stored: int = 0
    duplicate: int = 0  # already stored: by an earlier request, or twice in one batch
    duplicate_conflict: int = 0  # of these, same key but other content (seen inside one batch)
    spooled: int = 0  # safe on disk, all the request's items; what else becomes of them is settled later
    rejected: int = 0
    error_message: str = ""  # for `partial_success`; empty unless something was rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The accepted times, relative to now; what lies outside goes to the DEFAULT partition, flagged."""

    past: float = field(default=30 * 86_400.0)  # seconds
    future: float = field(default=86_400.0)  # seconds
