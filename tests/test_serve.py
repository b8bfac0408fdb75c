"""`serve` at work, as a process of its own: what it prints, how it stops, and what it outlives."""

import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import httpx
import psycopg
import pytest

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.embedded_process import read_postmaster_file
from tests.receiver.certificates import Files
from tests.receiver.support import TRACES, Client, Connect
from tests.serving import Serving, StartServing, environment, refusal_once_draining, span_request, start_serving
from tests.support import as_role, wait_until

# What a user may have set for other servers; none of it concerns the embedded one.
MISLEADING = {
    "PGDATABASE": "elsewhere",
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGOPTIONS": "-c nonsense=1",
    "PGPASSFILE": "/nowhere",
    "PGPASSWORD": "s3cret",
    "PGPORT": "1",
    "PGREQUIREAUTH": "none",
    "PGSERVICE": "elsewhere",
    "PGSSLMODE": "verify-full",
    "PGTARGETSESSIONATTRS": "standby",
    "PGUSER": "somebody",
}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open channels that are closed when the test is over."""
    channels: list[grpc.Channel] = []

    def open_channel(address: str) -> Client:
        channels.append(grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
        return Client(channels[-1])

    yield open_channel
    for channel in channels:
        channel.close()


def test_it_may_open_as_many_files_as_the_hard_limit_lets_it(tmp_path: Path, dsn: str) -> None:
    """Each sender's connection takes one; a shell's soft limit is often 1,024."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, old[1]))  # for the child, which inherits it
    try:
        with start_serving(tmp_path) as start:
            serving = start("--dsn", dsn)
            resource.setrlimit(resource.RLIMIT_NOFILE, old)
            soft, _ = resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)
            assert soft == min(65_536, old[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


def count(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return int(connection.execute("SELECT count(*) FROM otel.spans").fetchall()[0][0])


@contextmanager
def spans_locked(dsn: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Keep every commit of spans waiting."""
    with closing(psycopg.connect(dsn)) as connection:
        connection.execute("LOCK TABLE otel.spans IN ACCESS EXCLUSIVE MODE")
        yield connection


def a_writer_waits(dsn: str) -> bool:
    with psycopg.connect(dsn, autocommit=True) as connection:
        waiting = "SELECT FROM pg_locks JOIN pg_class ON oid = relation WHERE NOT granted AND relname = 'spans'"
        return connection.execute(waiting).fetchone() is not None


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:  # it has ended meanwhile
                continue
            if str(folder) in command:
                found.append(command)
    return found


def postmaster(folder: Path) -> int:
    state = read_postmaster_file(folder / "pgdata")
    assert state is not None
    return state.pid


# With a PostgreSQL of its own.


def test_its_own_postgresql_is_made_used_stopped_and_found_again(
    open_folder: Path, serve: StartServing, connect: Connect
) -> None:
    first = serve("--data-dir", open_folder, variables=MISLEADING)
    assert connect(first.address).export(TRACES, span_request(3)) == b""
    query = [f"{first.psql} -Atc 'SELECT count(*) FROM otel.spans'"]
    assert subprocess.check_output(query, shell=True, env=environment(), text=True) == "3\n"
    first.send(signal.SIGINT)
    assert first.wait() == 0
    assert processes_of(open_folder) == []

    second = serve("--data-dir", open_folder)
    assert connect(second.address).export(TRACES, span_request(2)) == b""
    query = [f"{second.psql} -Atc 'SELECT count(*) FROM otel.spans'"]
    assert subprocess.check_output(query, shell=True, env=environment(), text=True) == "5\n"
    for said in (first.stdout, first.stderr, second.stdout, second.stderr):
        assert "s3cret" not in said
        assert (open_folder / "passfile").read_text().strip().rpartition(":")[2] not in said
        assert "Traceback" not in said


def test_the_banner_says_where_it_listens_what_to_set_and_how_to_look(open_folder: Path, serve: StartServing) -> None:
    banner = serve("--data-dir", open_folder).stdout
    port = re.search(r"OTLP/gRPC +127.0.0.1:(\d+)", banner)
    assert port is not None
    way = "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{} OTEL_EXPORTER_OTLP_PROTOCOL={}\n"
    assert f"export {way.format(port[1], 'grpc')}" in banner
    http_port = re.search(r"OTLP/HTTP +127.0.0.1:(\d+)", banner)
    assert http_port is not None
    assert f"# or: {way.format(http_port[1], 'http/protobuf')}" in banner
    assert "OTEL_LOGS_EXPORTER=otlp" in banner
    assert re.search(rf"psql 'postgresql://otel@127.0.0.1:\d+/otel\?passfile={open_folder}/passfile'\n", banner)
    assert "export OTEL_SERVICE_NAME=my-app\n" in banner
    assert "opentelemetry-instrument python app.py\n" in banner
    assert re.search(rf"PostgreSQL  \d+\.\d+.*, its own, in {open_folder}\n", banner)
    assert re.search(r"DSN +.*host=127.0.0.1", banner)


def test_the_banner_of_a_writer_names_a_role_that_may_read(serve: StartServing, dsn: str) -> None:
    writer = serve("--dsn", as_role("otel_writer", dsn))
    assert "See what arrives, as a role that may read, since this one may not:\n" in writer.stdout
    assert "'postgresql://otel_reader@127.0.0.1:" in writer.psql


def test_the_log_says_once_that_it_is_ready_and_where(serve: StartServing, dsn: str) -> None:
    serving = serve("--dsn", dsn)
    wait_until(lambda: "ready: " in serving.stderr)
    (line,) = [line for line in serving.stderr.splitlines() if "ready: " in line]
    assert f"ready: serving OTLP/gRPC on {serving.address}, OTLP/HTTP on {serving.http_address}" in line
    assert f", metrics on {serving.metrics_url.removeprefix('http://')}" in line


def test_it_shows_its_metrics_although_the_sdks_of_apps_are_switched_off(serve: StartServing, dsn: str) -> None:
    serving = serve("--dsn", dsn, variables={"OTEL_SDK_DISABLED": "true"})
    assert "\notel_pg_exporter_ready 1.0\n" in httpx.get(f"{serving.metrics_url}/metrics", timeout=120).text


def test_the_banner_says_what_senders_need_for_tls_and_authentication(
    open_folder: Path, serve: StartServing, tmp_path: Path
) -> None:
    files = Files(folder=tmp_path, client_ca=True)
    files.write()
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("a-token-of-some-length\n")
    flags = {"cert": files.cert, "key": files.key, "client-ca": files.authorities}
    arguments = [f"--tls-{name}={path}" for name, path in flags.items()]
    serving = serve("--data-dir", open_folder, *arguments, f"--auth-bearer-file={tokens}")
    assert f"export OTEL_EXPORTER_OTLP_ENDPOINT=https://{serving.address} " in serving.stdout
    for name in ("HEADERS=authorization=Bearer%20", "CERTIFICATE", "CLIENT_CERTIFICATE"):
        assert f"export OTEL_EXPORTER_OTLP_{name}" in serving.stdout


def test_without_a_psql_on_the_path_its_own_is_named(open_folder: Path, serve: StartServing) -> None:
    serving = serve("--data-dir", open_folder, variables={"PATH": "/nowhere"})
    assert serving.psql.startswith("/")
    query = [f"{serving.psql} -Atc 'SELECT 1'"]
    assert subprocess.check_output(query, shell=True, env=environment(), text=True) == "1\n"


def test_its_own_postgresql_comes_back_after_a_crash(open_folder: Path, serve: StartServing, connect: Connect) -> None:
    serving = serve("--data-dir", open_folder, "--ack-timeout", "30")
    client = connect(serving.address)
    assert client.export(TRACES, span_request()) == b""
    os.kill(postmaster(open_folder), signal.SIGKILL)
    wait_until(lambda: "the embedded PostgreSQL died" in serving.stderr)  # its backends may live a moment longer
    assert client.export(TRACES, span_request()) == b""
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert "2 rows in 2 batches" in serving.stderr
    assert processes_of(open_folder) == []


def test_a_signal_while_initdb_runs_ends_everything(open_folder: Path, serve: StartServing) -> None:
    serving = serve("--data-dir", open_folder, ready=False)
    wait_until(lambda: any("initdb" in command for command in processes_of(open_folder)))
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert serving.stdout == ""
    assert "Traceback" not in serving.stderr
    assert processes_of(open_folder) == []


def test_a_signal_while_its_own_postgresql_recovers_ends_everything(open_folder: Path, serve: StartServing) -> None:
    crashed = serve("--data-dir", open_folder)
    os.kill(crashed.process.pid, signal.SIGKILL)
    crashed.wait()
    os.kill(postmaster(open_folder), signal.SIGKILL)
    wait_until(lambda: processes_of(open_folder) == [])

    serving = serve("--data-dir", open_folder, ready=False)
    wait_until(lambda: processes_of(open_folder / "pgdata") != [])
    serving.send(signal.SIGINT)
    assert serving.wait() == 0
    assert processes_of(open_folder) == []


# With a PostgreSQL of somebody else's.


def test_migrate_makes_the_tables_at_the_start_and_the_password_is_masked(
    serve: StartServing, connect: Connect, server: EmbeddedServer, empty_dsn: str
) -> None:
    passfile = server.data_dir / "passfile"
    password = passfile.read_text().strip().rpartition(":")[2]
    dsn = empty_dsn.partition("?")[0].replace("otel@", f"otel:{password}@")
    serving = serve("--migrate", variables={"OTEL_PG_EXPORTER_DSN": dsn})
    assert connect(serving.address).export(TRACES, span_request()) == b""
    assert count(empty_dsn) == 1
    assert re.search(r"PostgreSQL  \d+\.\d+.*\n  DSN  .*password=\*\*\*", serving.stdout)
    assert serving.psql == f"psql '{empty_dsn.partition('?')[0]}'"
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert password not in serving.stdout + serving.stderr


def test_a_signal_while_the_server_does_not_answer_ends_the_start(serve: StartServing) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        serving = serve("--dsn", f"host=127.0.0.1 port={port} dbname=x connect_timeout=100", ready=False)
        silent.settimeout(60)
        peer, _ = silent.accept()
        with peer:
            serving.send(signal.SIGINT)
            assert serving.wait() == 0
    assert "Traceback" not in serving.stderr


def test_a_request_in_flight_is_finished_before_the_end(serve: StartServing, connect: Connect, dsn: str) -> None:
    serving = serve("--dsn", dsn, "--ack-timeout", "60", "--lock-timeout", "120", "--statement-timeout", "120")
    client = connect(serving.address)
    with spans_locked(dsn) as locked:
        future = client.future(TRACES, span_request())
        wait_until(lambda: a_writer_waits(dsn))
        serving.send(signal.SIGTERM)
        late = refusal_once_draining(connect(serving.address))
        assert (late.code, late.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
        assert serving.process.poll() is None
        locked.rollback()
    assert future.result() == b""
    assert serving.wait() == 0
    assert count(dsn) == 1
    assert "statistics: 1 rows in 1 batches" in serving.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once(
    serve: StartServing, connect: Connect, dsn: str, number: signal.Signals, status: int
) -> None:
    serving = serve(
        "--dsn",
        dsn,
        "--ack-timeout",
        "60",
        "--lock-timeout",
        "120",
        "--statement-timeout",
        "120",
        "--shutdown-timeout",
        "600",
    )
    with spans_locked(dsn):
        future = connect(serving.address).future(TRACES, span_request())
        wait_until(lambda: a_writer_waits(dsn))
        serving.send(number)
        wait_until(lambda: "a second signal ends this" in serving.stderr)
        serving.send(number)
        assert serving.wait() == status
        assert future.exception() is not None


def test_a_second_signal_lets_its_own_postgresql_end_by_itself(
    open_folder: Path, serve: StartServing, connect: Connect
) -> None:
    serving = serve(
        "--data-dir",
        open_folder,
        "--ack-timeout",
        "60",
        "--lock-timeout",
        "120",
        "--statement-timeout",
        "120",
        "--shutdown-timeout",
        "600",
    )
    dsn = serving.psql.split("'")[1]
    with spans_locked(dsn):
        future = connect(serving.address).future(TRACES, span_request())
        wait_until(lambda: a_writer_waits(dsn))
        serving.send(signal.SIGTERM)
        wait_until(lambda: "a second signal ends this" in serving.stderr)
        serving.send(signal.SIGTERM)
        assert serving.wait() == 143
        assert future.exception() is not None
        wait_until(lambda: processes_of(open_folder) == [])


def test_statistics_are_logged_at_their_interval_and_at_the_end(
    serve: StartServing, connect: Connect, dsn: str
) -> None:
    serving = serve("--dsn", dsn, "--statistics-interval", "0.1")
    wait_until(lambda: serving.stderr.count("statistics: 0 rows") > 1)
    body = span_request(3)
    for _ in range(2):
        assert connect(serving.address).export(TRACES, body) == b""
    wait_until(lambda: "statistics: 3 rows in 2 batches, 3 duplicates" in serving.stderr)
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    *_, statistics, items = serving.stderr.splitlines()
    assert re.match(r"[\d-]+ [\d:,]+ INFO +otel_pg_exporter.service: statistics: 3 rows in 2 batches", statistics)
    assert "items: 6 received = 3 stored + 3 duplicate + 0 rejected + 0 refused + 0 in flight" in items


def test_it_outlives_its_postgresql_and_keeps_what_comes_meanwhile(
    serve: StartServing, connect: Connect, own_server: EmbeddedServer
) -> None:
    serving = serve("--migrate", "--ack-timeout", "0.5", "--dsn", own_server.dsn)
    client = connect(serving.address)
    own_server.stop()
    for _ in range(3):
        assert client.export(TRACES, span_request()) == b""
    own_server.start()
    wait_until(lambda: count(own_server.dsn) == 3)
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    last = serving.stderr.splitlines()[-1]
    assert "items: 3 received = 3 stored + 0 duplicate + 0 rejected + 0 refused + 0 in the spool + 0 in flight" in last


def test_without_a_spool_it_asks_senders_to_come_again_while_its_postgresql_is_away(
    serve: StartServing, connect: Connect, own_server: EmbeddedServer
) -> None:
    serving = serve("--no-spool", "--migrate", "--ack-timeout", "5", "--connect-timeout", "2", "--dsn", own_server.dsn)
    client = connect(serving.address)
    assert client.export(TRACES, span_request()) == b""
    own_server.stop()
    body = span_request()
    away = client.refused(TRACES, body)
    assert (away.code, away.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
    wait_until(lambda: "WARNING otel_pg_exporter.postgres.writer: no connection to PostgreSQL" in serving.stderr)
    own_server.start()
    wait_until(lambda: _accepted(client, body))
    assert re.search(r"INFO +otel_pg_exporter.postgres.writer: PostgreSQL is back after [\d.]+ s\n", serving.stderr)
    assert client.export(TRACES, span_request()) == b""
    assert serving.stderr.count("PostgreSQL is back") == serving.stderr.count("WARNING otel_pg_exporter.postgres") == 1
    assert count(own_server.dsn) == 3
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert "Traceback" not in serving.stderr


def test_it_says_when_rows_are_refused_for_what_the_database_lacks_and_when_they_are_accepted_again(
    serve: StartServing, connect: Connect, dsn: str
) -> None:
    serving = serve("--no-spool", "--dsn", dsn, "--ack-timeout", "1")
    client = connect(serving.address)
    body = span_request()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("ALTER TABLE otel.spans RENAME TO mislaid")
        assert client.refused(TRACES, body).code is grpc.StatusCode.UNAVAILABLE
        refused = "ERROR   otel_pg_exporter.postgres.writer: PostgreSQL refuses every row"
        wait_until(lambda: refused in serving.stderr)
        connection.execute("ALTER TABLE otel.mislaid RENAME TO spans")
    wait_until(lambda: _accepted(client, body))
    assert serving.stderr.count(refused) == 1
    assert re.search(r"INFO +\S+writer: PostgreSQL accepts rows again \(traces\) after [\d.]+ s\n", serving.stderr)
    assert "PostgreSQL is back" not in serving.stderr


def _accepted(client: Client, body: bytes) -> bool:
    try:
        return client.export(TRACES, body) == b""
    except grpc.RpcError:
        return False


def test_a_log_level_leaves_out_what_is_less_severe(serve: StartServing, dsn: str) -> None:
    serving = serve("--dsn", dsn, "--log-level", "warning")
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    assert serving.stderr == ""


def test_several_stop_within_their_time_and_leave_no_connection(serve: StartServing, dsn: str) -> None:
    servings: list[Serving] = [serve("--dsn", dsn, "--reuse-port") for _ in range(2)]
    for serving in servings:
        serving.send(signal.SIGTERM)
    assert [serving.wait() for serving in servings] == [0, 0]
    with psycopg.connect(dsn, autocommit=True) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'otel-pg-exporter'"
        wait_until(lambda: connection.execute(f"{query} AND datname = current_database()".encode()).fetchone() == (0,))


def test_the_log_says_when_the_reference_makes_the_rows(serve: StartServing, dsn: str) -> None:
    serving = serve("--dsn", dsn, variables={"OTEL_PG_EXPORTER_CORE": "python"})

    assert "rows are made by the Python reference" in serving.stderr
