"""The mapping: which columns the tables have, and where each value comes from.

The TOML files in `proto_mappings/` and a user's own files declare columns; nothing else does. A column's `from`
is one source, or a list of sources in order of preference: the first that has a fitting value wins. The grammar
is closed::

    source  = message "." field
            | message ".attributes[" JSON string "]"        one attribute, by its key
    message = "span" | "log" | "scope" | "resource" | "request"

A field has exactly one type (`FIELDS`), and so has its column. An attribute fits a column of type bool, int8,
float8 or text when the value has that type (float8 takes integers too; a bool is no integer), and jsonb whatever
it is; a value that does not fit is passed over, and without any that fits the column is NULL.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn

from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.model import Column, ColumnType, Signal, Source, Table

FIELDS: dict[str, dict[str, ColumnType]] = {
    "span": {
        "trace_id": ColumnType.UUID,
        "span_id": ColumnType.BYTEA,
        "parent_span_id": ColumnType.BYTEA,
        "trace_state": ColumnType.TEXT,
        "flags": ColumnType.INT8,
        "name": ColumnType.TEXT,
        "kind": ColumnType.INT2,
        "status_code": ColumnType.INT2,
        "status_message": ColumnType.TEXT,
        "start_minute": ColumnType.INT4,
        "start_time": ColumnType.TIMESTAMPTZ,
        "start_time_ns": ColumnType.INT2,
        "end_time": ColumnType.TIMESTAMPTZ,
        "duration_ns": ColumnType.INT8,
        "attributes": ColumnType.JSONB,
        "dropped_attributes_count": ColumnType.INT8,
        "events": ColumnType.JSONB,
        "dropped_events_count": ColumnType.INT8,
        "links": ColumnType.JSONB,
        "dropped_links_count": ColumnType.INT8,
        "anomalies": ColumnType.INT4,
    },
    "log": {
        "time_minute": ColumnType.INT4,
        "time": ColumnType.TIMESTAMPTZ,
        "time_ns": ColumnType.INT2,
        "observed_time": ColumnType.TIMESTAMPTZ,
        "observed_time_ns": ColumnType.INT2,
        "severity_number": ColumnType.INT2,
        "severity_text": ColumnType.TEXT,
        "event_name": ColumnType.TEXT,
        "body_text": ColumnType.TEXT,
        "body_json": ColumnType.JSONB,
        "trace_id": ColumnType.UUID,
        "span_id": ColumnType.BYTEA,
        "flags": ColumnType.INT8,
        "attributes": ColumnType.JSONB,
        "dropped_attributes_count": ColumnType.INT8,
        "anomalies": ColumnType.INT4,
    },
    "scope": {
        "name": ColumnType.TEXT,
        "version": ColumnType.TEXT,
        "attributes": ColumnType.JSONB,
        "dropped_attributes_count": ColumnType.INT8,
        "schema_url": ColumnType.TEXT,
    },
    "resource": {
        "id": ColumnType.UUID,
        "attributes": ColumnType.JSONB,
        "dropped_attributes_count": ColumnType.INT8,
        "entity_refs": ColumnType.JSONB,
        "schema_url": ColumnType.TEXT,
    },
    "request": {"id": ColumnType.UUID},
}
"""Every field that a `from` may name, with its type; the order is the one in which transcoding yields them."""

_MESSAGES = {
    "spans": ("span", "scope", "resource", "request"),
    "logs": ("log", "scope", "resource", "request"),
    "resources": ("resource",),
}
_ATTRIBUTE_TYPES = (ColumnType.BOOL, ColumnType.INT8, ColumnType.FLOAT8, ColumnType.TEXT, ColumnType.JSONB)
_PROMOTABLE = ("spans", "logs")

# Columns that exist without standing in a mapping file: the migrations create them, or PostgreSQL itself.
_SYSTEM_COLUMNS = frozenset({"ctid", "cmax", "cmin", "ingested_at", "tableoid", "xmax", "xmin"})
_TRACES_COLUMNS = frozenset(
    {
        *("trace_id", "start_time", "end_time", "span_count", "error_count", "service_names"),
        *("root_span_id", "root_start_time", "root_name", "root_service_name"),
    }
)

_OWN_KEYS = frozenset({"name", "type", "from", "comment", "key", "max_bytes", "sum_in_traces"})
_PROMOTED_KEYS = frozenset({"name", "type", "from", "comment", "sum_in_traces"})

_MAX_IDENTIFIER = 63  # bytes; PostgreSQL cuts longer ones without an error
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")
_FIELD = re.compile(r"([a-z]+)\.([a-z_]+)")
_ATTRIBUTE = re.compile(r"([a-z]+)\.attributes\[(\".*\")\]", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """All tables whose rows transcoding makes. Promoted columns follow a table's own, in file order."""

    spans: Table
    logs: Table
    resources: Table
    files: tuple[Path, ...] = ()  # the user's own

    def table(self, signal: Signal) -> Table:
        """Return the table that takes one row per item of `signal`."""
        return self.spans if signal is Signal.TRACES else self.logs


