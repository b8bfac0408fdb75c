"""Gates: every COPY, or every COMMIT, held by a test for as long as it likes."""

import contextlib
from collections.abc import Iterator

import psycopg

from tests.faults.servers import connect_when_ready
from tests.support import wait_until

# Rows and COMMITs wait for a lock each, which is free unless a test holds it. Log records come with an entry in the
# ledger, spans with one in `traces`.
COPY, COMMIT = 1, 2
GATES = f"""
    CREATE FUNCTION otel.gate() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock_shared(TG_ARGV[0]::int8); RETURN NEW; END';
    CREATE TRIGGER gate BEFORE INSERT ON otel.spans FOR EACH ROW EXECUTE FUNCTION otel.gate({COPY});
    CREATE TRIGGER gate BEFORE INSERT ON otel.logs FOR EACH ROW EXECUTE FUNCTION otel.gate({COPY});
    CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON otel.traces
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION otel.gate({COMMIT});
    CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON otel.ingest_requests
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION otel.gate({COMMIT});
"""
_HELD = """
    SELECT pid FROM pg_stat_activity WHERE query ~ %s AND state = 'active' AND wait_event = %s
"""


def wait_for_backend(connection: psycopg.Connection[tuple[int]], statement: str, wait_event: str) -> int:
    """Return the process id of a backend that waits in such a statement."""
    found: set[int] = set()

    def look() -> bool:
        found.update(backend for (backend,) in connection.execute(_HELD, [statement, wait_event]))
        return bool(found)

    wait_until(look)
    return found.pop()


@contextlib.contextmanager
def held(dsn: str, gate: int) -> Iterator[int]:
    """Hold every COPY, or every COMMIT, as soon as it has begun; yield the process id of such a backend."""
    connection = connect_when_ready(dsn)
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [gate])
        # INSERT: rows may take the way by a temporary table.
        yield wait_for_backend(connection, "^(COPY|INSERT)" if gate == COPY else "^COMMIT", "advisory")
    finally:
        connection.close()  # if it is not dead already; with it goes the lock
