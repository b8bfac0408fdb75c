"""A day of a shop's telemetry, with all that the cookbook's questions are about: `from tests.sample import fill`."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from otel_pg_exporter.model import Signal
from tests.e2e.support import receiving

NEW, OLD = "1.5.0", "1.4.0"
RELEASED = 180  # minutes ago
GAP = range(90, 95)  # minutes ago, in which nothing came
FULL_DISK = 15  # minutes ago, an error that never came before
SLOW = 42  # minutes ago, when everything took seconds
MINUTES = [*range(2, 360), *range(360, 26 * 60, 10)]  # ago; an order in each, but for the gap
CUSTOMERS = ("c-1001", "c-1002", "c-1003", "c-1004")
MILLISECOND = 1_000_000

SERVER, CLIENT = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT


@dataclass(slots=True)
class Telemetry:
    """Spans and log records by service and version, ready to be sent."""

    now: int
    spans: dict[tuple[str, str], list[Span]] = field(default_factory=dict)
    records: list[LogRecord] = field(default_factory=list)
    number: int = 0

    def span(
        self,
        name: str,
        start: int,
        milliseconds: int = 1,
        *,
        service: tuple[str, str] = ("shop", NEW),
        parent: Span | None = None,
        attributes: Mapping[str, str | int] | None = None,
        **fields: Any,  # noqa: ANN401 - protobuf's own
    ) -> Span:
        """Add a span; its trace is that of its parent, or a new one."""
        self.number += 1
        made = Span(
            name=name,
            span_id=self.number.to_bytes(8, "big"),
            trace_id=self.number.to_bytes(16, "big"),
            start_time_unix_nano=start,
            end_time_unix_nano=start + milliseconds * MILLISECOND,
        )
        if parent is not None:
            made.trace_id, made.parent_span_id = parent.trace_id, parent.span_id
        made.MergeFrom(Span(**fields))
        for key, value in (attributes or {}).items():
            kind = "int_value" if isinstance(value, int) else "string_value"
            setattr(made.attributes.add(key=key).value, kind, value)
        self.spans.setdefault(service, []).append(made)
        return made

    def log(self, body: str, span: Span, severity: SeverityNumber.ValueType) -> None:
        """Add a record of a span's last moment."""
        made = LogRecord(
            time_unix_nano=span.end_time_unix_nano,
            severity_number=severity,
            trace_id=span.trace_id,
            span_id=span.span_id,
        )
        made.body.string_value = body
        self.records.append(made)

    def order(self, minutes: int) -> None:
        """Take an order so many minutes ago: the shop asks its database, and has its customer charged."""
        began = self.now - minutes * 60_000 * MILLISECOND
        shop = ("shop", NEW if minutes <= RELEASED else OLD)
        failed = minutes % 29 == 0 or minutes == FULL_DISK
        message = "no space left on device" if minutes == FULL_DISK else "the bank refused"
        root = self.span(
            "POST /orders",
            began,
            5_000 if minutes == SLOW else 20 + minutes % 10,
            service=shop,
            kind=SERVER,
            status=error(message) if failed else None,
            attributes={
                "http.route": "/orders",
                "http.response.status_code": 500 if failed else 201,
                "shop.customer.id": CUSTOMERS[minutes % 4],
            },
        )
        for item in range(12 if minutes % 7 == 0 else 1):
            self.span("SELECT items", began + (item + 1) * MILLISECOND, service=shop, parent=root, kind=CLIENT)
        for attempt, trouble in enumerate(("timeout", "") if minutes % 13 == 0 else ("",)):
            start = began + (13 + 3 * attempt) * MILLISECOND
            status = error(trouble) if trouble else None
            charge = self.span("POST /charge", start, 2, service=shop, parent=root, kind=CLIENT, status=status)
            self.span("POST /charge", start, 2, service=("payments", "1.0"), parent=charge, kind=SERVER)
        severity = SeverityNumber.SEVERITY_NUMBER_ERROR if failed else SeverityNumber.SEVERITY_NUMBER_INFO
        self.log(f"order {minutes}: {message if failed else 'placed'}", root, severity)

    def oddities(self) -> None:
        """Add what is not as it should be."""
        mail, recently = ("mail", "1.0"), self.now - 30 * 60_000 * MILLISECOND
        self.span("consume", recently, service=mail, parent=Span(trace_id=b"\7" * 16, span_id=b"\7" * 8))
        self.span("nul\0", recently, service=mail)
        self.span("at the epoch", 1, service=mail)
        self.span("without an id", recently, service=mail).trace_id = b""

    def requests(self) -> Iterator[tuple[Signal, bytes]]:
        """Yield requests as an SDK would send them."""
        for (service, version), spans in self.spans.items():
            request = ExportTraceServiceRequest()
            group = request.resource_spans.add(resource=resource(service, version))
            group.scope_spans.add(scope=InstrumentationScope(name="by.hand")).spans.extend(spans)
            yield Signal.TRACES, request.SerializeToString()
        logs = ExportLogsServiceRequest()
        logs.resource_logs.add(resource=resource("shop", NEW)).scope_logs.add().log_records.extend(self.records)
        yield Signal.LOGS, logs.SerializeToString()


def error(message: str) -> Status:
    return Status(code=Status.STATUS_CODE_ERROR, message=message)


def resource(service: str, version: str) -> Resource:
    made = Resource()
    values = {"service.name": service, "service.version": version, "service.instance.id": f"{service}-1"}
    for key, value in values.items():
        made.attributes.add(key=key).value.string_value = value
    return made


def fill(dsn: str) -> None:
    """Send the day through a receiver, and have both examples write through the SDK exporters."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PG"))}
    examples = [
        subprocess.Popen(
            [sys.executable, "-m", "examples.python.sdk_exporter", *arguments],
            env={**environment, "OTEL_EXPORTER_POSTGRESQL_DSN": dsn},
            stderr=subprocess.DEVNULL,
        )
        for arguments in ([], ["genai"])
    ]
    day = Telemetry(now=time.time_ns())
    for minutes in MINUTES:
        if minutes not in GAP:
            day.order(minutes)
    day.oddities()
    with receiving(dsn) as receiver:
        for signal, body in day.requests():
            receiver.send(signal, body)
    assert [example.wait(timeout=120) for example in examples] == [0, 0]
