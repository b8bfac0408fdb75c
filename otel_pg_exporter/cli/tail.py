"""`tail`: spans and log records as they arrive."""

import argparse
import contextlib
import re
import select
import sys
import time
import uuid
from typing import TYPE_CHECKING

from otel_pg_exporter.cli.arguments import Commands, add_command, add_database_settings, database_from
from otel_pg_exporter.cli.colour import Colour, add_colour
from otel_pg_exporter.cli.forms import SPELLING, moment, positive, seconds
from otel_pg_exporter.cli.output import PROGRAM, OutputError, as_json, print_lines
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError, DeploymentError, OutageError
from otel_pg_exporter.model import Signal

if TYPE_CHECKING:
    from otel_pg_exporter.cli.tail_lines import Lines
    from otel_pg_exporter.postgres.connection import Connection
    from otel_pg_exporter.postgres.tail import Filter, Look, Tail

_SEVERITIES = {"trace": 1, "debug": 5, "info": 9, "warn": 13, "error": 17, "fatal": 21}

_FIRST_SHOWN = 10  # of what was there before, unless told otherwise
_MOST_SHOWN = 1_000  # at a look
_WINDOW, _LEAST_WINDOW = 3600.0, 60.0  # seconds that an item may have begun before it was stored
_TIMEOUT = 3.0  # seconds that a look may take
_SLOW = 0.2  # seconds, from which on the next look looks through less
_SHARE = 0.1  # of the time that looks may take, so that PostgreSQL has its rest

