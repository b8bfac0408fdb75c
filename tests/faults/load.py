"""A load for tests of faults: clients that send what nobody else sends, and a ledger of what they were told.

An item is known by its name, a span's `name` or a log record's `body`, in its table and in `dead_letters` alike.
"""

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import psycopg
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_pg_exporter.model import Signal
from tests.e2e.support import METHODS, heard
from tests.receiver.support import Client, refusal
from tests.support import wait_until
from tests.workload import log_body, record

# What PostgreSQL alone refuses: names that begin so, once `refuse_poison` was called.
_POISON = "poison"
_ANSWER_WITHIN = 30.0  # seconds; a call that is not answered by then hangs
# What OTLP has senders retry. grpcio cancels the calls that come while it stops.
_COME_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
_RETRY_PAUSE = 0.05  # seconds; RetryInfo asks for one, which a test need not wait
_PAUSE = 0.05  # seconds between a client's requests; a spool takes more than a drain can write beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An OTLP request, its items' names, and which of these can only end up in `dead_letters`."""

    signal: Signal
    body: bytes
    items: tuple[str, ...]
    bad: frozenset[str] = frozenset()


class Ledger:
    """What was sent, and what of it was acknowledged. The lock guards the lists and the sum.

    What was sent and never acknowledged may be stored or not, but not twice. Each ledger's names are its own, so that
    several can be judged together.
    """

    def __init__(self) -> None:
        self.name = os.urandom(4).hex()
        self._lock = threading.Lock()
        self._sent: list[Request] = []
        self._acknowledged: list[Request] = []
        self._answered = 0

    def send(self, request: Request) -> None:
        """Note a request before its first byte leaves."""
        with self._lock:
            self._sent.append(request)

    def acknowledge(self, request: Request, *, again: bool = False) -> None:
        """Note an OK; `again`: for the same bytes as before."""
        with self._lock:
            self._answered += len(request.items)
            if not again:
                self._acknowledged.append(request)

    @property
    def sent(self) -> Sequence[Request]:
        with self._lock:
            return tuple(self._sent)

    @property
    def acknowledged(self) -> Sequence[Request]:
        with self._lock:
            return tuple(self._acknowledged)

    @property
    def answered(self) -> int:
        """How many items all OKs were about, those for repeated requests included."""
        with self._lock:
            return self._answered


