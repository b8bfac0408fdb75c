"""The SQL files of `migrations/`: in which order, with which names filled in, and what they make."""

import hashlib
import re
from dataclasses import dataclass
from importlib import resources

from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.postgres.columns import add_columns, identifier, literal, mapped_columns
from otel_pg_exporter.postgres.connection import Connection

_FILE = re.compile(r"(\d{4})_\w+\.sql")
_PLACEHOLDER = re.compile(r"(?<!:):(schema|promoted_columns)\b")
_REPEATABLE = "-- Repeatable: "
_CREATE = re.compile(r"\bCREATE (?=FUNCTION|VIEW)")
_MADE = re.compile(r"\bCOMMENT ON (FUNCTION|VIEW) (\w+)")  # which each of them has


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered SQL file, its placeholders not yet filled in."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def repeatable(self) -> bool:
        """Whether it makes nothing but functions and views."""
        return self.text.startswith(_REPEATABLE)

    @property
    def made(self) -> list[str]:
        """The functions and views that it makes, as `view span_details`."""
        return [f"{kind.lower()} {name}" for kind, name in _MADE.findall(self.text)]

    def statements(self, schema: str, mapping: Mapping) -> str:
        """Fill in the placeholders, and add the entry in schema_migrations."""
        return self._filled(schema, mapping) + (
            f"\nINSERT INTO {identifier(schema)}.schema_migrations (version, name, checksum)"
            f" VALUES ({self.version}, {literal(self.name)}, {literal(self.checksum)});\n"
        )

    def repetition(self, schema: str, mapping: Mapping) -> str:
        """Fill in the placeholders of a repeatable one, to replace what is there: with its owner and its rights."""
        return _CREATE.sub("CREATE OR REPLACE ", self._filled(schema, mapping))

    def _filled(self, schema: str, mapping: Mapping) -> str:
        values = {
            "schema": identifier(schema),
            "promoted_columns": "".join(f"{each};\n" for each in add_columns(mapped_columns(mapping))),
        }
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)


def bundled() -> list[Migration]:
    """Read the package's migrations, in order."""
    found = [
        # Text mode: a checkout with CRLF must not look like a changed file.
        Migration(version=int(match[1]), name=entry.name, text=entry.read_text(encoding="utf-8"))
        for entry in resources.files("otel_pg_exporter.migrations").iterdir()
        if (match := _FILE.fullmatch(entry.name))
    ]
    return sorted(found, key=lambda migration: migration.version)


def lost_objects(connection: Connection, schema: str) -> list[str]:
    """Return what the migrations have made, and is gone, of functions and views: DROP … CASCADE takes many along."""
    rows = connection.execute(
        "SELECT 'view ' || c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %(schema)s AND c.relkind = 'v' UNION SELECT 'function ' || p.proname"
        " FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = %(schema)s",
        {"schema": schema},
    ).fetchall()
    found = {name for (name,) in rows}
    return [name for migration in bundled() for name in migration.made if name not in found]
