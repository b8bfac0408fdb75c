# ruff: noqa: ANN401 - both cores' plans
"""Holds both cores to each other, byte for byte, where there are two."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from otel_pg_exporter.errors import ExporterError
from otel_pg_exporter.model import RowBatch
from otel_pg_exporter.transcode import extension, wire
from tests.transcode.support import NOW

_SEQUENCES = ("rows", "keys", "facts", "items", "resource_ids", "rejected")
_CALLABLES = ("otlp", "identify")
_CUT_OUT = 20  # items of a request that are cut out


def assert_equal(plan: Any, body: bytes, **options: Any) -> None:
    """Let both cores transcode; they must say the same."""
    if extension is None:
        return
    from otel_pg_exporter.transcode import native

    assert _said(native.transcode, plan, body, **options) == _said(wire.transcode, plan, body, **options)


def _said(transcode: Callable[..., RowBatch], plan: Any, body: bytes, **options: Any) -> object:
    """Return all that a core says, in plain values."""
    try:
        batch = transcode(plan, body, now_ns=NOW, **options)
    except ExporterError as exc:
        return type(exc), str(exc)
    return {**plain(batch), "otlp": [batch.otlp(item) for item in range(min(batch.item_count, _CUT_OUT))]}


def plain(batch: RowBatch) -> dict[str, Any]:
    """Return all that a batch holds but `otlp`, in values that compare alike whichever core made them."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in _CALLABLES}
    return {**found, **{name: list(found[name]) for name in _SEQUENCES}, "request_id": batch.request_id}
