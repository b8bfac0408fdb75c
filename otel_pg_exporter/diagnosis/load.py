"""What strains the database or will: sizes, transactions that hold things up, ids that run out, slots that hold WAL."""

from collections.abc import Iterator

from otel_pg_exporter.diagnosis.asking import Database
from otel_pg_exporter.diagnosis.finding import Check, Finding, ok, problem, warning
from otel_pg_exporter.postgres.operations import size

_LONG_TRANSACTION = "5 minutes"
_OLD_IDS, _DANGEROUS_IDS = 1_000_000_000, 1_800_000_000  # of some two thousand million
_MUCH_WAL = 2**30  # bytes


def load_checks(database: Database) -> list[tuple[str, Check]]:
    """Return the checks, each with its subject."""
    return [
        ("sizes", lambda: _sizes(database)),
        ("transactions", lambda: _transactions(database)),
        ("locks", lambda: _locks(database)),
        ("transaction ids", lambda: _transaction_ids(database)),
        ("replication slots", lambda: _replication_slots(database)),
    ]


def _sizes(database: Database) -> Iterator[Finding]:
    whole, spans, logs, may_see_wal = database.row(
        "SELECT pg_database_size(current_database()),"
        " (SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class AS c WHERE c.relnamespace = n.oid"
        "  AND c.relkind = 'r' AND c.relname LIKE 'spans\\_%%'),"
        " (SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class AS c WHERE c.relnamespace = n.oid"
        "  AND c.relkind = 'r' AND c.relname LIKE 'logs\\_%%'),"
        " has_function_privilege('pg_ls_waldir()', 'EXECUTE')"
        " FROM (SELECT to_regnamespace(quote_ident(%s))::oid AS oid) AS n",
        database.schema,
    )
    said = f"the database has {size(whole)}, of which spans {size(spans or 0)} and logs {size(logs or 0)}"
    if may_see_wal:
        said += f"; WAL {size(database.value('SELECT coalesce(sum(size), 0) FROM pg_ls_waldir()'))}"
    yield ok("sizes", f"{said}; how much room the server's disk has, SQL does not tell")


def _transactions(database: Database) -> Iterator[Finding]:
    rows = database.rows(
        "SELECT pid, usename, coalesce(nullif(application_name, ''), '?'), state,"
        " extract(epoch FROM now() - xact_start)::int8 FROM pg_stat_activity"
        f" WHERE backend_type = 'client backend' AND xact_start < now() - interval '{_LONG_TRANSACTION}'"
        " AND datname = current_database() ORDER BY xact_start LIMIT 5"
    )
    for pid, user, application, state, seconds in rows:
        yield warning(
            "transactions",
            f"process {pid} of {user} ({application}, {state}) is in one since {seconds:,} s, which holds up vacuum, "
            "and partitions where it has locks",
            f"end it there, or SELECT pg_terminate_backend({pid});",
        )
    prepared = database.value("SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()")
    if prepared:
        yield warning(
            "transactions",
            f"{prepared} prepared transactions wait for somebody to finish them",
            "SELECT * FROM pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED",
        )
    if not rows and not prepared:
        yield ok("transactions", f"none is older than {_LONG_TRANSACTION}, as far as this role may see")


def _locks(database: Database) -> Iterator[Finding]:
    rows = database.rows(
        "SELECT l.pid, c.relname, l.mode, pg_blocking_pids(l.pid) FROM pg_locks AS l"
        " JOIN pg_class AS c ON c.oid = l.relation JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE NOT l.granted AND n.nspname = %s AND l.database = (SELECT oid FROM pg_database"
        " WHERE datname = current_database()) ORDER BY l.pid LIMIT 5",
        database.schema,
    )
    for pid, table, mode, blockers in rows:
        those = ", ".join(map(str, blockers)) or "others in the queue"
        yield warning(
            "locks",
            f"process {pid} waits for {mode} on {table}, held up by {those}",
            "SELECT pid, state, query FROM pg_stat_activity WHERE pid IN ("
            f"{', '.join(map(str, blockers)) or pid}); then pg_cancel_backend or pg_terminate_backend",
        )
    if not rows:
        yield ok("locks", "nobody waits for our tables")


def _transaction_ids(database: Database) -> Iterator[Finding]:
    oldest = database.value(
        "SELECT greatest(age(datfrozenxid), mxid_age(datminmxid)) FROM pg_database WHERE datname = current_database()"
    )
    if oldest < _OLD_IDS:
        yield ok("transaction ids", f"the oldest is {oldest:,} back, of some 2,000,000,000")
        return
    grade = problem if oldest >= _DANGEROUS_IDS else warning
    yield grade(
        "transaction ids",
        f"the oldest is {oldest:,} back; before 2,000,000,000 PostgreSQL takes no more writes",
        "VACUUM (FREEZE) the oldest tables (SELECT oid::regclass, age(relfrozenxid) FROM pg_class WHERE relkind IN "
        "('r', 'm', 't') ORDER BY 2 DESC LIMIT 10), and end what keeps autovacuum from it",
    )


def _replication_slots(database: Database) -> Iterator[Finding]:
    rows = database.rows(
        "SELECT slot_name, active, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn()"
        " ELSE pg_current_wal_lsn() END, restart_lsn)::int8 FROM pg_replication_slots WHERE restart_lsn IS NOT NULL"
    )
    heavy = [(name, active, held) for name, active, held in rows if held is not None and held > _MUCH_WAL]
    for name, active, held in heavy:
        yield warning(
            "replication slots",
            f"{name} ({'active' if active else 'nobody reads it'}) holds {size(held)} of WAL on the server's disk",
            "" if active else f"start its reader, or SELECT pg_drop_replication_slot('{name}');",
        )
    if not heavy:
        yield ok("replication slots", f"{len(rows)}, none of which holds much WAL" if rows else "none")
