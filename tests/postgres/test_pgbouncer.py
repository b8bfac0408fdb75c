"""Every command that works with the tables passes through a PgBouncer that pools by transaction."""

import contextlib
import datetime as dt
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, ServeSettings
from otel_pg_exporter.errors import OutageError
from otel_pg_exporter.postgres.connection import Connections, connect
from otel_pg_exporter.postgres.dead_letters import DeadLetters, Selection
from otel_pg_exporter.postgres.migrate import check, migrate
from otel_pg_exporter.postgres.migration_files import bundled
from otel_pg_exporter.postgres.replay import Progress, Replay
from otel_pg_exporter.postgres.verify import Verification
from tests.pgbouncer import PgBouncer
from tests.postgres.samples import Connection, fetch, open_connection
from tests.serving import run
from tests.support import as_role
from tests.workload import Database, database, logs, record, span, traces


def settings(pgbouncer: PgBouncer, role: str, dsn: str) -> DatabaseSettings:
    return DatabaseSettings(dsn=pgbouncer.route(as_role(role, dsn)))


def backends(administrator: Connection) -> set[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE usename = 'otel_writer' AND datname = current_database()"
    return {pid for (pid,) in fetch(administrator, query)}


def test_writers_share_few_connections_and_leave_no_setting_of_theirs_in_them(dsn: str, pgbouncer: PgBouncer) -> None:
    writer = settings(pgbouncer, "otel_writer", dsn)
    odd = DatabaseSettings(statement_timeout=70, lock_timeout=50, synchronous_commit="off")
    spans = [traces(*(span(number * 10 + each) for each in range(10))) for number in range(20)]
    records = [logs(*(record(f"{number}.{each}") for each in range(10))) for number in range(20)]

    def write(opened: Database) -> int:
        return sum(opened.writer.write([batch])[0].stored for batch in [*spans, *records])

    with open_connection(dsn) as administrator, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(database(writer.dsn, read_dsn=dsn, settings=odd)) for _ in range(6)]
        with ThreadPoolExecutor(len(opened)) as pool:
            assert sum(pool.map(write, opened)) == 400
        assert 1 <= len(backends(administrator)) <= 3
        with connect(writer) as other:
            shown = [
                other.execute(f"SHOW {name}".encode()).fetchall()[0][0]
                for name in ("statement_timeout", "lock_timeout", "synchronous_commit")
                for _ in range(4)  # the connections go round
            ]
        assert shown == ["0"] * 8 + ["on"] * 4
        opened[0].assert_traces_exact()


def test_migrate_and_check(empty_dsn: str, migrated: str, pgbouncer: PgBouncer) -> None:
    migrator = settings(pgbouncer, "otel_migrator", empty_dsn)
    with psycopg.connect(empty_dsn, autocommit=True) as administrator:
        administrator.execute("CREATE SCHEMA otel AUTHORIZATION otel_migrator")
    assert migrate(migrator, mapping.load()) == [each.name for each in bundled()]
    assert migrate(migrator, mapping.load()) == []
    with connect(migrator) as connection:
        check(connection, "otel", mapping.load())


def test_verify_and_dead_letters(dsn: str, pgbouncer: PgBouncer) -> None:
    operator = settings(pgbouncer, "otel_operator", dsn)
    long_ago = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
    with database(settings(pgbouncer, "otel_writer", dsn).dsn, read_dsn=dsn) as opened:
        opened.execute("ALTER TABLE spans ADD CONSTRAINT no CHECK (name <> 'bad')")
        assert opened.writer.write([traces(span(0), span(1, name="bad"))])[0].stored == 1
        opened.execute("ALTER TABLE spans DROP CONSTRAINT no", "UPDATE traces SET span_count = 7")
        with connect(operator) as connection:
            found = Verification(connection, operator, since=long_ago).run(fix=True)
            assert [each.kind for each in found] == ["different"]
        with contextlib.closing(Connections(operator, size=1)) as connections:
            replay = Replay(ServeSettings(database=operator), mapping.load(), connections)
            assert list(replay.run(Selection()))[-1] == Progress(stored=1)
        with connect(operator) as connection:
            assert list(DeadLetters(connection, operator).newest_first(Selection())) == []
        opened.assert_traces_exact()


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("otel_writer", ["check"]),
        ("otel_writer", ["migrate", "--check"]),
        ("otel_writer", ["partitions", "enforce"]),
        ("otel_reader", ["partitions", "list"]),
        ("otel_reader", ["tail", "--once"]),
        ("otel_reader", ["verify", "--since", "7d"]),
        ("otel_reader", ["dead-letters", "list"]),
        ("otel_operator", ["dead-letters", "replay", "--all"]),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else each,
)
def test_the_commands(role: str, command: list[str], dsn: str, pgbouncer: PgBouncer, tmp_path: Path) -> None:
    variables = {
        "OTEL_PG_EXPORTER_DSN": pgbouncer.route(as_role(role, dsn)),
        "OTEL_PG_EXPORTER_SPOOL_DIR": str(tmp_path / "spool"),
    }
    done = run(*command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


def test_options_in_the_dsn_are_refused_by_name(dsn: str, pgbouncer: PgBouncer) -> None:
    writer = settings(pgbouncer, "otel_writer", dsn)
    with pytest.raises(OutageError, match="unsupported startup parameter"):
        connect(DatabaseSettings(dsn=writer.dsn + " options='-c geqo=off'"))
