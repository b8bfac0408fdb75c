"""The whole house in one process: a receiver on a real socket that writes to a real PostgreSQL."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_pg_exporter.config import (
    DatabaseSettings,
    MonitoringSettings,
    PipelineSettings,
    ReceiverSettings,
    ServeSettings,
    SpoolSettings,
)
from otel_pg_exporter.model import Signal
from otel_pg_exporter.service import Service
from tests.e2e.by_http import HttpSender
from tests.receiver.support import LOGS, TRACES, Client, refusal
from tests.workload import Database

Protocol = Literal["grpc", "http", "http json"]
PROTOCOLS: list[Protocol] = ["grpc", "http", "http json"]

# Both signals by gRPC, and either by HTTP, for tests that take their time.
WAYS: list[tuple[Signal, Protocol]] = [
    *((signal, "grpc") for signal in Signal),
    (Signal.TRACES, "http"),
    (Signal.LOGS, "http json"),
]

METHODS = {Signal.TRACES: TRACES, Signal.LOGS: LOGS}
OK = (0, "")  # what a sender hears when nothing was refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """A receiver that listens, the database that it writes to, and a client by one of its protocols."""

    address: str  # of OTLP/gRPC
    http_address: str
    protocol: Protocol = "grpc"
    database: Database
    service: Service
    client: Client

    def send(self, signal: Signal, body: bytes) -> tuple[int, str]:
        """Export once; return how many items were refused and the message about it."""
        return heard(self.client.export(METHODS[signal], body))

    def sender(self) -> contextlib.AbstractContextManager[Client]:
        """Open a connection of one's own."""
        return sender_of(self.address, self.http_address, self.protocol)

    @contextlib.contextmanager
    def speaking(self, protocol: Protocol) -> Iterator["Receiver"]:
        """Yield the same receiver with a client that speaks this protocol."""
        with sender_of(self.address, self.http_address, protocol) as client:
            yield replace(self, client=client, protocol=protocol)


def heard(answer: bytes) -> tuple[int, str]:
    """Read a response of either service; they are the same on the wire, and this holds them to it."""
    spans = ExportTraceServiceResponse.FromString(answer).partial_success
    records = ExportLogsServiceResponse.FromString(answer).partial_success
    assert (spans.rejected_spans, spans.error_message) == (records.rejected_log_records, records.error_message)
    return spans.rejected_spans, spans.error_message


@contextlib.contextmanager
def client_of(address: str) -> Iterator[Client]:
    # Without the first option, channels to the same address would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Client(channel)


@contextlib.contextmanager
def sender_of(address: str, http_address: str, protocol: Protocol) -> Iterator[Client]:
    if protocol == "grpc":
        with client_of(address) as client:
            yield client
    else:
        with contextlib.closing(HttpSender(http_address, as_json=protocol == "http json")) as sender:
            yield sender


@contextlib.contextmanager
def receiving(
    dsn: str,
    *,
    read_dsn: str = "",
    pipeline: PipelineSettings | None = None,
    database: DatabaseSettings | None = None,
    spool_dir: Path | None = None,
    spool_max_bytes: int = 2**30,
    shutdown_timeout: float = 20.0,
    protocol: Protocol = "grpc",
) -> Iterator[Receiver]:
    """Yield a receiver that writes to `dsn`; what it wrote is read through `read_dsn` (default: the same).

    It has a spool if it is given a folder for it. Its `ack_timeout` suits slow machines, unless `pipeline` has another.
    When it stops, every item that it received must be settled.
    """
    settings = ServeSettings(
        database=replace(database or DatabaseSettings(), dsn=dsn),
        pipeline=pipeline or PipelineSettings(ack_timeout=30),
        spool=SpoolSettings(spool=spool_dir is not None, spool_dir=spool_dir, spool_max_bytes=spool_max_bytes),
        receiver=ReceiverSettings(
            grpc_endpoint="127.0.0.1:0",
            http_endpoint="127.0.0.1:0",
            max_request_bytes=min(64 * 2**20, spool_max_bytes),
        ),
        monitoring=MonitoringSettings(metrics_endpoint="127.0.0.1:0"),
        shutdown_timeout=shutdown_timeout,
    )
    with Service(settings) as service:
        address, http_address = str(service.grpc_endpoint), str(service.http_endpoint)
        with sender_of(address, http_address, protocol) as client:
            reader = Database(dsn=read_dsn or dsn, writer=service._database.writer, statistics=service._statistics)
            yield Receiver(
                address=address,
                http_address=http_address,
                protocol=protocol,
                database=reader,
                service=service,
                client=client,
            )
    counts = service.counts()
    assert counts.in_flight == 0
    assert counts.balanced, counts


def persist(client: Client, signal: Signal, body: bytes, *, timeout: float = 120.0) -> tuple[int, str]:
    """Export as SDKs do, again and again while the answer is UNAVAILABLE with a RetryInfo; return the last answer."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        try:
            return heard(client.export(METHODS[signal], body))
        except grpc.RpcError as exc:
            refused = refusal(exc)
            assert refused.code is grpc.StatusCode.UNAVAILABLE, refused
            assert refused.retry_delay == 1  # in both trailers; a test need not wait that long
            assert time.monotonic() < deadline, refused
        pause.wait(0.1)
