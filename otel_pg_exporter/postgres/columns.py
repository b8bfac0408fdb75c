"""Promoted columns and column comments: the part of the schema that follows the mapping instead of the SQL files."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from psycopg import sql

from otel_pg_exporter.errors import SchemaError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.postgres.connection import Connection


class MappedColumn(NamedTuple):
    """One column that the mapping asks for, in `traces` too."""

    table: str
    name: str
    type: str  # pg_type.typname
    comment: str
    promoted: bool


class Existing(NamedTuple):
    """What the database says about a column."""

    type: str  # pg_type.typname
    comment: str


def mapped_columns(mapping: Mapping) -> list[MappedColumn]:
    """List every column that the mapping asks for, table by table; a sum's column in `traces` comes last."""
    columns = [
        MappedColumn(table.name, column.name, column.type.value, column.comment, column.promoted)
        for table in (mapping.spans, mapping.logs, mapping.resources)
        for column in table.columns
    ]
    # numeric: two hostile spans would overflow int8, and with it every later update of their trace.
    sums = [
        MappedColumn("traces", column.name, "numeric", f"Sum over the trace's spans: {column.comment}", promoted=True)
        for column in mapping.spans.sums
    ]
    return columns + sums


def add_columns(columns: Iterable[MappedColumn]) -> list[str]:
    """Write the statements that add the promoted ones among `columns`: one, and so one lock, a table."""
    promoted = [column for column in columns if column.promoted]
    return [
        f"ALTER TABLE {table}"
        + ",".join(f"\n    ADD COLUMN IF NOT EXISTS {identifier(each.name)} {each.type}" for each in group)
        for table, group in groupby(promoted, key=lambda column: column.table)
    ]


def comment_columns(columns: Iterable[MappedColumn]) -> list[str]:
    """Write the statements that give `columns` the mapping's comments."""
    return [f"COMMENT ON COLUMN {each.table}.{identifier(each.name)} IS {literal(each.comment)}" for each in columns]


def existing_columns(connection: Connection, schema: str) -> dict[tuple[str, str], Existing]:
    """Read the columns that the mapped tables have; any role may, whatever it is granted."""
    rows = connection.execute(
        "SELECT c.relname, a.attname, t.typname, coalesce(col_description(c.oid, a.attnum), '')"
        " FROM pg_namespace AS n JOIN pg_class AS c ON c.relnamespace = n.oid"
        " JOIN pg_attribute AS a ON a.attrelid = c.oid JOIN pg_type AS t ON t.oid = a.atttypid"
        " WHERE n.nspname = %s AND c.relname IN ('spans', 'logs', 'resources', 'traces')"
        " AND c.relkind IN ('r', 'p') AND a.attnum > 0",
        [schema],
    )
    return {(table, name): Existing(kind, comment) for table, name, kind, comment in rows}


def missing_columns(columns: Iterable[MappedColumn], existing: dict[tuple[str, str], Existing]) -> list[MappedColumn]:
    """Return those of `columns` that the database lacks; raise SchemaError where it has one of another type."""
    missing = []
    for each in columns:
        found = existing.get((each.table, each.name))
        if found is None:
            missing.append(each)
        elif found.type != each.type:
            raise SchemaError(
                f"column {each.table}.{each.name} is {found.type} in the database and {each.type} in the mapping: "
                f"{'rename it in the mapping file, or drop it from the table' if each.promoted else 'mend the table'}"
            )
    return missing


def identifier(name: str) -> str:
    """Quote a name for SQL text."""
    return sql.Identifier(name).as_string(None)


def literal(text: str) -> str:
    """Quote text for SQL; assumes standard_conforming_strings, which the runner sets."""
    return "'" + text.replace("'", "''") + "'"
