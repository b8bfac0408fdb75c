"""What raw gRPC clients hear: statuses, trailers, limits."""

import gc
import logging
import sys
from collections.abc import Callable

import grpc
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_pg_exporter.errors import (
    DatabaseUnavailableError,
    ExporterError,
    TooLargeError,
    UnauthenticatedError,
    UndecodableError,
)
from otel_pg_exporter.model import Hold, Outcome, Signal
from tests.receiver.support import LOGS, METRICS, TRACES, Connect, Recorder, Serve, Wire, refusal, settings
from tests.support import wait_until

HEADERS, DATA = 1, 0  # HTTP/2 frame types
END_STREAM = 1


def failing(error: Exception) -> Callable[[Signal, bytes, Hold], Outcome]:
    def export(_signal: Signal, _body: bytes, _hold: Hold) -> Outcome:
        raise error

    return export


def test_an_ok_has_an_empty_body_and_no_metadata(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    client = connect(serve(recorder).address)
    for method in (TRACES, LOGS):
        answer, call = client.with_call(method, b"body of " + method.encode())
        assert (answer, call.initial_metadata(), call.trailing_metadata()) == (b"", (), ())
    assert recorder.calls == [
        (Signal.TRACES, b"body of " + TRACES.encode()),
        (Signal.LOGS, b"body of " + LOGS.encode()),
    ]


def test_an_empty_body_is_a_request_without_items(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    assert connect(serve(recorder).address).export(TRACES, b"") == b""
    assert recorder.calls == [(Signal.TRACES, b"")]


def test_refused_items_are_a_partial_success_in_the_words_of_each_service(serve: Serve, connect: Connect) -> None:
    client = connect(serve(Recorder(Outcome(stored=3, rejected=2, error_message="2 items: reason"))).address)
    spans = ExportTraceServiceResponse.FromString(client.export(TRACES, b"x")).partial_success
    logs = ExportLogsServiceResponse.FromString(client.export(LOGS, b"x")).partial_success
    assert (spans.rejected_spans, spans.error_message) == (2, "2 items: reason")
    assert (logs.rejected_log_records, logs.error_message) == (2, "2 items: reason")


def test_an_outage_is_unavailable_with_the_same_retry_info_in_both_trailers(serve: Serve, connect: Connect) -> None:
    client = connect(serve(failing(DatabaseUnavailableError("no COMMIT within 3 s"))).address)
    error = client.refused(TRACES, b"x")
    assert (error.code, error.details) == (grpc.StatusCode.UNAVAILABLE, "no COMMIT within 3 s")
    assert error.retry_delay == 1
    assert error.initial == ()


def test_an_outage_travels_as_trailers_only(serve: Serve, connect: Connect) -> None:
    with Wire(serve(failing(DatabaseUnavailableError("away"))).port) as wire:
        connect(wire.address).refused(TRACES, b"x")
        frames = [(kind, flags & END_STREAM) for kind, flags, stream in wire.frames() if stream and kind <= HEADERS]
    assert frames == [(HEADERS, END_STREAM)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UndecodableError("byte 7 is no tag"), grpc.StatusCode.INVALID_ARGUMENT),
        (TooLargeError("2 of 1 bytes"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnauthenticatedError("no token"), grpc.StatusCode.UNAUTHENTICATED),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_refusal_for_good_has_its_code_its_message_and_no_trailers(
    serve: Serve, connect: Connect, error: ExporterError, code: grpc.StatusCode
) -> None:
    answer = connect(serve(failing(error)).address).refused(TRACES, b"x")
    assert (answer.code, answer.details, answer.trailers) == (code, str(error), {})


def test_a_bug_asks_for_two_retries_then_refuses_without_showing_its_trace(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(serve(failing(ZeroDivisionError("at secret place"))).address)
    with caplog.at_level(logging.ERROR):
        answers = [client.refused(TRACES, b"poison") for _ in range(3)]
        other = client.refused(TRACES, b"other")
    unavailable, internal = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL
    assert [answer.code for answer in (*answers, other)] == [unavailable, unavailable, internal, unavailable]
    assert [answer.retry_delay for answer in answers[:2]] == [1, 1]
    assert not any("secret" in answer.details or "Traceback" in answer.details for answer in answers)
    assert "this request of 6 bytes has now failed 3 times" in answers[2].details
    assert len(caplog.records) == 1
    assert "ZeroDivisionError: at secret place" in caplog.text


@pytest.mark.parametrize("method", [TRACES, LOGS, METRICS])
def test_a_call_without_a_message_is_an_invalid_argument(serve: Serve, connect: Connect, method: str) -> None:
    recorder = Recorder()
    error = refusal(connect(serve(recorder).address).stream(method, iter([])).exception())
    assert (error.code, error.trailers) == (grpc.StatusCode.INVALID_ARGUMENT, {})
    assert error.details == "the call brought no message; Export takes exactly one"
    assert recorder.calls == []


def test_of_several_messages_the_first_is_the_request_as_with_grpcs_own_unary_methods(
    serve: Serve, connect: Connect
) -> None:
    recorder = Recorder()
    assert connect(serve(recorder).address).stream(TRACES, iter([b"first", b"second"])).result() == b""
    assert recorder.calls == [(Signal.TRACES, b"first")]


def test_an_unknown_method_is_unimplemented(serve: Serve, connect: Connect) -> None:
    client = connect(serve(Recorder()).address)
    for method in ("/opentelemetry.proto.collector.trace.v1.TraceService/Import", "/no.such.Service/Export"):
        assert client.refused(method, b"x").code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_request_of_exactly_the_limit_is_taken_and_a_byte_more_is_too_large_for_ever(
    serve: Serve, connect: Connect, compression: grpc.Compression | None
) -> None:
    recorder = Recorder()
    running = serve(recorder, settings(max_request_bytes=100_000))
    client = connect(running.address)
    assert client.export(TRACES, b"x" * 100_000, compression=compression) == b""
    error = client.refused(TRACES, b"x" * 100_001, compression=compression)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details
    assert error.trailers == {}
    assert [len(body) for _, body in recorder.calls] == [100_000]
    wait_until(lambda: (running.server.calls_in_flight, running.budget.level) == (0, 0))


def test_the_default_limit_takes_64_mib_also_when_compressed(serve: Serve, connect: Connect) -> None:
    recorder = Recorder()
    client = connect(serve(recorder).address)
    assert client.export(TRACES, bytes(64 * 2**20), compression=grpc.Compression.Gzip, timeout=60) == b""
    assert client.refused(TRACES, bytes(64 * 2**20 + 1)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [len(body) for _, body in recorder.calls] == [64 * 2**20]


def test_a_body_beyond_the_byte_budget_is_refused_with_figures_and_leaves_nothing_reserved(
    serve: Serve, connect: Connect
) -> None:
    recorder = Recorder()
    running = serve(recorder, budget=1_000_000)
    client = connect(running.address)
    for _ in range(50):
        client.export(TRACES, b"small bodies, that the next one is expected to be like")
    with running.budget.reserve(900_000):
        error = client.refused(TRACES, b"x" * 50_000)
        assert (error.code, error.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
        assert error.details == "memory budget is full: 900,000 of 1,000,000 bytes are in use, 150,000 more needed"
        assert client.export(TRACES, b"x" * 10_000) == b""
        with running.budget.reserve(100_000):
            assert client.refused(TRACES, b"x").code is grpc.StatusCode.UNAVAILABLE
    assert len(recorder.calls[-1][1]) == 10_000
    wait_until(lambda: running.budget.level == 0)


def test_a_call_that_comes_while_the_byte_budget_is_full_waits_a_moment_for_its_place(
    serve: Serve, connect: Connect
) -> None:
    recorder = Recorder()
    running = serve(recorder)
    with running.budget.reserve(running.budget.limit):
        future = connect(running.address).future(TRACES, b"patient")
        wait_until(lambda: running.server.calls_in_flight == 1)
    assert future.result() == b""
    assert recorder.calls == [(Signal.TRACES, b"patient")]


def test_a_body_that_would_not_fit_even_alone_takes_the_whole_budget_instead(serve: Serve, connect: Connect) -> None:
    levels: list[int] = []

    def export(_signal: Signal, _body: bytes, _hold: Hold) -> Outcome:
        levels.append(running.budget.level)
        return Outcome()

    running = serve(export, budget=100_000)
    connect(running.address).export(TRACES, b"x" * 90_000)
    assert levels == [100_000]


def test_a_refused_body_is_freed_without_waiting_for_the_garbage_collector(serve: Serve, connect: Connect) -> None:
    bodies: list[bytes] = []

    def export(_signal: Signal, body: bytes, _hold: Hold) -> Outcome:
        bodies.append(body)
        raise DatabaseUnavailableError("away")

    client = connect(serve(export).address)
    gc.disable()
    try:
        client.refused(TRACES, b"x" * 1_000)
        wait_until(lambda: sys.getrefcount(bodies[0]) == 2)
    finally:
        gc.enable()


def test_every_answer_is_told_with_its_method_and_status_also_of_calls_whose_body_was_not_read(
    serve: Serve, connect: Connect
) -> None:
    told: list[tuple[str, str]] = []

    def answered(method: str, status: str, seconds: float) -> None:
        assert 0 <= seconds < 60
        told.append((method, status))

    client = connect(serve(Recorder(), settings(max_request_bytes=2048), answered=answered).address)
    client.export(TRACES, b"x")
    client.export(METRICS, b"")
    assert client.refused(METRICS, b"\xff").code is grpc.StatusCode.INVALID_ARGUMENT
    assert client.refused(LOGS, bytes(4096)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    failed = connect(serve(failing(UnauthenticatedError("who?")), answered=answered).address)
    assert failed.refused(TRACES, b"x").code is grpc.StatusCode.UNAUTHENTICATED
    full = serve(Recorder(), answered=answered)
    with full.budget.reserve(full.budget.limit):
        assert connect(full.address).refused(TRACES, b"x").code is grpc.StatusCode.UNAVAILABLE
    names = {TRACES: "trace.v1.TraceService", LOGS: "logs.v1.LogsService", METRICS: "metrics.v1.MetricsService"}
    expected = [
        (TRACES, {"OK"}),
        (METRICS, {"OK"}),
        (METRICS, {"INVALID_ARGUMENT"}),
        # gRPC has refused it itself; whether the handler hears of that or of no message is chance.
        (LOGS, {"CANCELLED", "INVALID_ARGUMENT"}),
        (TRACES, {"UNAUTHENTICATED"}),
        (TRACES, {"UNAVAILABLE"}),
    ]
    wait_until(lambda: len(told) == len(expected))  # in any order: a sender is answered before that is told
    for method, statuses in expected:
        called = f"opentelemetry.proto.collector.{names[method]}/Export"
        told.remove(next(each for each in told if each[0] == called and each[1] in statuses))
