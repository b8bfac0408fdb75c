"""OTLP/JSON says the same as OTLP/protobuf, leniently; and what of it cannot be converted is refused alone."""

import base64
import json
import math
import time
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter.cli.otlp_json import otlp_json
from otel_pg_exporter.errors import TooLargeError, UndecodableError
from otel_pg_exporter.model import Anomaly, Signal, unbounded
from otel_pg_exporter.receiver.metrics import refuse_metrics
from otel_pg_exporter.transcode import transcode
from otel_pg_exporter.transcode.otlp_json import to_protobuf
from tests.e2e.full_messages import full_logs, full_traces
from tests.transcode.support import NOW, columns, plan, read

IDS = {"traceId": "0102030405060708090a0b0c0d0e0f10", "spanId": "1112131415161718"}


def spans(text: str) -> ExportTraceServiceRequest:
    """Convert a request whose one scope has these spans."""
    return ExportTraceServiceRequest.FromString(converted(around(text)))


def around(text: str) -> str:
    return f'{{"resourceSpans": [{{"scopeSpans": [{{"spans": [{text}]}}]}}]}}'


def converted(text: str | bytes, request: type[Any] = ExportTraceServiceRequest) -> bytes:
    return to_protobuf(request, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"), unbounded)


def span(**fields: object) -> str:
    return json.dumps({**IDS, "startTimeUnixNano": str(NOW), **fields})


def only(text: str) -> Span:
    (one,) = spans(text).resource_spans[0].scope_spans[0].spans
    return one


def value(tree: object) -> AnyValue:
    return only(span(attributes=[{"key": "k", "value": tree}])).attributes[0].value


def test_every_field_of_spans_and_log_records_arrives() -> None:
    for name, request in (("traces", full_traces(time.time_ns())), ("logs", full_logs(time.time_ns()))):
        text = json.dumps(otlp_json(name, request.SerializeToString()))
        assert type(request).FromString(converted(text, type(request))) == request


def test_every_field_of_metrics_arrives() -> None:
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="latency")
    metric.exponential_histogram.data_points.add(scale=-3, sum=1.5, zero_count=2).negative.bucket_counts.extend([1, 2])
    metric.exponential_histogram.data_points[0].positive.offset = 7
    text = """{"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "latency", "exponentialHistogram":
        {"dataPoints": [{"scale": -3, "sum": 1.5, "zeroCount": "2", "negative": {"bucketCounts": ["1", 2]},
         "positive": {"offset": 7}}]}}]}]}]}"""
    assert ExportMetricsServiceRequest.FromString(converted(text, ExportMetricsServiceRequest)) == request
    assert b"1 data points rejected" in refuse_metrics(converted(text, ExportMetricsServiceRequest), unbounded)


def test_spellings_that_other_senders_use_mean_the_same() -> None:
    usual = only(span(parentSpanId="abcdef0123456789", kind=2, flags=256, name="é"))
    unusual = only(
        """{"unknown": {"deep": [1, {"x": null}]}, "trace_id": "0102030405060708090A0B0C0D0E0F10", "span_id":
        "1112131415161718", "parent_span_id": "ABCDEF0123456789", "start_time_unix_nano": NOW, "kind":
        "SPAN_KIND_SERVER", "flags": "256", "name": "\\u00e9", "traceState": null, "attributes": null, "events": []}
        """.replace("NOW", str(NOW))
    )
    assert unusual == usual
    assert usual.kind == Span.SPAN_KIND_SERVER
    assert only(span(startTimeUnixNano=float(2**60))).start_time_unix_nano == 2**60


def test_values_of_all_types_arrive_in_all_their_spellings() -> None:
    assert value({"intValue": "-9223372036854775808"}).int_value == -(2**63)
    assert value({"intValue": 2**63 - 1}).int_value == 2**63 - 1
    assert value({"int_value": 7.0}).int_value == 7
    assert value({"doubleValue": 1}).double_value == 1
    assert value({"doubleValue": "-1.5e3"}).double_value == -1500
    assert math.isnan(value({"doubleValue": "NaN"}).double_value)
    assert value({"doubleValue": "-Infinity"}).double_value == -math.inf
    assert value({"boolValue": False}).WhichOneof("value") == "bool_value"
    assert value({"stringValue": ""}).WhichOneof("value") == "string_value"
    data = bytes(range(250, 256))
    assert value({"bytesValue": base64.b64encode(data).decode()}).bytes_value == data
    assert value({"bytesValue": base64.urlsafe_b64encode(data).decode().rstrip("=")}).bytes_value == data
    tree = {"arrayValue": {"values": [{"intValue": 1}, None, {"kvlistValue": {"values": [{"key": "k"}]}}]}}
    assert [each.WhichOneof("value") for each in value(tree).array_value.values] == ["int_value", None, "kvlist_value"]
    assert value({}).WhichOneof("value") is None


