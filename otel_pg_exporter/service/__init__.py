"""The receiver put together: what is started and stopped in which order, and what runs beside."""

from otel_pg_exporter.service.service import Service

__all__ = ["Service"]
