"""`check`, each time as a process of its own: what it finds, and that its remedies cure."""

import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.pipeline.spool_folder import SpoolFolders
from otel_pg_exporter.postgres.dsn import parse_dsn
from tests.pgbouncer import PgBouncer
from tests.receiver.certificates import CA, Files
from tests.serving import Serving, run, start_serving
from tests.support import PASSWORD, as_role, wait_until

Finding = dict[str, str]


def execute(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def checked(folder: Path, *arguments: str | Path, status: int = 0, **variables: str) -> dict[str, Finding]:
    """Return the worst finding of each subject."""
    done = run("check", "--json", "--spool-dir", folder / "spool", *arguments, **variables)
    assert (done.returncode, done.stderr) == (status, ""), done.stdout
    report = json.loads(done.stdout)
    for grade in ("warning", "problem"):
        assert report[f"{grade}s"] == len([each for each in report["findings"] if each["grade"] == grade])
    worst: dict[str, Finding] = {}
    for each in sorted(report["findings"], key=lambda each: ["ok", "warning", "problem"].index(each["grade"])):
        worst[each["subject"]] = each
    return worst


def grade_of(finding: Finding) -> str:
    return finding["grade"]


@pytest.fixture
def ready(dsn: str) -> str:
    """Return the DSN of a database with the partitions that `serve` would have made."""
    today = "(now() AT TIME ZONE 'UTC')::date"
    execute(dsn, f"SELECT otel.ensure_partitions({today}, {today} + 7)")
    return dsn


# PostgreSQL.


def test_a_writer_finds_all_well_but_for_how_the_tests_server_is_set(ready: str, tmp_path: Path) -> None:
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", ready))
    not_ok = {subject for subject, each in found.items() if each["grade"] != "ok"}
    assert not_ok <= {"durability", "server settings"}
    assert found["durability"]["remedy"].startswith("ALTER SYSTEM SET full_page_writes = on;")
    assert found["privileges"]["message"] == "role otel_writer may do what `serve` needs, and no more"
    assert found["dead letters"]["message"] == "not examined: this role may not read them"
    assert found["partitions"]["message"] == "today's and those of the next 7 days are there"
    assert "agree within" in found["clock"]["message"]


def test_a_reader_and_the_operator_are_told_what_they_are_not(ready: str, tmp_path: Path) -> None:
    reader = checked(tmp_path, status=1, OTEL_PG_EXPORTER_DSN=as_role("otel_reader", ready))
    assert reader["privileges"]["grade"] == "problem"
    assert "may read, but not write: `serve` needs a writer" in reader["privileges"]["message"]
    assert reader["dead letters"]["message"] == "none"
    operator = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_operator", ready))
    assert "and also read attributes and events" in operator["privileges"]["message"]


def test_the_owner_and_a_superuser_are_more_than_serve_should_be(ready: str, tmp_path: Path) -> None:
    for dsn, what in ((as_role("otel_migrator", ready), "owns the tables"), (ready, "is a superuser")):
        privileges = checked(tmp_path, OTEL_PG_EXPORTER_DSN=dsn)["privileges"]
        assert privileges["grade"] == "warning"
        assert what in privileges["message"]
        assert "docs/how-to/roles.md" in privileges["remedy"]


def test_rights_that_are_missing_are_named_by_the_sql_that_grants_them(ready: str, tmp_path: Path) -> None:
    writer = as_role("otel_writer", ready)
    execute(
        ready,
        "REVOKE INSERT ON otel.logs FROM otel_writer; REVOKE UPDATE (last_seen) ON otel.resources FROM otel_writer",
    )
    privileges = checked(tmp_path, OTEL_PG_EXPORTER_DSN=writer, status=1)["privileges"]
    assert privileges["grade"] == "problem"
    assert privileges["remedy"] == (
        'GRANT INSERT ON "otel".logs TO "otel_writer"; GRANT UPDATE (last_seen) ON "otel".resources TO "otel_writer"'
    )
    execute(as_role("otel_migrator", ready), privileges["remedy"])
    assert checked(tmp_path, OTEL_PG_EXPORTER_DSN=writer)["privileges"]["grade"] == "ok"


def test_a_function_of_serves_that_is_gone_is_a_problem(ready: str, tmp_path: Path) -> None:
    execute(ready, "DROP FUNCTION otel.prune_expired")
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", ready), status=1)
    assert "function prune_expired" in found["tables"]["message"]
    assert "prune_expired" in found["privileges"]["remedy"]


def test_tables_that_are_missing_or_old_are_a_problem_with_the_command_that_makes_them(
    empty_dsn: str, dsn: str, tmp_path: Path
) -> None:
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=empty_dsn, status=1)
    assert found["tables"]["grade"] == "problem"
    assert found["tables"]["remedy"].startswith("run `otel-pg-exporter migrate` with the same DSN")
    assert "privileges" not in found
    execute(dsn, "DELETE FROM otel.schema_migrations WHERE version = (SELECT max(version) FROM otel.schema_migrations)")
    old = checked(tmp_path, OTEL_PG_EXPORTER_DSN=dsn, status=1)["tables"]
    assert "is older" in old["message"]
    assert old["remedy"].startswith("run `otel-pg-exporter migrate` with the same DSN")


