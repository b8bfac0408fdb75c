# ruff: noqa: INP001 - a script, not a package
"""Write the generated parts of the documentation anew, from their definitions in the code: `make docs-reference`.

A generated part stands between two comments, `<!-- generated: NAME -->` and `<!-- end of generated part -->`. A new one
is a line in `PARTS` and its two comments in the document. `tests/test_docs.py` holds the documents equal to what this
writes.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from otel_pg_exporter.cli.arguments import parsers_of
from otel_pg_exporter.cli.main import whole_parser
from otel_pg_exporter.config import (
    SDK_PREFIX,
    SERVER_PREFIX,
    ExporterSettings,
    ServeSettings,
    Setting,
    settings_of,
)
from otel_pg_exporter.monitoring.groups import GROUPS
from otel_pg_exporter.monitoring.histograms import HISTOGRAMS
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


def commands() -> Iterator[str]:
    """Yield a section for each command: what it says by `--help`, but the settings by name alone."""
    flags = {setting.flag for setting in settings_of(ServeSettings)}
    for parser in parsers_of(whole_parser()):
        actions = [each for each in parser._actions if each.dest not in {"help", "version"}]  # noqa: SLF001 - argparse has no other way
        settings = [each.option_strings[0] for each in actions if flags.intersection(each.option_strings)]
        usage = parser.format_usage().removeprefix("usage: ").strip()
        yield from ("", f"## {parser.prog}", "", (parser.description or "").strip(), "", "```text", usage, "```")
        yield from _arguments(parser, [each for each in actions if not flags.intersection(each.option_strings)])
        if len(settings) == len(flags):
            yield from ("", "It takes all [settings](settings.md).")
        elif settings:
            shown = ", ".join(f"`{flag}`" for flag in settings)
            yield from ("", f"It takes these of the [settings](settings.md): {shown}.")
        if parser.epilog:
            yield from ("", "```text", parser.epilog.strip(), "```")


def _arguments(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> Iterator[str]:
    formatter = parser._get_formatter()  # noqa: SLF001 - argparse has no other way
    rows = []
    for each in actions:
        if isinstance(each.choices, dict) and each.nargs == argparse.PARSER:
            helps = {choice.dest: choice.help for choice in each._get_subactions()}  # noqa: SLF001 - as above
            links = {name: f"[`{name}`](#{each.choices[name].prog.replace(' ', '-')})" for name in helps}
            rows += [(links[name], text or "") for name, text in helps.items()]
        else:
            shown = formatter._format_action_invocation(each)  # noqa: SLF001 - as above
            rows.append((f"`{shown}`", formatter._expand_help(each)))  # noqa: SLF001 - as above
    if rows:
        yield from ("", "| | |", "|---|---|")
        yield from (f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows)


def rights() -> Iterable[str]:
    """Return the SQL that grants the roles their rights."""
    return _code(Roles().grants("otel"))


def roles() -> Iterable[str]:
    """Return the SQL that makes the roles and the schema."""
    return _code(Roles().creation("otel"))


def metrics() -> Iterator[str]:
    """Yield a table for each group of metrics, below a heading."""
    read = [(group.title, [instrument.definition for instrument in group.instruments]) for group in GROUPS]
    for title, definitions in [*read, ("Histograms", [histogram.definition for histogram in HISTOGRAMS])]:
        yield from ("", f"### {title}", "")
        yield "| OpenTelemetry | Prometheus | kind | unit | attributes | meaning |"
        yield "|---" * 6 + "|"
        for each in definitions:
            attributes = ", ".join(f"`{attribute}`" for attribute in each.attributes)
            what = f"{each.kind.value} | `{each.unit}` | {attributes} | {each.description}"
            yield f"| `{each.name}` | `{each.prometheus}` | {what} |"


def _code(sql: str) -> Iterable[str]:
    return ["```sql", *sql.rstrip().splitlines(), "```"]


PARTS = (
    Part(DOCS / "reference" / "commands.md", "commands", commands),
    Part(DOCS / "how-to" / "roles.md", "rights", rights),
    Part(DOCS / "how-to" / "roles.md", "roles", roles),
    Part(DOCS / "reference" / "metrics.md", "metrics", metrics),
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
