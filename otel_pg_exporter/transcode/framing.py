"""The frame of an OTLP request: its resources, scopes and items, found without decoding them.

All walks are lazy, so that no part of a request costs an object before its turn comes; `check_frame` bounds what the
others meet.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from otel_pg_exporter.errors import TooLargeError, UndecodableError
from otel_pg_exporter.model import Hold, Signal
from otel_pg_exporter.transcode.protobuf_wire import (
    DELIMITED,
    FIXED32,
    FIXED64,
    VARINT,
    Field,
    MalformedError,
    fields,
    opening,
    run_of,
)

# Traces and logs have the same numbers: request.resource_*, resource_*.scope_*, scope_*.spans or .log_records.
_RESOURCES, _SCOPES, _ITEMS = 1, 2, 2
RESOURCE_PATH = (_RESOURCES,)
SCOPE_PATH = (_RESOURCES, _SCOPES)
ITEM_PATH = (_RESOURCES, _SCOPES, _ITEMS)

_REPEATED_BYTES = 64 * 2**20  # of resources and scopes, in all dead letters of a request


class Run(NamedTuple):
    """Fields of one kind that follow one another, as items do in a scope."""

    start: int  # of the first
    end: int  # of the last
    children: int  # how many; 0 for a single field of another kind


class ScopeFrame(NamedTuple):
    """One ScopeSpans or ScopeLogs."""

    rest: bytes  # all its fields but the items
    runs: Iterator[Run]  # to be taken once


class ResourceFrame(NamedTuple):
    """One ResourceSpans or ResourceLogs."""

    rest: bytes  # all its fields but the scopes
    scopes: Iterator[ScopeFrame]  # to be taken once


def check_frame(body: bytes, *, parts: int, piece_bytes: int) -> None:
    """Walk a request's frame once.

    Raises TooLargeError when it has more than so many parts, and UndecodableError when it is broken.
    """
    found = 0
    try:
        for count in _part_counts(body, piece_bytes):
            found += count
            if found > parts:
                raise TooLargeError(
                    f"the request has more than {parts:,} items, scopes and resources; send smaller requests"
                )
    except MalformedError as error:
        raise UndecodableError(f"the body of {len(body):,} bytes is not OTLP: {error}") from error


def split(body: bytes, *, piece_bytes: int) -> Iterator[ResourceFrame]:
    """Find the resources of a request, their scopes, and runs of items: of at most `piece_bytes`, or of one item.

    Raises MalformedError where the frame is broken.
    """
    for resource in _children(body, 0, len(body), _RESOURCES):
        rest = _rest(body, resource, _SCOPES)
        yield ResourceFrame(rest, _scopes(body, resource, piece_bytes))


def items(body: bytes, run: Run) -> Iterator[bytes]:
    """Cut the items of a run out."""
    return (body[field.content : field.end] for field in fields(body, run.start, run.end))


class OneItemRequests:
    """Cuts single items out of a request: same resource, scope and schema URLs, the item's own bytes.

    Keeps the body alive, and `hold`, which counts it. Items are asked for in ascending order, or the walk begins anew.
    Each repeats its resource and scope, which may be many times as large as it is: once 64 MiB of them were handed out
    in one walk, the items that follow come without.
    """

    def __init__(self, body: bytes, hold: Hold) -> None:
        self._body = body
        self._hold = hold
        self._items: Iterator[tuple[int, bytes, bytes, int, int]] = iter(())
        self._last: int | None = None  # None: the walk has not begun
        self._repeated = 0

    def __call__(self, index: int) -> bytes:
        """Return a request that holds only the item of this index."""
        if self._last is None or index <= self._last:
            self._items = _one_by_one(self._body)
            self._repeated = 0
        self._last = index
        _, resource, scope, start, end = next(each for each in self._items if each[0] == index)
        self._repeated += len(resource) + len(scope)
        if self._repeated > _REPEATED_BYTES:
            resource = scope = b""
        item = opening(_ITEMS, end - start)
        scope = opening(_SCOPES, len(scope) + len(item) + end - start) + scope
        resource = opening(_RESOURCES, len(resource) + len(scope) + len(item) + end - start) + resource
        return b"".join((resource, scope, item, memoryview(self._body)[start:end]))  # which may be all but the whole


def _one_by_one(body: bytes) -> Iterator[tuple[int, bytes, bytes, int, int]]:
    index = 0
    for resource in split(body, piece_bytes=len(body)):
        for scope in resource.scopes:
            for run in scope.runs:
                for item in fields(body, run.start, run.end):
                    yield index, resource.rest, scope.rest, item.content, item.end
                    index += 1


_SERVICES = {
    Signal.TRACES: "opentelemetry.proto.collector.trace.v1.TraceService/Export",
    Signal.LOGS: "opentelemetry.proto.collector.logs.v1.LogsService/Export",
}

# Fields by which a Span and a LogRecord cannot be mixed up: number and wire type.
_EVIDENCE = {
    (1, DELIMITED): Signal.TRACES,  # trace_id
    (2, DELIMITED): Signal.TRACES,  # span_id
    (7, FIXED64): Signal.TRACES,  # start_time_unix_nano
    (8, FIXED64): Signal.TRACES,  # end_time_unix_nano
    (1, FIXED64): Signal.LOGS,  # time_unix_nano
    (2, VARINT): Signal.LOGS,  # severity_number
    (8, FIXED32): Signal.LOGS,  # flags
    (11, FIXED64): Signal.LOGS,  # observed_time_unix_nano
}
_FIELDS_SEEN = 20
_ITEMS_SEEN = 10_000


def check_signal(signal: Signal, body: bytes) -> None:
    """Raise UndecodableError when the items can only be the other signal's: the first is, and none is one of `signal`.

    protobuf would not mind: to it, the other signal's fields are unknown ones. So log records would be refused one by
    one for their lack of ids, and spans be stored as odd log records.
    """
    try:
        found = _first_evidence(signal, body)
        if found in {None, signal}:
            return
        # A look at so many costs little, and an honest request of this signal shows itself sooner.
        seen = itertools.islice(_one_by_one(body), _ITEMS_SEEN)
        if any(_evidence(signal, body, start, end) is signal for *_, start, end in seen):
            return
    except MalformedError:
        return  # reported by whoever decodes it
    if found is not None:
        raise UndecodableError(
            f"the body holds {found.items}, not {signal.items}; send them to {_SERVICES[found]}"
            f" (over HTTP: /v1/{found.value})"
        )


def _first_evidence(signal: Signal, body: bytes) -> Signal | None:
    """Say whose the first item is; without a walk over the others, since nearly always it is `signal`'s."""
    start, end = 0, len(body)
    for number in (_RESOURCES, _SCOPES, _ITEMS):
        for field in fields(body, start, end):
            if field.delimited and field.number == number:
                start, end = field.content, field.end
                break
        else:
            return None
    return _evidence(signal, body, start, end)


