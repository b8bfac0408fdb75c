"""The sockets that this process has on a port: grpcio neither shows its own nor stops to listen without a shutdown.

Linux: there a shutdown of a listening socket ends it, and connections yet to come go to the other processes that listen
on the port. Elsewhere nothing is found or ended, and a stop goes on without.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")


def stop_listening(port: int) -> None:
    """Take no further connection on `port`; those that there are live on."""
    for each in _sockets_on(port):
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with contextlib.suppress(OSError):  # it was closed meanwhile
                each.shutdown(socket.SHUT_RDWR)


def count_connections(port: int) -> int:
    """Return how many connections that came in on `port` are open."""
    return sum(1 for each in _sockets_on(port) if _is_connected(each))


def _sockets_on(port: int) -> Iterator[socket.socket]:
    """Yield a duplicate of each TCP socket on `port`; it is closed once the next is asked for."""
    for entry in list(_DESCRIPTORS.iterdir()) if _DESCRIPTORS.is_dir() else ():
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # OSError: it was closed meanwhile
            descriptor = os.dup(int(entry.name))
            opened.callback(os.close, descriptor)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            found = socket.socket(fileno=descriptor)
            opened.callback(found.detach)
            if found.family in {socket.AF_INET, socket.AF_INET6} and found.getsockname()[1] == port:
                yield found


def _is_connected(each: socket.socket) -> bool:
    try:
        each.getpeername()
    except OSError:
        return False
    return True
