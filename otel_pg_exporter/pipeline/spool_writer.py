"""Writing what is in a spool: what the receiver's drain and the SDK exporters share."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from otel_pg_exporter.errors import (
    DatabaseUnavailableError,
    DeploymentError,
    ExporterError,
    OutageError,
    OverloadedError,
)
from otel_pg_exporter.model import Hold, RowBatch, Signal, unbounded
from otel_pg_exporter.pipeline.availability import Availability, Write
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_file import StoredRecord
from otel_pg_exporter.telemetry import ItemCounters, RateLimitedLogger
from otel_pg_exporter.transcode import Plan, transcode

_logger = logging.getLogger(__name__)

_SHORTEST_PAUSE = 0.2  # seconds between two attempts
_LONGEST_PAUSE = 1.0  # seconds: what is spooled is to follow PostgreSQL's return within two
_LONGEST_POSTPONEMENT = 60.0  # seconds until a request that fails alone is tried again; the others go on meanwhile
_SUSPICIOUS = 5  # outages that only one request meets until the others go first
_MAX_ITEMS = 5_000  # in one transaction: live traffic is not to wait long for locks or for the interpreter
_MAX_BYTES = 8 * 2**20
_GROWTH = 4  # how many times as many items the next transaction may have after one that went well


@dataclass(slots=True)
class _Progress:
    """How it goes with one signal."""

    pause: float = 0.0
    max_items: int = 1  # of the next transaction: few after a failure, for then PostgreSQL may be weak, or one bad
    failures: dict[int, int] = field(default_factory=dict)  # request to how often it failed alone
    postponed: dict[int, float] = field(default_factory=dict)  # request to the time when it is tried again


class SpoolWriter:
    """Writes what is in a spool, a few requests of one signal at a time; for one thread at a time.

    `write` commits requests of one signal together; `probe` raises DatabaseUnavailableError when PostgreSQL is away;
    `holds` yields a `Hold` for each request.
    """

    def __init__(
        self,
        plans: Mapping[Signal, Plan],
        write: Write,
        *,
        probe: Callable[[], None],
        counters: ItemCounters,
        availability: Availability,
        ledger_ttl: float,  # seconds
        holds: Callable[[], Hold] = lambda: unbounded,
        now_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plans = plans
        self._write = write
        self._probe = probe
        self._counters = counters
        self._availability = availability
        self._oldest_in_doubt = int(ledger_ttl * 1e9 / 2)
        self._holds = holds
        self._now_ns = now_ns
        self._clock = clock
        self._notices = RateLimitedLogger(_logger)
        self._progress = {signal: _Progress() for signal in plans}

    def advance(self, spool: Spool, signal: Signal) -> float | None:
        """Write the oldest requests of one signal, settle them, and take them out.

        Return how many seconds to wait before the next few: none if these went well, None if there are none.
        """
        progress = self._progress[signal]
        records: list[StoredRecord] = []
        try:
            records = self._next(spool, signal, progress)
            if records:
                self._drain(spool, signal, records)
        except (OutageError, OverloadedError) as exc:  # PostgreSQL is away, or the spool's disk fails: both say so
            self._suspect(progress, records, exc)
            return self._back_off(progress)
        except Exception as exc:  # noqa: BLE001 - one request must not keep the others in the spool
            self._explain(spool, signal, progress, records, exc)
            return self._back_off(progress)
        progress.max_items = min(progress.max_items * _GROWTH, _MAX_ITEMS)
        progress.pause = 0.0
        if records:
            return 0.0
        return _SHORTEST_PAUSE if progress.postponed else None

    def _next(self, spool: Spool, signal: Signal, progress: _Progress) -> list[StoredRecord]:
        now = self._clock()
        progress.postponed = {id_: until for id_, until in progress.postponed.items() if until > now}
        if self._availability.is_down(signal):
            if not spool.level.requests:
                return []
            self._probe()  # or each attempt would put the requests in doubt
            progress.max_items = 1  # its commit brings live traffic back, so it is to come soon
        return spool.oldest(signal, max_items=progress.max_items, max_bytes=_MAX_BYTES, without=progress.postponed)

    def _drain(self, spool: Spool, signal: Signal, records: Sequence[StoredRecord]) -> None:
        batches: dict[int, RowBatch] = {}
        for stored in records:
            if (batch := self._transcoded(spool, stored)) is not None:
                batches[stored.id] = batch
        if not batches:
            return
        # The keys of spans make their replay harmless for ever, the ledger that of logs for as long as it remembers.
        sure = [each.id for each in records if each.id in batches and each.in_doubt_since is None]
        now = self._now_ns()
        if signal is Signal.LOGS and sure:
            spool.doubt(sure, now)
        try:
            outcomes = self._write(list(batches.values()))
        except DatabaseUnavailableError as exc:
            if signal is Signal.LOGS and sure and not exc.in_doubt:
                spool.settle_doubt(sure, now)
            raise
        spool.remove(batches)
        for id_ in batches:
            self._progress[signal].failures.pop(id_, None)
        count = sum(stored.record.item_count for stored in records if stored.id in batches and stored.record)
        self._counters.add(
            signal,
            in_spool=-count,
            drained=count,
            stored=sum(outcome.stored for outcome in outcomes),
            duplicate=sum(outcome.duplicate for outcome in outcomes),
            rejected=sum(outcome.rejected for outcome in outcomes),
        )

    def _transcoded(self, spool: Spool, stored: StoredRecord) -> RowBatch | None:
        """Make rows of a record as they would have been made when it came; set it aside if that can't be."""
        record = stored.record
        if record is None:
            self._set_aside(spool, stored, "its checksum is wrong")
            return None
        doubt = 0 if stored.in_doubt_since is None else self._now_ns() - stored.in_doubt_since
        if record.signal is Signal.LOGS and doubt > self._oldest_in_doubt:
            self._set_aside(
                spool,
                stored,
                f"PostgreSQL may have committed it {doubt / 86_400e9:,.1f} days ago, and the ledger that would tell "
                "may have forgotten it",
            )
            return None
        try:
            return transcode(
                self._plans[record.signal],
                record.otlp,
                now_ns=record.received_at,
                request_id=record.request_id,
                hold=self._holds(),
            )
        except OverloadedError:
            raise  # memory is full, with what others sent meanwhile
        except ExporterError as exc:
            self._set_aside(spool, stored, str(exc))
            return None

    def _set_aside(self, spool: Spool, stored: StoredRecord, reason: str) -> None:
        spool.set_aside(stored.id, reason)
        items = stored.record.item_count if stored.record else "unknown"
        what = f"request {stored.id} ({items} items) is kept in the spool, but not written: {reason}"
        self._notices.log(logging.ERROR, "set aside", what)

    def _explain(
        self, spool: Spool, signal: Signal, progress: _Progress, records: Sequence[StoredRecord], error: Exception
    ) -> None:
        """Say what failed. A request that failed alone is postponed, or set aside when the failure is a bug of ours."""
        expected = isinstance(error, ExporterError)
        if not expected:
            self._notices.log(logging.CRITICAL, "bug", f"draining {signal.value} failed unexpectedly", exc_info=error)
        if len(records) != 1:
            return
        if expected:
            request = records[0].id
            failures = progress.failures[request] = progress.failures.get(request, 0) + 1
            progress.postponed[request] = self._clock() + min(2.0**failures, _LONGEST_POSTPONEMENT)
            what = f"request {request} ({signal.value}) fails alone, {failures} times so far, and has to wait: {error}"
            self._notices.log(logging.ERROR, "postponed", what)
        else:
            with contextlib.suppress(OverloadedError):  # the spool's disk fails; then this comes up again
                self._set_aside(spool, records[0], f"internal error: {type(error).__name__}")

    def _suspect(self, progress: _Progress, records: Sequence[StoredRecord], error: Exception) -> None:
        """Let the others pass a request that fails alone, again and again, over a server that answers.

        It may end its backend each time, or take longer than a call may: either looks like an outage.
        """
        if len(records) != 1 or not isinstance(error, OutageError) or isinstance(error, DeploymentError):
            return
        with contextlib.suppress(DatabaseUnavailableError):
            self._probe()
            request = records[0].id
            failures = progress.failures[request] = progress.failures.get(request, 0) + 1
            if failures >= _SUSPICIOUS:
                pause = min(2.0 ** (failures - _SUSPICIOUS), _LONGEST_POSTPONEMENT)
                progress.postponed[request] = self._clock() + pause

    def _back_off(self, progress: _Progress) -> float:
        progress.max_items = 1
        progress.pause = min(max(progress.pause * 2, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        return progress.pause
