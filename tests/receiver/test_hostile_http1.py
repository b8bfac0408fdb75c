"""Bodies by HTTP that lie, inflate, or take more as objects than as text: refused within bounds, neighbours served."""

import functools
import gzip
import zlib
from collections.abc import Callable

import pytest

from otel_pg_exporter.model import Hold, Outcome, Signal
from otel_pg_exporter.receiver.body_watch import resident_bytes
from otel_pg_exporter.transcode import transcode
from tests.receiver.http1 import JSON, RawConnection, chunk, head
from tests.receiver.support import ConnectHttp, Recorder, Serve, in_background, settings
from tests.receiver.test_hostile_bodies import bomb
from tests.support import wait_until
from tests.transcode.support import NOW, plan

MIB = 2**20
TRACES = "/v1/traces"


def around(items: str, size: int) -> bytes:
    """Return a request of about `size` bytes, full of these spans."""
    start, end = '{"resourceSpans": [{"scopeSpans": [{"spans": [', "]}]}]}"
    return (start + items * (size // len(items)) + items.rstrip(",") + end).encode()


def exporting(signal: Signal, body: bytes, hold: Hold) -> Outcome:
    """Export as far as rows."""
    batch = transcode(plan(signal), body, now_ns=NOW, hold=hold)
    return Outcome(stored=len(batch.rows), rejected=len(batch.rejected))


@pytest.mark.parametrize("name", ["gzip", "deflate"])
@pytest.mark.parametrize("framing", ["whole", "chunked"])
def test_a_bomb_is_too_large_before_it_has_grown(
    serve: Serve, connect_http: ConnectHttp, name: str, framing: str
) -> None:
    recorder = Recorder()
    running = serve(recorder)
    body = bomb(1024) if name == "gzip" else zlib.compress(bytes(300 * MIB), 9)
    before = resident_bytes()
    pieces = [body[start : start + MIB // 8] for start in range(0, len(body), MIB // 8)]
    reply = connect_http(running).post(
        TRACES, body if framing == "whole" else pieces, headers={"content-encoding": name}
    )
    assert (reply.status, reply.refusal.code) == (413, 8)
    assert "more than 67,108,864 decompressed" in reply.refusal.message
    assert resident_bytes() - before < 250 * MIB
    assert recorder.calls == []
    wait_until(lambda: running.budget.level == 0)


@pytest.mark.parametrize(
    ("make", "status"),
    [
        pytest.param(functools.partial(around, "{},"), 413, id="millions of spans"),
        pytest.param(functools.partial(around, "[],"), 413, id="millions of what are no spans"),
        pytest.param(functools.partial(around, '{"attributes":[' + "{}," * 500_000 + "{}]},"), 200, id="attributes"),
        pytest.param(functools.partial(around, '{"x":[' + "1.5," * 500_000 + "1]},"), 200, id="unknown numbers"),
        pytest.param(lambda size: around('{"name":"' + "\\u0001" * (size // 6) + '"}', 1), 200, id="one long name"),
        pytest.param(lambda size: b"[" * size, 400, id="brackets"),
        pytest.param(lambda size: b'{"x":' + b"[" * 2 * size, 413, id="brackets inside"),
        pytest.param(lambda size: b'{"' + b"\\" * size, 400, id="a string without an end"),
        pytest.param(lambda size: b'{"x":"' + b'\\"' * (size // 2), 400, id="quotes"),
        pytest.param(lambda size: b" " * size, 400, id="spaces"),
        pytest.param(lambda size: b"{" + b'"a":1,' * (size // 4) + b'"a":1}', 413, id="members"),
    ],
)
def test_json_takes_bounded_memory_whatever_it_is(
    serve: Serve, connect_http: ConnectHttp, make: Callable[[int], bytes], status: int
) -> None:
    running = serve(exporting)
    body = make(4 * MIB)
    packed = gzip.compress(body, 1)
    before = resident_bytes()
    neighbour = connect_http(running)
    hostile = in_background(
        lambda: connect_http(running).post(TRACES, packed, content_type=JSON, headers={"content-encoding": "gzip"})
    )
    assert neighbour.post(TRACES, b"").status == 200
    assert hostile().status == status
    assert resident_bytes() - before < 500 * MIB
    wait_until(lambda: running.budget.level == 0)


def test_a_body_is_counted_as_it_comes_and_not_as_it_was_announced(serve: Serve) -> None:
    running = serve(Recorder(), settings(max_request_bytes=10_000))
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "transfer-encoding: chunked") + chunk(b"x" * 9_999))
        wait_until(lambda: running.server.calls_in_flight == 1)
        client.send(chunk(b"xx"))
        assert client.reply().status == 413
    for lines in (("content-length: 5", "content-length: 6"), ("content-length: 5", "transfer-encoding: chunked")):
        with RawConnection(running.http_port) as client:
            client.send(head(TRACES, *lines) + b"hello")
            assert client.reply_status == 400
    with RawConnection(running.http_port) as client:
        client.send(head(TRACES, "content-length: 99999999999999999999") + b"hello")
        assert client.reply_status in {400, 413}
