"""Plans: a table's mapping, compiled once into what building a row needs.

Every message (span, log, scope, resource, request) yields its encoded fields in the order of `mapping.FIELDS`. A row
is picked from one flat *vector* of fields::

    item's fields | item's picks | scope's fields | resource's fields | request's field | shared picks

A *pick* is a column that takes more than a look at one field: attributes, several sources, or a cut. A pick whose
sources are all the same for a whole scope is *shared*, and is made once per scope instead of once per item.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, TypeGuard

from otel_pg_exporter.mapping import FIELDS
from otel_pg_exporter.mapping import Mapping as ColumnMapping
from otel_pg_exporter.model import Anomaly, Column, ColumnType, Signal, Source, Table, Window
from otel_pg_exporter.transcode import copy_format
from otel_pg_exporter.transcode.values import INT8_MAX, INT8_MIN, cut_text, encode_json, repair_text

Fitted = tuple[bytes, int]  # an encoded field, and the repairs that it took
Fields = tuple[bytes, ...]

_SHARED_MESSAGES = ("scope", "resource", "request")


class Message(NamedTuple):
    """What a pick may look at in one message."""

    fields: Sequence[bytes]
    attributes: Mapping[str, Any]


class PickSource(NamedTuple):
    """One source of a pick: an attribute's key, or without one a field's position among its message's fields."""

    message: str
    position: int
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A column whose value is searched for: the first source with a fitting value wins."""

    type: ColumnType
    sources: tuple[PickSource, ...]
    fit: Callable[[Any], Fitted | None]
    max_bytes: int | None

    def __call__(self, messages: Mapping[str, Message]) -> Fitted:
        """Return the column's field: NULL when no source has a value that fits."""
        for message, position, key in self.sources:
            if key is not None:
                fitted = self.fit(messages[message].attributes.get(key))
            else:
                fitted = self._of_field(messages[message].fields[position])
            if fitted is not None:
                return fitted
        return copy_format.NULL, 0

    def _of_field(self, field: bytes) -> Fitted | None:
        value = copy_format.content(field)
        if value is None:
            return None
        return (field, 0) if self.max_bytes is None else self.fit(value.decode())


