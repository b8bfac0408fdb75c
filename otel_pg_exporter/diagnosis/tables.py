"""Our tables: whether they are those of this package, what this role may do with them, and what lies in them."""

from collections.abc import Iterator

from psycopg import sql

from otel_pg_exporter import mapping
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.diagnosis.asking import Database, composed
from otel_pg_exporter.diagnosis.finding import Check, Finding, ok, problem, warning
from otel_pg_exporter.diagnosis.privileges import privileges, schema_is_closed
from otel_pg_exporter.errors import DeploymentError, SchemaError
from otel_pg_exporter.postgres.columns import identifier
from otel_pg_exporter.postgres.migrate import check, check_objects

_PARENTS = (("spans", "start_time"), ("logs", "time"))


def table_checks(database: Database, settings: ServeSettings) -> list[tuple[str, Check]]:
    """Return the checks, each with its subject; those that need tables are left out where there are none."""
    found = database.rows(
        "SELECT has_schema_privilege(n.oid, 'USAGE'), (SELECT count(*) FROM pg_class AS c"
        " WHERE c.relnamespace = n.oid AND c.relname IN ('schema_migrations', 'spans')) = 2"
        " FROM pg_namespace AS n WHERE n.nspname = %s",
        database.schema,
    )
    [(may_use, ours)] = found or [(True, False)]
    if not may_use:
        return [("privileges", lambda: schema_is_closed(database))]
    tables: tuple[str, Check] = ("tables", lambda: _tables(database, settings))
    if not ours:
        return [tables]
    return [
        tables,
        ("privileges", lambda: privileges(database)),
        ("partitions", lambda: _partitions(database, settings.partitions_ahead)),
        ("DEFAULT partition", lambda: _default_partitions(database)),
        ("dead letters", lambda: _dead_letters(database)),
    ]


def _tables(database: Database, settings: ServeSettings) -> Iterator[Finding]:
    grade = problem
    try:
        columns = mapping.load(settings.mapping.mappings)
        check(database.connection, database.schema, columns)
        grade = warning  # rows are stored nevertheless, but for the functions that `privileges` looks for
        check_objects(database.connection, database.schema, columns)
    except SchemaError as exc:
        said, _, remedy = str(exc).partition("; ")
        yield grade("tables", said, remedy)
    else:
        yield ok("tables", f"schema {database.schema} is up to date")


def _partitions(database: Database, ahead: int) -> Iterator[Finding]:
    schema = identifier(database.schema)
    ensure = (
        f"SELECT {schema}.ensure_partitions((now() AT TIME ZONE 'UTC')::date, (now() AT TIME ZONE 'UTC')::date + "
        f"{ahead});"
    )
    missing, detached = [], []
    for parent, _ in _PARENTS:
        # What the function looks for, by which `serve` makes them: a day's table that was detached is no partition.
        rows = database.rows(
            f"SELECT day::text, name, to_regclass(%s || quote_ident(name)) IS NOT NULL FROM {schema}.missing_partitions"
            "(%s::regclass, (now() AT TIME ZONE 'UTC')::date, (now() AT TIME ZONE 'UTC')::date + %s::int) AS day,"
            " LATERAL (SELECT %s || to_char(day::timestamp, '\"_p\"YYYYMMDD') AS name) AS its",
            f"{schema}.",
            f"{schema}.{parent}",
            ahead,
            parent,
        )
        missing += [f"{parent} of {day}" for day, _, _ in rows]
        detached += [(parent, name) for _, name, there in rows if there]
    for parent, name in detached:
        yield problem(
            "partitions",
            f"table {name} is no partition of {parent}, but has the name of one: `serve` can make none that is missing",
            f"ALTER TABLE {schema}.{name} RENAME TO {name}_detached; {ensure} "
            f"INSERT INTO {schema}.{parent} SELECT * FROM {schema}.{name}_detached ON CONFLICT DO NOTHING;",
        )
    if detached:
        return
    if not missing:
        yield ok("partitions", f"today's and those of the next {ahead} days are there")
        return
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
    yield warning("partitions", f"missing: {shown}; `serve` makes them when it starts, and every hour", ensure)


def _default_partitions(database: Database) -> Iterator[Finding]:
    schema = identifier(database.schema)
    detached = database.rows(
        "SELECT c.relname FROM pg_partitioned_table AS p JOIN pg_class AS c ON c.oid = p.partrelid"
        " WHERE p.partdefid = 0 AND c.oid = ANY (%s::regclass[])",
        [f"{schema}.{parent}" for parent, _ in _PARENTS],
    )
    for (parent,) in detached:
        yield problem(
            "DEFAULT partition",
            f"{parent} has none: what belongs to a day without a partition can't be stored",
            f"ALTER TABLE {schema}.{parent} ATTACH PARTITION {schema}.{parent}_default DEFAULT;",
        )
    if detached:
        return
    held = []
    for parent, column in _PARENTS:
        query = composed(
            "SELECT EXISTS (SELECT FROM {0} WHERE {1} >= date_trunc('day', now(), 'UTC')"
            " AND {1} < date_trunc('day', now(), 'UTC') + interval '24 hours')",
            database.table(f"{parent}_default"),
            sql.Identifier(column),
        )
        try:
            held += [parent] if database.value(query) else []
        except DeploymentError:  # a writer may not look into it
            yield ok("DEFAULT partition", "not examined: this role may not read it")
            return
    if held:
        yield warning(
            "DEFAULT partition",
            f"it holds {' and '.join(held)} of today, whose partition could not be made when they came",
            f"SELECT {schema}.ensure_partitions((now() AT TIME ZONE 'UTC')::date, "
            "(now() AT TIME ZONE 'UTC')::date); moves them, in a moment without long transactions",
        )
    else:
        yield ok("DEFAULT partition", "it holds nothing of today")


def _dead_letters(database: Database) -> Iterator[Finding]:
    try:
        count = database.value(composed("SELECT count(*) FROM {}", database.table("dead_letters")))
    except DeploymentError:  # a writer may not read them
        yield ok("dead letters", "not examined: this role may not read them")
        return
    if count:
        yield warning(
            "dead letters",
            f"{'1 item was' if count == 1 else f'{count:,} items were'} refused",
            "otel-pg-exporter dead-letters list --summary tells why; `dead-letters replay` stores them after all",
        )
    else:
        yield ok("dead letters", "none")