def test_views_that_are_gone_are_named_and_the_command_makes_them_again(ready: str, tmp_path: Path) -> None:
    execute(ready, "ALTER TABLE otel.spans DROP COLUMN gen_ai_request_model CASCADE")
    execute(ready, "ALTER TABLE otel.spans ADD COLUMN gen_ai_request_model text")
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", ready))["tables"]
    what = "schema otel lacks what the migrations made: view span_details, view genai_usage, function genai_usage"
    assert (found["grade"], found["message"]) == ("warning", what)
    done = run("migrate", "--check", OTEL_PG_EXPORTER_DSN=ready)
    assert (done.returncode, what in done.stderr) == (1, True)
    assert "applied view genai_usage" in run("migrate", OTEL_PG_EXPORTER_DSN=ready).stdout
    assert checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)["tables"]["grade"] == "ok"


def test_a_default_partition_that_is_detached_is_attached_by_the_sql_that_it_names(ready: str, tmp_path: Path) -> None:
    execute(ready, "ALTER TABLE otel.logs DETACH PARTITION otel.logs_default")
    default = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", ready), status=1)["DEFAULT partition"]
    assert default["message"].startswith("logs has none: ")
    execute(ready, default["remedy"])
    assert checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)["DEFAULT partition"]["grade"] == "ok"


def test_a_day_that_is_detached_counts_as_missing_and_its_table_is_put_out_of_the_way(
    ready: str, tmp_path: Path
) -> None:
    [(name,)] = execute(ready, "SELECT 'spans_p' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')")
    execute(ready, f"ALTER TABLE otel.spans DETACH PARTITION otel.{name}")
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=as_role("otel_writer", ready), status=1)["partitions"]
    assert found["message"].startswith(f"table {name} is no partition of spans, but has the name of one")
    execute(ready, found["remedy"])
    again = checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)["partitions"]
    assert again["message"] == "today's and those of the next 7 days are there"


def test_a_role_that_may_not_use_the_schema_hears_so_beside_all_other_findings(ready: str, tmp_path: Path) -> None:
    writer = as_role("otel_writer", ready)
    execute(ready, "REVOKE USAGE ON SCHEMA otel FROM otel_writer")
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=writer, status=1)
    assert found["privileges"]["message"] == "role otel_writer may not use schema otel"
    grant, _, rest = found["privileges"]["remedy"].partition(";")
    assert "docs/how-to/roles.md" in rest
    assert {"version", "clock", "connections", "locks"} <= found.keys()
    execute(as_role("otel_migrator", ready), grant)
    assert checked(tmp_path, OTEL_PG_EXPORTER_DSN=writer)["privileges"]["grade"] == "ok"


