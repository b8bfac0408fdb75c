"""PostgreSQL away, silent, or gone before it answered a COMMIT: what senders hear, and each item stored once."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest

from otel_pg_exporter.config import DatabaseSettings, PipelineSettings
from otel_pg_exporter.model import Signal
from tests.e2e.support import METHODS, OK, WAYS, Protocol, Receiver, persist, receiving
from tests.proxy import Proxy, proxy_for
from tests.receiver.support import Refusal, refusal
from tests.support import wait_until
from tests.workload import log_body, record, span, trace_body

ACK_TIMEOUT = 0.5  # seconds
MARGIN = 20.0  # seconds that an answer may be late on a machine that is busy with other tests


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """A receiver whose way to PostgreSQL leads through a proxy."""

    receiver: Receiver
    proxy: Proxy

    def begin(self, signal: Signal) -> None:
        """Store 20 items, so that connections and partitions are there."""
        assert persist(self.receiver.client, signal, request(signal)) == OK

    def refused(self, signal: Signal, body: bytes) -> Refusal:
        """Export; return the refusal, which must come soon after `ack_timeout`: gRPC's deadline is another code."""
        with pytest.raises(grpc.RpcError) as info:
            self.receiver.client.export(METHODS[signal], body, timeout=ACK_TIMEOUT + MARGIN)
        return refusal(info.value)

    def assert_once(self, signal: Signal, count: int) -> None:
        assert self.receiver.database.count(signal.table) == count
        self.receiver.database.assert_traces_exact()


@contextlib.contextmanager
def house(
    dsn: str,
    writer_dsn: str,
    *,
    ack_timeout: float = ACK_TIMEOUT,
    database: DatabaseSettings | None = None,
    protocol: Protocol = "grpc",
) -> Iterator[House]:
    with (
        proxy_for(writer_dsn) as proxy,
        receiving(
            proxy.dsn,
            read_dsn=dsn,
            pipeline=PipelineSettings(ack_timeout=ack_timeout, writers=1),
            database=database,
            protocol=protocol,
        ) as receiver,
    ):
        yield House(receiver=receiver, proxy=proxy)


def request(signal: Signal, count: int = 20) -> bytes:
    if signal is Signal.TRACES:
        return trace_body([span(number, trace=1 + number // 4) for number in range(count)])
    return log_body([record(f"line {number}") for number in range(count)])


@pytest.mark.parametrize("signal", list(Signal))
def test_a_commit_whose_answer_is_lost_is_tried_again_before_the_sender_hears_of_it(
    dsn: str, writer_dsn: str, signal: Signal
) -> None:
    with house(dsn, writer_dsn, ack_timeout=60) as it:
        it.begin(signal)
        it.proxy.lose_commits(2)
        body = request(signal)
        assert it.receiver.send(signal, body) == OK
        assert it.proxy.commits_lost == 2
        it.assert_once(signal, 40)
        assert it.receiver.send(signal, body) == OK
        it.assert_once(signal, 40)


@pytest.mark.parametrize(("signal", "protocol"), WAYS)
def test_a_sender_that_was_refused_because_the_commits_answer_was_lost_comes_again_and_hears_ok(
    dsn: str, writer_dsn: str, signal: Signal, protocol: Protocol
) -> None:
    with house(dsn, writer_dsn, protocol=protocol) as it:
        it.begin(signal)
        body = request(signal)
        it.proxy.lose_commits(1, then=it.proxy.refuse)  # the server dies with the answer on its lips
        refused = it.refused(signal, body)
        assert (refused.code, refused.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
        wait_until(lambda: it.proxy.commits_lost == 1)
        it.assert_once(signal, 40)  # it was committed all the same
        it.proxy.up()
        assert persist(it.receiver.client, signal, body) == OK
        it.assert_once(signal, 40)
        # The second time it was found to be there already.
        assert it.receiver.service.counts().duplicate == 20


@pytest.mark.parametrize(("signal", "protocol"), WAYS)
def test_while_postgresql_is_away_senders_are_asked_to_come_again_and_then_hear_ok(
    dsn: str, writer_dsn: str, signal: Signal, protocol: Protocol
) -> None:
    with house(dsn, writer_dsn, protocol=protocol) as it:
        it.begin(signal)
        it.proxy.refuse()
        bodies = [request(signal, count) for count in (1, 2, 3)]
        for body in bodies:
            refused = it.refused(signal, body)
            assert (refused.code, refused.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
            assert "did not commit within 0.5 seconds" in refused.details
        it.proxy.up()
        # Nothing of ours is restarted, and all who waited are served.
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda body: persist(it.receiver.client, signal, body), bodies)) == [OK] * 3
        it.assert_once(signal, 26)


def test_a_cut_connection_costs_nobody_anything(dsn: str, writer_dsn: str) -> None:
    with house(dsn, writer_dsn, ack_timeout=60) as it:
        for number in range(1, 4):
            assert it.receiver.send(Signal.TRACES, request(Signal.TRACES)) == OK
            it.proxy.refuse()
            it.proxy.up()
            it.assert_once(Signal.TRACES, 20 * number)


@pytest.mark.parametrize("signal", list(Signal))
def test_a_server_that_falls_silent_is_given_up_and_does_not_hold_its_writer(
    dsn: str, writer_dsn: str, signal: Signal
) -> None:
    with house(dsn, writer_dsn, database=DatabaseSettings(statement_timeout=3, connect_timeout=1)) as it:
        it.begin(signal)
        body, before = request(signal), it.proxy.accepted
        it.proxy.stall()
        refused = it.refused(signal, body)
        assert (refused.code, refused.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
        # There is one writer: that it connects again, while the server is still silent, shows that it got free.
        with ThreadPoolExecutor(1) as pool:
            retry = pool.submit(persist, it.receiver.client, signal, body)
            wait_until(lambda: it.proxy.accepted > before)
            it.proxy.flow()
            assert retry.result() == OK
        it.assert_once(signal, 40)


def test_a_server_that_falls_silent_in_the_middle_of_a_copy_loses_and_doubles_nothing(
    dsn: str, writer_dsn: str
) -> None:
    with house(dsn, writer_dsn, database=DatabaseSettings(statement_timeout=3, connect_timeout=1)) as it:
        it.begin(Signal.TRACES)
        body = request(Signal.TRACES, 5_000)
        it.proxy.stall_after(300_000)
        refused = it.refused(Signal.TRACES, body)
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        copying = "SELECT FROM pg_stat_activity WHERE query LIKE 'COPY%%' AND datname = current_database()"
        wait_until(lambda: len(it.receiver.database.rows(copying)) == 1)
        it.proxy.flow()
        assert persist(it.receiver.client, Signal.TRACES, body) == OK
        it.assert_once(Signal.TRACES, 5_020)