def test_the_same_text_gives_the_same_bytes() -> None:
    text = around(", ".join(span(name=str(number), attributes=[{"key": "k"}]) for number in range(100)))
    assert converted(text) == converted(text)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ('{"name": 7}', "name must be a string, not 7"),
        ('{"kind": "SPAN_KIND_ODD"}', "kind must be an integer, not 'SPAN_KIND_ODD'"),
        ('{"kind": true}', "kind must be an integer, not True"),
        ('{"startTimeUnixNano": "1.5"}', "startTimeUnixNano must be an integer, not '1.5'"),
        ('{"startTimeUnixNano": -1}', "startTimeUnixNano must be within 0 and 18446744073709551615, not -1"),
        ('{"flags": 1e300}', "flags must be within 0 and 4294967295"),
        ('{"droppedAttributesCount": 123456789012345678901234567890}', "must be within 0 and 4294967295"),
        ('{"droppedAttributesCount": ' + "9" * 5_000 + "}", "integer string conversion"),
        ('{"attributes": {}}', "attributes must be an array, not an object"),
        ('{"attributes": [5]}', "KeyValue must be an object, not 5"),
        ('{"attributes": [{"key": "k", "value": "v"}]}', "AnyValue must be an object, not 'v'"),
        ('{"attributes": [{"key": "k", "value": {"bytesValue": "a"}}]}', "bytesValue must be base64, not 'a'"),
        ('{"attributes": [{"key": "k", "value": {"doubleValue": "x"}}]}', "doubleValue must be a number, not 'x'"),
        ('{"attributes": [{"key": "k", "value": {"boolValue": "true"}}]}', "boolValue must be true or false"),
        ('{"name": tru}', "Expecting value"),
        ('{"name" "x"}', "Expecting ':' delimiter"),
        ("[]", "Span must be an object, not an array"),
        ("5", "Span must be an object, not 5"),
        ('{"attributes": ' + "[" * 100_000 + "]" * 100_000 + "}", "brackets nest deeper than 500 levels"),
        ('{"attributes": [{}' + ", {}" * 200_000 + "]}", "more than 524,288 values, names and commas"),
    ],
)
def test_an_item_that_cannot_be_converted_is_refused_alone_with_the_reason_and_kept(item: str, reason: str) -> None:
    body = converted(around(f"{span(name='before')}, {item}, {span(name='after')}"))
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW)
    table = columns().table(Signal.TRACES)
    assert [read(table, row)["name"] for row in batch.rows] == ["before", "after"]
    (rejection,) = batch.rejected
    assert rejection.item == 1
    assert rejection.reason.startswith("not decodable: OTLP/JSON: ")
    assert reason in rejection.reason
    assert item.encode() in batch.otlp(1)


def test_an_item_whose_text_would_take_too_much_memory_is_refused_before_it_is_parsed() -> None:
    wide = '{"x": "😀%s"}' % ("a" * 33 * 2**20)  # four bytes for each
    batch = transcode(plan(Signal.TRACES), converted(around(f"{wide}, {span()}")), now_ns=NOW)
    assert list(batch.items) == [1]
    assert "bytes; at most 134,217,728 are allowed" in batch.rejected[0].reason


def test_a_value_is_as_deep_as_protobuf_allows_and_a_deeper_one_costs_its_item_alone() -> None:
    def nested(levels: int) -> str:
        tree: dict[str, Any] = {"intValue": 7}
        for _ in range(levels):
            tree = {"kvlistValue": {"values": [{"key": "k", "value": tree}]}}
        return span(name=str(levels), attributes=[{"key": "k", "value": tree}])

    body = converted(around(", ".join(map(nested, (30, 31, 32, 33, 100)))))
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW)
    assert batch.items[0] == 0
    assert all("nest" in rejection.reason or "deep" in rejection.reason for rejection in batch.rejected)
    assert len(batch.rejected) >= 3


def test_a_resource_or_scope_that_cannot_be_converted_costs_its_own_items_alone() -> None:
    good = around(span(name="good"))[len('{"resourceSpans": [') : -2]
    bad_resource = good.replace('{"scopeSpans"', '{"resource": {"attributes": 5}, "scopeSpans"')
    bad_scope = good.replace('{"spans"', '{"schemaUrl": [], "spans"')
    body = converted(f'{{"resourceSpans": [{bad_resource}, {good}, {bad_scope}]}}')
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW)
    assert list(batch.items) == [1]
    assert [rejection.reason for rejection in batch.rejected] == [
        "its resource is not decodable: OTLP/JSON: attributes must be an array, not 5",
        "its scope is not decodable: OTLP/JSON: schemaUrl must be a string, not an array",
    ]


