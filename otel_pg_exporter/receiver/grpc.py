"""The OTLP/gRPC front door: TraceService, LogsService, MetricsService and `grpc.health.v1`.

Handlers take raw bytes and are registered as `stream_unary`: on the wire that is the same as unary, but the body is
read only when a handler asks for it, after the call was admitted. So refusals cost nothing, and answer at once even
when every other handler waits for a commit.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc

from otel_pg_exporter.config import ReceiverSettings
from otel_pg_exporter.errors import ExporterError, RefusedError, StartupError, UndecodableError
from otel_pg_exporter.model import Hold, Outcome, Signal
from otel_pg_exporter.pipeline.admission import ByteBudget, CallGate, Reservation, SenderEstimates, Share
from otel_pg_exporter.receiver.body_watch import BodyWatch
from otel_pg_exporter.receiver.endpoint import check_free, parse_endpoint
from otel_pg_exporter.receiver.health import Health
from otel_pg_exporter.receiver.metrics import refuse_metrics
from otel_pg_exporter.receiver.port_sockets import count_connections, stop_listening
from otel_pg_exporter.receiver.status import GrpcStatus, grpc_status, response
from otel_pg_exporter.receiver.unexpected import UnexpectedErrors
from otel_pg_exporter.telemetry import Answered, RateLimitedLogger, Stage, Took, unmeasured, unobserved

_logger = logging.getLogger(__name__)

ENDPOINT_SETTING = "--grpc-endpoint (OTEL_PG_EXPORTER_GRPC_ENDPOINT)"

_SERVICES = {
    Signal.TRACES: "opentelemetry.proto.collector.trace.v1.TraceService",
    Signal.LOGS: "opentelemetry.proto.collector.logs.v1.LogsService",
}
_METRICS_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"

# A call in flight costs a thread that waits for its commit, some 40 KB. Hence 256 by default: 240 senders with commits
# of 100 ms were all served in 67 MiB of memory, where a limit of 64 refused four calls of five and took 60 MiB.

# Threads beyond `max_calls`, for what never waits: refusals and health checks.
_RESERVE_THREADS = 16

# A body that waits for its commit is held once as it came and once as rows of about its size; a third time for what
# decoding and COPY take meanwhile. Rows that take more are reported as they grow.
_MEMORY_FACTOR = 3

# The least that a call with an unread body is reckoned to hold: its HTTP/2 window.
_LEAST_ESTIMATE = 2**16

# At most this share of the budget is reserved for one unread body, so that some senders always get on even when the
# last bodies were huge, or stall. Of 96 posts of 40 MiB by 24 senders, 85 were stored with a quarter and 30 with an
# eighth: then bodies are let in that don't fit once their size is known.
_LARGEST_ESTIMATE = 1 / 4

# Bodies that are still being read are larger than the estimate when senders that were small so far all turn large at
# once. So beyond this many times the budget of resident memory all but a few of them are given up.
_CROWDED = 1.5

# Seconds that a call waits for a place in the byte budget. Its body is not read meanwhile, so HTTP/2's flow control
# holds its sender back: that smooths bursts without a refusal, which some exporters (Node's) answer by dropping.
_ADMISSION_TIMEOUT = 1.0

# Seconds for the last answers to leave and for health watchers to be told, once no export is in flight any more.
_FLUSH_TIMEOUT = 1.0

# Of the time that a stop on a shared port may take, at most this share until every client has gone to the next process;
# the rest is for the calls that are in flight then.
_HANDOVER_SHARE = 3 / 4

# gRPC's jitter, and what a GOAWAY may take on its way.
_AGE_FACTOR = 1.1
_GOAWAY_MARGIN = 1.0  # seconds

_LOOK_INTERVAL = 0.1  # seconds between two looks at whether connections are left


class GrpcServer:
    """Serves OTLP/gRPC: admits a call, reads its body, hands it to `export`, and answers with what became of it.

    `export` is called in the call's thread, many at a time, and must not wait for ever; it raises ExporterError for a
    whole request. The `Hold` that it is given is the request's share of `budget`, until nobody keeps it any more.

    With `credentials` it serves TLS. Before all else `authenticate` is given what a call brings as `authorization`; it
    raises UnauthenticatedError for who may not send. Health checks need no credentials.

    On a shared port (`reuse_port`) a connection lives for `connection_age` seconds, give or take 10 %. Then its client
    is told by GOAWAY to open another, which after a stop has begun leads to the next process.
    """

    def __init__(
        self,
        export: Callable[[Signal, bytes, Hold], Outcome],
        budget: ByteBudget,
        settings: ReceiverSettings,
        *,
        credentials: grpc.ServerCredentials | None = None,
        authenticate: Callable[[Sequence[str]], None] | None = None,
        took: Took = unmeasured,
        answered: Answered = unobserved,
        body_timeout: float = 30.0,
        connection_age: float = 5.0,
    ) -> None:
        self._budget = budget
        self._took = took
        self._answered = answered
        self._settings = settings
        self._credentials = credentials
        self._authenticate = authenticate
        self._endpoint = parse_endpoint(settings.grpc_endpoint, setting=ENDPOINT_SETTING)
        self._estimates = SenderEstimates(floor=_LEAST_ESTIMATE, cap=int(budget.limit * _LARGEST_ESTIMATE))
        self._gate = CallGate(settings.max_calls)
        self._bodies = BodyWatch(body_timeout, memory_limit=int(budget.limit * _CROWDED))
        self._unexpected = UnexpectedErrors()
        self._notices = RateLimitedLogger(_logger)
        self._health = Health([*_SERVICES.values(), _METRICS_SERVICE])
        self._threads = ThreadPoolExecutor(settings.max_calls + _RESERVE_THREADS, thread_name_prefix="otlp-grpc")
        # Not `maximum_concurrent_rpcs`: beyond it grpcio answers RESOURCE_EXHAUSTED, which makes senders drop data.
        self._server = grpc.server(self._threads, options=_options(settings, connection_age))
        self._connection_age = connection_age
        self._port = 0  # until it listens
        for signal, name in _SERVICES.items():
            self._add(name, functools.partial(_export, export, signal))
        self._add(_METRICS_SERVICE, refuse_metrics)
        self._health.register(self._server)

    def start(self) -> int:
        """Listen and serve; return the port, which the system chose if the endpoint's is 0.

        Health says NOT_SERVING until `set_serving(True)`. Raises StartupError when the endpoint cannot be had.
        """
        check_free(self._endpoint, setting=ENDPOINT_SETTING, reuse_port=self._settings.reuse_port)
        try:
            port = self._add_port(str(self._endpoint))
        except RuntimeError as exc:
            raise StartupError(
                f"cannot listen on {self._endpoint}; choose another with {ENDPOINT_SETTING}: {exc}"
            ) from exc
        self._server.start()
        self._bodies.start()
        self._port = port
        return port

    def set_serving(self, serving: bool) -> None:
        """Tell health checks whether exports succeed at the moment; calls are taken either way."""
        self._health.set_serving(serving)

    @property
    def calls_in_flight(self) -> int:
        """How many export calls are being read or wait for their commit."""
        return self._gate.in_flight

    def stop(self, grace: float) -> None:
        """Stop: tell health checks, refuse new calls, finish those in flight within `grace` seconds, cancel the rest.

        New calls go on to be refused with UNAVAILABLE meanwhile, so that their senders come again elsewhere or later.
        On a shared port nobody is refused before all clients were told to go to the other process, if `grace` allows.
        May be repeated, and called without `start()`.
        """
        deadline = time.monotonic() + grace
        self._health.shut_down()
        if self._settings.reuse_port and self._port:
            self._hand_over(min(self._connection_age * _AGE_FACTOR + _GOAWAY_MARGIN, grace * _HANDOVER_SHARE))
        self._gate.close()
        finished = self._gate.wait_idle(max(0.0, deadline - time.monotonic()))
        self._server.stop(_FLUSH_TIMEOUT if finished else None).wait()
        self._bodies.stop()
        # Handlers that outlive the grace period end with their export's own timeout; nobody waits for them here.
        self._threads.shutdown(wait=finished)

    def _hand_over(self, patience: float) -> None:
        """Leave the port to the other processes; serve what comes on open connections until their clients have gone.

        Not by grpcio's own stop: it cancels the calls that arrive before their clients know of it (measured: some 30
        of 64 senders at full speed).
        """
        stop_listening(self._port)
        deadline = time.monotonic() + patience
        pause = threading.Event()
        while count_connections(self._port) and (left := deadline - time.monotonic()) > 0:
            pause.wait(min(_LOOK_INTERVAL, left))

    def _add_port(self, address: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials)

    def _add(self, service: str, take: Callable[[bytes, Hold], bytes]) -> None:
        """Register `service` with its one method, Export; `take` turns a request's body into a response's."""
        method = grpc.stream_unary_rpc_method_handler(functools.partial(self._handle, f"{service}/Export", take))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": method})])

    def _handle(
        self,
        method: str,
        take: Callable[[bytes, Hold], bytes],
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> bytes:
        """Serve one call, and tell how it was answered, whether its body was read or not."""
        began = time.perf_counter()
        # The status is made inside the `except` blocks, and no exception is kept: its traceback holds the body, and a
        # name here that refers to it would close a cycle that only the garbage collector opens again.
        try:
            answer = self._admit(take, messages, context)
        except grpc.RpcError:
            # The answer is already given, and gRPC does not tell which.
            self._answered(method, grpc.StatusCode.CANCELLED.name, time.perf_counter() - began)
            limit = self._settings.max_request_bytes
            what = f"{context.peer()} has gone before its request was whole, or it was larger than {limit:,} bytes"
            self._notices.log(logging.WARNING, "cut off", what)
            raise
        except ExporterError as exc:
            status = grpc_status(exc)
            if isinstance(exc, RefusedError):  # its sender will drop it
                self._notices.log(logging.WARNING, type(exc).__name__, f"refused a request of {context.peer()}: {exc}")
        except Exception as exc:  # noqa: BLE001 - a call must be answered whatever happens; `judge` logs
            status = grpc_status(self._unexpected.judge(exc, None))
        else:
            self._answered(method, grpc.StatusCode.OK.name, time.perf_counter() - began)
            return answer
        self._answered(method, status.code.name, time.perf_counter() - began)
        return _abort(context, status)

    def _admit(
        self, take: Callable[[bytes, Hold], bytes], messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> bytes:
        sender, began = context.peer(), time.perf_counter()
        if self._authenticate is not None:
            self._authenticate([str(value) for key, value in context.invocation_metadata() if key == "authorization"])
        with self._gate:
            reservation = self._budget.reserve(self._estimates.value(sender), timeout=_ADMISSION_TIMEOUT)
            try:
                body = self._read(messages, context, functools.partial(self._stalled, sender, reservation))
                self._took(Stage.RECEIVE, time.perf_counter() - began)
                # Capped, or a body that `max_request_bytes` allows could never be taken under a small budget.
                size = min(len(body) * _MEMORY_FACTOR, self._budget.largest)
                self._estimates.learn(sender, size)
                reservation.correct(size)
                return self._taken(take, body, Share(reservation))
            except BaseException:
                # Who keeps the error keeps the call's frames, and all they hold.
                reservation.release()
                raise

    def _read(self, messages: Iterator[bytes], context: grpc.ServicerContext, stalled: Callable[[], None]) -> bytes:
        with self._bodies.watch(context, stalled):
            # A second message is not looked for, as in gRPC's own unary methods: that took another 140 µs a call where
            # a whole call took 620, and no client's unary stub can send one.
            body = next(messages, None)
        if body is None:
            raise UndecodableError("the call brought no message; Export takes exactly one")
        return body

    def _taken(self, take: Callable[[bytes, Hold], bytes], body: bytes, hold: Hold) -> bytes:
        try:
            return take(body, hold)
        except ExporterError:
            raise
        except Exception as exc:
            raise self._unexpected.judge(exc, body) from exc

    def _stalled(self, sender: str, reservation: Reservation) -> None:
        """Expect little of a body that does not come, or four that stall could use up the budget by their estimates."""
        self._estimates.learn(sender, _LEAST_ESTIMATE)
        if reservation.size > _LEAST_ESTIMATE:
            reservation.correct(_LEAST_ESTIMATE)


def _export(export: Callable[[Signal, bytes, Hold], Outcome], signal: Signal, body: bytes, hold: Hold) -> bytes:
    return response(export(signal, body, hold))


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
