"""Machines that fail: a disk that is full, and a primary that dies beside its synchronous standby."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from otel_pg_exporter.postgres.embedded_account import Account, choose_account
from tests.faults.servers import restartable
from tests.support import FAST, free_port, wait_until

_REPLICATING: Mapping[str, str] = {**FAST, "wal_level": "replica", "max_wal_senders": "8"}
_TIMEOUT = 60.0  # seconds


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """Yield an empty folder with a file system of its own; skip the test where mounting is not permitted."""
    folder = Path(tempfile.mkdtemp(prefix="otel-pg-exporter-disk-"))
    try:
        options = f"size={megabytes}m,mode=0755"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip(f"no small disk here: {mounted.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        folder.rmdir()


@contextlib.contextmanager
def filled(folder: Path, *, leave: int) -> Iterator[None]:
    """Fill a disk but for `leave` bytes; give the space back at the end."""
    ballast = folder / "ballast"
    state = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(state.f_bavail * state.f_frsize - leave, 1))
    try:
        yield
    finally:
        ballast.unlink()


def kill_machine(postmaster: int) -> None:
    """Kill a postmaster and all its processes at once, as if the machine had lost its power."""
    backends = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    for pid in (postmaster, *map(int, backends)):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A primary, and a standby that each COMMIT waits for."""

    primary: EmbeddedServer
    primary_dsn: str
    standby_dsn: str
    standby_log: Path

    def dsn(self, **options: str) -> str:
        """Return a DSN that names both, the primary first."""
        first, second = (psycopg.conninfo.conninfo_to_dict(each) for each in (self.primary_dsn, self.standby_dsn))
        hosts = f"{first['host']},{second['host']}"
        return make_conninfo(self.primary_dsn, host=hosts, port=f"{first['port']},{second['port']}", **options)

    def promote(self) -> None:
        """Make the standby a primary that waits for nobody."""
        with psycopg.connect(self.standby_dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("SELECT pg_promote(true, 60)")


@contextlib.contextmanager
def replicated(folder: Path, binaries: Path) -> Iterator[Pair]:
    """Yield two running servers in `folder`; skip the test where `pg_basebackup` is not installed."""
    folder.chmod(0o755)  # another user may run PostgreSQL
    with restartable(folder / "primary", binaries=binaries, settings=_REPLICATING) as primary:
        assert primary.pid is not None
        programs = Path(f"/proc/{primary.pid}/exe").resolve().parent  # which the account can run
        if not (programs / "pg_basebackup").exists():
            pytest.skip(f"no pg_basebackup in {programs}")
        password = (primary.data_dir / "passfile").read_text().strip().rpartition(":")[2]
        dsn = make_conninfo(primary.dsn, password=password)
        with _standby(folder / "standby", programs, primary, dsn) as standby_dsn:
            log = folder / "standby" / "log"
            yield Pair(primary=primary, primary_dsn=dsn, standby_dsn=standby_dsn, standby_log=log)


@contextlib.contextmanager
def _standby(folder: Path, programs: Path, primary: EmbeddedServer, dsn: str) -> Iterator[str]:
    """Clone the primary, start the clone as its synchronous standby, and yield its DSN."""
    account = choose_account(primary.data_dir, primary.data_dir / "pgdata")
    folder.mkdir(mode=0o755)
    os.chown(folder, account.uid, account.gid)
    source = make_conninfo(dsn, dbname="replication", application_name="standby")
    options = ["-R", "-X", "stream", "-c", "fast", "--no-sync"]
    clone: list[str | Path] = [programs / "pg_basebackup", "-d", source, "-D", folder / "pgdata", *options]
    status, printed = account.run(clone, timeout=_TIMEOUT)
    assert status == 0, printed
    port = free_port()
    standby_dsn = make_conninfo(dsn, port=port)
    with (folder / "log").open("w") as log, _postgres(account, programs, folder / "pgdata", port, log.fileno()):
        wait_until(lambda: _answers(standby_dsn), _TIMEOUT)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            synchronous = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'"
            wait_until(lambda: connection.execute(synchronous).fetchone() is not None, _TIMEOUT)
        yield standby_dsn


@contextlib.contextmanager
def _postgres(account: Account, programs: Path, pgdata: Path, port: int, log: int) -> Iterator[None]:
    settings = {
        **_REPLICATING,
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "port": str(port),
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    process = account.popen([programs / "postgres", "-D", pgdata, *arguments], output=log)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_TIMEOUT)


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True
