"""What a sender hears: the one table from the error tree to the status codes of both protocols, and the answers.

An answer that asks to come again carries `google.rpc.RetryInfo`: by gRPC twice, because senders look in different
places (the OTLP specification puts it into `grpc-status-details-bin`, the Python exporters read
`google.rpc.retryinfo-bin`); by HTTP in the body, and as `Retry-After`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships its stubs without py.typed
from google.rpc.status_pb2 import Status as StatusMessage  # type: ignore[import-untyped] # as above
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from otel_pg_exporter.errors import (
    ExporterError,
    InternalError,
    RefusedError,
    RetryableError,
    TooLargeError,
    UnauthenticatedError,
    UndecodableError,
    UnsupportedError,
)
from otel_pg_exporter.model import Outcome

RETRY_AFTER = 1  # seconds

# A message travels twice (percent-encoded and base64) in trailers that many clients cap at 8 KiB together.
_MAX_MESSAGE_BYTES = 1_000

_RETRY_INFO = RetryInfo()
_RETRY_INFO.retry_delay.seconds = RETRY_AFTER
_RETRY_INFO_BYTES = _RETRY_INFO.SerializeToString()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an error of one class is answered."""

    grpc: grpc.StatusCode
    http: int
    retry: bool = False  # the sender is to come again after `RETRY_AFTER`


# An error is answered by the nearest of its ancestors listed here. Nothing temporary may be answered with what means
# "never again" to a sender: by gRPC RESOURCE_EXHAUSTED without RetryInfo, by HTTP 429, after which Python's exporters,
# up to 1.38 at least, drop the batch: they retry 408 and 5xx alone.
ANSWERS: Mapping[type[ExporterError], Answer] = MappingProxyType(
    {
        RetryableError: Answer(grpc=grpc.StatusCode.UNAVAILABLE, http=503, retry=True),
        RefusedError: Answer(grpc=grpc.StatusCode.INVALID_ARGUMENT, http=400),
        UndecodableError: Answer(grpc=grpc.StatusCode.INVALID_ARGUMENT, http=400),
        TooLargeError: Answer(grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, http=413),
        UnsupportedError: Answer(grpc=grpc.StatusCode.UNIMPLEMENTED, http=415),
        UnauthenticatedError: Answer(grpc=grpc.StatusCode.UNAUTHENTICATED, http=401),
        InternalError: Answer(grpc=grpc.StatusCode.INTERNAL, http=500),
        # The tree's root: what belongs to no request (a StartupError) cannot be the request's fault.
        ExporterError: Answer(grpc=grpc.StatusCode.UNAVAILABLE, http=503, retry=True),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcStatus:
    """A gRPC answer other than OK, ready to be sent."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, bytes], ...]


def answer_to(error: ExporterError) -> Answer:
    """Look an error up in the table."""
    return next(ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS)


def grpc_status(error: ExporterError) -> GrpcStatus:
    """Turn an error into a gRPC status; its message goes to the sender."""
    answer = answer_to(error)
    status = status_message(answer, str(error))
    trailers = (
        ("grpc-status-details-bin", status.SerializeToString()),
        ("google.rpc.retryinfo-bin", _RETRY_INFO_BYTES),
    )
    return GrpcStatus(code=answer.grpc, details=status.message, trailers=trailers if answer.retry else ())


def status_message(answer: Answer, message: str) -> Any:  # noqa: ANN401 - google.rpc.Status, whose module has no types
    """Return the `google.rpc.Status` that says the same: HTTP's body, or a trailer of gRPC's."""
    number: int = answer.grpc.value[0]
    status = StatusMessage(code=number, message=_cut(message))
    if answer.retry:
        status.details.add().Pack(_RETRY_INFO)
    return status


def response(outcome: Outcome) -> bytes:
    """Serialise the response of an export that went through: `partial_success` is set only if something was refused."""
    return partial_success(outcome.rejected, outcome.error_message) if outcome.rejected else b""


def partial_success(rejected: int, message: str) -> bytes:
    """Serialise a response that refuses `rejected` items.

    One class serves all signals: the three `Export…ServiceResponse` differ in names alone, not on the wire.
    """
    refused = ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    return ExportTraceServiceResponse(partial_success=refused).SerializeToString()


def _cut(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return encoded.decode("utf-8")
    return encoded[: _MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "…"
