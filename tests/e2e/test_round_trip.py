"""Nothing of OTLP is lost: what was sent through the socket can be rebuilt from the tables, message for message."""

import time
from collections.abc import Iterable

import psycopg
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from psycopg.rows import dict_row

from otel_pg_exporter.model import Anomaly, Signal
from tests.e2e.full_messages import full_logs, full_traces
from tests.e2e.rebuild import SELECT, Row, log_request, sent_logs, sent_spans, span_request
from tests.e2e.support import OK, PROTOCOLS, Receiver

pytestmark = pytest.mark.parametrize("protocol", PROTOCOLS)


def stored(receiver: Receiver, table: str) -> list[Row]:
    with psycopg.connect(receiver.database.dsn, row_factory=dict_row) as connection:
        return connection.execute(SELECT.format(table=table).encode()).fetchall()


def in_order(requests: Iterable[Message]) -> list[str]:
    """Sort messages; as text, which pytest can show the differences of."""
    return sorted(map(str, requests))


def test_spans_with_every_field_set_arrive_field_by_field(receiver: Receiver) -> None:
    request = full_traces(time.time_ns())
    assert receiver.send(Signal.TRACES, request.SerializeToString()) == OK
    rows = stored(receiver, "spans")
    assert len(rows) == 8
    assert in_order(map(span_request, rows)) == in_order(sent_spans(request))
    assert {row["anomalies"] for row in rows} == {Anomaly.BYTES_VALUE}
    assert receiver.database.count("resources") == 2
    receiver.database.assert_traces_exact()


def test_log_records_with_every_field_and_every_kind_of_body_arrive_field_by_field(receiver: Receiver) -> None:
    request = full_logs(time.time_ns())
    assert receiver.send(Signal.LOGS, request.SerializeToString()) == OK
    rows = stored(receiver, "logs")
    assert len(rows) == 8 + 11
    assert in_order(map(log_request, rows)) == in_order(sent_logs(request))
    assert {row["anomalies"] for row in rows} == {Anomaly.BYTES_VALUE}
    assert receiver.database.count("resources") == 2


def test_a_span_and_a_log_record_with_next_to_no_fields_arrive_as_empty_as_they_were(receiver: Receiver) -> None:
    now = time.time_ns()
    spans, records = ExportTraceServiceRequest(), ExportLogsServiceRequest()
    group = spans.resource_spans.add()
    group.resource.SetInParent()
    group.scope_spans.add().spans.add(trace_id=b"t" * 16, span_id=b"s" * 8, start_time_unix_nano=now)
    group.scope_spans[0].scope.SetInParent()
    logs = records.resource_logs.add()
    logs.resource.SetInParent()
    logs.scope_logs.add().log_records.add(time_unix_nano=now)
    logs.scope_logs[0].scope.SetInParent()
    assert receiver.send(Signal.TRACES, spans.SerializeToString()) == OK
    assert receiver.send(Signal.LOGS, records.SerializeToString()) == OK
    assert in_order(map(span_request, stored(receiver, "spans"))) == in_order(sent_spans(spans))
    assert in_order(map(log_request, stored(receiver, "logs"))) == in_order(sent_logs(records))
    # Columns that are not OTLP's say "nothing" in SQL's way.
    assert receiver.database.rows("SELECT service_name, end_time, attributes, events FROM spans") == [(None,) * 4]


def test_spans_and_log_records_of_one_resource_share_its_row(receiver: Receiver) -> None:
    spans = full_traces(time.time_ns())
    records = ExportLogsServiceRequest()
    for group in spans.resource_spans:
        logs = records.resource_logs.add(resource=group.resource, schema_url=group.schema_url)
        logs.scope_logs.add().log_records.add()
    assert receiver.send(Signal.TRACES, spans.SerializeToString()) == OK
    assert receiver.send(Signal.LOGS, records.SerializeToString()) == OK
    assert receiver.database.count("resources") == 2
