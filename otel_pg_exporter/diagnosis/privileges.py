"""What a role may do, held against what `migrate --roles` grants."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from otel_pg_exporter.diagnosis.asking import Database
from otel_pg_exporter.diagnosis.finding import Finding, ok, problem, warning
from otel_pg_exporter.postgres.columns import identifier

_GRANT = re.compile(
    r"GRANT (?P<rights>.+?) ON (?P<kind>SCHEMA |FUNCTION )?(?P<objects>.+?) TO (?P<roles>[^;]+);", re.DOTALL
)
_RIGHT = re.compile(r"(?P<name>[A-Z]+)(?: \((?P<columns>[^)]*)\))?")
_ROLES_PAGE = "docs/how-to/roles.md; `otel-pg-exporter migrate --roles` makes roles that fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Right:
    """One privilege on one object, or on some columns of a table."""

    name: str
    kind: str  # as GRANT has it, with a blank behind; empty: a table
    object: str
    columns: str = ""

    @property
    def text(self) -> str:
        """It as GRANT has it, but the schema."""
        columns = f" ({self.columns})" if self.columns else ""
        return f"{self.name}{columns} ON {self.kind}"


def writers_rights() -> Iterator[_Right]:
    """Yield what the SQL of `migrate --roles` grants to the writer."""
    text = resources.files("otel_pg_exporter.migrations").joinpath("grants.sql").read_text(encoding="utf-8")
    for grant in _GRANT.finditer(re.sub(r"--.*", "", text)):
        if ":writer" not in grant["roles"]:
            continue
        objects = re.findall(r"[\w:]+(?:\([^)]*\))?", grant["objects"])
        for right in _RIGHT.finditer(grant["rights"]):
            for each in objects:
                yield _Right(name=right["name"], kind=grant["kind"] or "", object=each, columns=right["columns"] or "")


def privileges(database: Database) -> Iterator[Finding]:
    """Tell whether this role may do what `serve` does, and whether it may do more than it should."""
    user, superuser, owner, temporary, may_read = database.row(
        "SELECT current_user::text, rolsuper, pg_has_role(n.nspowner, 'USAGE'),"
        " has_database_privilege(current_database(), 'TEMPORARY'),"
        " has_table_privilege(format('%%I.spans', n.nspname), 'SELECT')"
        " FROM pg_roles, pg_namespace AS n WHERE rolname = current_user AND n.nspname = %s",
        database.schema,
    )
    needed = list(writers_rights())
    missing = [right for right in needed if not _has(database, right)]
    if all(right in missing for right in needed if right.name == "INSERT"):
        said = f"role {user} may {'read, but not' if may_read else 'neither read nor'} write: `serve` needs a writer"
        yield problem("privileges", said, _ROLES_PAGE)
        return
    if missing:
        yield problem(
            "privileges",
            f"role {user} lacks {len(missing)} that `serve` needs",
            "; ".join(_statement(database, right, user) for right in missing),
        )
    elif database.own:
        yield ok("privileges", f"role {user} may do what `serve` needs, in a PostgreSQL that is its own")
    elif superuser or owner:
        what = "is a superuser" if superuser else "owns the tables"
        yield warning(
            "privileges",
            f"role {user} may do all that `serve` needs, and {what}: whoever takes it over reads, alters and drops all",
            f"let `serve` log in as a writer: {_ROLES_PAGE}",
        )
    elif may_read:
        yield warning(
            "privileges",
            f"role {user} may do all that `serve` needs, and also read attributes and events",
            f"let `serve` log in as a writer: {_ROLES_PAGE}",
        )
    else:
        yield ok("privileges", f"role {user} may do what `serve` needs, and no more")
    if not temporary:
        yield warning(
            "privileges",
            f"role {user} may make no temporary tables, so that batches with retried spans are slower",
            f"GRANT TEMPORARY ON DATABASE {identifier(database.connection.info.dbname)} TO {identifier(user)};",
        )


def schema_is_closed(database: Database) -> Iterator[Finding]:
    """Tell that this role may not even look into the schema."""
    user = database.value("SELECT current_user::text")
    use = _Right(name="USAGE", kind="SCHEMA ", object=":schema")
    yield problem(
        "privileges",
        f"role {user} may not use schema {database.schema}",
        f"{_statement(database, use, user)}; what else `serve` needs: {_ROLES_PAGE}",
    )


def _has(database: Database, right: _Right) -> bool:
    if right.kind == "SCHEMA ":
        return bool(database.value("SELECT has_schema_privilege(%s, %s)", database.schema, right.name))
    name = f"{identifier(database.schema)}.{right.object}"
    if right.kind == "FUNCTION ":
        return bool(database.value("SELECT has_function_privilege(to_regprocedure(%s), %s)", name, right.name))
    if not right.columns:
        return bool(database.value("SELECT has_table_privilege(%s, %s)", name, right.name))
    return bool(
        database.value(
            "SELECT bool_and(has_column_privilege(%s, each, %s)) FROM unnest(%s::text[]) AS each",
            name,
            right.name,
            re.split(r",\s*", right.columns),
        )
    )


def _statement(database: Database, right: _Right, user: str) -> str:
    schema = identifier(database.schema)
    name = schema if right.kind == "SCHEMA " else f"{schema}.{right.object}"
    return f"GRANT {right.text}{name} TO {identifier(user)}"
