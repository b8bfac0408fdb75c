"""The SDK plugin: what an exporter costs the application that it runs in, against the official OTLP exporters.

    .venv/bin/python benchmarks/sdk.py [--rounds 5] [--batches 20]

All threads' CPU time counts, but nothing that another process computes: the OTLP exporters send to `serve` (gRPC) and
to a server that reads the body and answers 200 (HTTP), ours writes into PostgreSQL. Each contestant has a process of
its own in each round. Takes about two minutes.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import (
    BatchLogRecordProcessor,
    InMemoryLogRecordExporter,
    SimpleLogRecordProcessor,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.processes import GENERATOR_CORE
from benchmarks.race import settled
from benchmarks.receiver import receiving
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.requests import SPANS_PER_TRACE
from otel_pg_exporter.model import Signal
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter

_TITLE = "The SDK plugin"
_BATCH = 512
_WARM_UP = 4  # batches
_FLUSH_TIMEOUT = 60_000  # milliseconds
_OURS, _GRPC, _HTTP, _NONE = "ours: into PostgreSQL", "OTLP/gRPC", "OTLP/HTTP", "no exporter"
_HTTP_PACKAGE = "opentelemetry.exporter.otlp.proto.http"
_TEXT = (
    "CPU microseconds an item in the application: `export()` alone, given what the SDK has made; then the SDK with a"
    " batch processor, {batch} a batch, and of that what is beyond the SDK without any exporter. Ten attributes of all"
    " types, ten spans a trace; medians of {rounds} rounds of {items:,} items. The goal is at most 0.50 of the official"
    " exporters."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a contestant is to do."""

    name: str
    signal: Signal
    batches: int
    target: dict[str, Any]  # keyword arguments of its exporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU seconds for all items of a turn."""

    alone: float  # 0 without an exporter
    with_sdk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """The SDK's classes for a signal, whose interfaces are alike but for their types."""

    make: Callable[[Any, int], None]  # gives a processor, if there is one, so many items
    simple: Callable[[Any], Any]
    in_memory: Callable[[], Any]
    finished: Callable[[Any], Sequence[Any]]
    batch: Callable[..., Any]