def test_tables_of_another_program_are_no_reason_to_examine_ours(empty_dsn: str, tmp_path: Path) -> None:
    execute(empty_dsn, "CREATE SCHEMA otel; CREATE TABLE otel.spans (id int)")
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=empty_dsn, status=1)
    assert "no schema otel with our tables" in found["tables"]["message"]
    assert not {"privileges", "partitions", "dead letters"} & found.keys()


def test_rows_of_today_in_default_are_moved_by_the_sql_that_it_names(dsn: str, tmp_path: Path) -> None:
    execute(
        dsn,
        "INSERT INTO otel.logs (time_minute, time, time_ns, severity_number, severity_text, event_name, flags,"
        " scope_name, scope_version, scope_dropped_attributes_count, dropped_attributes_count, resource_id, schema_url,"
        " anomalies, request_id) VALUES (0, now(), 0, 0, '', '', 0, '', '', 0, 0, gen_random_uuid(), '', 0,"
        " gen_random_uuid())",
    )
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=dsn)
    assert "it holds logs of today" in found["DEFAULT partition"]["message"]
    assert "missing: spans of " in found["partitions"]["message"]
    execute(dsn, found["partitions"]["remedy"])
    again = checked(tmp_path, OTEL_PG_EXPORTER_DSN=dsn)
    assert (again["partitions"]["grade"], again["DEFAULT partition"]["grade"]) == ("ok", "ok")


def test_dead_letters_long_locks_and_prepared_work_are_told(ready: str, tmp_path: Path) -> None:
    execute(
        ready,
        "INSERT INTO otel.dead_letters (signal, request_id, item_index, reason, otlp)"
        " VALUES ('logs', gen_random_uuid(), 0, 'r', '')",
    )
    # The holder is closed first, also when the check fails: else the other would wait for its lock for ever.
    with psycopg.connect(ready, autocommit=True) as waiting, psycopg.connect(ready) as holder:
        pid = holder.info.backend_pid
        holder.execute("LOCK TABLE otel.traces IN ACCESS EXCLUSIVE MODE")
        waiting_thread = threading.Thread(target=lambda: waiting.execute("SELECT count(*) FROM otel.traces"))
        waiting_thread.start()
        with psycopg.connect(ready, autocommit=True) as watching:
            query = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
            wait_until(lambda: watching.execute(query).fetchall() == [(True,)])
        found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)
        holder.rollback()
        waiting_thread.join()
    assert found["dead letters"]["message"] == "1 item was refused"
    assert f"waits for AccessShareLock on traces, held up by {pid}" in found["locks"]["message"]


def test_a_server_that_is_away_is_one_problem_without_the_password(tmp_path: Path) -> None:
    dsn = "postgresql://otel:s3cret@127.0.0.1:1/otel"
    done = run("check", "--spool-dir", tmp_path / "spool", OTEL_PG_EXPORTER_DSN=dsn)
    assert done.returncode == 1
    assert "problem  connection: no connection to PostgreSQL (user=otel password=***" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.rstrip().endswith(": 1 problem, 0 warnings")


def test_a_passfile_that_libpq_ignores_is_named_with_the_cause(ready: str, tmp_path: Path) -> None:
    parts = parse_dsn(as_role("otel_writer", ready))
    without = make_conninfo(**{key: value for key, value in parts.items() if key not in {"password", "passfile"}})
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:otel_writer:{PASSWORD}\n")
    for mode, ignored in ((0o440, True), (0o600, False)):
        passfile.chmod(mode)
        done = run(
            "check",
            "--json",
            "--spool-dir",
            tmp_path / "spool",
            OTEL_PG_EXPORTER_DSN=make_conninfo(without, passfile=str(passfile)),
        )
        findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
        assert (findings["connection"]["grade"] == "problem") == ignored
        assert (f"libpq ignores the passfile {passfile}, since its mode is 0440" in done.stdout) == ignored
    for path, said in ((tmp_path / "none", "No such file or directory"), (tmp_path, "which is no plain file")):
        done = run("migrate", "--check", OTEL_PG_EXPORTER_DSN=without, PGPASSFILE=str(path))
        assert done.returncode == 1
        assert f"the passfile {path}" in done.stderr
        assert said in done.stderr
    passfile.write_text("elsewhere:*:*:otel_writer:x\n")
    done = run("migrate", "--check", OTEL_PG_EXPORTER_DSN=without, PGPASSFILE=str(passfile))
    assert "has no line for this host, port, database and user" in done.stderr


