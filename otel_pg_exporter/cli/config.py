"""`config`: the settings as they are, and where each came from."""

import argparse
import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otel_pg_exporter.cli.arguments import (
    Commands,
    add_command,
    add_group,
    add_settings,
    settings_with_origins,
)
from otel_pg_exporter.cli.output import PROGRAM, as_json, print_lines, printable, table
from otel_pg_exporter.config import (
    SERVER_PREFIX,
    CoreSettings,
    ServeSettings,
    Setting,
    load_with_origins,
    redacted,
    settings_of,
    values_of,
)

_WIDTH = 100

_DESCRIPTION = "Work with the settings, which are flags, environment variables and keys of a TOML file alike."

_EPILOG = f"""\
examples:
  {PROGRAM} config show --changed

`{PROGRAM} config ACTION --help` tells more.
"""

_SHOW_DESCRIPTION = """\
Show the settings that `serve` and the other commands would have if they were called as this is: with these flags, this
environment, this file. Behind each stands where it came from; without that, it has its default. Passwords are masked.
What is wrong or contradicts itself is an error, as it is there.
"""

_SHOW_EPILOG = f"""\
examples:
  {PROGRAM} config show
  {PROGRAM} config show --changed --config /etc/otel-pg-exporter.toml
  {PROGRAM} config show --toml > otel-pg-exporter.toml
  {PROGRAM} config show --json | jq .settings.dsn

exit status: 0 shown, 2 wrong flag or setting.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Effective:
    """One setting as it is; what is secret in its value is masked, or left out."""

    setting: Setting
    value: Any
    origin: str  # flag, variable or file and key; empty for the default


def add_to(commands: Commands) -> None:
    """Add the command and its action."""
    actions = add_group(
        commands, "config", help="the settings, and where each came from", description=_DESCRIPTION, epilog=_EPILOG
    )
    show = add_command(
        actions,
        "show",
        help="the effective settings",
        description=_SHOW_DESCRIPTION,
        epilog=_SHOW_EPILOG,
        words="[--changed] [--json | --toml] ",
    )
    show.set_defaults(run=_show)
    show.add_argument("--changed", action="store_true", help="only those that do not have their default")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--toml", action="store_true", help="as a file for --config, without passwords")
    add_settings(show, settings_of(ServeSettings))


def _show(options: argparse.Namespace) -> int:
    settings, origins = settings_with_origins(options)
    core, cores_origin = load_with_origins(CoreSettings, prefix=SERVER_PREFIX)
    origins |= cores_origin
    values = values_of(settings) | values_of(core)
    classes = (ServeSettings,) if options.toml else (ServeSettings, CoreSettings)  # which the file can't set
    shown = [
        _Effective(
            setting=each,
            value=_without_secrets(each, values[each.name], leave_out=options.toml),
            origin=origins.get(each.name, ""),
        )
        for each in itertools.chain.from_iterable(map(settings_of, classes))
        if each.name in origins or not options.changed
    ]
    if options.toml:
        from otel_pg_exporter.postgres.dsn import holds_secret

        print_lines(_without_first_blank(_toml(shown, has_secrets=holds_secret(settings.database.dsn))))
    elif options.json:
        print_lines([as_json(_json(shown), indent=2)])
    else:
        print_lines(_without_first_blank(_lines(shown, dsn=settings.database.dsn)))
    return 0


def _without_secrets(setting: Setting, value: object, *, leave_out: bool) -> object:
    """Mask what is secret in a value, or leave it out where the value is to be used again."""
    if isinstance(value, Path):
        return redacted(str(value))
    if not isinstance(value, str) or not value:
        return value
    if setting.name == "dsn":
        from otel_pg_exporter.postgres.dsn import mask_dsn, shareable_url

        return shareable_url(value) if leave_out else mask_dsn(value)
    return redacted(value)


def _without_first_blank(lines: Iterable[str]) -> Iterator[str]:
    return itertools.dropwhile(lambda line: not line, lines)


def _lines(shown: Iterable[_Effective], *, dsn: str) -> Iterator[str]:
    """Yield a table, in the groups that settings have."""
    rows, titles = [], []
    for group, members in itertools.groupby(shown, key=lambda each: each.setting.group):
        for number, each in enumerate(members):
            titles.append(("" if number else group or "The service as a whole.",))
            rows.append((f"  {each.setting.name}", _shown(each), each.origin))
    if not rows:
        yield "every setting has its default"
    else:
        _, *lines = table(("", "", ""), rows)
        for (title,), line in zip(titles, lines, strict=True):
            if title:
                yield from ("", title)
            yield line
    variables = _libpq_variables()
    if variables:
        told = "which fill in what the DSN leaves out" if dsn else "which count only beside a DSN, and there is none"
        yield from ("", f"libpq's own variables, {told}.")
        _, *lines = table(("", ""), [(f"  {name}", value) for name, value in variables.items()])
        yield from lines


def _shown(each: _Effective) -> str:
    text = each.setting.shown(each.value)
    if each.setting.name != "core":
        return text
    from otel_pg_exporter.transcode import CORE

    return f"{text} ({CORE})" if text == "auto" else text


def _libpq_variables() -> dict[str, str]:
    from otel_pg_exporter.postgres.libpq import variables

    return variables()


def plain(value: object) -> object:
    """Return a setting's value as JSON has it."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _json(shown: Iterable[_Effective]) -> dict[str, object]:
    return {
        "settings": {
            each.setting.name: {"value": plain(each.value), "from": each.origin or "default"} for each in shown
        },
        "libpq": _libpq_variables(),
    }


def _toml(shown: Iterable[_Effective], *, has_secrets: bool) -> Iterator[str]:
    """Yield the lines of a file that `--config` takes; what has its default stands there as a comment."""
    if has_secrets:
        yield "# Passwords are left out: put them into ~/.pgpass, or the whole DSN into OTEL_PG_EXPORTER_DSN."
    for group, members in itertools.groupby(shown, key=lambda each: each.setting.group):
        yield from ("", f"## {group or 'The service as a whole.'}")
        for each in members:
            yield ""
            yield from textwrap.wrap(each.setting.help, _WIDTH, initial_indent="# ", subsequent_indent="# ")
            yield f"{'' if each.origin else '# '}{each.setting.name} = {_toml_value(each)}".rstrip()


def _toml_value(each: _Effective) -> str:
    value = each.value
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_string(str(part)) for part in value)}]"
    text = each.setting.shown(value)
    if isinstance(value, bool) or (isinstance(value, int | float) and text[-1].isdigit()):
        return text
    return _toml_string(text)  # also what has a unit


def _toml_string(text: str) -> str:
    return printable(json.dumps(text, ensure_ascii=False))
