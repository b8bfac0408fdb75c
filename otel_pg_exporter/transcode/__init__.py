"""Telemetry in, binary COPY rows out."""

from otel_pg_exporter.transcode.plan import Plan, compile_plan
from otel_pg_exporter.transcode.wire import transcode

__all__ = ["CORE", "Plan", "compile_plan", "transcode"]

CORE = "Python reference"
"""Which core `transcode` is."""