class Tally:
    """An exporter that counts what another one exported."""

    def __init__(self, exporter: Any) -> None:  # noqa: ANN401 - of either signal
        self._exporter = exporter
        self.exported = 0

    def export(self, items: Sequence[Any]) -> object:
        """Export by the other one."""
        result = self._exporter.export(items)
        self.exported += len(items) if result.name == "SUCCESS" else 0
        return result

    def shutdown(self) -> None:
        """Shut it down."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = _FLUSH_TIMEOUT) -> bool:
        """Flush it."""
        return bool(self._exporter.force_flush(timeout_millis))


def _attributes(number: int) -> dict[str, Any]:
    return {
        "http.request.method": "GET",
        "url.full": f"https://shop.example/api/v1/customers/{number}/orders?limit=50",
        "user_agent.original": "Mozilla/5.0 (X11; Linux x86_64) Chrome/131.0.0.0 Safari",
        "http.route": "/api/v1/customers/{id}/orders",
        "http.response.status_code": 200,
        "http.response.body.size": number * 7,
        "app.cache.ratio": number / 7,
        "app.retried": False,
        "db.response.returned_rows": number,
        "app.tags": ["a", "b"],
    }


def _resource() -> Resource:
    return Resource({"service.name": "checkout", "service.version": "2.14.0", "host.name": "checkout-7"})


def _make_spans(processor: Any, count: int) -> None:  # noqa: ANN401 - either signal's
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    if processor is not None:
        provider.add_span_processor(processor)
    tracer = provider.get_tracer("shop.instrumentation", "1.4.2")
    for first in range(0, count, SPANS_PER_TRACE):
        with tracer.start_as_current_span("GET /orders", kind=SpanKind.SERVER, attributes=_attributes(first)):
            for number in range(first + 1, min(first + SPANS_PER_TRACE, count)):
                with tracer.start_as_current_span("SELECT shop.orders", attributes=_attributes(number)):
                    pass


def _make_records(processor: Any, count: int) -> None:  # noqa: ANN401 - either signal's
    provider = LoggerProvider(resource=_resource(), shutdown_on_exit=False)
    if processor is not None:
        provider.add_log_record_processor(processor)
    logger = provider.get_logger("shop.instrumentation", "1.4.2")
    for number in range(count):
        logger.emit(
            timestamp=time.time_ns(),
            severity_number=SeverityNumber.INFO,
            severity_text="INFO",
            body=f"GET /api/v1/customers/{number}/orders took {number} ms",
            attributes=_attributes(number),
        )


_KINDS = {
    Signal.TRACES: _Kind(
        make=_make_spans,
        simple=SimpleSpanProcessor,
        in_memory=InMemorySpanExporter,
        finished=lambda memory: memory.get_finished_spans(),
        batch=BatchSpanProcessor,
    ),
    Signal.LOGS: _Kind(
        make=_make_records,
        simple=SimpleLogRecordProcessor,
        in_memory=InMemoryLogRecordExporter,
        finished=lambda memory: memory.get_finished_logs(),
        batch=BatchLogRecordProcessor,
    ),
}


def _exporter(turn: Turn) -> Any:  # noqa: ANN401 - of either signal
    traces = turn.signal is Signal.TRACES
    if turn.name == _OURS:
        return (PostgresSpanExporter if traces else PostgresLogRecordExporter)(**turn.target)
    if turn.name == _GRPC:
        return (OTLPSpanExporter if traces else OTLPLogExporter)(**turn.target)
    # Not among what the tests need.
    module = importlib.import_module(f"{_HTTP_PACKAGE}.{'trace_exporter' if traces else '_log_exporter'}")
    return (module.OTLPSpanExporter if traces else module.OTLPLogExporter)(**turn.target)


def take(turn: Turn) -> Cost:
    """Take a turn, in a process that does nothing else."""
    if GENERATOR_CORE is not None:
        os.sched_setaffinity(0, {GENERATOR_CORE})
    kind, count = _KINDS[turn.signal], turn.batches * _BATCH
    if turn.name == _NONE:
        kind.make(None, _BATCH)
        return Cost(alone=0.0, with_sdk=_cpu(kind.make, None, count))
    exporter = Tally(_exporter(turn))
    memory = kind.in_memory()
    kind.make(kind.simple(memory), count + _WARM_UP * _BATCH)
    items = kind.finished(memory)
    batches = [items[first : first + _BATCH] for first in range(0, len(items), _BATCH)]
    for batch in batches[:_WARM_UP]:
        exporter.export(batch)
    # The queue has room for all: what is dropped would cost nothing.
    processor = kind.batch(exporter, max_queue_size=2 * count, max_export_batch_size=_BATCH)

    def export_all() -> None:
        for batch in batches[_WARM_UP:]:
            exporter.export(batch)

    def make_and_export() -> None:
        kind.make(processor, count)
        processor.force_flush(_FLUSH_TIMEOUT)

    with settled():
        cost = Cost(alone=_cpu(export_all), with_sdk=_cpu(make_and_export))
    processor.shutdown()
    if exporter.exported != len(items) + count:
        raise RuntimeError(f"{turn.name}: {exporter.exported:,} of {len(items) + count:,} were exported")
    return cost


def _cpu(act: Callable[..., None], *arguments: object) -> float:
    began = time.process_time()
    act(*arguments)
    return time.process_time() - began


class _Sink(BaseHTTPRequestHandler):
    """Reads what is posted, and is content."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer 200."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve_http(port: Pipe) -> None:
    """Serve OTLP/HTTP without looking at it, and tell the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Sink) as server:
        port.send(server.server_port)
        server.serve_forever()


@contextlib.contextmanager
def http_sink() -> Iterator[str]:
    """Run such a server in a process of its own; yield its URL."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve_http, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def race(tables: Database, signal: Signal, targets: dict[str, dict[str, Any]], options: argparse.Namespace) -> Table:
    """Let the contestants take turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in targets}
    spawn = multiprocessing.get_context("spawn")
    for number in range(options.rounds):
        tables.truncate()
        say(f"{signal.items}, round {number + 1}")
        names = list(targets)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turn = Turn(name=name, signal=signal, batches=options.batches, target=targets[name])
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                costs[name].append(process.submit(take, turn).result())
    each = 1e6 / (options.batches * _BATCH)
    alone = {name: statistics.median(cost.alone for cost in turns) * each for name, turns in costs.items()}
    whole = {name: statistics.median(cost.with_sdk for cost in turns) * each for name, turns in costs.items()}
    beyond = {name: whole[name] - whole[_NONE] for name in targets}
    return Table(
        header=[signal.items, "export() alone", "ours to it", "with the SDK", "beyond the SDK alone", "ours to it"],
        rows=[
            [
                name,
                f"{alone[name]:.1f}",
                f"{alone[_OURS] / alone[name]:.2f}",
                f"{whole[name]:.1f}",
                f"{beyond[name]:.1f}",
                f"{beyond[_OURS] / beyond[name]:.2f}",
            ]
            if name != _NONE
            else [name, "", "", f"{whole[name]:.1f}", "", ""]
            for name in targets
        ],
    )


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    text = _TEXT.format(batch=_BATCH, rounds=options.rounds, items=options.batches * _BATCH)
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(receiving(tables))
        targets: dict[str, dict[str, Any]] = {
            _OURS: {"dsn": tables.settings.dsn, "schema": tables.settings.schema},
            _GRPC: {"endpoint": receiver.endpoint, "insecure": True},
            _NONE: {},
        }
        try:
            importlib.import_module(_HTTP_PACKAGE)
        except ModuleNotFoundError:
            text += f" OTLP/HTTP is left out: {_HTTP_PACKAGE} is not installed."
        else:
            targets[_HTTP] = {"endpoint": stack.enter_context(http_sink())}
        found = [race(tables, signal, targets, options) for signal in Signal]
    return [Section(title="", text=text, tables=found)]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--batches", type=int, default=20, help="of 512 items, that a contestant exports in each way")
    options = made.parse_args(arguments)
    if options.quick:
        options.rounds, options.batches = 1, 2
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
