"""The SDK's exporter interfaces on top of the writer: one implementation, and its two faces.

An exporter holds nothing back: the SDK's processors batch, and `export` returns when the batch is committed.
"""

import contextlib
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import ExporterError, RetryableError
from otel_pg_exporter.model import Outcome, Signal, Window
from otel_pg_exporter.pipeline.retry import Backoff
from otel_pg_exporter.postgres.connection import Connections, run_after_fork
from otel_pg_exporter.postgres.writer import Writer
from otel_pg_exporter.sdk import last_resort
from otel_pg_exporter.sdk.arguments import settings_from, signature
from otel_pg_exporter.sdk.suppression import is_exporting, is_own_logger, quiet_psycopg, suppressed
from otel_pg_exporter.telemetry import ItemCounters, ItemCounts, RateLimitedLogger, Statistics, StatisticsSnapshot
from otel_pg_exporter.transcode import compile_plan
from otel_pg_exporter.transcode.readable import transcode

_logger = logging.getLogger(__name__)

_NOTICE_INTERVAL = 60.0  # seconds between two log lines of a kind


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
        self._stopped = False
        self._start_afresh()
        quiet_psycopg()
        last_resort.ensure()
        run_after_fork(self._start_afresh)

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

        An export that still runs after that is cut off, and returns FAILURE. Later exports do, too.
        """
        deadline = time.monotonic() + timeout_millis / 1000
        with self._idle:
            self._stopped = True
            self._stop.set()
            self._idle.wait_for(lambda: not self._running, timeout=max(0.0, deadline - time.monotonic()))
        self._connections.close(timeout=max(0.0, deadline - time.monotonic()))

    def force_flush(self, timeout_millis: float | None = 30_000) -> bool:
        """Wait at most `timeout_millis` for a running export; tell whether none runs any more."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not self._running, timeout=None if timeout_millis is None else max(0.0, timeout_millis / 1000)
            )

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
            self._counters.add(received=len(items), in_flight=len(items))
            outcome = None
            try:
                outcome = self._write(items, deadline)
            except ExporterError as exc:
                self._lost(len(items), exc)
            except Exception as exc:  # noqa: BLE001 - a bug of ours must not reach the application
                self._lost(len(items), exc, exc_info=exc)
            finally:
                self._settle(len(items), outcome)
            return outcome is not None

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

    def _write(self, items: Sequence[Any], deadline: float) -> Outcome:
        # One id for all attempts: it makes the log records of an attempt whose COMMIT got lost count once.
        batch = transcode(self._plan, items, request_id=os.urandom(16), now_ns=time.time_ns())
        backoff = Backoff(self._stop)
        while True:
            try:
                [outcome] = self._writer.write([batch], deadline=deadline)
            except RetryableError:
                if not backoff.wait(deadline):
                    raise
            else:
                return outcome

    def _settle(self, count: int, outcome: Outcome | None) -> None:
        if outcome is None:
            self._counters.add(in_flight=-count, refused=count)
            return
        self._counters.add(
            in_flight=-count, stored=outcome.stored, duplicate=outcome.duplicate, rejected=outcome.rejected
        )
        if outcome.rejected:
            so_far = self._counters.snapshot().rejected
            what = f"{outcome.error_message} (kept in dead_letters; {so_far:,} so far)"
            self._notices.log(logging.WARNING, "rejected", what)

    def _lost(self, count: int, reason: Exception, exc_info: BaseException | None = None) -> None:
        lost = self._counters.snapshot().refused + count
        self._notices.log(
            logging.ERROR,
            "lost",
            f"{count:,} {self._signal.items} could not be stored ({lost:,} so far): {reason}",
            exc_info=exc_info,
        )


class PostgresSpanExporter(_PostgresExporter, SpanExporter):
    """Writes spans into PostgreSQL; SUCCESS means committed.

    Keyword arguments are the settings of docs/sdk.md (`dsn`, `schema`, `timeout`, …); what is not given comes from
    the environment variables `OTEL_EXPORTER_POSTGRESQL_*`. Raises ConfigurationError for a bad one. Connects with
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
