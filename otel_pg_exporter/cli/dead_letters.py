"""`dead-letters`: the items that were refused: list them, look into them, replay them, purge them."""

import argparse
import base64
import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from otel_pg_exporter.cli.arguments import (
    Commands,
    Parser,
    add_command,
    add_database_settings,
    add_group,
    database_from,
)
from otel_pg_exporter.cli.forms import SPELLING, moment, positive, refuse_empty_time
from otel_pg_exporter.cli.output import (
    PROGRAM,
    as_json,
    confirmed,
    counted,
    fail,
    print_bytes,
    print_lines,
    progress,
    table,
)
from otel_pg_exporter.errors import ConfigurationError, ExporterError
from otel_pg_exporter.model import Signal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_pg_exporter.postgres.dead_letters import Count, DeadLetters, Letter, Selection
    from otel_pg_exporter.postgres.replay import Progress

_SHOWN = 100  # letters in a table, unless told otherwise

_DESCRIPTION = """\
Work with dead letters: spans and log records that were refused alone, each kept in the table `dead_letters` with the
reason, as an OTLP request that can be sent again.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} dead-letters list --summary
  {PROGRAM} dead-letters show 42
  {PROGRAM} dead-letters replay --reason "too long"
  {PROGRAM} dead-letters purge --until 30d

`{PROGRAM} dead-letters ACTION --help` tells more. What each needs to be granted: docs/how-to/roles.md.
"""

_MOMENT = f"\nMOMENT is {SPELLING}.\n"

_LIST_DESCRIPTION = f"""\
List dead letters, the newest first: {_SHOWN} unless --limit says otherwise, with --json all.
{_MOMENT}"""

_LIST_EPILOG = f"""\
examples:
  {PROGRAM} dead-letters list --since 2h --signal traces
  {PROGRAM} dead-letters list --summary
  {PROGRAM} dead-letters list --sqlstate 22001 --json | jq .id

exit status: 0 listed, 1 PostgreSQL cannot be asked, 2 wrong flag or setting.
"""

_SHOW_DESCRIPTION = """\
Show one dead letter as JSON, its item as OTLP/JSON (`otlp`), or where that is impossible as bytes (`otlp_base64`).
"""

_SHOW_EPILOG = f"""\
examples:
  {PROGRAM} dead-letters show 42
  {PROGRAM} dead-letters show 42 --raw > item.pb

exit status: 0 shown, 1 there is none, or PostgreSQL cannot be asked, 2 wrong flag or setting.
"""

_REPLAY_DESCRIPTION = f"""\
Store dead letters once more, the oldest first, as if they had just come in. A letter is deleted in the transaction
that stores its item, so this may be interrupted, repeated, and run several times at once. What is refused again stays
a letter, with the new reason. Say which: ids, conditions, which all must hold, or --all.
{_MOMENT}"""

_REPLAY_EPILOG = f"""\
examples:
  {PROGRAM} dead-letters replay 42 43
  {PROGRAM} dead-letters replay --since 1d --sqlstate 23514 --dry-run
  {PROGRAM} dead-letters replay --all

exit status: 0 none of them is left, 1 some were refused again, or PostgreSQL is away, 2 wrong flag or setting.
"""

_PURGE_DESCRIPTION = f"""\
Delete dead letters for good, the oldest first. Asks first on a terminal; elsewhere --yes must be given. Say which: ids,
conditions, which all must hold, or --all.
{_MOMENT}"""

_PURGE_EPILOG = f"""\
examples:
  {PROGRAM} dead-letters purge --until 30d --yes
  {PROGRAM} dead-letters purge --signal logs --reason "nested deeper" --dry-run

exit status: 0 deleted, 1 not, since the answer was no or PostgreSQL cannot be asked, 2 wrong flag or setting, or no
terminal to ask on.
"""


