import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggingHandler
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags

from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
from tests.sdk.conftest import Query
from tests.sdk.support import logger_provider, spans, tracer_provider


def test_spans_of_a_real_provider_land_in_the_table(writer_dsn: str, query: Query) -> None:
    with tracer_provider(PostgresSpanExporter(dsn=writer_dsn)) as provider:
        tracer = provider.get_tracer("checkout", "1.2", attributes={"scope": True})
        with tracer.start_as_current_span("parent", attributes={"a": 1}) as parent:
            parent.add_event("paid", {"amount": 1.5})
            with tracer.start_as_current_span("child"):
                pass
    [[child, parent_id, trace_id], [root, none, same_trace]] = query(
        "SELECT span_id, parent_span_id, trace_id FROM spans ORDER BY parent_span_id IS NULL"
    )
    context = parent.get_span_context()
    assert parent_id == root == context.span_id.to_bytes(8, "big")
    assert child != root
    assert none is None
    assert trace_id == same_trace
    assert trace_id.int == context.trace_id
    assert query(
        "SELECT name, service_name, scope_name, scope_version, attributes FROM spans WHERE name = 'parent'"
    ) == [("parent", "shop", "checkout", "1.2", {"a": 1})]
    assert query("SELECT span_count, root_name FROM traces") == [(2, "parent")]
    assert query("SELECT attributes, schema_url FROM resources") == [
        ({"service.name": "shop", "host.name": "h1"}, "https://example.org/resource")
    ]


def test_kinds_and_status_are_otlps_numbers_and_the_sampled_flag_is_kept(writer_dsn: str, query: Query) -> None:
    with tracer_provider(PostgresSpanExporter(dsn=writer_dsn)) as provider:
        tracer = provider.get_tracer("test")
        for kind in SpanKind:
            tracer.start_span(kind.name, kind=kind).end()
        broken = tracer.start_span("broken")
        broken.set_status(StatusCode.ERROR, "no money")
        broken.end()
        fine = tracer.start_span("fine")
        fine.set_status(StatusCode.OK)
        fine.end()
    assert dict(query("SELECT name, kind::int FROM spans WHERE name = upper(name)")) == {
        "INTERNAL": 1,
        "SERVER": 2,
        "CLIENT": 3,
        "PRODUCER": 4,
        "CONSUMER": 5,
    }
    assert query("SELECT status_code, status_message FROM spans WHERE name = 'broken'") == [(2, "no money")]
    assert query("SELECT status_code, status_message FROM spans WHERE name = 'fine'") == [(1, "")]
    assert query("SELECT DISTINCT flags & 1 FROM spans") == [(1,)]


