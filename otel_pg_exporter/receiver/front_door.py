"""The front door: OTLP/gRPC and OTLP/HTTP with one intake, opened and closed together."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from otel_pg_exporter.config import ReceiverSettings, SecuritySettings
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.model import Hold, Outcome, Signal
from otel_pg_exporter.pipeline.admission import ByteBudget
from otel_pg_exporter.receiver import grpc as otlp_grpc
from otel_pg_exporter.receiver import otlp_http
from otel_pg_exporter.receiver.endpoint import Endpoint, check_free, optional_endpoint
from otel_pg_exporter.receiver.grpc import GrpcServer
from otel_pg_exporter.receiver.intake import Intake
from otel_pg_exporter.receiver.otlp_http import OtlpHttpServer
from otel_pg_exporter.receiver.port_sockets import count_connections
from otel_pg_exporter.receiver.security import Security
from otel_pg_exporter.telemetry import Answered, Took, unmeasured, unobserved

# Seconds for the last answers to leave and for health watchers to be told, once no export is in flight any more.
_FLUSH_TIMEOUT = 1.0

# Of the time that a stop on a shared port may take, at most this share until every client has gone to the next process;
# the rest is for the calls that are in flight then.
_HANDOVER_SHARE = 3 / 4

# gRPC's jitter, and what a GOAWAY may take on its way.
_AGE_FACTOR = 1.1
_GOAWAY_MARGIN = 1.0  # seconds

_LOOK_INTERVAL = 0.1  # seconds between two looks at whether connections are left


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where is listened; None: a protocol that is not served."""

    grpc: Endpoint | None
    http: Endpoint | None

    @classmethod
    def of(cls, settings: ReceiverSettings) -> Self:
        """Parse the settings; raises ConfigurationError."""
        endpoints = cls(
            grpc=optional_endpoint(settings.grpc_endpoint, setting=otlp_grpc.ENDPOINT_SETTING),
            http=optional_endpoint(settings.http_endpoint, setting=otlp_http.ENDPOINT_SETTING),
        )
        if endpoints.grpc is None and endpoints.http is None:
            raise ConfigurationError("--grpc-endpoint and --http-endpoint are both none, so nobody could send")
        return endpoints

    def check_free(self, *, reuse_port: bool) -> None:
        """Raise StartupError if one of them could not be listened on."""
        for endpoint, setting in (
            (self.grpc, otlp_grpc.ENDPOINT_SETTING),
            (self.http, otlp_http.ENDPOINT_SETTING),
        ):
            if endpoint is not None:
                check_free(endpoint, setting=setting, reuse_port=reuse_port)


class FrontDoor:
    """Takes what senders bring by either protocol, and hands it to `export`.

    `export` is called in a thread of the call's own, many at a time, and must not wait for ever; it raises
    ExporterError for a whole request. The `Hold` that it is given is the request's share of `budget`, until nobody
    keeps it any more.

    `security` says who may send, and with which certificate both speak TLS. Of each call, `took` and `answered` are
    told how long it took.
    """

    def __init__(
        self,
        export: Callable[[Signal, bytes, Hold], Outcome],
        budget: ByteBudget,
        settings: ReceiverSettings,
        *,
        security: Security | None = None,
        took: Took = unmeasured,
        answered: Answered = unobserved,
        body_timeout: float = 30.0,
        connection_age: float = 5.0,
    ) -> None:
        self._reuse_port = settings.reuse_port
        self._handover_time = connection_age * _AGE_FACTOR + _GOAWAY_MARGIN
        security = security or Security(SecuritySettings())
        self._intake = Intake(
            export,
            budget,
            settings,
            authenticate=security.authenticate,
            took=took,
            answered=answered,
            body_timeout=body_timeout,
        )
        self._grpc: GrpcServer | None = None
        self._http: OtlpHttpServer | None = None
        self._endpoints = Endpoints.of(settings)
        if (endpoint := self._endpoints.grpc) is not None:
            self._grpc = GrpcServer(
                self._intake,
                endpoint,
                settings,
                credentials=security.grpc_credentials,
                connection_age=connection_age,
            )
        if (endpoint := self._endpoints.http) is not None:
            self._http = OtlpHttpServer(
                self._intake, endpoint, settings, tls=security.ssl_context, challenge=security.challenge
            )

    @property
    def endpoints(self) -> Endpoints:
        """Where is listened; once started, with the real ports."""
        return self._endpoints

    @property
    def calls_in_flight(self) -> int:
        """How many export calls are being read or wait for their commit."""
        return self._intake.gate.in_flight

    @property
    def alive(self) -> bool:
        """Whether OTLP/HTTP's event loop runs, if it is served; of gRPC's own threads its health alone can tell."""
        return self._http is None or self._http.alive

    def start(self) -> None:
        """Listen and serve. gRPC's health says NOT_SERVING until `set_serving(True)`.

        Raises StartupError, and serves nothing, when an endpoint cannot be had.
        """
        with ExitStack() as stack:
            stack.callback(self.stop, 0)
            self._intake.bodies.start()
            at = self._endpoints
            if self._grpc is not None and at.grpc is not None:
                self._endpoints = at = replace(at, grpc=replace(at.grpc, port=self._grpc.start()))
            if self._http is not None and at.http is not None:
                self._endpoints = replace(at, http=replace(at.http, port=self._http.start()))
            stack.pop_all()

    def set_serving(self, serving: bool) -> None:
        """Tell health checks whether exports succeed at the moment; calls are taken either way."""
        if self._grpc is not None:
            self._grpc.set_serving(serving)

    def stop(self, grace: float) -> None:
        """Stop: tell health checks, refuse new calls, finish those in flight within `grace` seconds, cancel the rest.

        New calls go on to be refused meanwhile, with an answer that lets their senders come again elsewhere or later.
        On a shared port nobody is refused before all clients were told to go to the other process, if `grace` allows.
        May be repeated, and called without `start()`.
        """
        deadline = time.monotonic() + grace
        servers = [server for server in (self._grpc, self._http) if server is not None]
        for server in servers:
            server.part()
        if self._reuse_port:
            self._await_departure(min(self._handover_time, grace * _HANDOVER_SHARE))
        self._intake.gate.close()
        self._intake.bodies.hurry()
        finished = self._intake.gate.wait_idle(max(0.0, deadline - time.monotonic()))
        for server in servers:
            server.stop(_FLUSH_TIMEOUT if finished else 0)
        self._intake.bodies.stop()

    def _await_departure(self, patience: float) -> None:
        """Wait until the clients have gone; what comes on open connections until then is served."""
        ports = [each.port for each in (self._endpoints.grpc, self._endpoints.http) if each is not None]
        deadline = time.monotonic() + patience
        pause = threading.Event()
        while any(map(count_connections, ports)) and (left := deadline - time.monotonic()) > 0:
            pause.wait(min(_LOOK_INTERVAL, left))
