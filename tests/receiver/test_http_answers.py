"""What senders hear by OTLP/HTTP: answers, refusals and limits."""

import gc
import gzip
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.errors import (
    DatabaseUnavailableError,
    ExporterError,
    TooLargeError,
    UnauthenticatedError,
    UndecodableError,
)
from otel_pg_exporter.model import Hold, Outcome, Signal
from otel_pg_exporter.receiver.security import Security
from tests.receiver.http1 import JSON, PROTOBUF, RawConnection, head
from tests.receiver.support import ConnectHttp, Recorder, Serve, in_background, settings
from tests.support import wait_until

TRACES, LOGS, METRICS = "/v1/traces", "/v1/logs", "/v1/metrics"


def failing(error: Exception) -> Callable[[Signal, bytes, Hold], Outcome]:
    def export(_signal: Signal, _body: bytes, _hold: Hold) -> Outcome:
        raise error

    return export


def deflated(body: bytes) -> bytes:
    """Compress without zlib's frame."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


ENCODED: dict[str, tuple[str | None, Callable[[bytes], bytes]]] = {
    "identity": (None, bytes),
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),  # its other name (RFC 9110, 8.4.1.3)
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", deflated),
}


def encoding(name: str) -> tuple[dict[str, str], Callable[[bytes], bytes]]:
    header, encode = ENCODED[name]
    return {} if header is None else {"content-encoding": header}, encode


def test_an_ok_is_200_with_an_empty_response_and_the_connection_lives_on(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    recorder = Recorder()
    client = connect_http(serve(recorder))
    for path in (TRACES, LOGS):
        reply = client.post(path, b"body of " + path.encode())
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"", PROTOBUF)
        port = client.local_port
    assert client.post(TRACES, b"").status == 200  # without items
    assert client.local_port == port
    assert recorder.calls == [
        (Signal.TRACES, b"body of /v1/traces"),
        (Signal.LOGS, b"body of /v1/logs"),
        (Signal.TRACES, b""),
    ]


def test_refused_items_are_a_partial_success_in_the_requests_own_form(serve: Serve, connect_http: ConnectHttp) -> None:
    client = connect_http(serve(Recorder(Outcome(stored=3, rejected=2, error_message="2 items: reason"))))
    spans = ExportTraceServiceResponse.FromString(client.post(TRACES, b"x").body).partial_success
    assert (spans.rejected_spans, spans.error_message) == (2, "2 items: reason")
    reply = client.post(LOGS, b"{}", content_type="application/json; charset=utf-8")
    logs = Parse(reply.body, ExportLogsServiceResponse()).partial_success
    assert (logs.rejected_log_records, logs.error_message) == (2, "2 items: reason")
    assert reply.headers["content-type"] == JSON
    request = ExportMetricsServiceRequest()
    request.resource_metrics.add().scope_metrics.add().metrics.add().gauge.data_points.add()
    metrics = ExportMetricsServiceResponse.FromString(client.post(METRICS, request.SerializeToString()).body)
    assert metrics.partial_success.rejected_data_points == 1
    assert "metrics are not stored here" in metrics.partial_success.error_message


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DatabaseUnavailableError("no COMMIT within 3 s"), 503, 14),
        (UndecodableError("byte 7 is no tag"), 400, 3),
        (TooLargeError("2 of 1 bytes"), 413, 8),
        (UnauthenticatedError("no token"), 401, 16),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_refusal_has_its_status_and_says_why_in_the_requests_own_form(
    serve: Serve, connect_http: ConnectHttp, error: ExporterError, status: int, code: int
) -> None:
    client = connect_http(serve(failing(error)))
    for content_type in (PROTOBUF, JSON):
        reply = client.post(TRACES, b"{}", content_type=content_type)
        assert (reply.status, reply.headers["content-type"]) == (status, content_type)
        assert (reply.refusal.code, reply.refusal.message) == (code, str(error))


def test_a_bug_asks_for_two_retries_then_refuses_without_showing_its_trace(
    serve: Serve, connect_http: ConnectHttp, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect_http(serve(failing(ZeroDivisionError("at secret place"))))
    with caplog.at_level(logging.ERROR):
        answers = [client.post(TRACES, b"poison") for _ in range(3)]
        other = client.post(TRACES, b"other")
    assert [answer.status for answer in (*answers, other)] == [503, 503, 500, 503]
    assert "this request of 6 bytes has now failed 3 times" in answers[2].refusal.message
    assert not any(b"secret" in answer.body or b"Traceback" in answer.body for answer in answers)
    assert len(caplog.records) == 1


def test_what_is_not_otlps_is_refused_before_its_body_is_read(serve: Serve, connect_http: ConnectHttp) -> None:
    recorder = Recorder()
    running = serve(recorder, settings(max_request_bytes=1_000))
    client = connect_http(running)
    with running.budget.reserve(running.budget.limit):  # so that whatever would read a body were refused by 503
        assert client.post("/v1/profiles", b"x").status == 404
        assert client.post("/v1/traces/", b"x").refusal.code == 5
        reply = client.request("GET", TRACES)
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert "POST /v1/traces" in reply.refusal.message
        for content_type in ("text/plain", "application/grpc", ""):
            reply = client.post(TRACES, b"x", content_type=content_type)
            assert (reply.status, reply.refusal.code) == (415, 12)
        assert client.post(TRACES, b"x", headers={"content-encoding": "br"}).status == 415
        assert client.post(TRACES, b"x" * 1_001).status == 413
        assert client.post(TRACES, b"x").status == 503
    assert recorder.calls == []


def test_of_a_long_header_only_the_beginning_is_logged(
    serve: Serve, connect_http: ConnectHttp, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect_http(serve(Recorder()))
    for headers in ({"content-encoding": "x" * 60_000}, {"content-type": "text/" + "x" * 60_000}):
        assert client.request("POST", TRACES, b"x", headers={"content-type": PROTOBUF, **headers}).status == 415
    assert [len(message) < 500 for message in caplog.messages if "refused" in message] == [True]  # of two, by its limit


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_of_exactly_the_limit_is_taken_and_a_byte_more_is_too_large(
    serve: Serve, connect_http: ConnectHttp, name: str, *, chunked: bool
) -> None:
    headers, encode = encoding(name)
    recorder = Recorder()
    running = serve(recorder, settings(max_request_bytes=100_000))
    client = connect_http(running)

    def post(size: int) -> int:
        body = encode(b"x" * size)
        pieces = [body[start : start + 7_000] for start in range(0, len(body), 7_000)]
        return client.post(TRACES, pieces if chunked else body, headers=headers).status

    assert post(100_000) == 200
    assert post(100_001) == 413
    assert [body for _, body in recorder.calls] == [b"x" * 100_000]
    wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        pytest.param("gzip", b"", id="empty"),
        pytest.param("gzip", b"no gzip", id="no gzip"),
        pytest.param("gzip", gzip.compress(b"x" * 1_000)[:-1], id="cut off"),
        pytest.param("gzip", gzip.compress(b"x") * 2, id="two in one"),
        pytest.param("gzip", zlib.compress(b"x"), id="zlib said to be gzip"),
        pytest.param("zlib", zlib.compress(b"x")[:-4] + b"\0\0\0\0", id="wrong checksum"),
        pytest.param("raw deflate", b"\xff\xff\xff", id="no deflate"),
    ],
)
def test_what_cannot_be_decompressed_is_a_bad_request(
    serve: Serve, connect_http: ConnectHttp, name: str, body: bytes
) -> None:
    recorder = Recorder()
    headers, _ = encoding(name)
    reply = connect_http(serve(recorder)).post(TRACES, body, headers=headers)
    assert (reply.status, reply.refusal.code) == (400, 3)
    assert recorder.calls == []


def test_a_body_beyond_the_byte_budget_is_refused_for_now_and_leaves_nothing_reserved(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    recorder = Recorder()
    running = serve(recorder, budget=1_000_000)
    client = connect_http(running)
    with running.budget.reserve(900_000):
        for body in (b"x" * 50_000, [b"x" * 50_000]):
            reply = client.post(TRACES, body)
            assert reply.status == 503
            assert "memory budget is full" in reply.refusal.message
        assert client.post(TRACES, b"x" * 10_000).status == 200
    assert client.post(TRACES, gzip.compress(b"x" * 300_000), headers={"content-encoding": "gzip"}).status == 200
    assert [len(body) for _, body in recorder.calls] == [10_000, 300_000]
    wait_until(lambda: running.budget.level == 0)


def test_a_request_that_comes_while_the_byte_budget_is_full_waits_a_moment_for_its_place(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    recorder = Recorder()
    running = serve(recorder)
    held = running.budget.reserve(running.budget.limit)
    waiter = in_background(lambda: connect_http(running).post(TRACES, b"patient").status)
    wait_until(lambda: running.server.calls_in_flight == 1)
    held.release()
    assert waiter() == 200
    assert recorder.calls == [(Signal.TRACES, b"patient")]


def test_a_refused_body_is_freed_without_waiting_for_the_garbage_collector(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    bodies: list[bytes] = []

    def export(_signal: Signal, body: bytes, _hold: Hold) -> Outcome:
        bodies.append(body)
        raise DatabaseUnavailableError("away")

    client = connect_http(serve(export))
    gc.disable()
    try:
        client.post(TRACES, b"x" * 1_000)
        wait_until(lambda: sys.getrefcount(bodies[0]) == 2)
    finally:
        gc.enable()


def test_credentials_are_asked_for_before_anything_else(
    serve: Serve, connect_http: ConnectHttp, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-that-is-long-enough\n")
    tokens.chmod(0o600)
    recorder = Recorder()
    running = serve(recorder, security=Security(SecuritySettings(auth_bearer_file=tokens)))
    client = connect_http(running)
    with running.budget.reserve(running.budget.limit):
        reply = client.post(TRACES, b"x", content_type="text/plain", headers={"authorization": "Bearer wrong"})
        assert (reply.status, reply.refusal.message) == (401, "wrong Bearer credentials")
        assert reply.headers["www-authenticate"] == 'Bearer realm="OTLP"'
        assert client.post(TRACES, b"x").status == 401
    right = {"authorization": "Bearer a-token-that-is-long-enough"}
    with RawConnection(running.http_port) as late:
        trailer = f"authorization: {right['authorization']}"
        late.send(head(TRACES, "transfer-encoding: chunked") + f"0\r\n{trailer}\r\n\r\n".encode())
        assert late.reply().status == 401
    assert client.post(TRACES, b"x", headers=right).status == 200
    assert [body for _, body in recorder.calls] == [b"x"]


def test_pages_of_listed_origins_may_send_from_a_browser_and_others_may_not(
    serve: Serve, connect_http: ConnectHttp
) -> None:
    client = connect_http(serve(Recorder(), settings(cors_origins=("https://app.example",))))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-extra"}
    reply = client.request("OPTIONS", TRACES, headers={"origin": "https://app.example", **asked})
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert reply.headers["access-control-allow-headers"] == "content-type,x-extra"
    reply = client.post(TRACES, b"x", headers={"origin": "https://app.example"})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://app.example")
    reply = client.request("OPTIONS", TRACES, headers={"origin": "https://evil.example", **asked})
    assert reply.status == 400
    assert "access-control-allow-origin" not in reply.headers
    assert (
        "access-control-allow-origin"
        not in client.post(TRACES, b"x", headers={"origin": "https://evil.example"}).headers
    )


def test_without_a_list_of_origins_no_browser_may_send(serve: Serve, connect_http: ConnectHttp) -> None:
    client = connect_http(serve(Recorder()))
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    reply = client.request("OPTIONS", TRACES, headers=headers)
    assert reply.status == 405
    assert not any(name.startswith("access-control") for name in reply.headers)
