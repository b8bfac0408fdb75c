"""The OTLP/gRPC front door: TraceService, LogsService, MetricsService and `grpc.health.v1`.

Handlers take raw bytes and are registered as `stream_unary`: on the wire that is the same as unary, but the body is
read only when a handler asks for it, after the call was admitted. So refusals cost nothing, and answer at once even
when every other handler waits for a commit.
"""

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.errors import StartupError, UndecodableError
from otel_pg_exporter.receiver.endpoint import Endpoint, check_free
from otel_pg_exporter.receiver.health import Health
from otel_pg_exporter.receiver.intake import Intake, Take
from otel_pg_exporter.receiver.port_sockets import stop_listening
from otel_pg_exporter.receiver.status import GrpcStatus, grpc_status

ENDPOINT_SETTING = "--grpc-endpoint (OTEL_PG_EXPORTER_GRPC_ENDPOINT)"

_SERVICES = {
    "traces": "opentelemetry.proto.collector.trace.v1.TraceService",
    "logs": "opentelemetry.proto.collector.logs.v1.LogsService",
    "metrics": "opentelemetry.proto.collector.metrics.v1.MetricsService",
}

_AUTHORIZATION = "authorization"

# Threads beyond `max_calls`, for what never waits: refusals and health checks.
_RESERVE_THREADS = 16


class GrpcServer:
    """Serves OTLP/gRPC: hands each call to the intake, and answers with what became of it.

    With `credentials` it serves TLS. Health checks need no authentication.

    On a shared port (`reuse_port`) a connection lives for `connection_age` seconds, give or take 10 %. Then its client
    is told by GOAWAY to open another, which after a stop has begun leads to the next process.
    """

    def __init__(
        self,
        intake: Intake,
        endpoint: Endpoint,
        settings: ReceiverSettings,
        *,
        credentials: grpc.ServerCredentials | None,
        connection_age: float,
    ) -> None:
        self._intake = intake
        self._endpoint = endpoint
        self._credentials = credentials
        self._reuse_port = settings.reuse_port
        self._health = Health(_SERVICES.values())
        self._threads = ThreadPoolExecutor(settings.max_calls + _RESERVE_THREADS, thread_name_prefix="otlp-grpc")
        # Not `maximum_concurrent_rpcs`: beyond it grpcio answers RESOURCE_EXHAUSTED, which makes senders drop data.
        self._server = grpc.server(self._threads, options=_options(settings, connection_age))
        self._port = 0  # until it listens
        for name, service in _SERVICES.items():
            self._add(service, intake.takes[name])
        self._health.register(self._server)

    def start(self) -> int:
        """Listen and serve; return the port, which the system chose if the endpoint's is 0.

        Health says NOT_SERVING until `set_serving(True)`. Raises StartupError when the endpoint cannot be had.
        """
        check_free(self._endpoint, setting=ENDPOINT_SETTING, reuse_port=self._reuse_port)
        try:
            port = self._add_port(str(self._endpoint))
        except RuntimeError as exc:
            raise StartupError(
                f"cannot listen on {self._endpoint}; choose another with {ENDPOINT_SETTING}: {exc}"
            ) from exc
        self._server.start()
        self._port = port
        return port

    def set_serving(self, serving: bool) -> None:
        """Tell health checks whether exports succeed at the moment; calls are taken either way."""
        self._health.set_serving(serving)

    def part(self) -> None:
        """Tell health checks that the end is near, and leave a shared port to the other processes; go on to serve.

        Not by grpcio's own stop: it cancels the calls that arrive before their clients know of it (measured: some 30
        of 64 senders at full speed).
        """
        self._health.shut_down()
        if self._reuse_port and self._port:
            stop_listening(self._port)

    def stop(self, grace: float) -> None:
        """Stop: let answers leave and health watchers be told within `grace` seconds, cancel the rest.

        May be repeated, and called without `start()`.
        """
        self._server.stop(grace or None).wait()
        # Handlers that outlive the grace period end with their export's own timeout; nobody waits for them here.
        self._threads.shutdown(wait=grace > 0)

    def _add_port(self, address: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials)

    def _add(self, service: str, take: Take) -> None:
        """Register `service` with its one method, Export."""
        method = grpc.stream_unary_rpc_method_handler(functools.partial(self._handle, f"{service}/Export", take))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": method})])

    def _handle(self, method: str, take: Take, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Serve one call, and tell how it was answered, whether its body was read or not."""
        began = time.perf_counter()
        # The status is made inside the `except` block, and no exception is kept: its traceback holds the body, and a
        # name here that refers to it would close a cycle that only the garbage collector opens again.
        try:
            answer = self._admit(take, messages, context)
        except grpc.RpcError:
            # The answer is already given, and gRPC does not tell which.
            self._intake.answered(method, grpc.StatusCode.CANCELLED.name, time.perf_counter() - began)
            self._intake.note_loss(context.peer())
            raise
        except Exception as exc:  # noqa: BLE001 - a call must be answered whatever happens; `judge` logs
            status = grpc_status(self._intake.judge(exc, context.peer()))
        else:
            self._intake.answered(method, grpc.StatusCode.OK.name, time.perf_counter() - began)
            return answer
        self._intake.answered(method, status.code.name, time.perf_counter() - began)
        return _abort(context, status)

    def _admit(self, take: Take, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        if self._intake.authenticate is not None:
            self._intake.authenticate(
                [str(value) for key, value in context.invocation_metadata() if key == _AUTHORIZATION]
            )
        with self._intake.admit(context.peer()) as call:
            call.reserve()
            with call.reading(context):
                # A second message is not looked for, as in gRPC's own unary methods: that took another 140 µs a call
                # where a whole call took 620, and no client's unary stub can send one.
                body = next(messages, None)
            if body is None:
                raise UndecodableError("the call brought no message; Export takes exactly one")
            return call.take(take, body)


def _abort(context: grpc.ServicerContext, status: GrpcStatus) -> NoReturn:
    # Nothing was sent before, so that the answer travels as Trailers-Only, where senders look for RetryInfo.
    context.set_trailing_metadata(status.trailers)
    context.abort(status.code, status.details)


def _options(settings: ReceiverSettings, connection_age: float) -> list[tuple[str, int]]:
    aging = [("grpc.max_connection_age_ms", int(connection_age * 1000))] if settings.reuse_port else []
    return [
        *aging,
        # By default two processes may share a port without a word, each getting some of the connections.
        ("grpc.so_reuseport", int(settings.reuse_port)),
        # gRPC's default is 4 MiB. It holds after decompression too: beyond it, gRPC stops to inflate and answers
        # RESOURCE_EXHAUSTED without RetryInfo.
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        # By default gRPC grows the windows of a fast connection to many MiB, also those of bodies that nobody reads
        # yet: 24 of 40 MiB took 150 MiB unread. Now they take 64 KiB each; once a body is read, its window grows to
        # its size. That costs a larger body one round trip, and no throughput on loopback (measured).
        ("grpc.http2.bdp_probe", 0),
        # By default a client that pings more often than every 5 minutes, or without a call open, is thrown out
        # (`too_many_pings`). gRPC's clients never ping more often than every 10 seconds.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Finds clients that vanished without closing (a pulled cable, a suspended VM) within 80 seconds; by default
        # it takes 2 hours.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
