"""Growth: whether ingest stays as fast, and a trace as quick to find, while tables outgrow PostgreSQL's memory.

    .venv/bin/python benchmarks/growth.py [--spans 50_000_000] [--minutes 15]

Small spans with random trace ids go through `serve` into one PostgreSQL with 128 MB of shared_buffers. 50 million take
six minutes at 150,000 a second, and 33 GB of disk, WAL included; `--minutes` bounds it.
"""

import argparse
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from psycopg import sql

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.processes import GENERATOR_CORE
from benchmarks.race import milliseconds
from benchmarks.receiver import Receiver, receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, LoadProcess, Sent
from otel_pg_exporter.bench.requests import SPANS_PER_TRACE, Content

_TITLE = "Growth"
_STEPS = 10
_SHARES = 100  # in which the traces that are looked up later are sent, evenly over the run
_LONG_TRACE = 10_000  # spans
_LOOKED_UP = 1_000  # ordinary traces
_REPEATS = 9  # of the long trace's look-up
_POLL = 0.25  # seconds
_SETTLE = 60.0  # seconds until the last rows must be there
_ITEMS = 1_000  # a request
_SENDERS = 48
_MORE = 1_000_000  # spans that are sent beyond the goal: PostgreSQL counts rows late, but only an idle one by seconds
_DISK_A_SPAN, _WAL_A_SPAN, _LARGEST_WAL = 450, 550, 10 * 10**9  # bytes; measured, rounded up
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_TEXT = (
    "{spans:,} small spans, ten a trace, through `serve` with {writers} writers, {items:,} a request from {senders}"
    " senders, into one PostgreSQL with 128 MB of shared_buffers; all begin within the minutes of the run. A row of the"
    " first table is a step. WAL and sizes are in bytes for each row that the step added; index pages are those that"
    " PostgreSQL had to read from outside shared_buffers, for 1,000 rows."
)
_LOOK_UPS = (
    "{count:,} traces that were sent evenly over the run, in random order, with the caches as the load left them, and a"
    " trace of {long:,} spans over the whole run, by `trace_spans(trace_id)`: from the statement to its last row in the"
    " client's memory."
)
_STATE = sql.SQL("""
    WITH leaf AS (SELECT relid FROM pg_partition_tree({spans}) WHERE isleaf)
    SELECT
        (SELECT sum(pg_stat_get_tuples_inserted(relid)) FROM leaf)::int8,
        (pg_current_wal_insert_lsn() - '0/0')::int8,
        (SELECT sum(pg_table_size(relid)) FROM leaf)::int8,
        (SELECT sum(pg_indexes_size(relid)) FROM leaf)::int8,
        pg_total_relation_size({traces}),
        (SELECT sum(idx_blks_read) FROM leaf JOIN pg_statio_all_tables USING (relid))::int8,
        (SELECT idx_blks_read FROM pg_statio_all_tables WHERE relid = {traces}::regclass)
""")
_ROWS = sql.SQL("SELECT sum(pg_stat_get_tuples_inserted(relid))::int8 FROM pg_partition_tree({spans}) WHERE isleaf")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The tables and the server at one moment."""

    at: float
    cpu: float  # seconds, of PostgreSQL
    rows: int
    wal: int  # bytes, as all sizes
    heap: int
    indexes: int
    traces: int  # heap and indexes
    index_reads: int  # pages
    traces_index_reads: int


class Tracked:
    """Traces whose ids are known: one that is as long as the run, and ordinary ones, a share of each at a time."""

    def __init__(self, endpoint: str) -> None:
        self.long = uuid.uuid4()
        self.long_spans = 0
        self.ordinary: list[uuid.UUID] = []
        self._shares = 0
        self._channel = grpc.insecure_channel(endpoint)
        self._export = self._channel.unary_unary(_EXPORT, ExportTraceServiceRequest.SerializeToString, None)

    def send_until(self, shares: int) -> None:
        """Send what is missing up to so many shares, and wait for the commit."""
        missing = min(shares, _SHARES) - self._shares
        if missing <= 0:
            return
        self._shares += missing
        fresh = [uuid.uuid4() for _ in range(missing * _LOOKED_UP // _SHARES)]
        long_spans = missing * _LONG_TRACE // _SHARES
        self._export(_request(self.long, long_spans, fresh), timeout=_SETTLE)
        self.ordinary += fresh
        self.long_spans += long_spans

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def _request(long: uuid.UUID, count: int, ordinary: Sequence[uuid.UUID]) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "tracked"
    spans = group.scope_spans.add().spans
    for trace_id in [long] * count + [each for each in ordinary for _ in range(SPANS_PER_TRACE)]:
        start = time.time_ns()
        span = spans.add(trace_id=trace_id.bytes, span_id=random.randbytes(8), name="GET /api/v1/orders", kind=2)
        span.start_time_unix_nano, span.end_time_unix_nano = start, start + 10**7
    return request


class Growth:
    """A run: fills the tables, and notes their state as they grow."""

    def __init__(self, tables: Database, receiver: Receiver, options: argparse.Namespace) -> None:
        self._tables = tables
        self._goal: int = options.spans
        self.tracked = Tracked(receiver.endpoint)
        self.states: list[State] = []
        self._names = {each: sql.Literal(f"{tables.settings.schema}.{each}") for each in ("spans", "traces")}
        self._load = Load(
            endpoint=receiver.endpoint,
            content=Content.SMALL.value,
            items=_ITEMS,
            senders=_SENDERS,
            seconds=options.minutes * 60,
            warm_up=0,
            requests=(self._goal + _MORE) // _ITEMS,
            core=GENERATOR_CORE,
        )

    def run(self) -> Sent:
        """Send until the goal is reached, or the time is over."""
        with LoadProcess(self._load) as process:
            process.wait_ready()
            deadline = time.monotonic() + self._load.seconds
            while time.monotonic() < deadline and len(self.states) <= _STEPS:
                time.sleep(_POLL)
                self._look()
            sent = process.result()
        self._settle()
        return sent

    def _look(self) -> None:
        rows = self._rows()
        if not rows:
            return  # the clock begins with the first rows
        self.tracked.send_until(rows * _SHARES // self._goal)
        begin, last = (self.states[0].rows, self.states[-1].rows) if self.states else (0, 0)
        if rows > last and rows >= begin + len(self.states) * self._goal // _STEPS:
            self.states.append(state := self._state())
            first = self.states[max(0, len(self.states) - 2)]
            rate = (state.rows - first.rows) / max(state.at - first.at, _POLL)
            say(f"{state.rows:,} of {begin + self._goal:,} spans, {rate:,.0f} a second")

    def _rows(self) -> int:
        return int(self._tables.admin.execute(_ROWS.format(**self._names)).fetchall()[0][0])

    def _state(self) -> State:
        values = self._tables.admin.execute(_STATE.format(**self._names)).fetchall()[0]
        names = ("rows", "wal", "heap", "indexes", "traces", "index_reads", "traces_index_reads")
        return State(at=time.perf_counter(), cpu=self._tables.cpu(), **dict(zip(names, values, strict=True)))

    def _settle(self) -> None:
        """Wait until rows that went through the spool are there, too."""
        self.tracked.close()
        query = sql.SQL("SELECT coalesce(sum(span_count), 0) FROM {} WHERE trace_id = ANY (%s)")
        wanted = self.tracked.long_spans + SPANS_PER_TRACE * len(self.tracked.ordinary)
        ids = [self.tracked.long, *self.tracked.ordinary]
        deadline = time.monotonic() + _SETTLE
        while (
            found := self._tables.admin.execute(query.format(self._tables.name("traces")), [ids]).fetchall()[0][0]
        ) != wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{found:,} of {wanted:,} spans of the tracked traces are there")
            time.sleep(_POLL)


def steps(states: Sequence[State]) -> tuple[Table, list[float]]:
    """Return the table of steps, and their rates."""
    rows, rates = [], []
    for before, after in itertools.pairwise(states):
        count, seconds = after.rows - before.rows, after.at - before.at
        rates.append(count / seconds)
        rows.append(
            [
                f"{after.rows / 1e6:,.1f} million",
                f"{rates[-1]:,.0f}",
                f"{(after.wal - before.wal) / count:,.0f}",
                f"{(after.heap - before.heap) / count:,.0f}",
                f"{(after.indexes - before.indexes) / count:,.0f}",
                f"{(after.traces - before.traces) / count:,.0f}",
                f"{(after.index_reads - before.index_reads) / count * 1_000:.1f}",
                f"{(after.traces_index_reads - before.traces_index_reads) / count * 1_000:.1f}",
                f"{(after.cpu - before.cpu) / seconds:.2f}",
            ]
        )
    header = [
        "spans",
        "rows a second",
        "WAL",
        "spans: heap",
        "spans: indexes",
        "traces",
        "index pages: spans",
        "index pages: traces",
        "PostgreSQL's cores",
    ]
    return Table(header=header, rows=rows), rates


def look_up(tables: Database, tracked: Tracked) -> Table:
    """Time the look-ups."""
    query = sql.SQL("SELECT * FROM {}(%s)").format(tables.name("trace_spans"))
    with tables.connect() as connection, connection.cursor() as cursor:

        def seconds(trace_id: uuid.UUID, spans: int) -> float:
            began = time.perf_counter()
            cursor.execute(query, [trace_id])  # all rows are with the client after this
            took = time.perf_counter() - began
            if cursor.rowcount != spans:
                raise RuntimeError(f"{cursor.rowcount:,} of {spans:,} spans of trace {trace_id} were found")
            return took

        cursor.execute(query, [uuid.uuid4()])  # plans and catalogs
        shuffled = random.sample(tracked.ordinary, len(tracked.ordinary))
        ordinary = sorted(seconds(each, SPANS_PER_TRACE) for each in shuffled)
        cold, *warm = [seconds(tracked.long, tracked.long_spans) for _ in range(1 + _REPEATS)]
    return Table(
        header=["look-up", "time", "goal"],
        rows=[
            ["a trace, p50", milliseconds(statistics.median(ordinary)), ""],
            ["a trace, p95", milliseconds(ordinary[len(ordinary) * 95 // 100]), "20 ms"],
            ["a trace, longest", milliseconds(ordinary[-1]), ""],
            [f"{tracked.long_spans:,} spans, the first time", milliseconds(cold), ""],
            [
                f"{tracked.long_spans:,} spans, warm, median of {_REPEATS}",
                milliseconds(statistics.median(warm)),
                "250 ms",
            ],
        ],
    )


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    tables.truncate()
    with receiving(tables, "--writers", str(options.writers)) as receiver:
        growth = Growth(tables, receiver, options)
        sent = growth.run()
        if len(growth.states) < 2:  # noqa: PLR2004 - a step has two ends
            raise SystemExit(f"not even a tenth of {options.spans:,} spans came within {options.minutes:g} minutes")
        found = look_up(tables, growth.tracked)
    table, rates = steps(growth.states)
    text = _TEXT.format(spans=growth.states[-1].rows, writers=options.writers, items=_ITEMS, senders=_SENDERS)
    if len(rates) < _STEPS:
        text += f" The {options.minutes:g} minutes were over before all {options.spans:,} spans were there."
    ratios = Table(
        header=["rates", "ratio", "goal"],
        rows=[
            ["the last step's to the first's", f"{rates[-1] / rates[0]:.2f}", "0.90"],
            ["the last step's to the median", f"{rates[-1] / statistics.median(rates):.2f}", ""],
            ["the slowest step's to the first's", f"{min(rates) / rates[0]:.2f}", ""],
        ],
    )
    told = (
        f"The generator took {sent.cpu_share:.2f} of its core; {sum(sent.failures.values()):,} of its calls failed,"
        f" {sent.rejected:,} held spans that were rejected."
    )
    return [
        Section(title="", text=text, tables=[table]),
        Section(title="Does it stay as fast?", text=told, tables=[ratios]),
        Section(
            title="Looking up traces",
            text=_LOOK_UPS.format(count=len(growth.tracked.ordinary), long=growth.tracked.long_spans),
            tables=[found],
        ),
    ]


def check_disk(spans: int) -> None:
    """End here if the disk of the temporary folder has less than twice what so many spans take."""
    needed = spans * _DISK_A_SPAN + min(spans * _WAL_A_SPAN, _LARGEST_WAL)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        raise SystemExit(
            f"{spans:,} spans take {needed / 1e9:.1f} GB of {folder}, WAL included, and twice that should be free, but"
            f" {free / 1e9:.1f} GB are: give fewer --spans, another TMPDIR, or a --dsn"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--spans", type=int, default=50_000_000, help="default: 50 million")
    made.add_argument("--minutes", type=float, default=15.0, help="that the filling may take at most")
    made.add_argument("--writers", type=int, default=4, help="that `serve` has")
    options = made.parse_args(arguments)
    if options.quick:
        options.spans, options.minutes = 1_000_000, 1.0
    if options.dsn is None:
        check_disk(options.spans + _MORE)
    run(_TITLE, options, measure, configuration={"shared_buffers": "128MB"})


if __name__ == "__main__":
    main()
