"""The command line: the only place that prints or exits.

Exit codes: 0 all went well, 2 the command line or a setting is wrong, 1 anything else that keeps a command from its
work. Errors are a line or two on stderr, without a stack trace, and never with a password.
"""

import argparse
import difflib
import importlib.metadata
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from otel_pg_exporter import config
from otel_pg_exporter.config import SERVER_PREFIX, DatabaseSettings, ServeSettings, Setting, settings_of
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError, ExporterError, StartupError

if TYPE_CHECKING:
    from otel_pg_exporter.service import Service

_PROGRAM = "otel-pg-exporter"

_DESCRIPTION = "OpenTelemetry traces and logs in PostgreSQL."

_EPILOG = f"""\
examples:
  {_PROGRAM} serve
      receive OTLP on 127.0.0.1:4317 and keep it in a PostgreSQL of its own
  OTEL_PG_EXPORTER_DSN=postgresql://otel@db.example/telemetry {_PROGRAM} serve
      receive OTLP and keep it in that PostgreSQL; the password comes from ~/.pgpass
  {_PROGRAM} migrate --dsn postgresql://otel_migrator@db.example/telemetry
      create or update the tables there

`{_PROGRAM} COMMAND --help` lists the settings of a command, with their environment variables.
"""

_SERVE_DESCRIPTION = """\
Receive traces and logs by OTLP and write them to PostgreSQL. An OK to a sender means: committed.

Without a DSN, PostgreSQL is started too: its data stays in --data-dir, its tables are created and updated. libpq's own
variables (PGHOST, PGUSER, PGPASSFILE, ...) fill in what a DSN leaves out, but name no server by themselves: to rely on
them alone, give `--dsn dbname=telemetry` or `--dsn service=telemetry`.

SIGTERM and SIGINT (Ctrl-C) finish what is in flight and exit with 0; a second one exits at once.
"""

_SERVE_EPILOG = f"""\
Each setting is a flag, an environment variable, or a key in a TOML file (grpc_endpoint = "127.0.0.1:4317"); flags win
over the environment, and that over the file. Durations are in seconds, sizes in bytes (64MiB is understood).

examples:
  {_PROGRAM} serve --grpc-endpoint 0.0.0.0:4317 --data-dir /srv/telemetry
  {_PROGRAM} serve --config /etc/otel-pg-exporter.toml --migrate

exit status: 0 stopped by a signal, 1 could not start, 2 wrong flag or setting.
"""

_MIGRATE_DESCRIPTION = """\
Create or update the tables in the PostgreSQL that the DSN names. Any number of these may run at once, also while a
receiver writes. (`serve` does this by itself for its own PostgreSQL, and elsewhere with --migrate.)
"""

_MIGRATE_EPILOG = f"""\
examples:
  {_PROGRAM} migrate --dsn postgresql://otel_migrator@db.example/telemetry
  {_PROGRAM} migrate --print > tables.sql
  {_PROGRAM} migrate --check --dsn postgresql://otel_writer@db.example/telemetry

exit status: 0 the tables are up to date, 1 they are not or cannot be reached, 2 wrong flag or setting.
"""

_MIGRATE_SETTINGS = {setting.name for setting in settings_of(DatabaseSettings)} - {"synchronous_commit"} | {"mappings"}

# libpq gives no SQLSTATE for an attempt to connect, and words are localised: the hint must fit every cause.
_CHECK_DSN = (
    "check that the server is up, and what --dsn (OTEL_PG_EXPORTER_DSN) says: host, port, database, user, options, and "
    "the password (better in ~/.pgpass or PGPASSWORD)"
)

