"""Dead letters: chosen, counted, replayed exactly once, purged."""

import contextlib
import datetime as dt
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, ServeSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError
from otel_pg_exporter.model import Outcome, Signal
from otel_pg_exporter.postgres.connection import Connections, connect
from otel_pg_exporter.postgres.dead_letters import DeadLetters, Selection
from otel_pg_exporter.postgres.replay import Progress, Replay
from tests.proxy import proxy_for
from tests.workload import Database, database, logs, record, span, traces

ALL = Selection()
REFUSE_SPANS = "ALTER TABLE spans ADD CONSTRAINT refused CHECK (name NOT LIKE 'bad%') NOT VALID"
ACCEPT_SPANS = "ALTER TABLE spans DROP CONSTRAINT refused"
REFUSE_LOGS = "ALTER TABLE logs ADD CONSTRAINT refused CHECK (body NOT LIKE 'bad%') NOT VALID"
ACCEPT_LOGS = "ALTER TABLE logs DROP CONSTRAINT refused"


@pytest.fixture
def opened(dsn: str) -> Iterator[Database]:
    with database(dsn) as opened:
        yield opened


@contextlib.contextmanager
def dead_letters(dsn: str) -> Iterator[DeadLetters]:
    settings = DatabaseSettings(dsn=dsn)
    with connect(settings) as connection:
        yield DeadLetters(connection, settings)


@contextlib.contextmanager
def replaying(dsn: str) -> Iterator[Replay]:
    settings = ServeSettings(database=DatabaseSettings(dsn=dsn, lock_timeout=5))
    connections = Connections(settings.database, size=2)
    try:
        yield Replay(settings, mapping.load(), connections)
    finally:
        connections.close()


def replay(dsn: str, selection: Selection = ALL, *, limit: int | None = None) -> Progress:
    with replaying(dsn) as opened:
        return [Progress(), *opened.run(selection, limit=limit)][-1]


def refuse(opened: Database, *, count: int = 3) -> None:
    """Have `count` spans and `count` equal log records refused, beside two of each that are stored."""
    opened.execute(REFUSE_SPANS, REFUSE_LOGS)
    spans = [span(number, name="good" if number < 2 else f"bad {number}") for number in range(2 + count)]
    same = record("bad")
    records = [record("good"), record("good"), *[same] * count]
    for batch in (traces(*spans), logs(*records)):
        [outcome] = opened.writer.write([batch])
        assert (outcome.stored, outcome.rejected) == (2, count)
    opened.execute(ACCEPT_SPANS, ACCEPT_LOGS)


def stored(opened: Database) -> tuple[int, int, int]:
    """Return how many spans, log records and dead letters there are; `traces` must be exact."""
    opened.assert_traces_exact()
    return opened.count("spans"), opened.count("logs"), opened.count("dead_letters")


# Replay.


def test_replayed_letters_are_stored_and_gone_and_traces_stay_exact(opened: Database) -> None:
    refuse(opened)
    assert stored(opened) == (2, 2, 6)
    assert replay(opened.dsn) == Progress(stored=6)
    assert stored(opened) == (5, 5, 0)
    assert opened.rows("SELECT span_count, error_count FROM traces") == [(5, 0)]
    assert replay(opened.dsn) == Progress()


def test_equal_records_of_one_request_are_replayed_each(opened: Database) -> None:
    refuse(opened, count=4)
    assert replay(opened.dsn, Selection(signal=Signal.LOGS), limit=1) == Progress(stored=1)
    assert replay(opened.dsn, Selection(signal=Signal.LOGS)) == Progress(stored=3)
    assert opened.rows("SELECT body, count(*) FROM logs GROUP BY 1 ORDER BY 1") == [("bad", 4), ("good", 2)]
    # They keep the request that brought them, and what its sender heard.
    assert len(opened.rows("SELECT DISTINCT request_id FROM logs")) == 1
    assert opened.rows("SELECT rejected FROM ingest_requests") == [(4,)]


def test_a_letter_whose_span_is_stored_is_a_duplicate_and_gone(opened: Database) -> None:
    refuse(opened)
    spans = opened.rows("SELECT otlp FROM dead_letters WHERE signal = 'traces'")
    opened.execute("CREATE TABLE kept AS TABLE dead_letters", "DELETE FROM dead_letters WHERE signal = 'logs'")
    assert replay(opened.dsn) == Progress(stored=len(spans))
    # As if somebody had put the letters back.
    opened.execute(
        "INSERT INTO dead_letters (signal, request_id, item_index, reason, otlp)"
        " SELECT signal, request_id, item_index, reason, otlp FROM kept WHERE signal = 'traces'"
    )
    assert replay(opened.dsn) == Progress(duplicate=3)
    assert stored(opened) == (5, 2, 0)


