"""Dead letters: which ones, what they say, and their end. Replaying them is `replay`'s."""

import datetime as dt
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction

_PAGE = 500  # letters read at once
_PURGED_AT_ONCE = 1000  # letters deleted in one transaction

_SELECT: LiteralString = (
    "SELECT id, received_at, signal, request_id, item_index, reason, sqlstate, octet_length(otlp) FROM {}"
)
_DOING = "work on dead letters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which letters: those that meet every condition that is set."""

    ids: tuple[int, ...] = ()
    signal: Signal | None = None
    since: dt.datetime | None = None  # set aside then or later
    until: dt.datetime | None = None  # set aside before then
    reason: str = ""  # somewhere in the reason, in whatever case
    sqlstate: str = ""

    @property
    def everything(self) -> bool:
        """Whether no condition is set."""
        return self == Selection()

    def condition(self) -> tuple[sql.Composable, list[object]]:
        """Return the WHERE condition and its parameters."""
        parts: list[tuple[LiteralString, object]] = []
        if self.ids:
            parts.append(("id = ANY (%s)", list(self.ids)))
        if self.signal is not None:
            parts.append(("signal = %s", self.signal.value))
        if self.since is not None:
            parts.append(("received_at >= %s", self.since))
        if self.until is not None:
            parts.append(("received_at < %s", self.until))
        if self.reason:
            parts.append(("strpos(lower(reason), lower(%s)) > 0", self.reason))
        if self.sqlstate:
            parts.append(("sqlstate = %s", self.sqlstate.upper()))
        return sql.SQL(" AND ").join(map(sql.SQL, ["true", *(part for part, _ in parts)])), [
            value for _, value in parts
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One dead letter, without its item."""

    id: int
    received_at: dt.datetime
    signal: str
    request_id: uuid.UUID
    item_index: int
    reason: str
    sqlstate: str | None
    size: int  # bytes of the one-item request


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many letters share one reason."""

    count: int
    signal: str
    sqlstate: str | None
    reason: str
    first: dt.datetime
    last: dt.datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """How many letters there are at one moment."""

    count: int
    size: int  # bytes
    newest: int  # the greatest id; letters that arrive later have greater ones


class DeadLetters:
    """The table `dead_letters`, over one connection outside of a transaction."""

    def __init__(self, connection: Connection, settings: DatabaseSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._table = sql.Identifier(settings.schema, "dead_letters")

    def total(self, selection: Selection) -> Total:
        """Count letters."""
        [(count, size, newest)] = self._rows(
            "SELECT count(*), coalesce(sum(octet_length(otlp)), 0)::int8, coalesce(max(id), 0) FROM {} WHERE {}",
            selection,
        )
        return Total(count=count, size=size, newest=newest)

    def counts(self, selection: Selection) -> list[Count]:
        """Count letters by reason, the most frequent first."""
        rows = self._rows(
            "SELECT count(*), signal, sqlstate, reason, min(received_at), max(received_at) FROM {} WHERE {}"
            " GROUP BY signal, sqlstate, reason ORDER BY 1 DESC, 2, 4",
            selection,
        )
        return [
            Count(count=count, signal=signal, sqlstate=sqlstate, reason=reason, first=first, last=last)
            for count, signal, sqlstate, reason, first, last in rows
        ]

    def newest_first(self, selection: Selection, *, limit: int | None = None) -> Iterator[Letter]:
        """Yield letters, the newest first, at most `limit` of them; memory holds a page."""
        below: int | None = None
        left = limit
        while left is None or left > 0:
            page = self._page(selection, below, _PAGE if left is None else min(left, _PAGE))
            yield from page
            if len(page) < _PAGE:
                return
            below = page[-1].id
            left = None if left is None else left - len(page)

    def _page(self, selection: Selection, below: int | None, limit: int) -> list[Letter]:
        rows = self._rows(
            _SELECT + " WHERE {} AND (%s::int8 IS NULL OR id < %s) ORDER BY id DESC LIMIT %s",
            selection,
            below,
            below,
            limit,
        )
        return [_letter(row) for row in rows]

    def oldest(self, selection: Selection, *, above: int, newest: int, limit: int) -> list[Letter]:
        """List the letters with ids above `above` and up to `newest`, the oldest first."""
        rows = self._rows(
            _SELECT + " WHERE {} AND id > %s AND id <= %s ORDER BY id LIMIT %s",
            selection,
            above,
            newest,
            limit,
        )
        return [_letter(row) for row in rows]

    def items(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Read the one-item requests of letters; those that are gone are left out."""
        return dict(self._rows("SELECT id, otlp FROM {} WHERE {}", Selection(ids=tuple(ids)))) if ids else {}

    def purge(self, selection: Selection, *, limit: int | None = None) -> Iterator[int]:
        """Delete letters for good, the oldest first, at most `limit`; yield how many each transaction deleted.

        Letters that arrive meanwhile stay.
        """
        newest = self.total(selection).newest
        left = limit
        while left is None or left > 0:
            some = _PURGED_AT_ONCE if left is None else min(left, _PURGED_AT_ONCE)
            # Locked in the order of ids: two of these must not wait for each other.
            gone = self._rows(
                "WITH chosen AS (SELECT id FROM {0} WHERE {1} AND id <= %s ORDER BY id LIMIT %s FOR UPDATE)"
                " DELETE FROM {0} AS d USING chosen WHERE d.id = chosen.id RETURNING d.id",
                selection,
                newest,
                some,
            )
            if not gone:
                return
            yield len(gone)
            left = None if left is None else left - len(gone)

    def _rows(self, query: LiteralString, selection: Selection, *parameters: object) -> list[tuple[Any, ...]]:
        condition, values = selection.condition()
        statement = sql.SQL(query).format(self._table, condition)
        with transaction(self._connection, self._settings, doing=_DOING):
            return self._connection.execute(statement, [*values, *parameters]).fetchall()


def _letter(row: tuple[Any, ...]) -> Letter:
    return Letter(**dict(zip(Letter.__slots__, row, strict=True)))
