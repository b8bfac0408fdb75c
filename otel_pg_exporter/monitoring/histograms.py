"""Every metric to which a value is added once a call or once a batch, with its buckets: else as `groups`."""

from otel_pg_exporter.monitoring.definition import Definition, Histogram, Kind

_P = "otel_pg_exporter"

# From a millisecond, which a small batch takes on a fast disk, to the half minute that a statement may take.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# SDKs and Collectors wait a few seconds; what went through the spool is older.
_LAG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21_600.0, 86_400.0)
_ROWS = (1.0, 10.0, 100.0, 500.0, 1_000.0, 2_500.0, 5_000.0, 10_000.0, 20_000.0, 50_000.0)
_BYTES = tuple(float(4**power * 1024) for power in range(9))  # 1 KiB to 64 MiB


def _histogram(name: str, unit: str, description: str, boundaries: tuple[float, ...], *attributes: str) -> Histogram:
    return Histogram(
        definition=Definition(
            name=name, kind=Kind.HISTOGRAM, unit=unit, description=description, attributes=attributes
        ),
        boundaries=boundaries,
    )


RPC_DURATION = _histogram(
    "rpc.server.call.duration",
    "s",
    "Export calls by gRPC, from their arrival to their answer, those refused unread too. What gRPC itself cuts off"
    " (larger than `--max-request-bytes`, or a sender that has gone) is CANCELLED here, seldom INVALID_ARGUMENT.",
    _SECONDS,
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
    "error.type",
)
HTTP_DURATION = _histogram(
    "http.server.request.duration",
    "s",
    "Requests by HTTP, from their headers' arrival to their answer, those refused unread too. Those for another path"
    " have no route.",
    _SECONDS,
    "http.request.method",
    "http.route",
    "http.response.status_code",
    "url.scheme",
    "error.type",
)
BATCH_ROWS = _histogram(f"{_P}.batch.rows", "{row}", "Rows that a transaction stored.", _ROWS, "signal")
BATCH_BYTES = _histogram(f"{_P}.batch.size", "By", "Row data that a transaction sent.", _BYTES, "signal")
TRANSACTION = _histogram(
    f"{_P}.transaction.duration",
    "s",
    "Transactions that stored rows, from their first statement to the COMMIT's answer.",
    _SECONDS,
    "signal",
)
LAG = _histogram(
    f"{_P}.lag",
    "s",
    "From the end of spans to the COMMIT's answer, once a batch: the median of up to 63 of its traces, of each the span"
    " that ended last in the batch. By the senders' clocks: 0 where they run ahead of ours.",
    _LAG,
)

HISTOGRAMS: tuple[Histogram, ...] = (RPC_DURATION, HTTP_DURATION, BATCH_ROWS, BATCH_BYTES, TRANSACTION, LAG)
