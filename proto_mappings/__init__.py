"""TOML files that declare tables and columns, read by `otel_pg_exporter.mapping`."""
