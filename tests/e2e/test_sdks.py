"""The official SDK and its OTLP exporters through the front door: what an app records is what the tables hold."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from tests.e2e.support import Receiver

pytestmark = pytest.mark.parametrize("protocol", ["grpc", "http"])

COMPRESSIONS = [grpc.Compression.NoCompression, grpc.Compression.Gzip]
BY_HTTP = {grpc.Compression.NoCompression: Compression.NoCompression, grpc.Compression.Gzip: Compression.Gzip}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where an SDK or the receiver complains."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@contextmanager
def tracing(receiver: Receiver, service: str, compression: grpc.Compression) -> Iterator[TracerProvider]:
    provider = TracerProvider(resource=Resource({"service.name": service}), shutdown_on_exit=False)
    exporter = (
        OTLPSpanExporter(receiver.address, insecure=True, compression=compression, timeout=60)
        if receiver.protocol == "grpc"
        else HttpSpanExporter(f"http://{receiver.http_address}/v1/traces", compression=BY_HTTP[compression], timeout=60)
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=10_000))
    yield provider
    provider.shutdown()  # flushes


@contextmanager
def logs(receiver: Receiver, service: str, compression: grpc.Compression) -> Iterator[LoggerProvider]:
    provider = LoggerProvider(resource=Resource({"service.name": service}), shutdown_on_exit=False)
    exporter = (
        OTLPLogExporter(receiver.address, insecure=True, compression=compression, timeout=60)
        if receiver.protocol == "grpc"
        else HttpLogExporter(f"http://{receiver.http_address}/v1/logs", compression=BY_HTTP[compression], timeout=60)
    )
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter, max_queue_size=10_000))
    yield provider
    provider.shutdown()


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda each: each.name)
def test_what_a_tracer_records_is_stored(receiver: Receiver, compression: grpc.Compression) -> None:
    with tracing(receiver, "shop", compression) as provider:
        tracer = provider.get_tracer("scope", "1.2", schema_url="https://example.org/scope", attributes={"a": 1})
        with tracer.start_as_current_span("order", kind=SpanKind.SERVER, attributes={"n": 1, "tags": ["x"]}) as root:
            root.add_event("paid", {"amount": 2.5}, timestamp=1_760_000_000_123_456_789)
            linked = [Link(root.get_span_context(), {"why": "test"})]
            with tracer.start_as_current_span("charge", kind=SpanKind.CLIENT, links=linked) as child:
                child.set_status(Status(StatusCode.ERROR, "declined"))
    trace, parent = root.get_span_context().trace_id, root.get_span_context().span_id.to_bytes(8, "big")
    (first, second) = receiver.database.rows(
        "SELECT trace_id::text, parent_span_id, name, kind, status_code, status_message, attributes, events, links,"
        " service_name, scope_name, scope_version, scope_attributes, schema_url, flags & 256, anomalies"
        " FROM spans ORDER BY start_time"
    )
    identity = f"{trace:032x}"
    assert first[0].replace("-", "") == second[0].replace("-", "") == identity
    assert first[1:7] == (None, "order", 2, 0, "", {"n": 1, "tags": ["x"]})
    event = {"time_unix_nano": 1_760_000_000_123_456_789, "name": "paid", "attributes": {"amount": 2.5}}
    assert first[7] == [event | {"dropped_attributes_count": 0}]
    assert second[1:7] == (parent, "charge", 3, 2, "declined", None)
    (link,) = second[8]
    assert (link["trace_id"], link["span_id"], link["attributes"]) == (identity, parent.hex(), {"why": "test"})
    assert first[9:13] == second[9:13] == ("shop", "scope", "1.2", {"a": 1})
    # 256: the parent is known to be local or remote. The sampled bit is not sent by OTLP's encoder.
    assert second[13:] == ("https://example.org/scope", 256, 0)
    assert receiver.database.rows("SELECT span_count, error_count, root_name FROM traces") == [(2, 1, "order")]
    receiver.database.assert_traces_exact()


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda each: each.name)
def test_what_a_logger_emits_is_stored(receiver: Receiver, compression: grpc.Compression) -> None:
    with logs(receiver, "shop", compression) as provider:
        logger = provider.get_logger("scope", "1.2")
        for body in ("hello", {"key": [1, 2.5, None, {"deep": True}]}):
            logger.emit(
                LogRecord(
                    timestamp=1_760_000_000_123_456_789,
                    observed_timestamp=1_760_000_000_123_456_790,
                    severity_number=SeverityNumber.WARN,
                    severity_text="WARN",
                    body=body,
                    attributes={"number": 1},
                    event_name="event",
                )
            )
    assert receiver.database.rows(
        "SELECT body, body_json, time_ns, observed_time_ns, severity_number, severity_text, attributes, event_name,"
        " service_name, scope_name FROM logs ORDER BY body"
    ) == [
        (body, document, 789, 790, 13, "WARN", {"number": 1}, "event", "shop", "scope")
        for body, document in (("hello", None), (None, {"key": [1, 2.5, None, {"deep": True}]}))
    ]


def test_16_apps_at_once_lose_nothing(receiver: Receiver) -> None:
    def app(number: int) -> None:
        compression = COMPRESSIONS[number % 2]
        with (
            tracing(receiver, f"app {number}", compression) as traces,
            logs(receiver, f"app {number}", compression) as lines,
        ):
            tracer, logger = traces.get_tracer("test"), lines.get_logger("test")
            for operation in range(100):
                with tracer.start_as_current_span(f"operation {operation}"):
                    logger.emit(LogRecord(timestamp=1_760_000_000_000_000_000, body=f"line {operation}"))
                    with tracer.start_as_current_span("inner"):
                        pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(app, range(16)))
    assert receiver.database.rows(
        "SELECT count(*), count(DISTINCT service_name), count(DISTINCT (service_name, count)) FROM"
        " (SELECT service_name, trace_id, count(*) FROM spans GROUP BY 1, 2) AS each"
    ) == [(1600, 16, 16)]
    # Every log record carries the ids of the span that it was emitted in.
    assert receiver.database.rows(
        "SELECT count(*), count(DISTINCT (l.service_name, l.body)) FROM logs l JOIN spans s USING (trace_id, span_id)"
        " WHERE replace(s.name, 'operation', 'line') = l.body"
    ) == [(1600, 1600)]
    assert receiver.database.rows("SELECT sum(span_count), count(*) FROM traces") == [(3200, 1600)]
    receiver.database.assert_traces_exact()


def test_an_app_that_exports_metrics_too_stays_quiet(receiver: Receiver) -> None:
    exporter = (
        OTLPMetricExporter(receiver.address, insecure=True, timeout=60)
        if receiver.protocol == "grpc"
        else HttpMetricExporter(f"http://{receiver.http_address}/v1/metrics", timeout=60)
    )
    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], shutdown_on_exit=False)
    provider.get_meter("test").create_counter("requests").add(1)
    assert provider.force_flush()
    provider.shutdown()
    assert receiver.service.counts().received == 0
