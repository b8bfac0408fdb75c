"""What others see of a service: its metrics, its health, and whether it takes exports.

It begins before PostgreSQL starts, so that `/healthz` answers meanwhile, and ends after all else.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.monitoring import groups
from otel_pg_exporter.monitoring.endpoint import ENDPOINT_SETTING, MonitoringEndpoint, Vitals
from otel_pg_exporter.monitoring.metrics import Metrics
from otel_pg_exporter.monitoring.push import otlp_readers
from otel_pg_exporter.monitoring.watch import Watch
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.ticker import Ticker
from otel_pg_exporter.receiver.endpoint import Endpoint, optional_endpoint
from otel_pg_exporter.telemetry import ItemCounters, Statistics

# Seconds that the last metrics may take on their way, and what they get of them when a stop has used up its time.
_LAST_SENDING, _LEAST_SENDING = 2.0, 0.1


class Watching:
    """Shows one service; set up from one thread, while its parts start."""

    def __init__(self, settings: ServeSettings) -> None:
        """Check the endpoint's spelling; nothing is touched before `start`."""
        self._settings = settings
        endpoint = settings.monitoring.metrics_endpoint
        self.endpoint: Endpoint | None = optional_endpoint(endpoint, setting=ENDPOINT_SETTING)
        """Where `/metrics`, `/healthz` and `/readyz` are; once started, with the real port."""
        self.vitals = Vitals()
        self.watch = Watch()

    def start(
        self, stack: ExitStack, remaining: Callable[[], float], counters: ItemCounters, statistics: Statistics
    ) -> None:
        """Show what there is; `stack` ends it. Raises StartupError."""
        settings = self._settings
        scheme: Literal["http", "https"] = "http" if settings.security.tls_cert is None else "https"
        metrics = self.metrics = Metrics(otlp_readers(settings.monitoring), scheme=scheme)
        stack.callback(lambda: metrics.shut_down(max(min(remaining(), _LAST_SENDING), _LEAST_SENDING)))
        statistics.observe = metrics.committed
        metrics.observe(groups.ITEMS, counters.by_signal)
        metrics.observe(groups.STATISTICS, statistics.snapshot)
        metrics.observe(groups.CONDITION, lambda: self.watch.condition)
        metrics.observe(groups.SPOOL, lambda: self.watch.condition.spool)
        if self.endpoint is not None:
            served = MonitoringEndpoint(
                self.endpoint, metrics, self.vitals, self.watch, reuse_port=settings.receiver.reuse_port
            )
            stack.callback(served.stop)
            self.endpoint = replace(self.endpoint, port=served.start())

    def look(
        self,
        stack: ExitStack,
        remaining: Callable[[], float],
        availability: Availability,
        probe: Callable[[], None],
        spool: Spool | None,
    ) -> None:
        """Look at readiness from now on, in a thread that no other job delays."""
        self.watch.begin(availability, probe, spool)
        ticker = Ticker([self.watch.job], name="readiness")
        stack.callback(lambda: ticker.stop(remaining()))
        self.vitals.add("readiness", lambda: ticker.alive)
