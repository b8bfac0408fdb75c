"""The parser: commands, flags made from settings, and the settings that they give."""

import argparse
import logging
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from otel_pg_exporter import config
from otel_pg_exporter.cli import environment, logs
from otel_pg_exporter.cli.output import PROGRAM, print_lines, version
from otel_pg_exporter.config import (
    SERVER_PREFIX,
    CoreSettings,
    DatabaseSettings,
    ServeSettings,
    Setting,
    did_you_mean,
    redacted,
    settings_of,
)
from otel_pg_exporter.errors import ConfigurationError

FILE, FOLDER = "FILE", "FOLDER"  # metavars, by which completion knows what to offer

_CONFIG_HELP = f"TOML file with settings ({SERVER_PREFIX}CONFIG)"


class Commands(Protocol):
    """What `add_subparsers` returns; argparse's own type of it is private."""

    def add_parser(self, name: str, **options: Any) -> "Parser":  # noqa: ANN401 - argparse's options
        """Return a new parser, which is chosen by `name`."""


class _Version(argparse.Action):
    """`--version`; what it tells is imported only when it is asked for."""

    def __call__(self, *_: object) -> NoReturn:
        from otel_pg_exporter.transcode import CORE

        print_lines([f"{PROGRAM} {version()} (transcoder: {CORE})"])
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but its errors are one line and repeat no password; each knows `--version`."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - argparse's
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")

    def print_help(self, file: object = None) -> None:  # noqa: ARG002 - argparse's, and always stdout here
        """Print the help as all else is printed."""
        print_lines([self.format_help().rstrip("\n")])

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401 - argparse's overloads
        """Parse, as argparse's own does, but refuse what nobody knows here, where the command is known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0].partition("=")[0]))
        return options, unknown

    def _unknown(self, flag: str) -> str:
        """Say that a flag is not this command's, and which one was meant."""
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in {setting.name for setting in settings_of(ServeSettings)}:
            return f"{flag} is a setting of serve, which this command does not use"
        return f"unknown argument {flag}{did_you_mean(flag, self._option_string_actions, prefix='--')}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401 - argparse's
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as exc:
            exc.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line."""
        print(f"{self.prog}: {redacted(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser, then those of its commands, then theirs."""
    yield parser
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for each in typing.cast("dict[str, argparse.ArgumentParser]", action.choices).values():
                yield from parsers_of(each)


def add_group(commands: Commands, name: str, *, help: str, description: str, epilog: str) -> Commands:  # noqa: A002 - as below
    """Add a command that has actions, and return where they are added."""
    parser = commands.add_parser(
        name,
        help=help,
        usage=f"{PROGRAM} {name} ACTION [...]",
        description=description,
        epilog=epilog,
    )
    parser.set_defaults(run=lambda _options: help_instead(parser))
    actions: Commands = parser.add_subparsers(prog=parser.prog, dest="action", title="actions", metavar="ACTION")
    return actions


def help_instead(parser: argparse.ArgumentParser) -> int:
    """Show how a command is called to somebody who left out the most of it; return the exit code."""
    print(parser.format_help(), file=sys.stderr)
    return 2


def add_command(commands: Commands, name: str, *, help: str, description: str, epilog: str, words: str = "") -> Parser:  # noqa: A002 - argparse's word
    """Add a command, which reads settings; the caller adds their flags. `words`: what comes before them."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
    )
    parser.usage = f"{parser.prog} {words}[settings]"
    parser.add_argument("--config", metavar=FILE, help=_CONFIG_HELP)
    return parser


def add_database_settings(parser: argparse.ArgumentParser, *others: str) -> None:
    """Add the flags of a command that works on the tables, and `others` by name."""
    names = {setting.name for setting in settings_of(DatabaseSettings)} - {"synchronous_commit"}
    names |= {"data_dir", "log_level", "log_format", *others}
    add_settings(parser, (each for each in settings_of(ServeSettings) if each.name in names))


def add_settings(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Add a flag for each setting, grouped as they are."""
    groups: dict[str, Any] = {}
    for setting in settings:
        title = setting.group.rstrip(".") or "The service"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(setting.flag, default=None, help=_help(setting), **_action(setting))


