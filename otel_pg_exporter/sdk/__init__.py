"""Exporters for the OpenTelemetry SDK, which write straight into PostgreSQL."""

from otel_pg_exporter.sdk.exporters import PostgresLogRecordExporter, PostgresSpanExporter

__all__ = ["PostgresLogRecordExporter", "PostgresSpanExporter"]
