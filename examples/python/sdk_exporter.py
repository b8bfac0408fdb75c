"""Front door 2: the app writes straight into PostgreSQL, through the exporters for the OpenTelemetry SDK.

export OTEL_EXPORTER_POSTGRESQL_DSN=postgresql://app@db.example/telemetry
python -m examples.python.sdk_exporter          # the shop
python -m examples.python.sdk_exporter genai    # the assistant
"""

import logging
import sys

from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from examples.python import genai, shop
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter


def instrument(service: str) -> TracerProvider:
    """Send a service's spans, and what its logger logs, to the PostgreSQL that the environment names."""
    resource = Resource.create({"service.name": service})

    spans = TracerProvider(resource=resource)
    spans.add_span_processor(BatchSpanProcessor(PostgresSpanExporter()))

    logs = LoggerProvider(resource=resource)
    logs.add_log_record_processor(BatchLogRecordProcessor(PostgresLogRecordExporter()))
    logging.getLogger(service).addHandler(LoggingHandler(logger_provider=logs))

    return spans  # both providers flush when Python exits


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if sys.argv[1:] == ["genai"]:
        genai.main(instrument("assistant"))
    else:
        shop.main(instrument("shop"), instrument("payments"))  # two services, which else were two processes
