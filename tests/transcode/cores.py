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
    said = {field.name: getattr(batch, field.name) for field in fields(batch)}
    plain = {name: list(said[name]) for name in _SEQUENCES}
    return {**said, **plain, "otlp": [batch.otlp(item) for item in range(min(batch.item_count, _CUT_OUT))]}
