"""A receiver that stores nothing: protocols, transcoding, batching, merging, gathering as in `serve`, no PostgreSQL.

What `serve` computes beyond this is what sending takes. Started as `python -m benchmarks.hollow`, it serves on free
ports, which it prints, until its stdin ends.
"""

import contextlib
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.receiver import Receiver
from benchmarks.server import Database
from otel_pg_exporter import mapping
from otel_pg_exporter.config import PipelineSettings, ReceiverSettings
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.batcher import Batcher
from otel_pg_exporter.pipeline.export import Export
from otel_pg_exporter.postgres import statements, traces
from otel_pg_exporter.postgres.merge import Merged, Tally
from otel_pg_exporter.receiver.front_door import FrontDoor
from otel_pg_exporter.telemetry import ItemCounters, Statistics
from otel_pg_exporter.transcode import compile_plan

_ROOT = Path(__file__).resolve().parent.parent
_STOP_TIMEOUT = 5.0  # seconds
_SPARE_SHARE = 1 / 16  # as in `service`


@contextlib.contextmanager
def hollow(tables: Database, protocol: str = "grpc") -> Iterator[Receiver]:
    """Start it in a process of its own, and end it; what is sent to it is sent by that protocol."""
    command = [sys.executable, "-m", "benchmarks.hollow"]
    with subprocess.Popen(
        command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # whose stdin is closed at the end
        assert process.stdout is not None
        endpoints = dict(zip(("grpc", "http"), process.stdout.readline().split(), strict=False))
        if not endpoints:
            raise RuntimeError("the hollow receiver did not start; it said why on stderr")
        yield Receiver(process, endpoints[protocol], tables)


def main() -> None:
    """Serve until stdin ends; the parts are put together as `service.Service` does it."""
    columns = mapping.load()
    sum_count = len(columns.spans.sums)

    def write(batches: Sequence[RowBatch]) -> list[Outcome]:
        merged = Merged(batches)
        tally = Tally(merged)
        rows = tally.candidates()
        deque(statements.copy_data(merged.rows, rows), maxlen=0)
        tally.store(rows)
        if merged.signal is Signal.TRACES:
            summary = traces.summarise(merged.facts, tally.stored, sum_count)
            summary.parameters(summary.ids)
        return tally.outcomes()

    settings, statistics, availability = PipelineSettings(), Statistics(), Availability()
    batcher = Batcher(availability.observe(write), settings, took=statistics.took)
    export = Export(
        {signal: compile_plan(columns, signal, Window()) for signal in Signal},
        batcher.submit,
        ItemCounters(),
        ack_timeout=settings.ack_timeout,
        availability=availability,
        took=statistics.took,
    )
    bound = settings.max_inflight_bytes
    budget = ByteBudget(bound, spare=int(bound * _SPARE_SHARE))
    endpoints = ReceiverSettings(grpc_endpoint="127.0.0.1:0", http_endpoint="127.0.0.1:0")
    server = FrontDoor(export, budget, endpoints, took=statistics.took)
    server.start()
    server.set_serving(True)
    print(server.endpoints.grpc, server.endpoints.http, flush=True)
    sys.stdin.read()
    server.stop(_STOP_TIMEOUT)
    batcher.shutdown(_STOP_TIMEOUT)


if __name__ == "__main__":
    main()