def add_to(commands: Commands) -> None:
    """Add the command and its actions."""
    actions = add_group(
        commands, "dead-letters", help="what was refused, and its replay", description=_DESCRIPTION, epilog=_EPILOG
    )
    listing = add_command(actions, "list", help="which there are", description=_LIST_DESCRIPTION, epilog=_LIST_EPILOG)
    listing.set_defaults(run=_list)
    _add_conditions(listing)
    listing.add_argument("--summary", action="store_true", help="count by reason instead")
    listing.add_argument("--json", action="store_true", help="a line of JSON for each")
    add_database_settings(listing)

    show = add_command(
        actions,
        "show",
        help="one with its item",
        description=_SHOW_DESCRIPTION,
        epilog=_SHOW_EPILOG,
        words="ID [--raw] ",
    )
    show.set_defaults(run=_show)
    show.add_argument("id", type=positive, metavar="ID", help="as `list` shows it")
    show.add_argument("--raw", action="store_true", help="write the OTLP request itself, in protobuf, to stdout")
    add_database_settings(show)

    replay = _add_change(actions, "replay", "store them after all", _REPLAY_DESCRIPTION, _REPLAY_EPILOG)
    replay.set_defaults(run=_replay)
    add_database_settings(replay, "synchronous_commit", "write_method", "mappings", "window_past", "window_future")

    purge = _add_change(actions, "purge", "delete them", _PURGE_DESCRIPTION, _PURGE_EPILOG)
    purge.set_defaults(run=_purge)
    purge.add_argument("--yes", action="store_true", help="don't ask")
    add_database_settings(purge)


def _add_change(actions: Commands, name: str, help_: str, description: str, epilog: str) -> Parser:
    parser = add_command(
        actions, name, help=help_, description=description, epilog=epilog, words="[ID ...] [conditions] [--all] "
    )
    parser.add_argument("ids", type=positive, nargs="*", metavar="ID", help="as `list` shows it")
    _add_conditions(parser)
    parser.add_argument("--all", action="store_true", help="all there are")
    parser.add_argument("--dry-run", action="store_true", help="only tell how many these are")
    return parser


def _add_conditions(parser: Parser) -> None:
    parser.add_argument("--signal", choices=[signal.value for signal in Signal], help="of this signal")
    parser.add_argument("--since", type=moment, metavar="MOMENT", help="received then or later")
    parser.add_argument("--until", type=moment, metavar="MOMENT", help="received before then")
    parser.add_argument("--reason", default="", metavar="TEXT", help="with this text in the reason, in whatever case")
    parser.add_argument("--sqlstate", default="", metavar="CODE", help="refused by PostgreSQL with this code")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many")


def _selection(options: argparse.Namespace) -> "Selection":
    from otel_pg_exporter.postgres.dead_letters import Selection

    refuse_empty_time(options.since, options.until)
    selection = Selection(
        ids=tuple(getattr(options, "ids", ())),
        signal=None if options.signal is None else Signal(options.signal),
        since=options.since,
        until=options.until,
        reason=options.reason,
        sqlstate=options.sqlstate,
    )
    if "all" in options and options.all != selection.everything:
        raise ConfigurationError(
            "--all and conditions contradict each other"
            if options.all
            else "say which dead letters: ids, conditions (--since, --reason, ...), or --all"
        )
    return selection


@contextlib.contextmanager
def _letters(options: argparse.Namespace) -> "Iterator[DeadLetters]":
    settings = database_from(options, command="dead-letters")
    from otel_pg_exporter.postgres.connection import connect
    from otel_pg_exporter.postgres.dead_letters import DeadLetters

    with connect(settings.database) as connection:
        yield DeadLetters(connection, settings.database)


# The actions.


def _list(options: argparse.Namespace) -> int:
    selection = _selection(options)
    with _letters(options) as letters:
        if options.summary:
            counts = letters.counts(selection)[: options.limit]
            print_lines([as_json(_count_json(each)) for each in counts] if options.json else _summary(counts))
        elif options.json:
            for letter in letters.newest_first(selection, limit=options.limit):
                print_lines([as_json(_letter_json(letter))])
        else:
            shown = list(letters.newest_first(selection, limit=options.limit or _SHOWN))
            total = letters.total(selection).count if len(shown) == (options.limit or _SHOWN) else len(shown)
            print_lines([*_table(shown), f"{len(shown):,} of {counted(total, 'dead letter')}"])
    return 0


def _show(options: argparse.Namespace) -> int:
    from otel_pg_exporter.cli.otlp_json import otlp_json
    from otel_pg_exporter.postgres.dead_letters import Selection

    if options.raw and sys.stdout.isatty():
        raise ConfigurationError("--raw writes protobuf, which is not for a terminal: send it to a file or a program")
    with _letters(options) as letters:
        found = list(letters.newest_first(Selection(ids=(options.id,))))
        items = letters.items([options.id])
    if not found or options.id not in items:
        raise ExporterError(f"there is no dead letter {options.id}")
    letter, body = found[0], items[options.id]
    if options.raw:
        print_bytes(body)
        return 0
    rendered = otlp_json(letter.signal, body)
    item = {"otlp_base64": base64.b64encode(body).decode()} if rendered is None else {"otlp": rendered}
    print_lines([as_json(_letter_json(letter) | item, indent=2)])
    return 0


