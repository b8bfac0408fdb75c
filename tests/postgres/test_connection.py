import contextlib
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError, DatabaseUnavailableError
from otel_pg_exporter.postgres.connection import Connection, Connections, _connecting, connect, watchdog
from otel_pg_exporter.postgres.dsn import mask_dsn, parse_dsn, shareable_url
from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.support import free_port


@pytest.fixture
def connections(empty_dsn: str) -> Iterator[Connections]:
    pool = Connections(DatabaseSettings(dsn=empty_dsn), size=1)
    yield pool
    pool.close()


def backend(connection: Connection) -> int:
    return connection.info.backend_pid


def copy_without_end(connection: Connection) -> None:
    with connection.cursor().copy("COPY t FROM STDIN") as copy:
        while True:
            copy.write("x" * 65_535 + "\n")


def test_a_malformed_dsn_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_dsn("postgresql://user:s3cret@host:1/db?nonsense")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_masked_dsn_shows_everything_but_the_password() -> None:
    masked = mask_dsn("postgresql://user:s3cret@host/db")
    assert "s3cret" not in masked
    assert "password=***" in masked


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://user:s3cr/et@host/db",
        "postgresql://user:12/s3cret@host/db",
        "postgresql://user:pass@s3cret@host/db",
        "postgres://user:pass@s3cret/db@host",
    ],
)
def test_a_url_whose_password_is_not_encoded_is_refused_before_it_ends_up_elsewhere(dsn: str) -> None:
    for use in (parse_dsn, mask_dsn, shareable_url):
        with pytest.raises(ConfigurationError) as caught:
            use(dsn)
        assert "s3cr" not in str(caught.value)


def test_encoded_characters_are_fine_anywhere_in_a_url() -> None:
    parts = parse_dsn("postgresql://us%40er:p%2Fa%40ss@host:5432/d%40b")
    assert parts == {"user": "us@er", "password": "p/a@ss", "host": "host", "port": "5432", "dbname": "d@b"}
    assert parse_dsn("host=a@b dbname=c@d")["dbname"] == "c@d"


@pytest.mark.parametrize(
    ("dsn", "url"),
    [
        ("postgresql://user:s3cret@host:5432/db", "postgresql://user@host:5432/db"),
        ("host=/run/postgresql dbname=db password=s3cret", "postgresql:///db?host=/run/postgresql"),
        ("postgresql://user:s3cret@one:1,two:2/db", "postgresql://user@/db?host=one%2Ctwo&port=1%2C2"),
        ("postgresql://[::1]:5432/db?sslpassword=s3cret", "postgresql:///db?host=%3A%3A1&port=5432"),
        ("service=telemetry", "postgresql:///?service=telemetry"),
        (r"user='it\'s me' passfile='/a b/it\'s'", "postgresql://it%27s%20me@/?passfile=/a%20b/it%27s"),
        ("host='' port='' dbname=db", "postgresql:///db"),
        ("", "postgresql:///"),
    ],
)
def test_a_dsn_can_be_shared_as_a_url_for_a_shell_without_its_passwords(dsn: str, url: str) -> None:
    assert shareable_url(dsn) == url
    kept = {key: value for key, value in parse_dsn(dsn).items() if value and "password" not in key}
    assert parse_dsn(url) == kept


def test_a_connect_timeout_that_is_no_number_is_refused_before_the_first_connection() -> None:
    with pytest.raises(ConfigurationError, match="connect_timeout"):
        Connections(DatabaseSettings(dsn="host=localhost connect_timeout=soon"), size=1)


def test_a_server_that_refuses_is_reported_at_once_and_without_the_password() -> None:
    pool = Connections(DatabaseSettings(dsn=f"postgresql://u:s3cret@127.0.0.1:{free_port()}/db"), size=1)
    with pytest.raises(DatabaseUnavailableError, match="no connection to PostgreSQL") as caught, pool.borrow(30):
        pass
    assert "s3cret" not in str(caught.value)


def test_a_connection_is_lent_again_after_it_came_back(connections: Connections) -> None:
    with connections.borrow(60) as connection:
        first = backend(connection)
    with connections.borrow(60) as connection:
        assert backend(connection) == first


def test_a_connection_left_inside_a_transaction_is_not_lent_again(connections: Connections) -> None:
    with connections.borrow(60) as connection:
        first = backend(connection)
        connection.execute("BEGIN")
    with connections.borrow(60) as connection:
        assert backend(connection) != first


