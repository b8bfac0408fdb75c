"""What must not be cut short: the end of what a bench has started."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Have signals wait until the `with` block is done, in this thread and those that it starts meanwhile.

    A second Ctrl-C, or one that comes when all is measured, would else leave a schema behind, or a server running.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
