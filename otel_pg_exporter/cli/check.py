"""`check`: what keeps `serve` from working well, and what to do about it."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from otel_pg_exporter.cli import environment
from otel_pg_exporter.cli.arguments import Commands, add_command, add_settings, located, settings_from
from otel_pg_exporter.cli.colour import Colour, add_colour
from otel_pg_exporter.cli.output import PROGRAM, as_json, counted, print_lines, printable
from otel_pg_exporter.config import ServeSettings, settings_of

if TYPE_CHECKING:
    from otel_pg_exporter.diagnosis import Finding

_DESCRIPTION = """\
Examine everything that `serve` with the same settings depends on, and say of each whether it is fine, what is not, and
what to do about it: PostgreSQL, its version, settings and state, the tables, what this role may do with them,
partitions, clocks; on this machine the endpoints, the spool, certificates and files. Nothing is changed.

Any role may ask: a writer, as `serve` should be one, a reader, or the owner of the tables. Without a DSN the PostgreSQL
that `serve` brings along is examined, if it runs.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} check --config /etc/otel-pg-exporter.toml
  OTEL_PG_EXPORTER_DSN=postgresql://otel_writer@db.example/telemetry {PROGRAM} check
  {PROGRAM} check --json | jq -r '.findings[] | select(.grade != "ok") | .remedy'

exit status: 0 no problems, warnings at most; 1 problems; 2 wrong flag or setting.
"""

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        help="examine all that serve depends on",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        words="[--json] ",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_colour(parser)
    add_settings(parser, settings_of(ServeSettings))


def _run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    environment.prepare(own_postgres=not settings.database.dsn)
    # What is worth a warning when `serve` starts is a finding here.
    logging.getLogger("otel_pg_exporter").setLevel(logging.ERROR)
    found: list[Finding] = []
    colour = Colour(options.color)
    for finding in _findings(settings):
        found.append(finding)
        if not options.json:
            print_lines(_lines(finding, colour))
    problems, warnings = (sum(each.grade == grade for each in found) for grade in ("problem", "warning"))
    if options.json:
        print_lines([as_json(_json(found, problems, warnings), indent=2)])
    else:
        print_lines(
            ["", f"{counted(len(found), 'finding')}: {counted(problems, 'problem')}, {counted(warnings, 'warning')}"]
        )
    return 1 if problems else 0


def _findings(settings: ServeSettings) -> "Iterator[Finding]":
    from otel_pg_exporter.diagnosis import examine_database, examine_machine

    yield from examine_machine(settings)
    if (found := located(settings)).database.dsn:
        yield from examine_database(found, own=not settings.database.dsn)


def _lines(finding: "Finding", colour: Colour) -> Iterator[str]:
    grade = finding.grade.value
    yield f"{colour(f'{grade:<8}', _COLOURS[grade])} {finding.subject}: {printable(finding.message)}"
    if finding.remedy:  # in one line, to be copied
        yield f"{'':9}→ {printable(finding.remedy)}"


def _json(found: "Sequence[Finding]", problems: int, warnings: int) -> dict[str, object]:
    return {
        "problems": problems,
        "warnings": warnings,
        "findings": [
            {"subject": each.subject, "grade": each.grade.value, "message": each.message, "remedy": each.remedy}
            for each in found
        ],
    }
