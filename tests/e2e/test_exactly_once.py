"""Retries, doubles and many clients at once: each item is stored once, and every sender hears the same answer."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter.model import Signal
from tests.e2e.support import OK, PROTOCOLS, Receiver, persist
from tests.workload import log_body, record, shuffled, span, trace_body


def bodies_of(signal: Signal) -> bytes:
    """Return a request of 100 items, two of which are refused: one here, one by PostgreSQL."""
    if signal is Signal.TRACES:
        spans = [span(number, trace=1 + number // 10) for number in range(100)]
        spans[20].span_id, spans[30].name = b"short", "poison"
        return trace_body(spans)
    records = [record(f"line {number}") for number in range(100)]
    records[30].body.string_value = "poison"
    return log_body(records)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("signal", list(Signal))
def test_a_retry_of_the_same_bytes_stores_nothing_and_hears_the_same(receiver: Receiver, signal: Signal) -> None:
    receiver.database.execute(
        "ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')",
        "ALTER TABLE logs ADD CONSTRAINT no_poison CHECK (body <> 'poison')",
    )
    body = bodies_of(signal)
    rejected, message = receiver.send(signal, body)
    assert rejected == (2 if signal is Signal.TRACES else 1)
    before = contents(receiver)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: receiver.send(signal, body), range(12)))
    assert answers == [(rejected, message)] * 12
    assert contents(receiver) == before
    assert receiver.database.count(signal.table) == 100 - rejected
    assert receiver.database.count("dead_letters") == rejected
    receiver.database.assert_traces_exact()


def contents(receiver: Receiver) -> list[object]:
    return [
        receiver.database.rows(f"SELECT {table}::text FROM {table} ORDER BY 1")
        for table in ("spans", "logs", "traces", "ingest_requests", "dead_letters")
    ]


def spans_of(request: int, *, now: int) -> list[Span]:
    """Return 100 spans that no other request has, of traces that many others add to."""
    return [
        span(
            request * 100 + number,
            trace=1 + (request * 37 + number) % 1000,
            start=now - (request * 100 + number) * 1_000_003,
            attributes={"gen_ai.usage.input_tokens": number},
        )
        for number in range(100)
    ]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_32_clients_at_once_that_repeat_themselves_and_each_other_leave_one_row_a_span(receiver: Receiver) -> None:
    now = time.time_ns()

    def load(client: int) -> list[bytes]:
        """Return 5 requests that no other client sends, all of them twice, and 10 that another one sends too."""
        own = [trace_body(spans_of(client * 5 + number, now=now)) for number in range(5)]
        shared = [spans_of(160 + client // 2 * 10 + number, now=now) for number in range(10)]
        # Other clients' spans come in another order: other bytes, the same spans.
        requests = [*own, *own, *(trace_body(shuffled(spans, client)) for spans in shared)]
        return random.Random(client).sample(requests, len(requests))

    loads = [load(client) for client in range(32)]

    def run(requests: list[bytes]) -> list[tuple[int, str]]:
        with receiver.sender() as sender:
            return [persist(sender, Signal.TRACES, request) for request in requests]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(run, loads))
    assert answers == [[OK] * 20] * 32
    assert receiver.database.rows("SELECT count(*), sum(gen_ai_input_tokens) FROM spans") == [(32_000, 320 * 4950)]
    assert receiver.database.rows("SELECT count(*), sum(span_count) FROM traces") == [(1000, 32_000)]
    receiver.database.assert_traces_exact()
    counts = receiver.service.counts()
    assert counts.stored == 32_000
    # No statement of the write path may meet a deadlock, however the requests were batched.
    assert receiver.database.rows("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


@pytest.mark.parametrize("signal", list(Signal))
def test_a_request_that_comes_by_every_protocol_is_stored_once(receiver: Receiver, signal: Signal) -> None:
    body = bodies_of(signal)
    first = receiver.send(signal, body)
    for protocol in PROTOCOLS:
        with receiver.speaking(protocol) as other:
            assert other.send(signal, body) == first
    assert receiver.database.count(signal.table) == 100 - first[0]
    assert receiver.database.count("dead_letters") == first[0]
