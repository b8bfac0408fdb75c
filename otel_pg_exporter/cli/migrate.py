"""`migrate`: the tables."""

import argparse

from otel_pg_exporter.cli.arguments import Commands, add_command, add_database_settings, require_database, settings_from
from otel_pg_exporter.cli.output import PROGRAM, print_lines, progress
from otel_pg_exporter.config import RetentionSettings, settings_of
from otel_pg_exporter.errors import ConfigurationError

_DESCRIPTION = """\
Create or update the tables in the PostgreSQL that the DSN names. Any number of these may run at once, also while a
receiver writes. (`serve` does this by itself for its own PostgreSQL, and elsewhere with --migrate.)
"""

_EPILOG = f"""\
examples:
  {PROGRAM} migrate --dsn postgresql://otel_migrator@db.example/telemetry
  {PROGRAM} migrate --roles --dsn postgresql://postgres@db.example/telemetry
  {PROGRAM} migrate --print --roles > tables.sql
  {PROGRAM} migrate --retention-spans 30d --retention-logs 14d --dsn postgresql://otel_migrator@db.example/telemetry
  {PROGRAM} migrate --check --dsn postgresql://otel_writer@db.example/telemetry

exit status: 0 the tables are up to date, 1 they are not or cannot be reached, 2 wrong flag or setting.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "migrate", help="create or update the tables", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.set_defaults(run=_run)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="print the SQL for an empty schema; needs no database")
    only.add_argument("--check", action="store_true", help="only tell whether the tables are up to date")
    parser.add_argument(
        "--roles",
        nargs="?",
        const="otel",
        metavar="PREFIX",
        help="as an administrator: create the roles PREFIX_migrator, _writer, _reader and _operator (default: otel_…) "
        "where they are missing, without passwords, and grant each its rights; the migrator owns new tables",
    )
    add_database_settings(parser, "mappings", "ledger_ttl", *(each.name for each in settings_of(RetentionSettings)))


def _run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    from otel_pg_exporter import mapping
    from otel_pg_exporter.postgres import retention_policy
    from otel_pg_exporter.postgres.connection import connect
    from otel_pg_exporter.postgres.dsn import mask_dsn
    from otel_pg_exporter.postgres.migrate import check, check_objects, migrate, render
    from otel_pg_exporter.postgres.roles import Roles

    database = settings.database
    columns = mapping.load(settings.mapping.mappings)
    roles = Roles(prefix=options.roles) if options.roles is not None else None
    if options.check and roles:
        raise ConfigurationError("--check looks at the tables alone: leave --roles out")
    if options.print:
        policy = [
            retention_policy.update(database.schema, item, keep).as_string(None) + ";"
            for item, keep in retention_policy.wanted(settings.retention).items()
        ]
        print_lines([render(database.schema, columns, roles), *policy])
        return 0
    database = require_database(settings, command="migrate").database
    named = settings.database.dsn
    where = f"schema {database.schema} ({mask_dsn(named) if named else 'in the PostgreSQL that `serve` runs itself'})"
    if options.check:
        with connect(database) as connection:
            check(connection, database.schema, columns)
            check_objects(connection, database.schema, columns)
        print_lines([f"{where} is up to date"])
        return 0
    with progress("", form="migrate: {desc} {elapsed}") as bar:
        applied = migrate(database, columns, roles, report=bar.set_description_str)
    wanted = retention_policy.wanted(settings.retention, ledger_ttl=settings.spool.ledger_ttl)
    with connect(database) as connection:
        changed = retention_policy.write(connection, database.schema, wanted)
    print_lines([f"{where}: applied {name}" for name in applied] or [f"{where} is up to date"])
    if changed:
        print_lines(f"{where}: {change}" for change in changed)
    if created := [name.removeprefix("role ") for name in applied if name.startswith("role ")]:
        print_lines(
            [
                "New roles have no password. In psql, give one to each that is to log in by password:",
                *(rf"  \password {name}" for name in created),
            ]
        )
    return 0
