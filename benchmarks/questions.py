"""Questions about the write path that a figure must decide: tiny batches, duplicates, bad rows."""

import random
from collections.abc import Callable

import psycopg

from benchmarks.bench import Bench
from benchmarks.race import factor, median, milliseconds, settled, timed
from benchmarks.report import Section, Table
from benchmarks.rungs import transaction, writer
from benchmarks.server import Database
from benchmarks.workload import BAD_NAME, Batch
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.statements import TableStatements, columns_of


def tiny_batches(bench: Bench) -> Section:
    """Compare COPY and INSERT for batches of a few rows."""
    tables = []
    for signal in Signal:
        rows = []
        for size in bench.effort.tiny_sizes:
            copy, insert = _tiny(bench, signal, size)
            rows.append([f"{size:,}", milliseconds(copy), milliseconds(insert), factor(copy / insert)])
        tables.append(Table(header=[f"{signal.items} a batch", "COPY", "INSERT", "COPY / INSERT"], rows=rows))
    return Section(
        title="Tiny batches",
        text=(
            "The whole transaction of the Writer, with write_method copy and insert (INSERT … SELECT FROM unnest),"
            " transaction by transaction in turns. Above 1x INSERT is quicker."
        ),
        tables=tables,
    )


def _tiny(bench: Bench, signal: Signal, size: int) -> tuple[float, float]:
    bench.database.truncate()
    methods = [writer(bench, "copy"), writer(bench, "insert")]
    for write in methods:
        write(bench.workload.batch(signal, 50, new_resource=False))
    count = 2 * bench.effort.tiny_transactions
    batches = [bench.workload.batch(signal, size, new_resource=False) for _ in range(count)]
    seconds: list[list[float]] = [[], []]
    with settled():
        for turn, batch in enumerate(batches):
            # 0 1 1 0: neither always follows the other.
            which = (turn ^ turn >> 1) & 1
            seconds[which].append(timed(methods[which], batch))
    return median(seconds[0]), median(seconds[1])


