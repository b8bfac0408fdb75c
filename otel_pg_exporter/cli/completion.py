"""`completion`: what a shell needs to complete our commands, flags and their values."""

import argparse
from collections.abc import Iterator
from typing import cast

from otel_pg_exporter.cli.arguments import FILE, FOLDER, Commands
from otel_pg_exporter.cli.output import PROGRAM, print_lines

_SHELLS = ("bash", "zsh", "tcsh")

_DESCRIPTION = """\
Print a script that makes a shell complete commands, flags, and the values and files that they take.
"""

_EPILOG = f"""\
examples:
  eval "$({PROGRAM} completion bash)"
      in ~/.bashrc; in ~/.zshrc the same with zsh, after compinit
  {PROGRAM} completion bash > ~/.local/share/bash-completion/completions/{PROGRAM}
  {PROGRAM} completion zsh > "${{fpath[1]}}/_{PROGRAM}"
  {PROGRAM} completion tcsh >> ~/.tcshrc

exit status: 0 printed, 2 wrong command line.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="completion for bash, zsh and tcsh",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("shell", choices=_SHELLS, help="whose script")


def _run(options: argparse.Namespace) -> int:
    import shtab

    from otel_pg_exporter.cli.main import whole_parser

    parser = whole_parser()
    for each in _parsers(parser):
        for action in each._actions:  # noqa: SLF001 - where shtab, too, looks
            if action.metavar in {FILE, FOLDER}:
                action.complete = shtab.FILE if action.metavar == FILE else shtab.DIRECTORY  # type: ignore[attr-defined] # shtab's
    print_lines([shtab.complete(parser, shell=options.shell)])
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser, those of its commands, and so on."""
    yield parser
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for each in cast("dict[str, argparse.ArgumentParser]", action.choices).values():
                yield from _parsers(each)
