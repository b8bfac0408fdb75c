"""A run of `bench`: parts at full speed, then the time to an OK at shares of what the receiver can do."""

import enum
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from otel_pg_exporter.bench.load import Load, LoadProcess, Sent
from otel_pg_exporter.bench.receiver import Reading, ReceiverProcess
from otel_pg_exporter.bench.requests import Content, Template
from otel_pg_exporter.config import ServeSettings, available_cores
from otel_pg_exporter.errors import ConfigurationError, ExporterError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.telemetry import Stage, StageTime

REQUEST_STAGES = (Stage.RECEIVE, Stage.TRANSCODE, Stage.WAIT)
BATCH_STAGES = tuple(stage for stage in Stage if stage not in REQUEST_STAGES)

_WARM_UP = 1.0  # seconds
_START = 1.5  # seconds that a load takes to begin, about
_LOOK = 0.2  # seconds between two reports
_SHARES = (0.01, 0.5, 0.9)
_LEAST_RATE = 20.0  # requests a second that a percentile takes
_SAMPLE = 200  # items, of which the size of a request is reckoned
_GENAI_DIVISOR = 10  # prompts are long: a request is to be of a size that is met

Report = Callable[[float, str], None]
"""Told which share of a run is done, and what is next."""


class Part(enum.StrEnum):
    """What is measured."""

    SPANS_SMALL = "spans-small"
    SPANS_MIXED = "spans-mixed"
    SPANS_GENAI = "spans-genai"
    LOGS_MIXED = "logs-mixed"
    LATENCY = "latency"  # of mixed spans, which are therefore measured first


_KINDS: Mapping[Part, tuple[Signal, Content]] = {
    Part.SPANS_SMALL: (Signal.TRACES, Content.SMALL),
    Part.SPANS_MIXED: (Signal.TRACES, Content.MIXED),
    Part.SPANS_GENAI: (Signal.TRACES, Content.GENAI),
    Part.LOGS_MIXED: (Signal.LOGS, Content.MIXED),
}