def test_a_letter_that_is_refused_again_stays_once_with_the_new_reason(opened: Database) -> None:
    refuse(opened)
    before = opened.rows("SELECT id, received_at, signal, request_id, item_index, otlp FROM dead_letters ORDER BY id")
    opened.execute("ALTER TABLE spans ADD CONSTRAINT afresh CHECK (name NOT LIKE 'bad%') NOT VALID")
    opened.execute("ALTER TABLE logs ADD CONSTRAINT afresh CHECK (body NOT LIKE 'bad%') NOT VALID")
    for _ in range(2):
        assert replay(opened.dsn) == Progress(refused=6)
        assert stored(opened) == (2, 2, 6)
    assert before == opened.rows(
        "SELECT id, received_at, signal, request_id, item_index, otlp FROM dead_letters ORDER BY id"
    )
    reasons = opened.rows("SELECT DISTINCT reason LIKE '%%\"afresh\"%%', sqlstate FROM dead_letters")
    assert reasons == [(True, "23514")]
    assert opened.rows("SELECT rejected FROM ingest_requests") == [(3,)]
    # Nothing of the refusal is remembered where it would keep the letters from being stored later.
    opened.execute("ALTER TABLE spans DROP CONSTRAINT afresh", "ALTER TABLE logs DROP CONSTRAINT afresh")
    assert replay(opened.dsn) == Progress(stored=6)
    assert stored(opened) == (5, 5, 0)


def test_good_letters_are_stored_beside_those_that_are_refused_again(opened: Database) -> None:
    refuse(opened, count=40)
    opened.execute("ALTER TABLE spans ADD CONSTRAINT afresh CHECK (right(name, 1) <> '7') NOT VALID")
    assert replay(opened.dsn) == Progress(stored=76, refused=4)
    assert stored(opened) == (2 + 36, 2 + 40, 4)


def test_what_the_transcoder_refuses_stays_with_its_reason(opened: Database) -> None:
    invalid = span(1)
    invalid.span_id = bytes(8)
    opened.writer.write([traces(span(0), invalid)])
    opened.execute("UPDATE dead_letters SET reason = 'lost', sqlstate = '22000'")
    assert replay(opened.dsn) == Progress(refused=1)
    assert opened.rows("SELECT reason, sqlstate FROM dead_letters") == [("span_id is all zeros", None)]
    opened.execute("UPDATE dead_letters SET otlp = ''")
    assert replay(opened.dsn) == Progress(refused=1)
    opened.execute("UPDATE dead_letters SET otlp = '\\xff'")
    assert replay(opened.dsn) == Progress(refused=1)
    assert stored(opened) == (1, 0, 1)


def test_a_replay_whose_transaction_fails_at_its_end_leaves_all_as_it_was(opened: Database) -> None:
    refuse(opened)
    # The rows are in, the letters can't go: nothing may be committed in between.
    opened.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege'; END $$",
        "CREATE TRIGGER refuse BEFORE DELETE ON dead_letters FOR EACH STATEMENT EXECUTE FUNCTION refuse()",
    )
    with pytest.raises(DeploymentError):
        replay(opened.dsn)
    assert stored(opened) == (2, 2, 6)
    opened.execute("DROP TRIGGER refuse ON dead_letters")
    assert replay(opened.dsn) == Progress(stored=6)
    assert stored(opened) == (5, 5, 0)


@pytest.mark.parametrize("signal", Signal)
def test_a_replay_whose_commit_is_never_answered_may_be_repeated(opened: Database, signal: Signal) -> None:
    refuse(opened)
    with dead_letters(opened.dsn) as table:
        letters = list(table.newest_first(Selection(signal=signal)))
        items = table.items([letter.id for letter in letters])
    with proxy_for(opened.dsn) as proxy, replaying(proxy.dsn) as through:
        batches = [through._batch(letter, items[letter.id]) for letter in letters]
        assert through._write(batches[:1]) == [Outcome(stored=1)]  # type: ignore[arg-type] # no outcome among them
        proxy.lose_commits(1)
        with pytest.raises(DatabaseUnavailableError) as lost:
            through._write(batches)  # type: ignore[arg-type] # as above
        assert lost.value.in_doubt
        assert through._write(batches) == [Outcome(duplicate=1)] * 3  # type: ignore[arg-type] # as above
    assert replay(opened.dsn) == Progress(stored=3)
    assert stored(opened) == (5, 5, 0)


