"""A TCP proxy in front of PostgreSQL for tests of faults: it refuses, cuts, stalls, and swallows a COMMIT's answer."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support import free_port

_COMMIT = b"COMMIT\0"  # as it stands in the message that carries the statement


@dataclass(eq=False, slots=True, kw_only=True)
class _Link:
    """One client's connection and ours to the server."""

    client: socket.socket
    server: socket.socket
    flowing: threading.Event  # the proxy's, until the link is frozen
    swallow: bool = field(default=False)  # what the server says next never arrives

    def cut(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Hands bytes on between clients and the server of a DSN. The lock guards links, threads and counts."""

    def __init__(self, dsn: str) -> None:
        parts = conninfo_to_dict(dsn)
        self._target = (str(parts["host"]), int(str(parts["port"])))
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._commits_to_lose = 0
        self._bytes_to_stall: int | None = None
        self._stall_at_commit = ""
        self._listener: socket.socket | None = None
        self._port = free_port()  # on which it listens again after `refuse`
        self.accepted = 0  # connections so far
        self.commits_lost = 0
        self._then: Callable[[], None] = _nothing
        self.up()
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self._port)

    def up(self) -> None:
        """Accept connections, always on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen()
        self._listener = listener
        self._start(self._accept, listener)

    def refuse(self) -> None:
        """Refuse new connections and cut those that there are, until `up`; may be called from `then`."""
        with self._lock:
            listener, self._listener = self._listener, None
            links = list(self._links)
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        for link in links:
            link.cut()

    def stall(self) -> None:
        """Hand nothing on any more, in either direction, but keep every connection."""
        self._flowing.clear()

    def stall_after(self, count: int) -> None:
        """Stall as soon as clients have sent this many bytes more."""
        with self._lock:
            self._bytes_to_stall = count

    def stall_at_commit(self, *, handed_on: bool) -> None:
        """Stall as soon as a client sends a COMMIT: before the server hears of it, or before it can answer."""
        with self._lock:
            self._stall_at_commit = "answer" if handed_on else "statement"

    def freeze(self) -> None:
        """Hand nothing on any more on those connections that there are, for ever; new ones flow."""
        with self._lock:
            for link in self._links:
                if link.flowing is self._flowing:
                    link.flowing = threading.Event()

    def flow(self) -> None:
        """End a stall."""
        self._flowing.set()

    @property
    def stalled(self) -> bool:
        """Whether nothing is handed on."""
        return not self._flowing.is_set()

    def lose_commits(self, count: int, then: "Callable[[], None] | None" = None) -> None:
        """Let the next COMMITs reach the server, but cut the connection in place of its answer; call `then` after."""
        with self._lock:
            self._commits_to_lose = count
            self._then = then or _nothing

    def close(self) -> None:
        """Cut everything and end every thread."""
        self.refuse()
        self.flow()
        with self._lock:
            threads = list(self._threads)
            for link in self._links:
                link.flowing.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy")
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # the server is down: so are we, to this client
                    client.close()
                    continue
                link = _Link(client=client, server=server, flowing=self._flowing)
                with self._lock:
                    self.accepted += 1
                    self._links.add(link)
                self._start(self._serve, link)

    def _serve(self, link: _Link) -> None:
        """Pump both ways until either end closes, then close both."""
        answers = threading.Thread(target=self._answers, args=(link,), name="proxy answers")
        answers.start()
        with contextlib.suppress(OSError):
            while data := link.client.recv(65_536):
                self._count(len(data))
                is_commit = _COMMIT in data
                if is_commit:
                    self._stall_if_wanted("statement")
                link.flowing.wait()
                if is_commit:
                    link.swallow = self._is_to_lose()
                    self._stall_if_wanted("answer")
                link.server.sendall(data)
        link.cut()
        answers.join()
        with self._lock:
            self._links.discard(link)
        link.client.close()
        link.server.close()

    def _answers(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(65_536):
                link.flowing.wait()
                if link.swallow:  # the server has committed, for else it would have said nothing yet
                    self.commits_lost += 1
                    self._then()
                    break
                link.client.sendall(data)
        link.cut()

    def _count(self, size: int) -> None:
        with self._lock:
            if self._bytes_to_stall is None:
                return
            self._bytes_to_stall -= size
            if self._bytes_to_stall <= 0:
                self._bytes_to_stall = None
                self._flowing.clear()

    def _stall_if_wanted(self, where: str) -> None:
        with self._lock:
            if self._stall_at_commit == where:
                self._stall_at_commit = ""
                self._flowing.clear()

    def _is_to_lose(self) -> bool:
        with self._lock:
            lose = self._commits_to_lose > 0
            self._commits_to_lose -= lose
        return lose


def _nothing() -> None:
    """Do nothing."""


@contextlib.contextmanager
def proxy_for(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy; its `dsn` leads through it."""
    proxy = Proxy(dsn)
    try:
        yield proxy
    finally:
        proxy.close()
