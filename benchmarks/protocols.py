"""What OTLP/HTTP costs the receiver against OTLP/gRPC: CPU microseconds a request, and items a second.

    .venv/bin/python benchmarks/protocols.py [--sizes 100,1000] [--rounds 5] [--items 50000]

Two receivers that do all that `serve` does but for PostgreSQL take turns, one for each protocol. What JSON costs
beyond protobuf, its conversion, is measured by itself. Takes a minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.checks import in_turns, remarks
from benchmarks.cost import Case, lap
from benchmarks.hollow import hollow
from benchmarks.race import median
from benchmarks.report import Section, Table
from benchmarks.script import parser, run, say
from benchmarks.server import Database
from otel_pg_exporter.bench.requests import Content, templates
from otel_pg_exporter.cli.otlp_json import otlp_json
from otel_pg_exporter.model import Signal, unbounded
from otel_pg_exporter.transcode.otlp_json import to_protobuf

if TYPE_CHECKING:
    from benchmarks.receiver import Measured

_TITLE = "OTLP/HTTP against OTLP/gRPC"
_PROTOCOLS = ("grpc", "http")
_TEXT = (
    "CPU microseconds of a receiver without PostgreSQL for a request of mixed spans, and spans a second; figures are"
    " medians of {rounds} rounds in turns. Where the generator's core is near 1, it sets the pace. JSON is converted"
    " to protobuf first; the last column is what that takes for each span, in a single thread."
)


def row(items: int, tables: Database, options: argparse.Namespace) -> list[str]:
    """Let the protocols take turns; return the table's row."""
    load = Case(signal=Signal.TRACES, content=Content.MIXED, items=items, gzip=False).load(options.items)
    laps: dict[str, list[Measured]] = {name: [] for name in _PROTOCOLS}
    with ExitStack() as stack:
        receivers = {name: stack.enter_context(hollow(tables, name)) for name in _PROTOCOLS}
        for name in _PROTOCOLS:
            lap(receivers[name], replace(load, protocol=name), stores=False)  # warm
        for _, name in in_turns(list(_PROTOCOLS), options.rounds):
            laps[name].append(lap(receivers[name], replace(load, protocol=name), stores=False))
    cost = {name: median([each.receiver_cost * items for each in of_one]) for name, of_one in laps.items()}
    rate = {name: median([each.sent.items_per_second for each in of_one]) for name, of_one in laps.items()}
    sent = [each.sent for of_one in laps.values() for each in of_one]
    return [
        f"{items:,}",
        f"{cost['grpc']:,.0f}",
        f"{cost['http']:,.0f}",
        f"{cost['http'] / cost['grpc']:.2f}",
        f"{rate['grpc']:,.0f}",
        f"{rate['http']:,.0f}",
        f"{max(each.cpu_share for each in sent):.2f}",
        f"{conversion(items):.0f}",
        remarks(sent),
    ]


def conversion(items: int) -> float:
    """Return the CPU microseconds that converting JSON takes for a span."""
    (template,) = templates(Signal.TRACES, Content.MIXED, items, number=1)
    text = json.dumps(otlp_json(Signal.TRACES.value, template.fresh(time.time_ns()))).encode()
    took = []
    for _ in range(5):
        began = time.process_time()
        to_protobuf(ExportTraceServiceRequest, text, unbounded)
        took.append(time.process_time() - began)
    return median(took) / items * 1e6


def measure(tables: Database, options: argparse.Namespace) -> Sequence[Section]:
    header = ["spans a request", "gRPC, µs", "HTTP, µs", "ratio", "gRPC, spans/s", "HTTP, spans/s"]
    header += ["generator's core", "JSON, µs a span", "remarks"]
    rows = []
    for items in options.sizes:
        say(f"{items:,} spans a request")
        rows.append(row(items, tables, options))
    return [Section(title="", text=_TEXT.format(**vars(options)), tables=[Table(header=header, rows=rows)])]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--sizes", type=lambda text: [int(each) for each in text.split(",")], default=[100, 1_000])
    made.add_argument("--items", type=int, default=50_000, help="a run")
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args(arguments)
    if options.quick:
        options.items, options.rounds = 2_000, 1
    run(_TITLE, options, measure)


if __name__ == "__main__":
    main()
