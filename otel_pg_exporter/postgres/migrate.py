"""The migration runner: numbered SQL files and the mapping's promoted columns, in one transaction.

A transaction that holds an advisory lock leaves nothing behind when it dies, and lets any number of replicas start at
once: one migrates, the others wait and find nothing to do.
"""

import shlex
import threading
from collections.abc import Callable
from collections.abc import Mapping as Dictionary
from typing import Any, NamedTuple

import psycopg
from psycopg import IsolationLevel

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, SchemaError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.postgres.columns import (
    MappedColumn,
    add_columns,
    comment_columns,
    existing_columns,
    identifier,
    literal,
    mapped_columns,
    missing_columns,
)
from otel_pg_exporter.postgres.connection import Connection, connect
from otel_pg_exporter.postgres.migration_files import Migration, bundled, lost_objects
from otel_pg_exporter.postgres.roles import Roles
from otel_pg_exporter.postgres.sqlstate import READ_ONLY

Report = Callable[[str], None]
"""Told what is done next."""

# A waiting ALTER TABLE holds up every COPY behind it: rather many short waits than one long one.
_ATTEMPTS = 20
_LOCK_TIMEOUT = 1.0  # seconds
_PAUSE = 0.5  # seconds between attempts, for the writers that queued up

_MAX_IDENTIFIER = 63  # bytes; PostgreSQL cuts longer ones, and finds them no more
_TABLES = frozenset(
    {
        "dead_letters",
        "ingest_requests",
        "logs",
        "resources",
        "retention",
        "retention_progress",
        "partitions",
        "spans",
        "traces",
    }
)
_TAKEN = (psycopg.errors.DuplicateTable, psycopg.errors.DuplicateFunction, psycopg.errors.DuplicateObject)
_SETTINGS = "SET LOCAL standard_conforming_strings = on;\nSET LOCAL client_min_messages = warning;"


class _Applied(NamedTuple):
    name: str
    checksum: str


def migrate(
    settings: DatabaseSettings, mapping: Mapping, roles: Roles | None = None, *, report: Report = lambda _step: None
) -> list[str]:
    """Create or update the tables; return the names of the roles, files, columns, functions and views applied.

    With `roles`, create those that are missing, hand what is created to the migrator, and grant the rest their rights.
    Any number of processes may call it at once. Columns are added online: the wait for their lock is short, and tried
    again; `report` hears each step. Raises SchemaError, after which the database is as it was, and
    DatabaseUnavailableError.
    """
    if not settings.schema or "\0" in settings.schema or len(settings.schema.encode()) > _MAX_IDENTIFIER:
        raise SchemaError(f"the schema's name must have 1 to {_MAX_IDENTIFIER} bytes: {settings.schema!r}")
    pause = threading.Event()
    with connect(settings) as connection:
        _refuse_standby(connection, settings.schema)
        # Not the user's default: behind the advisory lock, we must see what the one before us has done.
        connection.isolation_level = IsolationLevel.READ_COMMITTED
        connection.read_only = False
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with connection.transaction():
                    return _migrate(connection, settings, mapping, roles, report)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as exc:
                if attempt == _ATTEMPTS:
                    raise SchemaError(
                        f"schema {settings.schema} is not migrated: its tables stayed locked through {_ATTEMPTS} "
                        "attempts; end long transactions (pg_stat_activity shows them) and run it again"
                    ) from exc
            except psycopg.Error as exc:
                raise _translated(exc, settings.schema) from exc
            report(f"tables are locked, attempt {attempt + 1} of {_ATTEMPTS}")
            pause.wait(_PAUSE)
    raise AssertionError("the last attempt returns or raises")


def _refuse_standby(connection: Connection, schema: str) -> None:
    """Raise SchemaError on a standby, whose own error says as little as any of a feature that a server lacks."""
    try:
        [(standby,)] = connection.execute("SELECT pg_is_in_recovery()").fetchall()
    except psycopg.Error as exc:
        raise _translated(exc, schema) from exc
    if standby:
        raise SchemaError(f"schema {schema}: this server is a standby, which takes no changes; migrate its primary")