_CONFIG_HELP = f"TOML file with settings ({SERVER_PREFIX}CONFIG)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = _parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            _refuse(parser, unknown[0], options.command)
        if options.command is None:
            print(parser.format_help(), file=sys.stderr)
            return 2
        return _serve(options) if options.command == "serve" else _migrate(options)
    except ConfigurationError as exc:
        return _fail(exc, status=2)
    except DatabaseUnavailableError as exc:
        return _fail(exc, _CHECK_DSN, status=1)
    except ExporterError as exc:
        return _fail(exc, status=1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _fail(error: ExporterError, remedy: str = "", *, status: int) -> int:
    print(f"{_PROGRAM}: {error}", file=sys.stderr)
    if remedy:
        print(remedy, file=sys.stderr)
    return status


def _print(lines: Iterable[str]) -> None:
    """Print to stdout; what nobody reads any more (`| head`) is no error."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Python flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The flags.


class _Parser(argparse.ArgumentParser):
    """argparse's parser, but its errors are one line and repeat no password."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {_redacted(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    """`--version`; what it tells is imported only when it is asked for."""

    def __call__(self, *_: object) -> NoReturn:
        from otel_pg_exporter.transcode import CORE

        _print([f"{_PROGRAM} {_version()} (transcoder: {CORE})"])
        raise SystemExit(0)


def _version() -> str:
    return importlib.metadata.version("otel-pg-exporter")


def _refuse(parser: argparse.ArgumentParser, argument: str, command: str | None) -> NoReturn:
    """Exit because of an argument that nobody knows."""
    flag = argument.partition("=")[0]
    known = [setting.flag for setting in settings_of(ServeSettings)]
    close = difflib.get_close_matches(flag, known, n=1) if flag.startswith("--") else []
    parser.prog += f" {command}" if command else ""
    parser.error(f"unknown argument {flag}" + (f", did you mean {close[0]}?" if close else ""))


def _redacted(text: str) -> str:
    """Hide what may be a password in a DSN that came where none belongs."""
    return re.sub(r"(password\s*=\s*)\S+", r"\1***", re.sub(r"://\S*@", "://***@", text), flags=re.IGNORECASE)


def _parser() -> _Parser:
    parser = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--help] [--version] COMMAND [...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(prog=_PROGRAM, dest="command", title="commands", metavar="COMMAND")
    serve = _add_command(
        commands, "serve", "receive OTLP and write it to PostgreSQL", _SERVE_DESCRIPTION, _SERVE_EPILOG
    )
    _add_settings(serve, settings_of(ServeSettings))
    migrate = _add_command(commands, "migrate", "create or update the tables", _MIGRATE_DESCRIPTION, _MIGRATE_EPILOG)
    only = migrate.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="print the SQL for an empty schema; needs no database")
    only.add_argument("--check", action="store_true", help="only tell whether the tables are up to date")
    _add_settings(migrate, (each for each in settings_of(ServeSettings) if each.name in _MIGRATE_SETTINGS))
    return parser


def _add_command(commands: Any, name: str, help_: str, description: str, epilog: str) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's type of it is private
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_,
        usage=f"{_PROGRAM} {name} [settings]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    return parser


def _add_settings(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    groups: dict[str, Any] = {}
    for setting in settings:
        title = setting.group.rstrip(".") or "The service"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(setting.flag, default=None, help=_help(setting), **_action(setting))


def _action(setting: Setting) -> dict[str, Any]:
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if setting.name == "mappings":
        return {"action": "append", "metavar": "FILE"}
    if setting.choices:
        return {"metavar": "{" + ",".join(setting.choices) + "}"}
    if setting.name.endswith("_endpoint"):
        return {"metavar": "HOST:PORT"}
    if setting.size:
        return {"metavar": "BYTES"}
    words = {float: "SECONDS", int: "N", str: setting.name.rpartition("_")[2].upper()}
    return {"metavar": words.get(setting.kind, "FOLDER")}


def _help(setting: Setting) -> str:
    default = f"; default: {setting.shown_default}" if setting.shown_default else ""
    return f"{setting.help} ({setting.variable(SERVER_PREFIX)}{default})".replace("%", "%%")


def _settings(options: argparse.Namespace) -> ServeSettings:
    flags: Mapping[str, object] = vars(options)
    file = config.file_of(options.config, prefix=SERVER_PREFIX)
    settings = config.load(ServeSettings, prefix=SERVER_PREFIX, flags=flags, file=file)
    _set_up_logging(settings.log_level)
    return settings


def _warn_of_password(options: argparse.Namespace) -> None:
    from otel_pg_exporter.postgres.connection import parse_dsn

    if options.dsn is not None and "password" in parse_dsn(options.dsn):
        logging.getLogger(__name__).warning(
            "--dsn holds a password, which every user of this machine can see in the list of processes; "
            "put the DSN into OTEL_PG_EXPORTER_DSN, or the password into ~/.pgpass"
        )


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", level=level.upper(), stream=sys.stderr, force=True
    )
    logging.captureWarnings(capture=True)
    # What matters of a broken connection our own lines say.
    logging.getLogger("psycopg").setLevel(logging.ERROR)


