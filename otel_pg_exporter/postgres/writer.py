"""Writes batches of rows: whole requests, one transaction each time, exactly once.

The first attempt is optimistic, a plain binary COPY. What PostgreSQL answers decides about the next: duplicates are
inserted around, bad rows are isolated, and what is about no single row is raised for the caller to retry.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import psycopg

from otel_pg_exporter.config import WriterSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError, OutageError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import REPEATED, Outcome, RowBatch, Signal
from otel_pg_exporter.postgres.connection import Connection, Connections, SilenceError, watchdog
from otel_pg_exporter.postgres.merge import Merged
from otel_pg_exporter.postgres.partitions import ensure_partitions
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, unavailable
from otel_pg_exporter.postgres.transaction import BadTracesError, Method, Statements, Transaction, Written
from otel_pg_exporter.telemetry import BatchReport, RateLimitedLogger, Stage, StageClock, Statistics
from otel_pg_exporter.transcode.values import pg_time

_logger = logging.getLogger(__name__)

_RESOURCE_LIFETIME = 86_400.0  # seconds until `last_seen` is refreshed
_SLEPT = 3600.0  # seconds by which a machine's sleep, or a leap of its clock, outlasts what is known of resources
_RESOURCES_KEPT = 100_000  # ids; a sender that makes up resources must not fill the memory
_PARTITION_PAUSE = 60.0  # seconds before a day whose partition could not be made is asked for again
_MARGIN = 5.0  # seconds that a call may outlast the server's own statement_timeout before its socket is cut


class Writer:
    """Writes batches to one schema; any number of threads may call it. The lock guards what it remembers."""

    def __init__(
        self,
        connections: Connections,
        mapping: Mapping,
        settings: WriterSettings,
        statistics: Statistics,
        *,
        transaction: type[Transaction] = Transaction,  # how one attempt is made
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections = connections
        self._database = connections.settings
        self._compiled = Statements(self._database, mapping)
        self._settings = settings
        self._statistics = statistics
        self._transaction = transaction
        self._clock = clock
        self._notices = RateLimitedLogger(_logger)
        self._lock = threading.Lock()
        self._resources: dict[bytes, float] = {}  # committed resource id to the time when it expires
        self._asleep = time.time() - clock()  # grows while the machine sleeps, when the clock stands still
        self._days: dict[int, float] = {}  # day to the time until which it needs no asking
        self._met_duplicates = dict.fromkeys(Signal, False)  # in the last batch
        # When each outage began, and whether it was logged: of PostgreSQL (None), or for the rows of one signal.
        self._outages: dict[Signal | None, tuple[float, bool]] = {}

    def write(self, batches: Sequence[RowBatch], *, deadline: float | None = None) -> list[Outcome]:
        """Write whole requests of one signal in one transaction; return one outcome a request, in order.

        When it returns, every item is committed, was committed before, or lies in dead_letters. `deadline` is by the
        clock; calls to PostgreSQL that outlast it are cut. Raises DatabaseUnavailableError: the same batches may then
        be written again, even if the COMMIT's answer was lost.
        """
        clock = StageClock()
        with contextlib.ExitStack() as lent:
            with clock.measure(Stage.MERGE):
                merged = Merged(batches)
                connection = self._borrow(lent, deadline)
            began = self._clock()
            with watchdog(connection, self._patience(deadline)):  # what connecting took is gone
                self._ensure_partitions(connection, merged)
                written = self._write(connection, merged)
        self._end_outages(merged.signal)
        self._remember(merged.signal, written)
        self._record(merged, written, seconds=self._clock() - began, stages={**clock.seconds, **written.stages})
        return written.outcomes

    def _borrow(self, lent: contextlib.ExitStack, deadline: float | None) -> Connection:
        patience = min(self._patience(deadline), self._database.connect_timeout)
        try:
            return lent.enter_context(self._connections.borrow(patience))
        except DatabaseUnavailableError as exc:
            said = self._notices.log(logging.WARNING, "connect", exc.with_remedy)
            if isinstance(exc, OutageError):  # not when all connections are busy
                self._note_outage(None, said=said)
            raise

    def _patience(self, deadline: float | None) -> float:
        longest = self._database.statement_timeout + _MARGIN
        return longest if deadline is None else min(longest, max(deadline - self._clock(), 0.05))

    def _write(self, connection: Connection, merged: Merged) -> Written:
        method = self._first_method(merged)
        refused_traces: dict[bytes, tuple[str, str | None]] = {}
        while True:
            attempt = self._transaction(
                connection,
                self._compiled,
                merged,
                method=method,
                new_resources=self._new_resources(merged.resources),
                refused_traces=refused_traces,
            )
            try:
                return attempt.run()
            except BadTracesError as exc:
                refused_traces |= exc.refusals
            except DeploymentError as exc:
                self._note_outage(merged.signal, said=self._notices.log(logging.ERROR, merged.signal.value, str(exc)))
                raise
            except psycopg.Error as exc:
                verdict = classify(exc, broken=attempt.broken)
                following = _next_method(attempt, verdict)
                if following is None:
                    raise self._failed(exc, merged.signal, phase=attempt.phase, broken=attempt.broken) from exc
                method = following

    def _first_method(self, merged: Merged) -> Method:
        if self._settings.write_method != "auto":
            return Method(self._settings.write_method)
        # A COPY that fails costs what staging costs more than COPY [measured]: so the next batch is taken to be like
        # the last.
        return Method.STAGE if self._met_duplicates[merged.signal] else Method.COPY

    # What is remembered between batches.

    def _new_resources(self, resources: Iterable[bytes]) -> list[bytes]:
        now = self._clock()
        asleep = time.time() - now
        with self._lock:
            if abs(asleep - self._asleep) > _SLEPT:  # retention may have taken them meanwhile
                self._resources.clear()
                self._asleep = asleep
            return sorted(each for each in resources if self._resources.get(each, 0.0) <= now)

    def _remember(self, signal: Signal, written: Written) -> None:
        """Learn from a committed batch, and from nothing else: what was rolled back is not there."""
        expires = self._clock() + _RESOURCE_LIFETIME
        with self._lock:
            self._met_duplicates[signal] = written.met_duplicates
            self._resources |= dict.fromkeys(written.resources, expires)
            while len(self._resources) > _RESOURCES_KEPT:
                del self._resources[next(iter(self._resources))]

    def _ensure_partitions(self, connection: Connection, merged: Merged) -> None:
        now = self._clock()
        with self._lock:
            missing = [day for day in merged.days if self._days.get(day, 0.0) <= now]
            # Noted before the call: while one writer asks, the others need not wait with it.
            self._days |= dict.fromkeys(missing, now + _PARTITION_PAUSE)
        if not missing:
            return
        try:
            made = ensure_partitions(connection, self._database.schema, missing)
        except psycopg.Error as exc:
            with self._lock:
                self._days |= dict.fromkeys(missing, 0.0)
            broken = connection.closed or connection.broken
            raise self._failed(exc, merged.signal, phase="partitions", broken=broken) from exc
        with self._lock:
            self._days |= dict.fromkeys(made, now + _RESOURCE_LIFETIME)

    # What is said about failures, and about their end.

    def _failed(self, error: psycopg.Error, signal: Signal, *, phase: str, broken: bool) -> DatabaseUnavailableError:
        """Log an error that is not about single rows, and return it translated."""
        translated = unavailable(error, phase=phase, broken=broken)
        refused = isinstance(translated, DeploymentError)
        level = logging.ERROR if refused else logging.WARNING
        said = self._notices.log(level, f"{type(translated).__name__} {error.sqlstate}", str(translated))
        if isinstance(translated, OutageError):
            # What may be about one table, as a lock on it that lasts, is over when that table takes rows again.
            local = refused or isinstance(error, SilenceError) or (error.sqlstate is not None and not broken)
            self._note_outage(signal if local else None, said=said)
        return translated

    def note_absence(self) -> None:
        """Note that PostgreSQL is away, and that it was said: the first commit is to say that it is back."""
        self._note_outage(None, said=True)

    # Without the lock: threads that meet here may at worst leave out a line.

    def _note_outage(self, which: Signal | None, *, said: bool) -> None:
        began, was_said = self._outages.get(which, (self._clock(), False))
        self._outages[which] = (began, was_said or said)

    def _end_outages(self, signal: Signal) -> None:
        """Say that rows are stored again, if it was said that they weren't."""
        for which, what in ((None, "PostgreSQL is back"), (signal, f"PostgreSQL accepts rows again ({signal.value})")):
            began, said = self._outages.pop(which, (0.0, False))
            if said:
                _logger.info("%s after %.1f s", what, self._clock() - began)

    def _record(self, merged: Merged, written: Written, *, seconds: float, stages: dict[Stage, float]) -> None:
        outcomes = written.outcomes
        rejected = sum(outcome.rejected for outcome in outcomes)
        repeated = rejected - sum(written.rejections.values())
        self._statistics.record(
            BatchReport(
                signal=merged.signal,
                rows=sum(outcome.stored for outcome in outcomes),
                duplicates=sum(outcome.duplicate for outcome in outcomes),
                conflicts=sum(outcome.duplicate_conflict for outcome in outcomes),
                rejected=rejected,
                bytes=written.bytes,
                seconds=seconds,
                repairs=merged.repairs(),
                stages=stages,
                rejections={**written.rejections, REPEATED: repeated} if repeated else written.rejections,
                dead_letters=written.dead_letters,
                lag=_lag(written.ends),
            )
        )


def _lag(ends: Sequence[int]) -> float | None:
    """Return the median of the seconds since spans ended, by their senders' clocks; 0 for those that run ahead."""
    if not ends:
        return None
    now = pg_time(time.time_ns())
    return max(0, now - sorted(ends)[len(ends) // 2]) / 1e6


def _next_method(attempt: Transaction, verdict: Verdict) -> Method | None:
    """Say how to try a failed batch again at once; None when that makes no sense."""
    if attempt.phase == "staging" and verdict is Verdict.DEPLOYMENT:
        return Method.INSERT  # a role that may not create temporary tables
    if attempt.phase == "COMMIT" or verdict not in {Verdict.DUPLICATE, Verdict.DATA}:
        return None
    if attempt.method is Method.COPY and verdict is Verdict.DUPLICATE:
        return Method.STAGE
    return None if attempt.method is Method.ISOLATE else Method.ISOLATE