_DESCRIPTION = f"""\
Show spans and log records as they are stored, a line each: time (UTC), level, service, the beginning of the trace id,
duration, and the name or the text. A role that may read the tables suffices.

First come the last items that there are, by their own times, however old; where to find them takes seconds, it is said
how far back was looked. Then PostgreSQL is asked every --interval seconds what was stored meanwhile, and less often
where that takes it long. At most {_MOST_SHOWN} items are shown at a time; where there are more, that is said, and a
filter helps. Items that began more than an hour before they were stored are not looked for then, nor with --since, and
on a very busy server that time is cut. Filters must all hold.

MOMENT is {SPELLING}.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} tail --service checkout --errors
  {PROGRAM} tail --logs --min-severity warn --since 15m
  {PROGRAM} tail --attribute http.route=/cart --grep timeout
  {PROGRAM} tail --trace-id 4bf92f35 --once --since 1h
  {PROGRAM} tail --json | jq -r 'select(.duration_ns > 1e9) | .name'

exit status: 0 shown (--once); 1 PostgreSQL cannot be asked; 2 wrong flag or setting; 130 Ctrl-C; 141 nobody reads any
more.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "tail",
        help="show spans and logs as they arrive",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        words="[filters] [--once] [--json] ",
    )
    parser.set_defaults(run=_run)
    signals = parser.add_mutually_exclusive_group()
    signals.add_argument("--spans", action="store_true", help="only spans")
    signals.add_argument("--logs", action="store_true", help="only log records")
    filters = parser.add_argument_group("Filters")
    filters.add_argument("--service", default="", metavar="NAME", help="of this service")
    filters.add_argument("--name", default="", metavar="TEXT", help="with this in the span's or event's name")
    filters.add_argument("--grep", default="", metavar="TEXT", help="with this in name, status message or body")
    filters.add_argument("--errors", action="store_true", help="failed spans, and log records from error on")
    filters.add_argument("--min-severity", choices=_SEVERITIES, help="log records of this severity or above; no spans")
    filters.add_argument("--trace-id", type=_traces, metavar="HEX", help="of this trace; its first digits suffice")
    filters.add_argument(
        "--attribute",
        type=_attribute,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with this attribute, its own or its resource's; may be repeated",
    )
    parser.add_argument(
        "--since", type=moment, metavar="MOMENT", help="what was stored since; default: the last, see -n"
    )
    parser.add_argument(
        "-n",
        type=positive,
        metavar="N",
        help=f"of what was there before, the last N; default: {_FIRST_SHOWN}, with --since {_MOST_SHOWN}",
    )
    parser.add_argument("--once", action="store_true", help="show what is there, and end")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each, with its attributes")
    parser.add_argument(
        "--interval", type=seconds(0.1, 3600), default=1.0, metavar="S", help="seconds between two looks; default: 1"
    )
    add_colour(parser)
    add_database_settings(parser)


def _traces(text: str) -> tuple[uuid.UUID, uuid.UUID]:
    digits = text.lower().replace("-", "")
    if not re.fullmatch("[0-9a-f]{1,32}", digits):
        raise argparse.ArgumentTypeError(f"{text!r} is not the beginning of a trace id, which has 32 hex digits")
    return uuid.UUID(digits.ljust(32, "0")), uuid.UUID(digits.ljust(32, "f"))


def _attribute(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} does not read KEY=VALUE")
    return key, value


def _run(options: argparse.Namespace) -> int:
    settings = database_from(options, command="tail")
    from otel_pg_exporter.cli.tail_lines import Lines
    from otel_pg_exporter.postgres.tail import Tail

    tail = Tail(settings.database, _filter(options), attributes=options.json)
    with contextlib.closing(_Following(tail, settings, options, Lines(Colour(options.color)))) as following:
        following.first(options)
        while not options.once:
            following.wait()
            following.next()
    return 0


def _filter(options: argparse.Namespace) -> "Filter":
    from otel_pg_exporter.postgres.tail import Filter

    if options.spans and options.min_severity:
        raise ConfigurationError("--min-severity is for log records, which --spans leaves out; --errors is for both")
    signals = set(Signal)
    if options.spans:
        signals = {Signal.TRACES}
    if options.logs or options.min_severity:
        signals = {Signal.LOGS}
    return Filter(
        signals=frozenset(signals),
        service=options.service,
        name=options.name,
        text=options.grep,
        errors=options.errors,
        min_severity=_SEVERITIES.get(options.min_severity, 0),
        traces=options.trace_id,
        attributes=tuple(options.attribute),
    )


class _Following:
    """Looks again and again, and prints; a connection that is lost is made anew."""

    def __init__(self, tail: "Tail", settings: ServeSettings, options: argparse.Namespace, lines: "Lines") -> None:
        self._tail = tail
        self._settings = settings.database
        self._json: bool = options.json
        self._interval: float = options.interval
        self._lines = lines
        self._connection: Connection | None = None
        self._away = False
        self._window = _WINDOW
        self._took = 0.0
        self._readers = select.poll()
        self._readers.register(sys.stdout.fileno(), 0)  # a closed pipe reports itself

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def first(self, options: argparse.Namespace) -> None:
        """Show the last of what is there. Raises what keeps it from that."""
        timeout = self._settings.statement_timeout
        if not options.once:
            self._look(limit=_MOST_SHOWN, timeout=timeout)  # what is there already is no news
        limit = options.n or (_MOST_SHOWN if options.since else _FIRST_SHOWN)
        look = self._tail.last(
            self._connected(), since=options.since, window=_WINDOW, limit=limit, timeout=timeout, patience=_TIMEOUT
        )
        if look.skipped and options.since and not options.n:
            print(f"{PROGRAM}: more than {limit:,} were stored since then; the last are shown (-n)", file=sys.stderr)
        if look.reached is not None and options.since is None and len(look.items) < limit:
            print(f"{PROGRAM}: looked back to {look.reached:%F %T} UTC only; --since looks further", file=sys.stderr)
        elif not look.items and options.once:
            print(f"{PROGRAM}: nothing is stored that fits", file=sys.stderr)
        self._show(look)

    def wait(self) -> None:
        """Wait until the next look is due. Raises OutputError as soon as nobody reads any more."""
        if self._readers.poll(max(self._interval, self._took * (1 / _SHARE - 1)) * 1000):
            raise OutputError("nobody reads any more", unread=True)

    def next(self) -> None:
        """Show what is new."""
        try:
            look = self._look(limit=_MOST_SHOWN, timeout=min(_TIMEOUT, self._settings.statement_timeout))
        except DeploymentError:
            raise  # will not pass by itself
        except OutageError as exc:
            if not self._away:
                print(f"{PROGRAM}: {exc.with_remedy}; waiting for it", file=sys.stderr)
            self._away = True
            self.close()
            self._connection = None
            return
        except DatabaseUnavailableError:  # too slow
            self._look_through_less()
            return
        if self._away:
            print(f"{PROGRAM}: PostgreSQL is back", file=sys.stderr)
        self._away = False
        if self._took > _SLOW:
            self._look_through_less()
        if look.skipped:
            print(f"{PROGRAM}: more than {_MOST_SHOWN:,} arrived at once; the last are shown", file=sys.stderr)
        self._show(look)

    def _connected(self) -> "Connection":
        from otel_pg_exporter.postgres.connection import connect

        if self._connection is None:
            self._connection = connect(self._settings)
        return self._connection

    def _look(self, *, limit: int, timeout: float) -> "Look":
        connection = self._connected()
        began = time.monotonic()
        try:
            return self._tail.look(connection, window=self._window, limit=limit, timeout=timeout)
        finally:
            self._took = time.monotonic() - began

    def _look_through_less(self) -> None:
        if self._window > _LEAST_WINDOW:
            self._window = max(round(self._window * _SLOW / self._took / 2), _LEAST_WINDOW)
            print(
                f"{PROGRAM}: PostgreSQL is busy: from now on without what began more than {self._window:g} s before "
                "it was stored",
                file=sys.stderr,
            )

    def _show(self, look: "Look") -> None:
        from otel_pg_exporter.cli.tail_lines import as_values

        shown = [as_json(as_values(item)) if self._json else self._lines.line(item) for item in look.items]
        if shown:
            print_lines(shown)
