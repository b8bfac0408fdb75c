"""Telemetry in, binary COPY rows out."""

from otel_pg_exporter.transcode.core import CORE, compile_plan, extension, transcode
from otel_pg_exporter.transcode.plan import Plan

__all__ = ["CORE", "Plan", "compile_plan", "extension", "transcode"]
