"""What `migrate --roles` grants is enough, and no more."""

import contextlib
import datetime as dt
import json
from collections.abc import Iterator
from typing import Literal

import psycopg
import pytest
from psycopg.pq import DiagnosticField

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, ServeSettings
from otel_pg_exporter.errors import DeploymentError
from otel_pg_exporter.model import Outcome
from otel_pg_exporter.postgres.connection import Connections, connect
from otel_pg_exporter.postgres.dead_letters import DeadLetters, Selection
from otel_pg_exporter.postgres.migrate import check, migrate
from otel_pg_exporter.postgres.partitions import ahead, ensure_partitions
from otel_pg_exporter.postgres.replay import Progress, Replay
from otel_pg_exporter.postgres.roles import Roles
from otel_pg_exporter.postgres.verify import Verification
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
    partitions,
    span,
)
from tests.support import as_role
from tests.workload import database, logs, record, traces
from tests.workload import span as workload_span

DAY_NUMBER = minute_of(NOON) // 1440

RESOURCE_ROW = {"resource_id": RESOURCE, "schema_url": "", "dropped_attributes_count": 0}


@pytest.fixture
def granted(dsn: str) -> str:
    """Return the DSN of a database where PUBLIC has no rights, so that what a role may do `migrate --roles` gave it."""
    with psycopg.connect(dsn, autocommit=True) as administrator:
        administrator.execute(f"REVOKE ALL ON DATABASE {administrator.info.dbname} FROM PUBLIC".encode())
    assert migrate(DatabaseSettings(dsn=dsn), mapping.load(), Roles()) == []
    return dsn


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
                " SET last_seen = GREATEST(r.last_seen, EXCLUDED.last_seen)",
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


_FORBIDDEN = """
    -- Read what is not a key.
    SELECT attributes FROM spans
    SELECT events FROM spans
    SELECT name FROM spans
    SELECT ingested_at FROM spans
    SELECT * FROM spans_default
    SELECT body FROM logs
    SELECT body_json FROM logs
    SELECT time FROM logs
    SELECT attributes FROM resources
    SELECT otlp FROM dead_letters
    SELECT reason FROM dead_letters
    SELECT * FROM span_details
    SELECT * FROM grafana_logs
    SELECT * FROM red_metrics(now())
    SELECT * FROM trace_spans('00000000-0000-0000-0000-000000000001')
    COPY spans TO STDOUT
    COPY dead_letters (otlp) TO STDOUT
    INSERT INTO dead_letters (signal) VALUES ('') RETURNING otlp
    SELECT stavalues1 FROM pg_statistic
    SELECT pg_read_file('PG_VERSION')

    -- Change or delete what is there.
    UPDATE spans SET name = ''
    UPDATE logs SET body = ''
    UPDATE resources SET attributes = NULL
    UPDATE resources SET unseen_since = now()
    UPDATE retention SET keep = '1 hour'
    UPDATE retention_progress SET outliers_pruned = true
    UPDATE partitions SET rows_since = now()
    UPDATE ingest_requests SET received_at = now()
    UPDATE dead_letters SET otlp = ''
    UPDATE schema_migrations SET checksum = ''
    INSERT INTO resources (schema_url) VALUES ('') ON CONFLICT (resource_id) DO UPDATE SET attributes = NULL
    DELETE FROM spans
    DELETE FROM logs
    DELETE FROM traces
    DELETE FROM resources
    DELETE FROM ingest_requests
    DELETE FROM dead_letters
    TRUNCATE spans
    TRUNCATE traces
    INSERT INTO schema_migrations VALUES (9, '', '')
    INSERT INTO spans_default (name) VALUES ('')

    -- Change the tables, or make something beside them.
    DROP TABLE spans
    DROP SCHEMA otel CASCADE
    ALTER TABLE spans ADD COLUMN x int
    ALTER TABLE spans OWNER TO otel_writer
    ALTER TABLE spans DETACH PARTITION spans_default
    CREATE TABLE otel.mine ()
    CREATE TABLE otel.mine PARTITION OF spans FOR VALUES FROM ('2000-01-01') TO ('2000-01-02')
    CREATE FUNCTION otel.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'
    CREATE OR REPLACE FUNCTION otel.minute_of(moment timestamptz) RETURNS int4 LANGUAGE sql AS 'SELECT 1'
    ALTER FUNCTION ensure_partitions(date, date) RESET search_path
    CREATE INDEX ON spans (name)
    CREATE RULE mine AS ON INSERT TO spans DO NOTHING
    CREATE TRIGGER mine BEFORE INSERT ON spans FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
    BEGIN; LOCK TABLE spans IN ACCESS EXCLUSIVE MODE
    CREATE SCHEMA mine
    CREATE ROLE mine

    -- Call what only other functions call, or become somebody else.
    SELECT follow_promoted_columns()
    SELECT create_partition('spans', 'start_time', 'x', '2026-11-23')
    SELECT prune_before('logs_default', 'ingested_at', now(), 1)
    SELECT prune_traces(1)
    SELECT prune_resources(1)
    SET ROLE otel_migrator
    SET ROLE otel_reader
    SET SESSION AUTHORIZATION otel_migrator
    ALTER ROLE otel_migrator PASSWORD ''
    GRANT otel_reader TO otel_writer
    ALTER DEFAULT PRIVILEGES FOR ROLE otel_migrator GRANT ALL ON TABLES TO otel_writer
    ALTER SYSTEM SET log_statement = 'all'
    SET session_replication_role = replica
    COPY spans FROM PROGRAM 'true'
"""
FORBIDDEN = [line for line in map(str.strip, _FORBIDDEN.splitlines()) if line and not line.startswith("--")]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_the_writer_can_do_nothing_else(statement: str, writer: Connection) -> None:
    refused = writer.pgconn.exec_(statement.encode())
    assert refused.error_field(DiagnosticField.SQLSTATE) == b"42501", refused.get_error_message()


