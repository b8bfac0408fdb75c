"""What docs/roles.md grants is enough, and no more."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.model import Outcome
from otel_pg_exporter.postgres.migrate import check, migrate
from otel_pg_exporter.postgres.partitions import ahead, ensure_partitions
from tests.postgres.samples import (
    NOON,
    RESOURCE,
    TRACE,
    Connection,
    fetch,
    insert,
    log,
    minute_of,
    open_connection,
    span,
)
from tests.workload import database, logs, record, traces
from tests.workload import span as workload_span

DOCUMENT = Path(__file__).parents[2] / "docs" / "roles.md"
ROLES = ("otel_migrator", "otel_writer", "otel_reader")
DAY_NUMBER = minute_of(NOON) // 1440

RESOURCE_ROW = {"resource_id": RESOURCE, "schema_url": "", "dropped_attributes_count": 0}


@pytest.fixture
def granted(empty_dsn: str) -> Iterator[str]:
    """Return the DSN of a database that was set up by following docs/roles.md."""
    once, rights = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    with psycopg.connect(empty_dsn, autocommit=True) as administrator:
        database = administrator.info.dbname
        # CONNECT and TEMPORARY: what a role may do must come from the document.
        administrator.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC".encode())
        administrator.execute(once.replace("telemetry", database).encode())
        for role in ROLES:
            administrator.execute(f"ALTER ROLE {role} PASSWORD 'x'".encode())
        migrate(DatabaseSettings(dsn=as_role("otel_migrator", empty_dsn)), mapping.load())
        with open_connection(as_role("otel_migrator", empty_dsn)) as migrator:
            migrator.execute(rights.encode())
        yield empty_dsn
        for role in ROLES:
            administrator.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}".encode())


def as_role(role: str, dsn: str) -> str:
    return make_conninfo(dsn, user=role, password="x")


@pytest.fixture
def writer(granted: str) -> Iterator[Connection]:
    with open_connection(as_role("otel_writer", granted)) as connection:
        yield connection


@pytest.fixture
def reader(granted: str) -> Iterator[Connection]:
    with open_connection(as_role("otel_reader", granted)) as connection:
        yield connection


def test_the_writer_does_all_that_ingest_needs(writer: Connection) -> None:
    check(writer, "otel", mapping.load())
    assert ahead(writer, "otel", 1)
    assert ensure_partitions(writer, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
    with writer.transaction():
        for _ in range(2):
            writer.execute(
                "INSERT INTO resources AS r (resource_id, schema_url, dropped_attributes_count, last_seen)"
                " VALUES (%s, '', 0, '2026-11-23') ON CONFLICT (resource_id) DO UPDATE"
                " SET last_seen = EXCLUDED.last_seen",
                [RESOURCE],
            )
            writer.execute(
                "INSERT INTO ingest_requests (request_id, rejected, error_message) VALUES (%s, 0, '')"
                " ON CONFLICT DO NOTHING RETURNING request_id",
                [RESOURCE],
            )
        assert fetch(writer, "SELECT rejected, error_message FROM ingest_requests WHERE request_id = %s", RESOURCE)
        writer.execute("UPDATE ingest_requests SET rejected = 1, error_message = 'x' WHERE request_id = %s", [RESOURCE])
        for table, row in (("spans", span(1)), ("logs", log())):
            with writer.cursor().copy(f"COPY {table} ({', '.join(row)}) FROM STDIN".encode()) as copy:
                copy.write_row(list(row.values()))
        for _ in range(2):
            writer.execute(
                "INSERT INTO dead_letters (signal, request_id, item_index, reason, otlp)"
                " VALUES ('logs', %s, 0, 'r', '') ON CONFLICT DO NOTHING",
                [RESOURCE],
            )


@pytest.mark.parametrize("method", ["copy", "insert"])
def test_the_writer_stores_what_comes_twice_once(granted: str, method: Literal["copy", "insert"]) -> None:
    with database(as_role("otel_writer", granted), method=method) as opened:
        for batch in (traces(workload_span(0), workload_span(1)), logs(record("once"), record("once"))):
            assert opened.writer.write([batch]) == [Outcome(stored=2)]
            assert opened.writer.write([batch]) == [Outcome(duplicate=2)]


def test_without_the_right_to_temporary_tables_duplicates_are_stored_once_all_the_same(
    granted: str,
) -> None:
    with psycopg.connect(granted, autocommit=True) as administrator:
        administrator.execute(f"REVOKE TEMPORARY ON DATABASE {administrator.info.dbname} FROM otel_writer".encode())
    with database(as_role("otel_writer", granted)) as opened:
        batch = traces(workload_span(0), workload_span(1))
        assert opened.writer.write([batch]) == [Outcome(stored=2)]
        for _ in range(2):
            assert opened.writer.write([batch]) == [Outcome(duplicate=2)]


def test_the_writer_keeps_traces_up_to_date(writer: Connection) -> None:
    upsert = """
        INSERT INTO otel.traces AS t (trace_id, start_time, end_time, span_count, error_count, service_names)
        SELECT * FROM unnest(%s::uuid[], %s::timestamptz[], %s::timestamptz[], ARRAY[1::int8], ARRAY[0::int8]) AS u,
            LATERAL (SELECT ARRAY['b']) AS names
        ON CONFLICT (trace_id) DO UPDATE SET start_time = least(t.start_time, EXCLUDED.start_time),
            span_count = t.span_count + EXCLUDED.span_count,
            service_names = otel.merge_service_names(t.service_names, EXCLUDED.service_names)
    """
    for _ in range(2):
        writer.execute(upsert, [[TRACE], [NOON], [NOON]])
    assert fetch(writer, "SELECT span_count, service_names FROM traces") == [(2, ["b"])]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT attributes FROM spans",
        "SELECT events FROM spans",
        "SELECT name FROM spans",
        "SELECT body FROM logs",
        "SELECT time FROM logs",
        "SELECT attributes FROM resources",
        "SELECT otlp FROM dead_letters",
        "SELECT * FROM span_details",
        "SELECT * FROM grafana_logs",
        "SELECT * FROM spans_default",
        "SELECT * FROM red_metrics(now())",
        "SELECT * FROM trace_spans('00000000-0000-0000-0000-000000000001')",
        "UPDATE spans SET name = ''",
        "UPDATE resources SET attributes = NULL",
        "UPDATE ingest_requests SET received_at = now()",
        "DELETE FROM spans",
        "DELETE FROM traces",
        "DELETE FROM ingest_requests",
        "TRUNCATE spans",
        "DROP TABLE spans",
        "ALTER TABLE spans ADD COLUMN x int",
        "CREATE TABLE otel.mine ()",
        "INSERT INTO schema_migrations VALUES (9, '', '')",
        "INSERT INTO spans_default (name) VALUES ('')",
        "SELECT follow_promoted_columns()",
        "SELECT create_partition('spans', 'start_time', 'x', '2026-11-23')",
        "SET ROLE otel_migrator",
    ],
)
def test_the_writer_can_do_nothing_else(statement: str, writer: Connection) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        writer.execute(statement.encode())


def test_the_reader_reads_everything_and_writes_nothing(reader: Connection, writer: Connection) -> None:
    ensure_partitions(writer, "otel", [DAY_NUMBER])
    insert(writer, "spans", span(1))
    insert(writer, "resources", RESOURCE_ROW)
    views = fetch(
        reader,
        "SELECT oid::regclass::text FROM pg_class"
        " WHERE relkind IN ('r', 'p', 'v') AND relnamespace = 'otel'::regnamespace",
    )
    assert len(views) > 15
    for (view,) in views:
        fetch(reader, f"SELECT * FROM {view}")
    assert fetch(reader, "SELECT count(*) FROM trace_tree(%s)", TRACE) == [(0,)]
    for function in ("red_metrics", "service_map", "genai_usage"):
        fetch(reader, f"SELECT * FROM {function}(now() - interval '1 hour')")
    for statement in ("DELETE FROM traces", "SELECT ensure_partitions('2026-11-25', '2026-11-25')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(statement.encode())


def test_the_functions_that_run_with_the_owners_rights_are_few_and_pinned(writer: Connection) -> None:
    assert fetch(
        writer,
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'otel'::regnamespace AND prosecdef",
    ) == [("ensure_partitions", ["search_path=otel, pg_temp"])]
