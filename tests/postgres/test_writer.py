"""The write path on a real PostgreSQL: once, exactly, whatever comes twice or at the same time."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError
from otel_pg_exporter.model import Outcome, Signal
from otel_pg_exporter.telemetry import BatchReport, Statistics
from tests.workload import Database, database, decoded, logs, record, shuffled, span, traces


@pytest.fixture(params=["auto", "copy", "insert"])
def any_method(dsn: str, writer_dsn: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    with database(writer_dsn, read_dsn=dsn, method=request.param) as opened:
        yield opened


@pytest.fixture
def db(dsn: str, writer_dsn: str) -> Iterator[Database]:
    with database(writer_dsn, read_dsn=dsn) as opened:
        yield opened


def test_spans_arrive_with_their_resource_and_their_trace(any_method: Database) -> None:
    batch = traces(*(span(number) for number in range(50)))
    assert any_method.writer.write([batch]) == [Outcome(stored=50)]
    assert any_method.count("spans") == 50
    assert any_method.rows("SELECT service_name, attributes FROM resources") == [("shop", {"service.name": "shop"})]
    assert any_method.rows("SELECT span_count, root_name, service_names FROM traces") == [(50, "operation 0", ["shop"])]
    any_method.assert_traces_exact()


def test_log_records_arrive(any_method: Database) -> None:
    batch = logs(*(record(f"line {number}") for number in range(50)))
    assert any_method.writer.write([batch]) == [Outcome(stored=50)]
    assert any_method.rows("SELECT count(DISTINCT body), count(*) FROM logs") == [(50, 50)]
    assert any_method.rows(
        "SELECT request_id = (SELECT min(request_id::text)::uuid FROM logs) FROM ingest_requests"
    ) == [(True,)]


def test_a_retried_request_of_spans_stores_nothing_twice(any_method: Database) -> None:
    batch = traces(*(span(number) for number in range(50)))
    any_method.writer.write([batch])
    assert any_method.writer.write([batch]) == [Outcome(duplicate=50)]
    assert any_method.count("spans") == 50
    any_method.assert_traces_exact()


def test_a_retried_request_of_logs_stores_nothing_twice(any_method: Database) -> None:
    batch = logs(record("once"), record("once"))
    any_method.writer.write([batch])
    assert any_method.writer.write([batch]) == [Outcome(duplicate=2)]
    assert any_method.count("logs") == 2


def test_equal_requests_in_one_batch_are_stored_once(any_method: Database) -> None:
    batch, other = logs(record("once")), logs(record("other"))
    assert any_method.writer.write([batch, other, batch]) == [
        Outcome(stored=1),
        Outcome(stored=1),
        Outcome(duplicate=1),
    ]
    spans = traces(span(0), span(1))
    assert any_method.writer.write([spans, spans]) == [Outcome(stored=2), Outcome(duplicate=2)]
    assert any_method.count("spans") == any_method.count("logs") == 2


def test_a_batch_with_some_old_spans_stores_the_new_ones(any_method: Database) -> None:
    spans = [span(number) for number in range(100)]
    any_method.writer.write([traces(*spans[:30])])
    assert any_method.writer.write([traces(*spans)]) == [Outcome(stored=70, duplicate=30)]
    any_method.assert_traces_exact()


def test_the_first_of_two_spans_with_one_key_wins(db: Database) -> None:
    start = time.time_ns()
    first, second = span(0, start=start), span(0, start=start, status={"message": "other"})
    assert db.writer.write([traces(first, second)]) == [Outcome(stored=1, duplicate=1, duplicate_conflict=1)]
    assert db.rows("SELECT status_message FROM spans") == [("",)]


def test_four_writers_of_the_same_spans_in_other_orders_agree(dsn: str) -> None:
    spans = [span(number % 20, trace=1 + number // 20) for number in range(20_000)]
    with database(dsn) as db:

        def write(seed: int) -> int:
            mine = shuffled(spans, seed)
            chunks = [mine[start : start + 1000] for start in range(0, len(mine), 1000)]
            return sum(outcome.stored for chunk in chunks for outcome in db.writer.write([traces(*chunk)]))

        with ThreadPoolExecutor(4) as pool:
            stored = list(pool.map(write, range(4)))
        assert sum(stored) == 20_000
        assert db.count("spans") == 20_000
        assert db.count("traces") == 1_000
        db.assert_traces_exact()
        assert db.rows("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


def test_concurrent_retries_of_logs_are_stored_once(dsn: str) -> None:
    batches = [logs(*(record(f"{request}.{line}") for line in range(50))) for request in range(20)]
    with database(dsn) as db, ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda seed: db.writer.write(batches if seed % 2 else batches[::-1]), range(4)))
        assert sum(outcome.stored for answer in outcomes for outcome in answer) == 1_000
        assert db.count("logs") == 1_000


@pytest.mark.parametrize("position", [0, 1, 2_500, 4_999])
def test_a_poison_row_in_a_batch_of_five_thousand_loses_only_itself(db: Database, position: int) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')")
    spans = [span(number, trace=1 + number // 10) for number in range(5_000)]
    spans[position].name = "poison"
    batch = traces(*spans)
    (outcome,) = db.writer.write([batch])
    assert (outcome.stored, outcome.rejected, outcome.duplicate) == (4_999, 1, 0)
    assert f"1 of 5000 spans refused: item {position}: " in outcome.error_message
    assert "no_poison" in outcome.error_message
    assert db.count("spans") == 4_999
    assert db.rows("SELECT signal, item_index, sqlstate FROM dead_letters") == [("traces", position, "23514")]
    db.assert_traces_exact()


def test_a_dead_letter_is_a_request_that_can_be_replayed(db: Database) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')")
    good, bad = span(0), span(1, name="poison")
    db.writer.write([traces(good, bad)])
    db.execute("ALTER TABLE spans DROP CONSTRAINT no_poison")
    ((otlp,),) = db.rows("SELECT otlp FROM dead_letters")
    assert db.writer.write([decoded(Signal.TRACES, otlp)]) == [Outcome(stored=1)]
    assert db.rows("SELECT name, service_name FROM spans ORDER BY name") == [
        ("operation 0", "shop"),
        ("poison", "shop"),
    ]
    db.assert_traces_exact()


@pytest.mark.parametrize("bad", [20, 150, 2_000])
def test_many_bad_rows_among_duplicates_are_told_apart(db: Database, bad: int) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')")
    spans = [span(number) for number in range(3_000)]
    db.writer.write([traces(*spans[:100])])
    for each in shuffled(spans[100:], 7)[:bad]:
        each.name = "poison"
    (outcome,) = db.writer.write([traces(*spans)])
    assert (outcome.stored, outcome.duplicate, outcome.rejected) == (2_900 - bad, 100, bad)
    assert db.count("dead_letters") == bad
    db.assert_traces_exact()


def test_a_retry_of_a_request_with_a_bad_item_hears_the_same(db: Database) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')")
    db.execute("ALTER TABLE logs ADD CONSTRAINT no_poison CHECK (body <> 'poison')")
    spans, records = traces(span(0), span(1, name="poison")), logs(record("good"), record("poison"))
    for batch in (spans, records):
        (first,) = db.writer.write([batch])
        (second,) = db.writer.write([batch])
        assert (first.stored, first.rejected) == (1, 1)
        assert second == replace(first, stored=0, duplicate=1)
    assert db.count("dead_letters") == 2


def test_a_double_takes_the_place_of_a_refused_survivor(db: Database) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')")
    start = time.time_ns()
    bad, good = span(0, start=start), span(0, start=start)
    bad.name = "poison"
    assert [(o.stored, o.rejected) for o in db.writer.write([traces(bad), traces(good)])] == [(0, 1), (1, 0)]
    db.assert_traces_exact()


def test_a_resource_that_was_pruned_while_the_machine_slept_is_written_again(db: Database) -> None:
    db.writer._clock = lambda: time.monotonic() + 10 * 86_400
    db.writer.write([traces(span(0))])
    db.execute("DELETE FROM resources")
    db.writer.write([traces(span(1))])
    assert db.count("resources") == 0  # it is known, and nobody else removes what was seen within the last days
    db.writer._clock = time.monotonic  # as one that stood still for ten days
    db.writer.write([traces(span(2))])
    assert db.count("resources") == 1


def test_a_resource_that_is_refused_costs_only_its_own_items(db: Database) -> None:
    db.execute("ALTER TABLE resources ADD CONSTRAINT no_poison CHECK (service_name <> 'poison')")
    bad, good = traces(span(0, trace=1), service="poison"), traces(span(0, trace=2))
    assert [(o.stored, o.rejected) for o in db.writer.write([bad, good])] == [(0, 1), (1, 0)]
    db.execute("ALTER TABLE resources DROP CONSTRAINT no_poison")
    assert db.writer.write([traces(span(0, trace=3), service="poison")]) == [Outcome(stored=1)]
    assert db.count("resources") == 2


def test_a_trace_summary_that_is_refused_costs_only_its_own_spans(db: Database) -> None:
    db.execute("ALTER TABLE traces ADD CONSTRAINT no_poison CHECK (root_name <> 'poison')")
    bad = traces(span(0, trace=1, name="poison"), span(1, trace=1), span(0, trace=2))
    (outcome,) = db.writer.write([bad])
    assert (outcome.stored, outcome.rejected) == (1, 2)
    assert db.count("spans") == 1
    db.assert_traces_exact()


def test_a_refused_id_is_kept_as_a_dead_letter(db: Database) -> None:
    broken = span(1)
    broken.span_id = b"short"
    (outcome,) = db.writer.write([traces(span(0), broken)])
    assert (outcome.stored, outcome.rejected) == (1, 1)
    assert db.rows("SELECT item_index, sqlstate FROM dead_letters") == [(1, None)]


@pytest.mark.parametrize(
    ("damage", "repair", "message"),
    [
        (
            "ALTER TABLE spans ALTER COLUMN name TYPE int4 USING 0",
            "ALTER TABLE spans ALTER COLUMN name TYPE text USING ''",
            "refuses every row",
        ),
        (
            "ALTER TABLE spans ADD CONSTRAINT nothing CHECK (kind > 1000)",
            "ALTER TABLE spans DROP CONSTRAINT nothing",
            "valid ones too",
        ),
        *(
            (
                f"ALTER TABLE {table} ADD CONSTRAINT nothing CHECK (service_name{suffix} IS NULL)",
                f"ALTER TABLE {table} DROP CONSTRAINT nothing",
                f"every row of {table}, valid ones too",
            )
            for table, suffix in (("resources", ""), ("traces", "s"))
        ),
    ],
)
def test_a_table_at_fault_is_no_reason_to_refuse_rows(db: Database, damage: str, repair: str, message: str) -> None:
    db.drop_views()
    db.execute(damage)
    batch = traces(*(span(number) for number in range(200)))
    with pytest.raises(DeploymentError, match=message):
        db.writer.write([batch])
    assert db.count("dead_letters") == db.count("spans") == 0
    db.execute(repair)
    assert db.writer.write([batch]) == [Outcome(stored=200)]


def test_a_narrower_column_takes_what_still_fits(db: Database) -> None:
    db.drop_views()
    db.execute("ALTER TABLE spans ALTER COLUMN flags TYPE int4")
    spans = [span(number) for number in range(100)]
    spans[50].flags = 2**32 - 1
    (outcome,) = db.writer.write([traces(*spans)])
    assert (outcome.stored, outcome.rejected) == (99, 1)
    assert db.rows("SELECT item_index, sqlstate FROM dead_letters") == [(50, "22003")]


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        ("DROP TABLE traces CASCADE", "otel-pg-exporter migrate"),
        ("DROP TABLE spans CASCADE", "otel-pg-exporter migrate"),
        ("ALTER TABLE spans DROP COLUMN links CASCADE", "otel-pg-exporter migrate"),
        ("DROP SCHEMA otel CASCADE", "otel-pg-exporter migrate"),
    ],
)
def test_a_missing_table_is_named_with_its_remedy(db: Database, damage: str, remedy: str) -> None:
    db.execute(damage)
    with pytest.raises(DeploymentError, match=remedy):
        db.writer.write([traces(span(0))])


def test_two_spans_whose_tokens_overflow_int8_stall_nobody(db: Database) -> None:
    tokens = {"gen_ai.usage.input_tokens": 2**63 - 1}
    assert db.writer.write([traces(span(0, attributes=tokens), span(1, attributes=tokens))]) == [Outcome(stored=2)]
    assert db.writer.write([traces(span(2, attributes=tokens), span(3))]) == [Outcome(stored=2)]
    assert db.rows("SELECT gen_ai_input_tokens FROM traces") == [(3 * (2**63 - 1),)]
    db.assert_traces_exact()


def test_more_services_than_a_trace_lists_stay_exact(db: Database) -> None:
    for start in (0, 150, 75):
        db.writer.write([traces(span(n), service=f'odd "{n}" \\ name') for n in range(start, start + 80)])
    assert db.rows("SELECT cardinality(service_names) FROM traces") == [(100,)]
    db.assert_traces_exact()


def test_a_span_of_another_day_gets_its_partition(db: Database) -> None:
    yesterday = time.time_ns() - 3 * 86_400 * 10**9
    db.writer.write([traces(span(0), span(1, start=yesterday), span(2, start=1))])
    names = [name for (name,) in db.rows("SELECT tableoid::regclass::text FROM spans ORDER BY start_time")]
    assert names[0] == "spans_default"
    assert len(set(names)) == 3
    db.assert_traces_exact()


def test_a_transaction_that_waits_too_long_for_a_lock_can_be_retried(dsn: str) -> None:
    with database(dsn, settings=DatabaseSettings(lock_timeout=0.2)) as db:
        db.writer.write([traces(span(0, trace=9))])
        release, locked = threading.Event(), threading.Event()

        def hold() -> None:
            with psycopg.connect(db.dsn) as connection:
                connection.execute("LOCK TABLE otel.traces")
                locked.set()
                release.wait(30)

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait(30)
        with pytest.raises(DatabaseUnavailableError, match="55P03"):
            db.writer.write([traces(span(0))])
        release.set()
        holder.join()
        assert db.writer.write([traces(span(0))]) == [Outcome(stored=1)]


def test_statistics_add_up(db: Database) -> None:
    batch = traces(span(0), span(1))
    db.writer.write([batch])
    db.writer.write([batch])
    snapshot = db.statistics.snapshot()
    assert (snapshot.rows, snapshot.batches, snapshot.duplicates, snapshot.rejected) == (2, 2, 2, 0)
    assert snapshot.bytes > 0
    assert snapshot.p50_batch_seconds is not None
    assert "2 rows in 2 batches" in str(snapshot)


def test_a_batch_tells_why_items_were_rejected_how_many_letters_it_wrote(db: Database) -> None:
    db.execute("ALTER TABLE spans ADD CONSTRAINT short CHECK (length(name) < 100)")
    batch = traces(span(0, trace=0), span(1), span(2, name="x" * 100))
    for _ in range(2):
        assert db.writer.write([batch])[0].rejected == 2
    told = db.statistics.snapshot()
    assert told.rejections == {"invalid_id": 2, "sqlstate_23": 2}
    assert told.dead_letters == 2  # the retry adds none


def test_a_retry_of_log_records_counts_what_was_rejected_before_as_repeated(db: Database) -> None:
    db.execute("ALTER TABLE logs ADD CONSTRAINT short CHECK (length(body) < 100)")
    batch = logs(record("fine"), record("x" * 100))
    for _ in range(2):
        assert db.writer.write([batch])[0].rejected == 1
    told = db.statistics.snapshot()
    assert (told.rejections, told.dead_letters) == ({"sqlstate_23": 1, "repeated": 1}, 1)


@pytest.mark.parametrize("age", [60.0, -60.0])
def test_the_lag_is_the_age_of_the_median_trace_and_never_negative(dsn: str, age: float) -> None:
    reports: list[BatchReport] = []
    with database(dsn, statistics=Statistics(reports.append)) as db:
        end = time.time_ns() - int(age * 1e9)
        ended = [span(0, trace=trace, start=end - 1_000_000) for trace in range(1, 200)]
        db.writer.write([traces(span(0, trace=200, start=1), *ended)])
        db.writer.write([logs(record("has no lag"))])
    assert reports[0].lag == pytest.approx(max(age, 0), abs=30)
    assert reports[1].lag is None
