# ruff: noqa: ANN401 - telemetry's values have any type
"""Both cores make the same of everything: the native one is held to the reference, byte for byte."""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import OverloadedError
from otel_pg_exporter.model import Signal, Window, unbounded
from otel_pg_exporter.transcode import extension, rows, wire
from otel_pg_exporter.transcode.limits import Limits
from tests.fuzz.make_corpus import CORPUS
from tests.fuzz.strategies import bodies, requests
from tests.transcode.cores import assert_equal
from tests.transcode.support import NOW, span, trace_request
from tests.transcode.test_every_field import full
from tests.transcode.test_hostile_values import hostile_spans

if extension is None:
    pytest.skip("there is no native core", allow_module_level=True)
from otel_pg_exporter.transcode import native

SIGNALS = list(Signal)
# Every kind of source and type that a mapping may name; the package's own columns are there, too.
OWN_COLUMNS = """
table = "spans"
column = [
    {name = "a_text", type = "text", from = ['span.attributes["k"]', 'span.name']},
    {name = "b_text", type = "text", from = ['scope.attributes["k"]', 'span.attributes["k"]']},
    {name = "c_text", type = "text", from = ['resource.schema_url', 'scope.name']},
    {name = "a_bool", type = "bool", from = 'span.attributes["k"]'},
    {name = "a_int", type = "int8", from = ['span.attributes["k"]', 'resource.attributes["k"]'], sum_in_traces = true},
    {name = "b_int", type = "int8", from = ['span.attributes["gen_ai.usage.input_tokens"]', 'span.flags']},
    {name = "a_float", type = "float8", from = 'span.attributes["k"]'},
    {name = "a_json", type = "jsonb", from = ['span.attributes["k"]', 'span.links', 'scope.attributes']},
    {name = "b_json", type = "jsonb", from = ['scope.attributes["k"]', 'resource.entity_refs']},
    {name = "a_count", type = "int4", from = ['span.anomalies', 'span.start_minute']},
    {name = "a_request", type = "uuid", from = ['request.id', 'span.trace_id']},
]
"""


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> mapping.Mapping:
    files = []
    for table, text in (("spans", OWN_COLUMNS), ("logs", _of_logs(OWN_COLUMNS))):
        file = tmp_path_factory.mktemp("mapping") / f"{table}.toml"
        file.write_text(text)
        files.append(file)
    return mapping.load(files)


def _of_logs(text: str) -> str:
    for span_word, log_word in (
        ('"spans"', '"logs"'),
        (", sum_in_traces = true", ""),
        ("span.name", "log.severity_text"),
        ("span.links", "log.body_json"),
        ("span.start_minute", "log.time_minute"),
        ("span.", "log."),
    ):
        text = text.replace(span_word, log_word)
    return text


def is_native(plan: Any, body: bytes) -> bool:
    """Say whether the native core itself makes the rows, instead of leaving it to the reference."""
    return native.attempt(plan, body, bytes(16), now_ns=NOW, hold=unbounded, limits=Limits()) is not None


@pytest.fixture(scope="module", params=SIGNALS)
def plan(request: pytest.FixtureRequest, columns: mapping.Mapping) -> Any:
    return native.compile_plan(columns, request.param, Window())


@given(data=st.data())
def test_any_request_makes_the_same_rows(plan: Any, data: st.DataObject) -> None:
    assert_equal(plan, data.draw(requests(plan.signal)))


@given(data=st.data())
def test_any_bytes_make_the_same_rows_or_the_same_refusal(plan: Any, data: st.DataObject) -> None:
    assert_equal(plan, data.draw(bodies(plan.signal)))


@given(data=st.data())
def test_any_limits_refuse_the_same(plan: Any, data: st.DataObject) -> None:
    small = st.integers(0, 200)
    limits = data.draw(
        st.builds(Limits, piece_bytes=small, parts=small, fields=small, text_bytes=small, repair_bytes=small)
    )
    assert_equal(plan, data.draw(bodies(plan.signal)), limits=limits)


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_the_corpus_makes_the_same_rows(plan: Any, file: Path) -> None:
    assert_equal(plan, file.read_bytes())


def test_what_no_sender_gets_wrong_is_the_native_cores_own(plan: Any) -> None:
    body = full(plan.signal).SerializeToString()

    assert is_native(plan, body)
    assert is_native(plan, body * 1000)
    assert_equal(plan, body * 50)


@given(data=st.data())
def test_valid_requests_are_the_native_cores_own(plan: Any, data: st.DataObject) -> None:
    """But for one whose first item is no evident span or log record: see `framing.check_signal`."""
    first = full(plan.signal).SerializeToString()

    assert is_native(plan, first + data.draw(requests(plan.signal)))


