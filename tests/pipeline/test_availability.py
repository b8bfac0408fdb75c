"""What the last attempts to write tell about the next."""

from collections.abc import Sequence

import pytest

from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError, OutageError
from otel_pg_exporter.model import Outcome, RowBatch, Signal
from otel_pg_exporter.pipeline.availability import Availability
from tests.workload import logs, record, span, traces


def test_an_outage_is_noted_for_its_signal_until_the_next_commit() -> None:
    errors: list[Exception] = []

    def write(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        if errors:
            raise errors.pop()
        return [Outcome() for _ in batches]

    availability = Availability()
    observed = availability.observe(write)
    errors.append(DeploymentError("no table"))
    with pytest.raises(DeploymentError):
        observed([logs(record("x"))])
    assert availability.is_down(Signal.LOGS)
    assert not availability.is_down(Signal.TRACES)
    observed([traces(span(0))])
    assert availability.is_down(Signal.LOGS)
    observed([logs(record("x"))])
    assert not availability.is_down(Signal.LOGS)


@pytest.mark.parametrize(("error", "down"), [(OutageError("x"), True), (DatabaseUnavailableError("x"), False)])
def test_only_an_outage_says_something_about_the_next_attempt(error: Exception, down: bool) -> None:
    def write(_batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        raise error

    availability = Availability()
    with pytest.raises(DatabaseUnavailableError):
        availability.observe(write)([traces(span(0))])
    assert availability.is_down(Signal.TRACES) is down
