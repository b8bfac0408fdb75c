"""The official OTLP/gRPC exporters against a GrpcServer."""

import logging
import threading
from collections import Counter

import grpc
import pytest
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from otel_pg_exporter.errors import DatabaseUnavailableError, UndecodableError
from otel_pg_exporter.model import Hold, Outcome, Signal
from tests.receiver.support import METRICS, Connect, Recorder, Serve

COMPRESSIONS = [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]


def make_spans(number: int, name: str = "GET /") -> tuple[ReadableSpan, ...]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("tests")
    for index in range(number):
        tracer.start_span(name, attributes={"index": index, "padding": "x" * 100}).end()
    return memory.get_finished_spans()


def names(body: bytes) -> list[str]:
    request = ExportTraceServiceRequest.FromString(body)
    return [span.name for each in request.resource_spans for scope in each.scope_spans for span in scope.spans]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda each: each.name)
def test_spans_of_the_official_exporter_arrive_whole_with_every_compression(
    serve: Serve, compression: grpc.Compression
) -> None:
    recorder = Recorder()
    exporter = OTLPSpanExporter(serve(recorder).address, insecure=True, compression=compression, timeout=60)
    assert exporter.export(make_spans(512)) is SpanExportResult.SUCCESS
    exporter.shutdown()
    ((signal, body),) = recorder.calls
    assert signal is Signal.TRACES
    assert names(body) == ["GET /"] * 512


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda each: each.name)
def test_log_records_of_the_official_exporter_arrive_whole_with_every_compression(
    serve: Serve, compression: grpc.Compression
) -> None:
    recorder = Recorder()
    provider = LoggerProvider(shutdown_on_exit=False)
    exporter = OTLPLogExporter(serve(recorder).address, insecure=True, compression=compression, timeout=60)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    record = LogRecord(timestamp=1, severity_number=SeverityNumber.INFO, body="hello", attributes={"key": 1})
    provider.get_logger("tests").emit(record)
    provider.shutdown()
    ((signal, body),) = recorder.calls
    request = ExportLogsServiceRequest.FromString(body)
    assert signal is Signal.LOGS
    assert request.resource_logs[0].scope_logs[0].log_records[0].body.string_value == "hello"


def test_an_app_that_exports_metrics_too_stays_quiet(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    exporter = OTLPMetricExporter(serve(recorder).address, insecure=True, timeout=60)
    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], shutdown_on_exit=False)
    provider.get_meter("tests").create_counter("requests").add(1)
    with caplog.at_level(logging.WARNING):
        assert provider.force_flush()
        provider.shutdown()
    assert caplog.records == []
    assert recorder.calls == []


def test_every_data_point_of_a_metrics_request_is_rejected_with_a_remedy(serve: Serve, connect: Connect) -> None:
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    for kind in ("gauge", "sum", "histogram", "exponential_histogram", "summary"):
        getattr(metrics.add(name=kind), kind).data_points.add()
    metrics.add(name="without data")
    metrics[0].gauge.data_points.add()
    client = connect(serve(Recorder()).address)
    answer = ExportMetricsServiceResponse.FromString(client.export(METRICS, request.SerializeToString()))
    assert answer.partial_success.rejected_data_points == 6
    assert "6 data points rejected; set OTEL_METRICS_EXPORTER=none" in answer.partial_success.error_message
    assert client.export(METRICS, b"") == b""
    error = client.refused(METRICS, b"\xff\xff")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "2 bytes are no ExportMetricsServiceRequest" in error.details


def test_the_official_exporter_succeeds_when_items_were_refused_and_fails_when_the_request_was(serve: Serve) -> None:
    recorder = Recorder(Outcome(stored=1, rejected=1, error_message="span 1: empty trace id"))

    def export(signal: Signal, body: bytes, _hold: Hold) -> Outcome:
        if b"bad" in body:
            raise UndecodableError("not OTLP")
        return recorder(signal, body)

    exporter = OTLPSpanExporter(serve(export).address, insecure=True, timeout=60)
    assert exporter.export(make_spans(2)) is SpanExportResult.SUCCESS
    assert exporter.export(make_spans(2, "bad")) is SpanExportResult.FAILURE
    exporter.shutdown()
    assert len(recorder.calls) == 1


def test_the_official_exporter_retries_an_outage_with_the_same_bytes_and_succeeds(serve: Serve) -> None:
    bodies: list[bytes] = []

    def export(_: Signal, body: bytes, _hold: Hold) -> Outcome:
        bodies.append(body)
        if len(bodies) == 1:
            raise DatabaseUnavailableError("PostgreSQL is away")
        return Outcome(stored=1)

    exporter = OTLPSpanExporter(serve(export).address, insecure=True, timeout=60)
    assert exporter.export(make_spans(1)) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]


def test_24_clients_at_once_all_succeed_and_every_request_arrives_once(serve: Serve) -> None:
    recorder = Recorder()
    running = serve(recorder)
    start = threading.Barrier(24)
    results: list[SpanExportResult] = []

    def client(number: int) -> None:
        compression = COMPRESSIONS[number % len(COMPRESSIONS)]
        exporter = OTLPSpanExporter(running.address, insecure=True, compression=compression, timeout=60)
        batches = [make_spans(50, f"client {number} batch {batch}") for batch in range(5)]
        start.wait()
        results.extend(exporter.export(spans) for spans in batches)
        exporter.shutdown()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arrived = Counter(name for _, body in recorder.calls for name in names(body))
    assert results == [SpanExportResult.SUCCESS] * 24 * 5
    assert arrived == {f"client {number} batch {batch}": 50 for number in range(24) for batch in range(5)}
