import os
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import SchemaError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import Table
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import check, check_objects, migrate, render
from otel_pg_exporter.postgres.migration_files import bundled
from otel_pg_exporter.postgres.partitions import ensure_partitions
from otel_pg_exporter.postgres.roles import Roles
from tests.postgres.samples import (
    NOON,
    Connection,
    catalog,
    fetch,
    insert,
    insert_traces,
    minute_of,
    open_connection,
    partitions,
    span,
)
from tests.support import as_role, wait_until

FILES = [each.name for each in bundled()]
ODD_NAME = """Otel "x" 'y' \\ :schema"""

PROMOTED = """
table = "spans"
[[column]]
name = "cart_total"
type = "int8"
from = 'span.attributes["cart.total"]'
sum_in_traces = true
comment = "What the customer's cart costs."
[[column]]
name = "cart"
type = "jsonb"
from = 'span.attributes["cart"]'
"""


@pytest.fixture(scope="module")
def bundled_mapping() -> Mapping:
    return mapping.load()


@pytest.fixture
def larger_mapping(tmp_path: Path) -> Mapping:
    file = tmp_path / "cart.toml"
    file.write_text(PROMOTED, encoding="utf-8")
    return mapping.load([file])


@pytest.fixture
def empty(empty_dsn: str) -> Iterator[Connection]:
    with open_connection(empty_dsn) as connection:
        yield connection


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn) as connection:
        yield connection


@pytest.fixture
def owner_dsn(server: EmbeddedServer, empty_dsn: str) -> str:
    """Return a DSN of the empty database for a role that may log in, and nothing else."""
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = 'plain_owner'").fetchall():
            connection.execute("CREATE ROLE plain_owner LOGIN PASSWORD 'plain'")
    return psycopg.conninfo.make_conninfo(empty_dsn, user="plain_owner", password="plain")


def test_an_empty_database_gets_the_tables_once(empty_dsn: str, empty: Connection, bundled_mapping: Mapping) -> None:
    settings = DatabaseSettings(dsn=empty_dsn)
    assert migrate(settings, bundled_mapping) == FILES
    before = catalog(empty, "otel")
    assert migrate(settings, bundled_mapping) == []
    assert catalog(empty, "otel") == before
    check(empty, "otel", bundled_mapping)


def test_versions_are_numbered_without_gaps() -> None:
    assert [each.version for each in bundled()] == list(range(1, len(FILES) + 1))


def test_ten_processes_migrate_at_once(empty_dsn: str, empty: Connection, bundled_mapping: Mapping) -> None:
    settings = DatabaseSettings(dsn=empty_dsn)
    start = threading.Barrier(10)

    def replica(_: int) -> list[str]:
        start.wait()
        return migrate(settings, bundled_mapping)

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(replica, range(10)))
    assert sorted(results) == [[]] * 9 + [FILES]
    check(empty, "otel", bundled_mapping)


def test_a_schema_name_may_hold_anything(empty_dsn: str, empty: Connection, bundled_mapping: Mapping) -> None:
    assert migrate(DatabaseSettings(dsn=empty_dsn, schema=ODD_NAME), bundled_mapping) == FILES
    check(empty, ODD_NAME, bundled_mapping)
    assert ensure_partitions(empty, ODD_NAME, [20_000]) == {20_000}
    with open_connection(empty_dsn, ODD_NAME) as connection:
        insert_traces(connection, span(1))
        assert fetch(connection, "SELECT count(*) FROM span_details") == [(1,)]
        empty.execute("SET search_path = ''")  # functions don't depend on the caller's
        assert empty.execute(
            sql.SQL("SELECT count(*) FROM {}(%s)").format(sql.Identifier(ODD_NAME, "trace_tree")),
            [span(1)["trace_id"]],
        ).fetchall() == [(1,)]


def test_two_schemas_share_a_database(empty_dsn: str, empty: Connection, bundled_mapping: Mapping) -> None:
    for schema in ("one", "two"):
        assert migrate(DatabaseSettings(dsn=empty_dsn, schema=schema), bundled_mapping) == FILES
    check(empty, "one", bundled_mapping)
    check(empty, "two", bundled_mapping)


@pytest.mark.parametrize("schema", ["", "a\0b", "é" * 32])
def test_a_schema_name_that_postgresql_would_change_is_refused(schema: str, bundled_mapping: Mapping) -> None:
    with pytest.raises(SchemaError, match="1 to 63 bytes"):
        migrate(DatabaseSettings(dsn="host=127.0.0.1 port=1", schema=schema), bundled_mapping)


