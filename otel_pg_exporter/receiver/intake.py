"""What happens around a call, whichever protocol brought it: credentials, a place, room for its body, its errors.

All front doors share one intake, hence one limit of calls and one budget of bytes.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import Self

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.errors import ExporterError, RefusedError
from otel_pg_exporter.model import Hold, Outcome, Signal
from otel_pg_exporter.pipeline.admission import ByteBudget, CallGate, Reservation, SenderEstimates, Share
from otel_pg_exporter.receiver.body_watch import BodyWatch, Cancellable
from otel_pg_exporter.receiver.metrics import refuse_metrics
from otel_pg_exporter.receiver.status import response
from otel_pg_exporter.receiver.unexpected import UnexpectedErrors
from otel_pg_exporter.telemetry import Answered, RateLimitedLogger, Stage, Took, unmeasured, unobserved

_logger = logging.getLogger(__name__)

Take = Callable[[bytes, Hold], bytes]
"""Turns the body of an `Export…ServiceRequest` into that of its response."""

Authenticate = Callable[[Sequence[str]], None]
"""Given the values of the header `authorization`, raises UnauthenticatedError unless they may send."""

# A body that waits for its commit is held once as it came and once as rows of about its size; a third time for what
# decoding and COPY take meanwhile. Rows that take more are reported as they grow.
_MEMORY_FACTOR = 3

# The least that a call with an unread body is reckoned to hold: what its connection buffers.
_LEAST_ESTIMATE = 2**16

# At most this share of the budget is reserved for one unread body, so that some senders always get on even when the
# last bodies were huge, or stall. Of 96 posts of 40 MiB by 24 senders, 85 were stored with a quarter and 30 with an
# eighth: then bodies are let in that don't fit once their size is known.
_LARGEST_ESTIMATE = 1 / 4

# Bodies that are still being read are larger than the estimate when senders that were small so far all turn large at
# once. So beyond this many times the budget of resident memory all but a few of them are given up.
_CROWDED = 1.5

# Seconds that a call waits for a place in the byte budget. Its body is not read meanwhile, so flow control holds its
# sender back: that smooths bursts without a refusal, which some exporters (Node's) answer by dropping.
_ADMISSION_TIMEOUT = 1.0


class Intake:
    """Admits calls, hands their bodies to `export`, and judges what goes wrong.

    `export` is called in the call's thread, many at a time, and must not wait for ever; it raises ExporterError for a
    whole request. The `Hold` that it is given is the request's share of `budget`, until nobody keeps it any more.
    """

    def __init__(
        self,
        export: Callable[[Signal, bytes, Hold], Outcome],
        budget: ByteBudget,
        settings: ReceiverSettings,
        *,
        authenticate: Authenticate | None = None,
        took: Took = unmeasured,
        answered: Answered = unobserved,
        body_timeout: float = 30.0,
    ) -> None:
        self.takes: Mapping[str, Take] = MappingProxyType(
            {
                **{signal.value: functools.partial(_export, export, signal) for signal in Signal},
                "metrics": refuse_metrics,
            }
        )
        """By OTLP's word for what is exported (`/v1/traces`)."""
        self.largest = settings.max_request_bytes
        self.budget = budget
        self.authenticate = authenticate
        self.gate = CallGate(settings.max_calls)
        self.bodies = BodyWatch(body_timeout, memory_limit=int(budget.limit * _CROWDED))
        self.estimates = SenderEstimates(floor=_LEAST_ESTIMATE, cap=int(budget.limit * _LARGEST_ESTIMATE))
        self.unexpected = UnexpectedErrors()
        self.took = took
        self.answered = answered
        self._notices = RateLimitedLogger(_logger)

    def admit(self, sender: str) -> "Call":
        """Return a call, to be entered; entering raises OverloadedError, at once, when there is no place for it."""
        return Call(self, sender)

    def judge(self, error: Exception, sender: str) -> ExporterError:
        """Return what a sender is to hear of an error, and log what its operator should know."""
        if not isinstance(error, ExporterError):
            return self.unexpected.judge(error, None)
        if isinstance(error, RefusedError):  # its sender will drop it
            self._notices.log(logging.WARNING, type(error).__name__, f"refused a request of {sender}: {error}")
        return error

    def note_loss(self, sender: str) -> None:
        """Log that a body ended early."""
        what = f"{sender} has gone before its request was whole, or it was larger than {self.largest:,} bytes"
        self._notices.log(logging.WARNING, "cut off", what)


class Call:
    """One call, from its headers to its answer: a place at the gate, and a share of the budget.

    A context manager, left with the answer at hand. The share lives on with whoever keeps the `Hold`.
    """

    def __init__(self, intake: Intake, sender: str) -> None:
        self._intake = intake
        self._sender = sender
        self._began = time.perf_counter()
        self._arrived = 0  # bytes
        self._reservation: Reservation | None = None

    def __enter__(self) -> Self:
        self._intake.gate.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._reservation is not None:
            self._reservation.release()  # who keeps the error keeps the call's frames, and all they hold
        self._intake.gate.__exit__(kind, error, trace)

    def reserve(self, announced: int | None = None, *, timeout: float = _ADMISSION_TIMEOUT) -> None:
        """Reserve room for the body: as for the sender's last ones, unless its size is `announced`.

        Raises OverloadedError when there is none within `timeout` seconds.
        """
        estimates = self._intake.estimates
        expected = estimates.value(self._sender) if announced is None else estimates.within(announced * _MEMORY_FACTOR)
        self._reservation = self._intake.budget.reserve(expected, timeout=timeout)

    @contextmanager
    def reading(self, cancellable: Cancellable) -> Iterator[None]:
        """Read the body in the `with` block; `cancellable` is cancelled if that takes too long, or too much memory."""
        with self._intake.bodies.watch(cancellable, self._stalled):
            yield
        self._intake.took(Stage.RECEIVE, time.perf_counter() - self._began)

    def received(self, size: int) -> None:
        """Reserve more if the body, of which `size` bytes are there by now, proves to be larger than was expected.

        Raises OverloadedError, without waiting, when there is no room.
        """
        self._arrived = size
        if self._held(size) > self._own.size:
            self._own.correct(self._held(size))

    def take(self, take: Take, body: bytes) -> bytes:
        """Return the response to a body, once its size is reckoned with."""
        size = self._held(len(body))
        self._intake.estimates.learn(self._sender, size)
        self._own.correct(size)
        try:
            return take(body, Share(self._own))
        except ExporterError:
            raise
        except Exception as exc:
            raise self._intake.unexpected.judge(exc, body) from exc

    @property
    def _own(self) -> Reservation:
        assert self._reservation is not None, "nothing is reserved yet"
        return self._reservation

    def _held(self, size: int) -> int:
        # Capped, or a body that `max_request_bytes` allows could never be taken under a small budget.
        return min(size * _MEMORY_FACTOR, self._own.largest)

    def _stalled(self) -> None:
        """Expect little of a body that does not come, or four that stall could use up the budget by their estimates."""
        self._intake.estimates.learn(self._sender, _LEAST_ESTIMATE)
        if self._own.size > (least := max(_LEAST_ESTIMATE, self._arrived)):
            self._own.correct(least)


def _export(export: Callable[[Signal, bytes, Hold], Outcome], signal: Signal, body: bytes, hold: Hold) -> bytes:
    return response(export(signal, body, hold))
