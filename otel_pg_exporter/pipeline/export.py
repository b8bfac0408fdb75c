"""What a receiver does with a request's bytes: transcode, submit, and wait for the COMMIT, or else spool them."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from otel_pg_exporter.errors import DatabaseUnavailableError, OverloadedError
from otel_pg_exporter.model import Hold, Outcome, RowBatch, Signal, rejection_message, unbounded
from otel_pg_exporter.pipeline.answer import Answer
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.telemetry import ItemCounters, RateLimitedLogger, Repeated, Stage, Took, uncounted, unmeasured
from otel_pg_exporter.transcode import Plan, transcode

_logger = logging.getLogger(__name__)


class Export:
    """Exports requests, and counts each of their items once when it comes and once when it is settled.

    With a spool, a request that PostgreSQL does not commit within `ack_timeout`, or that it would not at the moment,
    is put there instead; what becomes of its items is counted when they leave it.
    """

    def __init__(
        self,
        plans: Mapping[Signal, Plan],
        submit: Callable[[RowBatch], Answer],
        counters: ItemCounters,
        *,
        ack_timeout: float,  # seconds
        availability: Availability,
        spool: Spool | None = None,
        took: Took = unmeasured,
        repeated: Repeated = uncounted,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._plans = plans
        self._submit = submit
        self._counters = counters
        self._ack_timeout = ack_timeout
        self._availability = availability
        self._spool = spool
        self._took = took
        self._repeated = repeated
        self._now_ns = now_ns
        self._notices = RateLimitedLogger(_logger)

    def __call__(self, signal: Signal, body: bytes, hold: Hold = unbounded) -> Outcome:
        """Return once every item of the request is committed, spooled, or refused for good.

        Raises UndecodableError, TooLargeError, or RetryableError: the sender should send the same again. If it was
        committed after all, the retry stores nothing twice.
        """
        began = time.perf_counter()
        batch = transcode(self._plans[signal], body, now_ns=self._now_ns(), hold=hold)
        self._took(Stage.TRANSCODE, time.perf_counter() - began)
        count = batch.item_count
        if count == 0:
            return Outcome()
        self._counters.add(signal, received=count, in_flight=count)
        try:
            outcome = self._store(batch, body)
        except BaseException:
            self._counters.add(signal, in_flight=-count, refused=count)
            raise
        self._counters.add(
            signal,
            in_flight=-count,
            stored=outcome.stored,
            duplicate=outcome.duplicate,
            # A spooled request's are rejected, and kept in dead_letters, when it leaves the spool.
            rejected=0 if outcome.spooled else outcome.rejected,
            in_spool=outcome.spooled,
            spooled=outcome.spooled,
        )
        return outcome

    def _store(self, batch: RowBatch, body: bytes) -> Outcome:
        if self._spool is not None and self._availability.is_down(batch.signal):
            # A full spool is no reason not to try: PostgreSQL may be back any moment.
            with suppress(OverloadedError):
                return self._put_away(self._spool, batch, body, in_doubt=False)
        answer = None
        try:
            answer = self._submit(batch)
            return self._wait(batch.signal, answer)
        except (DatabaseUnavailableError, OverloadedError):
            if self._spool is None:
                raise
            in_doubt = answer is not None and answer.in_doubt
            return self._put_away(self._spool, batch, body, in_doubt=in_doubt)
        finally:
            del answer  # an error that it keeps would keep this frame, and the request with it

    def _wait(self, signal: Signal, answer: Answer) -> Outcome:
        try:
            return answer.result(self._ack_timeout)
        except TimeoutError:
            # The cancellation may come too late; the outcome is then there already.
            if not answer.cancel():
                return answer.result()
            self._availability.note_silence(signal)
            raise DatabaseUnavailableError(f"PostgreSQL did not commit within {self._ack_timeout:g} seconds") from None
        finally:
            del answer  # as above

    def _put_away(self, spool: Spool, batch: RowBatch, body: bytes, *, in_doubt: bool) -> Outcome:
        count, rejected = batch.item_count, len(batch.rejected)
        new = spool.append(SpoolRecord.of(batch, body, in_doubt=in_doubt))
        what = f"PostgreSQL does not commit in time; requests are put into the spool, {spool.folder}"
        self._notices.log(logging.WARNING, "spooled", what)
        if not new and rejected:
            self._repeated(rejected)
        return Outcome(
            spooled=count if new else 0,
            duplicate=0 if new else count - rejected,
            rejected=rejected,
            error_message=rejection_message(batch, batch.rejected),
        )