class Positions(NamedTuple):
    """Where in the vector of fields the row's, the key's and the sums' fields stand."""

    columns: tuple[int, ...]
    key: tuple[int, ...]
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """How one table's rows are made from the vector of fields."""

    positions: Positions
    header: bytes
    columns: Callable[[Fields], Fields]  # the row's fields in column order
    key: Callable[[Fields], Fields]
    sums: Callable[[Fields], Fields]
    item_picks: tuple[Pick, ...]
    shared_picks: tuple[Pick, ...]
    picks_by_key: Mapping[str, tuple[int, ...]]  # item attribute to the item_picks that look at it
    always_picked: tuple[int, ...]  # item_picks that look at more than item attributes
    no_picks: Fields  # item_picks of an item that has none of these attributes
    no_sums: Fields
    service_name: int | None  # position of the column service_name in the vector's shared part


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that transcoding one signal needs to know about tables."""

    signal: Signal
    table: Table
    window: Window
    rows: RowPlan
    resources: RowPlan


def compile_plan(mapping: ColumnMapping, signal: Signal, window: Window) -> Plan:
    """Compile the mapping for one signal."""
    table = mapping.table(signal)
    item = "span" if signal is Signal.TRACES else "log"
    return Plan(
        signal=signal,
        table=table,
        window=window,
        rows=_compile(table, item, _SHARED_MESSAGES),
        resources=_compile(mapping.resources, None, ("resource",)),
    )


def _compile(table: Table, item: str | None, shared: tuple[str, ...]) -> RowPlan:
    picked = [column for column in table.columns if not _is_direct(column)]
    item_columns = [column for column in picked if any(source.message == item for source in column.sources)]
    shared_columns = [column for column in picked if column not in item_columns]

    position: dict[tuple[str, str], int] = {}  # of a message's field, or of a pick ("", column name)
    if item is not None:
        _extend(position, [(item, name) for name in FIELDS[item]])
    _extend(position, [("", column.name) for column in item_columns])
    shared_start = len(position)
    _extend(position, [(message, name) for message in shared for name in FIELDS[message]])
    _extend(position, [("", column.name) for column in shared_columns])

    def of(columns: Sequence[Column]) -> tuple[int, ...]:
        direct = [column.sources[0] if _is_direct(column) else None for column in columns]
        return tuple(
            position["", column.name] if source is None else position[source.message, source.field]
            for column, source in zip(columns, direct, strict=True)
        )

    positions = Positions(of(table.columns), of(table.key), of(table.sums))
    service_name = position.get(("", "service_name"), -1) - shared_start
    return RowPlan(
        positions=positions,
        header=copy_format.header(len(table.columns)),
        columns=_getter(positions.columns),
        key=_getter(positions.key),
        sums=_getter(positions.sums),
        item_picks=tuple(_pick(column) for column in item_columns),
        shared_picks=tuple(_pick(column) for column in shared_columns),
        picks_by_key=_picks_by_key(item_columns, item),
        always_picked=tuple(
            index
            for index, column in enumerate(item_columns)
            if any(source.message != item or source.key is None for source in column.sources)
        ),
        no_picks=(copy_format.NULL,) * len(item_columns),
        no_sums=(copy_format.NULL,) * len(table.sums),
        service_name=service_name if service_name >= 0 else None,
    )


def _is_direct(column: Column) -> bool:
    return len(column.sources) == 1 and column.sources[0].key is None and column.max_bytes is None


def _extend(position: dict[tuple[str, str], int], names: list[tuple[str, str]]) -> None:
    for name in names:
        position[name] = len(position)


def _getter(positions: tuple[int, ...]) -> Callable[[Fields], Fields]:
    """Return `itemgetter`, but one that yields a tuple for no and for one position, too."""
    match positions:
        case ():
            return lambda _fields: ()
        case (only,):
            return lambda fields: (fields[only],)
        case _:
            return itemgetter(*positions)


def _picks_by_key(columns: Sequence[Column], item: str | None) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, column in enumerate(columns):
        for key in {source.key for source in column.sources if source.message == item and source.key is not None}:
            found[key] = (*found.get(key, ()), index)
    return found


def _pick(column: Column) -> Pick:
    fit = _fit_text(column.max_bytes) if column.type is ColumnType.TEXT else _FIT.get(column.type, _fit_nothing)
    sources = tuple(_pick_source(source) for source in column.sources)
    return Pick(type=column.type, sources=sources, fit=fit, max_bytes=column.max_bytes)


def _pick_source(source: Source) -> PickSource:
    return PickSource(source.message, list(FIELDS[source.message]).index(source.field), source.key)


def _fit_text(max_bytes: int | None) -> Callable[[Any], Fitted | None]:
    def fit(value: object) -> Fitted | None:
        if not isinstance(value, str):
            return None
        text = repair_text(value)
        anomalies = 0 if text is value else Anomaly.TEXT_REPAIRED
        if max_bytes is not None and (short := cut_text(text, max_bytes)) != text:
            return copy_format.text_field(short), anomalies | Anomaly.TEXT_CUT
        return copy_format.text_field(text), anomalies

    return fit


def _fit_bool(value: object) -> Fitted | None:
    return (copy_format.bool_field(value), 0) if isinstance(value, bool) else None


def _is_int8(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and INT8_MIN <= value <= INT8_MAX


def _fit_int8(value: object) -> Fitted | None:
    return (copy_format.int8_field(value), 0) if _is_int8(value) else None


def _fit_float8(value: object) -> Fitted | None:
    return (copy_format.float8_field(value), 0) if isinstance(value, float) or _is_int8(value) else None


def _fit_jsonb(value: object) -> Fitted | None:
    if value is None:
        return None
    document, anomalies = encode_json(value)
    return copy_format.jsonb_field(document), anomalies


def _fit_nothing(_value: object) -> Fitted | None:
    return None


_FIT: dict[ColumnType, Callable[[Any], Fitted | None]] = {
    ColumnType.BOOL: _fit_bool,
    ColumnType.INT8: _fit_int8,
    ColumnType.FLOAT8: _fit_float8,
    ColumnType.JSONB: _fit_jsonb,
}
