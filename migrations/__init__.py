"""Numbered SQL files, applied in order by `otel_pg_exporter.postgres.migrate`."""
