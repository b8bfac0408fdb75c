"""PgBouncer in front of a test's PostgreSQL, pooling by transaction, with few connections that go round."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from otel_pg_exporter.postgres.embedded_account import choose_account
from otel_pg_exporter.postgres.roles import Roles
from tests.support import PASSWORD, wait_until

Route = Callable[[str], str]  # from a DSN to the same database on another way

# No ignore_startup_parameters: what we send when we connect is what it knows.
_CONFIGURATION = """
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 3
server_round_robin = 1
"""


def program() -> str | None:
    """Return PgBouncer's path; Debian's lies where not every user looks."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class PgBouncer:
    """One in front of a DSN's server, for the roles of `migrate --roles`; to be entered."""

    def __init__(self, dsn: str, folder: Path, port: int) -> None:
        server = conninfo_to_dict(dsn)
        self._port = port
        self._configuration, self._log = folder / "pgbouncer.ini", folder / "log"
        self._configuration.write_text(
            _CONFIGURATION.format(host=server["host"], port=server["port"], listen_port=port, folder=folder)
        )
        (folder / "users").write_text("".join(f'"{role}" "{PASSWORD}"\n' for role in Roles().names.values()))
        self._account = choose_account(folder, folder / "data")
        for path in (folder, *folder.iterdir()):
            os.chown(path, self._account.uid, self._account.gid)
        self._start()

    def _start(self) -> None:
        with self._log.open("a") as log:
            self._process = self._account.popen([str(program()), self._configuration], output=log)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def route(self, dsn: str) -> str:
        """Return the DSN of the same database by way of this PgBouncer."""
        return make_conninfo(dsn, host="127.0.0.1", port=self._port)

    def restart(self) -> None:
        """Kill it, and with it all connections, and start it anew."""
        self.stop(signal.SIGKILL)
        self._start()

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(by)
        self._process.wait(30)


@contextlib.contextmanager
def pgbouncer_for(dsn: str) -> Iterator[PgBouncer]:
    """Run one in front of a DSN's server."""
    with tempfile.TemporaryDirectory(prefix="otel-pg-exporter-") as folder, socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))  # but it does not listen: so PgBouncer, with the same option, may have it, too
        running = PgBouncer(dsn, Path(folder), reserved.getsockname()[1])
        try:
            yield running
        finally:
            running.stop()