def _evidence(signal: Signal, body: bytes, start: int, end: int) -> Signal | None:
    """Say whose an item is: `signal` on its first evidence, the other only when there is none for `signal`."""
    other = None
    for seen, field in enumerate(fields(body, start, end)):
        evidence = _EVIDENCE.get((field.number, body[field.start] & 7))
        if evidence is signal or seen == _FIELDS_SEEN:
            return evidence and signal
        other = evidence or other
    return other


def _part_counts(body: bytes, piece_bytes: int) -> Iterator[int]:
    for resource in _regions(body, 0, len(body), _RESOURCES, 0):
        yield 1
        for scope in _inside(body, resource, _SCOPES, 0):
            yield 1
            for run in _inside(body, scope, _ITEMS, piece_bytes):
                yield run.children or 1


def _inside(body: bytes, parent: Run, number: int, size: int) -> Iterator[Run]:
    if parent.children:
        field = next(fields(body, parent.start, parent.end))
        yield from _regions(body, field.content, field.end, number, size)


def _scopes(body: bytes, resource: Field, piece_bytes: int) -> Iterator[ScopeFrame]:
    for scope in _children(body, resource.content, resource.end, _SCOPES):
        regions = _regions(body, scope.content, scope.end, _ITEMS, piece_bytes)
        yield ScopeFrame(_rest(body, scope, _ITEMS), (region for region in regions if region.children))


def _children(body: bytes, start: int, end: int, number: int) -> Iterator[Field]:
    return (field for field in fields(body, start, end) if field.delimited and field.number == number)


def _rest(body: bytes, parent: Field, number: int) -> bytes:
    """Return all fields of a message, as they stand, but the children with this number."""
    regions = _regions(body, parent.content, parent.end, number, parent.end)
    return b"".join([body[start:end] for start, end, count in regions if not count])


def _regions(body: bytes, start: int, end: int, number: int, size: int) -> Iterator[Run]:
    """Part a message into runs of children with this number, and into single other fields.

    A run has at most `size` bytes, or one child.
    """
    position = start
    while position < end:
        after, count = run_of(body, position, end, number, size)
        if not count:
            field = next(fields(body, position, end))
            after, count = field.end, int(field.delimited and field.number == number)
        yield Run(position, after, count)
        position = after
