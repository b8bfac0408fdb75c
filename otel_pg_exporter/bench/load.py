"""The load generator: sends OTLP from a process of its own, bounded in time and in requests in flight.

A `Load` goes in as JSON on stdin, a `Sent` comes out on stdout; `LoadProcess` is the other end of both. It never sets
the pace unnoticed: `Sent.cpu_seconds` says how busy its one process was.
"""

import gzip
import http.client
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Self

import grpc

from otel_pg_exporter.bench.requests import Content, Template, templates
from otel_pg_exporter.errors import ExporterError
from otel_pg_exporter.model import Signal

_METHODS = {
    Signal.TRACES: "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    Signal.LOGS: "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
_MEDIA_TYPE = "application/x-protobuf"
_CALL_TIMEOUT = 30.0  # seconds
_PAUSE = 0.05  # seconds before a sender that was refused goes on
_START_TIMEOUT = 60.0  # seconds for the generator to make its requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, how, and for how long."""

    endpoint: str  # host:port
    protocol: str = "grpc"  # or http
    signal: str = Signal.TRACES.value
    content: str = Content.MIXED.value
    items: int = 1_000  # a request
    senders: int = 32  # that each wait for their answer: the requests in flight
    channels: int = 4
    seconds: float = 5.0  # that are measured
    warm_up: float = 1.0  # seconds before these
    rate: float | None = None  # requests a second, sent on time whether others are answered or not; None: no limit
    requests: int | None = None  # at most, the warm-up's included; then it ends early
    resent: float = 0.0  # share of requests that are sent a second time, after they were acknowledged
    gzip: bool = False
    templates: int = 8
    core: int | None = None  # the processor to keep to


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What came of a load within the measured time. Latencies are from when a request was due to its answer."""

    seconds: float
    requests: int  # acknowledged
    resent: int  # of these, sent a second time
    items: int
    bytes: int  # of OTLP, before compression
    failures: dict[str, int]  # status to calls
    rejected: int  # items, in calls that were acknowledged
    cpu_seconds: float  # of this process
    latencies: dict[str, float] = field(default_factory=dict)  # p50, p90, p99 and max to seconds

    @property
    def items_per_second(self) -> float:
        """Acknowledged items a second."""
        return self.items / self.seconds

    @property
    def cpu_share(self) -> float:
        """How much of one core the generator took; near 1 it sets the pace itself."""
        return self.cpu_seconds / self.seconds


_OK = "OK"
_Export = Callable[[bytes], tuple[str, bytes]]  # a body to a status and an answer


class LoadError(ExporterError):
    """The load generator failed."""


class LoadProcess:
    """A generator that runs. `result` waits for its end; a `with` block ends it in any case."""

    def __init__(self, load: Load) -> None:
        """Start it; it begins to send as soon as its requests are made."""
        self._load = load
        self._process = subprocess.Popen(  # noqa: S603 - this module, by this interpreter
            [sys.executable, "-P", "-m", __name__],  # not what lies in the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is heard by `wait_ready`
            self._process.stdin.write(json.dumps(asdict(load)))
            self._process.stdin.close()
        self._process.stdin = None

    def wait_ready(self) -> None:
        """Wait until it sends."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise self._failed()

    def ends(self, timeout: float) -> bool:
        """Wait for the end for so many seconds; tell whether it came."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def result(self) -> Sent:
        """Wait for the end; to be called after `wait_ready`. Raises LoadError."""
        patience = _START_TIMEOUT + self._load.warm_up + self._load.seconds + _CALL_TIMEOUT
        try:
            output, _ = self._process.communicate(timeout=patience)
        except subprocess.TimeoutExpired as exc:
            raise LoadError(f"the load generator did not end within {patience:g} seconds") from exc
        if self._process.returncode:
            raise self._failed()
        return Sent(**json.loads(output))

    def _failed(self) -> LoadError:
        self._process.kill()
        _, words = self._process.communicate()
        return LoadError(f"the load generator failed: {words.strip().rpartition(chr(10))[2] or 'it said nothing'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Pace:
    """Says when the next request is due, and that there are to be no more. The lock guards the count."""

    def __init__(self, load: Load, begin: float) -> None:
        self.over = threading.Event()  # as many as there may be were sent
        self._rate = load.rate
        self._most = math.inf if load.requests is None else load.requests
        self._begin = begin
        self._end = begin + load.warm_up + load.seconds
        self._taken = 0
        self._lock = threading.Lock()

    def wait(self) -> float:
        """Wait until the caller's request is due; return when that was, infinity if it is one too many or too late."""
        with self._lock:
            number = self._taken
            self._taken += 1
        if number >= self._most:
            self.over.set()
            return math.inf
        if self._rate is None:
            return time.perf_counter()
        due = self._begin + number / self._rate
        if due >= self._end:
            return math.inf
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        return due


class _Generator:
    """Sends from many threads. The lock guards the sums."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._templates = templates(Signal(load.signal), Content(load.content), load.items, number=load.templates)
        compression = grpc.Compression.Gzip if load.gzip else grpc.Compression.NoCompression
        # A subchannel of its own for each: channels with equal options share a connection.
        self._channels = [
            grpc.insecure_channel(
                load.endpoint, options=[("grpc.use_local_subchannel_pool", 1)], compression=compression
            )
            for _ in range(load.channels if load.protocol == "grpc" else 0)
        ]
        self._lock = threading.Lock()
        self._latencies: list[float] = []
        self._bytes = self._rejected = self._resent = 0
        self._failures: Counter[str] = Counter()

    def run(self) -> Sent:
        load = self._load
        for channel in self._channels:
            grpc.channel_ready_future(channel).result(_CALL_TIMEOUT)
        print("ready", flush=True)
        begin = time.perf_counter()
        self._from = begin + load.warm_up
        self._until = self._from + load.seconds
        self._pace = _Pace(load, begin)
        threads = [
            threading.Thread(target=self._send, args=(number,), name=f"sender-{number}")
            for number in range(load.senders)
        ]
        for thread in threads:
            thread.start()
        self._pace.over.wait(load.warm_up)
        computed = time.process_time()
        if self._pace.over.wait(load.seconds):
            for thread in threads:  # what is in flight then is counted, too
                thread.join()
            self._until = time.perf_counter()
        computed = time.process_time() - computed
        for thread in threads:
            thread.join()
        for channel in self._channels:
            channel.close()
        return Sent(
            seconds=max(0.0, self._until - self._from),
            requests=len(self._latencies),
            resent=self._resent,
            items=len(self._latencies) * load.items,
            bytes=self._bytes,
            failures=dict(self._failures),
            rejected=self._rejected,
            cpu_seconds=computed,
            latencies=_percentiles(sorted(self._latencies)),
        )

    def _send(self, number: int) -> None:
        load, chance = self._load, random.Random(number)
        export = self._by_grpc(number) if load.protocol == "grpc" else self._by_http()
        while (due := self._pace.wait()) < self._until:
            template = chance.choice(self._templates)
            body = template.fresh(time.time_ns())
            again = self._call(export, template, body, due) and chance.random() < load.resent
            if again and (due := self._pace.wait()) < self._until:
                self._call(export, template, body, due, again=True)

    def _by_grpc(self, number: int) -> _Export:
        channel = self._channels[number % self._load.channels]
        call = channel.unary_unary(_METHODS[Signal(self._load.signal)], None, None)  # bytes, as they are

        def export(body: bytes) -> tuple[str, bytes]:
            try:
                return _OK, call(body, timeout=_CALL_TIMEOUT)
            except grpc.RpcError as exc:
                return exc.code().name, b""

        return export

    def _by_http(self) -> _Export:
        """Open a connection of the sender's own: there are as many of them as in flight."""
        connection = http.client.HTTPConnection(self._load.endpoint, timeout=_CALL_TIMEOUT)
        headers = {"content-type": _MEDIA_TYPE} | ({"content-encoding": "gzip"} if self._load.gzip else {})

        def export(body: bytes) -> tuple[str, bytes]:
            try:
                content = gzip.compress(body, 6) if self._load.gzip else body
                connection.request("POST", f"/v1/{self._load.signal}", content, headers)
                answer = connection.getresponse()
                return _OK if answer.status == http.HTTPStatus.OK else str(answer.status), answer.read()
            except (OSError, http.client.HTTPException) as exc:
                connection.close()  # the next request opens it again
                return type(exc).__name__, b""

        return export

    def _call(
        self,
        export: _Export,
        template: Template,
        body: bytes,
        due: float,
        *,
        again: bool = False,
    ) -> bool:
        """Send a request and note its answer, if that comes within the measured time; say whether it was OK."""
        status, answer = export(body)
        now = time.perf_counter()
        if self._from <= now < self._until:
            with self._lock:
                if status == _OK:
                    self._latencies.append(now - due)
                    self._bytes += template.size
                    self._resent += again
                    self._rejected += bool(answer)  # all else is an empty message
                else:
                    self._failures[status] += 1
        if status != _OK:
            time.sleep(_PAUSE)
        return status == _OK


def _percentiles(ordered: Sequence[float]) -> dict[str, float]:
    if not ordered:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: ordered[int(share * len(ordered))] for name, share in shares.items()} | {"max": ordered[-1]}


def main() -> None:
    """Generate the load that stdin describes."""
    load = Load(**json.load(sys.stdin))
    if load.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {load.core})
    print(json.dumps(asdict(_Generator(load).run())), flush=True)


if __name__ == "__main__":
    main()
