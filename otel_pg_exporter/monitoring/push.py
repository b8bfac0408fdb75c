"""Our metrics sent away by OTLP/gRPC, at intervals; where they go to may be dead without anybody's harm."""

import logging
import re
import time
from collections.abc import Callable

from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

from otel_pg_exporter.config import MonitoringSettings
from otel_pg_exporter.errors import ConfigurationError, StartupError

_SETTING = "--self-metrics-endpoint (OTEL_PG_EXPORTER_SELF_METRICS_ENDPOINT)"
_URL = re.compile(r"(https?)://[^\s/@]+(:\d+)?/?")

_LONGEST_EXPORT = 10.0  # seconds

# Who logs when sending fails, as often as that is tried.
_LOUD = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk.metrics._internal.export")
_NOTICE_INTERVAL = 300.0  # seconds


def otlp_readers(settings: MonitoringSettings) -> list[MetricReader]:
    """Return what sends metrics to `self_metrics_endpoint`, if that is set. Raises StartupError.

    Its thread sends and waits; nothing else ever does.
    """
    endpoint = settings.self_metrics_endpoint
    if not endpoint:
        return []
    if (url := _URL.fullmatch(endpoint)) is None:
        raise ConfigurationError(
            f"{_SETTING} is no URL of an OTLP/gRPC receiver, as http://collector:4317 (user and password go elsewhere:"
            " OTEL_EXPORTER_OTLP_HEADERS)"
        )
    try:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    except ImportError as exc:
        raise StartupError(
            f"{_SETTING} needs the extra `otlp-metrics`: pip install 'otel-pg-exporter[otlp-metrics]'"
        ) from exc
    for name in _LOUD:
        logging.getLogger(name).addFilter(_seldom)
    timeout = min(_LONGEST_EXPORT, settings.self_metrics_interval)
    exporter = OTLPMetricExporter(endpoint=endpoint, insecure=url[1] == "http", timeout=timeout)
    return [
        PeriodicExportingMetricReader(
            exporter,
            export_interval_millis=settings.self_metrics_interval * 1000,
            export_timeout_millis=timeout * 1000,
        )
    ]


class _Seldom(logging.Filter):
    """Lets a line of code log once in five minutes, without its stack trace. Of two threads both may get through."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._last: dict[int, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide about a record."""
        now = self._clock()
        if now - self._last.get(record.lineno, float("-inf")) < _NOTICE_INTERVAL:
            return False
        self._last[record.lineno] = now
        record.exc_info = record.exc_text = None
        return True


_seldom = _Seldom()
