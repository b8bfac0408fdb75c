"""`config show`: what the settings are, and where each came from; and the variables that are none."""

import json
import os
import pty
import re
import subprocess
import termios
from pathlib import Path

import pytest

from otel_pg_exporter.config import SERVER_PREFIX, ServeSettings, load, settings_of
from otel_pg_exporter.transcode import CORE
from tests.serving import PROGRAM, environment, run

PASSWORDS = (
    "postgresql://otel:s3cret@db.example/telemetry",
    "postgresql://otel@db.example/telemetry?password=s3cret&sslpassword=s3cret",
    "host=db.example user=otel password=s3cret dbname=telemetry",
)


def shown(*arguments: str | Path, **variables: str) -> dict[str, dict[str, object]]:
    done = run("config", "show", "--json", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    settings: dict[str, dict[str, object]] = json.loads(done.stdout)["settings"]
    return settings


def test_each_setting_is_shown_with_the_flag_the_variable_or_the_key_that_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('linger = "50ms"\nmax_calls = 7\ncors_origins = ["https://a.example"]\n')
    settings = shown(
        "--config", file, "--schema", "tele", OTEL_PG_EXPORTER_SCHEMA="unused", OTEL_PG_EXPORTER_MAX_CALLS="8"
    )
    assert settings["schema"] == {"value": "tele", "from": "--schema"}
    assert settings["max_calls"] == {"value": 8, "from": "OTEL_PG_EXPORTER_MAX_CALLS"}
    assert settings["linger"] == {"value": 0.05, "from": f"{file}: linger"}
    assert settings["cors_origins"] == {"value": ["https://a.example"], "from": f"{file}: cors_origins"}
    assert settings["writers"] == {"value": 0, "from": "default"}
    assert list(settings) == [each.name for each in settings_of(ServeSettings)] + ["core"]
    core = shown(OTEL_PG_EXPORTER_CORE="python")["core"]
    assert core == {"value": "python", "from": "OTEL_PG_EXPORTER_CORE"}


def test_a_core_that_is_chosen_by_itself_is_told_which_it_is() -> None:
    core = next(line for line in run("config", "show").stdout.splitlines() if line.startswith("  core "))
    assert core.split(maxsplit=1)[1] == f"auto ({CORE})"


def test_the_table_stands_in_the_groups_of_the_settings() -> None:
    lines = run("config", "show", "--linger", "0.1").stdout.splitlines()
    group = lines.index("What is held in memory between the front door and PostgreSQL.")
    assert re.fullmatch(r"  linger +0\.1 +--linger", lines[group + 4])
    assert re.fullmatch(r"  max_batch_bytes +32MiB", lines[group + 3])
    assert lines[lines.index("The service as a whole.") + 2].split() == ["migrate", "false"]


def test_only_what_has_not_its_default_is_shown_where_that_is_asked_for() -> None:
    assert list(shown("--changed", "--writers", "3")) == [
        "writers",
        "grpc_endpoint",
        "http_endpoint",
        "metrics_endpoint",
        "log_format",
    ]
    nothing = subprocess.run(
        [*PROGRAM, "config", "show", "--changed"], env={"PATH": os.environ["PATH"]}, capture_output=True, check=False
    )
    assert nothing.stdout == b"every setting has its default\n"


@pytest.mark.parametrize("dsn", PASSWORDS)
@pytest.mark.parametrize("form", [(), ("--json",), ("--toml",), ("--changed",)])
def test_no_form_shows_a_password(dsn: str, form: tuple[str, ...]) -> None:
    done = run(
        "config",
        "show",
        *form,
        OTEL_PG_EXPORTER_DSN=dsn,
        PGPASSWORD="s3cret",
        OTEL_PG_EXPORTER_SELF_METRICS_ENDPOINT="http://user:s3cret@collector:4317",
    )
    assert done.returncode == 0
    assert "s3cret" not in done.stdout + done.stderr
    assert "db.example" in done.stdout
    assert "collector:4317" in done.stdout


def test_libpqs_own_variables_are_named_the_password_masked() -> None:
    done = run("config", "show", OTEL_PG_EXPORTER_DSN="dbname=x", PGHOST="db", PGPASSWORD="s3cret", PGUNKNOWN="1")
    assert "libpq's own variables, which fill in what the DSN leaves out.\n" in done.stdout
    assert re.search(r"^  PGHOST +db\n  PGPASSWORD +\*\*\*$", done.stdout, re.MULTILINE)
    assert "PGUNKNOWN" not in done.stdout
    assert "count only beside a DSN, and there is none" in run("config", "show", PGHOST="db").stdout


def test_what_it_writes_as_toml_is_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    flags = ("--spool-max-bytes", "3MiB", "--max-request-bytes", "2MiB", "--migrate", "--no-spool", "--linger", "1.5")
    times = ("--retention-spans", "30d", "--ledger-ttl", "36h", "--window-future", "100m")
    files = (
        "--mappings",
        'a"b.toml',
        "--mappings",
        "c\\d.toml",
        "--application-name",
        "ä",
        "--cors-origins",
        "http://a,http://b",
    )
    file = tmp_path / "settings.toml"
    file.write_text(run("config", "show", "--toml", *flags, *times, *files).stdout)
    loaded = load(ServeSettings, prefix=SERVER_PREFIX, environ={}, file=file)
    assert (loaded.spool.spool_max_bytes, loaded.migrate, loaded.spool.spool) == (3 * 2**20, True, False)
    assert loaded.mapping.mappings == (Path('a"b.toml'), Path("c\\d.toml"))
    assert (loaded.database.application_name, loaded.receiver.cors_origins) == ("ä", ("http://a", "http://b"))
    assert 'retention_spans = "30d"\n' in file.read_text()
    assert loaded.retention.retention_spans == 30 * 86_400
    assert (loaded.spool.ledger_ttl, loaded.mapping.window_future, loaded.pipeline.linger) == (36 * 3600, 6000, 1.5)
    # What stands there as a comment is a setting, too.
    keys = re.findall(r"^(?:# )?(\w+) =", file.read_text(), re.MULTILINE)
    assert keys == [each.name for each in settings_of(ServeSettings)]


def test_what_is_wrong_is_an_error_as_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("lingr = 1\n")
    for arguments, message in (
        (["--config", file], f"{file}: unknown setting 'lingr', did you mean linger?"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key belong together"),
        (["--dsn", "postgresql://u:s3cret@h:1/d?nonsense"], "the DSN is malformed"),
        (["--json", "--toml"], "not allowed with"),
    ):
        done = run("config", "show", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert "s3cret" not in done.stderr


# Variables that are no setting.


def test_a_variable_that_is_no_setting_is_warned_of_by_every_command(empty_dsn: str) -> None:
    warning = "OTEL_PG_EXPORTER_LINGR is set, but is no setting, did you mean OTEL_PG_EXPORTER_LINGER?"
    for command in (["config", "show"], ["migrate", "--print"], ["migrate", "--dsn", empty_dsn]):
        done = run(*command, OTEL_PG_EXPORTER_LINGR="1")
        assert done.returncode == 0
        assert warning in done.stderr
    far = run("config", "show", OTEL_PG_EXPORTER_ZZZZZZZZ="s3cret").stderr
    assert far.endswith("OTEL_PG_EXPORTER_ZZZZZZZZ is set, but is no setting\n")
    assert "OTEL_PG_EXPORTER_GRPC_PORT is set" in run("config", "show", OTEL_PG_EXPORTER_GRPC_PORT="4317").stderr


def test_what_kubernetes_and_our_own_tests_set_is_not_warned_of() -> None:
    kubernetes = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "4317",
        "SERVICE_PORT_OTLP_GRPC": "4317",
        "PORT": "tcp://10.0.0.1:4317",
        "PORT_4317_TCP": "tcp://10.0.0.1:4317",
        "PORT_4317_TCP_ADDR": "10.0.0.1",
        "METRICS_PORT": "tcp://10.0.0.1:9464",
    }
    ours = {"CORE": "auto", "CONFIG": "", "TEST_PG": "embedded", "FAULT_SEED": "1"}
    done = run("config", "show", **{f"OTEL_PG_EXPORTER_{key}": value for key, value in (kubernetes | ours).items()})
    assert (done.returncode, done.stderr) == (0, "")


# Bars.


@pytest.mark.parametrize(
    ("arguments", "bar", "done"),
    [
        (["verify", "--since", "30d"], b"verify:   0 %|", "0 traces compared"),
        (["migrate"], b"migrate: columns 00:00", "is up to date"),
    ],
)
def test_long_work_shows_a_bar_on_a_terminal_and_leaves_none(
    dsn: str, arguments: list[str], bar: bytes, done: str
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
        [*PROGRAM, *arguments, "--dsn", dsn],
        env=environment(TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as command:
        os.close(theirs)
        stdout, _ = command.communicate(timeout=60)
    said = b""
    try:
        while chunk := os.read(ours, 65_536):
            said += chunk
    except OSError:  # its other end is closed
        pass
    os.close(ours)
    assert done in stdout
    assert bar in said
    assert said.rpartition(b"\r")[2].strip() == b""
