import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_POSTGRESQL_DSN", "PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def query(dsn: str) -> Iterator[Query]:
    """Return a function that runs SQL on the test's database and returns the rows."""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=otel") as connection:

        def run(statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

        yield run


class Proxy:
    """A TCP proxy in front of PostgreSQL that can refuse, cut and stall. The lock guards the sockets."""

    def __init__(self, dsn: str) -> None:
        parts = conninfo_to_dict(dsn)
        self._target = (str(parts["host"]), int(str(parts["port"])))
        self._lock = threading.Lock()
        self._links: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        # Holds the port, so that nobody takes it while we are down; it never listens.
        self._holder = _bound(0)
        self._port = self._holder.getsockname()[1]
        self.up()
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self._port)

    def up(self) -> None:
        """Accept connections, always on the same port."""
        listener = self._listener = _bound(self._port)
        listener.listen()
        self._start(self._accept, listener)

    def down(self) -> None:
        """Refuse connections, and cut those that there are."""
        with self._lock:
            links, self._links = self._links, []
            listener, self._listener = self._listener, None
        for each in [*links, *([listener] if listener else [])]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._flowing.set()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def close(self) -> None:
        """Go down for good."""
        self.down()
        self._holder.close()

    def stall(self) -> None:
        """Hand nothing on any more, in either direction, but keep every connection."""
        self._flowing.clear()

    def flow(self) -> None:
        """End a stall."""
        self._flowing.set()

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection(self._target)
                with self._lock:
                    self._links += [client, upstream]
                self._start(self._pump, client, upstream)
                self._start(self._pump, upstream, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._flowing.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


@pytest.fixture
def proxy(writer_dsn: str) -> Iterator[Proxy]:
    proxy = Proxy(writer_dsn)
    yield proxy
    proxy.close()
