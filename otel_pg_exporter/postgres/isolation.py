"""Finds the bad rows of a batch without letting them cost their neighbours, inside the batch's one transaction.

PostgreSQL names the row at which a binary COPY failed. That row is set aside, the rows before and after it are copied
again; when it keeps happening, or the server names no row, chunks are halved; small chunks go in row by row. A row is
refused only after it failed alone.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import psycopg

from otel_pg_exporter.errors import DeploymentError
from otel_pg_exporter.postgres.merge import Merged, Tally
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, copy_line, reason

_ROW_BY_ROW = 16  # rows: below this, halving costs more round trips than it saves
_NAMED_LIMIT = 100  # rows set aside by name; beyond that halving is as quick [measured per 10,000 rows]
_SAMPLE = 16  # rows tried alone before a failing control row is believed


def refuses_all(table: str, failure: psycopg.Error) -> DeploymentError:
    """Say that not even a row that is valid by the mapping is taken."""
    return DeploymentError(
        f"PostgreSQL refuses every row of {table}, valid ones too: {reason(failure)} ({failure.sqlstate});"
        " compare the tables with `otel-pg-exporter migrate --check`"
    )


class RowStore(Protocol):
    """What isolation needs of a transaction. Each method raises psycopg.Error."""

    @property
    def broken(self) -> bool:
        """Whether the connection is lost."""

    def savepoint(self) -> contextlib.AbstractContextManager[None]:
        """Undo what happens inside when an error leaves it."""

    def copy(self, rows: Sequence[int]) -> None:
        """COPY rows; fails at the first that is bad or already there."""

    def insert(self, rows: Sequence[int]) -> frozenset[bytes] | None:
        """INSERT rows around those that are there; return the inserted keys, None where the table has none."""

    def probe(self) -> None:
        """INSERT a row that is valid by the mapping, whatever the senders sent, and undo it."""


class Isolation:
    """One search for the bad rows of a batch."""

    def __init__(self, store: RowStore, merged: Merged, tally: Tally) -> None:
        self._store = store
        self._merged = merged
        self._tally = tally
        self._copying = True  # until a duplicate, or a row that only COPY refuses, shows that INSERT is needed
        self._suspects: set[int] = set()  # rows that a COPY failed at

    def run(self, rows: Sequence[int]) -> None:
        """Store every good row and note every bad one in the tally.

        Raises DeploymentError when the fault lies with the table and not with the rows, and psycopg.Error for
        anything that is about neither.
        """
        # Holds the table as it is until the transaction ends. A savepoint that is undone lets go of its locks, and the
        # table could be mended or damaged between the verdict on it and those on rows.
        self._store.insert(())
        pending = list(self._after_sampling(rows))
        while pending:
            chunk = pending.pop()
            if len(chunk) <= _ROW_BY_ROW:
                for row in chunk:
                    if self._judge(row) and row in self._suspects:
                        self._copying = False
            else:
                pending.extend(reversed(list(self._store_or_split(chunk))))

    def _after_sampling(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """Rule out that the table itself is at fault, which no search through the rows could find."""
        failure = self._control_failure()
        if failure is None:
            yield rows
            return
        sample = rows[:: max(1, len(rows) // _SAMPLE)]
        accepted = sum(map(self._judge, sample))
        if accepted == 0:
            raise refuses_all(self._merged.signal.table, failure) from failure
        judged = set(sample)
        yield [row for row in rows if row not in judged]

    def _control_failure(self) -> psycopg.Error | None:
        try:
            self._store.probe()
        except psycopg.Error as exc:
            self._reraise_unless_data(exc)
            return exc
        return None

    def _store_or_split(self, chunk: Sequence[int]) -> Iterator[Sequence[int]]:
        """Store a chunk, or yield the pieces that still have to be stored."""
        try:
            with self._store.savepoint():
                if self._copying:
                    self._store.copy(chunk)
                    inserted = None
                else:
                    inserted = self._store.insert(chunk)
        except psycopg.Error as exc:
            if self._copying and classify(exc, broken=self._store.broken) is Verdict.DUPLICATE:
                self._copying = False
                yield chunk
                return
            self._reraise_unless_data(exc)
            yield from self._split(chunk, copy_line(exc) if self._copying else None)
        else:
            self._tally.store(chunk, inserted)

    def _split(self, chunk: Sequence[int], line: int | None) -> Iterator[Sequence[int]]:
        if line is None or not 1 <= line <= len(chunk) or len(self._suspects) >= _NAMED_LIMIT:
            middle = len(chunk) // 2
            yield chunk[:middle]
            yield chunk[middle:]
            return
        self._suspects.add(chunk[line - 1])
        # The good rows before it first: rows are locked in key order.
        yield chunk[: line - 1]
        yield chunk[line - 1 : line]
        yield chunk[line:]

    def _judge(self, row: int) -> bool:
        """Try a row alone, and when it is refused those with the same key, in turn; say whether one went in."""
        for candidate in self._merged.alternatives(row):
            if candidate in self._tally.rejected:
                continue
            try:
                with self._store.savepoint():
                    inserted = self._store.insert([candidate])
            except psycopg.Error as exc:
                self._reraise_unless_data(exc)
                self._tally.reject(candidate, reason(exc), exc.sqlstate)
            else:
                self._tally.store([candidate], inserted)
                return True
        return False

    def _reraise_unless_data(self, error: psycopg.Error) -> None:
        if classify(error, broken=self._store.broken) not in {Verdict.DATA, Verdict.DUPLICATE}:
            raise error
