"""Our metrics in OpenTelemetry's SDK: one provider, which Prometheus reads and, if wanted, OTLP carries away."""

import importlib.metadata
import inspect
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Literal, TypeVar

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import REGISTRY, CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from otel_pg_exporter.model import Signal
from otel_pg_exporter.monitoring import groups, histograms
from otel_pg_exporter.monitoring.definition import Definition, Group, Histogram, Kind
from otel_pg_exporter.telemetry import BatchReport
from otel_pg_exporter.transcode import CORE

R = TypeVar("R")

_NAME = "otel-pg-exporter"
_GRPC_OK = "OK"
_FIRST_HTTP_FAILURE = "400"


class Metrics:
    """All metrics of one service, apart from those of the application's own provider.

    What is counted anyway is read when somebody asks. Values are recorded once a call or once a batch, from any thread.
    """

    def __init__(self, readers: Sequence[MetricReader] = (), *, scheme: Literal["http", "https"] = "http") -> None:
        """Make the instruments; `readers` are told of all of them, beside Prometheus. `scheme` is OTLP/HTTP's."""
        self._scheme = scheme
        version = importlib.metadata.version(_NAME)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._readers = readers
        provider = MeterProvider(
            [_prometheus_reader(self._registry), *readers],
            resource=Resource(
                {"service.name": _NAME, "service.version": version, "service.instance.id": str(uuid.uuid4())}
            ),
            exemplar_filter=AlwaysOffExemplarFilter(),  # nobody traces us
            shutdown_on_exit=False,
        )
        self._meter = provider.get_meter(_NAME, version)
        self._rpc = self._histogram(histograms.RPC_DURATION)
        self._http = self._histogram(histograms.HTTP_DURATION)
        self._rows = self._histogram(histograms.BATCH_ROWS)
        self._bytes = self._histogram(histograms.BATCH_BYTES)
        self._transaction = self._histogram(histograms.TRANSACTION)
        self._lag = self._histogram(histograms.LAG)
        self._signals = {signal: {"signal": signal.value} for signal in Signal}
        self.observe(groups.BUILD, lambda: {"version": version, "core": CORE})

    def observe(self, group: Group[R], read: Callable[[], R | None]) -> None:
        """Show a group's metrics from now on, whenever somebody asks; `read` returns None while there is nothing."""
        reading = _Reading(read)
        for instrument in group.instruments:
            first = instrument is group.instruments[0]
            self._create(instrument.definition, reading.callback(instrument.observe, first=first))

    def answered(self, called: str, status: str, seconds: float) -> None:
        """Record a call, as an `Answered` is told of it."""
        attributes: dict[str, str | int]
        method, http, route = called.partition(" ")
        if http:
            histogram, failed = self._http, status >= _FIRST_HTTP_FAILURE
            attributes = {
                "http.request.method": method,
                "http.response.status_code": int(status),
                "url.scheme": self._scheme,
            }
            if route:
                attributes["http.route"] = route
        else:
            histogram, failed = self._rpc, status != _GRPC_OK
            attributes = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": status}
        if failed:
            attributes["error.type"] = status
        histogram.record(seconds, attributes)

    def committed(self, report: BatchReport) -> None:
        """Record a batch."""
        signal = self._signals[report.signal]
        self._rows.record(report.rows, signal)
        self._bytes.record(report.bytes, signal)
        self._transaction.record(report.seconds, signal)
        if report.lag is not None:
            self._lag.record(report.lag)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics as Prometheus reads them, and the content type; for one thread at a time."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def shut_down(self, timeout: float) -> None:
        """Tell the readers a last time, each within about `timeout` seconds."""
        for reader in self._readers:
            reader.shutdown(timeout_millis=timeout * 1000)

    def _histogram(self, histogram: Histogram) -> metrics.Histogram:
        made = histogram.definition
        return self._meter.create_histogram(
            made.name,
            made.unit,
            made.description,
            explicit_bucket_boundaries_advisory=histogram.boundaries,
        )

    def _create(self, made: Definition, callback: "_Callback") -> None:
        create = {
            Kind.COUNTER: self._meter.create_observable_counter,
            Kind.UP_DOWN_COUNTER: self._meter.create_observable_up_down_counter,
            Kind.GAUGE: self._meter.create_observable_gauge,
        }[made.kind]
        create(made.name, [callback], made.unit, made.description)


def _prometheus_reader(registry: CollectorRegistry) -> MetricReader:
    """Return a reader for a registry of its own; before version 0.64b0 it knew only the one that all share."""
    if "registry" in inspect.signature(PrometheusMetricReader).parameters:
        return PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    reader = PrometheusMetricReader()
    REGISTRY.unregister(reader._collector)  # noqa: SLF001 - there is no other way
    registry.register(reader._collector)  # noqa: SLF001
    return reader


_Callback = Callable[[CallbackOptions], Iterable[Observation]]


class _Reading(Generic[R]):
    """One reading for all metrics of a group: taken for the first of them, and shared by the others.

    The SDK asks for all metrics one after the other, in the order in which they were made, for one reader at a time.
    """

    def __init__(self, read: Callable[[], R | None]) -> None:
        self._read = read
        self._found: R | None = None

    def callback(self, observe: Callable[[R], Iterable[Observation]], *, first: bool) -> _Callback:
        """Return what the SDK is to call for a metric of the group."""

        def observed(_options: CallbackOptions) -> Iterable[Observation]:
            if first:
                self._found = self._read()
            return () if self._found is None else observe(self._found)

        return observed
