"""Where spools lie: a folder for each PostgreSQL, and in it a folder for each process.

::

    <root>/                                       0700
    └── db.example_5432_telemetry_otel-4f6c0a1b/  0700, whose requests these are
        └── 20261123T064500Z-1234/                0700, one process's
            ├── lock                              locked while that process lives; the kernel unlocks it
            ├── spool.db                          0600, with SQLite's spool.db-wal beside it
            ├── spool.db.reserve                  disk space for the removal of what has filled the disk
            └── spool.db.corrupt-…                a file that was found damaged

A folder that nobody has locked is a dead process's, and the next one takes it over. It is never taken by a process that
writes to another PostgreSQL. Symbolic links are refused, and so are folders of other users.
"""

import contextlib
import datetime as dt
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from otel_pg_exporter.errors import StartupError
from otel_pg_exporter.pipeline.spool import CORRUPT_FILES

_OTHER_FOLDER = "choose another spool_dir, or do without a spool"
_LOCK_NAME = "lock"
_ATTEMPTS = 20  # to make a folder: between that and its lock, another process may take it for a dead one's


def default_spool_dir() -> Path:
    """Return where spools lie unless told otherwise: in the user's state folder, for root in the system's."""
    if os.geteuid() == 0:
        return Path("/var/lib/otel-pg-exporter-spool")
    return platformdirs.user_state_path("otel-pg-exporter-spool")


def folder_of(root: Path, target: str) -> Path:
    """Return the folder of one PostgreSQL's spools, which is made the first time that this PostgreSQL is reached."""
    digest = hashlib.blake2b(target.encode(), digest_size=4).hexdigest()
    return root.absolute() / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', target)[:80].strip('_')}-{digest}"


class ProcessFolder:
    """One process's folder, locked for as long as this object lives."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Unlock the folder; remove it when nothing is left in it."""
        with contextlib.suppress(OSError):  # not empty: somebody takes it over
            left = {each.name for each in self.path.iterdir()}
            if left <= {_LOCK_NAME}:
                # Removed under the lock: who waits for it finds that the path leads to another file, or none.
                (self.path / _LOCK_NAME).unlink()
                self.path.rmdir()
        os.close(self._lock)

    def take_corrupt_files(self, other: "ProcessFolder") -> None:
        """Move the files that were set aside as damaged here."""
        for file in other.path.glob(CORRUPT_FILES):
            file.rename(self.path / file.name)


class SpoolFolders:
    """The folders of all processes that spool for one PostgreSQL."""

    def __init__(self, root: Path, target: str) -> None:
        """Make the folders. `target` names the PostgreSQL and the schema. Raises StartupError."""
        self.root = root.absolute()
        self.path = folder_of(root, target)
        self._own: Path | None = None
        _make(self.root)
        _make_private(self.path)

    def acquire(self) -> ProcessFolder:
        """Lock a folder that a dead process has left, else make one. Raises StartupError."""
        try:
            folder = next(self.of_dead_processes(), None) or self._new()
        except OSError as exc:
            raise StartupError(f"the spool folder {self.path} cannot be used: {exc}; {_OTHER_FOLDER}") from exc
        self._own = folder.path
        return folder

    def of_dead_processes(self) -> Iterator[ProcessFolder]:
        """Yield the folders of dead processes, each locked; who takes one releases it."""
        for path in _entries(self.path):
            if path != self._own and (folder := _lock(path)) is not None:
                yield folder

    def others(self) -> list[Path]:
        """List the folders of other PostgreSQLs in which something is left and no process is at work."""
        return [each for each in _entries(self.root) if each != self.path and next(left_behind(each), None)]

    def _new(self) -> ProcessFolder:
        for _ in range(_ATTEMPTS):
            path = self.path / f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S.%fZ}-{os.getpid()}"
            path.mkdir(0o700)
            _sync(self.path)
            if (folder := _try_lock(path)) is not None:
                return folder
        raise OSError(f"{_ATTEMPTS} new folders in it were taken away at once")


def left_behind(folder: Path) -> Iterator[Path]:
    """Yield the processes' folders in one PostgreSQL's in which something is left, and no process is at work."""
    if folder.is_symlink():
        return
    for path in _entries(folder):
        if (locked := _lock(path)) is not None:
            locked.release()
            if path.exists():
                yield path


def _entries(folder: Path) -> list[Path]:
    """List what is in a folder, if it is one that we may read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _make(folder: Path) -> os.stat_result:
    """Make a folder, or check that what is there is one."""
    try:
        folder.parent.mkdir(0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
            _sync(folder.parent)
        found = folder.lstat()
    except OSError as exc:
        raise StartupError(f"the spool folder {folder} cannot be made: {exc.strerror or exc}; {_OTHER_FOLDER}") from exc
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no folder"
        raise StartupError(f"the spool folder {folder} is {kind}; {_OTHER_FOLDER}")
    return found


def _make_private(folder: Path) -> None:
    """Make a folder that is ours alone."""
    found = _make(folder)
    if found.st_uid != os.geteuid():
        raise StartupError(f"the spool folder {folder} belongs to another user (uid {found.st_uid}); {_OTHER_FOLDER}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _lock(path: Path) -> ProcessFolder | None:
    """Lock a process's folder; None when it is not one of ours, or when its process lives."""
    try:
        found = path.lstat()
        return _try_lock(path) if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() else None
    except OSError:
        return None


def _try_lock(path: Path) -> ProcessFolder | None:
    """Lock a folder; None when another process has locked or removed it. Raises OSError when it can't be locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as opened, contextlib.suppress(BlockingIOError, FileNotFoundError):
        descriptor = os.open(path / _LOCK_NAME, flags, 0o600)
        opened.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), (path / _LOCK_NAME).lstat()):
            opened.pop_all()
            return ProcessFolder(path, descriptor)
    return None


def _sync(folder: Path) -> None:
    """Have a new entry of a folder outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
