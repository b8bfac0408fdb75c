"""Nothing of OTLP is lost: the messages themselves say what has to arrive."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_pg_exporter.model import RowBatch, Signal
from otel_pg_exporter.transcode import transcode
from tests.transcode.support import NOW, plan

Path = tuple[str, ...]
AnyDescriptor = Any  # the stubs don't agree which class a generated message's descriptors have

REQUESTS: dict[Signal, type[Message]] = {
    Signal.TRACES: ExportTraceServiceRequest,
    Signal.LOGS: ExportLogsServiceRequest,
}
# Indices into a string table that only profiles have; traces and logs must leave them unset.
PROFILES_ONLY = {"key_strindex", "string_value_strindex"}


def leaves(descriptor: AnyDescriptor, path: Path = (), within: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the path to every field; a message inside itself (AnyValue) is a leaf."""
    for field in descriptor.fields:
        here = (*path, field.name)
        message = field.message_type
        if message is None or message.full_name in within:
            yield here
        else:
            yield from leaves(message, here, (*within, descriptor.full_name))


def paths() -> Iterator[Any]:
    for signal, request in REQUESTS.items():
        for path in leaves(request.DESCRIPTOR):
            if path[-1] not in PROFILES_ONLY:
                yield pytest.param(signal, path, id=".".join(path))


def fill(message: Message, within: tuple[str, ...] = ()) -> None:
    """Set all fields of a message; a oneof gets its first member."""
    oneofs = set()
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.name in oneofs:
            continue
        if oneof is not None:
            oneofs.add(oneof.name)
        if field.message_type is None:
            put(message, field, "a")
        elif field.message_type.full_name not in within:
            fill(child(message, field), (*within, message.DESCRIPTOR.full_name))


def child(message: Message, field: AnyDescriptor) -> Message:
    value = getattr(message, field.name)
    found: Message = (value[0] if value else value.add()) if field.is_repeated else value
    found.SetInParent()
    return found


def put(message: Message, field: AnyDescriptor, variant: str) -> None:
    second = variant == "b"
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            value: Any = f"{field.name} {variant}"
        case FieldDescriptor.TYPE_BYTES:
            value = variant.encode() * (16 if field.name == "trace_id" else 8)
        case FieldDescriptor.TYPE_BOOL:
            value = second
        case FieldDescriptor.TYPE_DOUBLE:
            value = 2.5 + second
        case FieldDescriptor.TYPE_FIXED64:
            value = NOW - field.number * 1_000_003 + second
        case _:
            value = 2 - second
    if field.is_repeated:
        del getattr(message, field.name)[:]
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def change(message: Message, path: Path) -> None:
    """Give the field at the end of `path` another value; on the way there, oneofs switch to it."""
    *way, last = path
    for name in way:
        message = child(message, message.DESCRIPTOR.fields_by_name[name])
    field = message.DESCRIPTOR.fields_by_name[last]
    if field.message_type is None:
        put(message, field, "b")
    else:
        fill(child(message, field))


def full(signal: Signal) -> Message:
    request = REQUESTS[signal]()
    fill(request)
    return request


def run(signal: Signal, request: Message) -> RowBatch:
    return transcode(plan(signal), request.SerializeToString(), now_ns=NOW)


@pytest.mark.parametrize(("signal", "path"), list(paths()))
def test_no_field_can_change_without_a_row_that_changes(signal: Signal, path: Path) -> None:
    before, changed = full(signal), full(signal)
    change(changed, path)

    first, second = run(signal, before), run(signal, changed)

    assert len(first.rows) == len(second.rows) == 1
    # The request's id differs whenever a byte does; it must not be what makes log rows differ.
    stored = second.rows[0].replace(second.request_id, first.request_id)
    assert (stored, second.resources) != (first.rows[0], first.resources)


@pytest.mark.parametrize("signal", list(Signal))
def test_a_request_with_all_fields_set_is_stored_without_a_repair(signal: Signal) -> None:
    batch = run(signal, full(signal))

    assert batch.rejected == []
    assert batch.repairs == {}


def test_the_walk_finds_the_fields_of_every_message() -> None:
    found = {".".join(path) for request in REQUESTS.values() for path in leaves(request.DESCRIPTOR)}

    assert {
        "resource_spans.resource.entity_refs.id_keys",
        "resource_spans.scope_spans.scope.attributes.value.kvlist_value.values",
        "resource_spans.scope_spans.spans.links.attributes.value.bytes_value",
        "resource_spans.scope_spans.spans.status.code",
        "resource_logs.scope_logs.log_records.body.array_value.values",
        "resource_logs.scope_logs.log_records.event_name",
    } <= found
