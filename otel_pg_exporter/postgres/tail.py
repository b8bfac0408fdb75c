"""What has arrived lately: spans and log records as they are stored, without harm to who stores them.

There is no index on `ingested_at`, and there will be none: it would cost every insert. So what is looked through is
bounded by the items' own times, which have partitions and a BRIN index, and rows are told apart by where they lie.
Transactions end in another order than they begin, and `ingested_at` is their beginning: each look goes back a little
further than the last one came, and leaves out what was seen. What was there before is looked for by the items' own
times, which have indexes: step by step further back, until there is enough of it.
"""

import datetime as dt
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any, LiteralString

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, OutageError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction

_OVERLAP = dt.timedelta(seconds=10)  # longer than most transactions take
_AHEAD = dt.timedelta(days=1)  # that a sender's clock may be ahead
_REACHES = (*(dt.timedelta(minutes=each) for each in (1, 10, 60, 24 * 60, 7 * 24 * 60)), None)  # None: all there is
_TEXT = 4_000  # characters of a body or a message that are read for a line
_ERROR = 17  # OTLP's SeverityNumber, from which on it is an error
_DOING = "a look at what arrived"

# Alike for both signals: the place of the row, then what `Item` has.
_SPANS: LiteralString = (
    "SELECT s.tableoid, s.ctid::text, s.ingested_at, s.start_time, s.start_time_ns, s.service_name, s.trace_id,"
    " s.span_id, s.name, {attributes}, s.parent_span_id, {schema}.span_kind_name(s.kind),"
    " {schema}.status_code_name(s.status_code), left(s.status_message, {text}), s.duration_ns, NULL, NULL"
    " FROM {schema}.spans AS s WHERE s.start_time >= %(from)s::timestamptz AND s.start_time < %(end)s"
)
_LOGS: LiteralString = (
    "SELECT s.tableoid, s.ctid::text, s.ingested_at, s.time, s.time_ns, s.service_name, s.trace_id,"
    " s.span_id, s.event_name, {attributes}, NULL, NULL, NULL, NULL, NULL, {schema}.severity_name(s.severity_number),"
    " left(coalesce(s.body, s.body_json::text), {text})"
    " FROM {schema}.logs AS s WHERE s.time >= %(from)s::timestamptz AND s.time < %(end)s"
)
_SINCE: LiteralString = " AND s.ingested_at > %(since)s"
_NEWEST: LiteralString = " ORDER BY s.ingested_at DESC LIMIT %(limit)s"
_LAST_SPANS: LiteralString = " ORDER BY s.start_time DESC, s.start_time_ns DESC LIMIT %(limit)s"
_LAST_LOGS: LiteralString = " ORDER BY s.time DESC, s.time_ns DESC LIMIT %(limit)s"


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

    items: list[Item]  # in the order of their times
    skipped: bool  # whether there was more than `limit`
    reached: dt.datetime | None = None  # what began before was not looked for; None: there is nothing of that kind


