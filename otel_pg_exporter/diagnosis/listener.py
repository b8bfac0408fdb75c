"""Who listens on a port of this machine, as Linux's /proc tells; elsewhere nobody knows."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"
_OURS = re.compile(r"otel[-_]pg[-_]exporter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A process that listens."""

    pid: int
    command: str

    @property
    def is_ours(self) -> bool:
        """Whether this is an `otel-pg-exporter`."""
        return _OURS.search(self.command) is not None

    def __str__(self) -> str:
        return f"process {self.pid}, {self.command.partition(' ')[0]}"


def listener_of(port: int) -> Listener | None:
    """Return a process that listens on a TCP port, if it can be seen by this user."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for folder in _PROC.glob("[0-9]*") if sockets else ():
        with contextlib.suppress(OSError):  # another user's, or gone
            if any(str(each.readlink()) in sockets for each in (folder / "fd").iterdir()):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return Listener(pid=int(folder.name), command=command)
    return None


def _inodes(port: int) -> Iterator[str]:
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    yield inode
