"""The command line: the only place that prints or exits."""

from otel_pg_exporter.cli.main import main

__all__ = ["main"]
