"""Metrics: refused politely, so that an app with its distribution's defaults stays quiet."""

from collections.abc import Iterator

from otel_pg_exporter.errors import TooLargeError, UndecodableError
from otel_pg_exporter.model import Hold
from otel_pg_exporter.receiver.status import partial_success
from otel_pg_exporter.transcode.protobuf_wire import MalformedError, fields

# From the request: resource_metrics, scope_metrics, metrics.
_PATH = (1, 2, 2)
_DATA = {5, 7, 9, 10, 11}  # gauge, sum, histogram, exponential_histogram, summary
_DATA_POINTS = 1
_MOST_FIELDS = 1_000_000


def refuse_metrics(body: bytes, _hold: Hold) -> bytes:
    """Return the response to a metrics request: OK, with every data point rejected.

    An error status in its place would make SDKs log an error, or retry, every minute. The points are counted without
    decoding them, which a hostile body could make cost a hundred times its size. Raises UndecodableError and
    TooLargeError.
    """
    try:
        points = _count_data_points(body)
    except MalformedError as exc:
        raise UndecodableError(f"{len(body):,} bytes are no ExportMetricsServiceRequest: {exc}") from exc
    if points == 0:
        return b""
    return partial_success(
        points,
        f"metrics are not stored here, only traces and logs: {points:,} data points rejected; "
        "set OTEL_METRICS_EXPORTER=none, or send metrics elsewhere (OTEL_EXPORTER_OTLP_METRICS_ENDPOINT)",
    )


def _count_data_points(body: bytes) -> int:
    points = 0
    for seen, is_point in enumerate(_walk(body, 0, len(body), _PATH)):
        if seen == _MOST_FIELDS:
            raise TooLargeError(f"the request has more than {_MOST_FIELDS:,} fields; metrics are not stored here")
        points += is_point
    return points


def _walk(body: bytes, start: int, end: int, path: tuple[int, ...]) -> Iterator[bool]:
    """Walk down `path`, then through the metrics' data; say of each field that is met whether it is a data point."""
    for field in fields(body, start, end):
        yield False
        if not field.delimited:
            continue
        if not path:
            if field.number in _DATA:
                for inner in fields(body, field.content, field.end):
                    yield inner.delimited and inner.number == _DATA_POINTS
        elif field.number == path[0]:
            yield from _walk(body, field.content, field.end, path[1:])