def test_a_missing_certificate_of_the_authority_is_named(ready: str, tmp_path: Path) -> None:
    missing = tmp_path / "ca.crt"
    dsn = make_conninfo(as_role("otel_writer", ready), sslmode="verify-full", sslrootcert=str(missing))
    found = checked(tmp_path, status=1, OTEL_PG_EXPORTER_DSN=dsn)
    assert f"there is no {missing}: name it by sslrootcert" in found["connection"]["remedy"]


def test_through_pgbouncer_all_is_found_as_well_and_it_is_told(
    ready: str, pgbouncer: PgBouncer, tmp_path: Path
) -> None:
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=pgbouncer.route(as_role("otel_writer", ready)))
    assert "PgBouncer stands in between" in found["pooler"]["message"]
    assert found["privileges"]["grade"] == found["tables"]["grade"] == found["transactions"]["grade"] == "ok"
    assert "pooler" not in checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)


def test_what_libpq_takes_from_the_environment_is_said(ready: str, tmp_path: Path) -> None:
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready, PGAPPNAME="x", PGTZ="UTC")
    assert found["connection"]["message"].endswith("with PGAPPNAME, PGTZ from the environment")


def test_settings_that_give_up_durability_or_connections_are_told(ready: str, tmp_path: Path) -> None:
    found = checked(tmp_path, "--synchronous-commit", "off", "--writers", "250", OTEL_PG_EXPORTER_DSN=ready, status=0)
    assert "an OK is given for what a crash may still take back" in found["durability"]["message"]
    assert "one `serve` takes up to 254" in found["connections"]["message"]
    assert found["connections"]["grade"] == "warning"


# The machine.


def test_ports_in_use_are_told_with_their_owner_and_our_own_as_such(ready: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, start_serving(tmp_path) as start:
        serving: Serving = start(variables={"OTEL_PG_EXPORTER_DSN": ready})
        found = checked(
            tmp_path,
            "--grpc-endpoint",
            serving.address,
            "--http-endpoint",
            f"127.0.0.1:{other.getsockname()[1]}",
            "--metrics-endpoint",
            "none",
            OTEL_PG_EXPORTER_DSN=ready,
            status=1,
        )
        assert found["grpc endpoint"]["message"].endswith(f"is served by our own process {serving.process.pid}")
        assert f"(process {os.getpid()}, " in found["http endpoint"]["message"]
        assert "choose another port with --http-endpoint" in found["http endpoint"]["remedy"]
        assert found["metrics endpoint"]["message"] == "not served"


def test_the_spool_s_folder_its_room_and_what_dead_processes_left_are_told(ready: str, tmp_path: Path) -> None:
    folders = SpoolFolders(tmp_path / "spool", "db:5432/other otel")
    folder = folders.acquire()
    (folder.path / "spool.db").touch()
    assert "left" not in str(checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)["spool"])
    folder.release()
    found = checked(tmp_path, OTEL_PG_EXPORTER_DSN=ready)["spool"]
    assert found["message"] == f"a dead process has left requests in {folder.path}"
    full = checked(tmp_path, "--spool-max-bytes", str(2**49), "--no-migrate", OTEL_PG_EXPORTER_DSN=ready)
    assert full["spool"]["grade"] == "warning"
    (tmp_path / "file").touch()
    blocked = run("check", "--json", "--spool-dir", tmp_path / "file" / "spool", OTEL_PG_EXPORTER_DSN=ready)
    assert blocked.returncode == 1
    assert "cannot be made by this user" in blocked.stdout


