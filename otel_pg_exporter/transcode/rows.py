"""The row builder: both readers hand it values, and it makes the `RowBatch`."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from otel_pg_exporter.mapping import FIELDS
from otel_pg_exporter.model import Anomaly, Hold, Rejection, RowBatch, Signal, SpanFacts, unbounded
from otel_pg_exporter.transcode import copy_format
from otel_pg_exporter.transcode.fields import log_fields, resource_fields, scope_fields, span_fields
from otel_pg_exporter.transcode.plan import Fields, Message, Plan
from otel_pg_exporter.transcode.values import (
    MINUTES_PER_DAY,
    NOT_HEX,
    NS_PER_MINUTE,
    SPAN_ID_BYTES,
    TRACE_ID_BYTES,
    LogRecord,
    Resource,
    Scope,
    Span,
    pg_time,
    repair_text,
)

MAX_BATCH_BYTES = 256 * 2**20
"""Of rows. Only the tiniest spans get near it; but scope columns stand in every row, so that a hostile request could
grow a thousandfold."""

MAX_SHARED_BYTES = 2**20
"""Of one row, from its scope, resource and request: these stand in every row of the scope."""

# Bytes that a row takes beside its own: object headers, list slots here and in the writer, for spans the key and facts.
_OVERHEAD = {Signal.TRACES: 700, Signal.LOGS: 250}
_RESOURCE = 250  # bytes that a resource takes beside its row
_REJECTION = 200  # bytes that a refused item takes
_STEP = 2**20  # bytes of growth between two calls of `hold`
_NO_ANOMALIES = copy_format.int4_field(0)


class EncodedResource(NamedTuple):
    """A resource, ready for all its scopes."""

    message: Message
    anomalies: int
    row: bytes


class Shared(NamedTuple):
    """What all items of one scope have in common."""

    fields: Fields  # the shared part of the vector
    size: int  # bytes that they add to every row
    messages: dict[str, Message]
    anomalies: int
    resource_id: bytes
    resource_row: bytes
    service_name: str | None


class RowBuilder:
    """Collects the rows of one request. Used by one thread, then thrown away."""

    def __init__(self, plan: Plan, *, request_id: bytes, now_ns: int, hold: Hold = unbounded) -> None:
        self._plan = plan
        self._item_message = "span" if plan.signal is Signal.TRACES else "log"
        self._request_id = request_id
        self._now = now_ns
        self._hold = hold
        self._earliest = now_ns - int(plan.window.past * 1e9)
        self._latest = now_ns + int(plan.window.future * 1e9)
        self._rows: list[bytes] = []
        self._keys: list[bytes] = []
        self._facts: list[SpanFacts] = []
        self._items: list[int] = []
        self._resource_ids: list[bytes] = []
        self._resources: dict[bytes, bytes] = {}
        self._days: set[int] = set()
        self._rejected: list[Rejection] = []
        self._reasons: dict[str, str] = {}  # each once, however many items have it
        self._anomalies: Counter[int] = Counter()
        self._no_item = (b"",) * (len(FIELDS[self._item_message]) + len(plan.rows.no_picks))
        self._overhead = _OVERHEAD[plan.signal]
        self._row_bytes = 0
        self._size = 0
        self._told = 0  # the size that `hold` knows of
        self._no_sums = (None,) * len(plan.rows.no_sums)

    @property
    def row_bytes(self) -> int:
        """How many bytes the rows have so far."""
        return self._row_bytes

    def resource(self, resource: Resource) -> EncodedResource:
        """Encode a resource, once for all its scopes."""
        plan = self._plan.resources
        fields, anomalies = resource_fields(resource)
        message = Message(fields, resource.attributes)
        picks = [pick({"resource": message}) for pick in plan.shared_picks]
        for _, found in picks:
            anomalies |= found
        row = plan.header + b"".join(plan.columns((*fields, *(field for field, _ in picks))))
        return EncodedResource(message, resource.anomalies | anomalies, row)

    def share(self, resource: EncodedResource, scope: Scope) -> Shared:
        """Encode what all items of a scope have in common."""
        plan = self._plan.rows
        fields, anomalies = scope_fields(scope)
        request = (copy_format.bytea_field(self._request_id),)
        messages = {
            "scope": Message(fields, scope.attributes),
            "resource": resource.message,
            "request": Message(request, {}),
        }
        picks = [pick(messages) for pick in plan.shared_picks]
        for _, found in picks:
            anomalies |= found
        shared = (*fields, *resource.message.fields, *request, *(field for field, _ in picks))
        name = None if plan.service_name is None else copy_format.content(shared[plan.service_name])
        return Shared(
            fields=shared,
            size=sum(map(len, plan.columns((*self._no_item, *shared)))),
            messages=messages,
            anomalies=scope.anomalies | resource.anomalies | anomalies,
            resource_id=resource.message.fields[0][4:],
            resource_row=resource.row,
            service_name=None if name is None else name.decode(),
        )

    def add_span(self, item: int, span: Span, shared: Shared) -> None:
        """Make a row of a span, or refuse it."""
        if reason := _refusal(span) or self.lack_of_room(shared):
            self.reject(item, reason)
            return
        start = span.start
        fields, anomalies = span_fields(span)
        anomalies |= span.anomalies | shared.anomalies | self._locate(start)
        vector = self._append(item, fields, anomalies, span.attributes, shared)
        self._size += len(span.name)  # kept for the trace
        plan = self._plan.rows
        self._keys.append(b"".join([field[4:] for field in plan.key(vector)]))
        start_us = pg_time(start)
        self._facts.append(
            SpanFacts(
                span.trace_id,
                span.span_id,
                start_us,
                max(start_us, pg_time(span.end)),
                span.status_code == _STATUS_ERROR,
                not any(span.parent_span_id),
                repair_text(span.name),
                shared.service_name,
                tuple(map(_sum, sums)) if (sums := plan.sums(vector)) != plan.no_sums else self._no_sums,
            )
        )

    def add_log(self, item: int, record: LogRecord, shared: Shared) -> None:
        """Make a row of a log record, or refuse it."""
        if reason := self.lack_of_room(shared):
            self.reject(item, reason)
            return
        time = record.time or record.observed_time or self._now
        fields, anomalies = log_fields(record, time)
        anomalies |= record.anomalies | shared.anomalies | self._locate(time)
        if not record.time:
            anomalies |= Anomaly.TIME_SUBSTITUTED
        self._append(item, fields, anomalies, record.attributes, shared)

    def lack_of_room(self, shared: Shared) -> str | None:
        """Say why no further item of a scope can be taken; None when one can."""
        if shared.size > MAX_SHARED_BYTES:
            return f"its scope adds {shared.size:,} bytes to every row; at most {MAX_SHARED_BYTES:,} are allowed"
        if self._row_bytes + shared.size <= MAX_BATCH_BYTES:
            return None
        return f"the rows of this request exceed {MAX_BATCH_BYTES:,} bytes; send smaller requests"

    def reject(self, item: int, reason: str) -> None:
        """Refuse an item."""
        known = self._reasons.setdefault(reason, reason)
        self._rejected.append(Rejection(item=item, reason=known))
        self._size += _REJECTION if known is not reason else _REJECTION + len(reason)

    def tell(self) -> None:
        """Tell `hold` of the growth, if it is worth a call."""
        if self._size - self._told >= _STEP:
            self._hold(self._size)
            self._told = self._size

    def finish(self, *, otlp: Callable[[int], bytes], held: int) -> RowBatch:
        """Return the batch; `held` is how many bytes `otlp` keeps alive."""
        self._hold(self._size)
        request_id = self._request_id
        repairs = {bit: sum(n for mask, n in self._anomalies.items() if mask & bit) for bit in Anomaly}
        return RowBatch(
            signal=self._plan.signal,
            received_at=self._now,
            rows=self._rows,
            keys=self._keys,
            facts=self._facts,
            items=self._items,
            resource_ids=self._resource_ids,
            resources=self._resources,
            days=frozenset(self._days),
            rejected=sorted(self._rejected, key=lambda rejection: rejection.item),
            repairs={bit: count for bit, count in repairs.items() if count},
            size=self._size + held,
            otlp=otlp,
            identify=lambda: request_id,
        )

    def _locate(self, time: int) -> int:
        """Note the partition that a time needs, or that it lies outside the accepted window."""
        if self._earliest <= time <= self._latest:
            self._days.add(time // (NS_PER_MINUTE * MINUTES_PER_DAY))
            return 0
        return Anomaly.TIME_OUTSIDE_WINDOW

    def _append(
        self, item: int, fields: Fields, anomalies: int, attributes: Mapping[str, Any], shared: Shared
    ) -> Fields:
        """Add a row and return its vector of fields."""
        plan = self._plan.rows
        picks = plan.no_picks
        if plan.always_picked or not plan.picks_by_key.keys().isdisjoint(attributes):
            picks, found = self._pick(fields, anomalies, attributes, shared)
            anomalies |= found
        anomalies_field = copy_format.int4_field(anomalies) if anomalies else _NO_ANOMALIES
        vector = (*fields, anomalies_field, *picks, *shared.fields)
        row = b"".join((plan.header, *plan.columns(vector)))
        self._row_bytes += len(row)
        if shared.resource_id not in self._resources:
            self._resources[shared.resource_id] = shared.resource_row
            self._size += len(shared.resource_row) + _RESOURCE
        if anomalies:
            self._anomalies[int(anomalies)] += 1
        self._rows.append(row)
        self._items.append(item)
        self._resource_ids.append(shared.resource_id)
        self._size += len(row) + self._overhead
        return vector

    def _pick(
        self, fields: Fields, anomalies: int, attributes: Mapping[str, Any], shared: Shared
    ) -> tuple[Fields, int]:
        """Make the item's picks; most have no attribute of theirs and are NULL without a search."""
        plan = self._plan.rows
        message = Message((*fields, copy_format.int4_field(anomalies)), attributes)
        messages = {**shared.messages, self._item_message: message}
        picks = list(plan.no_picks)
        found = 0
        hits = [index for key in attributes for index in plan.picks_by_key.get(key, ())]
        for index in {*hits, *plan.always_picked}:
            picks[index], bits = plan.item_picks[index](messages)
            found |= bits
        return tuple(picks), found


_STATUS_ERROR = 2  # OTLP's STATUS_CODE_ERROR


def _sum(field: bytes) -> int | None:
    return None if field == copy_format.NULL else int.from_bytes(field[4:], "big", signed=True)


def _refusal(span: Span) -> str | None:
    """Say why a span is refused: its ids are the key, and bad ones would make many spans collapse into one row."""
    trace_id, span_id = span.trace_id, span.span_id
    if len(trace_id) == TRACE_ID_BYTES and len(span_id) == SPAN_ID_BYTES and any(trace_id) and any(span_id):
        return None
    trace_fault = _id_fault("trace_id", span.trace_id, TRACE_ID_BYTES)
    span_fault = _id_fault("span_id", span.span_id, SPAN_ID_BYTES)
    return f"{trace_fault}; {span_fault}" if trace_fault and span_fault else trace_fault or span_fault


def _id_fault(name: str, identity: bytes, size: int) -> str | None:
    if not identity:
        return f"{name} is empty"
    if identity.startswith(NOT_HEX):
        return f"{name} is not {2 * size} hexadecimal digits"
    if len(identity) != size:
        return f"{name} has {len(identity):,} bytes, not {size}"
    return None if any(identity) else f"{name} is all zeros"