def load(extra: Sequence[Path] = ()) -> Mapping:
    """Read the mapping files of the package, then the user's own in `extra`.

    Raises ConfigurationError, which names file, column and reason.
    """
    folder = resources.files("otel_pg_exporter.proto_mappings")
    tables = {name: _Declared(name=name) for name in _MESSAGES}
    for name in tables:
        _File.read(folder / f"{name}.toml", f"proto_mappings/{name}.toml").declare(tables)
    promoted = sorted((folder / "promoted").iterdir(), key=lambda entry: entry.name)
    for entry in promoted:
        if entry.name.endswith(".toml"):
            _File.read(entry, f"proto_mappings/promoted/{entry.name}", promoted=True).declare(tables)
    for path in extra:
        _File.read(path, str(path), promoted=True).declare(tables)
    made = {name: Table(name=name, columns=tuple(found.columns)) for name, found in tables.items()}
    return Mapping(**made, files=tuple(extra))


@dataclass(slots=True, kw_only=True)
class _Declared:
    """The columns of one table so far, and which file declared each."""

    name: str
    columns: list[Column] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)

    def add(self, column: Column, file: str) -> None:
        self.columns.append(column)
        self.origin[column.name] = file


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """One mapping file: its name as messages give it, and its parsed contents."""

    name: str
    promoted: bool
    content: dict[str, Any]

    @classmethod
    def read(cls, source: Traversable | Path, name: str, *, promoted: bool = False) -> "_File":
        try:
            content = tomllib.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{name}: cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{name}: not a TOML file: {error}") from error
        return cls(name=name, promoted=promoted, content=content)

    def declare(self, tables: dict[str, _Declared]) -> None:
        """Add this file's columns to the table that it names."""
        top = {"table", "column"} if self.promoted else {"table", "signal", "column"}
        if unknown := _first_unknown(self.content, top):
            self._fail(None, unknown)
        table = self.content.get("table")
        known = _PROMOTABLE if self.promoted else tuple(tables)
        if table not in known:
            self._fail(None, f"table is {table!r}; it must be one of {_listed(known)}")
        columns = self.content.get("column")
        if not isinstance(columns, list) or not columns or not all(isinstance(entry, dict) for entry in columns):
            self._fail(None, "declares no column; each begins with a line [[column]]")
        for number, entry in enumerate(columns, 1):
            tables[table].add(self._column(tables[table], entry, number), self.name)

    def _column(self, table: _Declared, entry: dict[str, Any], number: int) -> Column:
        name = self._column_name(table, entry.get("name"), number)
        if self.promoted and (own := sorted(entry.keys() & _OWN_KEYS - _PROMOTED_KEYS)):
            self._fail(name, f"{own[0]} may be set in the package's own tables alone, not in a promoted column")
        if unknown := _first_unknown(entry, _PROMOTED_KEYS if self.promoted else _OWN_KEYS):
            self._fail(name, unknown)
        type_ = self._type(name, entry.get("type"))
        sources = self._sources(name, entry.get("from"), table.name)
        for source in sources:
            self._check_fit(name, type_, source)
        sums = self._bool(name, entry, "sum_in_traces")
        if sums:
            self._check_sum(name, type_, table.name)
        max_bytes = entry.get("max_bytes")
        if max_bytes is not None and (type_ is not ColumnType.TEXT or type(max_bytes) is not int or max_bytes < 1):
            self._fail(name, f"max_bytes is {max_bytes!r}; it must be a positive number, on a text column")
        comment = entry.get("comment", "")
        if not isinstance(comment, str) or "\0" in comment:
            self._fail(name, "comment must be a string without NUL")
        return Column(
            name=name,
            type=type_,
            sources=sources,
            key=self._bool(name, entry, "key"),
            promoted=self.promoted,
            sum_in_traces=sums,
            max_bytes=max_bytes,
            comment=comment,
        )

    def _column_name(self, table: _Declared, name: object, number: int) -> str:
        if not isinstance(name, str):
            self._fail(number, "has no name" if name is None else f"name is {name!r}; it must be a string")
        if not _IDENTIFIER.fullmatch(name):
            self._fail(name, "the name must consist of a-z, 0-9 and _ and not begin with a digit")
        if len(name) > _MAX_IDENTIFIER:
            self._fail(name, f"the name has {len(name)} bytes; PostgreSQL keeps {_MAX_IDENTIFIER}")
        if name in table.origin:
            self._fail(name, f"table {table.name} already has this column, from {table.origin[name]}")
        if name in _SYSTEM_COLUMNS:
            self._fail(name, f"table {table.name} already has this column")
        return name

    def _type(self, column: str, value: object) -> ColumnType:
        if value is None:
            self._fail(column, "has no type")
        if not isinstance(value, str) or value not in [*ColumnType]:
            self._fail(column, f"type is {value!r}; it must be one of {_listed(ColumnType)}{_hint(value, ColumnType)}")
        return ColumnType(value)

    def _sources(self, column: str, value: object, table: str) -> tuple[Source, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            self._fail(column, "from must be a source such as span.name, or a list of sources")
        return tuple(self._source(column, text, table) for text in texts)

    def _source(self, column: str, text: str, table: str) -> Source:
        messages = _MESSAGES[table]
        if match := _ATTRIBUTE.fullmatch(text):
            message, key = match[1], self._attribute_key(column, text, match[2])
        elif match := _FIELD.fullmatch(text):
            message, key = match[1], None
        else:
            self._fail(column, f'from is {text!r}; it must read like span.name or span.attributes["key"]')
        if message not in messages:
            self._fail(
                column, f"from is {text!r}; table {table} takes {_listed(messages)} only{_hint(message, messages)}"
            )
        if key is None and match[2] not in FIELDS[message]:
            known = FIELDS[message]
            self._fail(column, f"from is {text!r}; {message} has no such field{_hint(match[2], known)}")
        if key is not None and "attributes" not in FIELDS[message]:
            self._fail(column, f"from is {text!r}; {message} has no attributes")
        return Source(message, match[2] if key is None else "attributes", key)

    def _attribute_key(self, column: str, text: str, literal: str) -> str:
        try:
            key = json.loads(literal)
        except ValueError as error:
            raise ConfigurationError(
                self._message(column, f"from is {text!r}; the attribute key is no JSON string: {error}")
            ) from error
        if not key:
            self._fail(column, f"from is {text!r}; an attribute key is never empty")
        return str(key)

    def _check_fit(self, column: str, type_: ColumnType, source: Source) -> None:
        if source.key is not None:
            if type_ not in _ATTRIBUTE_TYPES:
                self._fail(column, f"type is {type_}; an attribute fits {_listed(_ATTRIBUTE_TYPES)}")
        elif (fits := FIELDS[source.message][source.field]) is not type_:
            self._fail(column, f"type is {type_}; {source.message}.{source.field} is {fits}")

    def _check_sum(self, column: str, type_: ColumnType, table: str) -> None:
        if type_ is not ColumnType.INT8 or table != "spans":
            self._fail(column, f"sum_in_traces needs an int8 column of table spans; this is {type_} in {table}")
        if column in _TRACES_COLUMNS:
            self._fail(column, "sum_in_traces adds a column of this name to table traces, which already has one")

    def _bool(self, column: str, entry: dict[str, Any], key: str) -> bool:
        value = entry.get(key, False)
        if not isinstance(value, bool):
            self._fail(column, f"{key} is {value!r}; it must be true or false")
        return value

    def _message(self, column: str | int | None, reason: str) -> str:
        """Word an error; `column` is a name, or a number counted from 1 where there is no name."""
        if column is None:
            return f"{self.name}: {reason}"
        where = f"column number {column}" if isinstance(column, int) else f'column "{column}"'
        return f"{self.name}: {where}: {reason}"

    def _fail(self, column: str | int | None, reason: str) -> NoReturn:
        raise ConfigurationError(self._message(column, reason))


def _first_unknown(entry: dict[str, Any], known: Iterable[str]) -> str | None:
    names = sorted(known)
    for key in entry:
        if key not in names:
            return f"unknown key {key!r}; known are {_listed(names)}{_hint(key, names)}"
    return None


def _hint(value: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(str(name) for name in names)
