from collections.abc import Iterator

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships its stubs without py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_pg_exporter import errors
from otel_pg_exporter.model import Outcome
from otel_pg_exporter.receiver.status import answer_to, grpc_status, partial_success, response


def tree(cls: type[errors.ExporterError]) -> Iterator[type[errors.ExporterError]]:
    yield cls
    for each in cls.__subclasses__():
        yield from tree(each)


@pytest.mark.parametrize("cls", list(tree(errors.RetryableError)) + list(tree(errors.StartupError)))
def test_what_is_not_the_requests_fault_is_unavailable_with_retry_info_in_both_trailers(
    cls: type[errors.ExporterError],
) -> None:
    status = grpc_status(cls("PostgreSQL is away"))
    trailers = dict(status.trailers)
    assert (status.code, status.details) == (grpc.StatusCode.UNAVAILABLE, "PostgreSQL is away")
    assert set(trailers) == {"grpc-status-details-bin", "google.rpc.retryinfo-bin"}
    assert RetryInfo.FromString(trailers["google.rpc.retryinfo-bin"]).retry_delay.seconds == 1
    rich = Status.FromString(trailers["grpc-status-details-bin"])
    info = RetryInfo()
    assert (rich.code, rich.message, len(rich.details)) == (14, "PostgreSQL is away", 1)
    assert rich.details[0].Unpack(info)
    assert (info.retry_delay.seconds, info.retry_delay.nanos) == (1, 0)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.TooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
        (errors.UndecodableError, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
        (errors.InternalError, grpc.StatusCode.INTERNAL),
    ],
)
def test_what_is_refused_for_good_carries_no_retry_info(cls: type[errors.RefusedError], code: grpc.StatusCode) -> None:
    status = grpc_status(cls("because"))
    assert (status.code, status.details, status.trailers) == (code, "because", ())


@pytest.mark.parametrize("cls", list(tree(errors.ExporterError)))
def test_every_error_has_an_answer_and_nothing_temporary_is_answered_with_resource_exhausted(
    cls: type[errors.ExporterError],
) -> None:
    answer = answer_to(cls("reason"))
    assert answer.retry == (answer.grpc is grpc.StatusCode.UNAVAILABLE)
    assert answer.retry != issubclass(cls, errors.RefusedError)


@given(st.text(st.characters(exclude_categories=[])) | st.integers(300, 3_000).map("€".__mul__))
def test_any_message_becomes_valid_text_that_fits_into_trailers(message: str) -> None:
    status = grpc_status(errors.RetryableError(message))
    assert len(status.details.encode()) <= 1_000
    assert sum(len(value) for _, value in status.trailers) < 1_200


def test_an_outcome_without_rejections_is_the_empty_response() -> None:
    assert response(Outcome(stored=7, duplicate=2, duplicate_conflict=1)) == b""


@given(st.integers(1, 2**63 - 1), st.text())
def test_a_partial_success_reads_alike_with_the_classes_of_all_three_services(rejected: int, message: str) -> None:
    body = response(Outcome(stored=1, rejected=rejected, error_message=message))
    assert body == partial_success(rejected, message)
    spans = ExportTraceServiceResponse.FromString(body).partial_success
    logs = ExportLogsServiceResponse.FromString(body).partial_success
    metrics = ExportMetricsServiceResponse.FromString(body).partial_success
    assert spans.rejected_spans == logs.rejected_log_records == metrics.rejected_data_points == rejected
    assert spans.error_message == logs.error_message == metrics.error_message == message
