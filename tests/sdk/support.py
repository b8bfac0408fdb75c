"""What the tests of the exporters share: `from tests.sdk.support import spans`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry._logs import LogRecord
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import (
    BatchLogRecordProcessor,
    InMemoryLogRecordExporter,
    LogRecordExporter,
    SimpleLogRecordProcessor,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

RESOURCE = Resource({"service.name": "shop", "host.name": "h1"}, schema_url="https://example.org/resource")


@contextmanager
def tracer_provider(exporter: SpanExporter) -> Iterator[TracerProvider]:
    """Yield a provider that batches into the exporter; flush and shut it down at the end."""
    provider = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider
    finally:
        provider.shutdown()


@contextmanager
def logger_provider(exporter: LogRecordExporter) -> Iterator[LoggerProvider]:
    """Yield a provider that batches into the exporter; flush and shut it down at the end."""
    provider = LoggerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
    try:
        yield provider
    finally:
        provider.shutdown()


def spans(*names: str) -> Sequence[ReadableSpan]:
    """Return ended spans of these names."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("test")
    for name in names:
        tracer.start_span(name).end()
    return memory.get_finished_spans()


def records(*bodies: str) -> list[ReadableLogRecord]:
    """Return log records with these bodies."""
    memory = InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # upstream's has no annotations
    provider = LoggerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(memory))
    for body in bodies:
        provider.get_logger("test").emit(LogRecord(timestamp=1_700_000_000_000_000_000, body=body))
    return list(memory.get_finished_logs())
