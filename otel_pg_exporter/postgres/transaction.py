"""One attempt to write a merged batch: one transaction, from BEGIN to COMMIT.

Rows are locked in one order everywhere: resources, ledger, spans or logs, traces, dead letters, each sorted by key.
Writers that keep to it cannot deadlock.
"""

import contextlib
import enum
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.mapping import Mapping as ColumnMapping
from otel_pg_exporter.model import ColumnType, Outcome, Signal, rejection_message
from otel_pg_exporter.postgres import statements, traces
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.copy_in import copy_in
from otel_pg_exporter.postgres.isolation import Isolation, refuses_all
from otel_pg_exporter.postgres.merge import Merged, Tally
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, reason
from otel_pg_exporter.telemetry import Stage, StageClock
from otel_pg_exporter.transcode.copy_format import control_row
from otel_pg_exporter.transcode.values import pg_time

_LETTERS_SLICE = 4 * 2**20  # bytes of dead letters in one statement, which holds them three times
_LETTER_OVERHEAD = 500  # bytes that one takes beside its item and reason


class Method(enum.Enum):
    """How rows go into their table, from the quickest to the most forgiving."""

    COPY = "copy"  # straight into the table; fails when a row is bad or already there
    STAGE = "stage"  # COPY into a temporary table, and from there around the rows that are in the table already
    INSERT = "insert"  # the same without a temporary table or COPY, and slower; both fail when a row is bad
    ISOLATE = "isolate"  # around duplicates and bad rows


class Statements:
    """Every statement of the write path, compiled once for a schema and a mapping.

    As bytes: to put them together again took a quarter of a millisecond a batch.
    """

    def __init__(self, settings: DatabaseSettings, mapping: ColumnMapping) -> None:
        self.schema = schema = settings.schema
        self.begin = statements.begin(settings).as_bytes()
        self.tables = {signal: statements.TableStatements(schema, mapping.table(signal)) for signal in Signal}
        self.columns = {signal: mapping.table(signal) for signal in Signal}
        self.resources = mapping.resources
        self.upsert_resources = statements.upsert_resources(schema, mapping.resources).as_bytes()
        self.upsert_traces = statements.upsert_traces(schema, mapping.spans.sums).as_bytes()
        self.sum_count = len(mapping.spans.sums)
        self.claim_requests = statements.claim_requests(schema).as_bytes()
        self.read_requests = statements.read_requests(schema).as_bytes()
        self.amend_request = statements.amend_request(schema).as_bytes()
        self.insert_dead_letters = statements.insert_dead_letters(schema).as_bytes()


class BadTracesError(Exception):
    """Some `traces` rows cannot be written: the batch must be tried again without these traces' spans."""

    def __init__(self, refusals: Mapping[bytes, tuple[str, str | None]]) -> None:
        super().__init__(f"{len(refusals)} traces refused")
        self.refusals = refusals  # trace id to reason and SQLSTATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A committed batch."""

    outcomes: list[Outcome]
    resources: frozenset[bytes]  # ids that it wrote
    met_duplicates: bool  # rows that an earlier batch had stored
    bytes: int  # of row data sent
    rejections: Mapping[str, int]  # by `Rejection.kind`
    dead_letters: int
    ends: Sequence[int]  # when some of the traces ended, in PostgreSQL's microseconds
    stages: Mapping[Stage, float]  # seconds


