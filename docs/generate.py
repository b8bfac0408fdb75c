# ruff: noqa: INP001 - a script, not a package
"""Write the generated parts of the documentation anew, from their definitions in the code: `make docs-reference`.

A generated part stands between two comments, `<!-- generated: NAME -->` and `<!-- end of generated part -->`. A new one
is a line in `PARTS` and its two comments in the document. `tests/test_docs.py` holds the documents equal to what this
writes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from otel_pg_exporter.config import (
    SDK_PREFIX,
    SERVER_PREFIX,
    ExporterSettings,
    ServeSettings,
    Setting,
    settings_of,
)
from otel_pg_exporter.postgres.roles import Roles

DOCS = Path(__file__).parent
END = "<!-- end of generated part -->"


class Part(NamedTuple):
    """A part of a document, and what writes its lines."""

    document: Path
    name: str
    lines: Callable[[], Iterable[str]]


def settings_tables(
    cls: type, *, prefix: str, names: Mapping[str, Callable[[Setting], str]], others: str
) -> Iterator[str]:
    """Yield a table for each group of settings, below a heading; `names` are its first columns."""
    titles = [*names, "environment variable", "default", "meaning"]
    for group, settings in itertools.groupby(settings_of(cls), key=lambda setting: setting.group or others):
        heading, _, more = group.removesuffix(".").replace("; ", ". ").partition(". ")
        yield from ("", f"### {heading}", "", *([f"{more[0].upper()}{more[1:]}.", ""] if more else []))
        yield f"| {' | '.join(titles)} |"
        yield "|---" * len(titles) + "|"
        for each in settings:
            default = f"`{each.shown_default}`" if each.shown_default else ""
            words = f" (one of {', '.join(f'`{choice}`' for choice in each.choices)})" if each.choices else ""
            first = (f"`{name(each)}`" for name in names.values())
            yield f"| {' | '.join([*first, f'`{each.variable(prefix)}`', default, each.help + words])} |"


def serve_settings() -> Iterable[str]:
    """Return the tables of the server's settings."""
    names = {"flag": lambda setting: setting.flag, "key in the file": lambda setting: setting.name}
    return settings_tables(ServeSettings, prefix=SERVER_PREFIX, names=names, others="The service")


def sdk_settings() -> Iterable[str]:
    """Return the tables of the exporters' settings."""
    names = {"argument": lambda setting: setting.name}
    return settings_tables(ExporterSettings, prefix=SDK_PREFIX, names=names, others="An export")


def rights() -> Iterable[str]:
    """Return the SQL that grants the roles their rights."""
    return _code(Roles().grants("otel"))


def roles() -> Iterable[str]:
    """Return the SQL that makes the roles and the schema."""
    return _code(Roles().creation("otel"))


def _code(sql: str) -> Iterable[str]:
    return ["```sql", *sql.rstrip().splitlines(), "```"]


PARTS = (
    Part(DOCS / "how-to" / "roles.md", "rights", rights),
    Part(DOCS / "how-to" / "roles.md", "roles", roles),
    Part(DOCS / "reference" / "settings.md", "settings", serve_settings),
    Part(DOCS / "reference" / "sdk.md", "settings", sdk_settings),
)


def with_part(text: str, part: Part) -> str:
    """Return a document's text with the part written anew; ValueError where it has no place for it."""
    begin = f"<!-- generated: {part.name} -->\n"
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not (found and end):
        message = f"{part.document}: no {begin.strip()} … {END}"
        raise ValueError(message)
    return before + begin + "\n" + "\n".join(part.lines()).strip("\n") + "\n\n" + end + after


if __name__ == "__main__":
    for each in PARTS:
        each.document.write_text(with_part(each.document.read_text(encoding="utf-8"), each), encoding="utf-8")
