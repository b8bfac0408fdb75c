# ruff: noqa: ANN401 - telemetry's values have any type
"""The SDK's objects make the same rows as their OTLP encoding."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from otel_pg_exporter.model import Anomaly, RowBatch, Signal
from otel_pg_exporter.transcode import readable
from tests.transcode.support import NOW, SPAN_ID, TRACE_ID, columns, logs, plan, read, row, traces

REQUEST_ID = b"r" * 16

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | text | st.binary(max_size=20)
values = st.recursive(
    scalars | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text.filter(bool), inner, max_size=3) | st.lists(inner).map(tuple)
    ),
    max_leaves=8,
)
keys = text.filter(bool) | st.sampled_from(["gen_ai.usage.input_tokens", "session.id", "llm.system"])
attributes = st.dictionaries(keys, values, max_size=5)
# BoundedAttributes cleans values; the encoder sees what it makes of them.
bounded = st.builds(BoundedAttributes, st.integers(0, 6) | st.none(), attributes) | attributes | st.none()
times = st.sampled_from([0, 1, NOW, 2**64 - 1]) | st.integers(0, 2**64 - 1)
trace_states = st.lists(
    st.tuples(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True)),
    max_size=2,
    unique_by=lambda entry: entry[0],
).map(TraceState)
contexts = st.builds(
    SpanContext,
    trace_id=st.integers(0, 2**128 - 1),
    span_id=st.integers(0, 2**64 - 1),
    is_remote=st.booleans(),
    trace_flags=st.integers(0, 255).map(TraceFlags),
    trace_state=trace_states,
)
resources = st.builds(Resource, attributes, st.none() | text)
scopes = st.builds(InstrumentationScope, text, st.none() | text, st.none() | text, attributes)
spans = st.builds(
    ReadableSpan,
    name=text,
    context=contexts,
    parent=st.none() | contexts,
    resource=resources,
    attributes=bounded,
    events=st.lists(st.builds(Event, text, bounded, times), max_size=2),
    links=st.lists(st.builds(Link, contexts, bounded), max_size=2),
    kind=st.sampled_from(list(SpanKind)),
    status=st.builds(Status, st.just(StatusCode.ERROR), st.none() | text) | st.builds(Status),
    start_time=st.none() | times,
    end_time=st.none() | times,
    instrumentation_scope=st.none() | scopes,
)


def log_record(context: SpanContext, **fields: Any) -> LogRecord:
    return LogRecord(context=set_span_in_context(NonRecordingSpan(context), Context()), **fields)


log_records = st.builds(
    ReadableLogRecord,
    st.builds(
        log_record,
        contexts,
        timestamp=st.none() | times,
        observed_timestamp=times,
        severity_text=st.none() | text,
        severity_number=st.none() | st.sampled_from(list(SeverityNumber)),
        body=values,
        attributes=bounded,
        event_name=st.none() | text,
    ),
    resources,
    st.none() | scopes,
)


def transcode(signal: Signal, items: Sequence[Any], request_id: bytes = REQUEST_ID) -> RowBatch:
    return readable.transcode(plan(signal), items, request_id=request_id, now_ns=NOW)


def restored(items: Sequence[ReadableSpan]) -> bytes:
    """Encode spans as the SDK does, one by one, and put back what its encoder leaves out."""
    merged = trace_pb2.TracesData()
    for item in items:
        request = encode_spans([item])
        span = request.resource_spans[0].scope_spans[0].spans[0]
        context = item.get_span_context()
        assert context is not None
        span.flags |= context.trace_flags
        for link, encoded in zip(item.links, span.links, strict=True):
            encoded.flags |= link.context.trace_flags
            encoded.trace_state = link.context.trace_state.to_header()
        merged.resource_spans.extend(request.resource_spans)
    return merged.SerializeToString()


def content(batch: RowBatch) -> Any:
    return (
        batch.rows,
        batch.keys,
        batch.facts,
        list(batch.items),
        list(batch.resource_ids),
        batch.resources,
        batch.days,
        batch.rejected,
        batch.repairs,
    )


@given(st.lists(spans, max_size=3))
def test_spans_make_the_rows_of_their_encoding(items: list[ReadableSpan]) -> None:
    assert content(transcode(Signal.TRACES, items)) == content(traces(restored(items)))


@given(log_records)
def test_log_records_make_the_rows_of_their_encoding(item: ReadableLogRecord) -> None:
    wire = logs(encode_logs([item]).SerializeToString())

    assert content(transcode(Signal.LOGS, [item], wire.request_id)) == content(wire)


@given(spans | log_records)
def test_a_one_item_request_makes_the_same_row(item: ReadableSpan | ReadableLogRecord) -> None:
    signal = Signal.TRACES if isinstance(item, ReadableSpan) else Signal.LOGS
    body = transcode(signal, [item]).otlp(0)
    wire = traces(body) if signal is Signal.TRACES else logs(body)

    assert content(transcode(signal, [item], wire.request_id)) == content(wire)


def span(**fields: Any) -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    return ReadableSpan(**{"name": "work", "context": context, "start_time": NOW, "resource": Resource({}), **fields})


def record(**fields: Any) -> ReadableLogRecord:
    return ReadableLogRecord(
        log_record(SpanContext(0, 0, is_remote=False), timestamp=NOW, **fields), Resource({"service.name": "shop"})
    )


def span_row(**fields: Any) -> dict[str, Any]:
    return row(transcode(Signal.TRACES, [span(**fields)]))


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (SpanKind.INTERNAL, trace_pb2.Span.SPAN_KIND_INTERNAL),
        (SpanKind.SERVER, trace_pb2.Span.SPAN_KIND_SERVER),
        (SpanKind.CLIENT, trace_pb2.Span.SPAN_KIND_CLIENT),
        (SpanKind.PRODUCER, trace_pb2.Span.SPAN_KIND_PRODUCER),
        (SpanKind.CONSUMER, trace_pb2.Span.SPAN_KIND_CONSUMER),
    ],
)
def test_kinds_have_the_numbers_of_otlp(kind: SpanKind, number: int) -> None:
    assert span_row(kind=kind)["kind"] == number


def test_the_sampled_flag_is_kept_beside_the_remote_bits() -> None:
    assert span_row()["flags"] == 0x101
    assert span_row(parent=SpanContext(1, 3, is_remote=True))["flags"] == 0x301
    assert span_row(parent=SpanContext(1, 3, is_remote=False))["flags"] == 0x101


def test_lone_surrogates_are_repaired_and_flagged() -> None:
    stored = span_row(name="a\ud800", attributes={"k\udfff": "\udc00b"})

    assert stored["name"] == "a\ufffd"
    assert stored["attributes"] == {"k\ufffd": "\ufffdb"}
    assert stored["anomalies"] == Anomaly.TEXT_REPAIRED


def test_integers_beyond_int64_stay_exact() -> None:
    attributes = {"n": 2**80, "gen_ai.usage.input_tokens": 2**63}
    stored = span_row(attributes=attributes)

    assert stored["attributes"] == attributes
    assert stored["gen_ai_input_tokens"] is None


def test_an_integer_too_long_for_decimal_becomes_a_string() -> None:
    assert span_row(attributes={"n": 10**5000})["attributes"] == {"n": hex(10**5000)}


def test_a_body_of_a_foreign_type_becomes_its_string() -> None:
    stored = row(transcode(Signal.LOGS, [record(body={"path": SpanKind.SERVER})]))

    assert stored["body_json"] == {"path": "SpanKind.SERVER"}


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_an_object_that_cannot_be_read_is_refused_alone() -> None:
    batch = transcode(Signal.LOGS, [record(body="a"), record(body=Unprintable()), record(body="c")])

    assert batch.items == [0, 2]
    assert [rejection.reason for rejection in batch.rejected] == ["not readable: RuntimeError: no"]
    assert row(logs(batch.otlp(1)))["body"] == "not readable: RuntimeError: no"


def test_a_span_without_a_context_is_refused() -> None:
    batch = transcode(Signal.TRACES, [span(context=None)])

    assert [rejection.reason for rejection in batch.rejected] == ["trace_id is empty; span_id is empty"]
    assert traces(batch.otlp(0)).rejected == batch.rejected


def deep(levels: int) -> Any:
    value: Any = 7
    for _ in range(levels):
        value = {"k": value}
    return value


def circle() -> Any:
    value: list[Any] = []
    value += [value, value]
    return value


def test_thirty_nested_kvlists_arrive_exactly_and_deeper_ones_are_refused_alone() -> None:
    batch = transcode(Signal.LOGS, [record(body=deep(30)), record(body=deep(10_000))])

    assert row(batch)["body_json"] == deep(30)
    assert [rejection.reason for rejection in batch.rejected] == ["messages nest deeper than 100 levels in 'body'"]
    assert row(logs(batch.otlp(1)))["body"] == "(nested deeper than OTLP allows)"


def doubled(times: int) -> Any:
    value: list[Any] = []
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize("body", [circle(), doubled(40)], ids=["circle", "doubled"])
def test_a_value_that_holds_another_too_often_is_refused_at_once(body: Any) -> None:
    batch = transcode(Signal.LOGS, [record(body=body), record(body="short")])

    assert batch.items == [1]
    [rejection] = batch.rejected
    assert rejection.reason.startswith("it has more than 131,072 fields")


def test_many_events_without_a_name_or_attributes_weigh_something() -> None:
    batch = transcode(Signal.TRACES, [span(events=[Event("", {}, NOW)] * 140_000), span()])

    assert [rejection.item for rejection in batch.rejected] == [0]


PLACES = ["attributes", "events", "links", "resource", "scope"]


def sdk_span_with(place: str, attributes: dict[str, Any]) -> ReadableSpan:
    fields: dict[str, dict[str, Any]] = {
        "attributes": {"attributes": attributes},
        "events": {"events": [Event("e", attributes, NOW)]},
        "links": {"links": [Link(SpanContext(1, 2, is_remote=False), attributes)]},
        "resource": {"resource": Resource(attributes)},
        "scope": {"instrumentation_scope": InstrumentationScope("lib", attributes=attributes)},
    }
    return span(**fields[place])


def otlp_span_with(place: str, levels: int) -> bytes:
    """Encode by hand: the SDK's encoder drops or raises where it could not parse its own parts."""
    request = trace_pb2.TracesData()
    group = request.resource_spans.add()
    scope = group.scope_spans.add()
    encoded = scope.spans.add(trace_id=TRACE_ID, span_id=SPAN_ID)
    pairs = {
        "attributes": lambda: encoded.attributes,
        "events": lambda: encoded.events.add().attributes,
        "links": lambda: encoded.links.add().attributes,
        "resource": lambda: group.resource.attributes,
        "scope": lambda: scope.scope.attributes,
    }
    value = pairs[place]().add(key="k").value
    for _ in range(levels):
        value = value.kvlist_value.values.add(key="k").value
    value.int_value = 7
    return request.SerializeToString()


@pytest.mark.parametrize("levels", range(28, 35))
@pytest.mark.parametrize("place", PLACES)
def test_nesting_is_refused_from_the_same_depth_as_in_otlp(place: str, levels: int) -> None:
    ours = transcode(Signal.TRACES, [sdk_span_with(place, {"k": deep(levels)})])
    theirs = traces(otlp_span_with(place, levels))

    assert len(ours.rejected) == len(theirs.rejected)
    assert len(traces(ours.otlp(0)).rows) == 1


def test_resources_shared_by_spans_are_stored_once() -> None:
    shared = Resource({"service.name": "shop"}, "https://schema")
    batch = transcode(Signal.TRACES, [span(resource=shared), span(resource=shared), span()])

    assert len(batch.resources) == 2
    assert read(columns().resources, batch.resources[batch.resource_ids[0]])["schema_url"] == "https://schema"


def test_importing_the_readers_pulls_in_no_grpc() -> None:
    script = "import sys, otel_pg_exporter.transcode.readable; sys.exit('grpc' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
