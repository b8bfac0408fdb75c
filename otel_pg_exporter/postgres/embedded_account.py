"""Which OS user runs the embedded PostgreSQL: we ourselves, or, since it refuses root, an unprivileged one."""

import os
import pwd
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from otel_pg_exporter.errors import EmbeddedServerError

_UNPRIVILEGED = ("postgres", "nobody")
_SHELL = "/bin/sh"

# All that PostgreSQL gets of our environment: where programs, libraries and time zones are, and the user's folder.
# Whoever else runs as its user could read the rest, secrets among it; and `postgres` would obey PGPORT and PGDATA.
_HANDED_ON = frozenset({"PATH", "HOME", "TMPDIR", "TZ", "TZDIR"})
_LINKERS = ("LD_", "DYLD_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An OS user that programs are run as; `switch` is false where that is who we are already."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen(self, command: Sequence[str | Path], *, output: int | IO[str]) -> subprocess.Popen[str]:
        """Start a program as this user, apart from our process group, so that a Ctrl-C does not reach it.

        It gets little of our environment, and speaks English.
        """
        environment = {key: value for key, value in os.environ.items() if key in _HANDED_ON or key.startswith(_LINKERS)}
        try:
            return subprocess.Popen(  # noqa: S603 - programs that find_binaries chose, and /bin/sh
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
                env={**environment, "LC_ALL": "C"},
                user=self.uid if self.switch else None,
                group=self.gid if self.switch else None,
                extra_groups=[] if self.switch else None,
                start_new_session=True,
                umask=0o077,
            )
        except OSError as exc:
            raise EmbeddedServerError(f"cannot run {command[0]} as user {self.name}: {exc.strerror}") from exc

    def run(self, command: Sequence[str | Path], *, timeout: float) -> tuple[int, str]:
        """Run a program to its end; return its exit status and what it printed."""
        with self.popen(command, output=subprocess.PIPE) as process:
            try:
                printed, _ = process.communicate(timeout=timeout)
            except BaseException as exc:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                if isinstance(exc, subprocess.TimeoutExpired):
                    raise EmbeddedServerError(f"{command[0]} did not end within {timeout:g} s") from exc
                raise
        return process.returncode, printed

    def require_name(self) -> None:
        """Raise an error with a remedy where this user has no name, as in containers: initdb refuses to run then."""
        try:
            pwd.getpwuid(self.uid)
        except KeyError as exc:
            raise EmbeddedServerError(
                f"user id {self.uid} has no name on this machine, and initdb refuses to run without one; add it to "
                "/etc/passwd, run as another user, or name a running PostgreSQL with --dsn or OTEL_PG_EXPORTER_DSN"
            ) from exc

    def can_enter(self, folder: Path) -> bool:
        """Tell whether the path down to this folder, and the folder itself, can be entered.

        The kernel is asked, because access lists and security modules know more than the mode bits.
        """
        if not self.switch:
            return True
        status, _ = self.run([_SHELL, "-c", 'cd -- "$1"', _SHELL, folder], timeout=30)
        return status == 0

    def can_run(self, program: Path) -> bool:
        """Tell whether this user may execute a program."""
        if not self.switch:
            return True
        status, _ = self.run([_SHELL, "-c", 'test -r "$1" && test -x "$1"', _SHELL, program], timeout=30)
        return status == 0


def choose_account(data_dir: Path, pgdata: Path) -> Account:
    """Return the user to run PostgreSQL as: the owner of the data where that exists, so that it never changes.

    As root, without data, that is the owner of the data folder if that is somebody else, or the first of `postgres`
    and `nobody` that exists.
    """
    owner = pgdata.stat().st_uid if pgdata.exists() else None
    if os.geteuid() != 0:
        if owner not in (None, os.geteuid()):
            raise EmbeddedServerError(
                f"the data in {pgdata} belongs to user {_name(owner or 0)}, and this process runs as "
                f"{_name(os.geteuid())}; run it as that user, or choose another data folder with --data-dir or "
                "OTEL_PG_EXPORTER_DATA_DIR"
            )
        return Account(name=_name(os.geteuid()), uid=os.geteuid(), gid=os.getegid(), switch=False)
    if owner == 0:
        raise EmbeddedServerError(
            f"the data in {pgdata} belongs to root, and PostgreSQL refuses to run as root; give it to an "
            f"unprivileged user: chown -R {_UNPRIVILEGED[0]} {pgdata}"
        )
    if owner is None and data_dir.exists():
        owner = data_dir.stat().st_uid
    return _by_uid(owner) if owner else _first_unprivileged()


def _first_unprivileged() -> Account:
    for name in _UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid, switch=True)
    raise EmbeddedServerError(
        "PostgreSQL refuses to run as root, and there is no user "
        f"{' or '.join(_UNPRIVILEGED)} to run it as; create one (useradd --system postgres), run this program as an "
        "unprivileged user, or name a running PostgreSQL with --dsn or OTEL_PG_EXPORTER_DSN"
    )


def _by_uid(uid: int) -> Account:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account(name=str(uid), uid=uid, gid=uid, switch=True)
    return Account(name=entry.pw_name, uid=uid, gid=entry.pw_gid, switch=True)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run with user ids that nobody has named
        return str(uid)