# Bytes that a row takes in tables, indexes and WAL, about: half of it is WAL.
_WRITTEN: Mapping[Part, int] = {
    Part.SPANS_SMALL: 1_000,
    Part.SPANS_MIXED: 2_000,
    Part.SPANS_GENAI: 14_000,
    Part.LOGS_MIXED: 1_800,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to measure, and its bounds."""

    parts: frozenset[Part] = frozenset(Part)
    items: int = 1_000  # a request
    senders: int = 16
    seconds: float = 5.0  # for each load
    max_rows: int = 20_000_000  # in all

    @property
    def full_speed(self) -> list[Part]:
        """The parts at full speed, in order."""
        latency = {Part.SPANS_MIXED} if Part.LATENCY in self.parts else set()
        return [part for part in _KINDS if part in self.parts | latency]

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the capacity at which the time to an OK is measured."""
        return _SHARES if Part.LATENCY in self.parts else ()

    @property
    def loads(self) -> int:
        """How many loads are sent, one after the other."""
        return len(self.full_speed) + len(self.shares)

    @property
    def warm_up(self) -> float:
        """Seconds before those that are measured."""
        return min(_WARM_UP, self.seconds)

    @property
    def expected_seconds(self) -> float:
        """How long it will take, about."""
        return self.loads * (_START + self.warm_up + self.seconds)

    @property
    def max_bytes(self) -> int:
        """Bytes written at most, about, in tables, indexes and WAL."""
        parts, requests = self.full_speed + [Part.SPANS_MIXED] * len(self.shares), self._requests(self.items)
        return sum(_WRITTEN[part] * self.items_of(part) * requests for part in parts)

    def items_of(self, part: Part) -> int:
        """Return how many items a request has."""
        return max(1, self.items // _GENAI_DIVISOR) if part is Part.SPANS_GENAI else self.items

    def load(self, part: Part, endpoint: str) -> Load:
        """Return the load of a part at full speed."""
        signal, content = _KINDS[part]
        return Load(
            endpoint=endpoint,
            signal=signal.value,
            content=content.value,
            items=self.items_of(part),
            senders=self.senders,
            seconds=self.seconds,
            warm_up=self.warm_up,
            requests=self._requests(self.items),  # with prompts, too, whose rows are many times as large
        )

    def load_at(self, items_per_second: float, endpoint: str) -> Load:
        """Return a load of mixed spans, so many a second, in smaller requests where there would be few."""
        items = max(1, min(self.items, int(items_per_second / _LEAST_RATE)))
        signal, content = _KINDS[Part.SPANS_MIXED]
        return Load(
            endpoint=endpoint,
            signal=signal.value,
            content=content.value,
            items=items,
            senders=self.senders,
            seconds=self.seconds,
            warm_up=self.warm_up,
            rate=items_per_second / items,
            requests=self._requests(items),
        )

    def _requests(self, items: int) -> int:
        return max(1, self.max_rows // self.loads // items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What a part at full speed came to. Times are in seconds, CPU times those within `seconds`."""

    part: Part
    sent: Sent
    seconds: float  # between the two readings of the receiver
    rows: int  # spans or log records committed within these
    batches: int
    receiver_cpu: float
    postgres_cpu: float | None  # None where PostgreSQL is not the receiver's own
    stages: Mapping[Stage, StageTime]

    @property
    def receiver_cores(self) -> float:
        """How many cores the receiver took."""
        return self.receiver_cpu / self.seconds

    @property
    def postgres_cores(self) -> float | None:
        """How many cores PostgreSQL took, if that is the receiver's own."""
        return None if self.postgres_cpu is None else self.postgres_cpu / self.seconds

    @property
    def receiver_cost(self) -> float:
        """CPU seconds of the receiver for an item."""
        return self.receiver_cpu / max(1, self.rows)

    @property
    def rows_per_batch(self) -> float:
        """How many rows a transaction had."""
        return self.rows / max(1, self.batches)

    def busy(self, writers: int) -> float:
        """Return the share of their time in which so many writers were at work."""
        return sum(self.stages[stage].seconds for stage in BATCH_STAGES) / (self.seconds * writers)

    def share(self, stage: Stage) -> float:
        """Return a stage's share of the time of those that are measured alike: of requests, or of batches."""
        alike = BATCH_STAGES if stage in BATCH_STAGES else REQUEST_STAGES
        total = sum(self.stages[each].seconds for each in alike)
        return self.stages[stage].seconds / total if total else 0.0

    def mean(self, stage: Stage) -> float:
        """Return how long a stage took, for each request or batch."""
        time = self.stages[stage]
        times = self.batches if stage in BATCH_STAGES else time.count
        return time.seconds / times if times else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How soon requests of mixed spans were answered at a share of the capacity."""

    share: float
    load: Load
    sent: Sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a run came to."""

    postgres_version: str
    core: str  # that makes rows: native, or the Python reference
    writers: int
    linger: float  # seconds
    cores: int  # of this machine, that may be used
    throughput: list[Throughput]
    latency: list[Latency]


def require_fitting_requests(plan: Plan, max_request_bytes: int) -> None:
    """Raise ConfigurationError if a request of the plan would be larger than the receiver takes."""
    for part in plan.full_speed:
        signal, content = _KINDS[part]
        items = plan.items_of(part)
        sample = min(items, _SAMPLE)
        size = Template(signal, content, sample).size * items / sample
        if size > max_request_bytes:
            fitting = int(plan.items * max_request_bytes / size)
            raise ConfigurationError(
                f"--items ({plan.items:,}) makes requests of some {size / 2**20:,.1f} MiB for {part}, and the receiver "
                f"takes {max_request_bytes / 2**20:,.1f} MiB at most (max_request_bytes); up to about "
                f"{fitting:,} items fit"
            )


def measure(plan: Plan, settings: ServeSettings, *, report: Report) -> Results:
    """Start a receiver with these settings, send it the plan's loads, and stop it.

    Raises ExporterError, also where no request at all is answered OK.
    """
    report(0.0, "start")
    alone = replace(
        settings,
        spool=replace(settings.spool, spool=False),  # what is measured is the way to PostgreSQL
        receiver=replace(settings.receiver, grpc_endpoint="127.0.0.1:0", http_endpoint="none", reuse_port=False),
        monitoring=replace(settings.monitoring, metrics_endpoint="none"),
    )
    with ReceiverProcess(alone) as receiver:
        run = _Run(plan, receiver, report)
        throughput = [run.at_full_speed(part) for part in plan.full_speed]
        capacity = next((each.sent.items_per_second for each in throughput if each.part is Part.SPANS_MIXED), 0.0)
        latency = [run.at_share(share, capacity) for share in plan.shares]
        return Results(
            postgres_version=receiver.started.postgres_version,
            core=receiver.started.core,
            writers=settings.pipeline.writer_count,
            linger=settings.pipeline.linger,
            cores=available_cores(),
            throughput=throughput,
            latency=latency,
        )


class _Run:
    """Sends one load after the other, and says how far it is."""

    def __init__(self, plan: Plan, receiver: ReceiverProcess, report: Report) -> None:
        self._plan = plan
        self._receiver = receiver
        self._report = report
        self._sent = 0  # loads

    def at_full_speed(self, part: Part) -> Throughput:
        load = self._plan.load(part, self._receiver.started.endpoint)
        sent, first, last = self._send(load, part.value)
        before, after = first.statistics, last.statistics
        postgres_cpu = None
        if first.postgres_cpu_seconds is not None and last.postgres_cpu_seconds is not None:
            postgres_cpu = last.postgres_cpu_seconds - first.postgres_cpu_seconds
        return Throughput(
            part=part,
            sent=sent,
            seconds=last.at - first.at,
            rows=after.rows - before.rows,
            batches=after.batches - before.batches,
            receiver_cpu=last.cpu_seconds - first.cpu_seconds,
            postgres_cpu=postgres_cpu,
            stages={stage: _since(before.stages[stage], after.stages[stage]) for stage in Stage},
        )

    def at_share(self, share: float, capacity: float) -> Latency:
        load = self._plan.load_at(share * capacity, self._receiver.started.endpoint)
        sent, _, _ = self._send(load, f"{Part.LATENCY.value} at {share:.0%}")
        return Latency(share=share, load=load, sent=sent)

    def _send(self, load: Load, name: str) -> tuple[Sent, Reading, Reading]:
        self._report(self._sent / self._plan.loads, name)
        with LoadProcess(load) as process:
            process.wait_ready()
            began = time.monotonic()
            for _ in self._until(began + load.warm_up, process):
                self._progress(began, load, name)
            first = self._receiver.read()
            for _ in self._until(began + load.warm_up + load.seconds, process):
                self._progress(began, load, name)
            last = self._receiver.read()
            sent = process.result()
        self._sent += 1
        if not sent.requests:
            if not sent.seconds:
                raise ExporterError(f"{name}: --max-rows was used up before the time that is measured; raise it")
            failures = ", ".join(f"{count:,} {code}" for code, count in sent.failures.items()) or "none was answered"
            raise ExporterError(
                f"{name}: no request was answered OK in the time that is measured, {load.seconds:g} s ({failures}); "
                "try smaller --items, fewer --senders, or more --seconds"
            )
        return sent, first, last

    def _until(self, deadline: float, process: LoadProcess) -> Iterator[None]:
        """Wait in steps, and no longer than the load goes on."""
        while (left := deadline - time.monotonic()) > 0 and not process.ends(min(left, _LOOK)):
            yield

    def _progress(self, began: float, load: Load, name: str) -> None:
        done = (time.monotonic() - began + _START) / (_START + load.warm_up + load.seconds)
        self._report((self._sent + min(done, 1.0)) / self._plan.loads, name)


def _since(before: StageTime, after: StageTime) -> StageTime:
    return StageTime(count=after.count - before.count, seconds=after.seconds - before.seconds)
