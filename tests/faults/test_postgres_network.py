"""A network that cuts, stalls and swallows, under load: nothing acknowledged is lost, and nothing is there twice."""

from collections.abc import Callable

import pytest

from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, Load, load
from tests.proxy import Proxy
from tests.support import wait_until


def cut(proxy: Proxy, running: Load) -> None:
    proxy.refuse()
    proxy.up()


def outage(proxy: Proxy, running: Load) -> None:
    proxy.refuse()
    running.wait_for_more()
    proxy.up()


def stall(proxy: Proxy, running: Load) -> None:
    proxy.stall()
    running.wait_for_more()
    proxy.flow()


def stall_in_the_middle_of_a_copy(proxy: Proxy, running: Load) -> None:
    proxy.stall_after(20_000)
    _flow_again(proxy, running)


def stall_before_a_commit(proxy: Proxy, running: Load) -> None:
    proxy.stall_at_commit(handed_on=False)
    _flow_again(proxy, running)


def stall_after_a_commit(proxy: Proxy, running: Load) -> None:
    proxy.stall_at_commit(handed_on=True)
    _flow_again(proxy, running)


def _flow_again(proxy: Proxy, running: Load) -> None:
    wait_until(lambda: proxy.stalled)
    running.wait_for_more()
    proxy.flow()


def lose_a_commit(proxy: Proxy, running: Load) -> None:
    _lose_commits(proxy, 1)


def lose_commit_after_commit(proxy: Proxy, running: Load) -> None:
    _lose_commits(proxy, 6)


def _lose_commits(proxy: Proxy, count: int) -> None:
    before = proxy.commits_lost
    proxy.lose_commits(count)
    wait_until(lambda: proxy.commits_lost >= before + count)


def lose_a_commit_and_go_away(proxy: Proxy, running: Load) -> None:
    before = proxy.commits_lost
    proxy.lose_commits(1, then=proxy.refuse)  # the server dies with the answer on its lips
    wait_until(lambda: proxy.commits_lost > before)
    running.wait_for_more()
    proxy.up()


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        outage,
        stall,
        stall_in_the_middle_of_a_copy,
        stall_before_a_commit,
        stall_after_a_commit,
        lose_a_commit,
        lose_commit_after_commit,
        lose_a_commit_and_go_away,
    ],
)
def test_nothing_is_lost_or_doubled_when_the_network_fails(
    prepared: str, proxy: Proxy, receive: Receive, harm: Callable[[Proxy, Load], None], rounds: int
) -> None:
    ledger = Ledger()
    service = receive(proxy.dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(2 * rounds):
            running.wait_for_more()
            harm(proxy, running)
        running.wait_for_more()
    judge(prepared, ledger, services=[service])


def test_log_records_whose_commit_was_lost_before_an_outage_are_stored_once_after_it(
    prepared: str, proxy: Proxy, receive: Receive, rounds: int
) -> None:
    """Each connection that comes through loses its COMMIT's answer, and then there is none for a while."""
    ledger = Ledger()
    service = receive(proxy.dsn)
    with load(ledger, str(service.grpc_endpoint)) as running:
        for _ in range(rounds):
            running.wait_for_more()
            for _ in range(3):
                lose_a_commit_and_go_away(proxy, running)
            running.wait_for_more()
    judge(prepared, ledger, services=[service])
    assert service.counts().duplicate > 0