def test_a_remote_parent_and_a_link_show_in_the_flags(writer_dsn: str, query: Query) -> None:
    remote = SpanContext(trace_id=7, span_id=8, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with tracer_provider(PostgresSpanExporter(dsn=writer_dsn)) as provider:
        context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        provider.get_tracer("test").start_span("x", context=context, links=[Link(remote, {"why": "batch"})]).end()
    [(flags, parent, links)] = query("SELECT flags, parent_span_id, links FROM spans")
    assert flags & 0x300 == 0x300
    assert parent == (8).to_bytes(8, "big")
    assert [(link["span_id"], link["attributes"]) for link in links] == [("0000000000000008", {"why": "batch"})]


def test_genai_attributes_get_their_columns_and_add_up_in_the_trace(writer_dsn: str, query: Query) -> None:
    with tracer_provider(PostgresSpanExporter(dsn=writer_dsn)) as provider:
        tracer = provider.get_tracer("genai")
        with tracer.start_as_current_span("agent"):
            for number in (1, 2):
                attributes: dict[str, Any] = {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.request.model": "large",
                    "gen_ai.usage.input_tokens": 100 * number,
                    "gen_ai.usage.output_tokens": 10 * number,
                    "gen_ai.response.finish_reasons": ["stop"],
                }
                tracer.start_span("chat large", attributes=attributes).end()
    assert query(
        "SELECT gen_ai_operation_name, gen_ai_request_model, gen_ai_input_tokens, gen_ai_finish_reasons"
        " FROM spans WHERE gen_ai_operation_name IS NOT NULL ORDER BY gen_ai_input_tokens"
    ) == [("chat", "large", 100, ["stop"]), ("chat", "large", 200, ["stop"])]
    assert query("SELECT gen_ai_input_tokens, gen_ai_output_tokens FROM traces") == [(300, 30)]


def test_log_records_of_a_real_provider_land_in_the_table(writer_dsn: str, query: Query) -> None:
    with logger_provider(PostgresLogRecordExporter(dsn=writer_dsn)) as provider:
        logger = provider.get_logger("audit", "3")
        logger.emit(
            LogRecord(
                timestamp=1_700_000_000_123_456_789,
                severity_number=SeverityNumber.WARN2,
                severity_text="warning",
                body={"order": 7},
                attributes={"user": "u1"},
                event_name="order.placed",
            )
        )
    assert query(
        "SELECT extract(epoch FROM time)::text, time_ns, severity_number, severity_text, body, body_json, attributes,"
        " event_name, scope_name, scope_version, service_name FROM logs"
    ) == [
        (
            "1700000000.123456",
            789,
            14,
            "warning",
            None,
            {"order": 7},
            {"user": "u1"},
            "order.placed",
            "audit",
            "3",
            "shop",
        )
    ]


@pytest.mark.filterwarnings("ignore:.*LoggingHandler.*:DeprecationWarning")
def test_lines_of_the_logging_module_land_with_the_span_they_were_written_in(writer_dsn: str, query: Query) -> None:
    logger = logging.getLogger("shop.orders")
    with (
        logger_provider(PostgresLogRecordExporter(dsn=writer_dsn)) as logs,
        tracer_provider(PostgresSpanExporter(dsn=writer_dsn)) as traces,
    ):
        handler = LoggingHandler(logger_provider=logs)
        logger.addHandler(handler)
        try:
            with traces.get_tracer("test").start_as_current_span("order"):
                logger.warning("out of %s", "stock")
        finally:
            logger.removeHandler(handler)
    assert query(
        "SELECT l.body, l.scope_name, l.flags & 1, s.name FROM logs l JOIN spans s USING (trace_id, span_id)"
    ) == [("out of stock", "shop.orders", 1, "order")]


def test_success_means_committed_and_is_said_of_an_empty_batch_too(writer_dsn: str, query: Query) -> None:
    exporter = PostgresSpanExporter(dsn=writer_dsn)
    assert exporter.export([]) is SpanExportResult.SUCCESS
    assert exporter.export(spans("a", "b")) is SpanExportResult.SUCCESS
    assert query("SELECT count(*) FROM spans") == [(2,)]
    assert (exporter.counts.received, exporter.counts.stored, exporter.counts.in_flight) == (2, 2, 0)
    assert exporter.statistics.rows == 2
    exporter.shutdown()


def test_spans_that_were_stored_before_are_a_success_that_stores_nothing(writer_dsn: str, query: Query) -> None:
    exporter = PostgresSpanExporter(dsn=writer_dsn)
    batch = spans("a")
    assert exporter.export(batch) is SpanExportResult.SUCCESS
    assert exporter.export(batch) is SpanExportResult.SUCCESS
    assert query("SELECT count(*) FROM spans") == [(1,)]
    assert exporter.counts.duplicate == 1
    exporter.shutdown()


def test_a_refused_span_is_kept_in_dead_letters_and_warned_of_once(
    writer_dsn: str, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = PostgresSpanExporter(dsn=writer_dsn)
    good, bad = spans("good", "bad")
    bad._context = SpanContext(trace_id=0, span_id=0, is_remote=False)
    with caplog.at_level(logging.WARNING, "otel_pg_exporter"):
        assert exporter.export([good, bad]) is SpanExportResult.SUCCESS
        assert exporter.export([bad]) is SpanExportResult.SUCCESS
    assert query("SELECT name FROM spans") == [("good",)]
    assert query("SELECT signal, item_index FROM dead_letters ORDER BY item_index DESC") == [
        ("traces", 1),
        ("traces", 0),
    ]
    assert exporter.counts.rejected == 2
    [warning] = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert "1 of 2 spans refused" in warning
    assert "kept in dead_letters; 1 so far" in warning
    exporter.shutdown()


class Unreadable(list[ReadableSpan]):
    """A batch that nothing can be made of."""

    def __iter__(self) -> Iterator[ReadableSpan]:
        raise ValueError("out of order")


def test_what_nobody_foresaw_is_a_failure_with_a_traceback_and_never_an_exception(
    writer_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = PostgresSpanExporter(dsn=writer_dsn)
    assert exporter.export(Unreadable(spans("a"))) is SpanExportResult.FAILURE
    assert "1 spans could not be stored" in caplog.text
    assert "out of order" in caplog.text
    exporter.shutdown()


def test_after_shutdown_an_export_fails_and_one_warning_says_why(
    writer_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = PostgresSpanExporter(dsn=writer_dsn)
    exporter.shutdown()
    exporter.shutdown()
    for _ in range(3):
        assert exporter.export(spans("late")) is SpanExportResult.FAILURE
    [message] = [record.getMessage() for record in caplog.records]
    assert "shut down" in message
    logs = PostgresLogRecordExporter(dsn=writer_dsn)
    logs.shutdown(timeout_millis=10)
    assert logs.force_flush() is True
    assert logs.export([]) is LogRecordExportResult.SUCCESS


def test_a_missing_schema_is_a_failure_that_says_what_to_run(empty_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    exporter = PostgresSpanExporter(dsn=empty_dsn, schema="elsewhere", timeout=3)
    assert exporter.export(spans("a")) is SpanExportResult.FAILURE
    assert exporter.export(spans("b")) is SpanExportResult.FAILURE
    told = [record.getMessage() for record in caplog.records if "otel-pg-exporter migrate" in record.getMessage()]
    assert len(told) <= 2  # the reason at once, the loss at the end, and neither again
    assert told
    exporter.shutdown()
