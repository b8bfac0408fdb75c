"""Both cores side by side: CPU time a span and a log record, for requests of several sizes and contents.

    .venv/bin/python benchmarks/transcode.py [--sizes 100,512,1000,8000] [--rounds 7]

The figures are the thread's CPU time, best of the rounds, which alternate between the cores; so a busy machine
disturbs them little. `id` is what it takes to hash the request, which names it. Takes half a minute.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks.report import Section, Table, facts, markdown, plain, publish
from benchmarks.rungs import cores
from otel_pg_exporter import mapping
from otel_pg_exporter.bench.requests import Content, Template
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.transcode import wire
from otel_pg_exporter.transcode.core import Core

_TITLE = "Transcoding"
_TEXT = (
    "CPU microseconds of one thread an item, from OTLP bytes to COPY rows, best of {rounds} rounds. `id` is the hash"
    " that names a request."
)


def _cost(call: Callable[[], object], seconds: float = 0.02) -> float:
    """Return the CPU time of one call, from as many as take a moment."""
    calls = 0
    start = time.thread_time()
    while (spent := time.thread_time() - start) < seconds or not calls:
        call()
        calls += 1
    return spent / calls


def _row(signal: Signal, content: Content, count: int, contestants: list[Core], rounds: int) -> list[str]:
    now = time.time_ns()
    body = Template(signal, content, count).fresh(now)
    columns = mapping.load()
    plans = [core.compile_plan(columns, signal, Window()) for core in contestants]
    calls: list[Callable[[], object]] = [
        lambda core=core, plan=plan: core.transcode(plan, body, now_ns=now)  # type: ignore[misc] # defaults bind them
        for core, plan in zip(contestants, plans, strict=True)
    ]
    calls.append(lambda: wire.identify(signal, body))
    costs = [[_cost(call) for call in calls] for _ in range(rounds)]
    *transcoding, identity = [min(each) / count * 1e6 for each in zip(*costs, strict=True)]
    return [
        f"{signal.items}, {content.value}, {count:,} a request",
        f"{len(body) / count:,.0f}",
        *(f"{each:.2f}" for each in transcoding),
        *([f"{transcoding[0] / transcoding[1]:.1f}x"] if len(transcoding) > 1 else []),
        f"{identity:.2f}",
    ]


def _rows(sizes: list[int], contestants: list[Core], rounds: int) -> Iterator[list[str]]:
    for signal in Signal:
        for content in Content:
            for count in sizes:
                yield _row(signal, content, count, contestants, rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", type=lambda text: [int(each) for each in text.split(",")], default=[100, 512, 1000, 8000]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the results into a file, too")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    contestants = cores()
    ratio = ["ratio"] if len(contestants) > 1 else []
    header = ["request", "bytes an item", *(core.name for core in contestants), *ratio, "id"]
    table = Table(header=header, rows=list(_rows(options.sizes, contestants, options.rounds)))
    sections = [Section(title="", text=_TEXT.format(rounds=options.rounds), tables=[table])]
    known = facts("not used", load)
    print(plain(known, sections))
    if options.markdown is not None:
        publish(
            options.markdown,
            _TITLE,
            markdown(
                known, sections, title=_TITLE, command="python benchmarks/transcode.py --markdown benchmarks/RESULTS.md"
            ),
        )


if __name__ == "__main__":
    main()
