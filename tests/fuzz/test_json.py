"""OTLP/JSON under hostile text: it means what protobuf does, and what is wrong in one item stays in that item."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.cli.otlp_json import otlp_json
from otel_pg_exporter.errors import RefusedError, UndecodableError
from otel_pg_exporter.model import Signal, unbounded
from otel_pg_exporter.transcode import transcode
from otel_pg_exporter.transcode.otlp_json import to_protobuf
from tests.fuzz.mutations import children, mutate_bytes
from tests.fuzz.strategies import requests
from tests.transcode.support import NOW, plan
from tests.transcode.test_every_field import REQUESTS

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("9" * 30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def tree_of(signal: Signal, body: bytes) -> dict[str, Any]:
    tree = otlp_json(signal.value, body)
    assert tree is not None
    return tree


def items_of(body: bytes) -> list[bytes]:
    return [item for resource in children(body, 1) for scope in children(resource, 2) for item in children(scope, 2)]


def lists_of_items(tree: dict[str, Any]) -> list[list[Any]]:
    return [
        items
        for resources in tree.values()
        for resource in resources
        for name in ("scopeSpans", "scopeLogs")
        for scope in resource.get(name, ())
        for items in (scope.get("spans") or scope.get("logRecords") or [],)
        if items
    ]


def convert(signal: Signal, text: bytes) -> bytes:
    return to_protobuf(REQUESTS[signal], text, unbounded)


@pytest.mark.parametrize("signal", list(Signal))
@given(data=st.data())
def test_any_request_as_json_becomes_the_request_that_it_was(signal: Signal, data: st.DataObject) -> None:
    body = data.draw(requests(signal))
    text = json.dumps(tree_of(signal, body), ensure_ascii=data.draw(st.booleans())).encode()
    again, before = (REQUESTS[signal].FromString(each) for each in (convert(signal, text), body))
    assert str(again) == str(before)  # as text, since a NaN is not equal to itself, and has a sign that JSON has not


@pytest.mark.parametrize("signal", list(Signal))
@given(data=st.data())
def test_whatever_stands_in_an_item_its_neighbours_do_not_notice(signal: Signal, data: st.DataObject) -> None:
    tree = tree_of(signal, data.draw(requests(signal)))
    before = items_of(convert(signal, json.dumps(tree).encode()))
    items = data.draw(st.sampled_from(lists_of_items(tree)))
    index = data.draw(st.integers(0, len(items) - 1))
    hostile = items[index] = {"name": items[index].get("name")}
    hostile[data.draw(st.sampled_from(["attributes", "kind", "body", "events", "traceId", "flags"]))] = data.draw(
        anything
    )
    body = convert(signal, json.dumps(tree).encode())
    after = items_of(body)
    assert len(after) == len(before)
    assert sum(one != other for one, other in zip(before, after, strict=True)) <= 1
    batch = transcode(plan(signal), body, now_ns=NOW)
    assert batch.item_count == len(before)
    assert all(rejection.reason for rejection in batch.rejected)


@pytest.mark.parametrize("signal", list(Signal))
@given(data=st.data())
def test_any_text_is_converted_or_undecodable_and_what_was_converted_is_decoded_item_by_item(
    signal: Signal, data: st.DataObject
) -> None:
    text = json.dumps(tree_of(signal, data.draw(requests(signal)))).encode()
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(chance.randrange(1, 5)):
        text = mutate_bytes(text, chance)
    try:
        body = convert(signal, text)
    except UndecodableError:
        return
    assert convert(signal, text) == body
    try:
        batch = transcode(plan(signal), body, now_ns=NOW)
    except RefusedError as refused:
        assert str(refused).startswith("the body holds ")  # noqa: PT017 - or none is raised
        return
    assert batch.item_count == len(items_of(body))
