"""How much memory a receiver takes when many senders post large bodies at once, while a small one is served beside.

    python -m tests.faults.memory                       all kinds of bodies, 24 senders, 60 MiB each
    python -m tests.faults.memory "tiny spans" "empty spans" --senders 6 --mebibytes 20
    python -m tests.faults.memory "spans of 1 KiB" --protocol "http json"

Each kind meets a receiver of its own, in a process of its own, that has learned from small requests to expect small
ones. Printed is the peak of its resident memory (VmHWM), and what the senders heard.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import grpc

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.embedded import EmbeddedServer, find_binaries
from otel_pg_exporter.postgres.migrate import migrate
from otel_pg_exporter.transcode.protobuf_wire import delimited
from tests.e2e.support import PROTOCOLS, Protocol, sender_of
from tests.frames import item_frame, resource_frame, scope_frame
from tests.receiver.support import TRACES, Client, refusal
from tests.serving import Serving, span_request, start_serving
from tests.support import FAST
from tests.workload import span

BOUND = 1.5 * 2**30  # bytes
_TRACE = bytes.fromhex("a1b2c3d4e5f60718293a4b5c6d7e8f90")  # stands where each sender's own goes
_WARMING = 200  # small requests before the large ones
_PERSISTENCE = 60.0  # seconds that a sender tries again
_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def _one(number: int, *, attribute: int = 0, more: bytes = b"") -> bytes:
    made = span(number, attributes={"text": "x" * attribute} if attribute else {})
    made.trace_id = _TRACE
    return made.SerializeToString() + more


def _of_items(size: int, make: Callable[[int], bytes]) -> bytes:
    length = len(item_frame(make(2**20)))
    return _request(b"".join(item_frame(make(number)) for number in range(1, size // length)))


def _request(items: bytes, resource: bytes = b"", scope: bytes = b"") -> bytes:
    return resource_frame(resource, scope_frame(scope, items))


def _pair(text: bytes) -> bytes:
    return delimited(1, b"k") + delimited(2, delimited(1, text))


Connect = Callable[[], AbstractContextManager[Client]]

KINDS: dict[str, Callable[[int], bytes]] = {
    "a big string": lambda size: _request(item_frame(_one(1, attribute=size))),
    "a big string with an emoji": lambda size: _request(
        item_frame(_one(1, more=delimited(9, _pair("\U0001f600".encode() + b"x" * size))))
    ),
    "control characters": lambda size: _request(item_frame(_one(1, more=delimited(9, _pair(b"\x01" * size))))),
    "not UTF-8": lambda size: _request(item_frame(_one(1, more=delimited(9, _pair(b"\xff" * size))))),
    "strings of 1 MiB": lambda size: _of_items(size, lambda number: _one(number, attribute=2**20)),
    "spans of 1 KiB": lambda size: _of_items(size, lambda number: _one(number, attribute=900)),
    "tiny spans": lambda size: _of_items(size, lambda number: _one(number, more=b"\x1a\x10" + b"t" * 16)),
    "empty spans": lambda size: _request(b"\x12\0" * (size // 2)),
    "as many empty spans as allowed": lambda size: _request(
        b"\x12\0" * 690_000 + item_frame(b"\x5a" + b"\0" * (size - 1_400_000))
    ),
    "a span of attributes": lambda size: _request(item_frame(_one(1, more=b"\x4a\0" * (size // 2)))),
    "spans of 100,000 links": lambda size: _of_items(size, lambda number: _one(number, more=b"\x6a\0" * 100_000)),
    "a big resource": lambda size: _request(
        b"".join(item_frame(_one(number)) for number in range(1, 1000)),
        resource=delimited(1, delimited(1, _pair(b"x" * size))),
    ),
    "a big scope": lambda size: _request(
        b"".join(item_frame(_one(number)) for number in range(1, 1000)),
        scope=delimited(1, delimited(3, _pair(b"x" * size))),
    ),
    "bad spans under a resource of 1 MiB": lambda size: _request(
        b"\x12\0" * min(50_000, size // 2), resource=delimited(1, delimited(1, _pair(b"x" * 2**20)))
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one kind of body did."""

    peak: int  # bytes
    heard: Counter[str]  # the last answer of each sender
    seconds: float
    beside: list[float]  # seconds that each small export took meanwhile


