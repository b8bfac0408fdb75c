"""The drain: oldest first, each signal apart, nothing twice, and no request keeps the others waiting."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.errors import (
    DatabaseUnavailableError,
    DeploymentError,
    OutageError,
    OverloadedError,
    RetryableError,
)
from otel_pg_exporter.model import Outcome, RowBatch, Signal, Window
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import compile_plan
from tests.pipeline.spools import damage, opened
from tests.support import wait_until
from tests.workload import database, log_body, record, span, trace_body

PLANS = {signal: compile_plan(mapping.load(), signal, Window()) for signal in Signal}
DAY = 86_400 * 10**9
TTL = 7 * 86_400.0
NOW = time.time_ns()


def request(
    number: int, signal: Signal = Signal.TRACES, *, age: int = 0, in_doubt: bool = False, count: int = 2
) -> SpoolRecord:
    """Return a request of `count` items; its number is in its id, and it was received `age` nanoseconds ago."""
    if signal is Signal.TRACES:
        body = trace_body([span(item, trace=number + 1) for item in range(count)])
    else:
        body = log_body([record(f"{number}.{item}") for item in range(count)])
    return SpoolRecord(
        signal=signal,
        request_id=number.to_bytes(16, "big"),
        received_at=NOW - age + number,
        item_count=count,
        in_doubt=in_doubt,
        otlp=body,
    )


def number_of(batch: RowBatch) -> int:
    return int.from_bytes(batch.request_id, "big")


@dataclass(slots=True)
class Table:
    """What plays PostgreSQL: it raises what it is told for a request or a signal, and keeps what it has committed."""

    spool: Spool
    errors: dict[int | Signal, list[Exception]] = field(default_factory=dict)
    written: list[list[int]] = field(default_factory=list)
    doubts: list[list[bool]] = field(default_factory=list)  # of each attempt, while it is made
    away: bool = False
    probes: int = 0

    def __call__(self, batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        wanted = {batch.request_id for batch in batches}
        stored = [each for each in self.spool.following(0) if each.record and each.record.request_id in wanted]
        self.doubts.append([each.in_doubt_since is not None for each in stored])
        keys: list[int | Signal] = [batches[0].signal, *map(number_of, batches)]
        for key in keys:
            if self.errors.get(key):
                raise self.errors[key].pop(0)
        self.written.append([number_of(batch) for batch in batches])
        return [Outcome(stored=batch.item_count) for batch in batches]

    def probe(self) -> None:
        self.probes += 1
        if self.away:
            raise OutageError("away")

    @property
    def all_written(self) -> list[int]:
        return [number for together in self.written for number in together]


@dataclass(slots=True)
class House:
    """A spool, what it is drained into, and a drain that has not begun."""

    spool: Spool
    table: Table
    stack: ExitStack
    counters: ItemCounters = field(default_factory=ItemCounters)
    availability: Availability = field(default_factory=Availability)

    def put(self, *records: SpoolRecord) -> None:
        for each in records:
            assert self.spool.append(each)
            count = each.item_count
            self.counters.add(each.signal, received=count, in_spool=count, spooled=count)

    def drain(self, write: object = None) -> Drain:
        drain = Drain(
            self.spool,
            SpoolWriter(
                PLANS,
                self.availability.observe(write or self.table),  # type: ignore[arg-type] # tests pass what they have
                probe=self.table.probe,
                counters=self.counters,
                availability=self.availability,
                ledger_ttl=TTL,
            ),
            self.counters,
        )
        self.stack.callback(drain.stop, 60)
        return drain

    def wait_empty(self, left: int = 0) -> None:
        wait_until(lambda: self.spool.level.requests <= left)
        wait_until(lambda: self.counters.snapshot().in_spool == self.spool.level.items)
        assert self.counters.snapshot().balanced


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(tmp_path) as spool, ExitStack() as stack:
        yield House(spool=spool, table=Table(spool=spool), stack=stack)


def doubted(house: House) -> list[bool]:
    return [each.in_doubt_since is not None for each in house.spool.following(0)]


def test_the_oldest_are_written_first_and_counted_once(house: House) -> None:
    house.put(*(request(number) for number in (3, 1, 2, 0)), request(9, Signal.LOGS, count=5))
    house.drain()
    house.wait_empty()
    assert [number for number in house.table.all_written if number < 9] == [0, 1, 2, 3]
    counts = house.counters.snapshot()
    assert (counts.stored, counts.drained, counts.in_spool, counts.spooled) == (13, 13, 0, 13)
    house.put(request(10))  # what comes later is found, too
    house.wait_empty()
    assert house.table.all_written[-1] == 10


def test_a_signal_whose_table_is_missing_does_not_hold_up_the_other(house: House) -> None:
    house.table.errors[Signal.LOGS] = [DeploymentError("no table") for _ in range(2)]
    house.put(request(1, Signal.LOGS), *(request(number) for number in range(10, 30)))
    house.drain()
    wait_until(lambda: house.spool.level.requests <= 1)
    house.wait_empty()
    assert sorted(house.table.all_written) == [1, *range(10, 30)]


def test_while_postgresql_is_away_nothing_is_put_in_doubt(house: House) -> None:
    house.table.away = True
    house.availability.note_silence(Signal.LOGS)
    house.availability.note_silence(Signal.TRACES)
    house.put(request(1, Signal.LOGS), request(2))
    house.drain()
    wait_until(lambda: house.table.probes >= 3)
    assert doubted(house) == [False, False]
    assert house.table.doubts == []
    house.table.away = False
    house.wait_empty()
    assert not house.availability.is_down(Signal.LOGS)


def test_log_requests_are_in_doubt_while_they_are_written_and_no_longer_after_a_clear_failure(house: House) -> None:
    failed = threading.Event()

    def write(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        try:
            return house.table(batches)
        except OutageError:
            failed.set()
            house.table.away = True
            raise

    house.table.errors[Signal.LOGS] = [OutageError("away")]
    house.put(request(1, Signal.LOGS), request(2, Signal.LOGS, in_doubt=True))
    house.drain(write)
    assert failed.wait(10)
    wait_until(lambda: doubted(house) == [False, True])
    house.table.away = False
    house.wait_empty()
    assert all(all(doubts) for doubts in house.table.doubts)


def test_a_lost_commit_leaves_log_requests_in_doubt(house: House) -> None:
    house.table.errors[Signal.LOGS] = [OutageError("no answer", in_doubt=True)]
    house.table.away = True  # from the second attempt on
    house.put(request(1, Signal.LOGS))
    house.drain()
    wait_until(lambda: house.table.probes >= 1)
    assert doubted(house) == [True]
    house.table.away = False
    house.wait_empty()


def test_old_log_requests_in_doubt_are_set_aside_loudly_and_all_others_are_written(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    half = int(TTL / 2 * 10**9)
    house.put(
        request(1, Signal.LOGS, age=half + DAY, in_doubt=True),
        request(2, Signal.LOGS, age=half - DAY, in_doubt=True),
        request(3, Signal.LOGS, age=30 * DAY),
        request(4, Signal.TRACES, age=30 * DAY, in_doubt=True),
    )
    house.drain()
    house.wait_empty(left=1)
    assert sorted(house.table.all_written) == [2, 3, 4]
    [left] = house.spool.following(0)
    assert left.set_aside is not None
    assert "4.5 days ago" in left.set_aside
    assert house.spool.level.set_aside == 1
    assert house.counters.snapshot().in_spool == 2
    assert [each.levelno for each in caplog.records if "kept in the spool" in each.message] == [logging.ERROR]


def test_doubt_counts_from_the_first_attempt_not_from_the_receipt(house: House) -> None:
    """After an outage of days, a COMMIT without an answer is no reason not to try again: the ledger knows it."""
    house.table.errors[Signal.LOGS] = [OutageError("no answer", in_doubt=True)]
    house.put(request(1, Signal.LOGS, age=6 * DAY))
    house.drain()
    house.wait_empty()
    assert house.table.all_written == [1]
    assert house.spool.level.set_aside == 0


def test_a_request_that_fails_alone_waits_and_the_others_pass(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.table.errors[7] = [DatabaseUnavailableError("too slow") for _ in range(8)]
    house.put(*(request(number) for number in range(20)))
    house.drain()
    wait_until(lambda: house.spool.level.requests == 1)
    assert sorted(house.table.all_written) == [number for number in range(20) if number != 7]
    assert "request 8 (traces) fails alone" in caplog.text  # as the spool counts
    assert house.spool.level.set_aside == 0
    house.table.errors[7] = []
    house.wait_empty()
    assert house.table.all_written[-1] == 7


def test_a_request_that_ends_its_connection_each_time_does_not_keep_the_others(house: House) -> None:
    house.table.errors[0] = [OutageError("gone") for _ in range(100)]
    house.put(*(request(number) for number in range(5)))
    house.drain()
    wait_until(lambda: sorted(house.table.all_written) == [1, 2, 3, 4])
    house.table.errors[0] = []
    house.wait_empty()


@pytest.mark.parametrize("signal", list(Signal))
def test_a_bug_sets_aside_the_request_that_meets_it_and_no_other(
    house: House, signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    house.table.errors[3] = [ZeroDivisionError("oops") for _ in range(100)]
    house.put(*(request(number, signal) for number in range(10)))
    house.drain()
    wait_until(lambda: sorted(house.table.all_written) == [number for number in range(10) if number != 3])
    house.wait_empty(left=1)
    [left] = house.spool.following(0)
    assert left.set_aside == "internal error: ZeroDivisionError"
    assert any(each.levelno == logging.CRITICAL and each.exc_info for each in caplog.records)
    house.put(request(20, signal))
    house.wait_empty(left=1)


def test_a_request_that_can_no_longer_be_decoded_is_set_aside(house: House) -> None:
    broken = request(1)
    house.put(
        SpoolRecord(
            signal=broken.signal,
            request_id=broken.request_id,
            received_at=0,
            item_count=2,
            in_doubt=False,
            otlp=b"\xff\xff\xff",
        ),
        request(2),
    )
    house.drain()
    house.wait_empty(left=1)
    assert house.table.all_written == [2]
    assert house.spool.level.set_aside == 1


def test_a_request_with_a_wrong_checksum_is_set_aside_and_the_others_are_written(house: House, tmp_path: Path) -> None:
    house.put(*(request(number) for number in range(5)))
    otlp = request(2).otlp[:60]  # its ids and its name; the rest differs by the time
    folder = tmp_path
    level = house.spool.close()
    damage(folder / FILE_NAME, lambda data: data.__setitem__(data.index(otlp) + 20, data[data.index(otlp) + 20] ^ 1))
    with opened(folder) as spool:
        house.spool = house.table.spool = spool
        assert spool.level == level
        drain = house.drain()
        house.wait_empty(left=1)
        assert house.table.all_written == [0, 1, 3, 4]
        [left] = spool.following(0)
        assert (left.record, left.set_aside) == (None, "its checksum is wrong")
        drain.stop(10)


def test_a_disk_that_fails_does_not_end_the_drain(house: House, tmp_path: Path) -> None:
    house.put(request(1), request(2, Signal.LOGS))
    assert house.spool._file is not None
    house.spool._file._connection.execute("PRAGMA query_only = ON")  # no change is taken any more
    house.drain()
    wait_until(lambda: len(house.table.written) >= 2)  # traces, again and again: they need no mark
    assert 2 not in house.table.all_written
    assert house.spool.level.requests == 2
    house.spool._file._connection.execute("PRAGMA query_only = OFF")
    house.wait_empty()
    assert house.counters.snapshot().in_spool == 0
    assert 2 in house.table.all_written


def test_a_drain_stops_in_time_although_postgresql_hangs(house: House) -> None:
    released, entered = threading.Event(), threading.Event()

    def hang(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        entered.set()
        assert released.wait(60)
        return house.table(batches)

    house.put(request(1))
    drain = house.drain(hang)
    assert entered.wait(10)
    began = time.monotonic()
    assert not drain.stop(0.1)
    assert time.monotonic() - began < 5
    released.set()
    assert drain.stop(10)
    assert house.counters.snapshot().balanced


def test_any_retryable_error_is_waited_out(house: House) -> None:
    errors: list[Exception] = [
        RetryableError("a"),
        OverloadedError("b"),
        OutageError("c"),
        DatabaseUnavailableError("d"),
    ]
    house.table.errors[Signal.TRACES] = list(errors)
    house.put(request(1))
    house.drain()
    house.wait_empty()
    assert len(house.table.doubts) == len(errors) + 1


@pytest.mark.parametrize("signal", list(Signal))
def test_what_was_written_but_not_removed_is_not_doubled(dsn: str, tmp_path: Path, signal: Signal) -> None:
    """A drain that dies between COMMIT and removal leaves its requests to the next one."""
    (tmp_path / "copy").mkdir()
    with database(dsn) as tables, opened(tmp_path) as spool, ExitStack() as stack:
        house = House(spool=spool, table=Table(spool=spool), stack=stack)
        house.put(*(request(number, signal, count=10) for number in range(20)))
        with opened(tmp_path / "copy") as copy:  # what the disk says if the removal never comes about
            for each in spool.following(0):
                assert each.record is not None
                copy.append(each.record)
            house.drain(tables.writer.write)
            house.wait_empty()
            assert tables.count(signal.table) == 200
            assert house.counters.snapshot().stored == 200
            again = House(spool=copy, table=Table(spool=copy), stack=stack)
            again.counters.add(Signal.TRACES, recovered_from_spool=200, in_spool=200)
            drain = again.drain(tables.writer.write)
            again.wait_empty()
            drain.stop(10)
        assert tables.count(signal.table) == 200
        assert again.counters.snapshot().duplicate == 200
        tables.assert_traces_exact()
