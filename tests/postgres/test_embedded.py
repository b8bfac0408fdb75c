"""The embedded PostgreSQL's life: start, stop, kill, adoption, and what it refuses."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.support import FAST, wait_until

# A process of ours that starts the server in argv[2] with the programs in argv[1], says so, and waits for its end.
KEEPER = f"""
import sys
from pathlib import Path
from otel_pg_exporter.postgres.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[2]), binaries=Path(sys.argv[1]), settings={FAST!r})
print(server.start(), server.pid, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def keeper(binaries: Path, open_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Return another process that runs a server in `open_folder`."""
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, binaries, open_folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        if process.poll() is None:
            process.communicate()


def started(keeper: subprocess.Popen[str]) -> tuple[str, int]:
    assert keeper.stdout is not None
    dsn, pid = keeper.stdout.readline().split()
    return dsn, int(pid)


def query(dsn: str, statement: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except FileNotFoundError:
        return True


def test_psql_takes_the_dsn_as_it_is(own_server: EmbeddedServer, binaries: Path) -> None:
    printed = subprocess.check_output([binaries / "psql", own_server.dsn, "-Atc", "SELECT current_database()"])
    assert printed.decode().strip() == "otel"


def test_the_dsn_holds_no_password(own_server: EmbeddedServer) -> None:
    password = (own_server.data_dir / "passfile").read_text().strip().rpartition(":")[2]
    assert len(password) > 30
    assert password not in own_server.dsn


def test_a_wrong_password_is_refused(own_server: EmbeddedServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(own_server.dsn, password="guess")


def test_only_loopback_is_listened_on_and_no_socket_file_lies_about(own_server: EmbeddedServer) -> None:
    assert query(own_server.dsn, "SHOW listen_addresses") == "127.0.0.1"
    assert query(own_server.dsn, "SHOW unix_socket_directories") == ""


def test_text_is_utf8_and_sorts_by_code_point_without_icu(own_server: EmbeddedServer) -> None:
    assert query(own_server.dsn, "SHOW server_encoding") == "UTF8"
    assert query(own_server.dsn, "SELECT 'a' < 'B'") is False
    assert query(own_server.dsn, "SELECT datlocprovider::text FROM pg_database WHERE datname = 'otel'") in {"b", "c"}


def test_nobody_else_can_read_the_folder(own_server: EmbeddedServer) -> None:
    assert mode(own_server.data_dir) == 0o700
    assert mode(own_server.data_dir / "pgdata") == 0o700
    files = [path for path in own_server.data_dir.iterdir() if path.is_file()]
    assert {path.name: mode(path) for path in files} == {path.name: 0o600 for path in files}
    assert "passfile" in {path.name for path in files}


def test_a_missing_folder_is_made_with_its_parents(binaries: Path, open_folder: Path) -> None:
    folder = open_folder / "a" / "b"
    open_folder.chmod(0o755)
    before = os.umask(0o077)
    try:
        with EmbeddedServer(folder, binaries=binaries, settings=FAST) as server:
            assert query(server.dsn, "SELECT 1") == 1
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert mode(open_folder) == 0o755


def test_a_folder_with_an_odd_name_works(binaries: Path, open_folder: Path) -> None:
    open_folder.chmod(0o755)
    folder = open_folder / "it's 100% ünusual & odd?"
    with EmbeddedServer(folder, binaries=binaries, settings=FAST) as server:
        assert query(server.dsn, "SELECT 1") == 1
        assert subprocess.check_output([binaries / "psql", server.dsn, "-Atc", "SELECT 2"]).strip() == b"2"


def test_the_environment_does_not_mislead_it(
    binaries: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in (
        *("PGHOST=198.51.100.1", "PGHOSTADDR=198.51.100.1", "PGPORT=1", "PGPASSWORD=guess", "PGUSER=x", "LANG=xx_XX"),
        *("PGDATA=/nowhere", "PGSSLMODE=require", "PGOPTIONS=-c nonsense=1", "LC_ALL=xx_XX.UTF-8"),
    ):
        monkeypatch.setenv(*setting.split("=", 1))
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert server.pid is not None


def test_it_gets_no_variable_that_may_hold_a_secret(
    binaries: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer canary")
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        given = Path(f"/proc/{server.pid}/environ")
        if not given.exists():
            pytest.skip("only Linux tells what a process was given")
        assert b"canary" not in given.read_bytes()
        assert b"PATH=" in given.read_bytes()


def test_a_second_start_keeps_data_and_dsn(own_server: EmbeddedServer) -> None:
    before = own_server.dsn
    query(before, "CREATE TABLE kept AS SELECT 42 AS answer")
    own_server.stop()
    assert own_server.start() == before
    assert query(before, "SELECT answer FROM kept") == 42


def test_starting_twice_is_starting_once(own_server: EmbeddedServer) -> None:
    pid = own_server.pid
    assert own_server.start() == own_server.dsn
    assert own_server.pid == pid


def test_another_port_is_taken_when_the_old_one_is_in_use(own_server: EmbeddedServer) -> None:
    port = int(str(query(own_server.dsn, "SHOW port")))
    own_server.stop()
    with socket.create_server(("127.0.0.1", port)):
        assert str(query(own_server.start(), "SHOW port")) != str(port)


def test_a_second_instance_on_the_same_folder_is_told_who_holds_it(own_server: EmbeddedServer) -> None:
    with pytest.raises(EmbeddedServerError, match=rf"in use by the process {os.getpid()}; .*--data-dir"):
        EmbeddedServer(own_server.data_dir).start()
    assert query(own_server.dsn, "SELECT 1") == 1


def test_two_instances_in_two_folders_run_at_once(server: EmbeddedServer, own_server: EmbeddedServer) -> None:
    for each in (server, own_server):
        assert query(each.dsn, "SHOW data_directory") == str(each.data_dir / "pgdata")
    assert server.pid != own_server.pid


def test_stop_ends_sessions_and_leaves_nothing(own_server: EmbeddedServer) -> None:
    pid = own_server.pid
    assert pid is not None
    with psycopg.connect(own_server.dsn) as connection:
        connection.execute("CREATE TABLE unfinished ()")
        own_server.stop()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        connection.close()
    assert own_server.pid is None
    assert is_gone(pid)
    assert not (own_server.data_dir / "pgdata" / "postmaster.pid").exists()


def test_stop_without_patience_still_ends_it_and_loses_nothing(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    query(own_server.dsn, "CREATE TABLE kept AS SELECT generate_series(1, 100000)")
    own_server.stop(timeout=0)
    assert "did not end within 0 s of SIGINT" in caplog.text
    assert query(own_server.start(), "SELECT count(*) FROM kept") == 100_000


def test_a_ctrl_c_to_our_process_group_does_not_reach_it(own_server: EmbeddedServer) -> None:
    pid = own_server.pid
    assert pid is not None
    assert os.getsid(pid) == os.getpgid(pid) == pid


def test_a_killed_postmaster_is_revived_under_the_same_dsn(own_server: EmbeddedServer) -> None:
    before = own_server.dsn
    assert not own_server.revive()
    with psycopg.connect(before, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        connection.execute("SET statement_timeout = 0")
        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGKILL)
        wait_until(own_server.revive)
    assert own_server.dsn == before
    assert query(before, "SELECT answer FROM kept") == 42


def test_the_server_of_a_killed_process_is_adopted(
    keeper: subprocess.Popen[str], binaries: Path, open_folder: Path
) -> None:
    dsn, pid = started(keeper)
    query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    keeper.kill()
    keeper.wait()
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert (server.dsn, server.pid) == (dsn, pid)
        assert query(dsn, "SELECT answer FROM kept") == 42
    assert is_gone(pid)


def test_an_adopted_server_that_dies_is_revived(
    keeper: subprocess.Popen[str], binaries: Path, open_folder: Path
) -> None:
    dsn, pid = started(keeper)
    keeper.kill()
    keeper.wait()
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        os.kill(pid, signal.SIGKILL)
        wait_until(server.revive)
        assert server.pid != pid
        assert query(dsn, "SELECT 1") == 1


def test_a_server_that_is_going_down_is_waited_for(
    keeper: subprocess.Popen[str], binaries: Path, open_folder: Path
) -> None:
    dsn, pid = started(keeper)
    keeper.kill()
    keeper.wait()
    server = EmbeddedServer(open_folder, binaries=binaries, settings=FAST)
    with psycopg.connect(dsn):
        os.kill(pid, signal.SIGTERM)  # a smart shutdown: it waits for the session
        wait_until(lambda: "stopping" in (open_folder / "pgdata" / "postmaster.pid").read_text())
        starter = threading.Thread(target=server.start)
        starter.start()
    starter.join()
    with server:
        assert server.pid != pid
        assert query(server.dsn, "SELECT 1") == 1


def test_a_machine_crash_is_recovered_from(keeper: subprocess.Popen[str], binaries: Path, open_folder: Path) -> None:
    dsn, pid = started(keeper)
    query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    keeper.kill()
    os.kill(pid, signal.SIGKILL)
    keeper.wait()
    wait_until(lambda: is_gone(pid))
    assert (open_folder / "pgdata" / "postmaster.pid").exists()
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert server.dsn == dsn
        assert query(dsn, "SELECT answer FROM kept") == 42


def test_an_unrelated_process_with_the_old_process_id_is_left_alone(own_server: EmbeddedServer) -> None:
    pgdata = own_server.data_dir / "pgdata"
    lines = (pgdata / "postmaster.pid").read_text().splitlines()
    own_server.stop()
    owner = pgdata.stat()
    # The PostgreSQL user's, as after a reboot, when PostgreSQL itself would refuse to start.
    with subprocess.Popen(["sleep", "60"], user=owner.st_uid, group=owner.st_gid) as other:
        (pgdata / "postmaster.pid").write_text("\n".join([str(other.pid), *lines[1:], ""]))
        os.chown(pgdata / "postmaster.pid", owner.st_uid, owner.st_gid)
        assert query(own_server.start(), "SELECT 1") == 1
        assert other.poll() is None
        other.kill()


def test_an_interrupted_initdb_is_begun_anew(binaries: Path, open_folder: Path) -> None:
    (open_folder / "pgdata.new").mkdir()
    (open_folder / "pgdata.new" / "PG_VERSION").write_text("18\n")
    (open_folder / "password.new").write_text("half")
    open_folder.chmod(0o755)
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert query(server.dsn, "SELECT 1") == 1
    assert not (open_folder / "pgdata.new").exists()
    assert not (open_folder / "password.new").exists()


def test_a_bad_setting_is_reported_with_the_end_of_the_log_and_can_be_mended(binaries: Path, open_folder: Path) -> None:
    with pytest.raises(EmbeddedServerError, match='unrecognized configuration parameter "no_such_setting"'):
        EmbeddedServer(open_folder, binaries=binaries, settings={**FAST, "no_such_setting": "1"}).start()
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert query(server.dsn, "SELECT 1") == 1


def test_data_of_another_major_version_is_refused_with_a_remedy(own_server: EmbeddedServer, binaries: Path) -> None:
    own_server.stop()
    (own_server.data_dir / "pgdata" / "PG_VERSION").write_text("11\n")
    with pytest.raises(EmbeddedServerError, match=r"PostgreSQL 11, .*install PostgreSQL 11.*--data-dir"):
        EmbeddedServer(own_server.data_dir).start()
    with pytest.raises(EmbeddedServerError, match=r"PostgreSQL 11, and .*--data-dir"):
        EmbeddedServer(own_server.data_dir, binaries=binaries).start()


def test_a_lost_passfile_is_named(own_server: EmbeddedServer) -> None:
    own_server.stop()
    (own_server.data_dir / "passfile").unlink()
    with pytest.raises(EmbeddedServerError, match=r"/passfile cannot be read \(No such file or directory\); restore"):
        own_server.start()
    assert own_server.pid is None


def test_a_passfile_that_does_not_fit_is_named(own_server: EmbeddedServer) -> None:
    own_server.stop()
    (own_server.data_dir / "passfile").write_text("127.0.0.1:*:*:otel:other\n")
    with pytest.raises(EmbeddedServerError, match="password authentication failed") as caught:
        own_server.start()
    assert "other" not in str(caught.value).replace("another", "")


def test_the_data_of_somebody_elses_postgresql_is_left_alone(own_server: EmbeddedServer) -> None:
    own_server.stop()
    with pytest.raises(EmbeddedServerError, match="not ours; start that and name it with --dsn"):
        EmbeddedServer(own_server.data_dir / "pgdata").start()


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedServerError, match=r"/file/data cannot be used: Not a directory .*--data-dir"):
        EmbeddedServer(tmp_path / "file" / "data").start()
