"""What has arrived lately: spans and log records as they are stored, without harm to who stores them.

There is no index on `ingested_at`, and there will be none: it would cost every insert. So what is looked through is
bounded by the items' own times, which have partitions and a BRIN index, and rows are told apart by where they lie.
Transactions end in another order than they begin, and `ingested_at` is their beginning: each look goes back a little
further than the last one came, and leaves out what was seen.
"""

import datetime as dt
import uuid
from dataclasses import dataclass, replace
from typing import Any, LiteralString

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction

_OVERLAP = dt.timedelta(seconds=10)  # longer than most transactions take
_TEXT = 4_000  # characters of a body or a message that are read for a line
_ERROR = 17  # OTLP's SeverityNumber, from which on it is an error
_DOING = "a look at what arrived"

# Alike for both signals: the place of the row, then what `Item` has.
_SPANS: LiteralString = (
    "SELECT s.tableoid, s.ctid::text, s.ingested_at, s.start_time, s.start_time_ns, s.service_name, s.trace_id,"
    " s.span_id, s.name, {attributes}, s.parent_span_id, {schema}.span_kind_name(s.kind),"
    " {schema}.status_code_name(s.status_code), left(s.status_message, {text}), s.duration_ns, NULL, NULL"
    " FROM {schema}.spans AS s WHERE s.start_time >= %(after)s::timestamptz - %(window)s"
    " AND s.start_time < now() + interval '1 day'"
)
_LOGS: LiteralString = (
    "SELECT s.tableoid, s.ctid::text, s.ingested_at, s.time, s.time_ns, s.service_name, s.trace_id,"
    " s.span_id, s.event_name, {attributes}, NULL, NULL, NULL, NULL, NULL, {schema}.severity_name(s.severity_number),"
    " left(coalesce(s.body, s.body_json::text), {text})"
    " FROM {schema}.logs AS s WHERE s.time >= %(after)s::timestamptz - %(window)s AND s.time < now() + interval '1 day'"
)
_NEWEST: LiteralString = " AND s.ingested_at > %(after)s ORDER BY s.ingested_at DESC LIMIT %(limit)s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which items: those that meet every condition that is set."""

    signals: frozenset[Signal] = frozenset(Signal)
    service: str = ""
    name: str = ""  # somewhere in a span's or an event's name, in whatever case
    text: str = ""  # somewhere in a name, a status message or a body, in whatever case
    errors: bool = False  # spans with status error, log records from severity error on
    min_severity: int = 0  # OTLP's SeverityNumber; of log records
    traces: tuple[uuid.UUID, uuid.UUID] | None = None  # trace ids from the one to the other
    attributes: tuple[tuple[str, str], ...] = ()  # keys and values, of the item or its resource

    def conditions(self, signal: Signal, resources: sql.Identifier) -> tuple[sql.Composable, dict[str, object]]:
        """Return what follows in WHERE, and its parameters."""
        spans = signal is Signal.TRACES
        parts: list[LiteralString] = []
        values: dict[str, object] = {}
        if self.service:
            parts.append("s.service_name = %(service)s")
        if self.name:
            name: LiteralString = "s.name" if spans else "s.event_name"
            parts.append("strpos(lower(" + name + "), lower(%(name)s)) > 0")
        if self.text:
            text: LiteralString = (
                "s.name || ' ' || s.status_message"
                if spans
                else "s.event_name || ' ' || coalesce(s.body, s.body_json::text, '')"
            )
            parts.append("strpos(lower(" + text + "), lower(%(text)s)) > 0")
        if self.errors:
            parts.append("s.status_code = 2" if spans else "s.severity_number >= %(error)s")
        if self.min_severity and not spans:
            parts.append("s.severity_number >= %(min_severity)s")
        if self.traces is not None:
            parts.append("s.trace_id BETWEEN %(first)s AND %(last)s")
            values["first"], values["last"] = self.traces
        composed: list[sql.Composable] = [sql.SQL(part) for part in parts]
        for number, (key, value) in enumerate(self.attributes):
            values |= {f"key{number}": key, f"value{number}": value}
            composed.append(
                sql.SQL(
                    "(s.attributes ->> {key} = {value} OR s.resource_id IN"
                    " (SELECT resource_id FROM {resources} WHERE attributes ->> {key} = {value}))"
                ).format(
                    key=sql.Placeholder(f"key{number}"), value=sql.Placeholder(f"value{number}"), resources=resources
                )
            )
        values |= {
            "service": self.service,
            "name": self.name,
            "text": self.text,
            "error": _ERROR,
            "min_severity": self.min_severity,
        }
        return sql.SQL("").join(sql.SQL(" AND ") + part for part in composed), values


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One span or log record; what the other signal has is None."""

    signal: Signal
    ingested_at: dt.datetime
    time: dt.datetime  # a span's start
    time_ns: int  # nanoseconds beyond the microseconds
    service_name: str | None
    trace_id: uuid.UUID | None
    span_id: bytes | None
    name: str  # the span's, or the event's
    attributes: dict[str, Any] | None  # only where they are asked for
    parent_span_id: bytes | None
    kind: str | None
    status: str | None
    status_message: str | None
    duration_ns: int | None
    severity: str | None
    body: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look has found."""

    items: list[Item]  # in the order in which they were stored
    skipped: bool  # whether there was more than `limit`


