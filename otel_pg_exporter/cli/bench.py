"""`bench`: how much a PostgreSQL takes from a receiver, and where the time goes."""

import argparse
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from otel_pg_exporter.cli import environment
from otel_pg_exporter.cli.arguments import Commands, add_command, add_settings, settings_from
from otel_pg_exporter.cli.forms import positive, seconds
from otel_pg_exporter.cli.output import PROGRAM, as_json, print_lines, progress
from otel_pg_exporter.config import (
    DatabaseSettings,
    MappingSettings,
    PipelineSettings,
    ServeSettings,
    WriterSettings,
    did_you_mean,
    settings_of,
)
from otel_pg_exporter.errors import ConfigurationError

if TYPE_CHECKING:
    from otel_pg_exporter.bench.run import Plan, Results

_PARTS = ("spans-small", "spans-mixed", "spans-genai", "logs-mixed", "latency")
_LEAST_SECONDS, _MOST_SECONDS = 0.1, 3600.0
_BAR = "{percentage:3.0f} %|{bar:30}| {desc}"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_DESCRIPTION = f"""\
Send made-up telemetry through a receiver to PostgreSQL, and tell how much it took, what that cost, and where the time
went: to size a server, or to see what a setting is worth. A receiver as `serve` runs it is started for it on a free
port of loopback, without a spool; the load comes from a process of its own on this machine.

With a DSN all is written to a schema of its own (otel_bench_...), which is dropped at the end, also after Ctrl-C; no
other schema is touched. (After a SIGKILL it stays; the next bench names it, and the SQL that drops it.) The role needs
CREATE on the database, which those of `migrate --roles` don't have: name the database's owner or an administrator, or
GRANT CREATE ON DATABASE telemetry TO otel_migrator. But the server is loaded as much as it can be: mind who
else uses it. Without a DSN, a PostgreSQL of its own runs for it in a temporary folder, which is removed.

Parts: {", ".join(_PARTS)}; the last is the time to an OK of spans-mixed at 1 %,
50 % and 90 % of what that part came to. small: no attributes; mixed: ten; genai: prompts of 2 to 8 KB.
"""

_EPILOG = f"""\
examples:
  {PROGRAM} bench --dsn postgresql://postgres@db.example/telemetry
  {PROGRAM} bench --dsn "$DSN" --parts spans-mixed --writers 4 --linger 0.01
  {PROGRAM} bench --seconds 30 --json > figures.json

exit status: 0 measured, 1 could not, 2 wrong flag or setting, 128 and a signal's number: stopped by it, all removed.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        help="measure how much a PostgreSQL takes, and where the time goes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        words="[--parts PART,...] [--seconds S] ",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--parts", type=_parts, default=_PARTS, metavar="PART,...", help="what to measure; default: all"
    )
    parser.add_argument(
        "--seconds",
        type=seconds(_LEAST_SECONDS, _MOST_SECONDS),
        default=5.0,
        metavar="S",
        help="seconds for each measurement, after a warm-up; default: 5",
    )
    parser.add_argument(
        "--max-rows",
        type=positive,
        default=20_000_000,
        metavar="N",
        help="rows written at most, shared out evenly (to prompts a tenth of that); what reaches its share ends early; "
        "default: 20000000",
    )
    parser.add_argument(
        "--items",
        type=positive,
        default=1_000,
        metavar="N",
        help="spans or log records in a request, with prompts a tenth of it; default: 1000",
    )
    parser.add_argument(
        "--senders", type=positive, default=16, metavar="N", help="requests in flight at most; default: 16"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    others = {"schema", "application_name", "window_past", "window_future"}
    groups = (DatabaseSettings, WriterSettings, MappingSettings, PipelineSettings)
    names = {setting.name for group in groups for setting in settings_of(group)} - others | {"log_level", "log_format"}
    add_settings(parser, (each for each in settings_of(ServeSettings) if each.name in names))


def _parts(text: str) -> tuple[str, ...]:
    named = tuple(text.split(","))
    for each in named:
        if each not in _PARTS:
            hint = did_you_mean(each, _PARTS) or f"; they are {', '.join(_PARTS)}"
            raise argparse.ArgumentTypeError(f"{each!r} is no part{hint}")
    return named


def _run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    environment.prepare(own_postgres=not settings.database.dsn)
    from otel_pg_exporter.bench.run import Part, Plan, require_fitting_requests
    from otel_pg_exporter.cli.bench_report import as_values, lines

    plan = Plan(
        parts=frozenset(map(Part, options.parts)),
        items=options.items,
        senders=options.senders,
        seconds=options.seconds,
        max_rows=options.max_rows,
    )
    if plan.max_rows < (least := plan.loads * plan.items):
        raise ConfigurationError(
            f"--max-rows ({plan.max_rows:,}) is less than one request of {plan.items:,} for each of {plan.loads} loads,"
            f" {least:,}; raise it, or lower --items"
        )
    require_fitting_requests(plan, settings.receiver.max_request_bytes)
    try:
        results = _measure(plan, settings, _Signals())
    except _Stopped as exc:
        print(f"{PROGRAM}: stopped by {exc.signal.name}", file=sys.stderr)
        return 128 + exc.signal
    print_lines([as_json(as_values(plan, results, settings), indent=2)] if options.json else lines(results))
    return 0


def _measure(plan: "Plan", settings: ServeSettings, signals: "_Signals") -> "Results":
    from otel_pg_exporter.bench.database import own_tables
    from otel_pg_exporter.bench.run import measure

    with own_tables(settings) as own, progress("", total=1, form=_BAR) as bar:
        bar.clear()
        print(_announcement(plan, own), file=sys.stderr)

        def report(done: float, name: str) -> None:
            signals.check()
            bar.set_description_str(name, refresh=False)
            bar.update(done - bar.n)

        return measure(plan, own, report=report)


def _announcement(plan: "Plan", settings: ServeSettings) -> str:
    from otel_pg_exporter.postgres.dsn import mask_dsn

    database = settings.database
    if database.dsn:
        where = f"PostgreSQL ({mask_dsn(database.dsn)})"
        place = f"the schema {database.schema}, which is dropped at the end"
    else:
        where, place = "a PostgreSQL of its own", f"{settings.data_dir}, which is removed at the end"
    return (
        f"{PROGRAM} bench loads {where}\nfor about {plan.expected_seconds:.0f} seconds and writes at most "
        f"{plan.max_rows:,} rows, about {plan.max_bytes / 1e9:.1f} GB with indexes and WAL, to\n"
        f"{place}. Ctrl-C stops it."
    )


class _Stopped(BaseException):
    """Raised in the main thread by the first signal: whatever waits there ends, and what was made is removed."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


class _Signals:
    """The first of the signals stops in good order; further ones do nothing, or something would be left behind."""

    def __init__(self) -> None:
        self._received = 0
        for number in _SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise what a handler may have raised in vain, while a finalizer ran."""
        if self._received:
            raise _Stopped(self._received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._received:
            self._received = number
            raise _Stopped(number)
