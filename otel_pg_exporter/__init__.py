"""OpenTelemetry traces and logs in PostgreSQL."""