def test_what_the_writer_puts_in_front_of_our_names_the_owners_functions_do_not_see(
    granted: str, writer: Connection
) -> None:
    writer.execute(
        "SET search_path = pg_temp, otel;"
        "CREATE TEMPORARY TABLE spans (start_time timestamptz);"
        "CREATE TEMPORARY TABLE logs (time timestamptz);"
        "CREATE TEMPORARY TABLE pg_class (oid oid, relname name);"
        "CREATE TEMPORARY TABLE calls (caller text);"
        "CREATE FUNCTION pg_temp.missing_partitions(regclass, date, date) RETURNS SETOF date LANGUAGE sql"
        " AS 'INSERT INTO pg_temp.calls SELECT current_user RETURNING NULL::date';"
        "CREATE FUNCTION pg_temp.create_partition(text, text, text, date) RETURNS void LANGUAGE sql"
        " AS 'INSERT INTO pg_temp.calls SELECT current_user';"
        "CREATE FUNCTION pg_temp.format(text, text) RETURNS text LANGUAGE sql AS $$SELECT 'DROP TABLE spans'$$"
    )
    assert ensure_partitions(writer, "otel", [DAY_NUMBER]) == {DAY_NUMBER}
    assert fetch(writer, "SELECT * FROM pg_temp.calls") == []
    with open_connection(granted) as administrator:
        assert partitions(administrator) == {"spans_default", f"spans_p{NOON:%Y%m%d}"}


def test_the_planners_statistics_tell_the_writer_nothing_but_keys(granted: str, writer: Connection) -> None:
    with open_connection(granted) as administrator:
        insert(administrator, "spans", span(1), span(2))
        administrator.execute("ANALYZE")
        assert ("name",) in fetch(administrator, "SELECT attname FROM pg_stats WHERE tablename = 'spans'")
    seen = fetch(writer, "SELECT DISTINCT attname FROM pg_stats WHERE tablename LIKE 'spans%%'")
    assert {name for (name,) in seen} <= {"start_minute", "trace_id", "span_id", "start_time"}


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
        "SELECT proname, proconfig[1] FROM pg_proc WHERE pronamespace = 'otel'::regnamespace AND prosecdef ORDER BY 1",
    ) == [
        ("drop_expired_partition", "search_path=otel, pg_temp"),
        ("ensure_partitions", "search_path=otel, pg_temp"),
        ("prune_expired", "search_path=otel, pg_temp"),
    ]


def test_the_reader_sees_dead_letters_and_verifies(granted: str, reader: Connection) -> None:
    settings = DatabaseSettings(dsn=as_role("otel_reader", granted))
    with database(as_role("otel_writer", granted)) as opened:
        opened.writer.write([traces(workload_span(0), workload_span(1, span_id=bytes(8)))])
    with connect(settings) as connection:
        letters = DeadLetters(connection, settings)
        [letter] = letters.newest_first(Selection())
        assert letters.items([letter.id])
        assert list(Verification(connection, settings, since=NOON - dt.timedelta(days=9999)).run()) == []
        with pytest.raises(DeploymentError, match=r"docs/how-to/roles\.md"):
            list(letters.purge(Selection()))


def test_the_operator_replays_purges_and_repairs(granted: str) -> None:
    dsn = as_role("otel_operator", granted)
    with psycopg.connect(granted, autocommit=True) as administrator:
        administrator.execute("ALTER TABLE otel.logs ADD CONSTRAINT no CHECK (body <> 'bad') NOT VALID")
        administrator.execute("ALTER TABLE otel.spans ADD CONSTRAINT no CHECK (name <> 'bad') NOT VALID")
        with database(as_role("otel_writer", granted)) as opened:
            opened.writer.write([traces(workload_span(0), workload_span(1, name="bad"))])
            opened.writer.write([logs(record("bad"))])
        settings = ServeSettings(database=DatabaseSettings(dsn=dsn))
        with contextlib.closing(Connections(settings.database, size=1)) as connections:
            replay = Replay(settings, mapping.load(), connections)
            assert list(replay.run(Selection()))[-1] == Progress(refused=2)
            administrator.execute("ALTER TABLE otel.logs DROP CONSTRAINT no")
            assert list(replay.run(Selection()))[-1] == Progress(stored=1, refused=1)
        administrator.execute("UPDATE otel.traces SET span_count = 7")
        administrator.execute("INSERT INTO otel.traces SELECT md5('')::uuid, now(), now(), 1, 0")
        administrator.execute(
            "INSERT INTO otel.spans SELECT (json_populate_record(s, %s)).* FROM otel.spans AS s",
            [json.dumps({"trace_id": TRACE})],
        )
    with connect(settings.database) as connection:
        assert list(DeadLetters(connection, settings.database).purge(Selection())) == [1]
        walk = Verification(connection, settings.database, since=NOON - dt.timedelta(days=9999))
        assert sorted(each.kind for each in walk.run(fix=True)) == ["different", "missing", "superfluous"]
        assert list(Verification(connection, settings.database, since=NOON - dt.timedelta(days=9999)).run()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM spans",
        "UPDATE spans SET name = ''",
        "UPDATE dead_letters SET otlp = ''",
        "DELETE FROM ingest_requests",
        "DROP TABLE dead_letters",
        "CREATE TABLE otel.mine ()",
        "SET ROLE otel_migrator",
    ],
)
def test_the_operator_can_do_nothing_else(statement: str, granted: str) -> None:
    with (
        open_connection(as_role("otel_operator", granted)) as operator,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        operator.execute(statement.encode())
