# ruff: noqa: ANN401 - telemetry's values have any type
"""OTLP requests with every field set, as the messages' own descriptors list them: a field that upstream adds is set."""

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Status

M = TypeVar("M", bound=Message)

# Indices into a string table that only profiles have; OTLP says that traces and logs must leave them unset.
PROFILES_ONLY = {"key_strindex", "string_value_strindex"}
_ID_BYTES = {"trace_id": 16, "span_id": 8, "parent_span_id": 8}


def any_values() -> Iterator[tuple[str, AnyValue]]:
    """Yield a value of every kind, named after it; some kinds twice."""
    scalars: dict[str, Any] = {
        "string_value": "text \U0001f600",
        "bool_value": True,
        "int_value": -(2**63),
        "double_value": 2.5,
        "bytes_value": b"\x00\xff",
    }
    known = {*scalars, "array_value", "kvlist_value", *PROFILES_ONLY}
    assert {field.name for field in AnyValue.DESCRIPTOR.fields} <= known, "AnyValue has a new kind of value"
    for kind, value in scalars.items():
        yield kind, AnyValue(**{kind: value})
    yield "a whole double", AnyValue(double_value=3.0)
    yield "unset", AnyValue()
    array, kvlist = AnyValue(), AnyValue()
    for kind, value in scalars.items():
        array.array_value.values.add(**{kind: value})
        kvlist.kvlist_value.values.add(key=kind).value.CopyFrom(AnyValue(**{kind: value}))
    array.array_value.values.add().CopyFrom(kvlist)
    kvlist.kvlist_value.values.add(key="array").value.array_value.values.add().int_value = 1
    yield "array_value", array
    yield "kvlist_value", kvlist
    array, kvlist = AnyValue(), AnyValue()
    array.array_value.SetInParent()
    kvlist.kvlist_value.SetInParent()
    yield "empty array", array
    yield "empty kvlist", kvlist


class Filler:
    """Sets every field of a message, each to a value that occurs nowhere else. Times lie shortly before `now`."""

    def __init__(self, now: int) -> None:
        self._now = now
        self._numbers = itertools.count(1)

    def fill(self, message: M) -> M:
        for field in message.DESCRIPTOR.fields:
            if field.name in PROFILES_ONLY:
                continue
            if field.message_type is not None:
                self._fill_messages(message, field)
            elif field.is_repeated:
                getattr(message, field.name).extend([self._scalar(field), self._scalar(field)])
            else:
                setattr(message, field.name, self._scalar(field))
        return message

    def _fill_messages(self, message: Message, field: Any) -> None:
        value = getattr(message, field.name)
        if field.message_type is KeyValue.DESCRIPTOR:
            # The key has the number too, so that no two lists of attributes are equal.
            value.extend(KeyValue(key=f"{name} {next(self._numbers)}", value=each) for name, each in any_values())
        elif field.message_type is AnyValue.DESCRIPTOR:
            value.string_value = self._text(field)
        elif field.is_repeated:
            self.fill(value.add())
            self.fill(value.add())
        else:
            value.SetInParent()
            self.fill(value)

    def _text(self, field: Any) -> str:
        return f"{field.name} {next(self._numbers)}"

    def _scalar(self, field: Any) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return self._text(field)
            case FieldDescriptor.TYPE_BYTES:
                return next(self._numbers).to_bytes(_ID_BYTES[field.name], "little")
            case FieldDescriptor.TYPE_FIXED64:
                return self._now - next(self._numbers) * 1_000_003
            case FieldDescriptor.TYPE_UINT32 | FieldDescriptor.TYPE_FIXED32:
                return 2**32 - next(self._numbers)
            case FieldDescriptor.TYPE_ENUM:
                return field.enum_type.values[-1].number
            case _:
                raise AssertionError(f"{field.full_name} has a type that no field had before")


def full_traces(now: int) -> ExportTraceServiceRequest:
    """Return 8 spans of 2 resources with 2 scopes each."""
    assert Status.StatusCode.values()[-1] == Status.STATUS_CODE_ERROR
    return Filler(now).fill(ExportTraceServiceRequest())


def full_logs(now: int) -> ExportLogsServiceRequest:
    """Return 8 log records of 2 resources with 2 scopes each, then one more for every kind of body."""
    request = Filler(now).fill(ExportLogsServiceRequest())
    template = request.resource_logs[0].scope_logs[0].log_records[0]
    for number, (_, body) in enumerate(any_values(), 1):
        added = request.resource_logs[0].scope_logs[0].log_records.add()
        added.CopyFrom(template)
        added.time_unix_nano += number
        added.body.CopyFrom(body)
    return request
