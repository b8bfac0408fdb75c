"""Metrics: refused politely, so that an app with its distribution's defaults stays quiet."""

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from otel_pg_exporter.errors import UndecodableError
from otel_pg_exporter.receiver.status import partial_success


def refuse_metrics(body: bytes) -> bytes:
    """Return the response to a metrics request: OK, with every data point rejected.

    An error status in its place would make SDKs log an error, or retry, every minute.
    Raises UndecodableError.
    """
    try:
        request = ExportMetricsServiceRequest.FromString(body)
    except DecodeError as exc:
        raise UndecodableError(f"{len(body):,} bytes are no ExportMetricsServiceRequest: {exc}") from exc
    points = _count_data_points(request)
    if points == 0:
        return b""
    return partial_success(
        points,
        f"metrics are not stored here, only traces and logs: {points:,} data points rejected; "
        "set OTEL_METRICS_EXPORTER=none, or send metrics elsewhere (OTEL_EXPORTER_OTLP_METRICS_ENDPOINT)",
    )


def _count_data_points(request: ExportMetricsServiceRequest) -> int:
    points = 0
    for resource_metrics in request.resource_metrics:
        for scope_metrics in resource_metrics.scope_metrics:
            for metric in scope_metrics.metrics:
                kind = metric.WhichOneof("data")
                if kind is not None:
                    points += len(getattr(metric, kind).data_points)
    return points
