"""The ladder of write methods: one run, tables of ratios.

Run `make bench`, or `python benchmarks/ladder.py --help`. What the figures mean stands in benchmarks/README.md.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script is run by its path

from benchmarks import summaries
from benchmarks.bench import DEFAULT, QUICK, Bench, Effort
from benchmarks.profiling import profile
from benchmarks.questions import duplicates, isolation, tiny_batches
from benchmarks.race import Lap, factor, median, race
from benchmarks.report import Section, Table, facts, markdown, plain, publish
from benchmarks.rungs import INSERT_PER_ROW, WRITE_ROW, rungs
from benchmarks.server import database
from benchmarks.workload import Workload
from otel_pg_exporter import mapping
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.connection import Connections

SIGNALS = ("spans", "logs", "traces")
SECTIONS: Mapping[str, Callable[[Bench], Section]] = {
    "tiny": tiny_batches,
    "duplicates": duplicates,
    "isolation": isolation,
    "profile": profile,
}
_TITLE = "Ways to write"
_WARM_UP_ROWS = 50
_TEXT = (
    "Rows a second, and in brackets the ratios to {first} and to {second}. Every rung writes into the same tables"
    " with all their indexes, emptied before, one transaction a batch, one connection; medians over {rounds} rounds of"
    " {rows:,} rows or one batch, whichever is more; those that write row by row do {slow_rows:,} rows in every second"
    " round. The second table of each signal says what of it the client computes, while PostgreSQL works or waits."
)


def ladder(bench: Bench, signals: Sequence[str]) -> Section:
    """Race all ways to write, by signal and batch size."""
    tables = []
    for signal in signals:
        run, references = _race_rows, (WRITE_ROW, INSERT_PER_ROW)
        if signal == "traces":
            run, references = _race_summaries, (summaries.EXECUTEMANY, summaries.UPSERT_PER_ROW)
        laps = {}
        for size in bench.effort.sizes:
            _progress(f"ladder: {signal} by {size:,}")
            laps[size] = run(bench, signal, size)
        tables.append(_rates(signal, laps, references))
        tables.append(_computing(signal, laps))
    text = _TEXT.format(
        first=f"`{WRITE_ROW}` (traces: `{summaries.EXECUTEMANY}`)",
        second=f"`{INSERT_PER_ROW}` (traces: `{summaries.UPSERT_PER_ROW}`)",
        rounds=bench.effort.rounds,
        rows=bench.effort.rows,
        slow_rows=bench.effort.slow_rows,
    )
    return Section(title="The ladder", text=text, tables=tables)


def _race_rows(bench: Bench, table: str, size: int) -> dict[str, list[Lap]]:
    signal = Signal.TRACES if table == "spans" else Signal.LOGS
    batches = [bench.workload.batch(signal, size) for _ in range(_batches(bench.effort.rows, size))]
    for batch in batches:
        _ = batch.values, batch.buffer  # made now, not while the clock runs

    def check(count: int) -> None:
        assert bench.database.count(table) == _WARM_UP_ROWS + count * size

    return race(
        rungs(bench, batches[0].table),
        batches,
        bench.workload.batch(signal, _WARM_UP_ROWS),
        rounds=bench.effort.rounds,
        slow_batches=_batches(bench.effort.slow_rows, size),
        empty=bench.database.truncate,
        check=check,
    )


def _race_summaries(bench: Bench, table: str, size: int) -> dict[str, list[Lap]]:
    count = _batches(bench.effort.rows, size)
    sums = len(bench.database.mapping.spans.sums)
    warm_up, *batches = summaries.make(size, count + 1, sums, seed=size)

    def check(count: int) -> None:
        assert bench.database.count(table) == size + count * (size // 2)

    return race(
        summaries.upserts(bench),
        batches,
        warm_up,
        rounds=bench.effort.rounds,
        slow_batches=_batches(bench.effort.slow_rows, size),
        empty=bench.database.truncate,
        check=check,
    )


def _batches(rows: int, size: int) -> int:
    return max(1, rows // size)


def _rates(signal: str, laps: Mapping[int, Mapping[str, list[Lap]]], references: tuple[str, str]) -> Table:
    names = list(next(iter(laps.values())))
    return Table(
        header=[signal, *(f"{size:,} a batch" for size in laps)],
        rows=[[name, *(_rate(size, by_name, name, references) for size, by_name in laps.items())] for name in names],
    )


def _rate(size: int, laps: Mapping[str, list[Lap]], name: str, references: tuple[str, str]) -> str:
    seconds = {each: median([lap.seconds for lap in laps[each]]) for each in (name, *references)}
    ratios = ", ".join(factor(seconds[reference] / seconds[name]) for reference in references)
    return f"{size / seconds[name]:,.0f} ({ratios})"


def _computing(signal: str, laps: Mapping[int, Mapping[str, list[Lap]]]) -> Table:
    names = list(next(iter(laps.values())))
    return Table(
        header=[f"{signal}: the client's CPU time a row", *(f"{size:,} a batch" for size in laps)],
        rows=[
            [
                name,
                *(
                    f"{median([lap.cpu for lap in by_name[name]]) / size * 1e6:.1f} µs"
                    for size, by_name in laps.items()
                ),
            ]
            for name in names
        ],
    )


def _progress(what: str) -> None:
    print(f"{time.monotonic() - _STARTED:5.0f} s  {what}", file=sys.stderr, flush=True)


_STARTED = time.monotonic()


@contextlib.contextmanager
def _bench(options: argparse.Namespace) -> Iterator[Bench]:
    workload = Workload(mapping.load())
    with contextlib.ExitStack() as stack:
        tables = stack.enter_context(database(options.dsn, day=workload.day))
        pool = Connections(tables.settings, size=1)
        stack.callback(pool.close)
        yield Bench(
            database=tables,
            connection=stack.enter_context(contextlib.closing(tables.connect())),
            pool=pool,
            workload=workload,
            effort=_effort(options),
        )


def _effort(options: argparse.Namespace) -> Effort:
    chosen = {name: getattr(options, name) for name in ("sizes", "rows", "rounds") if getattr(options, name)}
    return dataclasses.replace(QUICK if options.quick else DEFAULT, **chosen)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size.replace("_", "")) for size in text.split(","))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = ("ladder", *SECTIONS)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs: no figures")
    parser.add_argument("--rounds", type=int, help=f"turns that each contestant takes (default {DEFAULT.rounds})")
    parser.add_argument("--rows", type=int, help=f"rows a rung writes in a round (default {DEFAULT.rows})")
    parser.add_argument("--sizes", type=_sizes, help="batch sizes of the ladder, such as 100,1000")
    parser.add_argument("--signals", type=_words(SIGNALS), default=SIGNALS, help=f"of {','.join(SIGNALS)}")
    parser.add_argument("--sections", type=_words(every), default=every, help=f"of {','.join(every)}")
    parser.add_argument(
        "--dsn", help="a PostgreSQL to measure instead of an embedded one; it gets a schema of its own, dropped later"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the results into a file, too")
    return parser.parse_args(arguments)


def _words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
        return chosen

    return words


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    sections = []
    load = os.getloadavg()[0]
    with _bench(options) as bench:
        if "ladder" in options.sections:
            sections.append(ladder(bench, options.signals))
        for name, section in SECTIONS.items():
            if name in options.sections:
                _progress(name)
                sections.append(section(bench))
        machine = facts(bench.database.version(), load)
    _progress("done")
    print(plain(machine, sections))
    if options.markdown is not None:
        command = "make bench ARGS='--markdown benchmarks/RESULTS.md'"
        publish(options.markdown, _TITLE, markdown(machine, sections, title=_TITLE, command=command))


if __name__ == "__main__":
    main()
