"""A running postmaster: our child, or the one that a killed process of ours has left."""

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POLL = 0.05  # seconds between two looks at a server that is starting or stopping
HAS_PROC = Path("/proc/self").exists()


class Postmaster(Protocol):
    """A running server, ours by birth or by adoption."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def wait(self, timeout: float) -> bool:
        """Wait for its end; tell whether it has ended."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""


def _serves(pid: int, pgdata: Path) -> bool:
    """Tell whether the process was started on this data; ids are used again, after a reboot by any program.

    Its command line is asked, not its working directory, which root may not see in a container.
    """
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    data = pgdata.stat()
    for argument in arguments:
        with contextlib.suppress(OSError):
            if os.path.samestat(Path(os.fsdecode(argument)).stat(), data):
                return True
    return False


class Child:
    """A server that this process has started."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait(self, timeout: float) -> bool:
        """Wait for its end; tell whether it has ended."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        self._process.send_signal(number)


class Adopted:
    """A server that another process has started: no child of ours, so watched through a pidfd where there is one."""

    def __init__(self, pid: int, descriptor: int | None) -> None:
        self.pid = pid
        self._descriptor = descriptor
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, pid: int, pgdata: Path) -> "Adopted | None":
        """Return the process if it lives and serves `pgdata`."""
        try:
            descriptor = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
            os.kill(pid, 0)
        except OSError:
            return None
        if HAS_PROC and not _serves(pid, pgdata):
            return None
        return cls(pid, descriptor)

    def wait(self, timeout: float) -> bool:
        """Wait for its end; tell whether it has ended."""
        if self._descriptor is not None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            return bool(poll.poll(timeout * 1000))
        deadline = time.monotonic() + timeout
        while True:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
            if time.monotonic() >= deadline:
                return False
            threading.Event().wait(POLL)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, number)
            else:
                os.kill(self.pid, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostmasterFile:
    """What `postmaster.pid` says."""

    pid: int
    port: int
    status: str


def read_postmaster_file(pgdata: Path) -> PostmasterFile | None:
    """Read `postmaster.pid`; None where there is none, or it is still being written."""
    try:
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
        status = lines[7].strip() if len(lines) > 7 else "starting"  # noqa: PLR2004 - the file's eighth line
        return PostmasterFile(pid=int(lines[0]), port=int(lines[3]) if len(lines) > 3 else 0, status=status)  # noqa: PLR2004 - its fourth
    except (OSError, IndexError, ValueError):
        return None
