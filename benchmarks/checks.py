"""What no benchmark may pass over: rows that are missing, calls that failed, a generator that set the pace itself."""

import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.receiver import Measured, Receiver
from benchmarks.server import Database
from otel_pg_exporter.bench.load import Load, Sent
from otel_pg_exporter.model import Signal

_BUSY = 0.8  # of its core, from which on the generator may be what is measured
_PATIENCE = 30.0  # seconds for what was spooled, and so acknowledged, to reach its table
_LOOK_INTERVAL = 0.1  # seconds


def run(receiver: Receiver, load: Load) -> Measured:
    """Send a load into empty tables, and see to it that they hold what was acknowledged."""
    measured = receiver.run(load)
    sent = measured.sent
    check(receiver.tables, load, sent, least=(sent.requests - sent.resent) * load.items)
    return measured


def check(tables: Database, load: Load, sent: Sent, *, least: int) -> int:
    """Return how many rows there are, which are `least` or more. Raises RuntimeError if not, or if nothing was sent."""
    signal = Signal(load.signal)
    if not sent.requests:
        raise RuntimeError(f"nothing was acknowledged within {sent.seconds:g} seconds; {sent.failures}")
    if sent.rejected:
        raise RuntimeError(f"{sent.rejected:,} of {sent.requests:,} requests had items that were rejected")
    patience = time.monotonic() + _PATIENCE
    while (rows := tables.count(signal.table)) < least:
        if time.monotonic() > patience:
            raise RuntimeError(f"{least:,} {signal.items} were acknowledged, {rows:,} are stored; {sent.failures}")
        time.sleep(_LOOK_INTERVAL)
    return rows


def remarks(runs: Sequence[Sent]) -> str:
    """Say what is to be known about the figures of some runs, for a table's last column."""
    failures = sum((Counter(sent.failures) for sent in runs), Counter[str]())
    said = [f"{count:,} calls {code}" for code, count in sorted(failures.items())]
    if any(sent.cpu_share > _BUSY for sent in runs):
        said.append("the generator set the pace")
    return "; ".join(said)


def in_turns(contestants: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """List rounds with contestants, each round beginning with another one, so that none always follows the same."""
    return [
        (turn, contestants[(turn + place) % len(contestants)])
        for turn in range(rounds)
        for place in range(len(contestants))
    ]
