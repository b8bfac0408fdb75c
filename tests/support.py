"""What tests share beyond fixtures: `from tests.support import wait_until`."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable

from psycopg.conninfo import make_conninfo

# Settings of the PostgreSQL that tests run on: quick to start and to write, and not durable.
FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_wal_senders": "0",
    "max_wal_size": "128MB",  # the files may lie in memory
    "shared_buffers": "64MB",
    "wal_level": "minimal",
}

PASSWORD = "x"  # of the roles that `migrate --roles` made in the tests' databases


def as_role(role: str, dsn: str) -> str:
    """Return the DSN of the same database for one of those roles."""
    return make_conninfo(dsn, user=role, password=PASSWORD)


def free_port() -> int:
    """Return a free port for what listens later, or again: none that the system gives to whoever asks for any."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Return as soon as the condition holds; fail when it still does not after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout:g} s: {condition}"
        pause.wait(0.01)
