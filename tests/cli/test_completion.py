"""`completion`: what the shells make of the scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from otel_pg_exporter.config import ServeSettings, settings_of
from tests.serving import run

# What bash does when Tab is pressed, and what it would offer.
_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
eval "$(complete -p otel-pg-exporter | sed 's/.*-F \\([^ ]*\\) .*/complete_function=\\1/')"
"$complete_function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "otel-pg-exporter"
    done = run("completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(done.stdout)
    return file


def offered(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", _TAB, "bash", script, "otel-pg-exporter", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return set(done.stdout.split())


def test_bash_completes_commands_and_their_actions(script: Path) -> None:
    assert {"serve", "migrate", "config", "verify", "bench", "completion"} <= offered(script, "")
    assert offered(script, "ser") == {"serve"}
    assert offered(script, "dead-letters", "") == {"list", "show", "replay", "purge"}


def test_bash_completes_every_flag_of_a_command(script: Path) -> None:
    flags = offered(script, "serve", "--")
    assert {each.flag for each in settings_of(ServeSettings)} <= flags
    assert "--no-migrate" in flags
    assert offered(script, "config", "show", "--lo") == {"--lock-timeout", "--log-level", "--log-format"}
    assert offered(script, "verify", "--sin") == {"--since"}


def test_bash_completes_the_words_that_a_setting_may_be(script: Path) -> None:
    assert offered(script, "serve", "--log-level", "") == {"debug", "info", "warning", "error"}
    assert offered(script, "dead-letters", "list", "--signal", "l") == {"logs"}
    assert offered(script, "completion", "") == {"bash", "zsh", "tcsh"}


def test_bash_completes_files_and_folders(script: Path, tmp_path: Path) -> None:
    (tmp_path / "tenant.toml").touch()
    (tmp_path / "tenants").mkdir()
    assert offered(script, "serve", "--mappings", "ten", folder=tmp_path) == {"tenant.toml", "tenants"}
    assert offered(script, "serve", "--spool-dir", "ten", folder=tmp_path) == {"tenants"}
    assert offered(script, "migrate", "--config", "tenant.", folder=tmp_path) == {"tenant.toml"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_read_their_script(shell: str, tmp_path: Path) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert "otel-pg-exporter" in done.stdout
    if shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(done.stdout)
        read = subprocess.run([shell, "-fn", file], capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")
