"""What to do about an exception that nobody foresaw: log it once, and give its request a second chance, not a tenth.

Such an exception is a bug of ours. Were it always answered as final, senders would drop data over a passing fault;
were it always answered "come again", one poisonous request would block a sender's queue until its retries run out,
and cost its neighbours. Retries are byte-identical, so a digest of the body tells the two apart: the first failures
of a request ask for a retry, then the same request is refused for good. Either way the log has the stack trace.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from otel_pg_exporter.errors import ExporterError, InternalError, RetryableError
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # the passing faults that we know of (a lost race, a full memory) are gone by then
_REMEMBERED = 1_024  # digests, 16 bytes each; failing requests are few, and forgetting one only means more retries
_LOG_INTERVAL = 60.0  # seconds between two stack traces of the same kind


class UnexpectedErrors:
    """Judges unexpected exceptions and logs them. `_lock` guards `_failures`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._notices = RateLimitedLogger(_logger, interval=_LOG_INTERVAL, clock=clock)
        self._lock = threading.Lock()
        self._failures: OrderedDict[bytes, int] = OrderedDict()  # digest of a body: how often it has failed

    def judge(self, error: Exception, body: bytes | None) -> ExporterError:
        """Log `error` and return what the sender is to hear: nothing of the exception but its class.

        `body` is None when the failure cannot be the body's fault, because it was not read yet.
        """
        self._notices.log(logging.ERROR, _origin(error), "unexpected error in an export call", exc_info=error)
        kind = type(error).__name__
        if body is None or (failures := self._count(body)) < _ATTEMPTS:
            return RetryableError(f"internal error ({kind}); the receiver's log says more")
        return InternalError(
            f"internal error ({kind}): this request of {len(body):,} bytes has now failed {failures} times; "
            "not taken, the receiver's log says more"
        )

    def _count(self, body: bytes) -> int:
        digest = hashlib.blake2b(body, digest_size=16).digest()
        with self._lock:
            failures = self._failures.pop(digest, 0) + 1
            self._failures[digest] = failures
            if len(self._failures) > _REMEMBERED:
                self._failures.popitem(last=False)
        return failures


def _origin(error: Exception) -> str:
    """Name an exception by its class and the line that raised it: few values, whatever its message says."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{type(error).__qualname__} {place}"
