"""`migrate --roles` makes what is missing, as a superuser and as less, and leaves alone what is there."""

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError, SchemaError
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.migrate import check, migrate, render
from otel_pg_exporter.postgres.migration_files import bundled
from otel_pg_exporter.postgres.roles import Roles, reader_instead
from tests.postgres.samples import Connection, catalog, fetch, open_connection

FILES = [each.name for each in bundled()]


@pytest.fixture
def administrator(empty_dsn: str) -> Iterator[Connection]:
    with open_connection(empty_dsn) as connection:
        yield connection


@pytest.fixture
def roles(administrator: Connection) -> Iterator[Roles]:
    """Return roles that nobody has made yet, and drop what is made of them."""
    yield (made := Roles(prefix="acme"))
    for name in [*made.names.values(), "acme_dba", "acme_app"]:
        if fetch(administrator, "SELECT FROM pg_roles WHERE rolname = %s", name):
            administrator.execute(
                f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}".encode()
            )


def create_role(administrator: Connection, name: str, attributes: str = "") -> str:
    """Create a role that may log in; return its DSN."""
    info = administrator.info
    administrator.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x' {attributes}".encode())
    return make_conninfo(host=info.host, port=info.port, dbname=info.dbname, user=name, password="x")


def created(roles: Roles) -> list[str]:
    return [f"role {name}" for name in roles.names.values()]


def owners(connection: Connection, schema: str = "otel") -> list[str]:
    rows = fetch(
        connection,
        "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = %s"
        " UNION SELECT relowner::regrole::text FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace"
        " WHERE nspname = %s"
        " UNION SELECT proowner::regrole::text FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = pronamespace"
        " WHERE nspname = %s",
        *[schema] * 3,
    )
    return [name for (name,) in rows]


