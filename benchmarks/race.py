"""Timing: contestants take turns, round after round, so that a machine's moods hit all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, TypeVar

from benchmarks.rungs import Rung

T = TypeVar("T")
P = ParamSpec("P")


class Lap(NamedTuple):
    """One timed transaction."""

    seconds: float
    cpu: float  # seconds that this process computed; PostgreSQL is another one


def race(
    rungs: Sequence[Rung[T]],
    batches: Sequence[T],
    warm_up: T,
    *,
    rounds: int,
    slow_batches: int,
    empty: Callable[[], None],
    check: Callable[[int], None],
) -> dict[str, list[Lap]]:
    """Let each rung write the batches in each round, into empty tables.

    Slow rungs sit every second round out, and write the first `slow_batches` only. One untimed transaction, `warm_up`,
    opens connections and prepares statements. `check` gets the number of timed batches written, to look for them.
    """
    laps: dict[str, list[Lap]] = {rung.name: [] for rung in rungs}
    with settled():
        for turn in range(rounds):
            # Each round begins with another rung, so that none always follows the same one.
            for rung in [*rungs[turn % len(rungs) :], *rungs[: turn % len(rungs)]]:
                if rung.slow and turn % 2:
                    continue
                empty()
                write = rung.open()
                write(warm_up)
                chosen = batches[:slow_batches] if rung.slow else batches
                laps[rung.name] += [_lap(write, batch) for batch in chosen]
                check(len(chosen))
    return laps


def _lap(write: Callable[[T], None], batch: T) -> Lap:
    computed = time.process_time()
    seconds = timed(write, batch)
    return Lap(seconds, time.process_time() - computed)


def timed(act: Callable[P, object], *arguments: P.args, **keywords: P.kwargs) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    act(*arguments, **keywords)
    return time.perf_counter() - started


@contextmanager
def settled() -> Iterator[None]:
    """Take what lives now out of the garbage collector's sight: the workload is not what is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"  # noqa: PLR2004 - three digits


def factor(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"  # noqa: PLR2004 - three digits
