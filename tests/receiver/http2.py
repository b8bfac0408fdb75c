"""A client that speaks HTTP/2 frame by frame, and says what no proper client would."""

import contextlib
import re
import socket
import struct
import threading
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CANCEL = struct.pack(">I", 8)
_STATUS = re.compile(rb"grpc-status(?:\x01(\d)|\x02(\d\d))")


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def message(body: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """Prefix a gRPC message; `length` is a lie about its size."""
    return struct.pack(">BI", compressed, len(body) if length is None else length) + body


def call(stream: int, path: str, **headers: str) -> bytes:
    """Open a gRPC call: literal header fields without indexing."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return frame(HEADERS, END_HEADERS, stream, block)


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, _CANCEL)


class Connection:
    """One connection; what the server says is read in a thread and kept."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.received = b""
        self.closed = threading.Event()
        self._more = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.send(_PREFACE + frame(SETTINGS))

    def send(self, frames: bytes) -> None:
        self._socket.sendall(frames)

    def send_body(self, stream: int, body: bytes) -> None:
        """Send DATA frames as the windows allow, until the end of the body or an answer."""
        sent = 0
        while sent < len(body) and not self.over:
            allowed = 65_535 - sent + min(self._updates(0), self._updates(stream))
            piece = body[sent : sent + min(allowed, 16_384)]
            if not piece:
                self._more.wait(0.01)
                self._more.clear()
                continue
            sent += len(piece)
            with contextlib.suppress(OSError):
                self.send(frame(DATA, END_STREAM if sent == len(body) else 0, stream, piece))

    def _updates(self, stream: int) -> int:
        return sum(
            int.from_bytes(payload, "big")
            for kind, _, its_stream, payload in self.frames()
            if (kind, its_stream) == (WINDOW_UPDATE, stream)
        )

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while found := self._socket.recv(65_536):
                self.received += found
                self._more.set()
        self.closed.set()

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Return (type, flags, stream, payload) of each frame that came so far."""
        found, rest = [], self.received
        while len(rest) >= 9:
            length = int.from_bytes(rest[:3], "big")
            if len(rest) < 9 + length:
                break
            found.append((rest[3], rest[4], int.from_bytes(rest[5:9], "big"), rest[9 : 9 + length]))
            rest = rest[9 + length :]
        return found

    @property
    def over(self) -> bool:
        """Whether the server has answered, or has had enough."""
        return self.status is not None or self.goaway is not None or self.closed.is_set()

    @property
    def status(self) -> int | None:
        """The grpc-status of the first answer; gRPC spells headers out when they come first on a connection."""
        match = _STATUS.search(self.received)
        return None if match is None else int(match[1] or match[2])

    @property
    def goaway(self) -> bytes | None:
        """Why the server wants to see the last of us."""
        return next((payload[8:] for kind, _, _, payload in self.frames() if kind == GOAWAY), None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
