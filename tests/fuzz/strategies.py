# ruff: noqa: ANN401 - the stubs don't agree which class a message's descriptors have
"""Any OTLP request, valid or broken, as hypothesis generates it."""

import functools
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from otel_pg_exporter.model import Signal
from tests.e2e import values
from tests.fuzz.mutations import mutate
from tests.transcode.support import NOW, columns
from tests.transcode.test_every_field import REQUESTS

_DAY = 86_400_000_000_000

_columns = [column for signal in Signal for column in columns().table(signal).columns]
_promoted = sorted({source.key for column in _columns for source in column.sources if source.key is not None})
_attributes = st.builds(KeyValue, key=values.keys | st.sampled_from(_promoted), value=values.trees)
_times = [0, 1, NOW, NOW + 999, NOW - 2 * _DAY, NOW - 60 * _DAY, 2**63, 2**64 - 1]
_ids = {
    "trace_id": st.sampled_from([bytes(range(16)), *[b"\1" * 16] * 8, b"", bytes(16), b"\2" * 15]),
    "span_id": st.sampled_from([*(bytes([n]) * 8 for n in range(1, 13)), b"", bytes(8), b"\1" * 9]),
    "parent_span_id": st.sampled_from([b"", bytes(8), b"\1" * 8, b"\1" * 300]),
}
# What leads to the items, and their ids, are always there: most of a request is to become rows.
_ways = {"resource_spans", "scope_spans", "spans", "resource_logs", "scope_logs", "log_records"}
_kinds = {
    FieldDescriptor.TYPE_STRING: values.texts,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_FIXED64: st.sampled_from(
        [0, 1, NOW, NOW + 999, NOW - 2 * _DAY, NOW - 60 * _DAY, 2**63, 2**64 - 1]
    ),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 3) | st.sampled_from([-(2**31), -1, 2**15, 2**31 - 1]),
    FieldDescriptor.TYPE_UINT32: st.sampled_from([0, 1, 2**31, 2**32 - 1]),
    FieldDescriptor.TYPE_FIXED32: st.sampled_from([0, 1, 0x3FF, 2**32 - 1]),
}


def _values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        value: st.SearchStrategy[Any] = _messages(field.message_type)
    else:
        value = _ids[field.name] if field.name in _ids else _kinds[field.type]
    return st.lists(value, min_size=field.name in _ways, max_size=2) if field.is_repeated else value


@functools.cache
def _messages(descriptor: Any) -> st.SearchStrategy[Message]:
    if descriptor is AnyValue.DESCRIPTOR:
        return values.trees
    if descriptor is KeyValue.DESCRIPTOR:
        return _attributes
    fields = {field.name: _values(field) for field in descriptor.fields}
    always = {name: fields.pop(name) for name in list(fields) if name in _ids or name in _ways}
    return st.fixed_dictionaries(always, optional=fields).map(lambda found: GetMessageClass(descriptor)(**found))


def requests(signal: Signal) -> st.SearchStrategy[bytes]:
    """Any valid request."""
    return _messages(REQUESTS[signal].DESCRIPTOR).map(lambda request: request.SerializeToString())


def bodies(signal: Signal) -> st.SearchStrategy[bytes]:
    """Any body: valid requests, those with a few mutations, and bytes that never were one."""
    mutated = st.builds(mutate, requests(signal), st.randoms(use_true_random=False), st.integers(1, 6))
    return requests(signal) | mutated | st.binary(max_size=100)
