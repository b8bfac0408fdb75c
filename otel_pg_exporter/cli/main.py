"""The dispatch: which command runs, and with which code it exits.

Exit codes: 0 all went well, 2 the command line or a setting is wrong, 1 anything else that keeps a command from its
work, 128 and the number of a signal that ended it; SIGPIPE's also where nobody reads any more what it prints. Errors
are a line or two on stderr, without a stack trace, and never with a password; where log lines are JSON, such a line.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from otel_pg_exporter.cli import (
    bench,
    check,
    completion,
    config,
    dead_letters,
    logs,
    migrate,
    partitions,
    serve,
    tail,
    verify,
)
from otel_pg_exporter.cli.arguments import Parser, help_instead
from otel_pg_exporter.cli.output import PROGRAM, OutputError, fail, reserve_stdout
from otel_pg_exporter.errors import ConfigurationError, DeploymentError, ExporterError, OutageError

# As `--help` lists them.
_COMMANDS = (serve, migrate, check, tail, config, dead_letters, verify, partitions, bench, completion)

_DESCRIPTION = "OpenTelemetry traces and logs in PostgreSQL."

_EPILOG = f"""\
examples:
  {PROGRAM} serve
      receive OTLP on 127.0.0.1:4317 and keep it in a PostgreSQL of its own
  OTEL_PG_EXPORTER_DSN=postgresql://otel@db.example/telemetry {PROGRAM} serve
      receive OTLP and keep it in that PostgreSQL; the password comes from ~/.pgpass
  {PROGRAM} migrate --dsn postgresql://otel_migrator@db.example/telemetry
      create or update the tables there
  {PROGRAM} check
      find out what keeps the receiver from working well, and what to do about it
  {PROGRAM} tail --errors
      see what fails, as it arrives
  {PROGRAM} config show --changed
      see which settings count, and where each came from
  {PROGRAM} dead-letters list --since 1d
      see what was refused, and why; `dead-letters replay` stores it once the cause is mended
  {PROGRAM} verify --since 7d
      compare the summaries in `traces` with the spans
  {PROGRAM} partitions list
      see how large each day is, and what is kept how long
  {PROGRAM} bench
      measure what a PostgreSQL on this machine takes, in a minute

`{PROGRAM} COMMAND --help` lists the settings of a command, with their environment variables, and its exit codes.
`eval "$({PROGRAM} completion bash)"` has the shell complete all of it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    reserve_stdout()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = whole_parser()
        options = parser.parse_args(arguments)
        status: int = help_instead(parser) if options.command is None else options.run(options)
    except ConfigurationError as exc:
        return _fail(exc, status=2)
    except OutageError as exc:
        from otel_pg_exporter.postgres.libpq import CHECK_DSN

        return _fail(exc, "" if isinstance(exc, DeploymentError) else exc.remedy or CHECK_DSN, status=1)
    except OutputError as exc:
        return 128 + signal.SIGPIPE if exc.unread else _fail(exc, status=1)
    except ExporterError as exc:
        return _fail(exc, status=1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _fail(error: ExporterError, remedy: str = "", *, status: int) -> int:
    if logs.speak_json():
        logging.getLogger(__package__).critical("%s", "; ".join(filter(None, [str(error), remedy])))
        return status
    return fail(error, remedy, status=status)


def whole_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--help] [--version] COMMAND [...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(prog=PROGRAM, dest="command", title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