class Tail:
    """Looks at what arrived since the last look. Used from one thread; survives its connections."""

    def __init__(
        self, settings: DatabaseSettings, chosen: Filter, *, after: dt.datetime, attributes: bool = False
    ) -> None:
        """`after`: from when on the first look looks; if that is yet to come, from now on."""
        self._settings = replace(settings, synchronous_commit="server")
        self._filter = chosen
        self._after = after
        self._attributes = sql.SQL("s.attributes" if attributes else "NULL::jsonb")
        self._seen: dict[tuple[int, str], dt.datetime] = {}  # where rows lie, and when they were stored

    def look(self, connection: Connection, *, window: float, limit: int, timeout: float) -> Look:
        """Return what is new, the newest `limit` of it.

        Looked through is what began up to `window` seconds before it was stored. Takes no longer than `timeout`
        seconds. Raises DatabaseUnavailableError.
        """
        settings = replace(self._settings, statement_timeout=timeout)
        found: list[tuple[tuple[int, str], Item]] = []
        skipped = False
        with transaction(connection, settings, doing=_DOING):
            [(now,)] = connection.execute("SELECT now()").fetchall()
            self._after = min(self._after, now)  # another machine's clock may be ahead
            for signal in self._filter.signals:
                rows = self._rows(connection, signal, window, limit + len(self._seen) + 1)
                new = [((oid, place), Item(signal=signal, **_fields(rest))) for oid, place, *rest in rows]
                new = [each for each in new if each[0] not in self._seen]
                skipped |= len(new) > limit
                found += new
        found.sort(key=lambda each: (each[1].ingested_at, each[1].time, each[1].time_ns))
        skipped |= len(found) > limit
        found = found[-limit:]
        self._after = max(self._after, now - _OVERLAP)
        if skipped:  # or the next look would come upon the rest, out of order
            self._after = max(self._after, found[0][1].ingested_at)
        self._seen |= {place: item.ingested_at for place, item in found}
        self._seen = {place: at for place, at in self._seen.items() if at > self._after}
        return Look(items=[item for _, item in found], skipped=skipped)

    def _rows(self, connection: Connection, signal: Signal, window: float, limit: int) -> list[tuple[Any, ...]]:
        schema = self._settings.schema
        conditions, values = self._filter.conditions(signal, sql.Identifier(schema, "resources"))
        query = sql.SQL(_SPANS if signal is Signal.TRACES else _LOGS).format(
            schema=sql.Identifier(schema), attributes=self._attributes, text=_TEXT
        )
        values |= {"after": self._after, "window": dt.timedelta(seconds=window), "limit": limit}
        return connection.execute(query + conditions + sql.SQL(_NEWEST), values).fetchall()


_FIELDS = [name for name in Item.__slots__ if name != "signal"]


def _fields(row: list[Any]) -> dict[str, Any]:
    return dict(zip(_FIELDS, row, strict=True))
