"""Group commit: requests wait together and are written together, by whichever writer becomes free.

No timer decides about the size of a batch. A free writer takes all that waits, up to the limits: an idle system commits
each request at once, a busy one commits fewer, larger batches.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from otel_pg_exporter.config import PipelineSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, OverloadedError, RetryableError
from otel_pg_exporter.model import RowBatch, Signal
from otel_pg_exporter.pipeline.answer import Answer
from otel_pg_exporter.pipeline.availability import Write
from otel_pg_exporter.pipeline.retry import Backoff
from otel_pg_exporter.telemetry import RateLimitedLogger, Stage, Took, unmeasured

_logger = logging.getLogger(__name__)

_SHUT_DOWN = "the receiver shut down before the request was committed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    number: int  # in order of arrival
    since: float  # by the clock
    batch: RowBatch
    answer: Answer


class Batcher:
    """Hands requests to `writers` threads and the outcomes back.

    `write` commits requests of one signal together, and raises RetryableError when the same may be tried again. A
    request that was given up is forgotten at once, or before the next attempt. `_lock` guards the queues and the stop;
    each thread is named, and joined in `shutdown`.
    """

    def __init__(
        self,
        write: Write,
        settings: PipelineSettings,
        *,
        took: Took = unmeasured,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._write = write
        self._settings = settings
        self._took = took
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._notices = RateLimitedLogger(_logger)
        self._numbers = count()
        self._queues: dict[Signal, deque[_Waiting]] = {signal: deque() for signal in Signal}
        self._draining = False
        self._stop = threading.Event()  # ends the pauses between attempts, too
        self._threads = [
            threading.Thread(target=self._run, name=f"writer-{number}", daemon=True)
            for number in range(1, settings.writer_count + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, batch: RowBatch) -> Answer:
        """Queue a request. The answer has its outcome once it is committed; cancel it to give the request up.

        Raises OverloadedError after `shutdown`.
        """
        answer = Answer(self._forget)
        with self._lock:
            if self._draining:
                raise OverloadedError("the receiver is shutting down")
            waiting = _Waiting(number=next(self._numbers), since=self._clock(), batch=batch, answer=answer)
            self._queues[batch.signal].append(waiting)
            self._changed.notify()
        return answer

    @property
    def alive(self) -> bool:
        """Whether all writers live."""
        return all(thread.is_alive() for thread in self._threads)

    def shutdown(self, timeout: float) -> bool:
        """Write what waits, for at most `timeout` seconds; then fail the rest. Say whether all was written."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._draining = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        finished = not any(thread.is_alive() for thread in self._threads)
        self._stop.set()
        with self._lock:
            left = [waiting for queue in self._queues.values() for waiting in queue]
            for queue in self._queues.values():
                queue.clear()
        _fail(left, OverloadedError(_SHUT_DOWN))
        return finished

    def _run(self) -> None:
        while requests := self._take():
            try:
                self._commit(requests)
            except BaseException as exc:  # noqa: BLE001 - a bug (in Rust: a panic) must not end the thread
                what = f"a batch of {len(requests):,} requests failed unexpectedly"
                self._notices.log(logging.CRITICAL, type(exc).__name__, what, exc_info=exc)
                _fail(requests, RetryableError(f"internal error: {type(exc).__name__}"))
            requests = []  # not to be kept while this thread waits for the next

    def _forget(self, answer: Answer) -> None:
        """Let go of a request that was given up; while the writers hang, its like would fill the memory."""
        with self._lock:
            for queue in self._queues.values():
                for waiting in queue:  # unless it is with a writer
                    if waiting.answer is answer:
                        queue.remove(waiting)
                        return

    def _take(self) -> list[_Waiting]:
        """Wait for requests and take as many of one signal as fit a batch; none when draining is done."""
        with self._lock:
            while True:
                self._changed.wait_for(lambda: self._draining or any(self._queues.values()))
                if self._settings.linger and not self._draining:
                    self._changed.wait_for(lambda: self._draining or self._is_full(), self._settings.linger)
                waiting = [queue for queue in self._queues.values() if queue]
                if waiting:
                    # The signal whose request waits longest: the busier one would starve the other.
                    return self._fill(min(waiting, key=lambda queue: queue[0].number))
                if self._draining:
                    return []
                # Another writer took them all while this one lingered.

    def _fill(self, queue: deque[_Waiting]) -> list[_Waiting]:
        taken: list[_Waiting] = []
        rows = size = 0
        while queue:
            rows += len(queue[0].batch.rows)
            size += queue[0].batch.size
            if taken and (rows > self._settings.max_batch_rows or size > self._settings.max_batch_bytes):
                break
            taken.append(queue.popleft())
        return taken

    def _is_full(self) -> bool:
        return any(
            sum(len(waiting.batch.rows) for waiting in queue) >= self._settings.max_batch_rows
            or sum(waiting.batch.size for waiting in queue) >= self._settings.max_batch_bytes
            for queue in self._queues.values()
        )

    def _commit(self, requests: Sequence[_Waiting]) -> None:
        now = self._clock()
        for each in requests:
            self._took(Stage.WAIT, now - each.since)
        backoff = Backoff(self._stop)
        while requests := _begin(requests):
            try:
                outcomes = self._write([each.batch for each in requests])
            except RetryableError as exc:  # the writer has logged it; senders need not know our database
                _failed(requests, exc)
                if not backoff.wait():
                    _fail(requests, OverloadedError(_SHUT_DOWN))
                    return
            else:
                for each, outcome in zip(requests, outcomes, strict=True):
                    each.answer.settle(outcome)  # if it was cancelled meanwhile, its sender was sent away
                return


def _begin(requests: Sequence[_Waiting]) -> list[_Waiting]:
    """Return the requests that are to be written now: those that nobody has given up."""
    for each in requests:
        each.answer.being_written = True  # before the look: who cancels looks the other way round
    return [each for each in requests if not each.answer.cancelled]


def _failed(requests: Sequence[_Waiting], error: RetryableError) -> None:
    for each in requests:
        each.answer.commit_lost |= isinstance(error, DatabaseUnavailableError) and error.in_doubt
        each.answer.being_written = False


def _fail(requests: Sequence[_Waiting], error: Exception) -> None:
    for each in requests:
        each.answer.settle(error)
