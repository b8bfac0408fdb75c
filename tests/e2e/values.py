# ruff: noqa: ANN401 - telemetry's values have any type
"""Any AnyValue that can travel, and what the listed normalisations make of it in jsonb."""

import base64
import math
from typing import Any

from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList

_DOUBLES = [math.nan, math.inf, -math.inf, -0.0, 5e-324, -2.2e-308, 1.7976931348623157e308, 1e16, 1e23, 3.0, 0.1]
_INTEGERS = [-(2**63), 2**63 - 1, 2**53 + 1, 0]
_TEXTS = ["\0", "a\0b", "\ufffd", "\\u0000", '"', "\\", "\ud7ff\uffff", "\U0001f600", "\x01\x7f", "NaN", "{}", "/wA="]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(_TEXTS)
keys = texts | st.sampled_from(["", "k", "k\0", "k\ufffd"])
scalars: st.SearchStrategy[AnyValue] = st.one_of(
    st.builds(AnyValue),
    st.builds(AnyValue, string_value=texts),
    st.builds(AnyValue, bool_value=st.booleans()),
    st.builds(AnyValue, int_value=st.integers(-(2**63), 2**63 - 1) | st.sampled_from(_INTEGERS)),
    st.builds(AnyValue, double_value=st.floats() | st.sampled_from(_DOUBLES)),
    st.builds(AnyValue, bytes_value=st.binary(max_size=20)),
)


def pairs(values: st.SearchStrategy[AnyValue]) -> st.SearchStrategy[list[KeyValue]]:
    return st.lists(st.builds(KeyValue, key=keys, value=values), max_size=4)


def _nested(values: st.SearchStrategy[AnyValue]) -> st.SearchStrategy[AnyValue]:
    arrays = st.builds(ArrayValue, values=st.lists(values, max_size=4))
    kvlists = st.builds(KeyValueList, values=pairs(values))
    return st.builds(AnyValue, array_value=arrays) | st.builds(AnyValue, kvlist_value=kvlists)


trees = st.recursive(scalars, _nested, max_leaves=10)


def normalised(value: AnyValue) -> Any:  # noqa: PLR0911 - one line a kind
    """Return what the row holds."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value.replace("\0", "\ufffd")
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case "double_value":
            return _double(value.double_value)
        case "array_value":
            return [normalised(element) for element in value.array_value.values]
        case "kvlist_value":
            return normalised_pairs(value.kvlist_value.values)
        case None:
            return None
        case kind:
            return getattr(value, kind)


def normalised_pairs(pairs: Any) -> dict[str, Any]:
    # Equal keys meet first; keys that become equal by the repair of a NUL meet afterwards.
    exact = {pair.key: pair.value for pair in pairs}
    return {key.replace("\0", "\ufffd"): normalised(value) for key, value in exact.items()}


def _double(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def same(stored: Any, expected: Any) -> bool:
    """Compare what jsonb gave back: types count, but jsonb spells a large double without point or exponent."""
    match expected:
        case bool() | int() | str() | None:
            return type(stored) is type(expected) and bool(stored == expected)
        case float():
            return type(stored) in {float, int} and float(stored) == expected
        case list():
            return isinstance(stored, list) and len(stored) == len(expected) and all(map(same, stored, expected))
        case dict():
            return (
                isinstance(stored, dict)
                and stored.keys() == expected.keys()
                and all(same(stored[key], each) for key, each in expected.items())
            )
        case _:
            raise AssertionError(f"nothing that a row can hold: {expected!r}")
