"""The harness itself: a load without any fault passes, and a judge sees what is wrong."""

import psycopg
import pytest

from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, load


def test_two_receivers_of_the_same_data_store_it_once(prepared: str, receive: Receive) -> None:
    ledger = Ledger()
    services = [receive(prepared), receive(prepared)]
    with load(ledger, *(str(service.grpc_endpoint) for service in services)) as running:
        running.wait_for_more(80)
    tables = judge(prepared, ledger, services=services)
    assert tables.rows > 1000
    assert tables.dead_letters.total() > 4


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("DELETE FROM spans WHERE name NOT LIKE '%.shop.0'", "acknowledged spans are missing"),
        ("INSERT INTO logs SELECT * FROM logs", "log records are stored more than once"),
        ("UPDATE spans SET start_time = start_time - interval '1 hour'", "rows of traces and traces_exact differ"),
        ("DELETE FROM dead_letters", "acknowledged bad spans are missing in dead_letters"),
        ("UPDATE logs SET body = body || '!'", "log records are stored that nobody sent"),
    ],
)
def test_the_judge_says_what_is_wrong(prepared: str, receive: Receive, damage: str, finding: str) -> None:
    ledger = Ledger()
    service = receive(prepared)
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more(20)
    with psycopg.connect(prepared, autocommit=True) as connection:
        connection.execute("SET search_path = otel")
        connection.execute(damage.encode())
    with pytest.raises(AssertionError, match=finding):
        judge(prepared, ledger, services=[service])