def refuse_poison(dsn: str) -> None:
    """Have PostgreSQL refuse the items that a load makes for that; to be called before a load with `poison`."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for table, column in (("spans", "name"), ("logs", "body")):
            connection.execute(
                f"ALTER TABLE otel.{table} ADD CONSTRAINT no_poison CHECK ({column} NOT LIKE '{_POISON}%')".encode()
            )


def spans_request(ledger: Ledger, *, client: int, number: int, part: int, count: int, poison: bool = True) -> Request:
    """Return a part of a trace that two clients send: `count` spans of two services.

    In one trace of eight, a span has no trace id; with `poison`, in another one PostgreSQL refuses one.
    """
    trace = _bytes(f"{ledger.name}.{client // 2}.{number}", 16)
    request = ExportTraceServiceRequest()
    names, bad = [], set()
    for service in ("shop", "payments"):
        group = request.resource_spans.add()
        group.resource.attributes.add(key="service.name").value.string_value = service
        spans = group.scope_spans.add().spans
        for item in range(count // 2):
            name = f"{ledger.name}.{client}.{number}.{part}.{service}.{item}"
            is_first = service == "shop" and item == 0
            is_bad = is_first and part == 1 and (number % 8 == 1 or (poison and number % 8 == 2))
            if is_bad and number % 8 == 2:
                name = f"{_POISON}.{name}"
            spans.append(_span(name, trace, root=is_first and part == 0))
            if is_bad:
                bad.add(name)
                if number % 8 == 1:
                    spans[-1].trace_id = bytes(16)
            names.append(name)
    return Request(signal=Signal.TRACES, body=request.SerializeToString(), items=tuple(names), bad=frozenset(bad))


def _span(name: str, trace: bytes, *, root: bool) -> Span:
    start = time.time_ns()
    made = Span(
        trace_id=trace,
        span_id=_bytes(name, 8),
        parent_span_id=b"" if root else _bytes("parent", 8),
        name=name,
        start_time_unix_nano=start,
        end_time_unix_nano=start + 1_000_000,
        status=Status(code=Status.STATUS_CODE_ERROR if name.endswith("3") else Status.STATUS_CODE_OK),
    )
    made.attributes.add(key="gen_ai.usage.input_tokens").value.int_value = 7
    return made


def logs_request(ledger: Ledger, *, client: int, number: int, count: int, poison: bool = True) -> Request:
    """Return `count` log records; with `poison`, PostgreSQL refuses the first of one request in eight."""
    names = [f"{ledger.name}.{client}.{number}.{item}" for item in range(count)]
    bad = poison and number % 8 == 3
    if bad:
        names[0] = f"{_POISON}.{names[0]}"
    return Request(
        signal=Signal.LOGS,
        body=log_body(map(record, names)),
        items=tuple(names),
        bad=frozenset(names[:1] if bad else ()),
    )


def more_spans(ledger: Ledger, traces: Iterable[bytes]) -> Request:
    """Return one span more for each of these traces."""
    group = (request := ExportTraceServiceRequest()).resource_spans.add()
    names = []
    for trace in traces:
        names.append(f"{ledger.name}.more.{trace.hex()}")
        group.scope_spans.add().spans.append(_span(names[-1], trace, root=False))
    return Request(signal=Signal.TRACES, body=request.SerializeToString(), items=tuple(names))


def _bytes(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


class Load:
    """Clients that send until `stop`, each in a thread of its own, each request until it is acknowledged."""

    def __init__(self, ledger: Ledger, addresses: Sequence[str], *, clients: int, items: int, poison: bool) -> None:
        self.ledger = ledger
        self._addresses = addresses
        self._items = items
        self._poison = poison
        self._stopping = threading.Event()
        self._give_up_at: float | None = None  # by time.monotonic; set before `_stopping`
        self._pool = ThreadPoolExecutor(clients, thread_name_prefix="load")
        self._clients: list[Future[None]] = [self._pool.submit(self._client, number) for number in range(clients)]

    def wait_for_more(self, requests: int = 20, timeout: float = 120.0) -> None:
        """Return when this many requests more are acknowledged; raise what a client failed with."""
        wanted = len(self.ledger.acknowledged) + requests
        wait_until(lambda: len(self.ledger.acknowledged) >= wanted or self._failed(), timeout)
        self._raise_failures()

    def deliver(self, request: Request) -> None:
        """Send one request more until it is acknowledged."""
        with contextlib.ExitStack() as stack:
            self._deliver([stack.enter_context(_sender(address)) for address in self._addresses], request)

    def stop(self, patience: float) -> None:
        """Send no new requests; those in hand for at most `patience` seconds more. Raise what a client failed with."""
        self._give_up_at = time.monotonic() + patience
        self._stopping.set()
        self._pool.shutdown()
        self._raise_failures()

    def _failed(self) -> bool:
        return any(client.done() for client in self._clients)

    def _raise_failures(self) -> None:
        for client in self._clients:
            if client.done():
                client.result()

    def _client(self, number: int) -> None:
        with contextlib.ExitStack() as stack:
            senders = [stack.enter_context(_sender(address)) for address in self._addresses]
            for request in self._requests(number):
                if self._stopping.is_set():
                    return
                first = number % len(senders)
                self._deliver([*senders[first:], *senders[:first]], request)
                self._stopping.wait(_PAUSE)

    def _requests(self, client: int) -> Iterator[Request]:
        for number in itertools.count():
            for part in range(2):
                yield spans_request(
                    self.ledger, client=client, number=number, part=part, count=self._items, poison=self._poison
                )
            yield logs_request(self.ledger, client=client, number=number, count=self._items, poison=self._poison)

    def _deliver(self, senders: Sequence[Client], request: Request) -> None:
        """Send a request to one receiver after the other until it is acknowledged, and every fifth to all of them."""
        self.ledger.send(request)
        attempts = itertools.cycle(senders)
        if not self._send(attempts, request):
            return
        self.ledger.acknowledge(request)
        if hashlib.blake2b(request.body, digest_size=1).digest()[0] % 5 == 0:
            for _ in senders:
                if self._send(attempts, request):
                    self.ledger.acknowledge(request, again=True)

    def _send(self, attempts: Iterator[Client], request: Request) -> bool:
        while True:
            try:
                answer = next(attempts).export(METHODS[request.signal], request.body, timeout=_ANSWER_WITHIN)
            except grpc.RpcError as exc:
                refused = refusal(exc)
                assert refused.code in _COME_AGAIN, refused
                if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
                    return False
            else:
                rejected, message = heard(answer)
                # Of a request that was spooled, what PostgreSQL refuses is not known yet.
                assert rejected <= len(request.bad), message
                return True
            threading.Event().wait(_RETRY_PAUSE)


@contextlib.contextmanager
def load(
    ledger: Ledger, *addresses: str, clients: int = 4, items: int = 20, poison: bool = True, patience: float = 30.0
) -> Iterator[Load]:
    """Yield a running load; at the end stop it, and see the requests in hand acknowledged within `patience` seconds.

    With several addresses, the clients take turns; a request that one receiver refuses goes to the next, and some go
    to all of them.
    """
    running = Load(ledger, addresses, clients=clients, items=items, poison=poison)
    try:
        yield running
    except BaseException:
        with contextlib.suppress(AssertionError, grpc.RpcError):  # what failed first is what to tell
            running.stop(0)
        raise
    running.stop(patience)


@contextlib.contextmanager
def _sender(address: str) -> Iterator[Client]:
    options = [
        ("grpc.use_local_subchannel_pool", 1),  # a connection of one's own
        # A receiver that is back shall be found soon.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Client(channel)