def _migrate(
    connection: Connection, settings: DatabaseSettings, mapping: Mapping, roles: Roles | None, report: Report
) -> list[str]:
    schema = settings.schema
    report("waiting for others that migrate")
    _execute(connection, "SET LOCAL statement_timeout = 0")
    _execute(connection, _SETTINGS)
    # Whoever holds the advisory lock may be at work for a while; for its tables' locks we must not queue as long.
    _execute(connection, f"SET LOCAL lock_timeout = '{settings.lock_timeout}s'")
    _execute(connection, _lock(schema))
    _execute(connection, f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}s'")
    encoding = connection.execute("SHOW server_encoding").fetchall()[0][0]
    if encoding != "UTF8":
        raise SchemaError(f"the database's encoding is {encoding}; telemetry needs one with UTF8")
    created = _create_roles(connection, roles, schema) if roles else []
    _execute(connection, _become_owner(schema))
    _execute(connection, _prologue(schema))

    pending = _pending(_applied(connection, schema), schema)
    for migration in pending:
        report(migration.name)
        _execute(connection, migration.statements(schema, mapping))

    report("columns")
    _refuse_lost_tables(connection, schema)
    columns = mapped_columns(mapping)
    added = missing_columns(columns, existing_columns(connection, schema))
    if lost := [f"{each.table}.{each.name}" for each in added if not each.promoted]:
        raise SchemaError(f"columns that the migrations made are gone: {', '.join(lost)}; restore the tables")
    for statement in add_columns(added):
        _execute(connection, statement)
    restored = lost_objects(connection, schema)
    if restored:
        report("functions and views")
        for statements in (each.repetition(schema, mapping) for each in bundled() if each.repeatable):
            _execute(connection, statements)
    elif added:
        _execute(connection, "SELECT follow_promoted_columns()")
    _comment_columns(connection, schema, columns)
    if roles:
        _execute(connection, roles.grants(schema))
    return [
        *created,
        *(each.name for each in pending),
        *(f"column {each.table}.{each.name}" for each in added),
        *restored,
    ]


def _comment_columns(connection: Connection, schema: str, columns: list[MappedColumn]) -> None:
    existing = existing_columns(connection, schema)
    outdated = [each for each in columns if existing[each.table, each.name].comment != each.comment]
    for statement in comment_columns(outdated):
        _execute(connection, statement)


def _create_roles(connection: Connection, roles: Roles, schema: str) -> list[str]:
    """Create what is missing, and go on as the owner of the schema; return the names of the new roles."""
    query, names = "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s)", list(roles.names.values())
    before = {name for (name,) in connection.execute(query, [names])}
    try:
        _execute(connection, roles.creation(schema))
    except psycopg.errors.InsufficientPrivilege as exc:
        raise SchemaError(
            f"roles for schema {schema}: {exc.diag.message_primary}; who makes them needs CREATEROLE, and CREATE on "
            "the database: run it as such a role, or give an administrator what `migrate --print --roles` prints"
        ) from exc
    after = {name for (name,) in connection.execute(query, [names])}
    return [f"role {name}" for name in names if name in after - before]


def render(schema: str, mapping: Mapping, roles: Roles | None = None) -> str:
    """Write the DDL of a fresh schema as one script, for a DBA's psql; afterwards `check` is content."""
    parts = [
        "-- Tables of otel-pg-exporter, for a database without them. One transaction: all of it, or nothing.",
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;",
        "SET LOCAL client_encoding = 'UTF8';",
        _SETTINGS,
        _lock(schema) + ";",
        *([roles.creation(schema)] if roles else []),
        _prologue(schema),
        *(f"-- {migration.name}\n\n{migration.statements(schema, mapping)}" for migration in bundled()),
        "-- Comments from the mapping",
        "".join(f"{statement};\n" for statement in comment_columns(mapped_columns(mapping))),
        *([roles.grants(schema)] if roles else []),
        "COMMIT;",
    ]
    return "\n\n".join(parts) + "\n"


def check(connection: Connection, schema: str, mapping: Mapping) -> None:
    """Compare the database with this package and its mapping; raise SchemaError, which says what to do.

    Needs SELECT on schema_migrations, and changes nothing.
    """
    try:
        tables = connection.execute(
            "SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = 'schema_migrations'",
            [schema],
        ).fetchall()
        if not tables:
            raise SchemaError(f"the database has no schema {schema} with our tables; {_remedy(schema, mapping)}")
        pending = _pending(_applied(connection, schema), schema)
        if not pending:
            _refuse_lost_tables(connection, schema)
        missing = missing_columns(mapped_columns(mapping), existing_columns(connection, schema))
    except psycopg.errors.InsufficientPrivilege as exc:
        raise SchemaError(
            f"schema {schema}: {exc.diag.message_primary}; log in as a role that may, or grant this one what "
            "docs/how-to/roles.md lists"
        ) from exc
    except psycopg.Error as exc:
        raise _translated(exc, schema) from exc
    if pending:
        raise SchemaError(
            f"schema {schema} is older than this package: it lacks {', '.join(each.name for each in pending)}; "
            f"{_remedy(schema, mapping)}"
        )
    if missing:
        raise SchemaError(
            f"schema {schema} lacks columns that the mapping declares: "
            f"{', '.join(f'{each.table}.{each.name}' for each in missing)}; {_remedy(schema, mapping)}"
        )


def check_objects(connection: Connection, schema: str, mapping: Mapping) -> None:
    """Raise SchemaError where functions or views of a schema that `check` is content with are gone.

    Rows can be stored without most of them. Changes nothing.
    """
    try:
        lost = lost_objects(connection, schema)
    except psycopg.Error as exc:
        raise _translated(exc, schema) from exc
    if lost:
        raise SchemaError(
            f"schema {schema} lacks what the migrations made: {', '.join(lost)}; {_remedy(schema, mapping)}"
        )


