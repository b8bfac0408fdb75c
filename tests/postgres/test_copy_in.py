"""COPY FROM STDIN whose end is not as psycopg expects it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.postgres.connection import Connection, connect
from otel_pg_exporter.postgres.copy_in import copy_in

COPY = b"COPY numbers FROM STDIN"
LAST_WORDS = b"SFATAL\0C08P01\0Mserver conn crashed?\0\0"  # as PgBouncer has them


def hand_on(source: socket.socket, target: socket.socket, last: bytes) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.sendall(last)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def with_last_words(dsn: str) -> Iterator[str]:
    """Yield the DSN of a relay for one connection, which adds an error of its own when the server ends it."""
    parts = conninfo_to_dict(dsn)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, server = (
                listener.accept()[0],
                socket.create_connection((str(parts["host"]), int(parts["port"] or 0))),
            )
            error = b"E" + (len(LAST_WORDS) + 4).to_bytes(4, "big") + LAST_WORDS
            with client, server:
                up = threading.Thread(target=hand_on, args=(client, server, b""))
                up.start()
                hand_on(server, client, error)
                up.join()

        thread = threading.Thread(target=serve)
        thread.start()
        yield make_conninfo(dsn, host="127.0.0.1", port=listener.getsockname()[1])
        thread.join(60)


def prepared(connection: Connection) -> Connection:
    connection.execute("CREATE TABLE numbers (number int4)")
    return connection


@pytest.mark.parametrize("more", [0, 10_000], ids=["at its end", "with more to come"])
def test_a_copy_that_ends_twice_is_a_lost_connection(dsn: str, more: int) -> None:
    with (
        with_last_words(dsn) as relayed,
        contextlib.closing(prepared(connect(DatabaseSettings(dsn=relayed)))) as connection,
        psycopg.connect(dsn, autocommit=True) as other,
    ):
        backend = connection.info.backend_pid

        def data() -> Iterator[bytes]:
            yield b"1\n"
            other.execute("SELECT pg_terminate_backend(%s, 60000)", [backend])
            for _ in range(more):
                yield b"2\n" * 1_000

        with pytest.raises(psycopg.OperationalError):
            copy_in(connection, COPY, data())


def test_an_error_of_the_data_s_maker_stays_what_it_is(dsn: str) -> None:
    def data() -> Iterator[bytes]:
        yield b"1\n"
        raise ValueError("no number")

    with contextlib.closing(prepared(connect(DatabaseSettings(dsn=dsn)))) as connection:
        with pytest.raises(ValueError, match="no number"):
            copy_in(connection, COPY, data())
        assert copy_in(connection, COPY, [b"1\n", b"23\n"]) == 5
