"""`completion`: what a shell needs to complete our commands, flags and their values."""

import argparse

from otel_pg_exporter.cli.arguments import FILE, FOLDER, Commands, parsers_of
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
    )
    parser.set_defaults(run=_run)
    parser.add_argument("shell", choices=_SHELLS, help="whose script")


def _run(options: argparse.Namespace) -> int:
    import shtab

    from otel_pg_exporter.cli.main import whole_parser

    parser = whole_parser()
    for each in parsers_of(parser):
        for action in each._actions:  # noqa: SLF001 - where shtab, too, looks
            if action.metavar in {FILE, FOLDER}:
                action.complete = shtab.FILE if action.metavar == FILE else shtab.DIRECTORY  # type: ignore[attr-defined] # shtab's
    print_lines([shtab.complete(parser, shell=options.shell)])
    return 0
