"""The SDK's exporter interfaces on top of the writer: one implementation, and its two faces.

An exporter holds nothing back: the SDK's processors batch, and `export` returns when the batch is committed, or with a
spool: safe on disk.
"""

import contextlib
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import (
    DatabaseUnavailableError,
    ExporterError,
    OutageError,
    OverloadedError,
    RetryableError,
)
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.retry import Backoff
from otel_pg_exporter.postgres.connection import Connections, run_after_fork
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.sdk import last_resort
from otel_pg_exporter.sdk.arguments import settings_from, signature
from otel_pg_exporter.sdk.suppression import is_exporting, is_own_logger, quiet_psycopg, suppressed
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts, RateLimitedLogger, Statistics, StatisticsSnapshot
from otel_pg_exporter.transcode import compile_plan
from otel_pg_exporter.transcode.readable import otlp_request, transcode

if TYPE_CHECKING:
    from otel_pg_exporter.sdk.spool import ExporterSpool

_logger = logging.getLogger(__name__)

_NOTICE_INTERVAL = 60.0  # seconds between two log lines of a kind
_PROBE_TIMEOUT = 2.0  # seconds
_PROBE_INTERVAL = 1.0  # seconds between two probes of a PostgreSQL that is away
_DRAIN_TIME = 0.5  # seconds that an export may spend with what others have left in the spool
_LAST_DRAIN_TIME = 5.0  # seconds, at a shutdown
_LAST_SPOOLING_TIME = 1.0  # seconds that an export which was cut off gets to spool its items