def test_a_connection_that_the_server_closed_while_idle_is_replaced(connections: Connections, empty_dsn: str) -> None:
    with connections.borrow(60) as connection:
        first = backend(connection)
        descriptor = os.dup(connection.fileno())
    with psycopg.connect(empty_dsn, autocommit=True) as other, socket.socket(fileno=descriptor) as watched:
        other.execute("SELECT pg_terminate_backend(%s)", [first])
        watched.settimeout(60)
        watched.recv(1, socket.MSG_PEEK)  # the good-bye has arrived
    with connections.borrow(60) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_borrower_waits_for_a_busy_connection_and_then_gives_up(connections: Connections) -> None:
    with (
        connections.borrow(60),
        pytest.raises(DatabaseUnavailableError, match="all 1 connections"),
        connections.borrow(0.05),
    ):
        pass


def test_closing_the_pool_cuts_the_connection_that_stays_on_loan(connections: Connections) -> None:
    with connections.borrow(60) as connection:
        connections.close(timeout=0.05)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(DatabaseUnavailableError, match="closed"), connections.borrow(60):
        pass


def test_descriptors_beyond_the_limit_of_select_do_no_harm(connections: Connections) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while (descriptor := os.open(os.devnull, os.O_RDONLY)) < 1024:
            stack.callback(os.close, descriptor)
        stack.callback(os.close, descriptor)
        for _ in range(2):
            with connections.borrow(60) as connection:
                assert connection.fileno() > 1023
                connection.execute("SELECT 1")


def test_the_watchdog_frees_a_call_that_the_server_does_not_answer(empty_dsn: str) -> None:
    with (
        connect(DatabaseSettings(dsn=empty_dsn)) as connection,
        watchdog(connection, 0.2),
        pytest.raises(psycopg.OperationalError),
    ):
        connection.execute("SELECT pg_sleep(60)")


def test_the_watchdog_frees_a_copy_to_a_server_that_is_stopped(own_server: EmbeddedServer) -> None:
    with connect(DatabaseSettings(dsn=own_server.url("postgres"))) as connection:
        connection.execute("CREATE TEMPORARY TABLE t (x text)")
        pid = backend(connection)
        os.kill(pid, signal.SIGSTOP)
        try:
            with watchdog(connection, 0.3), pytest.raises(psycopg.OperationalError):
                copy_without_end(connection)
            assert connection.broken
        finally:
            os.kill(pid, signal.SIGCONT)


def test_the_watchdog_lets_calls_that_end_in_time_be(empty_dsn: str) -> None:
    with connect(DatabaseSettings(dsn=empty_dsn)) as connection:
        with watchdog(connection, 60):
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection_and_leaves_the_parents_alone(connections: Connections) -> None:
    with connections.borrow(60) as connection:
        parents = backend(connection)
    held, release, borrower = threading.Event(), threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with connections._changed:
            held.set()
            release.wait(60)
        borrower.set()

    thread = threading.Thread(target=hold_the_lock)
    thread.start()
    assert held.wait(60)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(120)
            with connections.borrow(60) as connection:
                connection.execute("SELECT 1")
                os.write(writing, str(backend(connection)).encode())
            connections.close()
        os._exit(0)
    os.close(writing)
    release.set()
    thread.join()
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        childs = int(pipe.read())
    assert childs != parents
    with connections.borrow(60) as connection:
        assert backend(connection) == parents
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_until_no_thread_is_inside_libpqs_connecting() -> None:
    held, forking = threading.Event(), threading.Event()

    def connect_for_a_while() -> None:
        with _connecting:
            held.set()
            forking.wait(0.1)  # nobody sets it: the fork that we hold up cannot tell us that it began

    thread = threading.Thread(target=connect_for_a_while)
    thread.start()
    assert held.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if _connecting.acquire(blocking=False) else 1)
    thread.join()
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert _connecting.acquire(blocking=False)
    _connecting.release()


def test_many_borrowers_share_few_connections(empty_dsn: str) -> None:
    pool = Connections(DatabaseSettings(dsn=empty_dsn), size=2)
    seen: set[int] = set()

    def work() -> None:
        for _ in range(20):
            with pool.borrow(30) as connection:
                connection.execute("SELECT 1")
                seen.add(backend(connection))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert len(seen) <= 2


def test_a_connection_that_was_idle_for_long_is_replaced(connections: Connections) -> None:
    with connections.borrow(60) as connection:
        first = backend(connection)
    (idle,) = connections._idle
    idle.returned -= 3600  # not the clock itself: receivers in this process go by it, too
    with connections.borrow(60) as connection:
        assert backend(connection) != first