class Resent:
    """Ways to write spans of which some are in the table already."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self._database = database
        self._connection = connection
        self._table = database.mapping.spans
        self._statements = TableStatements(database.settings.schema, self._table)

    def copy(self, batch: Batch) -> None:
        """COPY straight into the table; fails on a duplicate."""
        with transaction(self._connection), self._connection.cursor() as cursor:
            self._copy(cursor, self._statements.copy, batch)

    def unnest(self, batch: Batch) -> None:
        """INSERT around duplicates, from one array a column, as the Writer does where it may not stage."""
        with transaction(self._connection), self._connection.cursor(binary=True) as cursor:
            cursor.execute(self._statements.insert, columns_of(self._table, batch.rows))
            _returned_keys(cursor)

    def staging(self, batch: Batch) -> None:
        """COPY into a temporary table and INSERT around duplicates from there, as the Writer does."""
        with transaction(self._connection), self._connection.cursor(binary=True) as cursor:
            cursor.execute(self._statements.create_staging)
            self._copy(cursor, self._statements.copy_staging, batch)
            cursor.execute(self._statements.insert_staged)
            _returned_keys(cursor)

    def failing_copy(self, batch: Batch) -> None:
        """COPY, which meets a duplicate and is rolled back: the price of optimism."""
        try:
            self.copy(batch)
        except psycopg.errors.UniqueViolation:
            return
        raise AssertionError("the batch held no duplicate")

    def race(
        self, batch: Batch, stored: int, ways: dict[str, Callable[[Batch], None]], rounds: int
    ) -> dict[str, float]:
        """Time ways to write a batch of which `stored` rows, evenly spread, are in the table."""
        size = len(batch.rows)
        before = [batch.rows[(2 * position + 1) * size // (2 * stored)] for position in range(stored)]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with settled():
            for _ in range(rounds):
                for name, write in ways.items():
                    self._database.truncate()
                    if stored:
                        self.copy(Batch(table=batch.table, rows=before))
                    seconds[name].append(timed(write, batch))
        return {name: median(times) for name, times in seconds.items()}

    @staticmethod
    def _copy(cursor: psycopg.Cursor[tuple[object, ...]], statement: psycopg.abc.Query, batch: Batch) -> None:
        with cursor.copy(statement) as copy:
            copy.write(batch.buffer)


def _returned_keys(cursor: psycopg.Cursor[tuple[object, ...]]) -> frozenset[bytes]:
    result = cursor.pgresult
    assert result is not None
    width = range(result.nfields)
    return frozenset(
        b"".join(result.get_value(row, column) or b"" for column in width) for row in range(result.ntuples)
    )


def duplicates(bench: Bench) -> Section:
    """Compare ways to write a batch that was sent before, in part or as a whole."""
    resent = Resent(bench.database, bench.connection)
    ways: dict[str, Callable[[Batch], None]] = {"unnest": resent.unnest, "staging": resent.staging}
    rows, breaks = [], []
    for size in bench.effort.duplicate_sizes:
        batch = _in_key_order(bench.workload.batch(Signal.TRACES, size))
        # Long enough for a median of small batches, which a single commit's wait would else decide.
        rounds = bench.effort.rounds * max(1, min(5, 5_000 // size))
        clean = resent.race(batch, 0, {**ways, "copy": resent.copy}, rounds)
        for share in (0.0, 0.1, 1.0):
            chosen = clean if share == 0 else resent.race(batch, round(size * share), ways, rounds)
            unnest, staging = chosen["unnest"], chosen["staging"]
            label = f"{size:,} rows, {share:.0%} duplicates"
            rows.append([label, milliseconds(unnest), milliseconds(staging), factor(staging / unnest)])
        for count in sorted({1, size // 10, size}):
            failing = resent.race(batch, count, {"failing": resent.failing_copy}, rounds)["failing"]
            share = (clean["staging"] - clean["copy"]) / (failing + clean["staging"] - clean["copy"])
            times = [milliseconds(each) for each in (clean["copy"], failing, clean["staging"])]
            verdict = f"one in {1 / share:.1f}" if share > 0 else "always staging"
            breaks.append([f"{size:,} rows, {count:,} duplicates", *times, verdict])
    return Section(
        title="Duplicates",
        text=(
            "Re-sent spans, rows alone. First: INSERT … SELECT FROM unnest against COPY into a temporary table and"
            " INSERT … SELECT from there, both with ON CONFLICT DO NOTHING RETURNING the key. Above 1x unnest is"
            " quicker. Then what optimism costs: COPY pays as long as fewer batches than the break-even's hold a"
            " duplicate."
        ),
        tables=[
            Table(header=["batch", "unnest", "staging table", "staging / unnest"], rows=rows),
            Table(
                header=["batch", "COPY, clean", "COPY that fails", "staging, clean", "break-even at batches"],
                rows=breaks,
            ),
        ],
    )


def _in_key_order(batch: Batch) -> Batch:
    """Sort a batch's rows, as the Writer does."""
    keyed = [pair for request in batch.requests for pair in zip(request.keys, request.rows, strict=True)]
    return Batch(table=batch.table, rows=[row for _, row in sorted(keyed)])


def isolation(bench: Bench) -> Section:
    """Show what bad rows cost their batch."""
    database, size = bench.database, bench.effort.isolation_rows
    chance = random.Random(1)
    counts = [count for count in (0, 1, 10, 100) if count < size]
    batches = {
        count: bench.workload.batch(Signal.TRACES, size, bad=frozenset(chance.sample(range(size), count)))
        for count in counts
    }
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with database.constraint("spans", f"name <> '{BAD_NAME}'"), settled():
        for _ in range(bench.effort.rounds):
            for count, batch in batches.items():
                database.truncate()
                write = writer(bench)
                write(bench.workload.batch(Signal.TRACES, 50))
                seconds[count].append(timed(write, batch))
                assert database.count("dead_letters") == count
                assert database.count("spans") == size - count + 50
    clean = median(seconds[0])
    rows = [
        [f"{count:,}", milliseconds(median(times)), factor(median(times) / clean)] for count, times in seconds.items()
    ]
    return Section(
        title="Bad rows",
        text=(
            f"The Writer's whole transaction for {size:,} spans, of which some violate a CHECK constraint: these are"
            " set aside as dead letters, all others are stored."
        ),
        tables=[Table(header=["bad rows", "time", "to a clean COPY"], rows=rows)],
    )
