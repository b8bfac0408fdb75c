"""Two `serve --reuse-port` on one port, the old one told to stop under load: no call fails."""

import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from tests.e2e.support import client_of
from tests.faults.judge import judge
from tests.faults.load import Ledger, spans_request
from tests.receiver.support import TRACES, Client
from tests.serving import StartServing, start_serving
from tests.support import wait_until

_CALLS = 10_000
_CHANNELS = 8
_THREADS = 4  # that use one channel

Send = Callable[[int], None]  # makes one call, told its number; fails if the call does


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


class Calls:
    """Calls made by as many threads as there are senders, until `stop` or the first failure."""

    def __init__(self, senders: Sequence[Send]) -> None:
        self.made = 0
        self._numbers = itertools.count(1)
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(len(senders))
        self._threads = [self._pool.submit(self._run, send) for send in senders]

    def _run(self, send: Send) -> None:
        while not self._stopping.is_set():
            number = next(self._numbers)
            try:
                send(number)
            except BaseException:
                self._stopping.set()
                raise
            self.made = max(self.made, number)

    def wait_for(self, number: int) -> None:
        """Wait until the call with this number was made, or one has failed."""
        wait_until(lambda: self.made >= number or self._stopping.is_set(), 200)

    def stop(self) -> None:
        """Make no more calls; raise what one failed with."""
        self._stopping.set()
        for thread in self._threads:
            thread.result()
        self._pool.shutdown()


def replace_under_load(
    serve: StartServing, spool: Path, dsn: str, connect: Callable[[str], Sequence[Send]], *, calls: int, rounds: int
) -> None:
    """Replace a process by another, in each round, while those who `connect` to its address make this many calls."""
    arguments = ("--dsn", dsn, "--reuse-port", "--spool-dir", spool)
    serving = serve(*arguments)
    address = serving.address
    running = Calls(connect(address))
    try:
        for number in range(rounds):
            running.wait_for(number * calls + calls // 10)
            old, serving = serving, serve(*arguments, "--grpc-endpoint", address)
            old.send(signal.SIGTERM)
            assert old.wait() == 0
            # From here on the new one takes them all.
            running.wait_for(max((number + 1) * calls, running.made + calls // 10))
    finally:
        running.stop()
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0


def test_no_call_of_10000_fails_while_a_process_takes_over_from_another(
    serve: StartServing, tmp_path: Path, dsn: str, rounds: int
) -> None:
    ledger = Ledger()
    with contextlib.ExitStack() as channels:

        def connect(address: str) -> list[Send]:
            clients = [channels.enter_context(client_of(address)) for _ in range(_CHANNELS)]
            return [sender(thread, clients[thread % _CHANNELS]) for thread in range(_CHANNELS * _THREADS)]

        def sender(thread: int, client: Client) -> Send:
            def send(number: int) -> None:
                request = spans_request(ledger, client=2 * thread, number=number, part=0, count=2, poison=False)
                ledger.send(request)
                assert client.export(TRACES, request.body) == b""  # a plain stub, without any retry policy
                ledger.acknowledge(request)

            return send

        replace_under_load(serve, tmp_path / "spool", dsn, connect, calls=_CALLS, rounds=rounds)
    assert len(ledger.acknowledged) >= _CALLS * rounds
    judge(dsn, ledger)


def test_no_export_of_the_sdk_is_even_retried_while_a_process_takes_over_from_another(
    serve: StartServing, tmp_path: Path, dsn: str, caplog: pytest.LogCaptureFixture, rounds: int
) -> None:
    caplog.set_level(logging.WARNING, "opentelemetry")
    exporters: list[OTLPSpanExporter] = []
    exported: list[ReadableSpan] = []  # appending needs no lock

    def connect(address: str) -> list[Send]:
        exporters.extend(OTLPSpanExporter(f"http://{address}") for _ in range(4))
        return [sender(exporter) for exporter in exporters]

    def sender(exporter: OTLPSpanExporter) -> Send:
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("tests")

        def send(number: int) -> None:
            span = tracer.start_span(f"operation {number}")
            span.end()
            assert isinstance(span, ReadableSpan)
            assert exporter.export([span]) is SpanExportResult.SUCCESS
            exported.append(span)

        return send

    replace_under_load(serve, tmp_path / "spool", dsn, connect, calls=2_000, rounds=rounds)
    for exporter in exporters:
        exporter.shutdown()
    assert caplog.records == []  # it tells of each attempt that failed
    with psycopg.connect(dsn, autocommit=True) as connection:
        stored = connection.execute("SELECT name FROM otel.spans").fetchall()
    assert sorted(name for (name,) in stored) == sorted(span.name for span in exported)