class Transaction:
    """Writes one merged batch over one connection, once; when that fails, `phase` says where and `method` how."""

    def __init__(
        self,
        connection: Connection,
        compiled: Statements,
        merged: Merged,
        *,
        method: Method,
        new_resources: Sequence[bytes],
        refused_traces: Mapping[bytes, tuple[str, str | None]],
    ) -> None:
        self.phase = "BEGIN"
        self._connection, self._compiled = connection, compiled
        self._table = compiled.tables[merged.signal]
        self._merged = merged
        self.method = method
        self._new_resources = new_resources
        self._tally = Tally(merged)
        self._refused_resources: set[bytes] = set()
        self._bytes = self._dead_letters = 0
        self._rejections: Counter[str] = Counter()
        self._ends: Sequence[int] = ()
        self._clock = StageClock()
        for row, facts in enumerate(merged.facts if refused_traces else ()):
            if facts.trace_id in refused_traces:
                self._tally.reject(row, *refused_traces[facts.trace_id])

    def run(self) -> Written:
        """Write and commit; the batch is in the database when this returns.

        Raises psycopg.Error, BadTracesError or DeploymentError; nothing is stored then, unless the COMMIT was lost.
        """
        measure = self._clock.measure
        with measure(Stage.RESOURCES):
            self._connection.execute(self._compiled.begin)
        try:
            with measure(Stage.RESOURCES):
                self._put_resources()
            if self._merged.signal is Signal.LOGS:
                with measure(Stage.LEDGER):
                    self._claim_requests()
            with measure(Stage.COPY):
                self._put_rows()
            if self._merged.signal is Signal.TRACES:
                with measure(Stage.TRACES):
                    self._put_traces()
            with measure(Stage.DEAD_LETTERS):
                self._put_dead_letters()
            outcomes = self._tally.outcomes()
            if self._merged.signal is Signal.LOGS:
                self._amend_requests(outcomes)
        except BaseException:
            if not self.broken:
                with contextlib.suppress(psycopg.Error):
                    self._connection.execute("ROLLBACK")
            raise
        self.phase = "COMMIT"
        with measure(Stage.COMMIT):
            ended = self._connection.execute("COMMIT").statusmessage
        if ended != "COMMIT":  # PostgreSQL answers ROLLBACK, and no error, when the transaction had failed before
            raise psycopg.OperationalError(f"the server answered {ended} to COMMIT")
        return Written(
            outcomes=outcomes,
            resources=frozenset(self._new_resources) - self._refused_resources,
            met_duplicates=len(self._tally.stored) < len(self._tally.candidates()),
            bytes=self._bytes,
            rejections=self._rejections,
            dead_letters=self._dead_letters,
            ends=self._ends,
            stages=self._clock.seconds,
        )

    # What isolation needs (see isolation.RowStore).

    @property
    def broken(self) -> bool:
        """Whether the connection is lost."""
        return self._connection.closed or self._connection.broken

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what happens inside when an error leaves it."""
        self._connection.execute("SAVEPOINT item")
        try:
            yield
        except psycopg.Error:
            if not self.broken:
                self._connection.execute("ROLLBACK TO SAVEPOINT item; RELEASE SAVEPOINT item")
            raise
        self._connection.execute("RELEASE SAVEPOINT item")

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo what happens inside, whether it fails or not."""
        with self.savepoint():
            yield
            self._connection.execute("ROLLBACK TO SAVEPOINT item")

    def copy(self, rows: Sequence[int]) -> None:
        """COPY rows straight into the table."""
        self._copy(self._table.copy, rows)

    def insert(self, rows: Sequence[int]) -> frozenset[bytes] | None:
        """INSERT rows around those that are there; return the inserted keys, None where the table has none."""
        columns = self._compiled.columns[self._merged.signal]
        arrays = statements.columns_of(columns, map(self._merged.rows.__getitem__, rows))
        self._bytes += sum(map(len, arrays))
        return self._insert(self._table.insert, arrays)

    def _stage(self, rows: Sequence[int]) -> frozenset[bytes] | None:
        """As `insert`, by way of a temporary table: about twice as quick."""
        self.phase = "staging"
        self._connection.execute(self._table.create_staging)
        self.phase = self._merged.signal.table
        self._copy(self._table.copy_staging, rows)
        # A temporary table is read in the order in which it was written: rows are locked in key order here, too.
        return self._insert(self._table.insert_staged, ())

    def _copy(self, statement: bytes, rows: Sequence[int]) -> None:
        self._bytes += copy_in(self._connection, statement, statements.copy_data(self._merged.rows, rows))

    def _insert(self, statement: bytes, arrays: Sequence[statements.Array]) -> frozenset[bytes] | None:
        with self._connection.cursor(binary=True) as cursor:
            cursor.execute(statement, arrays)
            result = cursor.pgresult
            if not self._compiled.columns[self._merged.signal].key or result is None:
                return None
            width = range(result.nfields)
            return frozenset(
                b"".join(result.get_value(row, column) or b"" for column in width) for row in range(result.ntuples)
            )

    def probe(self) -> None:
        """INSERT a row that is valid by the mapping, and undo it."""
        columns = self._compiled.columns[self._merged.signal]
        with self._undone():
            self._execute(self._table.insert, statements.columns_of(columns, [control_row(columns)]))

    # The steps, in lock order.

    def _put_resources(self) -> None:
        self.phase = "resources"
        if not self._new_resources:
            return
        resources = self._merged.resources
        refused = self._refused(
            self._new_resources,
            lambda ids: self._upsert_resources(map(resources.__getitem__, ids)),
            control=lambda: self._upsert_resources([control_row(self._compiled.resources)]),
        )
        for resource_id, error in refused.items():
            self._refused_resources.add(resource_id)
            for row, its_resource in enumerate(self._merged.resource_ids):
                if its_resource == resource_id:
                    self._tally.reject(row, f"resource: {reason(error)}", error.sqlstate)

    def _upsert_resources(self, rows: Iterable[bytes]) -> None:
        arrays = statements.columns_of(self._compiled.resources, rows)
        self._execute(self._compiled.upsert_resources, arrays)

    def _claim_requests(self) -> None:
        """Enter new requests in the ledger, and give those that are there the answer they got the first time."""
        self.phase = "ledger"
        first: dict[bytes, int] = {}
        for index, batch in enumerate(self._merged.batches):
            if first.setdefault(batch.request_id, index) != index:
                self._tally.coalesced[index] = first[batch.request_id]
        ids = sorted(first)
        claimed = self._execute(
            self._compiled.claim_requests,
            statements.arrays(statements.REQUEST_TYPES, [self._claim(first[request_id]) for request_id in ids]),
        )
        known = set(ids) - {request_id.bytes for (request_id,) in claimed.fetchall()}
        if not known:
            return
        answers = self._execute(self._compiled.read_requests, [statements.array(ColumnType.UUID, sorted(known))])
        for request_id, count, message in answers.fetchall():
            index = first[request_id.bytes]
            self._tally.replayed[index] = Outcome(
                duplicate=self._merged.batches[index].item_count - count, rejected=count, error_message=message or ""
            )

    def _claim(self, index: int) -> tuple[bytes, bytes, bytes]:
        batch, rejections = self._merged.batches[index], self._tally.rejections(index)
        message = rejection_message(batch, rejections)
        return batch.request_id, struct.pack("!q", len(rejections)), message.encode()

    def _put_rows(self) -> None:
        self.phase = self._merged.signal.table
        rows = self._tally.candidates()
        if not rows:
            return
        if self.method is Method.COPY:
            self.copy(rows)
            self._tally.store(rows)
        elif self.method is Method.STAGE:
            self._tally.store(rows, self._stage(rows))
        elif self.method is Method.INSERT:
            self._tally.store(rows, self.insert(rows))
        else:
            Isolation(self, self._merged, self._tally).run(rows)

    def _put_traces(self) -> None:
        self.phase = "traces"
        summary = traces.summarise(self._merged.facts, self._tally.stored, self._compiled.sum_count)
        ids = summary.ids
        if not ids:
            return
        refused = self._refused(
            ids,
            lambda ids: self._upsert_traces(summary.parameters(ids)),
            control=lambda: self._upsert_traces(traces.control(self._compiled.sum_count)),
        )
        if refused:
            # Their spans are in already, and a writer may not delete: start over without them.
            raise BadTracesError(
                {trace_id: (f"trace summary: {reason(exc)}", exc.sqlstate) for trace_id, exc in refused.items()}
            )

    def _upsert_traces(self, parameters: Sequence[statements.Array]) -> None:
        self._ends = traces.sampled_ends(parameters)
        self._execute(self._compiled.upsert_traces, parameters)

    def _put_dead_letters(self) -> None:
        """Keep what was refused; in slices, since each letter repeats its resource and scope."""
        self.phase = "dead letters"
        refused = [
            (batch, rejection)
            for index, batch in enumerate(self._merged.batches)
            if index not in self._tally.replayed and index not in self._tally.coalesced
            for rejection in self._tally.rejections(index)
        ]
        self._rejections.update(rejection.kind for _, rejection in refused)
        refused.sort(key=lambda each: (each[0].request_id, each[1].item))
        letters: list[Sequence[bytes | None]] = []
        size = 0
        for batch, rejection in refused:
            otlp = batch.otlp(rejection.item)
            letters.append(
                (
                    struct.pack("!q", pg_time(batch.received_at)),
                    batch.signal.value.encode(),
                    batch.request_id,
                    struct.pack("!q", rejection.item),
                    rejection.reason.encode(),
                    None if rejection.sqlstate is None else rejection.sqlstate.encode(),
                    otlp,
                )
            )
            size += len(otlp) + len(rejection.reason) + _LETTER_OVERHEAD
            if size >= _LETTERS_SLICE:
                self._insert_dead_letters(letters)
                letters, size = [], 0
        if letters:
            self._insert_dead_letters(letters)

    def _insert_dead_letters(self, letters: Sequence[Sequence[bytes | None]]) -> None:
        arrays = statements.arrays(statements.DEAD_LETTER_TYPES, letters)
        self._dead_letters += self._execute(self._compiled.insert_dead_letters, arrays).rowcount

    def _amend_requests(self, outcomes: Sequence[Outcome]) -> None:
        """Correct the ledger for requests that lost items here: a retry must hear the same answer."""
        self.phase = "ledger"
        merged = self._merged
        for index in sorted({merged.owners[row] for row in self._tally.rejected}):
            answer, request_id = outcomes[index], merged.batches[index].request_id
            parameters = [answer.rejected, answer.error_message, request_id.hex()]
            self._connection.execute(self._compiled.amend_request, parameters)

    def _execute(self, statement: bytes, parameters: Sequence[object]) -> psycopg.Cursor[tuple[Any, ...]]:
        return self._connection.execute(statement, parameters)

    def _refused(
        self, ids: Sequence[bytes], upsert: Callable[[Sequence[bytes]], None], *, control: Callable[[], None]
    ) -> dict[bytes, psycopg.Error]:
        """Upsert rows; when isolating, return those that are bad by themselves instead of failing.

        Raises DeploymentError when all are refused, and so is `control`, a row that is valid by the mapping.
        """
        if self.method is not Method.ISOLATE:
            upsert(ids)
            return {}
        upsert(())  # holds the table as it is, see Isolation.run
        refused = self._search(ids, upsert)
        if len(refused) == len(ids):
            try:
                with self._undone():
                    control()
            except psycopg.Error as exc:
                self._reraise_unless_data(exc)
                raise refuses_all(self.phase, exc) from exc
        return refused

    def _search(self, ids: Sequence[bytes], upsert: Callable[[Sequence[bytes]], None]) -> dict[bytes, psycopg.Error]:
        try:
            with self.savepoint():
                upsert(ids)
        except psycopg.Error as exc:
            self._reraise_unless_data(exc)
            if len(ids) == 1:
                return {ids[0]: exc}
            middle = len(ids) // 2
            return self._search(ids[:middle], upsert) | self._search(ids[middle:], upsert)
        return {}

    def _reraise_unless_data(self, error: psycopg.Error) -> None:
        if classify(error, broken=self.broken) not in {Verdict.DATA, Verdict.DUPLICATE}:
            raise error