class Tail:
    """Looks at what arrived since the last look. Used from one thread; survives its connections."""

    def __init__(self, settings: DatabaseSettings, chosen: Filter, *, attributes: bool = False) -> None:
        """`attributes`: whether items are to have theirs."""
        self._settings = replace(settings, synchronous_commit="server")
        self._filter = chosen
        self._after: dt.datetime | None = None  # from when on the next look looks
        self._attributes = sql.SQL("s.attributes" if attributes else "NULL::jsonb")
        self._seen: dict[_Place, dt.datetime] = {}  # where rows lie, and when they were stored

    def look(self, connection: Connection, *, window: float, limit: int, timeout: float) -> Look:
        """Return what is new, the newest `limit` of it; the first look finds what is a few seconds old.

        Looked through is what began up to `window` seconds before it was stored. Takes no longer than `timeout`
        seconds. Raises DatabaseUnavailableError.
        """
        found: list[_Found] = []
        skipped = False
        with transaction(connection, replace(self._settings, statement_timeout=timeout), doing=_DOING):
            now = _now(connection)
            after = now - _OVERLAP if self._after is None else min(self._after, now)  # after a failover, clocks differ
            for signal in self._filter.signals:
                new = self._rows(
                    connection,
                    signal,
                    first=after - dt.timedelta(seconds=window),
                    end=now + _AHEAD,
                    since=after,
                    limit=limit + len(self._seen) + 1,
                    order=_NEWEST,
                )
                new = [each for each in new if each[0] not in self._seen]
                skipped |= len(new) > limit
                found += new
        found.sort(key=lambda each: (each[1].ingested_at, *_time(each)))
        skipped |= len(found) > limit
        found = found[-limit:]
        self._after = max(after, now - _OVERLAP)
        if skipped:  # or the next look would come upon the rest, out of order
            self._after = max(self._after, found[0][1].ingested_at)
        self._remember(found)
        return Look(items=[item for _, item in sorted(found, key=_time)], skipped=skipped)

    def last(
        self,
        connection: Connection,
        *,
        since: dt.datetime | None,
        window: float,
        limit: int,
        timeout: float,
        patience: float,
    ) -> Look:
        """Return what is there already, the `limit` of it whose times are the last; no look will find it again.

        With `since` what was stored since then, and began up to `window` seconds earlier. Without it the search goes
        back until it has enough; if that is more than `patience` seconds of work, as far as it came by then. Takes no
        longer than `timeout` and `patience`. Raises DatabaseUnavailableError.
        """
        began = time.monotonic()
        found: list[_Found] = []
        end = reached = None
        with transaction(connection, self._settings, doing=_DOING):
            now = _now(connection)
        for reach in _REACHES if since is None else (None,):
            first = None if reach is None else now - reach
            if since is not None:
                first = since - dt.timedelta(seconds=window)
            try:
                with transaction(connection, replace(self._settings, statement_timeout=timeout), doing=_DOING):
                    older = [
                        each
                        for signal in self._filter.signals
                        for each in self._rows(
                            connection,
                            signal,
                            first=first or "-infinity",
                            end=end or now + _AHEAD,
                            since=since,
                            limit=limit + 1 - len(found),
                            order=_LAST_SPANS if signal is Signal.TRACES else _LAST_LOGS,
                        )
                    ]
            except OutageError:
                raise
            except DatabaseUnavailableError:  # too slow
                if end is None:
                    raise
                break
            found = sorted(older, key=_time) + found
            end = reached = first
            if len(found) >= limit or time.monotonic() - began > patience:
                break
            timeout = min(timeout, patience)
        self._remember(found[-limit:])
        return Look(items=[item for _, item in found[-limit:]], skipped=len(found) > limit, reached=reached)

    def _remember(self, found: "list[_Found]") -> None:
        self._seen |= {place: item.ingested_at for place, item in found}
        if (after := self._after) is not None:
            self._seen = {place: at for place, at in self._seen.items() if at > after}

    def _rows(
        self,
        connection: Connection,
        signal: Signal,
        *,
        first: dt.datetime | str,
        end: dt.datetime,
        since: dt.datetime | None,
        limit: int,
        order: LiteralString,
    ) -> "list[_Found]":
        """Return those of a signal that began from `first` to `end` and were stored since `since`."""
        schema = self._settings.schema
        conditions, values = self._filter.conditions(signal, sql.Identifier(schema, "resources"))
        query = sql.SQL(_SPANS if signal is Signal.TRACES else _LOGS).format(
            schema=sql.Identifier(schema), attributes=self._attributes, text=_TEXT
        )
        if since is not None:
            query += sql.SQL(_SINCE)
        values |= {"from": first, "end": end, "since": since, "limit": limit}
        rows = connection.execute(query + conditions + sql.SQL(order), values).fetchall()
        return [((oid, place), Item(signal=signal, **_fields(rest))) for oid, place, *rest in rows]


_Place = tuple[int, str]
_Found = tuple[_Place, Item]


def _now(connection: Connection) -> dt.datetime:
    [(now,)] = connection.execute("SELECT now()").fetchall()
    return now  # type: ignore[no-any-return] # a timestamptz


def _time(found: _Found) -> tuple[dt.datetime, int]:
    return found[1].time, found[1].time_ns


_FIELDS = [name for name in Item.__slots__ if name != "signal"]


def _fields(row: list[Any]) -> dict[str, Any]:
    return dict(zip(_FIELDS, row, strict=True))