@pytest.mark.parametrize("schema", ["otel", ODD_NAME])
def test_the_rendered_script_makes_the_same_schema(
    schema: str, binaries: Path, empty_dsn: str, empty: Connection, larger_mapping: Mapping
) -> None:
    script = render(schema, larger_mapping)
    command: list[str | Path] = [
        binaries / "psql",
        "-X",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        "-o",
        os.devnull,
        "-f",
        "-",
        empty_dsn,
    ]
    run = subprocess.run(command, input=script.encode(), capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    check(empty, schema, larger_mapping)
    rendered = catalog(empty, schema)
    assert migrate(DatabaseSettings(dsn=empty_dsn, schema=schema), larger_mapping) == []
    assert catalog(empty, schema) == rendered

    empty.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
    migrate(DatabaseSettings(dsn=empty_dsn, schema=schema), larger_mapping)
    assert catalog(empty, schema) == rendered


def test_the_mapping_and_the_tables_agree_both_ways(connection: Connection, bundled_mapping: Mapping) -> None:
    def declared(table: Table) -> dict[str, tuple[str, bool]]:
        # The comment is what people read: it says where a column may be NULL.
        return {each.name: (each.type.value, each.promoted or "NULL" in each.comment) for each in table.columns}

    def found(table: str) -> dict[str, tuple[str, bool]]:
        rows = fetch(
            connection,
            "SELECT attname, typname, NOT attnotnull FROM pg_attribute JOIN pg_type AS t ON t.oid = atttypid"
            " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            table,
        )
        return {name: (kind, nullable) for name, kind, nullable in rows}

    own = {
        "spans": {"ingested_at": False},
        "logs": {"ingested_at": False},
        "resources": {"last_seen": False, "unseen_since": True},
    }
    for table in (bundled_mapping.spans, bundled_mapping.logs, bundled_mapping.resources):
        columns = found(table.name)
        for name, nullable in own[table.name].items():
            assert columns.pop(name) == ("timestamptz", nullable)
        assert columns == declared(table)
    sums = {name: kind for name, kind in found("traces").items() if kind[0] == "numeric"}
    assert sums == {column.name: ("numeric", True) for column in bundled_mapping.spans.sums}


def test_the_primary_keys_are_those_of_the_mapping(connection: Connection, bundled_mapping: Mapping) -> None:
    for table in (bundled_mapping.spans, bundled_mapping.logs, bundled_mapping.resources):
        rows = fetch(
            connection,
            "SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)"
            " WHERE indrelid = %s::regclass AND indisprimary ORDER BY array_position(indkey::int2[], attnum)",
            table.name,
        )
        assert [name for (name,) in rows] == [column.name for column in table.key]


def test_every_table_column_view_and_function_has_a_comment(dsn: str, connection: Connection) -> None:
    ensure_partitions(connection, "otel", [20_000])
    assert (
        fetch(
            connection,
            """
            SELECT c.oid::regclass::text, a.attname FROM pg_class AS c
                LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                    AND c.relkind <> 'v' AND c.relname NOT LIKE '%%\\_default' -- a view's query, the parent's comments
            WHERE c.relnamespace = 'otel'::regnamespace AND c.relkind IN ('r', 'p', 'v')
                AND (obj_description(c.oid, 'pg_class') IS NULL
                    OR a.attname IS NOT NULL AND col_description(c.oid, a.attnum) IS NULL)
            UNION ALL
            SELECT oid::regprocedure::text, NULL FROM pg_proc
            WHERE pronamespace = 'otel'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL
            """,
        )
        == []
    )


def test_jsonb_is_compressed_with_lz4_exactly_where_the_server_has_it(connection: Connection) -> None:
    if connection.info.server_version < 140_000:
        pytest.skip("no choice before PostgreSQL 14")
    [(lz4,)] = fetch(
        connection, "SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
    )
    ensure_partitions(connection, "otel", [20_000])
    methods = fetch(
        connection,
        "SELECT DISTINCT attcompression::text FROM pg_attribute WHERE atttypid = 'jsonb'::regtype AND attrelid = ANY"
        " ('{spans,spans_default,spans_p20241004,logs,logs_default,logs_p20241004,resources}'::regclass[])",
    )
    assert methods == [("l" if lz4 else "",)]


def test_a_users_promoted_columns_are_added_online(
    dsn: str, connection: Connection, bundled_mapping: Mapping, larger_mapping: Mapping
) -> None:
    settings = DatabaseSettings(dsn=dsn)
    ensure_partitions(connection, "otel", [minute_of(NOON) // 1440])
    insert_traces(connection, span(1))
    with pytest.raises(
        SchemaError, match=r"lacks columns.*spans\.cart_total.*spans\.cart, traces\.cart_total.*migrate"
    ):
        check(connection, "otel", larger_mapping)
    assert migrate(settings, larger_mapping) == [
        "column spans.cart_total",
        "column spans.cart",
        "column traces.cart_total",
    ]
    check(connection, "otel", larger_mapping)
    check(connection, "otel", bundled_mapping)  # who knows less of the columns is content too
    assert migrate(settings, bundled_mapping) == []

    insert(connection, "spans", span(2, cart_total=2**63 - 1), span(3, cart_total=2**63 - 1, cart="[1]"))
    assert fetch(connection, "SELECT cart_total, pg_typeof(cart_total)::text FROM traces_exact") == [
        (2 * (2**63 - 1), "numeric")
    ]
    assert fetch(connection, "SELECT cart_total, cart FROM span_details WHERE cart IS NOT NULL") == [(2**63 - 1, [1])]
    assert fetch(connection, "SELECT col_description('traces'::regclass, attnum) FROM pg_attribute"
        " WHERE attrelid = 'traces'::regclass AND attname = 'cart_total'") == [
        ("Sum over the trace's spans: What the customer's cart costs.",)
    ]  # fmt: skip
    connection.execute("DELETE FROM traces")
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact")
    ensure_partitions(connection, "otel", [minute_of(NOON) // 1440 + 1])
    assert len(fetch(connection, "SELECT * FROM trace_spans(%s)", span(1)["trace_id"])) == 3


def test_a_promoted_column_that_clashes_is_refused_and_nothing_changes(
    dsn: str, connection: Connection, larger_mapping: Mapping
) -> None:
    connection.execute("ALTER TABLE spans ADD COLUMN cart text")
    before = catalog(connection, "otel")
    for call in (
        lambda: migrate(DatabaseSettings(dsn=dsn), larger_mapping),
        lambda: check(connection, "otel", larger_mapping),
    ):
        with pytest.raises(SchemaError, match=r"column spans\.cart is text in the database and jsonb in the mapping"):
            call()
    assert catalog(connection, "otel") == before


def test_columns_are_added_although_a_transaction_stands_in_the_way_for_a_while(
    dsn: str, connection: Connection, larger_mapping: Mapping
) -> None:
    waits = "SELECT FROM pg_stat_activity WHERE wait_event = 'relation' AND datname = current_database()"
    with open_connection(dsn) as other, ThreadPoolExecutor(1) as pool:
        with other.transaction():
            insert(other, "spans", span(1))
            migration = pool.submit(migrate, DatabaseSettings(dsn=dsn), larger_mapping)
            wait_until(lambda: fetch(connection, waits))
        assert "column spans.cart" in migration.result()


def test_a_missing_schema_is_told_from_a_missing_right(
    empty_dsn: str, owner_dsn: str, empty: Connection, bundled_mapping: Mapping
) -> None:
    with pytest.raises(SchemaError, match="no schema otel with our tables; run `otel-pg-exporter migrate`"):
        check(empty, "otel", bundled_mapping)
    with pytest.raises(
        SchemaError, match=r"permission denied for database .*; log in as the owner.*docs/how-to/roles.md lists"
    ):
        migrate(DatabaseSettings(dsn=owner_dsn), bundled_mapping)
    migrate(DatabaseSettings(dsn=empty_dsn), bundled_mapping)
    with (
        open_connection(owner_dsn) as stranger,
        pytest.raises(SchemaError, match=r"permission denied .*docs/how-to/roles.md"),
    ):
        check(stranger, "otel", bundled_mapping)


def test_a_schema_with_another_programs_tables_is_left_alone_and_the_setting_for_another_is_named(
    empty_dsn: str, empty: Connection, bundled_mapping: Mapping
) -> None:
    empty.execute("CREATE SCHEMA otel")
    empty.execute("CREATE TABLE otel.spans (id int)")
    with pytest.raises(SchemaError, match=r'"spans" already exists .*not ours; choose another schema by --schema'):
        migrate(DatabaseSettings(dsn=empty_dsn), bundled_mapping)
    assert migrate(DatabaseSettings(dsn=empty_dsn, schema="telemetry"), bundled_mapping) == FILES


def test_an_older_schema_is_told_to_migrate(connection: Connection, bundled_mapping: Mapping) -> None:
    connection.execute("DELETE FROM schema_migrations WHERE version = (SELECT max(version) FROM schema_migrations)")
    message = f"older than this package: it lacks {FILES[-1]}; run `otel-pg-exporter migrate`"
    with pytest.raises(SchemaError, match=re.escape(message)):
        check(connection, "otel", bundled_mapping)


def test_a_newer_schema_asks_for_a_newer_package(dsn: str, connection: Connection, bundled_mapping: Mapping) -> None:
    connection.execute("INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', '')")
    for call in (
        lambda: migrate(DatabaseSettings(dsn=dsn), bundled_mapping),
        lambda: check(connection, "otel", bundled_mapping),
    ):
        with pytest.raises(
            SchemaError, match=r"newer than this package: it has 9999_future\.sql.*upgrade otel-pg-exporter"
        ):
            call()


def test_a_migration_that_changed_after_it_was_applied_is_named(
    dsn: str, connection: Connection, bundled_mapping: Mapping
) -> None:
    connection.execute("UPDATE schema_migrations SET checksum = 'deadbeef' WHERE version = 2")
    for call in (
        lambda: migrate(DatabaseSettings(dsn=dsn), bundled_mapping),
        lambda: check(connection, "otel", bundled_mapping),
    ):
        with pytest.raises(SchemaError, match=rf"{FILES[1]} of schema otel differs .*deadbeef in the database"):
            call()


def test_every_function_and_view_that_is_gone_is_named_and_made_again_as_it_was(
    dsn: str, connection: Connection, bundled_mapping: Mapping
) -> None:
    before = catalog(connection, "otel")
    objects = fetch(
        connection,
        "SELECT 'view ' || relname, 'VIEW ' || oid::regclass::text FROM pg_class"
        " WHERE relkind = 'v' AND relnamespace = 'otel'::regnamespace UNION ALL"
        " SELECT 'function ' || proname, 'FUNCTION ' || oid::regprocedure::text FROM pg_proc"
        " WHERE pronamespace = 'otel'::regnamespace",
    )
    assert sorted(name for name, _ in objects) == sorted(name for file in bundled() for name in file.made)
    for _, statement in objects:
        kind, _, name = statement.partition(" ")
        connection.execute(f"DROP {kind} IF EXISTS {name} CASCADE".encode())
    check(connection, "otel", bundled_mapping)
    with pytest.raises(SchemaError, match=r"lacks .*function trace_tree, .*view grafana_logs.*; run `otel-pg-exporter"):
        check_objects(connection, "otel", bundled_mapping)
    assert sorted(migrate(DatabaseSettings(dsn=dsn), bundled_mapping, Roles())) == sorted(name for name, _ in objects)
    check_objects(connection, "otel", bundled_mapping)
    assert catalog(connection, "otel") == before
    assert migrate(DatabaseSettings(dsn=dsn), bundled_mapping) == []


def test_what_goes_with_a_promoted_column_comes_back_with_it_as_its_owners_for_its_readers(
    dsn: str, connection: Connection, bundled_mapping: Mapping
) -> None:
    insert_traces(connection, span(1, gen_ai_request_model="x", gen_ai_input_tokens=3))
    connection.execute("ALTER TABLE spans DROP COLUMN gen_ai_request_model CASCADE")
    connection.execute("ALTER TABLE traces DROP COLUMN gen_ai_input_tokens")
    assert migrate(DatabaseSettings(dsn=dsn), bundled_mapping) == [
        "column spans.gen_ai_request_model",
        "column traces.gen_ai_input_tokens",
        "view span_details",
        "view genai_usage",
        "function genai_usage",
    ]
    query = "SELECT pg_get_userbyid(relowner), count(*) FROM pg_class WHERE relkind = 'v'"
    assert len(fetch(connection, query + " AND relnamespace = 'otel'::regnamespace GROUP BY 1")) == 1
    assert fetch(connection, "SELECT gen_ai_input_tokens FROM traces_exact") == [(3,)]
    connection.execute("DELETE FROM traces")
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact")
    with open_connection(as_role("otel_reader", dsn)) as reader:
        assert fetch(reader, "SELECT gen_ai_request_model FROM span_details") == [(None,)]
        assert fetch(reader, "SELECT * FROM genai_usage") == fetch(reader, "SELECT * FROM genai_usage('-infinity')")


def test_a_column_that_somebody_dropped_is_named(dsn: str, connection: Connection, bundled_mapping: Mapping) -> None:
    connection.execute("ALTER TABLE resources DROP COLUMN entity_refs CASCADE")
    with pytest.raises(SchemaError, match=r"gone: resources\.entity_refs"):
        migrate(DatabaseSettings(dsn=dsn), bundled_mapping)
    with pytest.raises(SchemaError, match=r"resources\.entity_refs"):
        check(connection, "otel", bundled_mapping)


@pytest.mark.parametrize("table", ["dead_letters", "ingest_requests", "traces"])
def test_a_table_that_somebody_dropped_is_named(
    dsn: str, connection: Connection, bundled_mapping: Mapping, table: str
) -> None:
    connection.execute(f"DROP TABLE otel.{table} CASCADE".encode())
    with pytest.raises(SchemaError, match=rf"tables that the migrations made are gone from schema otel: {table};"):
        check(connection, "otel", bundled_mapping)
    with pytest.raises(SchemaError, match="restore them"):
        migrate(DatabaseSettings(dsn=dsn), bundled_mapping)


def test_a_plain_role_migrates_with_create_on_the_database(
    owner_dsn: str, empty: Connection, bundled_mapping: Mapping
) -> None:
    empty.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO plain_owner").format(sql.Identifier(empty.info.dbname)))
    assert migrate(DatabaseSettings(dsn=owner_dsn), bundled_mapping) == FILES
    with open_connection(owner_dsn) as owner:
        check(owner, "otel", bundled_mapping)
        assert ensure_partitions(owner, "otel", [20_000]) == {20_000}


def test_a_plain_role_migrates_into_a_schema_that_a_dba_made(
    owner_dsn: str, empty: Connection, bundled_mapping: Mapping
) -> None:
    empty.execute("CREATE SCHEMA otel; GRANT USAGE, CREATE ON SCHEMA otel TO plain_owner")
    assert migrate(DatabaseSettings(dsn=owner_dsn), bundled_mapping) == FILES
    assert partitions(empty) == {"spans_default"}


def test_who_may_act_as_the_owner_adds_to_what_is_the_owners_as_far_as_that_one_may(
    empty_dsn: str, owner_dsn: str, empty: Connection, bundled_mapping: Mapping
) -> None:
    owners = (
        "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class WHERE relnamespace = 'otel'::regnamespace"
    )
    empty.execute("CREATE SCHEMA otel; GRANT USAGE, CREATE ON SCHEMA otel TO plain_owner")
    migrate(DatabaseSettings(dsn=owner_dsn), bundled_mapping)
    empty.execute("DROP VIEW otel.slow_spans")
    assert migrate(DatabaseSettings(dsn=empty_dsn), bundled_mapping) == ["view slow_spans"]
    assert fetch(empty, owners) == [(["plain_owner"],)]
    empty.execute("DROP VIEW otel.slow_spans; REVOKE CREATE ON SCHEMA otel FROM plain_owner")
    assert migrate(DatabaseSettings(dsn=empty_dsn), bundled_mapping) == ["view slow_spans"]
    assert len(fetch(empty, owners)[0][0]) == 2


def test_a_database_that_cannot_hold_every_character_is_refused(
    server: EmbeddedServer, bundled_mapping: Mapping
) -> None:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
        with pytest.raises(SchemaError, match="encoding is LATIN1; telemetry needs one with UTF8"):
            migrate(DatabaseSettings(dsn=server.url("latin")), bundled_mapping)
        connection.execute("DROP DATABASE latin")


def test_a_users_default_isolation_does_no_harm(empty_dsn: str, empty: Connection, bundled_mapping: Mapping) -> None:
    for setting in ("default_transaction_isolation = 'serializable'", "default_transaction_read_only = on"):
        empty.execute(f"ALTER DATABASE {empty.info.dbname} SET {setting}".encode())
    assert migrate(DatabaseSettings(dsn=empty_dsn), bundled_mapping) == FILES
    empty.execute(f"ALTER DATABASE {empty.info.dbname} RESET default_transaction_read_only".encode())
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        assert ensure_partitions(connection, "otel", [20_000]) == {20_000}
