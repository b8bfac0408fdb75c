"""What the spool costs while all is well, and how much it takes and gives back around an outage.

Run `python benchmarks/spool.py --help`. With and without a spool take turns, in one process, on the same PostgreSQL.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.race import Lap, median, settled
from benchmarks.server import Database, database
from benchmarks.workload import Workload
from otel_pg_exporter import mapping
from otel_pg_exporter.config import PipelineSettings, WriterSettings
from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.model import Outcome, RowBatch, Signal
from otel_pg_exporter.pipeline.availability import Availability, Write
from otel_pg_exporter.pipeline.batcher import Batcher
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.postgres.connection import Connections
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.telemetry import ItemCounters, Statistics

_WRITERS = 2
_MB = 1e6


class House:
    """A receiver without its front door: requests go in, and become rows."""

    def __init__(self, write: Write, workload: Workload, folder: Path | None) -> None:
        self.counters = ItemCounters()
        self.availability = Availability()
        self.spool = None if folder is None else Spool(folder, max_bytes=2**40)
        self._plans = {signal: workload.plan(signal) for signal in Signal}
        self._write = self.availability.observe(write)
        self._drain: Drain | None = None
        self._batcher = Batcher(self._write, PipelineSettings(writers=_WRITERS))
        self.export = Export(
            self._plans,
            self._batcher.submit,
            self.counters,
            ack_timeout=60,
            availability=self.availability,
            spool=self.spool,
        )

    def start_drain(self) -> None:
        """Begin to empty the spool, if there is one."""
        if self.spool is not None:
            self._drain = Drain(
                self.spool,
                SpoolWriter(
                    self._plans,
                    self._write,
                    probe=lambda: None,
                    counters=self.counters,
                    availability=self.availability,
                    ledger_ttl=7 * 86_400.0,
                ),
                self.counters,
            )

    def close(self) -> None:
        """End all threads."""
        self._batcher.shutdown(60)
        if self._drain is not None:
            self._drain.stop(60)
        if self.spool is not None:
            self.spool.close()


def _away(_batches: Sequence[RowBatch]) -> Sequence[Outcome]:
    raise OutageError("away")


@contextlib.contextmanager
def _folder(place: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="otel-pg-exporter-benchmark-", dir=place))
    yield folder
    shutil.rmtree(folder)


def _send(house: House, signal: Signal, bodies: Sequence[bytes], senders: int) -> Lap:
    """Export all requests from so many threads, and time that."""
    with ThreadPoolExecutor(senders) as pool:
        began, computed = time.perf_counter(), time.process_time()
        for outcome in pool.map(lambda body: house.export(signal, body), bodies):
            assert outcome.stored or outcome.spooled
        return Lap(time.perf_counter() - began, time.process_time() - computed)


def healthy(write: Write, tables: Database, workload: Workload, options: argparse.Namespace) -> None:
    """Print how throughput with a spool compares to that without, in pairs."""
    for signal in Signal:
        bodies = _bodies(workload, signal, options.requests, options.items)
        laps: dict[bool, list[Lap]] = {False: [], True: []}
        for turn in range(options.rounds):
            for spooling in (turn % 2 == 0, turn % 2 == 1):  # each is first in every second round
                tables.truncate()
                with contextlib.ExitStack() as stack:
                    folder = stack.enter_context(_folder(options.spool_dir)) if spooling else None
                    house = House(write, workload, folder)
                    stack.callback(house.close)
                    house.start_drain()
                    os.sync()  # what the truncation and the making of the spool have left to the disk
                    laps[spooling].append(_send(house, signal, bodies, options.senders))
        seconds = {spooling: median([lap.seconds for lap in each]) for spooling, each in laps.items()}
        cpu = {spooling: median([lap.cpu for lap in each]) for spooling, each in laps.items()}
        rate = options.requests * options.items / seconds[True]
        print(
            f"healthy, {signal.value}: {rate:,.0f} {signal.items}/s with the spool,"
            f" {seconds[False] / seconds[True]:.3f} of that without; {cpu[True] / cpu[False]:.3f} of its CPU time"
        )


def outage(write: Write, tables: Database, workload: Workload, options: argparse.Namespace) -> None:
    """Print how fast requests are spooled while PostgreSQL is away, and drained when it is back."""
    for signal in Signal:
        bodies = _bodies(workload, signal, options.requests, options.items)
        size = sum(map(len, bodies)) / _MB
        for senders in (1, options.senders):
            tables.truncate()
            gone = [True]

            def written(batches: Sequence[RowBatch], gone: list[bool] = gone) -> Sequence[Outcome]:
                return (_away if gone[0] else write)(batches)

            with _folder(options.spool_dir) as folder:
                house = House(written, workload, folder)
                house.availability.note_silence(signal)
                taken = _send(house, signal, bodies, senders).seconds
                gone[0] = False
                began = time.perf_counter()
                house.start_drain()
                while house.counters.snapshot().in_spool:
                    time.sleep(0.01)
                drained = time.perf_counter() - began
                house.close()
            print(
                f"outage, {signal.value}, {senders} senders: {len(bodies) / taken:,.0f} requests/s,"
                f" {size / taken:.1f} MB/s into the spool;"
                f" {options.items * len(bodies) / drained:,.0f} {signal.items}/s, {size / drained:.1f} MB/s out of it"
            )


def _bodies(workload: Workload, signal: Signal, requests: int, items: int) -> list[bytes]:
    return [body for _ in range(requests) for body in workload.batch(signal, items, new_resource=False).bodies]


_PARTS: dict[str, Callable[[Write, Database, Workload, argparse.Namespace], None]] = {
    "healthy": healthy,
    "outage": outage,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of runs, of which the median counts")
    parser.add_argument("--requests", type=int, default=300, help="requests a run")
    parser.add_argument("--items", type=int, default=100, help="items a request, at most 512")
    parser.add_argument("--senders", type=int, default=16, help="threads that send")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--dsn", help="a PostgreSQL to measure on; it gets a schema of its own, dropped later")
    parser.add_argument("--spool-dir", type=Path, help="where the spool lies (default: the temporary folder)")
    options = parser.parse_args(arguments)
    workload = Workload(mapping.load())
    with database(options.dsn, day=workload.day) as tables, settled():
        connections = Connections(tables.settings, size=_WRITERS + 2)
        writer = Writer(connections, tables.mapping, WriterSettings(), Statistics())
        for part in options.parts:
            _PARTS[part](writer.write, tables, workload, options)
        connections.close()


if __name__ == "__main__":
    main()
