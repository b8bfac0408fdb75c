"""Two receivers of one database, told the same at the same time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from otel_pg_exporter.config import PipelineSettings
from tests.e2e.support import METHODS, client_of, heard
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, Request, logs_request, spans_request
from tests.receiver.support import Client

_CLIENTS = 12
_REQUESTS = 30  # of each client and round


def requests(ledger: Ledger, client: int, count: int) -> Iterator[Request]:
    """Yield requests; two clients share their traces."""
    for number in range(count // 3):
        yield spans_request(ledger, client=client, number=number, part=0, count=40)
        yield spans_request(ledger, client=client, number=number, part=1, count=40)
        yield logs_request(ledger, client=client, number=number, count=40)


def send_to_all(ledger: Ledger, receivers: Sequence[Client], request: Request) -> None:
    ledger.send(request)
    futures = [receiver.future(METHODS[request.signal], request.body) for receiver in receivers]
    for again, future in enumerate(futures):
        rejected, message = heard(future.result())
        assert rejected == len(request.bad), message
        ledger.acknowledge(request, again=again > 0)


def test_two_replicas_that_get_the_same_at_the_same_time_store_it_once_and_without_deadlocks(
    prepared: str, receive: Receive, caplog: pytest.LogCaptureFixture, rounds: int
) -> None:
    ledger = Ledger()
    patient = PipelineSettings(ack_timeout=60, writers=4)
    services = [receive(prepared, pipeline=patient) for _ in range(2)]
    with ExitStack() as channels, ThreadPoolExecutor(_CLIENTS) as pool:

        def run(client: int) -> None:
            receivers = [channels.enter_context(client_of(str(service.grpc_endpoint))) for service in services]
            for request in requests(ledger, client, _REQUESTS * rounds):
                send_to_all(ledger, receivers, request)

        list(pool.map(run, range(_CLIENTS)))
    judge(prepared, ledger, services=services)
    counts = [service.counts() for service in services]
    assert sum(each.stored for each in counts) == sum(each.duplicate for each in counts) > 0
    assert "40P01" not in caplog.text  # a deadlock