def test_odd_values_make_the_same_rows(columns: mapping.Mapping) -> None:
    plan = native.compile_plan(columns, Signal.TRACES, Window())
    body = trace_request(*hostile_spans()).SerializeToString()

    assert is_native(plan, body)
    assert_equal(plan, body)


def _doubles() -> list[float]:
    chance = random.Random(1)
    powers = [sign * 10.0**power for power in range(-330, 309) for sign in (1, -1)]
    halves = [2.0**power for power in range(-1074, 1024)]
    decimals = [round(chance.random() * 10**place, digits) for place in range(18) for digits in range(17)]
    bits = [struct.unpack("<d", chance.randbytes(8))[0] for _ in range(50_000)]
    near = [
        struct.unpack("<d", struct.pack("<q", struct.unpack("<q", struct.pack("<d", value))[0] + step))[0]
        for value in halves[1:-1]
        for step in (-1, 1)
    ]
    return [*powers, *halves, *decimals, *bits, *near]


def test_doubles_are_spelled_alike() -> None:
    plan = native.compile_plan(mapping.load(), Signal.TRACES, Window())
    values = [AnyValue(double_value=value) for value in _doubles()]
    spans = []
    for start in range(0, len(values), 2500):
        made = span()
        made.attributes.add(key="doubles").value.array_value.CopyFrom(ArrayValue(values=values[start : start + 2500]))
        spans.append(made)
    body = trace_request(*spans).SerializeToString()

    assert is_native(plan, body)
    assert_equal(plan, body)


@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("ab\0\ufffd"), max_size=3), st.floats() | st.integers(-3, 3) | st.just("")),
        max_size=40,
    )
)
def test_keys_that_meet_make_the_same_objects(pairs: list[tuple[str, Any]]) -> None:
    plan = native.compile_plan(mapping.load(), Signal.TRACES, Window())
    kinds = {float: "double_value", int: "int_value", str: "string_value"}
    attributes: Any = [{"key": key, "value": {kinds[type(value)]: value}} for key, value in pairs]
    request = trace_request(span(attributes=attributes, events=[Span.Event(attributes=attributes)]))
    request.resource_spans[0].resource.attributes.extend(request.resource_spans[0].scope_spans[0].spans[0].attributes)

    assert_equal(plan, request.SerializeToString())


@pytest.mark.parametrize("size", [400_000, 7_000_000])
def test_large_items_are_weighed_alike(plan: Any, size: int) -> None:
    request: Any = full(plan.signal)
    groups = request.resource_spans if plan.signal is Signal.TRACES else request.resource_logs
    scope = groups[0].scope_spans[0] if plan.signal is Signal.TRACES else groups[0].scope_logs[0]
    item = scope.spans[0] if plan.signal is Signal.TRACES else scope.log_records[0]
    item.attributes.add(key="large").value.string_value = "x" * size

    assert_equal(plan, request.SerializeToString())
    assert_equal(plan, request.SerializeToString(), limits=Limits(fields=10))
    assert_equal(plan, request.SerializeToString(), limits=Limits(text_bytes=size))


def test_memory_is_told_alike_and_its_lack_ends_both(plan: Any) -> None:
    body = full(plan.signal).SerializeToString() * 3000
    told: dict[str, list[int]] = {"native": [], "reference": []}
    native.transcode(plan, body, now_ns=NOW, hold=told["native"].append)
    wire.transcode(plan, body, now_ns=NOW, hold=told["reference"].append)

    # The reference tells between its pieces, the native core between items.
    assert told["native"][-1] == told["reference"][-1]
    assert told["native"] == sorted(told["native"])
    assert len(told["native"]) > 1

    def refuse(_size: int) -> None:
        raise OverloadedError("no room")

    assert_equal(plan, body, hold=refuse)


@pytest.mark.parametrize(("wanted", "shown"), [("native", "native"), ("python", "Python reference"), ("", "native")])
def test_a_variable_chooses_the_core(wanted: str, shown: str) -> None:
    command = [sys.executable, "-m", "otel_pg_exporter", "--version"]
    said = subprocess.check_output(command, env={**os.environ, "OTEL_PG_EXPORTER_CORE": wanted}, text=True)

    assert said.strip().endswith(f"(transcoder: {shown})")


def test_rows_that_find_no_room_are_refused_alike(monkeypatch: pytest.MonkeyPatch, plan: Any) -> None:
    body = full(plan.signal).SerializeToString() * 100
    for name, most in (("MAX_BATCH_BYTES", 50_000), ("MAX_SHARED_BYTES", 100)):
        with monkeypatch.context() as patched:
            patched.setattr(rows, name, most)
            assert not is_native(plan, body)
            assert_equal(plan, body)