def _replay(options: argparse.Namespace) -> int:
    selection = _selection(options)
    if options.dry_run:
        return _tell(options, selection, "would be replayed")
    settings = database_from(options, command="dead-letters")
    from otel_pg_exporter import mapping
    from otel_pg_exporter.postgres.connection import Connections
    from otel_pg_exporter.postgres.replay import Progress, Replay

    # What goes wrong ends the command, which says it itself.
    logging.getLogger("otel_pg_exporter.postgres.writer").setLevel(logging.CRITICAL)
    replayed = Progress()
    columns = mapping.load(settings.mapping.mappings)
    with progress("replayed") as bar, contextlib.closing(Connections(settings.database, size=1)) as connections:
        for replayed in Replay(settings, columns, connections).run(selection, limit=options.limit):
            bar.set_postfix_str(f"{replayed.refused:,} of them refused again", refresh=False)
            bar.update(replayed.done - bar.n)
    print_lines([_told(replayed)])
    missing = len(set(selection.ids or ())) - replayed.done
    if missing > 0:
        return fail(ExporterError(f"{missing:,} of the dead letters that were named are not there"), status=1)
    return 1 if replayed.refused else 0


def _told(replayed: "Progress") -> str:
    text = (
        f"{counted(replayed.done, 'dead letter')} replayed: {replayed.stored:,} stored, "
        f"{replayed.duplicate:,} stored before, {replayed.refused:,} refused again"
    )
    return text + ("; `dead-letters list` tells why" if replayed.refused else "")


def _purge(options: argparse.Namespace) -> int:
    selection = _selection(options)
    if options.dry_run:
        return _tell(options, selection, "would be deleted")
    if not options.yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError("purge deletes for good: without a terminal to ask on, give --yes (or --dry-run)")
    done = 0
    with _letters(options) as letters:
        count = _limited(letters.total(selection).count, options.limit)
        if count and not options.yes and not confirmed(f"Delete {counted(count, 'dead letter')} for good?"):
            print_lines(["nothing deleted"])
            return 1
        with progress("deleted", total=count) as bar:
            for some in letters.purge(selection, limit=options.limit):
                done += some
                bar.update(some)
    print_lines([f"{counted(done, 'dead letter')} deleted"])
    return 0


def _tell(options: argparse.Namespace, selection: "Selection", what: str) -> int:
    with _letters(options) as letters:
        total = letters.total(selection)
    size = "" if options.limit is not None and options.limit < total.count else f" ({total.size:,} bytes)"
    print_lines([f"{counted(_limited(total.count, options.limit), 'dead letter')}{size} {what}"])
    return 0


def _limited(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


# How they look.


def _table(letters: "list[Letter]") -> list[str]:
    titles = ("id", "received (UTC)", "signal", "sqlstate", "bytes", "reason")
    rows = [
        (
            str(letter.id),
            f"{letter.received_at:%Y-%m-%d %H:%M:%S}",
            letter.signal,
            letter.sqlstate or "",
            f"{letter.size:,}",
            letter.reason,
        )
        for letter in letters
    ]
    return table(titles, rows, right={"id", "bytes"}) if rows else []


def _summary(counts: "list[Count]") -> list[str]:
    titles = ("count", "signal", "sqlstate", "last (UTC)", "reason")
    rows = [
        (f"{each.count:,}", each.signal, each.sqlstate or "", f"{each.last:%Y-%m-%d %H:%M:%S}", each.reason)
        for each in counts
    ]
    return table(titles, rows, right={"count"}) if rows else ["no dead letters"]


def _letter_json(letter: "Letter") -> dict[str, object]:
    return {
        "id": letter.id,
        "received_at": letter.received_at.isoformat(),
        "signal": letter.signal,
        "request_id": str(letter.request_id),
        "item_index": letter.item_index,
        "reason": letter.reason,
        "sqlstate": letter.sqlstate,
        "bytes": letter.size,
    }


def _count_json(each: "Count") -> dict[str, object]:
    return {
        "count": each.count,
        "signal": each.signal,
        "sqlstate": each.sqlstate,
        "reason": each.reason,
        "first": each.first.isoformat(),
        "last": each.last.isoformat(),
    }
