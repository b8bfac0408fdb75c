"""A PostgreSQL of our own: made, started, adopted, revived and stopped, on a loopback port.

The server is a child in a session of its own, so a Ctrl-C sent to our process group does not end it before we have
drained. It therefore outlives us when we die hard (SIGKILL, out of memory): it keeps its data safe and idle, and the
next start on the same data folder adopts it. Nothing else ends it.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded_account import Account, choose_account
from otel_pg_exporter.postgres.embedded_binaries import (
    copy_binaries,
    find_binaries,
    major_of,
    server_version,
)
from otel_pg_exporter.postgres.embedded_folder import OTHER_FOLDER, DataFolder, default_data_dir, translated
from otel_pg_exporter.postgres.embedded_process import HAS_PROC, POLL, Adopted, Child, Postmaster, read_postmaster_file

__all__ = ["EmbeddedServer", "default_data_dir", "find_binaries", "running_dsn"]

logger = logging.getLogger(__name__)

DATABASE = "otel"
USER = "otel"

_HOST = "127.0.0.1"
_ATTEMPTS = 20  # launches, when ports get taken or the processes of a killed server linger
_BUILTIN_LOCALES = 17  # the first major version whose C.UTF-8 needs neither ICU nor the C library's locales

# What libpq would else take from the environment, where it is meant for other servers. Two things a DSN cannot outdo:
# PGSERVICE and PGREQUIREAUTH.
_OVERRIDES = {
    "password": "",  # then libpq looks into the passfile
    "options": "",
    "sslmode": "disable",
    "gssencmode": "disable",
    "channel_binding": "prefer",
    "target_session_attrs": "any",
}

_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": _HOST,
        "unix_socket_directories": "",
        "timezone": "UTC",
        "log_timezone": "UTC",
        # What a client did wrong is the client's to log, and may hold telemetry. LOG, FATAL and PANIC remain.
        "log_min_messages": "log",
        "log_checkpoints": "off",
        "logging_collector": "off",
        "log_line_prefix": "%m [%p] ",
    }
)


def running_dsn(data_dir: Path | None) -> str | None:
    """Return the DSN of the server that another process of ours keeps running there, None where none does."""
    folder = DataFolder(data_dir or default_data_dir())
    with contextlib.suppress(OSError):  # another user's, or no folder
        if folder.holder() is not None and (port := folder.port) is not None:
            return _in_full(_url(folder, port, DATABASE))
    return None


def _url(folder: DataFolder, port: int, database: str) -> str:
    return f"postgresql://{USER}@{_HOST}:{port}/{database}?passfile={quote(str(folder.passfile))}"


def _in_full(url: str) -> str:
    """Write a DSN that leaves PG* in the environment no say."""
    return make_conninfo(url, hostaddr=_HOST, **_OVERRIDES)


class EmbeddedServer:
    """One PostgreSQL and its data folder; a context manager that starts and stops it.

    `_lock` protects `_postmaster`, `_port` and the life cycle: one of start, stop and revive at a time.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        binaries: Path | None = None,
        settings: Mapping[str, str] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        """Describe a server; nothing is touched before `start`.

        `binaries` is a folder with `postgres` and `initdb` (default: `find_binaries`), `settings` are added to
        PostgreSQL's own (a server that is adopted keeps those it has), `start_timeout` is in seconds and includes
        crash recovery.
        """
        self._folder = DataFolder(data_dir)
        self._binaries = binaries
        self._settings = {**_SETTINGS, **(settings or {})}
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._postmaster: Postmaster | None = None
        self._port = 0

    @property
    def data_dir(self) -> Path:
        """The data folder."""
        return self._folder.path

    @property
    def dsn(self) -> str:
        """The database's URL, without a password: libpq reads it from the passfile."""
        return self.url(DATABASE)

    def url(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return _url(self._folder, self._port, database)

    @property
    def own_dsn(self) -> str:
        """The DSN for connections of this process, which says in full what PG* in the environment may say otherwise."""
        return _in_full(self.dsn)

    @property
    def pid(self) -> int | None:
        """Process id of the running postmaster."""
        postmaster = self._postmaster
        return postmaster.pid if postmaster is not None else None

    def start(self) -> str:
        """Start the server, or adopt the one that a killed process has left; return its DSN.

        Raises EmbeddedServerError, which says what to do.
        """
        with self._lock:
            if self._postmaster is not None:
                self._revive()
                return self.dsn
            with translated(self.data_dir):
                account = choose_account(self._folder.path, self._folder.pgdata)
            self._folder.prepare(account)
            self._folder.lock()
            try:
                if not self._adopt():
                    self._launch(account)
                self._create_database()
            except BaseException:
                self._stop(timeout=10.0)
                raise
            return self.dsn

    def stop(self, timeout: float = 30.0) -> None:
        """Stop the server: SIGINT, which ends its sessions and writes a checkpoint, and after `timeout` SIGQUIT.

        Does nothing where none runs. Raises EmbeddedServerError if it does not end even then.
        """
        with self._lock:
            self._stop(timeout=timeout)

    def cancel(self) -> None:
        """Let a `start` or `revive` that waits for the server in another thread fail soon; `stop` is to follow."""
        self._cancelled.set()

    def abandon(self) -> None:
        """Tell the server to stop, and wait for nothing: for a process that is about to end at once.

        Never waits for a lock, so a signal handler may call it.
        """
        postmaster = self._postmaster
        if postmaster is not None:
            postmaster.send(signal.SIGINT)

    def revive(self) -> bool:
        """Start the server again if it died by itself; tell whether it had. The DSN stays, if the port is still free.

        Raises EmbeddedServerError if it cannot be started; call again later then.
        """
        with self._lock:
            return self._revive()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _revive(self) -> bool:
        if self._postmaster is None or not self._postmaster.wait(0):
            return False
        logger.warning("the embedded PostgreSQL died (process %d); starting it again", self._postmaster.pid)
        if not self._adopt():
            self._launch(choose_account(self._folder.path, self._folder.pgdata))
        return True

    def _usable_binaries(self, account: Account) -> Path:
        """Return programs that the account can run and that fit the data."""
        version_file = self._folder.pgdata / "PG_VERSION"
        major = major_of(version_file.read_text()) if version_file.exists() else None
        folder = self._binaries or find_binaries(major)
        found = server_version(folder)
        if major not in (None, major_of(found)):
            raise EmbeddedServerError(
                f"the data in {self._folder.path} was written by PostgreSQL {major}, and {folder} is version {found}; "
                f"use PostgreSQL {major}, or {OTHER_FOLDER}"
            )
        if account.can_run(folder / "postgres"):
            return folder
        with translated(self.data_dir):
            return copy_binaries(folder, self._folder.path)

    def _initialise(self, binaries: Path, account: Account) -> None:
        """Run initdb, once."""
        if self._folder.pgdata.exists():
            return
        account.require_name()
        logger.info("creating the embedded PostgreSQL in %s", self._folder.path)
        locale = ["--no-locale"]
        if major_of(server_version(binaries)) >= _BUILTIN_LOCALES:
            locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        sync = ["--no-sync"] if self._settings.get("fsync") == "off" else []
        fresh = self._folder.fresh_pgdata(account)
        password = secrets.token_urlsafe(32)
        with self._folder.password_for_initdb(password, account) as password_file:
            status, printed = account.run(
                [
                    *(binaries / "initdb", "-D", fresh, f"--username={USER}", f"--pwfile={password_file}"),
                    *("--auth=scram-sha-256", "--encoding=UTF8", "--data-checksums", *locale, *sync),
                ],
                timeout=self._start_timeout,
            )
        if status != 0:
            last = "\n".join(printed.splitlines()[-10:])
            raise EmbeddedServerError(f"initdb failed in {self._folder.path} (exit status {status}):\n{last}")
        self._folder.keep_password(USER, password)
        fresh.rename(self._folder.pgdata)

    def _launch(self, account: Account) -> None:
        """Start `postgres` and wait until it takes connections."""
        binaries = self._usable_binaries(account)
        self._initialise(binaries, account)
        deadline = time.monotonic() + self._start_timeout
        for attempt in range(1, _ATTEMPTS + 1):
            port = _free_port(self._port or self._folder.port)
            log_start = self._spawn(binaries, account, port)
            if self._becomes_ready(deadline):
                self._port = self._folder.port = port
                return
            # It ended. Its port was taken in between, or the backends of a killed server still hold its memory:
            # both pass. Everything else is final.
            said = self._folder.log_since(log_start)
            lingering = "shared memory" in said  # English on any machine: its locale is C
            if attempt == _ATTEMPTS or not (lingering or not _is_free(port)):
                raise EmbeddedServerError(f"PostgreSQL did not start; the end of {self._folder.log}:\n{said}")
            if lingering:
                threading.Event().wait(POLL * attempt)

    def _spawn(self, binaries: Path, account: Account, port: int) -> int:
        """Run `postgres` as a child; return where in the log its words begin."""
        settings = {**self._settings, "port": str(port)}
        log = self._folder.open_log(account)
        try:
            log_start = self._folder.log_size()
            command: list[str | Path] = [binaries / "postgres", "-D", self._folder.pgdata]
            command += [f"--{key}={value}" for key, value in settings.items()]
            process = account.popen(command, output=log)
        finally:
            os.close(log)
        self._postmaster = Child(process)
        return log_start

    def _becomes_ready(self, deadline: float) -> bool:
        """Wait for the child until it takes connections; tell False when it has ended instead."""
        postmaster = self._postmaster
        while postmaster is not None and not postmaster.wait(POLL):
            self._check_cancelled()
            state = read_postmaster_file(self._folder.pgdata)
            if state is not None and state.pid == postmaster.pid and state.status == "ready":
                return True
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"PostgreSQL was not ready within {self._start_timeout:g} s; the end of {self._folder.log}:\n"
                    f"{self._folder.log_since(0)}"
                )
        return False

    def _adopt(self) -> bool:
        """Take over the server that a killed process has left running; clear up after one that is gone."""
        state = read_postmaster_file(self._folder.pgdata)
        if state is None:
            return False
        postmaster = Adopted.of(state.pid, self._folder.pgdata)
        deadline = time.monotonic() + self._start_timeout
        while postmaster is not None and not postmaster.wait(POLL):
            self._check_cancelled()
            state = read_postmaster_file(self._folder.pgdata)
            if state is not None and state.status == "ready":
                self._port = state.port
                self._verify(state.pid)
                self._postmaster = postmaster
                logger.info("adopted the embedded PostgreSQL that was left running (process %d)", state.pid)
                return True
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"the PostgreSQL that was left running on {self._folder.path} (process {postmaster.pid}) neither "
                    f"starts nor ends; end it with: kill -QUIT {postmaster.pid}"
                )
        # PostgreSQL itself would refuse to start if an unrelated process had got the old one's id meanwhile. We hold
        # the folder's lock, and that process does not run in pgdata.
        if HAS_PROC:
            (self._folder.pgdata / "postmaster.pid").unlink(missing_ok=True)
        return False

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise EmbeddedServerError("the start of the embedded PostgreSQL was cancelled")

    def _verify(self, pid: int) -> None:
        """Make sure that what answers on the port is the server of this data folder."""
        with self._connect() as connection:
            row = connection.execute("SELECT current_setting('data_directory')").fetchone()
        if row is None or not Path(str(row[0])).samefile(self._folder.pgdata):
            raise EmbeddedServerError(
                f"port {self._port} is served by another PostgreSQL than process {pid} on {self._folder.path}; "
                f"end that process, or {OTHER_FOLDER}"
            )

    def _create_database(self) -> None:
        with self._connect() as connection:
            if connection.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """Connect to the maintenance database."""
        dsn = _in_full(self.url("postgres"))
        try:
            return psycopg.connect(dsn, password=self._folder.password(), connect_timeout=10, autocommit=True)
        except psycopg.OperationalError as exc:
            raise EmbeddedServerError(
                f"the embedded PostgreSQL in {self._folder.path} refuses a connection: {' '.join(str(exc).split())}"
            ) from exc

    def _stop(self, *, timeout: float) -> None:
        """End the server, if there is one, and let go of the folder."""
        postmaster = self._postmaster
        if postmaster is not None:
            for number, patience in ((signal.SIGINT, timeout), (signal.SIGQUIT, 10.0)):
                postmaster.send(number)
                if postmaster.wait(patience):
                    break
                logger.warning("PostgreSQL did not end within %g s of %s", patience, number.name)
            else:
                raise EmbeddedServerError(
                    f"PostgreSQL (process {postmaster.pid}) does not end; see {self._folder.log}, then: "
                    f"kill -KILL {postmaster.pid}"
                )
            self._postmaster = None
        self._cancelled.clear()
        self._folder.unlock()


def _free_port(wanted: int | None) -> int:
    """Return `wanted` if it is free, else any free port."""
    if wanted is not None and _is_free(wanted):
        return wanted
    with socket.create_server((_HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    try:
        with socket.create_server((_HOST, port)):
            return True
    except OSError:
        return False
