#!/usr/bin/env python3
"""Both cores side by side: CPU time a span and a log record, for requests of several sizes and contents.

    .venv/bin/python benchmarks/transcode.py [--sizes 100,512,1000,8000] [--rounds 7]

The figures are the thread's CPU time, best of the rounds, which alternate between the cores; so a busy machine
disturbs them little. `id` is the part that both cores share: the hash that names a request.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO

from benchmarks.report import Table, aligned
from otel_pg_exporter import mapping
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.transcode import wire
from otel_pg_exporter.transcode.core import Core, choose

_PROMPT = '{"role": "user", "content": "Explain how a COPY differs from an INSERT.\\nGive an example, and figures."}, '
_CONTENTS = ("small", "ten attributes", "GenAI prompt")


def _attributes(content: str, number: int, chance: random.Random) -> list[KeyValue]:
    values: dict[str, AnyValue] = {}
    if content == "ten attributes":
        values = {
            "http.request.method": AnyValue(string_value="GET"),
            "url.full": AnyValue(string_value=f"https://shop.example/api/v1/customers/{number}/orders?limit=50"),
            "user_agent.original": AnyValue(string_value="Mozilla/5.0 (X11; Linux x86_64) Chrome/131.0.0.0 Safari"),
            "http.route": AnyValue(string_value="/api/v1/customers/{id}/orders"),
            "http.response.status_code": AnyValue(int_value=200),
            "http.response.body.size": AnyValue(int_value=chance.randrange(10**6)),
            "cache.ratio": AnyValue(double_value=chance.random()),
            "retried": AnyValue(bool_value=False),
            "db.rows": AnyValue(int_value=number),
            "tags": AnyValue(array_value=ArrayValue(values=[AnyValue(string_value="a"), AnyValue(string_value="b")])),
        }
    elif content == "GenAI prompt":
        values = {
            "gen_ai.operation.name": AnyValue(string_value="chat"),
            "gen_ai.provider.name": AnyValue(string_value="openai"),
            "gen_ai.request.model": AnyValue(string_value="gpt-4o"),
            "gen_ai.usage.input_tokens": AnyValue(int_value=number),
            "gen_ai.usage.output_tokens": AnyValue(int_value=2 * number),
            "gen_ai.input.messages": AnyValue(string_value=_PROMPT * chance.randrange(19, 76)),  # 2 to 8 KB
        }
    return [KeyValue(key=key, value=value) for key, value in values.items()]


def _body(signal: Signal, content: str, count: int) -> bytes:
    chance = random.Random(1)
    now = time.time_ns()
    request: Any = ExportTraceServiceRequest() if signal is Signal.TRACES else ExportLogsServiceRequest()
    group = request.resource_spans.add() if signal is Signal.TRACES else request.resource_logs.add()
    for key in ("service.name", "service.version", "host.name", "telemetry.sdk.language"):
        group.resource.attributes.add(key=key).value.string_value = "some value"
    scope = group.scope_spans.add() if signal is Signal.TRACES else group.scope_logs.add()
    scope.scope.name = "benchmark"
    for number in range(count):
        common: dict[str, Any] = {"trace_id": chance.randbytes(16), "span_id": chance.randbytes(8)}
        attributes = _attributes(content, number, chance)
        if signal is Signal.TRACES:
            times: dict[str, Any] = {"start_time_unix_nano": now, "end_time_unix_nano": now + 10**6}
            scope.spans.add(name="GET /api/v1/customers", kind=2, attributes=attributes, **times, **common)
        else:
            record = scope.log_records.add(time_unix_nano=now, attributes=attributes, **common)
            record.severity_number = SEVERITY_NUMBER_INFO
            record.body.string_value = f"GET /api/v1/customers/{number}/orders took {chance.randrange(100)} ms"
    return bytes(request.SerializeToString())


def _cost(call: Callable[[], object], seconds: float = 0.02) -> float:
    """Return the CPU time of one call, from as many as take a moment."""
    calls = 0
    start = time.thread_time()
    while (spent := time.thread_time() - start) < seconds or not calls:
        call()
        calls += 1
    return spent / calls


def _row(signal: Signal, content: str, count: int, cores: list[Core], rounds: int) -> list[str]:
    body = _body(signal, content, count)
    columns, now = mapping.load(), time.time_ns()
    plans = [core.compile_plan(columns, signal, Window()) for core in cores]
    calls: list[Callable[[], object]] = [
        lambda core=core, plan=plan: core.transcode(plan, body, now_ns=now)  # type: ignore[misc] # defaults bind them
        for core, plan in zip(cores, plans, strict=True)
    ]
    calls.append(lambda: wire.identify(signal, body))
    costs = [[_cost(call) for call in calls] for _ in range(rounds)]
    best = [min(each) / count * 1e6 for each in zip(*costs, strict=True)]
    *transcoding, identity = best
    ratio = [f"{transcoding[0] / transcoding[1]:.1f}"] if len(cores) > 1 else []
    what = "span" if signal is Signal.TRACES else "log record"
    size = f"{len(body) / count:,.0f}"
    return [
        f"{content}, {count:,} a request",
        what,
        size,
        *(f"{each:.2f}" for each in transcoding),
        *ratio,
        f"{identity:.2f}",
    ]


def _rows(sizes: list[int], cores: list[Core], rounds: int) -> Iterator[list[str]]:
    for signal in Signal:
        for content in _CONTENTS:
            for count in sizes:
                yield _row(signal, content, count, cores, rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Both cores side by side.")
    parser.add_argument("--sizes", default="100,512,1000,8000", help="items a request")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    reference, found = choose("python"), choose("auto")
    cores = [reference] if found.name == reference.name else [reference, found]
    ratio = ["ratio"] if len(cores) > 1 else []
    header = ["request", "item", "bytes", *(f"{core.name}, µs" for core in cores), *ratio, "of it id, µs"]
    rows = list(_rows([int(size) for size in options.sizes.split(",")], cores, options.rounds))
    print("\n".join(aligned(Table(header=header, rows=rows))))


if __name__ == "__main__":
    main()
