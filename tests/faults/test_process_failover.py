"""A primary that dies, and one that turns read-only, beside a synchronous standby that is promoted."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import SchemaError
from otel_pg_exporter.postgres.migrate import migrate
from tests.faults.conftest import Receive
from tests.faults.judge import judge
from tests.faults.load import Ledger, load, refuse_poison
from tests.faults.machines import Pair, kill_machine, replicated
from tests.support import wait_until


@pytest.fixture
def pair(open_folder: Path, binaries: Path) -> Iterator[Pair]:
    """Return a primary with tables that refuse poison, and its synchronous standby."""
    with replicated(open_folder, binaries) as servers:
        migrate(DatabaseSettings(dsn=servers.primary_dsn), mapping.load())
        refuse_poison(servers.primary_dsn)
        yield servers


def test_what_was_acknowledged_is_on_the_standby_when_the_primary_dies(pair: Pair, receive: Receive) -> None:
    ledger = Ledger()
    service = receive(pair.dsn(target_session_attrs="read-write"))
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more(40)
        assert pair.primary.pid is not None
        kill_machine(pair.primary.pid)
        pair.promote()
        running.wait_for_more(40)
    judge(pair.standby_dsn, ledger, services=[service])


def test_a_primary_that_turns_read_only_under_open_connections_is_left_for_the_promoted_standby(
    pair: Pair, receive: Receive
) -> None:
    ledger = Ledger()
    service = receive(pair.dsn(target_session_attrs="read-write"))
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more(40)
        with psycopg.connect(pair.primary_dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            connection.execute("SELECT pg_reload_conf()")
        pair.promote()
        running.wait_for_more(40)
    judge(pair.standby_dsn, ledger, services=[service])
    with psycopg.connect(pair.primary_dsn, autocommit=True) as connection:
        # COMMITs wait for a standby there: they need not wait for the end of their time.
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("promoted", [True, False], ids=["promoted", "primary-back"])
def test_a_standby_that_is_met_while_the_primary_is_away_holds_nothing_up(
    pair: Pair, receive: Receive, promoted: bool
) -> None:
    ledger = Ledger()
    service = receive(pair.dsn())  # it asks for no primary: the first that answers will do
    with load(ledger, str(service.grpc_endpoint)) as running:
        running.wait_for_more(40)
        assert pair.primary.pid is not None
        kill_machine(pair.primary.pid)
        wait_until(lambda: "in a read-only transaction" in pair.standby_log.read_text())
        if promoted:
            pair.promote()
        else:
            wait_until(pair.primary.revive)
        running.wait_for_more(40)
    judge(pair.standby_dsn if promoted else pair.primary_dsn, ledger, services=[service])


def test_a_standby_is_not_migrated_and_called_that(pair: Pair) -> None:
    with pytest.raises(SchemaError, match="schema otel: this server is a standby, which takes no changes"):
        migrate(DatabaseSettings(dsn=pair.standby_dsn), mapping.load())
