"""What this process knows about itself: item counters, batch statistics, and log lines that don't flood."""

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

from otel_pg_exporter.model import REPEATED, Anomaly, Signal

_RECENT = 4096  # batches whose durations are kept for the percentiles


class Stage(enum.StrEnum):
    """Where a request's time goes: the first three for each request, the others once for all that are in a batch."""

    RECEIVE = "receive"  # from the call's arrival until its body is whole
    TRANSCODE = "transcode"
    WAIT = "wait"  # for a writer
    MERGE = "merge"  # in key order, and a connection borrowed
    RESOURCES = "resources"
    LEDGER = "ledger"
    COPY = "copy"  # spans or log records
    TRACES = "traces"
    DEAD_LETTERS = "dead letters"
    COMMIT = "commit"


Took = Callable[[Stage, float], None]
"""Told how many seconds a stage took."""


def unmeasured(_stage: Stage, _seconds: float) -> None:
    """Be the `Took` of what nobody measures."""


Repeated = Callable[[int], None]
"""Told how many items a retry hears to be rejected, as the first time."""


def uncounted(_rejected: int) -> None:
    """Be the `Repeated` of what nobody counts."""


Answered = Callable[[str, str, float], None]
"""Told what was called, with which status it was answered, and how many seconds that took.

What was called is gRPC's method; or HTTP's, a blank, and the route, which is left empty where there is none.
"""


def unobserved(_called: str, _status: str, _seconds: float) -> None:
    """Be the `Answered` of what nobody observes."""


class StageClock:
    """Measures the stages of one transaction, one after the other; of one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[Stage, float] = {}

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Add the time that the `with` block takes, unless it fails."""
        began = self._clock()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """How often a stage was gone through, and how long that took in all."""

    count: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """One committed transaction."""

    signal: Signal
    rows: int  # stored
    duplicates: int
    conflicts: int  # duplicates with other content
    rejected: int
    bytes: int  # of COPY data
    seconds: float  # from the first statement to the COMMIT's answer
    repairs: Mapping[Anomaly, int]
    stages: Mapping[Stage, float]  # seconds
    rejections: Mapping[str, int]  # `rejected` by `Rejection.kind`
    dead_letters: int  # written; none again for what was refused before
    lag: float | None = None  # seconds from the end of spans to the COMMIT's answer, see `traces.sampled_ends`


