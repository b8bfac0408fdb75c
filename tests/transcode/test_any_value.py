# ruff: noqa: ANN401 - telemetry's values have any type
"""Any AnyValue tree becomes JSON that equals it after the listed normalisations."""

import base64
import math
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from tests.transcode.support import log_request, logs, row, span_row


@dataclass(frozen=True)
class Pairs:
    """A kvlist as OTLP has it: keys may repeat."""

    pairs: list[tuple[str, Any]]


text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\ufffd\\u"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | text
    | st.binary()
    | st.sampled_from(["\\u0000", "NaN", 2**53 + 1, -0.0])
)
keys = text | st.sampled_from(["k", "k\0"])


def kvlists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Pairs]:
    return st.lists(st.tuples(keys, values), max_size=5).map(Pairs)


trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5) | kvlists(inner), max_leaves=20)


def encode(value: Any, into: AnyValue) -> AnyValue:
    match value:
        case bool():
            into.bool_value = value
        case int():
            into.int_value = value
        case float():
            into.double_value = value
        case str():
            into.string_value = value
        case bytes():
            into.bytes_value = value
        case list():
            into.array_value.SetInParent()
            for element in value:
                encode(element, into.array_value.values.add())
        case Pairs():
            into.kvlist_value.SetInParent()
            for key, inner in value.pairs:
                encode(inner, into.kvlist_value.values.add(key=key).value)
    return into


def normalised(value: Any) -> Any:  # noqa: PLR0911 - one line a type
    match value:
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case str():
            return value.replace("\0", "\ufffd")
        case bytes():
            return base64.b64encode(value).decode()
        case list():
            return [normalised(element) for element in value]
        case Pairs():
            return last_wins(value.pairs)
        case _:
            return value


def last_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Equal keys meet before any repair; keys that become equal by it meet in the order of their first sight.
    exact = dict(pairs)
    return {normalised(key): normalised(value) for key, value in exact.items()}


@given(trees)
def test_a_body_equals_its_tree(tree: Any) -> None:
    record = LogRecord(time_unix_nano=1, body=encode(tree, AnyValue()))
    stored = row(logs(log_request(record).SerializeToString()))

    column, other = ("body", "body_json") if isinstance(tree, str) else ("body_json", "body")
    assert repr(stored[column]) == repr(normalised(tree))
    assert stored[other] is None


@given(kvlists(trees))
def test_attributes_equal_their_trees(tree: Pairs) -> None:
    attributes = [KeyValue(key=key, value=encode(value, AnyValue())) for key, value in tree.pairs]

    assert repr(span_row(attributes=attributes)["attributes"]) == repr(last_wins(tree.pairs) or None)
