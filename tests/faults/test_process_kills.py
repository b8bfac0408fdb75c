"""Our own process killed under load, between receipt, spool, COMMIT and answer, and started again beside its spool."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.gates import COMMIT, COPY, GATES, held
from tests.faults.judge import judge
from tests.faults.load import Ledger, load
from tests.proxy import Proxy
from tests.serving import Serving, StartServing, start_serving
from tests.support import free_port, wait_until

_KILLS = 4  # in one round
_LONGEST_DELAY = 0.3  # seconds between the last look and a kill


class House:
    """A `serve` on one port, with one spool, that is started again whenever it was killed."""

    def __init__(self, serve: StartServing, folder: Path, proxy: Proxy) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.proxy = proxy
        self._serve = serve
        self._spool = folder / "spool"
        self.serving = self._start()

    def _start(self) -> Serving:
        arguments = ("--dsn", self.proxy.dsn, "--spool-dir", self._spool, "--grpc-endpoint", self.address)
        return self._serve(*arguments, "--ack-timeout", "0.3", "--connect-timeout", "2")

    def kill(self) -> None:
        """Kill the process; from any thread."""
        self.serving.send(signal.SIGKILL)

    def restart(self) -> None:
        """Start again what was killed."""
        assert self.serving.wait() == -signal.SIGKILL
        self.serving = self._start()

    def has_spooled(self) -> bool:
        """Tell whether a request lies in the spool, as far as can be seen from outside."""
        return any(file.stat().st_size > 100_000 for file in self._spool.rglob("spool.db-wal"))


@pytest.fixture
def house(tmp_path: Path, proxy: Proxy) -> Iterator[House]:
    with start_serving(tmp_path) as serve:
        yield House(serve, tmp_path, proxy)


@pytest.fixture
def chance() -> random.Random:
    """Return what draws times and choices; OTEL_PG_EXPORTER_FAULT_SEED repeats a run, as far as a run can be."""
    seed = int(os.environ.get("OTEL_PG_EXPORTER_FAULT_SEED", random.randrange(2**32)))
    print(f"OTEL_PG_EXPORTER_FAULT_SEED={seed}")  # noqa: T201 - shown when the test fails
    return random.Random(seed)


def test_nothing_acknowledged_is_lost_or_doubled_when_the_process_is_killed_again_and_again(
    house: House, prepared: str, chance: random.Random, rounds: int
) -> None:
    ledger = Ledger()
    with load(ledger, house.address, clients=6) as running:
        for _ in range(_KILLS * rounds):
            running.wait_for_more(chance.randrange(1, 60))
            is_away = chance.random() < 0.5
            if is_away:
                house.proxy.refuse()  # PostgreSQL is away when it dies
            threading.Event().wait(chance.uniform(0, _LONGEST_DELAY))
            house.kill()
            if is_away and chance.random() < 0.5:
                house.proxy.up()  # and back when it starts
                is_away = False
            house.restart()
            running.wait_for_more(chance.randrange(1, 20))
            if is_away:
                house.proxy.up()
        running.wait_for_more()
    judge(prepared, ledger)


@pytest.mark.parametrize("gate", [COPY, COMMIT], ids=["copy", "commit"])
def test_a_process_that_dies_in_a_transaction_stores_it_once(
    house: House, prepared: str, gate: int, rounds: int
) -> None:
    with psycopg.connect(prepared, autocommit=True) as connection:
        connection.execute(GATES.encode())
    ledger = Ledger()
    with load(ledger, house.address) as running:
        for _ in range(rounds):
            running.wait_for_more()
            with held(prepared, gate):
                house.kill()
                house.restart()
            running.wait_for_more()
    judge(prepared, ledger)


def test_a_process_that_dies_with_the_answer_of_a_commit_stores_it_once(
    house: House, prepared: str, rounds: int
) -> None:
    ledger = Ledger()
    with load(ledger, house.address) as running:
        for _ in range(2 * rounds):
            running.wait_for_more()
            house.proxy.lose_commits(1, then=house.kill)
            house.restart()
        running.wait_for_more()
    judge(prepared, ledger)


def test_a_process_that_dies_while_it_spools_leaves_all_that_it_acknowledged_to_the_next(
    house: House, prepared: str, rounds: int
) -> None:
    ledger = Ledger()
    with load(ledger, house.address) as running:
        for _ in range(rounds):
            running.wait_for_more()
            house.proxy.refuse()
            wait_until(house.has_spooled)
            house.kill()
            house.restart()  # without a PostgreSQL
            running.wait_for_more()
            house.kill()
            house.restart()
            house.proxy.up()
            running.wait_for_more()
    judge(prepared, ledger)