def measure(
    dsn: str, folder: Path, make: Callable[[int], bytes], *, senders: int, size: int, protocol: Protocol = "grpc"
) -> Figures:
    """Have a receiver of its own flooded."""
    body = make(size)
    with start_serving(folder) as start:
        serving = start("--dsn", dsn, "--spool-dir", folder / "spool")
        connect = functools.partial(sender_of, serving.address, serving.http_address, protocol)
        with connect() as client:
            for _ in range(_WARMING):
                client.export(TRACES, span_request())
        done = threading.Event()
        together = threading.Barrier(senders)
        began = time.monotonic()
        with ThreadPoolExecutor(senders + 1) as threads:
            small = threads.submit(_send_small, connect, done)
            large = [threads.submit(_send_large, connect, body, number, together) for number in range(senders)]
            heard = Counter(each.result() for each in large)
            done.set()
            return Figures(peak=_peak(serving), heard=heard, seconds=time.monotonic() - began, beside=small.result())


def _send_large(connect: Connect, body: bytes, number: int, together: threading.Barrier) -> str:
    """Post one body until it is taken or refused for good; return the last answer."""
    body = body.replace(_TRACE, number.to_bytes(16, "big", signed=False)[:15] + bytes([number + 1]))
    body += b"\x78" + bytes([number])  # an unknown field: no two requests are the same
    with connect() as client:
        together.wait()
        deadline = time.monotonic() + _PERSISTENCE
        pause = threading.Event()
        while True:
            try:
                answer = client.export(TRACES, body, timeout=300)
            except grpc.RpcError as exc:
                heard = refusal(exc)
                if heard.code not in _RETRYABLE or time.monotonic() > deadline:
                    return f"{heard.code.name}: {heard.details}"
                pause.wait(1)
            else:
                return "OK" if not answer else f"OK, but {answer[5:].decode(errors='replace')[:110]}"


def _send_small(connect: Connect, done: threading.Event) -> list[float]:
    took = []
    with connect() as client:
        while not done.wait(0.05):
            began = time.monotonic()
            while True:
                try:
                    client.export(TRACES, span_request())
                    break
                except grpc.RpcError as exc:
                    if refusal(exc).code not in _RETRYABLE:
                        raise
            took.append(time.monotonic() - began)
    return took


def _peak(serving: Serving) -> int:
    status = Path(f"/proc/{serving.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"which bodies: {', '.join(KINDS)}")
    parser.add_argument("--senders", type=int, default=24)
    parser.add_argument("--mebibytes", type=int, default=60)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="grpc")
    options = parser.parse_args()
    worst = 0
    for kind in options.kinds or KINDS:
        data, folder = (Path(tempfile.mkdtemp(prefix="otel-pg-exporter-")) for _ in range(2))
        with EmbeddedServer(data, binaries=find_binaries(), settings=FAST) as server:
            dsn = server.url("postgres")
            migrate(DatabaseSettings(dsn=dsn), mapping.load())
            figures = measure(
                dsn,
                folder,
                KINDS[kind],
                senders=options.senders,
                size=options.mebibytes * 2**20,
                protocol=options.protocol,
            )
        shutil.rmtree(data)
        shutil.rmtree(folder)
        worst = max(worst, figures.peak)
        small = sorted(figures.beside)
        _say(
            f"{kind}: peak {figures.peak / 2**20:,.0f} MiB in {figures.seconds:,.1f} s; beside, {len(small)} small"
            f" exports, median {small[len(small) // 2]:.2f} s, worst {small[-1]:.2f} s"
        )
        for answer, count in figures.heard.most_common():
            _say(f"    {count} x {answer}")
    _say(f"worst peak: {worst / 2**20:,.0f} MiB, allowed {BOUND / 2**20:,.0f} MiB")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