# The commands.


def _migrate(options: argparse.Namespace) -> int:
    settings = _settings(options)
    from otel_pg_exporter import mapping
    from otel_pg_exporter.postgres.connection import connect, mask_dsn
    from otel_pg_exporter.postgres.migrate import check, migrate, render

    database = settings.database
    columns = mapping.load(settings.mapping.mappings)
    if options.print:
        _print([render(database.schema, columns)])
        return 0
    if not database.dsn:
        raise ConfigurationError(
            "migrate needs to know which PostgreSQL: --dsn or OTEL_PG_EXPORTER_DSN; "
            "the one that `serve` runs without a DSN it migrates by itself"
        )
    _warn_of_password(options)
    where = f"schema {database.schema} ({mask_dsn(database.dsn)})"
    if options.check:
        with connect(database) as connection:
            check(connection, database.schema, columns)
        _print([f"{where} is up to date"])
        return 0
    applied = migrate(database, columns)
    _print([f"{where}: applied {name}" for name in applied] or [f"{where} is up to date"])
    return 0


def _serve(options: argparse.Namespace) -> int:
    signals = _Signals()
    try:
        settings = _settings(options)
        _warn_of_password(options)
        if not settings.database.dsn:
            # Meant for other servers: a DSN outdoes most of libpq's variables, but not PGSERVICE.
            for name in [name for name in os.environ if name.startswith("PG")]:
                del os.environ[name]
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core logs to stderr in a form of its own
        # What gRPC does in a forked child, for its own sake, crashed one in a hundred before they became PostgreSQL.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
        from otel_pg_exporter.service import Service

        signals.service = service = Service(settings)
        service.start()
        _print(_banner(service))
        signals.wait()
    except _StopRequested:
        logging.getLogger(__name__).info("%s: stopping; a second signal ends this at once", signals.name)
    finally:
        if signals.service is not None:
            signals.service.stop()
    return 0


class _StopRequested(BaseException):
    """Raised in the main thread by the first signal: whatever waits there ends."""


class _Signals:
    """The first SIGTERM, SIGINT or SIGHUP stops in good order, the second ends the process at once."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._handle)

    @property
    def name(self) -> str:
        """What the first signal is called."""
        return signal.Signals(self._received).name

    def wait(self) -> None:
        """Wait for the first signal."""
        # With a look now and then: what a handler raises while a finalizer runs gets lost.
        pause = threading.Event()
        while not self._received:
            pause.wait(1)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received:
            if self.service is not None:
                self.service.abandon()
            os._exit(128 + number)
        self._received = number
        if self.service is None or not self.service.stopping:
            raise _StopRequested


def _banner(service: "Service") -> list[str]:
    from otel_pg_exporter.postgres.connection import mask_dsn, shareable_url

    server, endpoint = service.embedded, service.grpc_endpoint
    everywhere = endpoint.host in {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    address = f"http://localhost:{endpoint.port}" if everywhere else f"http://{endpoint}"
    database = (
        service.postgres_version if server is None else f"{service.postgres_version}, its own, in {server.data_dir}"
    )
    return [
        "",
        f"{_PROGRAM} {_version()} is ready; Ctrl-C stops it.",
        "",
        f"  OTLP/gRPC   {endpoint}",
        f"  PostgreSQL  {database}",
        f"  DSN         {mask_dsn(service.dsn)}",
        "",
        "See what arrives:",
        "",
        f"  {_psql()} '{shareable_url(service.dsn)}'",
        "",
        "Send from an app" + (" (on another machine, with this one's name for localhost):" if everywhere else ":"),
        "",
        f"  export OTEL_EXPORTER_OTLP_ENDPOINT={address}",
        "  export OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
        "  export OTEL_SERVICE_NAME=my-app",
        "  export OTEL_TRACES_EXPORTER=otlp OTEL_LOGS_EXPORTER=otlp OTEL_METRICS_EXPORTER=none",
        "  opentelemetry-instrument python app.py",
        "",
    ]


def _psql() -> str:
    """Return how to call psql: by its name, else where the embedded PostgreSQL's programs lie."""
    if shutil.which("psql") is None:
        from otel_pg_exporter.postgres.embedded import find_binaries

        try:
            program = find_binaries() / "psql"
        except StartupError:
            return "psql"
        if program.exists():
            return shlex.quote(str(program))
    return "psql"