def _ignored(_report: BatchReport) -> None:
    """Be told of batches that nobody observes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSnapshot:
    """What a writer has committed so far. Percentiles are over the last 4,096 batches; None before the first."""

    rows: int
    batches: int
    duplicates: int
    duplicate_conflicts: int
    rejected: int
    bytes: int
    total_seconds: float  # spent in transactions, added over all writers
    rows_per_second: float  # rows / total_seconds
    p50_batch_seconds: float | None
    p99_batch_seconds: float | None
    repairs: Mapping[Anomaly, int]
    stages: Mapping[Stage, StageTime]
    rejections: Mapping[str, int]  # by `Rejection.kind`
    dead_letters: int

    def __str__(self) -> str:
        """Say it in one log line."""
        p50, p99 = (
            "-" if seconds is None else f"{seconds * 1000:.1f} ms"
            for seconds in (self.p50_batch_seconds, self.p99_batch_seconds)
        )
        repaired = "".join(
            f", {(anomaly.name or str(anomaly)).lower()} {count:,}" for anomaly, count in sorted(self.repairs.items())
        )
        return (
            f"{self.rows:,} rows in {self.batches:,} batches, {self.duplicates:,} duplicates"
            f" ({self.duplicate_conflicts:,} with other content), {self.rejected:,} rejected, {self.bytes:,} bytes,"
            f" {self.total_seconds:.3f} s, {self.rows_per_second:,.0f} rows/s, batch p50 {p50}, p99 {p99}{repaired}"
        )


class Statistics:
    """Adds up committed batches, and what their requests' time went to. The lock guards every figure."""

    def __init__(self, observe: Callable[[BatchReport], None] = _ignored) -> None:
        """Begin at zero."""
        self.observe = observe
        """Told of each batch, in the thread that has committed it; to be set before the first."""
        self._lock = threading.Lock()
        self._rows = self._batches = self._duplicates = self._conflicts = self._rejected = self._bytes = 0
        self._dead_letters = 0
        self._seconds = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._repairs: dict[Anomaly, int] = {}
        self._rejections: dict[str, int] = {}
        self._stages: dict[Stage, tuple[int, float]] = dict.fromkeys(Stage, (0, 0.0))

    def took(self, stage: Stage, seconds: float) -> None:
        """Note how long a stage took."""
        with self._lock:
            self._add(stage, seconds)

    def _add(self, stage: Stage, seconds: float) -> None:
        count, total = self._stages[stage]
        self._stages[stage] = count + 1, total + seconds

    def repeated(self, rejected: int) -> None:
        """Add items that were rejected again without a batch: by a retry of what is in the spool."""
        with self._lock:
            self._rejections[REPEATED] = self._rejections.get(REPEATED, 0) + rejected

    def record(self, report: BatchReport) -> None:
        """Add one committed batch."""
        with self._lock:
            self._rows += report.rows
            self._batches += 1
            self._duplicates += report.duplicates
            self._conflicts += report.conflicts
            self._rejected += report.rejected
            self._bytes += report.bytes
            self._seconds += report.seconds
            self._recent.append(report.seconds)
            self._dead_letters += report.dead_letters
            for anomaly, count in report.repairs.items():
                self._repairs[anomaly] = self._repairs.get(anomaly, 0) + count
            for kind, count in report.rejections.items():
                self._rejections[kind] = self._rejections.get(kind, 0) + count
            for stage, seconds in report.stages.items():
                self._add(stage, seconds)
        self.observe(report)

    def snapshot(self) -> StatisticsSnapshot:
        """Return the figures of this moment."""
        with self._lock:
            recent = sorted(self._recent)
            return StatisticsSnapshot(
                rows=self._rows,
                batches=self._batches,
                duplicates=self._duplicates,
                duplicate_conflicts=self._conflicts,
                rejected=self._rejected,
                bytes=self._bytes,
                total_seconds=self._seconds,
                rows_per_second=self._rows / self._seconds if self._seconds else 0.0,
                p50_batch_seconds=_percentile(recent, 0.50),
                p99_batch_seconds=_percentile(recent, 0.99),
                repairs=dict(self._repairs),
                rejections=dict(self._rejections),
                dead_letters=self._dead_letters,
                stages={stage: StageTime(count=n, seconds=spent) for stage, (n, spent) in self._stages.items()},
            )


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemCounts:
    """Where this process's items are, at any moment.

    `received + recovered_from_spool = stored + duplicate + rejected + refused + in_spool + handed_over + in_flight`. An
    item that was spooled is settled by the drain alone. `spooled` and `drained` only tell how many went which way.
    """

    received: int = 0
    recovered_from_spool: int = 0  # found in the spool of a process that is dead
    stored: int = 0
    duplicate: int = 0
    rejected: int = 0  # refused one by one; in dead_letters
    refused: int = 0  # refused with their whole request; the sender was told to retry or to give up
    in_spool: int = 0  # acknowledged, on disk, and not yet settled
    handed_over: int = 0  # spooled, then taken over by another process, to which they are recovered ones
    in_flight: int = 0
    spooled: int = 0  # ever put into the spool
    drained: int = 0  # ever taken out of it, settled

    @property
    def balanced(self) -> bool:
        """Whether every item is accounted for."""
        settled = self.stored + self.duplicate + self.rejected + self.refused
        unsettled = self.in_spool + self.handed_over + self.in_flight
        return self.received + self.recovered_from_spool == settled + unsettled

    def __str__(self) -> str:
        """Say it in one log line; of the spool only if it was ever needed."""
        recovered = f" + {self.recovered_from_spool:,} recovered from the spool" if self.recovered_from_spool else ""
        in_spool = f" + {self.in_spool:,} in the spool" if self.spooled or self.recovered_from_spool else ""
        in_spool += f" + {self.handed_over:,} handed over" if self.handed_over else ""
        return (
            f"{self.received:,} received{recovered} = {self.stored:,} stored + {self.duplicate:,} duplicate"
            f" + {self.rejected:,} rejected + {self.refused:,} refused{in_spool} + {self.in_flight:,} in flight"
        )


class ItemCounters:
    """Counts each item once, when it comes and when it is settled. The lock guards the counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {signal: {field.name: 0 for field in fields(ItemCounts)} for signal in Signal}

    def add(self, signal: Signal, /, **changes: int) -> None:
        """Add to the named counts of one signal, all at once."""
        with self._lock:
            counts = self._counts[signal]
            for name, change in changes.items():
                counts[name] += change

    def by_signal(self) -> Mapping[Signal, ItemCounts]:
        """Return the counts of this moment."""
        with self._lock:
            return {signal: ItemCounts(**counts) for signal, counts in self._counts.items()}

    def snapshot(self) -> ItemCounts:
        """Return the counts of this moment, of all signals together."""
        each = self.by_signal().values()
        return ItemCounts(**{field.name: sum(getattr(one, field.name) for one in each) for field in fields(ItemCounts)})


class RateLimitedLogger:
    """Logs one message of a kind at once and then at most every `interval` seconds, with how many were left out.

    No lock guards the times and counts, so that none can stay locked in a forked child: threads that meet here may at
    worst log one line too many.
    """

    def __init__(
        self, logger: logging.Logger, *, interval: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval = interval
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def log(self, level: int, kind: str, message: str, *, exc_info: BaseException | None = None) -> bool:
        """Log `message`, unless one of the same `kind` was logged less than `interval` seconds ago; tell whether."""
        now = self._clock()
        last, omitted = self._last.get(kind, (-self._interval, 0))
        if now - last < self._interval:
            self._last[kind] = (last, omitted + 1)
            return False
        self._last[kind] = (now, 0)
        suffix = f" ({omitted:,} more like this since)" if omitted else ""
        self._logger.log(level, "%s%s", message, suffix, exc_info=exc_info)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """A pool of connections at one moment; the last three are counted since the pool was made."""

    limit: int
    idle: int
    used: int  # lent, or being opened for who borrows
    waiting: int  # threads
    opened: int
    failed: int  # attempts to open one
    timeouts: int  # borrowers who gave up, because all connections stayed busy
