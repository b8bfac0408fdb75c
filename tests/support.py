"""What tests share beyond fixtures: `from tests.support import wait_until`."""

import threading
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Return as soon as the condition holds; fail when it still does not after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout:g} s: {condition}"
        pause.wait(0.01)
