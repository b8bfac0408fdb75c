"""`traces` held against the spans, and repaired beside live writers.

Writers commit spans and their `traces` rows together, so a statement that reads both sees them agree, whatever is under
way: nothing needs a lock to be compared. Time is walked in slices. In each, all traces are compared at once with what
the slice's spans say. Those that differ may only reach beyond the slice. If they have spans in DEFAULT, whose times may
be far from any slice, they are compared once more, all at once, with these and the slice's. What differs then is
searched trace by trace, in all that lies between the row's own times, and is wrong if it still differs.

A repair locks the row first, and reads the spans, in all partitions, in a statement after that. What others had
committed by then is seen; what they commit later, they add to the repaired row.
"""

import contextlib
import datetime as dt
import enum
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction
from otel_pg_exporter.postgres.verify_statements import VerifyStatements, lock_default, traces_columns

# A slice is doubled or halved, by how many rows of `traces` the last one had.
_FIRST_SLICE = dt.timedelta(hours=1)
_LEAST_SLICE, _GREATEST_SLICE = dt.timedelta(minutes=1), dt.timedelta(days=1)
_FEW_ROWS, _MANY_ROWS = 20_000, 200_000

_SUSPECTS = 50_000  # a slice with more is read again for the rest
_OUTLIERS = 500_000  # traces with spans in DEFAULT that are kept in mind, 150 bytes each
_COMPARED_AT_ONCE = 200  # suspects in one statement, within their rows' own times

_DOING = "verify"
_NONE = uuid.UUID(int=0)  # less than any trace id
_EVER = dt.datetime.max.replace(tzinfo=dt.UTC)
_NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)


class Kind(enum.StrEnum):
    """What is wrong with a row of `traces`."""

    MISSING = "missing"  # there are spans, but no row
    SUPERFLUOUS = "superfluous"  # there is a row, but no span
    DIFFERENT = "different"


