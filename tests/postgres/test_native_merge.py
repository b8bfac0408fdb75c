"""Rows that stay in the native core are ordered, gathered and summed up as lists of Python's own are."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.model import SpanFacts
from otel_pg_exporter.postgres.merge import in_key_order
from otel_pg_exporter.postgres.statements import copy_data
from otel_pg_exporter.postgres.traces import MAX_SERVICE_NAMES, summarise
from otel_pg_exporter.transcode import extension

if extension is None:
    pytest.skip("there is no native core", allow_module_level=True)

SUMS = 2

keys = st.text(st.sampled_from("ab\0"), max_size=3).map(str.encode) | st.binary(max_size=40)
int8 = st.integers(-(2**63), 2**63 - 1)
names = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\,{}'), max_size=5)
facts = st.builds(
    SpanFacts,
    trace_id=st.sampled_from([bytes([number]) * 16 for number in range(1, 6)]),
    span_id=st.sampled_from([bytes([number]) * 8 for number in range(1, 9)]),
    start=int8,
    end=int8,
    error=st.booleans(),
    root=st.booleans(),
    name=names,
    service_name=names | st.none(),
    sums=st.tuples(*[int8 | st.none()] * SUMS),
)


def split(whole: Sequence[Any], places: list[int]) -> list[Sequence[Any]]:
    """Cut a list at some places, as if each part came from a request of its own."""
    ends = sorted(min(place, len(whole)) for place in places)
    return [whole[start:end] for start, end in zip([0, *ends], [*ends, len(whole)], strict=True)]


places = st.lists(st.integers(0, 30), max_size=3)


@given(st.lists(keys, max_size=30), places)
def test_keys_have_one_order(whole: list[bytes], cuts: list[int]) -> None:
    assert in_key_order(extension.Rows.join(split(whole, cuts))) == in_key_order(whole)


@given(st.lists(st.binary(max_size=20), max_size=30), places, st.data())
def test_rows_are_one_sequence_and_one_copy(whole: list[bytes], cuts: list[int], data: st.DataObject) -> None:
    rows: Any = extension.Rows.join(split(whole, cuts))
    chosen = data.draw(st.permutations(range(len(whole))))[: data.draw(st.integers(0, 30))]

    assert (len(rows), list(rows), rows == whole, whole == rows) == (len(whole), whole, True, True)
    assert b"".join(copy_data(rows, chosen)) == b"".join(copy_data(whole, chosen))
    assert rows[::-2] == whole[::-2]
    assert rows[1:3] == whole[1:3]
    assert [rows[index] for index in range(-len(whole), 0)] == whole


def test_an_index_beyond_the_end_is_an_error() -> None:
    rows: Any = extension.Rows.join([[b"a"], [b"b"]])
    for index in (2, -3):
        with pytest.raises(IndexError):
            rows[index]
    assert rows != [b"a"]
    assert rows != [b"a", b"c"]
    assert rows != 5


def test_a_large_copy_comes_in_pieces() -> None:
    whole = [b"x" * 50_000] * 5 + [b"x" * 300_000, b"x"]

    for rows in (whole, extension.Rows.join([whole])):
        pieces = [len(piece) for piece in copy_data(rows, range(7))]
        assert pieces == [19, 100_000, 100_000, 50_000, 300_000, 1, 2]


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=30, unique=True), st.integers(-3, 3).filter(bool))
def test_the_rows_of_a_copy_may_be_named_in_any_way(whole: list[bytes], step: int) -> None:
    rows: Any = extension.Rows.join([whole])
    order, _ = in_key_order(rows)

    assert [rows[row] for row in order] == sorted(whole)
    for chosen in (order, order[::step], range(len(whole)), range(len(whole))[::step]):
        assert b"".join(copy_data(rows, chosen)) == b"".join(copy_data(whole, list(chosen)))


@given(st.lists(facts, max_size=30), places, st.data())
def test_spans_are_summed_up_alike(whole: list[SpanFacts], cuts: list[int], data: st.DataObject) -> None:
    native_facts: Any = extension.Facts.join(split(whole, cuts))
    assert native_facts == whole
    rows = data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True)) if whole else []
    native, reference = summarise(native_facts, rows, SUMS), summarise(whole, rows, SUMS)

    assert native.ids == reference.ids
    for some in (native.ids, native.ids[1:], []):
        assert native.parameters(some) == reference.parameters(some)


def test_no_trace_names_more_services_than_its_row_takes() -> None:
    one = SpanFacts(b"\1" * 16, b"\1" * 8, 0, 0, error=False, root=False, name="", service_name="", sums=())
    whole = [one._replace(service_name=f"service {number}") for number in range(2 * MAX_SERVICE_NAMES)]
    rows = range(len(whole))
    native, reference = summarise(extension.Facts.join([whole]), rows, 0), summarise(whole, rows, 0)

    assert native.parameters(native.ids) == reference.parameters(reference.ids)
