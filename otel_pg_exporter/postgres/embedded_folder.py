"""The embedded PostgreSQL's data folder: where it lies, who owns it, who uses it, and the small files beside the data.

::

    <data folder>            0700, the PostgreSQL user's
    ├── pgdata/              0700, PostgreSQL's own; made as pgdata.new, so half an initdb is never taken for a whole
    ├── passfile             0600, ours: libpq's format, with the generated password
    ├── port                 the TCP port, kept between runs
    ├── server.lock          locked while a process uses the folder; holds its process id
    ├── postgres.log         what PostgreSQL says; the file before it is postgres.log.1
    └── postgresql-18.4/     a copy of the programs, only where that user can't reach the installed ones

As root these files lie in a folder that another user owns, so symbolic links are never followed.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded_account import Account

OTHER_FOLDER = "choose another folder with --data-dir or OTEL_PG_EXPORTER_DATA_DIR"

_LOG_LIMIT = 16 * 2**20


def default_data_dir() -> Path:
    """Return where the data lies unless told otherwise.

    The user's state folder; for root one that an unprivileged user can reach, since /root mostly is closed to others.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/otel-pg-exporter")
    return platformdirs.user_state_path("otel-pg-exporter")


class DataFolder:
    """The folder of one embedded PostgreSQL. The lock file's descriptor is its only state."""

    def __init__(self, path: Path) -> None:
        # Absolute, since PostgreSQL runs in another working directory; links stay, since PostgreSQL keeps them too.
        self.path = path.absolute()
        self.pgdata = self.path / "pgdata"
        self.passfile = self.path / "passfile"
        self.log = self.path / "postgres.log"
        self._lock: int | None = None

    def prepare(self, account: Account) -> None:
        """Make the folder, or take an empty one, and check that the account can work in it.

        Only what we make ourselves, or find empty, changes its owner or mode; parents never do.
        """
        if (self.path / "PG_VERSION").exists():
            raise EmbeddedServerError(
                f"{self.path} is the data of a PostgreSQL that is not ours; start that and name it with --dsn, "
                f"or {OTHER_FOLDER}"
            )
        with translated(self.path):
            for parent in reversed(self.path.parents):
                if not parent.exists():
                    parent.mkdir(0o755)
                    if account.switch:
                        parent.chmod(0o755)  # a strict umask of root's would lock PostgreSQL out
            self.path.mkdir(0o700, exist_ok=True)
            if not any(self.path.iterdir()):
                self._give(self.path, account)
        if not account.can_enter(self.path):
            raise EmbeddedServerError(
                f"PostgreSQL refuses to run as root and would run as user {account.name}, who cannot enter "
                f"{self.path}; {OTHER_FOLDER}, such as /var/lib/otel-pg-exporter, or let {account.name} pass through "
                "every folder above it (chmod o+x)"
            )

    def lock(self) -> None:
        """Keep every other process out until `unlock`; the kernel unlocks when this process dies."""
        with translated(self.path):
            descriptor = self._open("server.lock", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                holder = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
                os.close(descriptor)
                raise EmbeddedServerError(
                    f"the data folder {self.path} is in use by the process {holder}; stop that, or {OTHER_FOLDER}"
                ) from exc
            except OSError:
                os.close(descriptor)
                raise
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            self._lock = descriptor

    def holder(self) -> str | None:
        """Return the process id of the process that has locked the folder, None where nobody has."""
        try:
            descriptor = os.open(self.path / "server.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        finally:
            os.close(descriptor)
        return None

    def unlock(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def fresh_pgdata(self, account: Account) -> Path:
        """Make an empty folder for initdb; what an interrupted one has left is removed."""
        fresh = self.path / "pgdata.new"
        with translated(self.path):
            if fresh.exists():
                shutil.rmtree(fresh)
            fresh.mkdir(0o700)
            self._give(fresh, account)
        return fresh

    @contextlib.contextmanager
    def password_for_initdb(self, password: str, account: Account) -> Iterator[Path]:
        """Keep the password in a file that the account can read while the block runs."""
        path = self.path / "password.new"
        self._write(path.name, password)
        try:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
            yield path
        finally:
            path.unlink()

    def keep_password(self, user: str, password: str) -> None:
        """Write the passfile, whole or not at all."""
        self._write("passfile.new", f"127.0.0.1:*:*:{user}:{password}\n")
        with translated(self.path):
            (self.path / "passfile.new").rename(self.passfile)

    def password(self) -> str:
        """Read the password back from the passfile."""
        try:
            return self.passfile.read_text().strip().rpartition(":")[2]
        except OSError as exc:
            raise EmbeddedServerError(
                f"the password in {self.passfile} cannot be read ({exc.strerror}); restore that file (mode 0600, "
                f"owned by the user that runs this process), or {OTHER_FOLDER}"
            ) from exc

    @property
    def port(self) -> int | None:
        """The port of the last run."""
        try:
            return int((self.path / "port").read_text())
        except (OSError, ValueError):
            return None

    @port.setter
    def port(self, port: int) -> None:
        self._write("port", f"{port}\n")

    def open_log(self, account: Account) -> int:
        """Open the log for PostgreSQL to append to; the caller closes the descriptor."""
        with translated(self.path):
            with contextlib.suppress(FileNotFoundError):
                if self.log.lstat().st_size > _LOG_LIMIT:
                    self.log.rename(self.log.with_name("postgres.log.1"))
            descriptor = self._open(self.log.name, os.O_WRONLY | os.O_APPEND)
            os.fchown(descriptor, account.uid, account.gid)
        return descriptor

    def log_size(self) -> int:
        """Return the size of the log, to be given to `log_since`."""
        return self.log.stat().st_size

    def log_since(self, offset: int, lines: int = 10) -> str:
        """Return the last lines that were logged after `offset`."""
        with self.log.open("rb") as log:
            log.seek(offset)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def _give(self, path: Path, account: Account) -> None:
        """Make a folder the account's, and nobody else's."""
        if account.switch:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
        if path.stat().st_uid == account.uid:
            path.chmod(0o700)

    def _open(self, name: str, flags: int) -> int:
        return os.open(self.path / name, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _write(self, name: str, text: str) -> None:
        """Write a small file of mode 0600, and have it on the disk before we go on."""
        with translated(self.path), os.fdopen(self._open(name, os.O_WRONLY | os.O_TRUNC), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn an OSError into an error that names the data folder and the way out."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        where = f" ({exc.filename})" if exc.filename else ""
        raise EmbeddedServerError(f"the data folder {path} cannot be used: {reason}{where}; {OTHER_FOLDER}") from exc
