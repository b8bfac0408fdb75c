"""The native core behind the reference's signatures.

What the core finds odd it leaves to the reference, the whole request: see `native/src/lib.rs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, partial

from otel_pg_exporter import _native
from otel_pg_exporter.mapping import FIELDS, Mapping
from otel_pg_exporter.model import Anomaly, Hold, Rejection, RowBatch, Signal, Window, unbounded
from otel_pg_exporter.transcode import plan as reference_plan
from otel_pg_exporter.transcode import rows, wire
from otel_pg_exporter.transcode.framing import OneItemRequests
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.plan import Pick, Plan, RowPlan

if {message: len(names) for message, names in FIELDS.items()} != _native.FIELDS:
    raise ImportError("the native core was built for other fields than mapping.FIELDS has")


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePlan(Plan):
    """A plan that both cores can follow."""

    native: _native.Plan


def compile_plan(mapping: Mapping, signal: Signal, window: Window) -> NativePlan:
    """Compile the mapping for one signal."""
    plan = reference_plan.compile_plan(mapping, signal, window)
    return NativePlan(
        **{field.name: getattr(plan, field.name) for field in fields(plan)},
        native=_native.Plan(signal.value, _row_plan(plan.rows), _row_plan(plan.resources)),
    )


def transcode(
    plan: Plan,
    body: bytes,
    *,
    now_ns: int,
    request_id: bytes | None = None,
    hold: Hold = unbounded,
    limits: Limits = wire.LIMITS,
) -> RowBatch:
    """Make rows of an OTLP export request, as `wire.transcode` does. Raises what that raises."""
    if not isinstance(plan, NativePlan):
        raise TypeError("the plan was not compiled for the native core")
    batch = attempt(plan, body, request_id, now_ns=now_ns, hold=hold, limits=limits)
    if batch is None:
        return wire.transcode(plan, body, now_ns=now_ns, request_id=request_id, hold=hold, limits=limits)
    return batch


def attempt(
    plan: NativePlan, body: bytes, request_id: bytes | None, *, now_ns: int, hold: Hold, limits: Limits
) -> RowBatch | None:
    """Make rows, if the native core can."""
    made = _native.transcode(
        plan.native,
        body,
        request_id,
        now_ns=now_ns,
        window=(now_ns - int(plan.window.past * 1e9), now_ns + int(plan.window.future * 1e9)),
        limits=(limits.parts, limits.fields, limits.text_bytes),
        room=(rows.MAX_BATCH_BYTES, rows.MAX_SHARED_BYTES),
        hold=None if hold is unbounded else hold,
    )
    if made is None:
        return None
    request_id, row_data, keys, facts, items, resource_ids, resources, days, rejected, repairs, size = made
    return RowBatch(
        signal=plan.signal,
        received_at=now_ns,
        rows=row_data,
        keys=keys,
        facts=facts,
        items=range(len(row_data)) if items is None else items,
        resource_ids=resource_ids,
        resources=resources,
        days=frozenset(days),
        rejected=[Rejection(item=item, reason=reason) for item, reason in rejected],
        repairs={Anomaly(1 << bit): count for bit, count in enumerate(repairs) if count},
        size=size,
        otlp=OneItemRequests(body, hold),
        identify=cache(partial(wire.identify, plan.signal, body)) if request_id is None else lambda: request_id,
    )


def _row_plan(plan: RowPlan) -> "_native.RowArguments":
    return (*plan.positions, _picks(plan.item_picks), _picks(plan.shared_picks), plan.service_name)


def _picks(picks: Sequence[Pick]) -> "list[_native.PickArguments]":
    return [(str(pick.type), pick.max_bytes, list(pick.sources)) for pick in picks]