def test_a_replay_that_is_killed_at_any_moment_stores_each_item_once(opened: Database) -> None:
    refuse(opened, count=30)
    stop = threading.Event()

    def kill() -> None:
        with psycopg.connect(opened.dsn, autocommit=True) as connection:
            while not stop.wait(0.002):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'otel-pg-exporter' AND datname = current_database()"
                )

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill)
        for _ in range(20):
            with contextlib.suppress(DatabaseUnavailableError):
                replay(opened.dsn, limit=7)
        stop.set()
        killing.result(10)
    replay(opened.dsn)
    assert stored(opened) == (32, 32, 0)


def test_replays_at_once_store_each_item_once(opened: Database) -> None:
    refuse(opened, count=60)
    with ThreadPoolExecutor(4) as threads:
        done = [each.result(60) for each in [threads.submit(replay, opened.dsn) for _ in range(4)]]
    assert sum(each.stored for each in done) == 120
    assert sum(each.refused for each in done) == 0
    assert stored(opened) == (62, 62, 0)


def test_a_replay_takes_large_letters_a_few_at_a_time(opened: Database) -> None:
    opened.execute(REFUSE_LOGS)
    large = "bad" + "x" * 5_000_000
    opened.writer.write([logs(record(large), record(large), record("bad"), record("bad"))])
    opened.execute(ACCEPT_LOGS)
    with replaying(opened.dsn) as replay_:
        assert [each.stored for each in replay_.run(ALL)] == [1, 4]
    assert stored(opened) == (0, 4, 0)


def test_a_record_without_a_time_keeps_that_of_its_receipt(opened: Database) -> None:
    opened.execute(REFUSE_LOGS)
    timeless = record("bad")
    timeless.time_unix_nano = 0
    opened.writer.write([logs(timeless)])
    opened.execute(ACCEPT_LOGS, "UPDATE dead_letters SET received_at = received_at - interval '1 day'")
    [(received,)] = opened.rows("SELECT received_at FROM dead_letters")
    assert replay(opened.dsn) == Progress(stored=1)
    [(time,)] = opened.rows("SELECT time FROM logs")
    assert abs(time - received) < dt.timedelta(milliseconds=1)


# Which ones.


def test_letters_are_chosen_by_every_condition_together(opened: Database) -> None:
    refuse(opened)
    opened.execute(
        "UPDATE dead_letters SET reason = 'Value too LONG', sqlstate = '22001',"
        " received_at = '2026-01-01' WHERE id IN (SELECT id FROM dead_letters ORDER BY id LIMIT 2)"
    )
    ids = [number for (number,) in opened.rows("SELECT id FROM dead_letters ORDER BY id")]
    then = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    with dead_letters(opened.dsn) as letters:

        def chosen(**conditions: object) -> list[int]:
            selection = Selection(**conditions)  # type: ignore[arg-type]
            found = [letter.id for letter in letters.newest_first(selection)]
            assert letters.total(selection).count == len(found)
            assert sum(count.count for count in letters.counts(selection)) == len(found)
            return found[::-1]

        assert chosen() == ids
        assert chosen(signal=Signal.TRACES) == ids[:3]
        assert chosen(since=then) == ids[2:]
        assert chosen(until=then) == ids[:2]
        assert chosen(reason="too long") == ids[:2]
        assert chosen(reason="100%") == []
        assert chosen(sqlstate="22001", ids=(ids[1], ids[2])) == ids[1:2]
        assert [letter.id for letter in letters.newest_first(ALL, limit=4)] == ids[:1:-1]
        assert [(each.count, each.sqlstate) for each in letters.counts(ALL)] == [
            (3, "23514"),
            (2, "22001"),
            (1, "23514"),
        ]


def test_many_letters_are_listed_in_pages(opened: Database) -> None:
    opened.execute(
        "INSERT INTO dead_letters (signal, request_id, item_index, reason, otlp)"
        " SELECT 'logs', md5(n::text)::uuid, n, 'r', 'x' FROM generate_series(1, 1201) AS n"
    )
    with dead_letters(opened.dsn) as letters:
        found = [letter.id for letter in letters.newest_first(ALL)]
        assert found == sorted(set(found), reverse=True)
        assert len(found) == 1201
        assert len(list(letters.newest_first(ALL, limit=700))) == 700
        assert list(letters.purge(ALL, limit=1100)) == [1000, 100]
        assert [letter.item_index for letter in letters.newest_first(ALL)] == list(range(1201, 1100, -1))
        assert list(letters.purge(Selection(reason="other"))) == []
        assert list(letters.purge(ALL)) == [101]
    assert opened.count("dead_letters") == 0


def test_a_missing_privilege_is_told_with_its_remedy(opened: Database) -> None:
    opened.execute("DROP TABLE dead_letters")
    with dead_letters(opened.dsn) as letters, pytest.raises(DeploymentError, match=r"42P01.*otel-pg-exporter migrate"):
        letters.total(ALL)
