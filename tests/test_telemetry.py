"""Counters add up, percentiles are those of the batches, and log lines don't flood."""

import logging
from dataclasses import replace

import pytest

from otel_pg_exporter.model import Anomaly, Signal
from otel_pg_exporter.telemetry import (
    BatchReport,
    ItemCounters,
    ItemCounts,
    RateLimitedLogger,
    Stage,
    StageClock,
    StageTime,
    Statistics,
)

_REPORT = BatchReport(
    signal=Signal.TRACES,
    rows=10,
    duplicates=2,
    conflicts=1,
    rejected=3,
    bytes=1000,
    seconds=0.5,
    repairs={Anomaly.NON_FINITE: 1},
    stages={Stage.COPY: 0.25},
    rejections={"invalid_id": 3},
    dead_letters=2,
)


def test_statistics_sum_batches_up() -> None:
    statistics = Statistics()
    for milliseconds in range(1, 101):
        statistics.record(replace(_REPORT, seconds=milliseconds / 1000))
    snapshot = statistics.snapshot()
    assert (snapshot.rows, snapshot.batches, snapshot.bytes) == (1000, 100, 100_000)
    assert (snapshot.duplicates, snapshot.duplicate_conflicts, snapshot.rejected) == (200, 100, 300)
    assert snapshot.total_seconds == pytest.approx(5.05)
    assert snapshot.rows_per_second == pytest.approx(1000 / 5.05)
    assert snapshot.p50_batch_seconds == pytest.approx(0.051)
    assert snapshot.p99_batch_seconds == pytest.approx(0.100)
    assert snapshot.repairs == {Anomaly.NON_FINITE: 100}
    assert str(snapshot).endswith("batch p50 51.0 ms, p99 100.0 ms, non_finite 100")


def test_the_stages_of_requests_and_batches_are_summed_up() -> None:
    statistics = Statistics()
    statistics.record(_REPORT)
    statistics.record(_REPORT)
    statistics.took(Stage.RECEIVE, 0.125)
    stages = statistics.snapshot().stages
    assert stages[Stage.COPY] == StageTime(count=2, seconds=0.5)
    assert stages[Stage.RECEIVE] == StageTime(count=1, seconds=0.125)
    assert stages[Stage.COMMIT] == StageTime(count=0, seconds=0.0)


def test_a_stage_that_fails_is_not_measured_and_one_that_comes_again_is_added() -> None:
    now = [0.0]
    clock = StageClock(lambda: now[0])
    for _ in range(2):
        with clock.measure(Stage.COPY):
            now[0] += 2
    with pytest.raises(ValueError, match="bad"), clock.measure(Stage.TRACES):
        raise ValueError("bad")
    assert clock.seconds == {Stage.COPY: 4.0}


def test_statistics_before_the_first_batch_have_no_percentiles() -> None:
    snapshot = Statistics().snapshot()
    assert snapshot.p50_batch_seconds is None
    assert "batch p50 -, p99 -" in str(snapshot)


def test_counters_change_all_at_once() -> None:
    counters = ItemCounters()
    counters.add(Signal.TRACES, received=3, in_flight=3)
    counters.add(Signal.TRACES, in_flight=-3, stored=2, rejected=1)
    assert counters.snapshot() == ItemCounts(received=3, stored=2, rejected=1)


def test_a_message_of_one_kind_is_logged_once_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    limited = RateLimitedLogger(logging.getLogger("test"), interval=30, clock=lambda: now[0])
    for second in range(31):
        now[0] = float(second)
        limited.log(logging.WARNING, "outage", f"away at {second}")
        limited.log(logging.WARNING, f"other {second}", "something else")
    own = [record.message for record in caplog.records if "away" in record.message]
    assert own == ["away at 0", "away at 30 (29 more like this since)"]


def test_items_are_counted_by_signal_and_those_of_all_signals_are_the_sum() -> None:
    counters = ItemCounters()
    counters.add(Signal.TRACES, received=2, stored=2)
    counters.add(Signal.LOGS, received=1, in_flight=1)
    assert counters.by_signal()[Signal.LOGS] == ItemCounts(received=1, in_flight=1)
    assert counters.snapshot() == ItemCounts(received=3, stored=2, in_flight=1)


def test_who_observes_batches_is_told_of_each() -> None:
    seen: list[BatchReport] = []
    statistics = Statistics(seen.append)
    statistics.record(_REPORT)
    statistics.record(_REPORT)
    assert seen == [_REPORT, _REPORT]
    snapshot = statistics.snapshot()
    assert (snapshot.rejections, snapshot.dead_letters) == ({"invalid_id": 6}, 4)
