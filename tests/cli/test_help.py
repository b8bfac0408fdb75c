"""What holds for every command: its help, its version, how soon it answers."""

import argparse
import json
import subprocess
import sys

import pytest

from otel_pg_exporter.cli.arguments import parsers_of
from otel_pg_exporter.cli.main import whole_parser
from tests.serving import environment, run

PARSERS = {parser.prog: parser for parser in parsers_of(whole_parser())}
COMMANDS = {
    name: parser
    for name, parser in PARSERS.items()
    if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
}


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_every_help_has_examples_of_its_own_and_every_command_says_its_exit_codes(
    parser: argparse.ArgumentParser,
) -> None:
    _, found, examples = (parser.epilog or "").partition("examples:\n")
    assert found
    assert parser.prog in examples
    if parser.prog in COMMANDS:
        assert "\nexit status: 0 " in (parser.epilog or "")


@pytest.mark.parametrize("parser", COMMANDS.values(), ids=COMMANDS)
def test_every_command_knows_its_version_and_with_settings_how_it_logs(parser: argparse.ArgumentParser) -> None:
    flags = set(parser._option_string_actions)
    assert "--version" in flags
    if "--config" in flags:
        assert {"--log-level", "--log-format"} <= flags
        assert parser._option_string_actions["--log-level"].choices == ("debug", "info", "warning", "error")


def test_version_is_the_same_behind_a_command() -> None:
    assert run("migrate", "--version").stdout == run("--version").stdout != ""


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["check", "--help"], ["completion", "bash"]])
def test_help_and_completion_load_neither_psycopg_nor_grpc(arguments: list[str]) -> None:
    script = (
        "import atexit, json, sys; from otel_pg_exporter.cli import main;"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr)); main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr)}
    heavy = {"psycopg", "grpc", "google", "opentelemetry", "uvicorn", "starlette", "prometheus_client", "tqdm"}
    assert not loaded & heavy
