"""The roles that work with the tables, and what each may do: the SQL of `migrate --roles`."""

import re
from dataclasses import dataclass
from importlib import resources

from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.postgres.columns import identifier, literal
from otel_pg_exporter.postgres.connection import Connection

# 63 bytes less the longest suffix, and nothing that SQL would have to quote.
_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,49}")
# psql's notation: a quoted identifier, or in apostrophes a literal; a cast's colons are none of it.
_PLACEHOLDER = re.compile(r"(?<!:):('?)(schema|migrator|writer|reader|operator)\b\1")

_READERS = """
SELECT has_table_privilege(spans.oid, 'SELECT'), (
    SELECT rolname FROM aclexplode(relacl) JOIN pg_roles AS role ON role.oid = grantee
    WHERE privilege_type = 'SELECT' AND grantee <> relowner AND rolcanlogin
    ORDER BY rolname !~ '_reader$', rolname LIMIT 1
)
FROM pg_class AS spans WHERE spans.oid = format('%%I.spans', %s::text)::regclass
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Names of the four roles. The owner of a schema that exists takes the place of `migrator`."""

    prefix: str = "otel"

    def __post_init__(self) -> None:
        """Refuse names that would have to be quoted wherever they are written."""
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(
                f"{self.prefix!r} can't begin the names of roles: it takes 1 to 50 small letters, digits and _, and no "
                "digit in front"
            )

    @property
    def names(self) -> dict[str, str]:
        """The roles by what they do."""
        return {role: f"{self.prefix}_{role}" for role in ("migrator", "writer", "reader", "operator")}

    def creation(self, schema: str) -> str:
        """Write what comes before the tables: roles, their rights on the database, the schema; and SET ROLE."""
        return self._filled("roles.sql", schema)

    def grants(self, schema: str) -> str:
        """Write what comes after the tables, as their owner."""
        return self._filled("grants.sql", schema)

    def _filled(self, file: str, schema: str) -> str:
        values = {"schema": schema, **self.names}
        text = resources.files("otel_pg_exporter.migrations").joinpath(file).read_text(encoding="utf-8")
        return _PLACEHOLDER.sub(lambda match: (literal if match[1] else identifier)(values[match[2]]), text)


def reader_instead(connection: Connection, schema: str) -> str | None:
    """Return a role to look at whole spans with, if that of a connection may not, as no writer may; else None.

    Of those that were granted it the one with `migrate --roles`' ending comes first, with its name if there is none.
    """
    [(may_read, reader)] = connection.execute(_READERS, [schema]).fetchall()
    return None if may_read else reader or Roles().names["reader"]
