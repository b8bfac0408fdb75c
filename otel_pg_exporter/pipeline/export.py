"""What a receiver does with a request's bytes: transcode, submit, and wait for the COMMIT."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from otel_pg_exporter.errors import DatabaseUnavailableError, ExporterError
from otel_pg_exporter.model import Hold, Outcome, RowBatch, Signal, unbounded
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import Plan, transcode


class Export:
    """Exports requests, and counts each of their items once when it comes and once when it is settled."""

    def __init__(
        self,
        plans: Mapping[Signal, Plan],
        submit: Callable[[RowBatch], Future[Outcome]],
        counters: ItemCounters,
        *,
        ack_timeout: float,  # seconds
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._plans = plans
        self._submit = submit
        self._counters = counters
        self._ack_timeout = ack_timeout
        self._now_ns = now_ns

    def __call__(self, signal: Signal, body: bytes, hold: Hold = unbounded) -> Outcome:
        """Return once every item of the request is committed or refused for good.

        Raises UndecodableError, or RetryableError when the request is not committed within `ack_timeout`: the sender
        should send the same again. If it was committed after all, the retry stores nothing twice.
        """
        batch = transcode(self._plans[signal], body, now_ns=self._now_ns(), hold=hold)
        count = batch.item_count
        if count == 0:
            return Outcome()
        self._counters.add(received=count, in_flight=count)
        try:
            outcome = self._wait(self._submit(batch))
        except ExporterError:
            self._counters.add(in_flight=-count, refused=count)
            raise
        self._counters.add(
            in_flight=-count, stored=outcome.stored, duplicate=outcome.duplicate, rejected=outcome.rejected
        )
        return outcome

    def _wait(self, answer: Future[Outcome]) -> Outcome:
        try:
            return answer.result(self._ack_timeout)
        except FutureTimeoutError:
            # The cancellation may come too late; the outcome is then there already.
            if not answer.cancel():
                return answer.result()
            raise DatabaseUnavailableError(f"PostgreSQL did not commit within {self._ack_timeout:g} seconds") from None
