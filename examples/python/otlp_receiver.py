"""Front door 1: the app speaks OTLP, as to any collector, and `otel-pg-exporter serve` writes into PostgreSQL.

`python -m examples.python.otlp_receiver` runs the shop, `python -m examples.otlp_receiver genai` the assistant.
OTEL_EXPORTER_OTLP_ENDPOINT names the receiver, where that is not http://localhost:4317. Only the exporters differ from
`sdk_exporter.py`; apps in other languages are set up alike.
"""

import logging
import sys

from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from examples.python import genai, shop


def instrument(service: str) -> TracerProvider:
    """Send a service's spans, and what its logger logs, to the receiver that the environment names."""
    resource = Resource.create({"service.name": service})

    spans = TracerProvider(resource=resource)
    spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    logs = LoggerProvider(resource=resource)
    logs.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
    logging.getLogger(service).addHandler(LoggingHandler(logger_provider=logs))

    return spans  # both providers flush when Python exits


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if sys.argv[1:] == ["genai"]:
        genai.main(instrument("assistant"))
    else:
        shop.main(instrument("shop"), instrument("payments"))  # two services, which else were two processes
