"""What partitions there are, how large, and what retention would remove; for a role that may read."""

import datetime as dt
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from psycopg import sql

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres import retention_policy
from otel_pg_exporter.postgres.connection import Connection
from otel_pg_exporter.postgres.operations import transaction

_DOING = "partitions"

# Bounds that Python's datetime can't hold, a user's own MINVALUE, become NULL, as DEFAULT's are. Estimates: what the
# last ANALYZE found and the table's growth since, as the planner has it, or what the statistics have counted, unless a
# crash has reset them.
_LIST = sql.SQL("""
    SELECT t.parent, c.relname, nullif(p.first_time, '-infinity'), nullif(p.after_time, 'infinity'),
        greatest(
            c.reltuples / nullif(c.relpages, 0) * (pg_relation_size(c.oid) / current_setting('block_size')::int8),
            pg_stat_get_live_tuples(c.oid),
            0
        )::int8,
        pg_table_size(c.oid), pg_indexes_size(c.oid),
        CASE
            WHEN c.relname = t.parent || '_default' THEN 'default'
            WHEN p.ours AND p.after_time <= {schema}.expired_before(t.parent) THEN 'expired'
            WHEN p.first_time > now() THEN 'ahead'
            WHEN p.after_time > now() THEN 'current'
            ELSE 'past'
        END
    FROM (VALUES ('spans', {spans}::regclass), ('logs', {logs}::regclass)) AS t (parent, relation)
    JOIN pg_inherits AS i ON i.inhparent = t.relation
    JOIN pg_class AS c ON c.oid = i.inhrelid
    LEFT JOIN {schema}.daily_partitions(t.relation) AS p ON p.relation = c.oid
    ORDER BY t.relation <> {spans}::regclass, p.first_time NULLS FIRST, c.relname
""")

_EXPIRED = sql.SQL("""
    SELECT 'spans_default', (SELECT count(*) FROM {schema}.spans_default
        WHERE ingested_at < {schema}.expired_before('spans'))
    UNION ALL SELECT 'logs_default', (SELECT count(*) FROM {schema}.logs_default
        WHERE ingested_at < {schema}.expired_before('logs'))
    UNION ALL SELECT 'ingest_requests', (SELECT count(*) FROM {schema}.ingest_requests AS i
        JOIN {schema}.retention AS r ON r.item = 'ingest_requests' WHERE i.received_at < now() - r.keep)
    UNION ALL SELECT 'dead_letters', (SELECT count(*) FROM {schema}.dead_letters AS d
        JOIN {schema}.retention AS r ON r.item = 'dead_letters' WHERE d.received_at < now() - r.keep)
""")


class State(enum.StrEnum):
    """What a partition is there for."""

    DEFAULT = "default"  # what no other partition takes
    EXPIRED = "expired"  # the next round of retention drops it
    PAST = "past"
    CURRENT = "current"
    AHEAD = "ahead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition of `spans` or `logs`."""

    table: str
    name: str
    first: dt.datetime | None  # None: no bound
    after: dt.datetime | None
    rows: int  # an estimate
    heap_bytes: int  # with what is stored out of line
    index_bytes: int
    state: State

    @property
    def bytes(self) -> int:
        """All that it takes on disk."""
        return self.heap_bytes + self.index_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """All partitions, and the policy."""

    partitions: tuple[Partition, ...]
    policy: retention_policy.Policy


def list_partitions(connection: Connection, settings: DatabaseSettings) -> Partitions:
    """Look them up; raise DatabaseUnavailableError."""
    schema = settings.schema
    names = {table: sql.Literal(sql.Identifier(schema, table).as_string(None)) for table in ("spans", "logs")}
    with transaction(connection, settings, doing=_DOING):
        policy = retention_policy.read(connection, schema)
        rows = connection.execute(_LIST.format(schema=sql.Identifier(schema), **names)).fetchall()
    return Partitions(
        partitions=tuple(
            Partition(
                table=table,
                name=name,
                first=first,
                after=after,
                rows=count,
                heap_bytes=heap or 0,  # NULL when it was dropped meanwhile
                index_bytes=indexes or 0,
                state=State(state),
            )
            for table, name, first, after, count, heap, indexes, state in rows
        ),
        policy=policy,
    )


def expired_rows(connection: Connection, settings: DatabaseSettings) -> Mapping[str, int]:
    """Count the rows that retention would delete one by one, by table; raise DatabaseUnavailableError."""
    with transaction(connection, settings, doing=_DOING):
        return dict(connection.execute(_EXPIRED.format(schema=sql.Identifier(settings.schema))).fetchall())
