"""Where the client's time goes: the Writer under cProfile, and the cost of transcoding a span."""

import cProfile
import time
from collections.abc import Iterator
from pathlib import PurePath

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.bench import Bench
from benchmarks.race import median, settled, timed
from benchmarks.report import Section, Table
from benchmarks.rungs import writer
from benchmarks.workload import FIXED_ATTRIBUTES, Workload
from otel_pg_exporter.model import Signal
from otel_pg_exporter.transcode import readable, wire

_SHOWN = 12
_REPEATS = 5


def profile(bench: Bench) -> Section:
    """Profile the Writer and time the transcoders."""
    size = bench.effort.profile_rows
    return Section(
        title="Where the client's time goes",
        text=(
            f"One Writer.write of {size:,} spans under cProfile, which makes Python look slower than it is; own time,"
            " calls to PostgreSQL included where they wait. Then transcoding, without a database."
        ),
        tables=[_writer_profile(bench, size), _transcoders(bench.workload, min(size, 2_000))],
    )


def _writer_profile(bench: Bench, size: int) -> Table:
    bench.database.truncate()
    write = writer(bench)
    write(bench.workload.batch(Signal.TRACES, 50))
    batch = bench.workload.batch(Signal.TRACES, size)
    profiler = cProfile.Profile()
    with settled():
        profiler.runcall(write, batch)
    entries = sorted(_own_times(profiler), reverse=True)
    total = sum(seconds for seconds, _, _ in entries)
    return Table(
        header=["Writer.write: function", "calls", "own time", "share"],
        rows=[
            [name, f"{calls:,}", f"{seconds * 1000:.1f} ms", f"{seconds / total:.1%}"]
            for seconds, calls, name in entries[:_SHOWN]
        ],
    )


def _own_times(profiler: cProfile.Profile) -> Iterator[tuple[float, int, str]]:
    for entry in profiler.getstats():
        code = entry.code
        name = code if isinstance(code, str) else f"{PurePath(code.co_filename).name} {code.co_qualname}"
        yield entry.inlinetime, entry.callcount, name


def _transcoders(workload: Workload, size: int) -> Table:
    bodies = workload.batch(Signal.TRACES, size).bodies
    spans = _sdk_spans(size)
    plan, now = workload.plan(Signal.TRACES), time.time_ns()
    with settled():
        by_wire = [timed(lambda: [wire.transcode(plan, each, now_ns=now) for each in bodies]) for _ in range(_REPEATS)]
        by_readable = [
            timed(readable.transcode, plan, spans, request_id=bytes(16), now_ns=now) for _ in range(_REPEATS)
        ]
    octets = sum(map(len, bodies)) / size
    return Table(
        header=["transcoding, ten mixed attributes", "a span"],
        rows=[
            [f"wire: OTLP bytes ({octets:,.0f} a span) to rows", f"{median(by_wire) / size * 1e6:.1f} µs"],
            ["readable: the SDK's spans to rows", f"{median(by_readable) / size * 1e6:.1f} µs"],
        ],
    )


def _sdk_spans(count: int) -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("opentelemetry.instrumentation.asgi", "0.60b0")
    for number in range(count):
        with tracer.start_as_current_span("GET /api/v1/customers/{id}/orders/{order}") as span:
            span.set_attributes(FIXED_ATTRIBUTES)
            span.set_attribute("url.full", f"https://shop.example.com/api/v1/customers/{number}/orders/{number}")
            span.set_attribute("app.customer.id", number)
            span.set_attribute("app.score", number / count)
    provider.shutdown()
    return exporter.get_finished_spans()
