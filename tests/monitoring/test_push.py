"""Our own metrics sent to a real OTLP receiver; one that is dead harms nobody."""

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc

from otel_pg_exporter.config import MonitoringSettings
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.monitoring.push import otlp_readers
from otel_pg_exporter.service import Service
from tests.receiver.support import TRACES
from tests.support import wait_until
from tests.test_service import client, settings
from tests.workload import span, trace_body


class Backend(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the last export; `_lock` guards it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: metrics_service_pb2.ExportMetricsServiceRequest | None = None

    def Export(  # noqa: N802 - gRPC's name
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        with self._lock:
            self._last = request
        return metrics_service_pb2.ExportMetricsServiceResponse()

    @property
    def resource(self) -> dict[str, str]:
        with self._lock:
            assert self._last is not None
            attributes = self._last.resource_metrics[0].resource.attributes
        return {each.key: each.value.string_value for each in attributes}

    def value(self, name: str) -> float | None:
        """Add up the points of a sum, or of a histogram's counts; None if it has not come."""
        with self._lock:
            groups = [] if self._last is None else self._last.resource_metrics[0].scope_metrics
            for metric in (metric for group in groups for metric in group.metrics if metric.name == name):
                if metric.WhichOneof("data") == "histogram":
                    return sum(point.count for point in metric.histogram.data_points)
                return sum(point.as_int or point.as_double for point in metric.sum.data_points)
        return None


@contextmanager
def backend() -> Iterator[tuple[Backend, str]]:
    served = Backend()
    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(served, server)  # type: ignore[no-untyped-call] # generated
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield served, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


def pushing(endpoint: str, interval: float = 0.2) -> MonitoringSettings:
    return MonitoringSettings(
        metrics_endpoint="none", self_metrics_endpoint=endpoint, self_metrics_interval=interval, log_level="info"
    )


def test_an_otlp_receiver_gets_all_metrics_at_intervals_and_once_more_at_the_end(dsn: str) -> None:
    with backend() as (kept, endpoint):
        with Service(replace(settings(dsn), monitoring=pushing(endpoint))) as service, client(service) as sender:
            assert service.metrics_endpoint is None
            sender.export(TRACES, trace_body([span(0), span(1)]))
            wait_until(lambda: kept.value("otel_pg_exporter.items.stored") == 2)
            wait_until(lambda: kept.value("rpc.server.call.duration") == 1)
            assert kept.value("db.client.connection.max") is not None
            assert kept.resource["service.name"] == "otel-pg-exporter"
        with Service(replace(settings(dsn), monitoring=pushing(endpoint, 3600))) as service, client(service) as sender:
            sender.export(TRACES, trace_body([span(2)]))
        wait_until(lambda: kept.value("otel_pg_exporter.items.stored") == 1)


def test_a_dead_backend_is_logged_now_and_then_and_delays_neither_exports_nor_the_stop(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Service(replace(settings(dsn), monitoring=pushing(endpoint))) as service, client(service) as sender:
            began = time.monotonic()
            while time.monotonic() < began + 3:
                assert sender.export(TRACES, trace_body([span(0)])) == b""
            stopping = time.monotonic()
    assert time.monotonic() - stopping < 30
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) <= 4
    assert all("Traceback" not in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector", "http://user:secret@host:1", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="--self-metrics-endpoint") as caught:
        otlp_readers(MonitoringSettings(self_metrics_endpoint=endpoint))
    assert "secret" not in str(caught.value)


def test_a_missing_extra_is_named() -> None:
    script = (
        "import sys\n"
        "sys.modules['opentelemetry.exporter.otlp.proto.grpc.metric_exporter'] = None\n"
        "from otel_pg_exporter.config import MonitoringSettings\n"
        "from otel_pg_exporter.monitoring.push import otlp_readers\n"
        "otlp_readers(MonitoringSettings(self_metrics_endpoint='http://collector:4317'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (
        "StartupError: --self-metrics-endpoint (OTEL_PG_EXPORTER_SELF_METRICS_ENDPOINT) needs the extra" in done.stderr
    )
    assert "pip install 'otel-pg-exporter[otlp-metrics]'" in done.stderr