def test_a_folder_that_may_not_be_looked_into_is_a_problem_with_the_setting_for_another(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300)  # root may look into everything, but into this
    (tmp_path / "a file").touch()
    found = checked(tmp_path, "--data-dir", folder, status=1)["embedded PostgreSQL"]
    assert found["message"] == f"{folder} cannot be used: File name too long"
    assert found["remedy"] == "set --data-dir"
    done = run("check", "--data-dir", tmp_path / "a file", "--spool-dir", folder / "spool")
    assert "could not be examined" not in done.stdout


def test_files_that_do_not_load_are_problems(ready: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('table = "spans"\n[[column]]\nname = "x"\n')
    (tmp_path / "tokens").write_text("")
    found = checked(
        tmp_path,
        *("--mappings", tmp_path / "bad.toml"),
        *("--auth-bearer-file", tmp_path / "tokens"),
        OTEL_PG_EXPORTER_DSN=ready,
        status=1,
    )
    assert "bad.toml" in found["mappings"]["message"]
    assert "holds no entry" in found["security"]["message"]


def test_what_is_amiss_with_files_of_security_is_warned_of(ready: str, tmp_path: Path) -> None:
    files, tokens = Files(folder=tmp_path), tmp_path / "tokens"
    files.write(CA.issue_cert("localhost", not_after=datetime(2021, 1, 1, tzinfo=UTC)))
    files.key.chmod(0o644)
    tokens.touch(mode=0o600)
    tokens.write_text("hunter2\n")
    settings = ("--tls-cert", files.cert, "--tls-key", files.key, "--auth-bearer-file", tokens)
    ended = run("check", "--json", "--no-spool", *settings, OTEL_PG_EXPORTER_DSN=ready)
    found = [each for each in json.loads(ended.stdout)["findings"] if each["subject"] == "security"]
    assert [(each["grade"], each["message"].partition(str(tmp_path))[0]) for each in found] == [
        ("warning", "--tls-key: every user of this machine can read "),
        ("warning", "--tls-cert: the certificate has expired, clients refuse it: "),
        ("warning", "--auth-bearer-file: "),
    ]
    assert [each["remedy"][:8] for each in found] == ["`chmod o", "", "`openssl"]
    assert "hunter2" not in ended.stdout + ended.stderr


def test_endpoints_that_others_reach_are_warned_of(ready: str, tmp_path: Path) -> None:
    found = checked(tmp_path, "--grpc-endpoint", "0.0.0.0:0", OTEL_PG_EXPORTER_DSN=ready)
    assert found["security"]["grade"] == "warning"
    assert "other machines reach it" in found["security"]["message"]


# Without a DSN.


def test_without_a_dsn_the_embedded_server_is_examined_and_asked_if_it_runs(open_folder: Path, tmp_path: Path) -> None:
    data = open_folder
    before = checked(tmp_path, "--data-dir", data)
    assert before["embedded PostgreSQL"]["grade"] == "ok"
    assert "no data yet" in before["embedded PostgreSQL"]["message"]
    assert "connection" not in before
    with start_serving(tmp_path) as start:
        serving = start("--data-dir", data)
        while_it_runs = checked(tmp_path, "--data-dir", data)
        assert f"served by process {serving.process.pid}" in while_it_runs["embedded PostgreSQL"]["message"]
        assert while_it_runs["tables"]["message"] == "schema otel is up to date"
        # That it has no other role, and was built as it was, is nobody's fault.
        assert while_it_runs["privileges"]["grade"] == while_it_runs["server settings"]["grade"] == "ok"
    assert "data is there" in checked(tmp_path, "--data-dir", data)["embedded PostgreSQL"]["message"]


# How it is shown.


def test_it_is_coloured_where_that_is_asked_for(tmp_path: Path) -> None:
    arguments = ("check", "--spool-dir", tmp_path, "--dsn", "host=127.0.0.1 port=1")
    assert "\x1b[31mproblem \x1b[0m connection: " in run(*arguments, "--color", "always").stdout
    assert "\x1b" not in run(*arguments).stdout