class ColumnDifference(NamedTuple):
    """One column: what stands in `traces`, and what the spans say; PostgreSQL's spelling, times in UTC.

    Without a repair, these are the spans between the row's own times and in the slice at hand, which need not be all.
    """

    name: str
    stored: str | None
    exact: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One trace whose row is not what its spans say."""

    trace_id: uuid.UUID
    kind: Kind
    columns: tuple[ColumnDifference, ...]  # those that differ; of a missing or superfluous row all that are not NULL
    fixed: bool = False


class _Compared(NamedTuple):
    """A trace whose row differs from what was read of its spans."""

    trace_id: uuid.UUID
    has_row: bool
    has_spans: bool
    dropped: bool  # by retention, perhaps: spans that lay before the oldest partition, or beyond the newest in DEFAULT
    counted: bool  # as such, by `count_dropped`
    stored: list[str | None]
    exact: list[str | None]
    differing: list[bool]


class Verification:
    """One walk through time; the connection must be outside of a transaction."""

    def __init__(
        self,
        connection: Connection,
        settings: DatabaseSettings,
        *,
        since: dt.datetime,
        until: dt.datetime | None = None,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._since = since
        self._until = until or _EVER
        self._walked_since = self._since  # where the first slice begins
        self._outliers: set[uuid.UUID] = set()  # those with spans in DEFAULT that no slice has found to differ so far
        self._seen: set[uuid.UUID] = set()  # those that differ or were skipped, which later slices meet again
        self.checked = 0  # rows of `traces`
        self.skipped = 0  # traces of which retention may have taken spans
        # Partitions of a day that are being made take rows out of DEFAULT.
        self._lock_default = lock_default(settings.schema)
        self._statements = self._compile()

    def run(
        self, *, fix: bool = False, report: Callable[[dt.datetime], None] = lambda _moment: None
    ) -> Iterator[Difference]:
        """Yield each difference once, when asked to after its repair; `report` hears how far the walk has come.

        Raises DatabaseUnavailableError.
        """
        judge = self._fix if fix else self._tell
        for outliers in self._pages_of_outliers():
            room = _OUTLIERS - len(self._outliers)
            self._outliers.update(outliers[:room])
            yield from judge(self._suspects(outliers[room:], _EVER, _NEVER))
        for since, until in self._slices():
            for suspects in self._slice(since, until):
                yield from judge(self._suspects(suspects, since, until))
            report(until)
        yield from judge(self._suspects(sorted(self._outliers), _EVER, _NEVER))

    # What there is to compare.

    def _compile(self) -> VerifyStatements:
        with self._transaction():
            rows = self._connection.execute(traces_columns(self._settings.schema)).fetchall()
        return VerifyStatements(self._settings.schema, dict(rows))

    def _slices(self) -> Iterator[tuple[dt.datetime, dt.datetime]]:
        """Cut the time that has partitions into slices; what lies before is counted, what lies after is one."""
        [(horizon, ceiling)] = self._rows(self._statements.bounds)
        start, length = min(max(self._since, horizon), self._until), _FIRST_SLICE
        self._walked_since = start
        if self._since < start:
            [(count,)] = self._rows(self._statements.count_dropped, since=self._since, until=start)
            self.skipped += count
        while start < self._until:
            end = min(start + length, self._until) if start < ceiling else self._until
            checked = self.checked
            yield start, end
            start, rows = end, self.checked - checked
            if rows < _FEW_ROWS:
                length = min(length * 2, _GREATEST_SLICE)
            elif rows > _MANY_ROWS:
                length = max(length / 2, _LEAST_SLICE)

    def _slice(self, since: dt.datetime, until: dt.datetime) -> Iterator[list[uuid.UUID]]:
        """Yield the traces that differ from what this slice's spans and those in DEFAULT say."""
        after = _NONE
        outliers: set[uuid.UUID] = set()
        while True:
            (_, count), *rows = self._rows(
                self._statements.compare_slice,
                since=since,
                until=until,
                walked_since=self._walked_since,
                outliers=list(outliers),
                after=after,
                limit=_SUSPECTS,
            )
            suspects = [trace_id for trace_id, _ in rows]
            # One slice alone may find that a trace agrees with its spans and those in DEFAULT. To any other slice that
            # has spans of it, it is a suspect, and searched by itself.
            if found := self._outliers.intersection(suspects):
                self._outliers -= found
                outliers |= found
                continue
            self.checked += count if after == _NONE else 0
            yield suspects
            if len(suspects) < _SUSPECTS:
                return
            after = suspects[-1]

    def _pages_of_outliers(self) -> Iterator[list[uuid.UUID]]:
        """Yield the traces of which spans lie in DEFAULT: their times may be far from any slice."""
        after = _NONE
        while True:
            rows = self._rows(
                self._statements.outliers, since=self._since, until=self._until, after=after, limit=_SUSPECTS
            )
            yield [trace_id for (trace_id,) in rows]
            if len(rows) < _SUSPECTS:
                return
            (after,) = rows[-1]

    # How they are compared.

    def _suspects(self, traces: Sequence[uuid.UUID], since: dt.datetime, until: dt.datetime) -> Iterator[_Compared]:
        """Yield the traces that differ also from what lies between their row's own times, and in this slice.

        These are wrong for certain: all spans of a right row lie between its times.
        """
        left = [each for each in traces if each not in self._seen]
        for first in range(0, len(left), _COMPARED_AT_ONCE):
            with self._transaction():
                compared = self._differing(left[first : first + _COMPARED_AT_ONCE], since, until)
            yield from compared

    def _tell(self, suspects: Iterable[_Compared]) -> Iterator[Difference]:
        for suspect in suspects:
            if (difference := self._judged(suspect)) is not None:
                yield difference

    def _differing(self, traces: Sequence[uuid.UUID], since: dt.datetime, until: dt.datetime) -> list[_Compared]:
        parameters = {"ids": list(traces), "since": since, "until": until, "counted_from": self._since}
        return [_Compared(*row) for row in self._connection.execute(self._statements.compare_traces, parameters)]

    def _judged(self, compared: _Compared, *, missing: bool | None = None) -> Difference | None:
        """Make a difference of what was compared, or count it as one that cannot be judged."""
        self._seen.add(compared.trace_id)
        if compared.dropped:
            self.skipped += not compared.counted
            return None
        has_row = compared.has_row if missing is None else not missing
        kind = Kind.MISSING if not has_row else Kind.DIFFERENT if compared.has_spans else Kind.SUPERFLUOUS
        stored = compared.stored if has_row else [None] * len(compared.stored)
        columns = zip(self._statements.columns, stored, compared.exact, compared.differing, strict=True)
        return Difference(
            trace_id=compared.trace_id,
            kind=kind,
            columns=tuple(ColumnDifference(name, old, new) for name, old, new, differs in columns if differs),
        )

    # How they are repaired.

    def _fix(self, suspects: Iterable[_Compared]) -> Iterator[Difference]:
        for suspect in suspects:
            if (difference := self._fix_one(suspect.trace_id)) is not None:
                yield difference

    def _fix_one(self, trace_id: uuid.UUID) -> Difference | None:
        """Repair one row, in a transaction that locks no other."""
        compiled, execute = self._statements, self._connection.execute
        with self._transaction():
            # A row that is missing must be there to be locked. Nobody else sees it before it says what it must.
            missing = execute(compiled.insert_neutral, [trace_id]).rowcount == 1
            execute(compiled.lock_row, [trace_id])
            found = self._differing([trace_id], _NEVER, _EVER)
            if missing and not found[0].has_spans:  # somebody has deleted both meanwhile
                execute(compiled.delete_row, [trace_id])
                return None
            difference = self._judged(found[0], missing=missing) if found else None
            if difference is None:
                return None
            if difference.kind is Kind.SUPERFLUOUS:
                execute(compiled.delete_row, [trace_id])
            else:
                execute(compiled.update_row, [*found[0].exact, trace_id])
        self._seen.discard(trace_id)  # no later slice finds it to differ
        return replace(difference, fixed=True)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Begin, and keep rows from moving out of DEFAULT: not between a statement's plan and its snapshot."""
        with transaction(self._connection, self._settings, doing=_DOING) as connection:
            connection.execute(self._lock_default)
            yield

    def _rows(self, statement: sql.Composed, **parameters: object) -> list[tuple[Any, ...]]:
        with self._transaction():
            return self._connection.execute(statement, parameters).fetchall()
