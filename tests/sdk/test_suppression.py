import logging
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from opentelemetry import context
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler, LogRecordProcessor
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult

from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
from tests.sdk.conftest import Query
from tests.sdk.support import spans

Processor = type[BatchLogRecordProcessor | SimpleLogRecordProcessor]

pytestmark = pytest.mark.filterwarnings("ignore:.*LoggingHandler.*:DeprecationWarning")


@pytest.fixture(params=[BatchLogRecordProcessor, SimpleLogRecordProcessor])
def processor(request: pytest.FixtureRequest) -> Processor:
    chosen: Processor = request.param
    return chosen


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """Return the root logger, wide open; it is as before afterwards."""
    root = logging.getLogger()
    handlers, level, psycopg_level = list(root.handlers), root.level, logging.getLogger("psycopg").level
    root.setLevel(logging.DEBUG)
    logging.getLogger("psycopg").setLevel(logging.DEBUG)
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("psycopg").setLevel(psycopg_level)


def provide(processor: LogRecordProcessor) -> LoggerProvider:
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(processor)
    return provider


def test_what_an_export_logs_is_not_exported_again(
    processor: Processor,
    dsn: str,
    query: Query,
    root_logger: logging.Logger,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = PostgresLogRecordExporter(dsn=dsn)
    provider = provide(processor(exporter))
    root_logger.addHandler(LoggingHandler(logger_provider=provider))
    logging.getLogger("app").warning("one")
    logging.getLogger("otel_pg_exporter.sdk.exporters").warning("of our own")
    provider.force_flush()
    logging.getLogger("app").warning("two")
    provider.force_flush()
    provider.shutdown()
    assert query("SELECT body FROM logs WHERE scope_name <> 'app'") == []
    assert sorted(query("SELECT body FROM logs")) == [("one",), ("two",)]
    assert "of our own" in caplog.messages  # other handlers get it


def test_an_outage_makes_no_log_records_that_prolong_it(
    processor: Processor,
    root_logger: logging.Logger,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = PostgresLogRecordExporter(dsn="postgresql://u@127.0.0.1:1/nowhere", timeout=0.2)
    provider = provide(processor(exporter))
    root_logger.addHandler(LoggingHandler(logger_provider=provider))
    logging.getLogger("app").warning("lost")
    for _ in range(3):
        provider.force_flush()
    assert exporter.counts.received == 1
    assert any("could not be stored" in message for message in caplog.messages)
    provider.shutdown()


def test_an_export_runs_with_instrumentations_suppressed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for an instrumentation: note the flag that they all look at whenever psycopg runs a statement."""
    seen: list[object] = []
    execute: Any = psycopg.Cursor.execute

    def traced(*args: object, **kwargs: object) -> object:
        seen.append(context.get_value(_SUPPRESS_INSTRUMENTATION_KEY))
        return execute(*args, **kwargs)

    monkeypatch.setattr(psycopg.Cursor, "execute", traced)
    exporter = PostgresSpanExporter(dsn=dsn)
    assert exporter.export(spans("a")) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert seen
    assert all(seen)
    assert not context.get_value(_SUPPRESS_INSTRUMENTATION_KEY)


def test_an_app_whose_psycopg_is_instrumented_gets_no_spans_about_the_exports(dsn: str, query: Query) -> None:
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.psycopg")
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(PostgresSpanExporter(dsn=dsn)))
    instrumentor = instrumentation.PsycopgInstrumentor()
    instrumentor.instrument(tracer_provider=provider, enable_commenter=True)
    try:
        provider.get_tracer("app").start_span("work").end()
        with psycopg.connect(dsn) as connection:
            connection.execute("SELECT 1")
        provider.get_tracer("app").start_span("more work").end()
    finally:
        instrumentor.uninstrument()
    later = PostgresSpanExporter(dsn=dsn)
    assert later.export(spans("later")) is SpanExportResult.SUCCESS
    later.shutdown()
    provider.shutdown()
    assert sorted(query("SELECT name FROM spans")) == [("SELECT",), ("later",), ("more work",), ("work",)]
