"""`verify`: the rows of `traces` held against the spans."""

import argparse
import datetime as dt
from typing import TYPE_CHECKING

from otel_pg_exporter.cli.arguments import Commands, add_command, add_database_settings, database_from
from otel_pg_exporter.cli.forms import SPELLING, moment, positive, refuse_empty_time
from otel_pg_exporter.cli.output import PROGRAM, as_json, counted, print_lines, printable, progress

if TYPE_CHECKING:
    from otel_pg_exporter.postgres.verify import Difference, Verification

_DESCRIPTION = f"""\
Compare each row of `traces` with the spans of its trace, and list those that are missing, superfluous or different.
With --fix they are put right, each in a transaction of its own, while receivers and exporters go on writing.

Compared are the traces with spans that started since --since. A trace that began before the oldest partition there is
can't be judged, and is only counted.

MOMENT is {SPELLING}.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} verify --since 2h
  {PROGRAM} verify --since 2026-11-01 --until 2026-11-08 --json
  {PROGRAM} verify --since 7d --fix

exit status: 0 no difference is left, 1 differences are left, or PostgreSQL cannot be asked, 2 wrong flag or setting.
"""


_BAR = "{desc}: {percentage:3.0f} %|{bar}| {elapsed}{postfix}"


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "verify",
        help="compare `traces` with the spans",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        words="--since MOMENT [--fix] ",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--since", type=moment, required=True, metavar="MOMENT", help="compare from then on")
    parser.add_argument("--until", type=moment, metavar="MOMENT", help="compare up to then; default: all that follows")
    parser.add_argument("--fix", action="store_true", help="put right what differs")
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after so many differences")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each difference")
    add_database_settings(parser)


def _run(options: argparse.Namespace) -> int:
    refuse_empty_time(options.since, options.until)
    settings = database_from(options, command="verify")
    from otel_pg_exporter.postgres.connection import connect
    from otel_pg_exporter.postgres.verify import Verification

    found = fixed = 0
    span = ((options.until or dt.datetime.now(dt.UTC)) - options.since).total_seconds()
    with progress("verify", total=max(span, 1.0), form=_BAR) as bar, connect(settings.database) as connection:
        walk = Verification(connection, settings.database, since=options.since, until=options.until)

        def report(until: dt.datetime) -> None:
            bar.set_postfix_str(f"{counted(walk.checked, 'trace')}, {counted(found, 'difference')}", refresh=False)
            bar.update(min((until - options.since).total_seconds(), bar.total) - bar.n)

        for difference in walk.run(fix=options.fix, report=report):
            bar.clear()
            print_lines([as_json(_json(difference))] if options.json else _lines(difference))
            found += 1
            fixed += difference.fixed
            if found == options.limit:
                break
    stopped = found == options.limit
    if not options.json:
        print_lines([_summary(walk, found=found, fixed=fixed, stopped=stopped)])
    return 0 if found == fixed and not stopped else 1


def _lines(difference: "Difference") -> list[str]:
    first = f"{difference.trace_id.hex} {difference.kind.value}{', fixed' if difference.fixed else ''}"
    if difference.kind is not difference.kind.DIFFERENT:
        return [first]
    shown = (
        f"    {column.name}: {_value(column.stored)}, the spans say {_value(column.exact)}"
        for column in difference.columns
    )
    return [first, *shown]


def _value(text: str | None) -> str:
    return "NULL" if text is None else printable(text)


def _json(difference: "Difference") -> dict[str, object]:
    return {
        "trace_id": difference.trace_id.hex,
        "kind": difference.kind.value,
        "fixed": difference.fixed,
        "columns": {each.name: {"stored": each.stored, "exact": each.exact} for each in difference.columns},
    }


def _summary(walk: "Verification", *, found: int, fixed: int, stopped: bool) -> str:
    parts = [f"{counted(walk.checked, 'trace')} compared: {counted(found, 'difference')}, {fixed:,} of them fixed"]
    if walk.skipped:
        parts.append(f"{walk.skipped:,} skipped of which spans may have been dropped")
    if stopped:
        parts.append("stopped by --limit, there may be more")
    return "; ".join(parts)