def _refuse_lost_tables(connection: Connection, schema: str) -> None:
    found = connection.execute(
        "SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname = %s",
        [schema],
    ).fetchall()
    if lost := sorted(_TABLES - {name for (name,) in found}):
        raise SchemaError(
            f"tables that the migrations made are gone from schema {schema}: {', '.join(lost)}; restore them from a "
            "backup, or with their statements in what `otel-pg-exporter migrate --print` prints"
        )


def _remedy(schema: str, mapping: Mapping) -> str:
    """Say which command makes the tables; the DSN, which may hold a password, is left out."""
    command = ["otel-pg-exporter", "migrate"]
    if schema != DatabaseSettings().schema:
        command += ["--schema", schema]
    for file in mapping.files:
        command += ["--mappings", str(file)]
    return f"run `{shlex.join(command)}` with the same DSN, or start `serve` with --migrate"


def _lock(schema: str) -> str:
    return f"SELECT pg_advisory_xact_lock(hashtextextended({literal('otel-pg-exporter migrate ' + schema)}, 0))"


def _become_owner(schema: str) -> str:
    """Go on as the owner of tables that exist, if both may: what is added is to be the owner's, too.

    It was the owner who set the default privileges, by which readers read what comes later.
    """
    return (
        "SELECT set_config('role', pg_get_userbyid(c.relowner), true)"
        " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        f" WHERE n.nspname = {literal(schema)} AND c.relname = 'schema_migrations'"
        " AND pg_get_userbyid(c.relowner) <> current_user"
        " AND has_schema_privilege(c.relowner, n.oid, 'CREATE') AND pg_has_role("
        "c.relowner, CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END)"
    )


def _prologue(schema: str) -> str:
    """Write what comes before the files: the search_path, the schema, the bookkeeping."""
    name = identifier(schema)
    # CREATE SCHEMA IF NOT EXISTS would ask for CREATE on the database even where the schema is there.
    return f"""\
SET LOCAL search_path = {name};
DO $prologue$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {literal(schema)}) THEN
        EXECUTE format('CREATE SCHEMA %I', {literal(schema)});
        EXECUTE format('COMMENT ON SCHEMA %I IS %L', {literal(schema)}, 'OpenTelemetry traces and logs.');
    END IF;
END
$prologue$;
CREATE TABLE IF NOT EXISTS {name}.schema_migrations (
    version int4 PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE {name}.schema_migrations IS 'The SQL files that made these tables; otel-pg-exporter keeps it.';
COMMENT ON COLUMN {name}.schema_migrations.version IS 'Number of the file.';
COMMENT ON COLUMN {name}.schema_migrations.name IS 'Name of the file.';
COMMENT ON COLUMN {name}.schema_migrations.checksum IS 'SHA-256 of the file, in hex.';
COMMENT ON COLUMN {name}.schema_migrations.applied_at IS 'When it was applied.';
"""


def _applied(connection: Connection, schema: str) -> dict[int, _Applied]:
    rows = _execute(connection, f"SELECT version, name, checksum FROM {identifier(schema)}.schema_migrations")
    return {version: _Applied(name, checksum) for version, name, checksum in rows}


def _pending(applied: Dictionary[int, _Applied], schema: str) -> list[Migration]:
    """Return the migrations yet to be applied; raise SchemaError when those applied are not ours."""
    ours = {migration.version: migration for migration in bundled()}
    if unknown := sorted(applied.keys() - ours.keys()):
        raise SchemaError(
            f"schema {schema} is newer than this package: it has {applied[unknown[-1]].name}, and this package ends "
            f"with {ours[max(ours)].name}; upgrade otel-pg-exporter"
        )
    for version, found in sorted(applied.items()):
        if found.checksum != ours[version].checksum:
            raise SchemaError(
                f"migration {found.name} of schema {schema} differs from this package's {ours[version].name} "
                f"(checksum {found.checksum[:12]} in the database, {ours[version].checksum[:12]} here); install the "
                "package that made the schema, or an official release"
            )
    return [migration for version, migration in ours.items() if version not in applied]


def _translated(error: psycopg.Error, schema: str) -> SchemaError | DatabaseUnavailableError:
    reason = error.diag.message_primary or str(error)
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return SchemaError(
            f"schema {schema}: {reason}; log in as the owner of the tables, such as otel_migrator: "
            "docs/how-to/roles.md lists what each role needs"
        )
    if isinstance(error, psycopg.OperationalError):
        return DatabaseUnavailableError(f"schema {schema}: {reason}")
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return SchemaError(f"schema {schema}: {reason} ({error.sqlstate}); {READ_ONLY}")
    if isinstance(error, _TAKEN):
        return SchemaError(
            f"schema {schema}: {reason} ({error.sqlstate}), and is not ours; choose another schema by --schema, or "
            "another database"
        )
    return SchemaError(f"schema {schema}: {reason} ({error.sqlstate})")


def _execute(connection: Connection, statements: str) -> psycopg.Cursor[tuple[Any, ...]]:
    """Run SQL that we have written ourselves, several statements in one go where there are."""
    return connection.execute(statements.encode())