class _PostgresExporter:
    """What both exporters are, but for their signal.

    The condition `_idle` guards `_running` and `_stopped`, and is notified when an export ends.
    """

    __signature__: ClassVar[inspect.Signature] = signature()  # for help(); `**settings` would say nothing
    _signal: ClassVar[Signal]

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - checked, each by its own type, in settings_from
        self._settings = settings_from(settings)
        self._mapping = mapping.load(self._settings.mapping.mappings)
        window = Window(past=self._settings.mapping.window_past, future=self._settings.mapping.window_future)
        self._plan = compile_plan(self._mapping, self._signal, window)
        # The SDK's processors export one batch at a time.
        self._connections = Connections(self._settings.database, size=1)
        self._spool = self._make_spool()
        self._stopped = False
        self._start_afresh()
        quiet_psycopg()
        last_resort.ensure()
        run_after_fork(self._start_afresh)

    def _make_spool(self) -> "ExporterSpool | None":
        spool = self._settings.spool
        if spool.spool_dir is None:
            return None
        from otel_pg_exporter.sdk.spool import ExporterSpool  # needs sqlite3, which the others do without

        return ExporterSpool(spool.spool_dir, spool, self._settings.database, self._signal)

    def _start_afresh(self) -> None:
        """Make everything that has a lock, which another thread of the parent may hold at a fork."""
        self._idle = threading.Condition()
        self._running = 0
        self._stop = threading.Event()
        self._counters = ItemCounters()
        self._statistics = Statistics()
        self._notices = RateLimitedLogger(_logger, interval=_NOTICE_INTERVAL)
        self._last_words = RateLimitedLogger(_logger, interval=math.inf)
        self._writer = Writer(self._connections, self._mapping, self._settings.writer, self._statistics)
        self._availability = Availability()
        self._next_probe = 0.0
        if self._spool is not None:
            self._spool.start_afresh(
                self._plan,
                self._write_spooled,
                probe=self._probe,
                counters=self._counters,
                availability=self._availability,
            )

    @property
    def counts(self) -> ItemCounts:
        """Return where the items that this process exported are."""
        return self._counters.snapshot()

    @property
    def statistics(self) -> StatisticsSnapshot:
        """Return what this process committed, and how fast."""
        return self._statistics.snapshot()

    def shutdown(self, timeout_millis: float = 30_000) -> None:
        """End retries at once, wait at most `timeout_millis` for a running export, then close the connection.

        An export that still runs after that is cut off, and returns FAILURE, or with a spool is put there. Later
        exports fail. What is in the spool is written for a few seconds, if PostgreSQL takes it.
        """
        deadline = time.monotonic() + timeout_millis / 1000
        with self._idle:
            first, self._stopped = not self._stopped, True
            self._stop.set()
            idle = self._idle.wait_for(lambda: not self._running, timeout=max(0.0, deadline - time.monotonic()))
        if first and idle:
            self._drain(min(_LAST_DRAIN_TIME, deadline - time.monotonic()), insist=True)
        self._connections.close(timeout=max(0.0, deadline - time.monotonic()))
        if self._spool is not None:
            with self._idle:
                self._idle.wait_for(lambda: not self._running, timeout=_LAST_SPOOLING_TIME)

    def force_flush(self, timeout_millis: float | None = 30_000) -> bool:
        """Wait at most `timeout_millis` for a running export, and tell whether none runs any more.

        The rest of the time goes to what is in the spool, if there is one.
        """
        deadline = math.inf if timeout_millis is None else time.monotonic() + max(0.0, timeout_millis / 1000)
        with self._idle:
            idle = self._idle.wait_for(
                lambda: not self._running, timeout=None if timeout_millis is None else deadline - time.monotonic()
            )
        if idle and not self._stopped:
            self._drain(deadline - time.monotonic(), insist=True)
        return idle

    def _export(self, items: Sequence[Any]) -> bool:
        """Commit the items; tell whether all that were not refused one by one are in PostgreSQL. Never raises."""
        if is_exporting():  # a SimpleLogRecordProcessor hands us our own log line, in the middle of an export
            return False
        if not items:
            return True
        deadline = time.monotonic() + self._settings.timeout
        with suppressed(), self._registered() as admitted:
            if not admitted:
                what = f"the PostgreSQL exporter is shut down: {self._signal.items} are dropped"
                self._last_words.log(logging.WARNING, "stopped", what)
                return False
            self._counters.add(self._signal, received=len(items), in_flight=len(items))
            rest, outcome = items, Outcome()
            try:
                while rest:
                    count, outcome = self._store(rest, deadline)
                    self._settle(count, outcome)
                    rest = rest[count:]
            except ExporterError as exc:
                self._lost(len(rest), exc.with_remedy)
            except Exception as exc:  # noqa: BLE001 - a bug of ours must not reach the application
                self._lost(len(rest), str(exc), exc_info=exc)
            finally:
                self._counters.add(self._signal, in_flight=-len(rest), refused=len(rest))
            if not rest and not outcome.spooled:
                self._drain(_DRAIN_TIME)
            return not rest

    @contextlib.contextmanager
    def _registered(self) -> Iterator[bool]:
        idle = self._idle
        with idle:
            admitted = not self._stopped
            self._running += admitted
        try:
            yield admitted
        finally:
            with idle:
                self._running -= admitted
                idle.notify_all()

    def _store(self, items: Sequence[Any], deadline: float) -> tuple[int, Outcome]:
        """Commit the first items, as many as go into one transaction, or else spool them; say how many these were.

        Raises ExporterError.
        """
        now_ns = time.time_ns()
        # One id for all attempts: it makes the log records of an attempt whose COMMIT got lost count once.
        batch = transcode(self._plan, items, request_id=os.urandom(16), now_ns=now_ns)
        items = items[: batch.item_count]
        down = self._spool is not None and self._availability.is_down(self._signal)
        backoff = Backoff(self._stop)
        in_doubt = False
        while True:
            try:
                if down:
                    self._probe()
                [outcome] = self._commit([batch], deadline)
            except RetryableError as exc:
                in_doubt |= isinstance(exc, DatabaseUnavailableError) and exc.in_doubt
                if not down and backoff.wait(deadline):
                    continue
                if self._spool is None:
                    raise
                self._put_away(self._spool, items, batch, in_doubt=in_doubt, reason=exc)
                return len(items), Outcome(spooled=len(items))
            else:
                return len(items), outcome

    def _commit(self, batches: Sequence[RowBatch], deadline: float) -> Sequence[Outcome]:
        return self._availability.observe(lambda these: self._writer.write(these, deadline=deadline))(batches)

    def _probe(self) -> None:
        """Raise DatabaseUnavailableError when PostgreSQL is away, or was a moment ago."""
        if time.monotonic() < self._next_probe:
            raise OutageError("PostgreSQL was away a moment ago")
        try:
            self._connections.probe(_PROBE_TIMEOUT)
        except DatabaseUnavailableError:
            self._next_probe = time.monotonic() + _PROBE_INTERVAL
            raise

    def _put_away(
        self,
        spool: "ExporterSpool",
        items: Sequence[Any],
        batch: RowBatch,
        *,
        in_doubt: bool,
        reason: RetryableError,
    ) -> None:
        try:
            spool.append(batch, otlp_request(items), in_doubt=in_doubt)
        except ExporterError as exc:
            raise OverloadedError(f"{reason.with_remedy}; and {exc}") from exc
        what = (
            f"{len(items):,} {self._signal.items} are in the spool, until PostgreSQL takes them: {reason.with_remedy}"
        )
        self._notices.log(logging.WARNING, "spooled", what)

    def _drain(self, seconds: float, *, insist: bool = False) -> None:
        """Write what is in the spool, if there is one; begin nothing new after so many seconds. Never raises."""
        if self._spool is None:
            return
        if insist:
            self._next_probe = 0.0
        try:
            with suppressed():
                self._spool.drain(time.monotonic() + seconds, insist=insist)
        except Exception as exc:  # noqa: BLE001 - must not reach the application, and costs nothing that was acknowledged
            unforeseen = None if isinstance(exc, ExporterError | OSError) else exc
            what = f"what is in the spool cannot be written: {exc}"
            self._notices.log(logging.ERROR, "spool", what, exc_info=unforeseen)

    def _write_spooled(self, batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        outcomes = self._commit(batches, time.monotonic() + self._settings.timeout)
        self._warn_of_rejections(outcomes)
        return outcomes

    def _settle(self, count: int, outcome: Outcome) -> None:
        if not outcome.spooled:  # else the spool has counted them
            self._warn_of_rejections([outcome])
            self._counters.add(
                self._signal,
                in_flight=-count,
                stored=outcome.stored,
                duplicate=outcome.duplicate,
                rejected=outcome.rejected,
            )

    def _warn_of_rejections(self, outcomes: Sequence[Outcome]) -> None:
        rejected = sum(outcome.rejected for outcome in outcomes)
        if rejected:
            message = next(outcome.error_message for outcome in outcomes if outcome.rejected)
            so_far = self._counters.snapshot().rejected + rejected
            self._notices.log(logging.WARNING, "rejected", f"{message} (kept in dead_letters; {so_far:,} so far)")

    def _lost(self, count: int, reason: str, exc_info: BaseException | None = None) -> None:
        lost = self._counters.snapshot().refused + count
        self._notices.log(
            logging.ERROR,
            "lost",
            f"{count:,} {self._signal.items} could not be stored ({lost:,} so far): {reason}",
            exc_info=exc_info,
        )


class PostgresSpanExporter(_PostgresExporter, SpanExporter):
    """Writes spans into PostgreSQL; SUCCESS means committed.

    Keyword arguments are the settings of docs/reference/sdk.md (`dsn`, `schema`, `timeout`, …); what is not given comes
    from the environment variables `OTEL_EXPORTER_POSTGRESQL_*`. Raises ConfigurationError for a bad one. Connects with
    the first export, and again in each forked child. Safe to share between threads.
    """

    _signal = Signal.TRACES

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Commit the spans within `timeout`; SUCCESS when all that were not refused one by one are stored."""
        return SpanExportResult.SUCCESS if self._export(spans) else SpanExportResult.FAILURE


class PostgresLogRecordExporter(_PostgresExporter, LogRecordExporter):
    """Writes log records into PostgreSQL; SUCCESS means committed.

    As PostgresSpanExporter. Records of this package's own loggers are left out: each would start another export.
    """

    _signal = Signal.LOGS

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """Commit the records within `timeout`; SUCCESS when all that were not refused one by one are stored."""
        foreign = [record for record in batch if not _is_own(record)]
        return LogRecordExportResult.SUCCESS if self._export(foreign) else LogRecordExportResult.FAILURE


def _is_own(record: ReadableLogRecord) -> bool:
    scope = record.instrumentation_scope
    return scope is not None and is_own_logger(scope.name)
