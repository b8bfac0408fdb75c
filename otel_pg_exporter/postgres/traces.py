"""What a batch of spans adds to `traces`: one aggregate a trace, summed over the spans really inserted."""

import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

from otel_pg_exporter.model import SpanFacts
from otel_pg_exporter.postgres.statements import Array, arrays, oids, trace_types
from otel_pg_exporter.transcode import extension

# A hostile sender could name millions of services in one trace. The smallest names win, which keeps the merge
# commutative and associative; `merge_service_names` in the database cuts alike.
MAX_SERVICE_NAMES = 100

_INT8 = struct.Struct("!q")

# Of the parameters: which tells when traces ended; and how an array of int8 is laid out, in bytes.
_ENDS, _ARRAY_HEADER, _ELEMENT = 2, 20, 12
_SAMPLE = 32  # traces that stand for all of a batch's


class TraceAggregate:
    """The contribution of one batch to one trace."""

    __slots__ = ("end", "errors", "root", "service_names", "spans", "start", "sums")

    def __init__(self, facts: SpanFacts) -> None:
        self.start = facts.start
        self.end = facts.end
        self.spans = 0
        self.errors = 0
        self.root: SpanFacts | None = None
        self.service_names: set[str] = set()
        self.sums: list[int | None] = [None] * len(facts.sums)

    def add(self, facts: SpanFacts) -> None:
        """Add one span."""
        self.start = min(self.start, facts.start)
        self.end = max(self.end, facts.end)
        self.spans += 1
        self.errors += facts.error
        if facts.root and (self.root is None or (facts.start, facts.span_id) < (self.root.start, self.root.span_id)):
            self.root = facts
        if facts.service_name is not None:
            self.service_names.add(facts.service_name)
        for index, tokens in enumerate(facts.sums):
            if tokens is not None:
                self.sums[index] = (self.sums[index] or 0) + tokens


def aggregate(facts: Iterable[SpanFacts]) -> dict[bytes, TraceAggregate]:
    """Sum spans up by trace id."""
    traces: dict[bytes, TraceAggregate] = {}
    for each in facts:
        trace = traces.get(each.trace_id)
        if trace is None:
            trace = traces[each.trace_id] = TraceAggregate(each)
        trace.add(each)
    return traces


class Summary(Protocol):
    """What a batch of spans adds to `traces`, whichever core has summed it up."""

    @property
    def ids(self) -> list[bytes]:
        """The ids of all traces, sorted.

        That is the order in which rows are locked: writers that meet on the same traces would else deadlock.
        """

    def parameters(self, ids: Sequence[bytes]) -> list[Array]:
        """Return the parameters of `statements.upsert_traces` for the traces with these ids, which are sorted."""


def summarise(facts: Sequence[SpanFacts], rows: Sequence[int], sum_count: int) -> Summary:
    """Sum up the spans of these rows."""
    if extension is not None and isinstance(facts, extension.Facts):
        return _NativeSummary(extension.Traces(facts, rows), sum_count)
    return _ReferenceSummary(aggregate(map(facts.__getitem__, rows)), sum_count)


class _ReferenceSummary:
    def __init__(self, traces: dict[bytes, TraceAggregate], sum_count: int) -> None:
        self._traces = traces
        self._sum_count = sum_count
        self.ids = sorted(traces)

    def parameters(self, ids: Sequence[bytes]) -> list[Array]:
        return parameters({trace_id: self._traces[trace_id] for trace_id in ids}, self._sum_count)


class _NativeSummary:
    def __init__(self, traces: "extension.Traces", sum_count: int) -> None:
        self._traces = traces
        self._oids = oids(trace_types(sum_count))
        self.ids = traces.ids

    def parameters(self, ids: Sequence[bytes]) -> list[Array]:
        return list(map(Array, self._traces.parameters(ids, self._oids)))


def sampled_ends(parameters: Sequence[Array]) -> list[int]:
    """Read when some of the traces ended, in PostgreSQL's microseconds: ids are random, and so is every n-th."""
    ends = parameters[_ENDS]
    count = (len(ends) - _ARRAY_HEADER) // _ELEMENT
    step = max(1, count // _SAMPLE)
    return [_INT8.unpack_from(ends, _ARRAY_HEADER + row * _ELEMENT + 4)[0] for row in range(0, count, step)]


def control(sum_count: int) -> list[Array]:
    """Build the parameters of a span that is valid by the mapping, whatever the senders sent; its ids are all zeros."""
    facts = SpanFacts(
        trace_id=bytes(16),
        span_id=bytes(8),
        start=0,
        end=0,
        error=False,
        root=True,
        name="control",
        service_name="control",
        sums=(0,) * sum_count,
    )
    return parameters(aggregate([facts]), sum_count)


def parameters(traces: dict[bytes, TraceAggregate], sum_count: int) -> list[Array]:
    """Turn aggregates into the parameters of `statements.upsert_traces`, sorted by trace id."""
    return arrays(trace_types(sum_count), [_row(trace_id, traces[trace_id]) for trace_id in sorted(traces)])


def _row(trace_id: bytes, trace: TraceAggregate) -> list[bytes | None]:
    root = trace.root
    return [
        trace_id,
        _INT8.pack(trace.start),
        _INT8.pack(trace.end),
        _INT8.pack(trace.spans),
        _INT8.pack(trace.errors),
        root and root.span_id,
        None if root is None else _INT8.pack(root.start),
        _text(root and root.name),
        _text(root and root.service_name),
        _array_literal(trace.service_names).encode(),
        *(_text(None if total is None else str(total)) for total in trace.sums),
    ]


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _array_literal(values: Iterable[str]) -> str:
    quoted = (
        '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in sorted(values)[:MAX_SERVICE_NAMES]
    )
    return "{" + ",".join(quoted) + "}"
