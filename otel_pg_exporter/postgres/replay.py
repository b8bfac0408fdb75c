"""Dead letters written once more, by the writer's own path, and gone from their table in the same transaction.

There is no moment at which an item is both stored and still a letter, or neither: not between two statements, not
after a crash, and not when two of these run at once. Log records have no key, so their letter, locked, is what makes
them idempotent, as the ledger is for requests.
"""

import contextlib
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, OutageError, UndecodableError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import ColumnType, Outcome, Rejection, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.retry import Backoff
from otel_pg_exporter.postgres import statements
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.dead_letters import DeadLetters, Letter, Selection
from otel_pg_exporter.postgres.transaction import Transaction
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.telemetry import Statistics
from otel_pg_exporter.transcode import compile_plan, transcode

_LETTERS_AT_ONCE = 500  # in one transaction
_BYTES_AT_ONCE = 8 * 1024 * 1024  # in one transaction; a single larger letter still goes
_ATTEMPTS = 5  # where another transaction was in the way

_KEY_TYPES = (ColumnType.UUID, ColumnType.INT8)
_REFUSED_TYPES = (*_KEY_TYPES, ColumnType.TEXT, ColumnType.TEXT)

# In the order of ids, as `purge` locks them.
_LOCK = sql.SQL(
    "SELECT d.request_id, d.item_index FROM {0} AS d JOIN {1} AS u(request_id, item_index)"
    " USING (request_id, item_index) WHERE d.signal = %s ORDER BY d.id FOR UPDATE OF d"
)
_DELETE = sql.SQL(
    "DELETE FROM {0} AS d USING {1} AS u(request_id, item_index)"
    " WHERE d.request_id = u.request_id AND d.item_index = u.item_index AND d.signal = %s"
)
_UPDATE = sql.SQL(
    "UPDATE {0} AS d SET reason = u.reason, sqlstate = nullif(u.sqlstate, '')"
    " FROM {1} AS u(request_id, item_index, reason, sqlstate)"
    " WHERE d.request_id = u.request_id AND d.item_index = u.item_index AND d.signal = %s"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What became of letters so far."""

    stored: int = 0
    duplicate: int = 0  # stored before: by a sender's retry, or another replay
    refused: int = 0  # still letters

    @property
    def done(self) -> int:
        """How many were tried."""
        return self.stored + self.duplicate + self.refused

    def plus(self, outcomes: Sequence[Outcome]) -> "Progress":
        """Add the outcomes of one transaction."""
        return Progress(
            stored=self.stored + sum(each.stored for each in outcomes),
            duplicate=self.duplicate + sum(each.duplicate for each in outcomes),
            refused=self.refused + sum(each.rejected for each in outcomes),
        )


class ReplayTransaction(Transaction):
    """Writes letters: each batch is one letter's item, named by its first request's id and its index there."""

    def _claim_requests(self) -> None:
        """Leave the ledger alone: the letters' requests are in it, with the answer that their senders heard."""

    def _amend_requests(self, outcomes: Sequence[Outcome]) -> None:
        """As above."""

    def _put_rows(self) -> None:
        """Lock the letters first. A log record without its letter is stored already, or was purged."""
        self.phase = "dead letters"
        keys = [_key(batch) for batch in self._merged.batches]
        there = {(request_id.bytes, item) for request_id, item in self._on_letters(_LOCK, _KEY_TYPES, sorted(keys))}
        if self._merged.signal is Signal.LOGS:
            for index, batch in enumerate(self._merged.batches):
                if (batch.request_id, _item(batch)) not in there:
                    self._tally.replayed[index] = Outcome(duplicate=1)
        super()._put_rows()

    def _put_dead_letters(self) -> None:
        """Delete the letters whose items are stored; give the others the new reason."""
        self.phase = "dead letters"
        settled: list[tuple[bytes, bytes]] = []
        refused: dict[tuple[bytes, bytes], Rejection] = {}
        for index, batch in enumerate(self._merged.batches):
            rejections = self._tally.rejections(index)
            if rejections:
                refused[_key(batch)] = rejections[0]
            else:
                settled.append(_key(batch))
        if settled:
            self._on_letters(_DELETE, _KEY_TYPES, sorted(settled))
        if refused:
            rows = [
                (*key, refused[key].reason.encode(), (refused[key].sqlstate or "").encode()) for key in sorted(refused)
            ]
            self._on_letters(_UPDATE, _REFUSED_TYPES, rows)

    def _on_letters(
        self, statement: sql.SQL, types: Sequence[ColumnType], rows: Sequence[Sequence[bytes | None]]
    ) -> list[tuple[Any, ...]]:
        table = sql.Identifier(self._compiled.schema, "dead_letters")
        query = statement.format(table, statements.unnest(types)).as_bytes()
        cursor = self._execute(query, [*statements.arrays(types, rows), self._merged.signal.value])
        return cursor.fetchall() if cursor.description else []


def _item(batch: RowBatch) -> int:
    return batch.items[0] if batch.items else batch.rejected[0].item


def _key(batch: RowBatch) -> tuple[bytes, bytes]:
    return batch.request_id, struct.pack("!q", _item(batch))


class Replay:
    """Replays the letters of one schema."""

    def __init__(self, settings: ServeSettings, mapping: Mapping, connections: Connections) -> None:
        self._settings = settings
        self._connections = connections
        self._writer = Writer(connections, mapping, settings.writer, Statistics(), transaction=ReplayTransaction)
        self._window = Window(past=settings.mapping.window_past, future=settings.mapping.window_future)
        self._plans = {signal: compile_plan(mapping, signal, self._window) for signal in Signal}

    def run(self, selection: Selection, *, limit: int | None = None) -> Iterator[Progress]:
        """Replay letters, the oldest first, at most `limit`; yield after each transaction what was done so far.

        Letters that arrive meanwhile are left alone. Raises DatabaseUnavailableError; what was yielded before is done.
        """
        progress = Progress()
        for letters in self._groups(selection, limit):
            with self._letters() as table:
                items = table.items([letter.id for letter in letters])
            batches = []
            for letter in letters:
                if letter.id in items:  # else it was purged or replayed meanwhile
                    batch = self._batch(letter, items[letter.id])
                    if isinstance(batch, Outcome):
                        progress = progress.plus([batch])
                    else:
                        batches.append(batch)
            if batches:
                progress = progress.plus(self._write(batches))
            yield progress

    @contextlib.contextmanager
    def _letters(self) -> Iterator[DeadLetters]:
        database = self._settings.database
        with self._connections.borrow(database.connect_timeout) as connection:
            yield DeadLetters(connection, database)

    def _groups(self, selection: Selection, limit: int | None) -> Iterator[list[Letter]]:
        """Group letters for one transaction each: of one signal, and bounded in number and bytes."""
        with self._letters() as table:
            newest = table.total(selection).newest
        left, above = limit, 0
        while left is None or left > 0:
            with self._letters() as table:
                page = table.oldest(
                    selection,
                    above=above,
                    newest=newest,
                    limit=_LETTERS_AT_ONCE if left is None else min(left, _LETTERS_AT_ONCE),
                )
            if not page:
                return
            for signal in Signal:
                yield from _bounded([letter for letter in page if letter.signal == signal.value])
            above = page[-1].id
            left = None if left is None else left - len(page)

    def _batch(self, letter: Letter, otlp: bytes) -> RowBatch | Outcome:
        """Make a batch of a letter, or its refusal where not even that is possible."""
        signal, now = Signal(letter.signal), time.time_ns()
        if signal is Signal.LOGS:
            # A record without a time of its own has that of its receipt, unless that day may be gone.
            received = int(letter.received_at.timestamp() * 1e9)
            now = max(received, now - int(self._window.past * 1e9))
        try:
            batch = transcode(self._plans[signal], otlp, now_ns=now, request_id=letter.request_id.bytes)
        except UndecodableError as exc:
            return Outcome(rejected=1, error_message=str(exc))
        if batch.item_count != 1:
            return Outcome(rejected=1, error_message=f"holds {batch.item_count} {signal.items} instead of one")
        return replace(
            batch,
            items=[letter.item_index] * len(batch.rows),
            rejected=[replace(rejection, item=letter.item_index) for rejection in batch.rejected],
        )

    def _write(self, batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        backoff = Backoff(threading.Event())
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._writer.write(batches)
            except OutageError:
                raise
            except DatabaseUnavailableError:
                backoff.wait()
        return self._writer.write(batches)


def _bounded(letters: Sequence[Letter]) -> Iterator[list[Letter]]:
    group: list[Letter] = []
    size = 0
    for letter in letters:
        if group and size + letter.size > _BYTES_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(letter)
        size += letter.size
    if group:
        yield group
