"""Sample rows by plain SQL, and what the catalog says about a schema."""

import datetime as dt
from typing import Any

import psycopg
from psycopg import sql

Connection = psycopg.Connection[tuple[Any, ...]]

DAY = dt.date(2026, 11, 23)
NOON = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
RESOURCE = "00000000-0000-0000-0000-0000000000aa"


def open_connection(dsn: str, schema: str = "otel") -> Connection:
    """Connect with the schema in the search_path, so that statements need not name it."""
    connection = psycopg.connect(dsn, autocommit=True)
    connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(schema)))
    return connection


def minute_of(moment: dt.datetime) -> int:
    return int((moment - EPOCH).total_seconds()) // 60


def today() -> dt.datetime:
    """Return this day's midnight in UTC; asked for by each test, since a run of all may see two."""
    return dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def span(span_id: int, start: dt.datetime = NOON, *, milliseconds: int = 5, **columns: object) -> dict[str, Any]:
    """Return a row of `spans` with something in every column that must have it."""
    return {
        "start_minute": minute_of(start),
        "trace_id": TRACE,
        "span_id": span_id.to_bytes(8, "big"),
        "start_time": start,
        "start_time_ns": 0,
        "end_time": start + dt.timedelta(milliseconds=milliseconds),
        "duration_ns": milliseconds * 1_000_000,
        "name": f"operation {span_id}",
        "kind": 2,
        "status_code": 0,
        "status_message": "",
        "service_name": "shop",
        "scope_name": "tests",
        "scope_version": "1",
        "scope_dropped_attributes_count": 0,
        "trace_state": "",
        "flags": 1,
        "dropped_attributes_count": 0,
        "dropped_events_count": 0,
        "dropped_links_count": 0,
        "resource_id": RESOURCE,
        "schema_url": "",
        "anomalies": 0,
        **columns,
    }


def log(time: dt.datetime = NOON, **columns: object) -> dict[str, Any]:
    """Return a row of `logs` with something in every column that must have it."""
    return {
        "time_minute": minute_of(time),
        "time": time,
        "time_ns": 0,
        "severity_number": 9,
        "severity_text": "",
        "event_name": "",
        "body": "hello",
        "flags": 0,
        "service_name": "shop",
        "scope_name": "tests",
        "scope_version": "1",
        "scope_dropped_attributes_count": 0,
        "dropped_attributes_count": 0,
        "resource_id": RESOURCE,
        "schema_url": "",
        "anomalies": 0,
        "request_id": "00000000-0000-0000-0000-000000000001",
        **columns,
    }


def insert(connection: Connection, table: str, *rows: dict[str, Any]) -> None:
    for row in rows:
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(sql.Placeholder() * len(row)),
        )
        connection.execute(statement, list(row.values()))


def insert_traces(connection: Connection, *spans: dict[str, Any]) -> None:
    """Insert spans, and then the rows of `traces` that they make."""
    insert(connection, "spans", *spans)
    connection.execute("INSERT INTO traces SELECT * FROM traces_exact ON CONFLICT DO NOTHING")


def fetch(connection: Connection, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    return connection.execute(query.encode(), parameters).fetchall()


def partitions(connection: Connection, table: str = "spans") -> set[str]:
    rows = fetch(
        connection,
        "SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = %s::regclass",
        table,
    )
    return {name for (name,) in rows}


def catalog(connection: Connection, schema: str) -> list[tuple[Any, ...]]:
    """Return everything that the catalog knows about a schema, comments and rights included."""
    return fetch(
        connection,
        """
        WITH ours AS (SELECT oid FROM pg_namespace WHERE nspname = %s)
        SELECT 'relation', c.relname, c.relkind::text, c.reloptions::text, obj_description(c.oid, 'pg_class'),
            pg_get_expr(c.relpartbound, c.oid), c.relacl::text
        FROM pg_class AS c WHERE relnamespace IN (TABLE ours)
        UNION ALL
        SELECT 'column', c.relname, to_jsonb(a) - 'attrelid' - 'attcacheoff' ->> 'attname',
            (to_jsonb(a) - 'attrelid' - 'attcacheoff' - 'atttypid')::text, col_description(c.oid, a.attnum),
            pg_get_expr(d.adbin, d.adrelid), format_type(a.atttypid, a.atttypmod)
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
            LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace IN (TABLE ours) AND c.relkind IN ('r', 'p', 'v') AND a.attnum > 0
        UNION ALL
        SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', ''
        FROM pg_constraint WHERE connamespace IN (TABLE ours)
        UNION ALL
        SELECT 'index', c.relname, pg_get_indexdef(c.oid), '', '', '', ''
        FROM pg_class AS c WHERE relnamespace IN (TABLE ours) AND relkind IN ('i', 'I')
        UNION ALL
        SELECT 'view', c.relname, pg_get_viewdef(c.oid), '', '', '', ''
        FROM pg_class AS c WHERE relnamespace IN (TABLE ours) AND relkind = 'v'
        UNION ALL
        SELECT 'function', proname, pg_get_functiondef(oid), obj_description(oid, 'pg_proc'), proacl::text, '', ''
        FROM pg_proc WHERE pronamespace IN (TABLE ours)
        ORDER BY 1, 2, 3
        """,
        schema,
    )
