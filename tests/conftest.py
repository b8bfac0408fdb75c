"""Fixtures: a real PostgreSQL for each xdist worker, and databases in it.

The environment variable OTEL_PG_EXPORTER_TEST_PG chooses whose programs run: `embedded` (default), those of the
extra, `system`, Debian's newest, or those in the folder that it names. With OTEL_PG_EXPORTER_TEST_PGBOUNCER, ingest
passes through a PgBouncer.
"""

import contextlib
import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from otel_pg_exporter.postgres.embedded import EmbeddedServer, find_binaries
from otel_pg_exporter.postgres.embedded_binaries import debian_binaries
from tests.faults.servers import restartable
from tests.pgbouncer import PgBouncer, Route, pgbouncer_for, program
from tests.support import FAST, PASSWORD, as_role

# As `serve` does, before gRPC is imported: its fork handlers crashed one in a hundred of PostgreSQL's processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

VIA_PGBOUNCER = bool(os.environ.get("OTEL_PG_EXPORTER_TEST_PGBOUNCER"))

# How long an example takes is up to a busy machine, and how large it is to chance: neither is to fail a test.
settings.register_profile("busy", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("busy")

_numbers = itertools.count(1)
_ROOM = 4 * 2**30  # bytes in memory for the files of all workers' servers


@pytest.fixture(scope="session")
def binaries() -> Path:
    """Folder with the PostgreSQL programs that this run tests with."""
    chosen = os.environ.get("OTEL_PG_EXPORTER_TEST_PG", "embedded")
    if chosen == "system":
        return debian_binaries()[0]
    return find_binaries() if chosen == "embedded" else Path(chosen)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return an empty folder that the PostgreSQL user can reach, which pytest's tmp_path of root's is not."""
    folder = _new_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(binaries: Path) -> Iterator[EmbeddedServer]:
    """Return the PostgreSQL that all tests of a worker share; those that harm it take `own_server`."""
    folder = _new_folder()
    with EmbeddedServer(folder, binaries=binaries, settings=FAST) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture
def own_server(binaries: Path, open_folder: Path) -> Iterator[EmbeddedServer]:
    """Return a running PostgreSQL for one test alone, to be killed and started at will, on the same port."""
    with restartable(open_folder, binaries=binaries, settings=FAST) as running:
        yield running


@pytest.fixture
def empty_dsn(server: EmbeddedServer) -> Iterator[str]:
    """Return the DSN of an empty database."""
    with _database(server, template="template1") as dsn:
        yield dsn


@pytest.fixture
def dsn(server: EmbeddedServer, migrated: str) -> Iterator[str]:
    """Return the DSN of a database with the tables of the bundled mapping, in the schema `otel`."""
    with _database(server, template=migrated) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def pgbouncer(server: EmbeddedServer, migrated: str) -> Iterator[PgBouncer]:
    """Return a PgBouncer in front of the shared PostgreSQL, for its roles."""
    if program() is None and not VIA_PGBOUNCER:
        pytest.skip("no pgbouncer on this machine")
    with pgbouncer_for(server.url(migrated)) as running:
        yield running


@pytest.fixture(scope="session")
def as_writer(request: pytest.FixtureRequest) -> Route:
    """Return the way of ingest to a database: as the writer that `migrate --roles` has made."""
    if not VIA_PGBOUNCER:
        return functools.partial(as_role, "otel_writer")
    pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
    return lambda dsn: pgbouncer.route(as_role("otel_writer", dsn))


@pytest.fixture
def writer_dsn(dsn: str, as_writer: Route) -> str:
    """Return the DSN of ingest for the same database as `dsn`."""
    return as_writer(dsn)


@pytest.fixture(scope="session")
def migrated(server: EmbeddedServer) -> str:
    """Return the name of a migrated database with roles, to be cloned."""
    from otel_pg_exporter import mapping
    from otel_pg_exporter.config import DatabaseSettings
    from otel_pg_exporter.postgres.migrate import migrate
    from otel_pg_exporter.postgres.roles import Roles

    name, roles = "migrated", Roles()
    _execute(server, f"CREATE DATABASE {name}")
    migrate(DatabaseSettings(dsn=server.url(name)), mapping.load(), roles)
    for role in roles.names.values():
        _execute(server, f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    return name


def _new_folder() -> Path:
    """Make a folder in memory, where there is room: a database is a few hundred files, made and removed a test."""
    memory = Path("/dev/shm")
    roomy = (
        memory.is_dir()
        and shutil.disk_usage(memory).free >= _ROOM
        and not os.statvfs(memory).f_flag & os.ST_NOEXEC  # programs may be copied into it
    )
    return Path(tempfile.mkdtemp(prefix="otel-pg-exporter-", dir=memory if roomy else None))


@contextlib.contextmanager
def _database(server: EmbeddedServer, *, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.url(name)
    _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(server: EmbeddedServer, statement: str) -> None:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(statement.encode())
