"""The command line, each time as a process of its own."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.config import SERVER_PREFIX, ServeSettings, settings_of
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.serving import environment, run, start_serving
from tests.support import as_role

UNREACHABLE = "postgresql://otel:s3cret@127.0.0.1:1/otel"


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def refused(*arguments: str | Path, status: int, **variables: str) -> str:
    """Return the error of a command that fails as it should: a line or two, no trace, no password."""
    done = run(*arguments, **variables)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
    return done.stderr


# What it says about itself.


def test_the_version_is_the_packages_with_its_transcoder() -> None:
    said = run("--version", OTEL_PG_EXPORTER_CORE="python").stdout
    assert said == "otel-pg-exporter 0.1.0 (transcoder: Python reference)\n"


def test_a_core_that_does_not_exist_is_refused() -> None:
    error = refused("--version", status=2, OTEL_PG_EXPORTER_CORE="fortran")
    assert error == "otel-pg-exporter: OTEL_PG_EXPORTER_CORE: 'fortran' is none of auto, native, python\n"


def test_the_help_of_serve_names_every_setting_its_variable_and_its_default() -> None:
    done = run("serve", "--help", COLUMNS="500")
    assert done.returncode == 0
    for setting in settings_of(ServeSettings):
        assert re.search(rf"^  {setting.flag}[ ,]", done.stdout, re.MULTILINE)
        shown = f"; default: {setting.shown_default}" if setting.shown_default else ""
        assert f"({setting.variable(SERVER_PREFIX)}{shown})" in done.stdout
    assert f"{SERVER_PREFIX}CONFIG" in done.stdout


def test_the_help_without_a_command_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    for line in (
        "serve receive OTLP",
        "migrate create or update",
        "dead-letters what was",
        "verify compare",
        "bench measure",
    ):
        assert line in " ".join(done.stdout.split())
    nothing = run()
    assert (nothing.returncode, nothing.stderr.split()) == (2, done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve"], "invalid choice: 'srve'"),
        (["srve"], "did you mean serve?; see otel-pg-exporter --help"),
        (["--bogus"], "unknown argument --bogus"),
        (["serve", "--grpc-endpont", "x"], "did you mean --grpc-endpoint?; see otel-pg-exporter serve --help"),
        (["serve", "--grpc", "x"], "unknown argument --grpc"),
        (
            ["serve", "--dsn"],
            "otel-pg-exporter serve: argument --dsn: expected one argument; see otel-pg-exporter serve --help\n",
        ),
        (
            ["serve", "--max-inflight-bytes", "1MiB"],
            "--max-inflight-bytes (1,048,576) is less than --max-request-bytes (67,108,864)",
        ),
        (
            ["serve", "--grpc-endpoint", "127.0.0.1:4317", "--http-endpoint", "127.0.0.1:4317"],
            "--grpc-endpoint and --http-endpoint are both 127.0.0.1:4317: each needs a port of its own",
        ),
        (
            ["serve", "--grpc-endpoint", f"{UNREACHABLE}:4317", "--http-endpoint", f"{UNREACHABLE}:4317"],
            "are both postgresql://***@127.0.0.1:1/otel:4317",
        ),
        (["serve", UNREACHABLE], "unknown argument postgresql://***@127.0.0.1:1/otel"),
        (["serve", f"--dns={UNREACHABLE}"], "unknown argument --dns, did you mean --dsn?"),
        (["host=db password=s3cret"], "invalid choice: 'host=db password=***"),
        ([UNREACHABLE], "invalid choice"),
        (["migrate", "--check", "--print"], "not allowed with"),
        (["migrate", "--check", "--roles"], "leave --roles out"),
        (["migrate", "--roles", "Otel"], "'Otel' can't begin the names of roles"),
        (["migrate"], "--dsn or OTEL_PG_EXPORTER_DSN"),
        (["migrate", "--writers", "3"], "--writers is a setting of serve, which this command does not use"),
        (["migrate", "--no-spool"], "--no-spool is a setting of serve, which this command does not use"),
        (["migrate", "--lock-timeot", "3"], "unknown argument --lock-timeot, did you mean --lock-timeout?"),
        (["serve", "--writers", "many"], "--writers: 'many' is no whole number"),
        (["serve", "--grpc-endpoint", "4317"], "'4317' is no host:port"),
        (["serve", "--log-level", "loud"], "--log-level: invalid choice: 'loud' (choose from"),
        (["serve", "--config", "/nowhere.toml"], "/nowhere.toml: No such file"),
        (["serve", "--dsn", "postgresql://u:s3cret@h:1/d?nonsense"], "the DSN is malformed"),
        (["serve", "--dsn", "postgresql://u:s3cret/@h/d"], "percent-encoded"),
        (["serve", "--dsn", "postgresql://u:p@s3cret@h/d"], "percent-encoded"),
    ],
)
def test_a_wrong_command_line_gets_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments, status=2)


def test_any_free_port_may_be_asked_for_several_times() -> None:
    assert run("config", "show", "--grpc-endpoint", "[::1]:0", "--http-endpoint", "[::1]:0").returncode == 0


def test_a_wrong_variable_is_named() -> None:
    error = refused("serve", status=2, OTEL_PG_EXPORTER_LINGER="soon")
    assert error.startswith("otel-pg-exporter: OTEL_PG_EXPORTER_LINGER: 'soon' is no number of seconds (")
    assert error.count("\n") == 1


def test_a_config_file_that_is_no_toml_is_called_that(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("writers: 2\n")
    assert f"{file}: not a TOML file: " in refused("serve", "--config", file, status=2)


def test_a_config_file_is_found_through_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("lingr = 1\n")
    error = refused("serve", status=2, OTEL_PG_EXPORTER_CONFIG=str(file))
    assert f"{file}: unknown setting 'lingr', did you mean linger?" in error


# What keeps `serve` from starting.


def test_an_unreachable_server_is_reported_without_the_password() -> None:
    error = refused("serve", status=1, OTEL_PG_EXPORTER_DSN=UNREACHABLE)
    assert "password=***" in error
    assert "Connection refused" in error
    assert "check that the server is up, that the database and the user exist, and what --dsn" in error


@pytest.mark.parametrize("command", ["migrate", "check"])
def test_a_database_that_does_not_exist_is_among_what_the_hint_says(server: EmbeddedServer, command: str) -> None:
    done = run(command, OTEL_PG_EXPORTER_DSN=server.url("nowhere"))
    assert done.returncode == 1
    assert "that the database and the user exist" in done.stdout + done.stderr


def test_an_unreachable_server_is_reported_as_well_where_the_spool_may_not_be_looked_into(tmp_path: Path) -> None:
    spool = tmp_path / ("x" * 300)  # root may look into everything, but into this
    error = refused("serve", "--spool-dir", spool, status=1, OTEL_PG_EXPORTER_DSN=UNREACHABLE)
    assert "Connection refused" in error


def test_a_wrong_password_is_reported_without_it(server: EmbeddedServer) -> None:
    address = server.url("otel").partition("@")[2].partition("?")[0]
    error = refused("serve", status=1, OTEL_PG_EXPORTER_DSN=f"postgresql://otel:s3cret@{address}")
    assert "no connection to PostgreSQL (user=otel password=***" in error
    assert 'password authentication failed for user "otel"' in error
    assert "the password (better in ~/.pgpass or PGPASSWORD)" in error


@pytest.mark.parametrize("wrong", [{"dbname": "nowhere"}, {"sslmode": "bogus"}])
def test_what_is_wrong_in_a_dsn_is_not_blamed_on_the_server_alone(dsn: str, wrong: dict[str, str]) -> None:
    error = refused("serve", "--dsn", make_conninfo(dsn, **wrong), status=1)
    assert next(iter(wrong.values())) in error.splitlines()[0]
    assert "database, user, options, and the password" in error


def test_a_password_on_the_command_line_earns_a_warning_and_one_in_the_environment_none() -> None:
    warned = run("serve", "--dsn", UNREACHABLE)
    assert "WARNING" in warned.stderr
    assert "OTEL_PG_EXPORTER_DSN" in warned.stderr
    assert "~/.pgpass" in warned.stderr
    assert "s3cret" not in warned.stderr
    assert "WARNING" not in run("serve", OTEL_PG_EXPORTER_DSN=UNREACHABLE).stderr
    assert "WARNING" not in run("serve", "--dsn", UNREACHABLE.replace(":s3cret", "")).stderr


def test_a_password_in_a_file_that_everybody_can_read_earns_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    warning = f"--config: every user of this machine can read {file}; `chmod o-r` it"
    for text, mode, warned in (
        ('dsn = "host=db password=s3cret"', 0o644, True),
        ('dsn = "host=db sslpassword=s3cret"', 0o644, True),
        ('dsn = "host=db password=s3cret"', 0o640, False),
        ('dsn = "host=db"', 0o644, False),
    ):
        file.write_text(text)
        file.chmod(mode)
        done = run("config", "show", "--config", file)
        assert (warning in done.stderr) is warned
        assert "s3cret" not in done.stdout + done.stderr


def test_a_database_without_our_tables_is_refused_with_the_command_that_makes_them(empty_dsn: str) -> None:
    assert "run `otel-pg-exporter migrate`" in refused("serve", "--dsn", empty_dsn, status=1)


def test_the_command_that_makes_the_tables_works_when_it_is_followed_literally(empty_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "my columns.toml"
    file.write_text('table = "spans"\n[[column]]\nname = "tenant"\ntype = "text"\nfrom = \'span.attributes["t"]\'\n')
    settings = ("--schema", "tele metry", "--mappings", file, "--dsn", empty_dsn)
    hint = re.search("run `otel-pg-exporter (.*)` with the same DSN", refused("serve", *settings, status=1))
    assert hint is not None
    assert empty_dsn not in hint[1]
    assert run(*shlex.split(hint[1]), OTEL_PG_EXPORTER_DSN=empty_dsn).returncode == 0
    assert run("migrate", "--check", *settings).returncode == 0


def test_an_older_schema_is_refused_with_the_command_that_updates_it(dsn: str) -> None:
    execute(dsn, "DELETE FROM otel.schema_migrations WHERE version = (SELECT max(version) FROM otel.schema_migrations)")
    error = refused("serve", "--dsn", dsn, status=1)
    assert "is older than this package" in error
    assert "run `otel-pg-exporter migrate`" in error


def test_a_newer_schema_is_refused_with_the_advice_to_upgrade(dsn: str) -> None:
    execute(dsn, "INSERT INTO otel.schema_migrations (version, name, checksum) VALUES (9999, '9999_later.sql', '')")
    error = refused("serve", "--dsn", dsn, status=1)
    assert "is newer than this package: it has 9999_later.sql" in error
    assert "upgrade otel-pg-exporter" in error


def test_a_port_in_use_is_refused_before_postgresql_is_even_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        folder = tmp_path / "data"
        error = refused("serve", "--grpc-endpoint", endpoint, "--data-dir", folder, status=1)
    assert f"cannot listen on {endpoint}: Address already in use" in error
    assert "--grpc-endpoint (OTEL_PG_EXPORTER_GRPC_ENDPOINT)" in error
    assert not folder.exists()


def test_a_data_folder_that_cannot_be_made_is_refused_with_the_setting_that_moves_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "data"
    error = refused("serve", "--data-dir", folder, status=1)
    assert f"the data folder {folder} cannot be used" in error
    assert "--data-dir or OTEL_PG_EXPORTER_DATA_DIR" in error


def test_a_bad_mapping_file_is_refused_with_file_column_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "tenant.toml"
    file.write_text('table = "spans"\n[[column]]\nname = "tenant"\ntype = "text"\nfrom = "span.tenant"\n')
    error = refused("serve", "--mappings", file, status=2)
    assert str(file) in error
    assert "tenant" in error


def test_without_dsn_extra_and_server_one_line_names_all_remedies(open_folder: Path) -> None:
    # A machine without any PostgreSQL, but for the places where one is looked for.
    script = (
        "import sys; from pathlib import Path; from otel_pg_exporter.postgres import embedded_binaries as places;"
        "places.PACKAGE = 'nowhere_to_be_found'; places._DEBIAN = Path('/nowhere');"
        "from otel_pg_exporter.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", "--data-dir", open_folder],
        env=environment(PATH="/nowhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'otel-pg-exporter[embedded]'" in line
    assert "--dsn or OTEL_PG_EXPORTER_DSN" in line


# migrate


def test_migrate_prints_the_sql_without_a_database() -> None:
    done = run("migrate", "--print", "--schema", "telemetry")
    assert done.returncode == 0
    assert 'CREATE TABLE IF NOT EXISTS "telemetry".schema_migrations' in done.stdout
    assert done.stderr == ""


def test_migrate_makes_the_tables_and_check_tells_whether_they_are_up_to_date(empty_dsn: str) -> None:
    assert "run `otel-pg-exporter migrate`" in refused("migrate", "--check", "--dsn", empty_dsn, status=1)
    assert "applied 0001_tables.sql" in run("migrate", OTEL_PG_EXPORTER_DSN=empty_dsn).stdout
    for again in (run("migrate", "--dsn", empty_dsn), run("migrate", "--check", "--dsn", empty_dsn)):
        assert again.returncode == 0
        assert again.stdout.startswith("schema otel (")
        assert again.stdout.endswith(") is up to date\n")


def test_commands_find_the_postgresql_that_serve_runs_and_say_so_where_it_runs_none(
    open_folder: Path, tmp_path: Path
) -> None:
    commands = (
        ["tail", "--once"],
        ["partitions", "list"],
        ["verify", "--since", "1h"],
        ["dead-letters", "list"],
        ["dead-letters", "replay", "--all"],
        ["migrate", "--check"],
    )
    with start_serving(tmp_path) as start:
        start("--data-dir", open_folder)
        for command in commands:
            # What libpq has in the environment is meant for another server.
            done = run(*command, "--data-dir", open_folder, PGSERVICE="none", PGDATABASE="none", PGPASSFILE="none")
            assert done.returncode == 0, done.stderr
    for command in commands:
        error = refused(*command, status=2, OTEL_PG_EXPORTER_DATA_DIR=str(open_folder))
        assert f"no `serve` runs one of its own in {open_folder} (--data-dir)" in error


@pytest.mark.parametrize("command", [["tail"], ["verify", "--since", "1h"], ["dead-letters", "replay", "--all"]])
def test_a_writer_who_wants_to_look_or_repair_hears_which_role_may(dsn: str, command: list[str]) -> None:
    error = refused(*command, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", dsn), status=1)
    assert "permission denied" in error
    assert "log in as a role that may: otel_reader looks, otel_operator repairs" in error


def test_a_writer_who_wants_to_migrate_hears_which_role_may(dsn: str) -> None:
    error = refused("migrate", "--retention-spans", "30d", OTEL_PG_EXPORTER_DSN=as_role("otel_writer", dsn), status=1)
    assert "log in as the owner of the tables, such as otel_migrator" in error


def test_migrate_makes_roles_and_says_how_they_get_passwords(empty_dsn: str) -> None:
    made = run("migrate", "--roles", "shown", OTEL_PG_EXPORTER_DSN=empty_dsn).stdout
    try:
        assert "applied role shown_writer" in made
        assert "\n  \\password shown_writer\n" in made
        assert run("migrate", "--roles", "shown", OTEL_PG_EXPORTER_DSN=empty_dsn).stdout.endswith("is up to date\n")
    finally:
        names = "shown_operator, shown_writer, shown_reader, shown_migrator"
        execute(empty_dsn, f"DROP OWNED BY {names} CASCADE")
        execute(empty_dsn, f"DROP ROLE {names}")


def test_migrate_prints_the_roles_too() -> None:
    printed = run("migrate", "--print", "--roles").stdout
    assert "CREATE ROLE %I LOGIN" in printed
    assert 'GRANT INSERT ON spans, logs, resources, traces, ingest_requests, dead_letters TO "otel_writer"' in printed


def test_migrate_reads_the_same_file_as_serve(empty_dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'dsn = "{empty_dsn}"\nschema = "telemetry"\nwriters = 4\n')
    assert run("migrate", "--config", file).returncode == 0
    assert execute(empty_dsn, "SELECT count(*) FROM telemetry.spans") == [(0,)]
