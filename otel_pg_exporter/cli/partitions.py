"""`partitions`: which there are, how large, and what retention removes."""

import argparse
import contextlib
import datetime as dt
from typing import TYPE_CHECKING

from otel_pg_exporter.cli.arguments import Commands, add_command, add_database_settings, add_group, database_from
from otel_pg_exporter.cli.output import PROGRAM, as_json, print_lines, progress, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_pg_exporter.postgres.partition_list import Partition, Partitions
    from otel_pg_exporter.postgres.retention import Removed

_DESCRIPTION = """\
Work with the partitions of `spans` and `logs`, one a day (UTC), and with what is kept how long.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} partitions list
  {PROGRAM} partitions enforce --dry-run

`{PROGRAM} partitions ACTION --help` tells more. What is kept how long, `{PROGRAM} migrate --retention-spans 30d` sets.
"""

_LIST_DESCRIPTION = """\
List partitions with their sizes and estimates of their rows. `expired` ones are older than the retention, and are
dropped by the next round of it; `ahead` ones are made for days to come; `default` takes what no other one does.
"""

_LIST_EPILOG = f"""\
examples:
  {PROGRAM} partitions list --dsn postgresql://otel_reader@db.example/telemetry
  {PROGRAM} partitions list --json | jq '.partitions[] | select(.state == "expired").name'

exit status: 0 listed, 1 PostgreSQL cannot be asked, 2 wrong flag or setting.
"""

_ENFORCE_DESCRIPTION = """\
Remove now what is older than the retention, as receivers do every five minutes: partitions under a short lock, rows in
small steps, beside everybody who reads and writes.
"""

_ENFORCE_EPILOG = f"""\
examples:
  {PROGRAM} partitions enforce --dry-run
  {PROGRAM} partitions enforce --dsn postgresql://otel_writer@db.example/telemetry

exit status: 0 all of it is removed, 1 something is left, or PostgreSQL cannot be asked, 2 wrong flag or setting.
"""

_LONGEST = 7 * 86_400.0  # seconds
_NUMBERS = ("rows", "table", "indexes", "total")


def add_to(commands: Commands) -> None:
    """Add the command and its actions."""
    actions = add_group(
        commands, "partitions", help="partitions, sizes, retention", description=_DESCRIPTION, epilog=_EPILOG
    )
    listing = add_command(actions, "list", help="which there are", description=_LIST_DESCRIPTION, epilog=_LIST_EPILOG)
    listing.set_defaults(run=_list)
    listing.add_argument("--json", action="store_true", help="one object of JSON")
    add_database_settings(listing)

    enforce = add_command(
        actions,
        "enforce",
        help="remove what is older than the retention",
        description=_ENFORCE_DESCRIPTION,
        epilog=_ENFORCE_EPILOG,
        words="[--dry-run] ",
    )
    enforce.set_defaults(run=_enforce)
    enforce.add_argument("--dry-run", action="store_true", help="only tell what would go")
    add_database_settings(enforce)


def _list(options: argparse.Namespace) -> int:
    database = database_from(options, command="partitions list").database
    from otel_pg_exporter.postgres.connection import connect
    from otel_pg_exporter.postgres.partition_list import list_partitions

    with connect(database) as connection:
        found = list_partitions(connection, database)
    print_lines([as_json(_json(found), indent=2)] if options.json else _lines(found))
    return 0


def _enforce(options: argparse.Namespace) -> int:
    database = database_from(options, command="partitions enforce").database
    from otel_pg_exporter.postgres.connection import connect
    from otel_pg_exporter.postgres.partition_list import State, expired_rows, list_partitions
    from otel_pg_exporter.postgres.retention import Retention

    with connect(database) as connection:
        if options.dry_run:
            expired = [each for each in list_partitions(connection, database).partitions if each.state is State.EXPIRED]
            rows = expired_rows(connection, database)
            print_lines(_would_go(expired, rows.items()))
            return 0
        with progress("retention", form="{desc}") as bar:

            def report(removed: "Removed") -> None:
                bar.set_description_str(str(removed))

            retention = Retention(lambda: contextlib.nullcontext(connection), lambda: database)
            removed = retention.run(within=_LONGEST, report=report)
    print_lines([str(removed)])
    return 0


def _would_go(expired: "Iterable[Partition]", rows: "Iterable[tuple[str, int]]") -> list[str]:
    from otel_pg_exporter.postgres.operations import size

    lines = [f"would drop {each.name}: about {each.rows:,} rows, {size(each.bytes)}" for each in expired]
    lines += [f"would delete {count:,} rows of {name}" for name, count in rows if count]
    return [*lines, "and then traces and resources without a row left"] if lines else ["nothing to remove"]


def _lines(found: "Partitions") -> list[str]:
    from otel_pg_exporter.postgres.retention_policy import shown

    lines: list[str] = []
    for name in ("spans", "logs"):
        those = [each for each in found.partitions if each.table == name]
        rows = [_row(each) for each in those]
        rows.append(
            (
                "all",
                "",
                *_numbers(
                    sum(each.rows for each in those),
                    sum(each.heap_bytes for each in those),
                    sum(each.index_bytes for each in those),
                ),
                "",
            )
        )
        lines += table((name, "day", *_NUMBERS, "state"), rows, right=_NUMBERS)
        lines.append("")
    kept = (f"{item} {shown(seconds)}" for item, seconds in sorted(found.policy.items()))
    return [*lines, f"kept: {', '.join(kept)}; rows are estimates"]


def _row(partition: "Partition") -> tuple[str, ...]:
    numbers = _numbers(partition.rows, partition.heap_bytes, partition.index_bytes)
    return (partition.name, _day(partition), *numbers, partition.state.value)


def _numbers(rows: int, heap: int, indexes: int) -> tuple[str, str, str, str]:
    from otel_pg_exporter.postgres.operations import size

    return f"{rows:,}", size(heap), size(indexes), size(heap + indexes)


def _day(partition: "Partition") -> str:
    first, after = partition.first, partition.after
    if first is not None and after is not None and after - first == dt.timedelta(days=1):
        return f"{first:%Y-%m-%d}"
    bounds = [("" if each is None else f"{each:%Y-%m-%d}") for each in (first, after)]
    return "…".join(bounds) if any(bounds) else ""


def _json(found: "Partitions") -> dict[str, object]:
    return {
        "retention_seconds": dict(found.policy),
        "partitions": [
            {
                "table": each.table,
                "name": each.name,
                "from": None if each.first is None else each.first.isoformat(),
                "to": None if each.after is None else each.after.isoformat(),
                "rows_estimate": each.rows,
                "heap_bytes": each.heap_bytes,
                "index_bytes": each.index_bytes,
                "total_bytes": each.bytes,
                "state": each.state.value,
            }
            for each in found.partitions
        ],
        "total_bytes": sum(each.bytes for each in found.partitions),
    }
