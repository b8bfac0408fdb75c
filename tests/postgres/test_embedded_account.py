"""The OS users that the embedded PostgreSQL runs as: we ourselves, or, as root, somebody unprivileged."""

import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded import EmbeddedServer, default_data_dir
from otel_pg_exporter.postgres.embedded_account import Account, choose_account
from otel_pg_exporter.postgres.embedded_binaries import copy_binaries, packaged_binaries
from tests.support import FAST

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")

# Becomes the user argv[1], after the imports, since that user may not be able to reach this Python.
UNPRIVILEGED = f"""
import json, os, pwd, sys
from pathlib import Path
import psycopg
from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded import EmbeddedServer, default_data_dir
name, binaries, data_dir, unwritable, foreign = sys.argv[1:]
user = pwd.getpwnam(name)
os.setgroups([]); os.setgid(user.pw_gid); os.setuid(user.pw_uid)
said = {{"default": str(default_data_dir())}}
with EmbeddedServer(Path(data_dir), binaries=Path(binaries), settings={FAST!r}) as server:
    said["owner"] = os.stat(f"/proc/{{server.pid}}").st_uid
    with psycopg.connect(server.dsn) as connection:
        said["answer"] = connection.execute("SELECT 1").fetchone()[0]
for case in (unwritable, foreign):
    try:
        EmbeddedServer(Path(case), binaries=Path(binaries)).start()
    except EmbeddedServerError as exc:
        said[case] = str(exc)
print(json.dumps(said))
"""


@pytest.fixture
def nobody() -> Account:
    entry = pwd.getpwnam("nobody")
    return Account(name="nobody", uid=entry.pw_uid, gid=entry.pw_gid, switch=True)


def test_postgresql_never_runs_as_root(own_server: EmbeddedServer) -> None:
    owner = Path(f"/proc/{own_server.pid}").stat().st_uid
    assert owner != 0
    assert (own_server.data_dir / "pgdata").stat().st_uid == owner


@as_root
def test_an_unprivileged_user_runs_it_too(nobody: Account, binaries: Path, open_folder: Path, tmp_path: Path) -> None:
    open_folder.chmod(0o755)
    reachable = binaries if nobody.can_run(binaries / "postgres") else copy_binaries(binaries, open_folder)
    home, unwritable, foreign = open_folder / "home", open_folder / "unwritable", open_folder / "foreign"
    for folder in (home, unwritable, foreign, foreign / "pgdata"):
        folder.mkdir()
        folder.chmod(0o755)  # whatever the umask
    os.chown(home, nobody.uid, nobody.gid)
    printed = subprocess.check_output(
        [sys.executable, "-c", UNPRIVILEGED, nobody.name, reachable, home / "data", unwritable / "data", foreign],
        env={**os.environ, "XDG_STATE_HOME": "/somewhere/state"},
        cwd="/",
    )
    said = json.loads(printed)
    assert said["default"] == "/somewhere/state/otel-pg-exporter"
    assert (said["owner"], said["answer"]) == (nobody.uid, 1)
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    assert "Permission denied" in said[str(unwritable / "data")]
    assert "--data-dir" in said[str(unwritable / "data")]
    assert "belongs to user root, and this process runs as nobody" in said[str(foreign)]


@as_root
def test_the_owner_of_the_data_stays_the_user_that_runs_it(nobody: Account, binaries: Path, open_folder: Path) -> None:
    os.chown(open_folder, nobody.uid, nobody.gid)
    for _ in range(2):
        with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
            assert Path(f"/proc/{server.pid}").stat().st_uid == nobody.uid


@as_root
def test_a_folder_below_a_closed_one_is_refused_with_a_remedy_and_nothing_is_opened(
    binaries: Path, open_folder: Path
) -> None:
    with pytest.raises(EmbeddedServerError, match=r"who cannot enter .*/data; choose another folder .*chmod o\+x"):
        EmbeddedServer(open_folder / "data", binaries=binaries).start()
    assert stat.S_IMODE(open_folder.stat().st_mode) == 0o700
    assert open_folder.stat().st_uid == 0


@as_root
def test_a_folder_in_use_keeps_its_owner_and_mode(binaries: Path, open_folder: Path) -> None:
    open_folder.chmod(0o755)
    (open_folder / "somebody's").touch()
    with EmbeddedServer(open_folder, binaries=binaries, settings=FAST) as server:
        assert server.pid is not None
    assert stat.S_IMODE(open_folder.stat().st_mode) == 0o755
    assert (open_folder.stat().st_uid, (open_folder / "somebody's").stat().st_uid) == (0, 0)


@as_root
def test_programs_in_a_closed_folder_are_copied_next_to_the_data(tmp_path: Path, open_folder: Path) -> None:
    source = packaged_binaries()[0]
    closed = copy_binaries(source, tmp_path)
    tmp_path.chmod(0o700)
    with EmbeddedServer(open_folder, binaries=closed, settings=FAST) as server:
        program = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")[0]
        assert Path(program.decode()).is_relative_to(open_folder)
        with psycopg.connect(server.dsn) as connection:
            connection.execute("SELECT now() AT TIME ZONE 'Europe/Berlin', 'ä' ~ '[[:alpha:]]'")


@as_root
def test_links_that_the_postgresql_user_lays_are_not_followed(own_server: EmbeddedServer, tmp_path: Path) -> None:
    own_server.stop()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (own_server.data_dir / "postgres.log").unlink()
    (own_server.data_dir / "postgres.log").symlink_to(victim)
    with pytest.raises(EmbeddedServerError, match="cannot be used"):
        own_server.start()
    assert victim.read_text() == "precious"
    assert victim.stat().st_uid == 0


@as_root
def test_data_of_roots_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "pgdata").mkdir()
    with pytest.raises(EmbeddedServerError, match=r"belongs to root, and PostgreSQL refuses to run as root; .*chown"):
        choose_account(tmp_path, tmp_path / "pgdata")


def test_a_user_without_a_name_is_told_that_initdb_needs_one() -> None:
    nameless = Account(name="3999999999", uid=3_999_999_999, gid=0, switch=False)
    with pytest.raises(EmbeddedServerError, match=r"3999999999 has no name .*initdb .*/etc/passwd.*--dsn"):
        nameless.require_name()


@as_root
def test_roots_default_folder_can_be_reached_by_others() -> None:
    assert default_data_dir() == Path("/var/lib/otel-pg-exporter")


@pytest.mark.skipif(os.geteuid() == 0, reason="root has a folder of its own")
def test_the_default_folder_is_the_users_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere/state")
    assert default_data_dir() == Path("/somewhere/state/otel-pg-exporter")
