# ruff: noqa: ANN401 - telemetry's values have any type
"""Promoted columns: the first source with a fitting value wins."""

import math
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue

from otel_pg_exporter import mapping
from otel_pg_exporter.model import ColumnType, Signal, Window
from otel_pg_exporter.transcode import compile_plan, transcode
from tests.transcode.support import NOW, read, span, span_row, trace_request

OWN = """
table = "spans"
column = [
    { name = "b", type = "bool", from = 'span.attributes["k"]' },
    { name = "i", type = "int8", from = 'span.attributes["k"]' },
    { name = "f", type = "float8", from = 'span.attributes["k"]' },
    { name = "t", type = "text", from = 'span.attributes["k"]' },
    { name = "j", type = "jsonb", from = 'span.attributes["k"]' },
    { name = "host", type = "text", from = [
        'span.attributes["host"]', 'scope.attributes["host"]', 'resource.attributes["host"]', "scope.name"] },
    { name = "region", type = "text", from = ['scope.attributes["region"]', 'resource.attributes["region"]'] },
    { name = "again", type = "text", from = "span.name" },
    { name = "state", type = "text", from = ["span.trace_state", 'span.attributes["state"]'] },
    { name = "duration", type = "int8", from = "span.duration_ns", sum_in_traces = true },
    { name = "quoted", type = "int8", from = 'span.attributes["a \\"b\\" \\u00fc"]' },
]
"""


@pytest.fixture
def own(tmp_path: Path) -> mapping.Mapping:
    file = tmp_path / "own.toml"
    file.write_text(OWN, encoding="utf-8")
    return mapping.load([file])


def rows(own: mapping.Mapping, request: Any) -> list[dict[str, Any]]:
    batch = transcode(compile_plan(own, Signal.TRACES, Window()), request.SerializeToString(), now_ns=NOW)
    assert not batch.rejected
    return [read(own.spans, data) for data in batch.rows]


def string(key: str, value: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=value))


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (AnyValue(bool_value=True), {"b": True, "j": True}),
        (AnyValue(int_value=-(2**63)), {"i": -(2**63), "f": -(2.0**63), "j": -(2**63)}),
        (AnyValue(double_value=0.5), {"f": 0.5, "j": 0.5}),
        (AnyValue(double_value=math.inf), {"f": math.inf, "j": "Infinity"}),
        (AnyValue(string_value="a\0"), {"t": "a\ufffd", "j": "a\ufffd"}),
        (AnyValue(bytes_value=b"x"), {"j": "eA=="}),
        (AnyValue(array_value=ArrayValue()), {"j": []}),
        (AnyValue(), {}),
    ],
)
def test_a_value_fills_the_columns_whose_type_it_fits(
    own: mapping.Mapping, value: AnyValue, fits: dict[str, Any]
) -> None:
    (row,) = rows(own, trace_request(span(attributes=[KeyValue(key="k", value=value)])))

    assert {name: row[name] for name in "biftj" if row[name] is not None} == fits
    assert list(row["attributes"]) == ["k"]


def test_nan_fits_float8(own: mapping.Mapping) -> None:
    (row,) = rows(own, trace_request(span(attributes=[KeyValue(key="k", value=AnyValue(double_value=math.nan))])))

    assert math.isnan(row["f"])


def test_sources_are_tried_in_order_over_all_messages(own: mapping.Mapping) -> None:
    request = trace_request(span(attributes=[string("host", "span")]), span())
    scope = request.resource_spans[0].scope_spans[0].scope
    scope.name = "lib"
    assert [row["host"] for row in rows(own, request)] == ["span", "lib"]

    request.resource_spans[0].resource.attributes.append(string("host", "resource"))
    assert [row["host"] for row in rows(own, request)] == ["span", "resource"]

    scope.attributes.append(string("host", "scope"))
    assert [row["host"] for row in rows(own, request)] == ["span", "scope"]


def test_a_column_may_come_from_scope_and_resource_alone(own: mapping.Mapping) -> None:
    request = trace_request(span())
    assert rows(own, request)[0]["region"] is None

    request.resource_spans[0].resource.attributes.append(string("region", "eu"))
    assert rows(own, request)[0]["region"] == "eu"


def test_a_field_may_be_promoted_and_summed(own: mapping.Mapping) -> None:
    request = trace_request(span(end_time_unix_nano=NOW))
    batch = transcode(compile_plan(own, Signal.TRACES, Window()), request.SerializeToString(), now_ns=NOW)

    (row,) = rows(own, request)
    assert row["again"] == "work"
    assert row["duration"] == 1_000_000
    assert batch.facts[0].sums[-1] == 1_000_000


def test_an_empty_field_wins_over_what_follows_since_it_is_not_null(own: mapping.Mapping) -> None:
    (row,) = rows(own, trace_request(span(attributes=[string("state", "x")])))

    assert row["state"] == ""


def test_an_attribute_key_may_hold_any_character(own: mapping.Mapping) -> None:
    (row,) = rows(own, trace_request(span(attributes=[KeyValue(key='a "b" ü', value=AnyValue(int_value=1))])))

    assert row["quoted"] == 1


@pytest.mark.parametrize(
    ("attributes", "column", "arrives"),
    [
        ({"gen_ai.usage.input_tokens": 5, "llm.token_count.prompt": 6}, "gen_ai_input_tokens", 5),
        ({"llm.token_count.prompt": 6}, "gen_ai_input_tokens", 6),
        ({"gen_ai.usage.input_tokens": "5", "llm.token_count.prompt": 6}, "gen_ai_input_tokens", 6),
        ({"gen_ai.usage.input_tokens": "5"}, "gen_ai_input_tokens", None),
        ({"gen_ai.system": "openai"}, "gen_ai_provider_name", "openai"),
        ({"openinference.span.kind": "LLM"}, "gen_ai_span_kind", "LLM"),
        ({"gen_ai.request.temperature": 1}, "gen_ai_request_temperature", 1.0),
    ],
)
def test_genai_attributes_have_columns_in_order_of_preference(
    attributes: dict[str, Any], column: str, arrives: Any
) -> None:
    pairs = [
        string(key, value) if isinstance(value, str) else KeyValue(key=key, value=AnyValue(int_value=value))
        for key, value in attributes.items()
    ]
    stored = span_row(attributes=pairs)

    assert stored[column] == arrives
    assert stored["attributes"] == attributes


def test_every_bundled_genai_source_reaches_its_column() -> None:
    values = {
        ColumnType.TEXT: AnyValue(string_value="x"),
        ColumnType.INT8: AnyValue(int_value=1),
        ColumnType.FLOAT8: AnyValue(double_value=0.5),
        ColumnType.JSONB: AnyValue(string_value="x"),
    }
    promoted = [column for column in mapping.load().spans.columns if column.promoted]

    assert promoted
    for column in promoted:
        for source in column.sources:
            assert source.key is not None
            stored = span_row(attributes=[KeyValue(key=source.key, value=values[column.type])])
            assert stored[column.name] is not None, source
