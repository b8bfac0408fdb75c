"""PostgreSQL servers to be stopped, continued and ended by tests of faults."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psycopg

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.support import free_port, wait_until


def restartable(folder: Path, *, binaries: Path, settings: Mapping[str, str]) -> EmbeddedServer:
    """Return a server that is not started; it is on the same port again after each end."""
    server = EmbeddedServer(folder, binaries=binaries, settings=settings)
    server._port = free_port()
    return server


def connect_when_ready(dsn: str) -> psycopg.Connection[tuple[int]]:
    """Connect to a server that may be recovering still; in autocommit mode."""
    connections: list[psycopg.Connection[tuple[int]]] = []

    def attempt() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            connections.append(psycopg.connect(dsn, autocommit=True))
        return bool(connections)

    wait_until(attempt)
    return connections[0]


def processes_of(server: EmbeddedServer) -> list[int]:
    """Return the postmaster's process id and those of its children."""
    assert server.pid is not None
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [server.pid, *map(int, children.split())]


@contextlib.contextmanager
def stopped(processes: Sequence[int]) -> Iterator[None]:
    """Stop processes for a while."""
    try:
        _send(processes, signal.SIGSTOP)
        yield
    finally:
        _send(processes, signal.SIGCONT)


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # an autovacuum worker that is done
            os.kill(process, number)


def end_and_revive(server: EmbeddedServer, number: signal.Signals) -> None:
    """End a server by a signal, and start it again."""
    assert server.pid is not None
    os.kill(server.pid, number)
    wait_until(server.revive)