def test_the_roles_are_made_once_and_the_migrator_owns_all_there_is(
    empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    settings = DatabaseSettings(dsn=empty_dsn)
    assert migrate(settings, mapping.load(), roles) == [*created(roles), *FILES]
    assert owners(administrator) == ["acme_migrator"]
    before = catalog(administrator, "otel")
    assert migrate(settings, mapping.load(), roles) == []
    assert catalog(administrator, "otel") == before


def test_nobody_gets_a_password_and_roles_that_exist_stay_as_they_are(
    empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    attributes = "SELECT rolname, rolcanlogin, rolconnlimit, rolpassword FROM pg_authid WHERE rolname LIKE 'acme%%'"
    administrator.execute("CREATE ROLE acme_writer NOLOGIN CONNECTION LIMIT 7")
    assert "role acme_writer" not in migrate(DatabaseSettings(dsn=empty_dsn), mapping.load(), roles)
    assert sorted(fetch(administrator, attributes)) == [
        ("acme_migrator", True, -1, None),
        ("acme_operator", True, -1, None),
        ("acme_reader", True, -1, None),
        ("acme_writer", False, 7, None),
    ]


@pytest.mark.parametrize("rights", ["owner", "create"])
def test_who_may_create_roles_and_schemas_need_not_be_a_superuser(
    rights: str, empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    database = administrator.info.dbname
    settings = DatabaseSettings(dsn=create_role(administrator, "acme_dba", "CREATEROLE"))
    administrator.execute(
        f"ALTER DATABASE {database} OWNER TO acme_dba"
        if rights == "owner"
        else f"GRANT CREATE ON DATABASE {database} TO acme_dba"
    )
    assert migrate(settings, mapping.load(), roles) == [*created(roles), *FILES]
    assert owners(administrator) == ["acme_migrator"]
    assert migrate(settings, mapping.load(), roles) == []
    assert fetch(administrator, "SELECT has_database_privilege('acme_migrator', current_database(), 'CREATE')") == [
        (False,)
    ]


def test_a_writer_is_told_who_may_read_whatever_the_roles_are_called(
    empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    migrate(DatabaseSettings(dsn=empty_dsn), mapping.load(), roles)
    create_role(administrator, "acme_app")
    administrator.execute("GRANT SELECT ON otel.spans TO acme_app")
    for role, instead in (("acme_writer", "acme_reader"), ("acme_reader", None), ("acme_migrator", None)):
        administrator.execute(f"SET ROLE {role}")
        assert reader_instead(administrator, "otel") == instead
        administrator.execute("RESET ROLE")
    administrator.execute("REVOKE SELECT ON otel.spans FROM acme_reader; SET ROLE acme_writer")
    assert reader_instead(administrator, "otel") == "acme_app"
    administrator.execute("RESET ROLE")


def test_later_migrations_need_the_migrator_alone(empty_dsn: str, administrator: Connection, roles: Roles) -> None:
    migrate(DatabaseSettings(dsn=empty_dsn), mapping.load(), roles)
    administrator.execute("ALTER ROLE acme_migrator PASSWORD 'x'; DROP VIEW otel.slow_spans")
    with psycopg.connect(make_conninfo(empty_dsn, user="acme_migrator", password="x")) as connection:
        settings = DatabaseSettings(dsn=connection.info.dsn + " password=x")
        assert migrate(settings, mapping.load(), roles) == ["view slow_spans"]
        connection.execute("CREATE TABLE otel.later ()")
        assert fetch(connection, "SELECT has_table_privilege('acme_reader', 'otel.later', 'SELECT')") == [(True,)]
        assert fetch(connection, "SELECT has_table_privilege('acme_writer', 'otel.later', 'SELECT')") == [(False,)]


def test_tables_that_are_there_keep_their_owner_who_is_the_migrator_then(
    administrator: Connection, roles: Roles
) -> None:
    settings = DatabaseSettings(dsn=create_role(administrator, "acme_app", "CREATEROLE"))
    administrator.execute("CREATE SCHEMA otel AUTHORIZATION acme_app")
    assert migrate(settings, mapping.load()) == FILES
    assert migrate(settings, mapping.load(), roles) == [
        f"role acme_{each}" for each in ("writer", "reader", "operator")
    ]
    assert owners(administrator) == ["acme_app"]
    assert fetch(administrator, "SELECT has_table_privilege('acme_writer', 'otel.spans', 'INSERT')") == [(True,)]


def test_a_superuser_may_make_roles_for_tables_of_somebody_else(
    empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    app = create_role(administrator, "acme_app")
    administrator.execute("CREATE SCHEMA otel AUTHORIZATION acme_app")
    assert migrate(DatabaseSettings(dsn=app), mapping.load()) == FILES
    assert len(migrate(DatabaseSettings(dsn=empty_dsn), mapping.load(), roles)) == 3
    assert owners(administrator) == ["acme_app"]


@pytest.mark.parametrize(
    ("attributes", "revoked", "words"),
    [
        ("", "", "permission denied to create role; who makes them needs CREATEROLE"),
        ("CREATEROLE", "", "permission denied for database"),
        ("CREATEROLE", "CONNECT, TEMPORARY", "role acme_migrator may not connect to database"),
    ],
)
def test_who_may_not_make_them_is_told_what_is_missing_and_leaves_nothing_behind(
    attributes: str, revoked: str, words: str, administrator: Connection, roles: Roles
) -> None:
    settings = DatabaseSettings(dsn=create_role(administrator, "acme_dba", attributes))
    if revoked:
        database = administrator.info.dbname
        administrator.execute(f"REVOKE {revoked} ON DATABASE {database} FROM PUBLIC".encode())
        administrator.execute(f"GRANT CONNECT, CREATE ON DATABASE {database} TO acme_dba".encode())
    with pytest.raises(SchemaError, match=words) as refused:
        migrate(settings, mapping.load(), roles)
    assert "migrate --print --roles" in str(refused.value)
    assert fetch(administrator, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'acme%%'") == [("acme_dba",)]


@pytest.mark.parametrize("schema", ["otel", """Otel "x" 'y' \\ :schema :'writer'"""])
def test_what_is_printed_for_an_administrator_does_the_same(
    schema: str, binaries: Path, empty_dsn: str, administrator: Connection, roles: Roles
) -> None:
    psql: list[str | Path] = [
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
    script = render(schema, mapping.load(), roles)
    done = subprocess.run(psql, input=script.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    rendered = catalog(administrator, schema)
    assert migrate(DatabaseSettings(dsn=empty_dsn, schema=schema), mapping.load(), roles) == []
    assert catalog(administrator, schema) == rendered

    administrator.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
    assert migrate(DatabaseSettings(dsn=empty_dsn, schema=schema), mapping.load(), roles) == FILES
    assert catalog(administrator, schema) == rendered


def test_many_make_them_at_once_in_several_databases(server: EmbeddedServer, roles: Roles) -> None:
    databases = ["roles_one", "roles_two", "roles_three"]
    start = threading.Barrier(2 * len(databases))

    def replica(database: str) -> list[str]:
        start.wait()
        return migrate(DatabaseSettings(dsn=server.url(database)), mapping.load(), roles)

    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for database in databases:
            connection.execute(f"CREATE DATABASE {database}".encode())
        try:
            with ThreadPoolExecutor(2 * len(databases)) as pool:
                applied = list(pool.map(replica, databases * 2))
            assert sum(each[-len(FILES) :] == FILES for each in applied) == len(databases)
            for database in databases:
                with open_connection(server.url(database)) as each:
                    check(each, "otel", mapping.load())
        finally:
            for database in databases:
                connection.execute(f"DROP DATABASE {database} WITH (FORCE)".encode())


@pytest.mark.parametrize("prefix", ["", "1st", "Otel", "otel-x", "o" * 51, "otel; DROP", "é"])
def test_a_prefix_that_would_have_to_be_quoted_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="can't begin the names of roles"):
        Roles(prefix=prefix)