def _action(setting: Setting) -> dict[str, Any]:
    kind, *parts = typing.get_origin(setting.kind), *typing.get_args(setting.kind)
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if setting.choices:
        return {"choices": setting.choices}
    if kind is tuple:
        return {"action": "append", "metavar": _metavar(setting, parts[0])}
    return {"metavar": _metavar(setting, parts[0] if parts else setting.kind)}  # of `X | None`: X


def _metavar(setting: Setting, kind: type) -> str:
    if setting.name.endswith("_endpoint"):
        return "HOST:PORT" if "host:port" in setting.help else "URL"
    if setting.size:
        return "BYTES"
    if kind is Path:
        return FOLDER if setting.name.endswith("_dir") else FILE
    words = {float: "SECONDS", int: "N"}
    return words.get(kind, setting.name.rpartition("_")[2].upper().removesuffix("S"))


def _help(setting: Setting) -> str:
    default = f"; default: {setting.shown_default}" if setting.shown_default else ""
    return f"{setting.help} ({setting.variable(SERVER_PREFIX)}{default})".replace("%", "%%")


def settings_from(options: argparse.Namespace) -> ServeSettings:
    """Load the settings, flags first, and set up logging as they say."""
    return settings_with_origins(options)[0]


def settings_with_origins(options: argparse.Namespace) -> tuple[ServeSettings, dict[str, str]]:
    """Load the settings as `settings_from` does; return with it where each came from that has not its default."""
    flags: Mapping[str, object] = vars(options)
    file = config.file_of(options.config, prefix=SERVER_PREFIX)
    settings, origins = config.load_with_origins(ServeSettings, prefix=SERVER_PREFIX, flags=flags, file=file)
    logs.set_up(settings.monitoring, attended=options.command != "serve")
    _warn_of_password(settings.database.dsn, origins.get("dsn", ""), file)
    _warn_of_unknown_variables()
    return settings, origins


def database_from(options: argparse.Namespace, *, command: str) -> ServeSettings:
    """Load the settings of a command that works on a PostgreSQL; raise ConfigurationError where none is known."""
    return require_database(settings_from(options), command=command)


def require_database(settings: ServeSettings, *, command: str) -> ServeSettings:
    """Return settings with a DSN, see `located`; raise ConfigurationError where there is none."""
    found = located(settings)
    if not found.database.dsn:
        raise ConfigurationError(
            f"{command} needs to know which PostgreSQL: --dsn or OTEL_PG_EXPORTER_DSN; "
            f"no `serve` runs one of its own in {_data_dir(settings)} (--data-dir)"
        )
    return found


def located(settings: ServeSettings) -> ServeSettings:
    """Fill in the DSN of the PostgreSQL that `serve` runs itself, if it does and none is set."""
    if settings.database.dsn:
        return settings
    from otel_pg_exporter.postgres.embedded import running_dsn

    environment.prepare(own_postgres=True)
    return replace(settings, database=replace(settings.database, dsn=running_dsn(settings.data_dir) or ""))


def _data_dir(settings: ServeSettings) -> Path:
    from otel_pg_exporter.postgres.embedded import default_data_dir

    return settings.data_dir or default_data_dir()


def _warn_of_password(dsn: str, origin: str, file: Path | None) -> None:
    from otel_pg_exporter.postgres.dsn import holds_secret
    from otel_pg_exporter.receiver.files import exposed

    logger = logging.getLogger(__name__)
    if origin == "--dsn" and holds_secret(dsn):
        logger.warning(
            "--dsn holds a password, which every user of this machine can see in the list of processes; "
            "put the DSN into OTEL_PG_EXPORTER_DSN, or the password into ~/.pgpass"
        )
    elif file is not None and origin.startswith(str(file)) and holds_secret(dsn):
        for text in exposed("--config", file):
            logger.warning("%s", text)


def _warn_of_unknown_variables() -> None:
    known = (ServeSettings, CoreSettings)
    for name, hint in config.unknown_variables(*known, prefix=SERVER_PREFIX, others=("CONFIG",)):
        logging.getLogger(__name__).warning("%s is set, but is no setting%s", name, hint)
