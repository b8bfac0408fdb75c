"""Whether exports are taken: what the last commits tell, a look at PostgreSQL when there are none, and the spool."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from otel_pg_exporter.errors import DatabaseUnavailableError, OutageError, OverloadedError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_file import SpoolLevel
from otel_pg_exporter.pipeline.ticker import Job

_logger = logging.getLogger(__name__)

STARTING, SERVING, STOPPING = "starting", "serving", "stopping"

_INTERVAL = 1.0  # seconds between two looks
_RECENT = 2.0  # seconds for which a commit proves that PostgreSQL answers

# Seconds for which a failed attempt to write counts although PostgreSQL answers, as when a table is locked or missing.
# Then another one may show whether that lasts: where nothing is sent to who is not ready, nothing else would.
_HOLD = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolReading:
    """What is in the spool, and what it may hold."""

    level: SpoolLevel
    max_bytes: int
    takes: bool  # there was room of late, and it is not lost
    lost: bool  # its file was deleted or moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What was found at the last look."""

    ready: bool = False
    state: str = STARTING  # then serving, at last stopping
    reasons: tuple[str, ...] = ("it is starting",)  # why it is not ready
    postgresql_up: bool | None = None  # None: nobody knows yet
    postgresql_since: float = 0.0  # by time.monotonic
    spool: SpoolReading | None = None  # None: there is none, or it cannot be read


class Watch:
    """Looks now and then whether exports would succeed, and tells who wants to know.

    `condition` never waits. `_looking` is held by who looks; `_lock` guards what was found and what is told of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet; `begin` says where to look."""
        self._clock = clock
        self._looking = threading.Lock()
        self._lock = threading.Lock()
        self._condition = Condition(postgresql_since=clock())
        self._tell: Callable[[bool], None] | None = None  # once the front door is open
        self._said = False  # that it does not answer
        self._last_silence = float("-inf")  # when PostgreSQL last did not answer a look

    def begin(self, availability: Availability, probe: Callable[[], None], spool: Spool | None) -> None:
        """Look at these; `probe` raises DatabaseUnavailableError when PostgreSQL does not answer."""
        self._availability = availability
        self._probe = probe
        self._spool = spool

    @property
    def condition(self) -> Condition:
        """What was found at the last look."""
        return self._condition

    @property
    def job(self) -> Job:
        """What is to be run beside, in a thread that nothing else delays."""
        return Job(name="readiness", interval=_INTERVAL, run=self.look)

    def open(self, tell: Callable[[bool], None]) -> None:
        """Be ready from now on whenever exports would be acknowledged: the door is open. `tell` of each change."""
        self._tell = tell
        self.look()

    def drain(self) -> None:
        """Be not ready for good: a stop has begun."""
        with self._lock:
            self._show(replace(self._condition, ready=False, state=STOPPING, reasons=("it is stopping",)))

    def look(self) -> None:
        """Find out how things are."""
        with self._looking:
            found = self._found()
        with self._lock:
            if self._condition.state == STOPPING:
                return
            _log_change(self._condition, found)
            self._show(found)

    def _show(self, condition: Condition) -> None:
        changed = condition.ready is not self._condition.ready
        self._condition = condition
        if changed and self._tell is not None:
            self._tell(condition.ready)

    def _found(self) -> Condition:
        up = self._answers()
        old, now = self._condition, self._clock()
        failing = [signal for signal in Signal if self._fails(signal, now)]
        spool_takes = self._spool is not None and self._spool.takes
        reasons = ["it is starting"] if self._tell is None else []
        if (failing or not up) and not spool_takes:
            items = " and ".join(signal.items for signal in failing)
            reasons.append(f"PostgreSQL does not take {items}" if up else "PostgreSQL does not answer")
            reasons.append(_why_not(self._spool))
        return Condition(
            ready=not reasons,
            state=STARTING if self._tell is None else SERVING,
            reasons=tuple(reasons),
            postgresql_up=up,
            postgresql_since=old.postgresql_since if up is old.postgresql_up else now,
            spool=self._spool_reading(),
        )

    def _answers(self) -> bool | None:
        """Tell whether PostgreSQL answers; None when that cannot be known, as before."""
        heard = self._availability.committed_at
        failed = any(self._availability.failed_at(signal) > heard for signal in Signal)
        if self._clock() - heard < _RECENT and not failed:
            return True
        try:
            self._probe()
        except OutageError as exc:
            self._last_silence = self._clock()
            if self._condition.postgresql_up and not failed:  # else the writer says so
                self._said = True
                _logger.warning("no answer from PostgreSQL: %s", exc.with_remedy)
            return False
        except DatabaseUnavailableError:  # all connections are busy
            return self._condition.postgresql_up
        if self._said:
            self._said = False
            _logger.info("PostgreSQL answers again")
        return True

    def _fails(self, signal: Signal, now: float) -> bool:
        """Tell whether the signal's rows were not taken although PostgreSQL answers, and that is not long ago."""
        failed = self._availability.failed_at(signal)
        return failed > self._last_silence and now - failed < _HOLD

    def _spool_reading(self) -> SpoolReading | None:
        spool = self._spool
        try:
            if spool is not None:
                level = spool.level
                return SpoolReading(level=level, max_bytes=spool.max_bytes, takes=spool.takes, lost=spool.lost)
        except OverloadedError:
            pass  # it has logged why
        return None


def _why_not(spool: Spool | None) -> str:
    if spool is None:
        return "there is no spool"
    return "the spool was deleted or moved" if spool.lost else "the spool is full, or its disk fails"


def _log_change(old: Condition, new: Condition) -> None:
    if old.state != SERVING or new.ready is old.ready:
        return
    if new.ready:
        _logger.info("ready again: exports are acknowledged")
    else:
        _logger.warning("not ready, so exports are refused: %s", "; ".join(new.reasons))