def test_ids_that_are_no_hex_are_invalid_and_called_that_without_being_repeated() -> None:
    wrong = [
        "0102",
        "zz",
        IDS["traceId"][:-1],
        "not sixteen chars",
        "sixteen no hex!!",
        "eight ch",
        base64.b64encode(b"x" * 16).decode(),
        "x" * 100_000,
    ]
    body = converted(around(", ".join(span(traceId=each) for each in [*wrong, IDS["traceId"]])))
    batch = transcode(plan(Signal.TRACES), body, now_ns=NOW)
    assert [rejection.item for rejection in batch.rejected] == list(range(len(wrong)))
    assert [rejection.kind for rejection in batch.rejected] == ["invalid_id"] * len(wrong)
    first, *others = (rejection.reason for rejection in batch.rejected)
    assert first == "trace_id has 2 bytes, not 16"
    assert set(others) == {"trace_id is not 32 hexadecimal digits"}
    records = ", ".join(json.dumps({"traceId": each, "body": {"stringValue": "kept"}}) for each in wrong)
    text = f'{{"resourceLogs": [{{"scopeLogs": [{{"logRecords": [{records}]}}]}}]}}'
    logs = transcode(plan(Signal.LOGS), converted(text, ExportLogsServiceRequest), now_ns=NOW)
    rows = [read(columns().table(Signal.LOGS), row) for row in logs.rows]
    assert [(row["trace_id"], row["body"]) for row in rows] == [(None, "kept")] * len(wrong)
    assert all(row["anomalies"] & Anomaly.INVALID_ID for row in rows)


def test_a_parent_s_or_a_link_s_id_that_is_no_hex_is_kept_and_marked() -> None:
    text = span(parentSpanId="eight ch", links=[{"traceId": "zz", "spanId": IDS["spanId"]}])
    row = read(
        columns().table(Signal.TRACES), transcode(plan(Signal.TRACES), converted(around(text)), now_ns=NOW).rows[0]
    )
    assert row["parent_span_id"] == b"not hexadecimal: eight ch"
    assert bytes.fromhex(row["links"][0]["trace_id"]) == b"not hexadecimal: zz"
    assert row["anomalies"] & Anomaly.INVALID_ID


@pytest.mark.parametrize("name", ["a\ud800b", b"a\xffb"])
def test_text_that_is_no_unicode_is_repaired_and_marked(name: str | bytes) -> None:
    text = span(name="?").encode()
    spelled = name if isinstance(name, bytes) else json.dumps(name).encode()[1:-1]
    batch = transcode(plan(Signal.TRACES), converted(around("%s").encode() % text.replace(b"?", spelled)), now_ns=NOW)
    row = read(columns().table(Signal.TRACES), batch.rows[0])
    assert (row["name"], row["anomalies"]) == ("a\ufffdb", Anomaly.INVALID_UTF8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        "{",
        '{"resourceSpans"',
        '{"resourceSpans": 5}',
        '{"resourceSpans": [5]}',
        '{"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]}',
        '{"resourceSpans": []} x',
        '{"resourceSpans": [],}',
        "{resourceSpans: []}",
        '{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "no end]}]}]}',
        '{"x": ' + "[" * 1_000_000,
        '{"\\x": 1}',
        "\ufeff{}",
        "\0",
    ],
    ids=range(16),
)
def test_what_has_no_frame_is_undecodable(text: str) -> None:
    with pytest.raises(UndecodableError, match=r"is not OTLP/JSON: .* is expected at byte"):
        converted(text)


def test_a_frame_may_be_empty_or_null_at_any_level_and_in_any_order() -> None:
    for text in (
        "{}",
        ' { "resourceSpans" : [ ] } ',
        '{"resourceSpans": null}',
        '{"x": "]}"}',
        '{"resourceSpans": [null]}',
    ):
        assert transcode(plan(Signal.TRACES), converted(text), now_ns=NOW).item_count == 0
    text = '{"scopeSpans": [{"spans": [%s], "scope": {"name": "s"}}], "resource": {"droppedAttributesCount": 3}}'
    request = ExportTraceServiceRequest.FromString(converted('{"resourceSpans": [%s]}' % (text % span())))
    (group,) = request.resource_spans
    assert (group.resource.dropped_attributes_count, group.scope_spans[0].scope.name) == (3, "s")


def test_another_signals_request_is_refused_rather_than_taken_for_an_empty_one() -> None:
    with pytest.raises(UndecodableError, match="the body holds resourceLogs, not resourceSpans"):
        converted('{"resourceLogs": []}')


def test_more_parts_than_a_request_may_have_are_too_many() -> None:
    with pytest.raises(TooLargeError, match="more than 6 items, scopes, resources"):
        to_protobuf(ExportTraceServiceRequest, around("{}, {}").encode(), unbounded, parts=6)
    assert to_protobuf(ExportTraceServiceRequest, around("{}").encode(), unbounded, parts=6)
