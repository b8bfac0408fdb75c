"""Group commit: what waits together is written together, and nothing that waits is forgotten."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from otel_pg_exporter.config import PipelineSettings
from otel_pg_exporter.errors import DatabaseUnavailableError, OverloadedError, RetryableError
from otel_pg_exporter.model import Outcome, RowBatch, Signal
from otel_pg_exporter.pipeline.batcher import Batcher
from tests.support import wait_until
from tests.workload import logs, record, span, traces


class Table:
    """A write function that takes batches only while its gate is open, and fails as often as it is told."""

    def __init__(self, *, failures: int = 0) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.failures = failures
        self.written: list[list[RowBatch]] = []

    def __call__(self, batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        self.entered.release()
        assert self.gate.wait(30)
        if self.failures:
            self.failures -= 1
            raise DatabaseUnavailableError("away")
        self.written.append(list(batches))
        return [Outcome(stored=batch.item_count) for batch in batches]


def request(spans: int = 1) -> RowBatch:
    return traces(*(span(number) for number in range(spans)))


def test_an_idle_batcher_writes_a_request_at_once() -> None:
    table = Table()
    table.gate.set()
    batcher = Batcher(table, PipelineSettings(writers=1))
    assert batcher.submit(request(3)).result(10) == Outcome(stored=3)
    assert batcher.shutdown(10)


def test_what_waits_for_a_busy_writer_is_written_in_one_batch() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=1))
    first = batcher.submit(request())
    table.entered.acquire()
    others = [batcher.submit(request()) for _ in range(10)]
    table.gate.set()
    assert [answer.result(10).stored for answer in (first, *others)] == [1] * 11
    assert [len(batch) for batch in table.written] == [1, 10]
    batcher.shutdown(10)


def test_signals_are_never_mixed() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=1))
    answers = [batcher.submit(request())]
    table.entered.acquire()
    for _ in range(3):
        answers += [batcher.submit(request()), batcher.submit(logs(record("x")))]
    table.gate.set()
    for answer in answers:
        answer.result(10)
    assert all(len({batch.signal for batch in together}) == 1 for together in table.written)
    assert {together[0].signal for together in table.written} == set(Signal)
    batcher.shutdown(10)


@pytest.mark.parametrize("settings", [PipelineSettings(writers=1, max_batch_rows=25), None])
def test_a_batch_keeps_its_limits_but_takes_a_larger_request_whole(settings: PipelineSettings | None) -> None:
    if settings is None:
        settings = PipelineSettings(writers=1, max_batch_bytes=request(25).size)
    table = Table()
    batcher = Batcher(table, settings)
    first = batcher.submit(request())
    table.entered.acquire()
    answers = [first, *(batcher.submit(request(size)) for size in (10, 10, 10, 100, 1))]
    table.gate.set()
    for answer in answers:
        answer.result(10)
    assert [[len(batch.rows) for batch in together] for together in table.written] == [[1], [10, 10], [10], [100], [1]]
    batcher.shutdown(10)


def test_a_failed_batch_is_written_again_until_it_passes() -> None:
    table = Table(failures=3)
    table.gate.set()
    batcher = Batcher(table, PipelineSettings(writers=1))
    assert batcher.submit(request()).result(10) == Outcome(stored=1)
    batcher.shutdown(10)


def test_a_cancelled_request_is_not_tried_again() -> None:
    table = Table(failures=1)
    batcher = Batcher(table, PipelineSettings(writers=1))
    given_up = batcher.submit(request())
    table.entered.acquire()
    assert given_up.cancel()
    table.gate.set()
    assert batcher.submit(request(2)).result(10) == Outcome(stored=2)
    assert [[len(batch.rows) for batch in together] for together in table.written] == [[2]]
    batcher.shutdown(10)


def test_shutdown_writes_what_waits() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=2))
    answers = [batcher.submit(request()) for _ in range(20)]
    done: Future[bool] = Future()
    stopper = threading.Thread(target=lambda: done.set_result(batcher.shutdown(30)))
    stopper.start()
    table.gate.set()
    assert done.result(30)
    assert [answer.result(0).stored for answer in answers] == [1] * 20
    stopper.join()


def test_shutdown_during_an_outage_fails_what_waits_with_a_retryable_error() -> None:
    table = Table(failures=10**9)
    table.gate.set()
    batcher = Batcher(table, PipelineSettings(writers=1))
    answers = [batcher.submit(request()) for _ in range(3)]
    assert not batcher.shutdown(0.1)
    for answer in answers:
        with pytest.raises(OverloadedError):
            answer.result(10)
    with pytest.raises(OverloadedError, match="shutting down"):
        batcher.submit(request())
    assert batcher.shutdown(10)  # its thread has ended


class Panic(BaseException):
    """As PyO3 raises it for a panic in Rust: no Exception."""


@pytest.mark.parametrize("bug", [ZeroDivisionError, Panic])
def test_a_bug_in_writing_fails_its_requests_and_no_later_ones(bug: type[BaseException]) -> None:
    calls: list[int] = []

    def write(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        calls.append(len(batches))
        if len(calls) == 1:
            raise bug
        return [Outcome(stored=batch.item_count) for batch in batches]

    batcher = Batcher(write, PipelineSettings(writers=1))
    with pytest.raises(RetryableError, match=f"internal error: {bug.__name__}"):
        batcher.submit(request()).result(10)
    assert batcher.submit(request()).result(10) == Outcome(stored=1)
    batcher.shutdown(10)


def test_linger_gathers_requests_until_the_batch_is_full() -> None:
    table = Table()
    table.gate.set()
    batcher = Batcher(table, PipelineSettings(writers=1, linger=60.0, max_batch_rows=5))
    answers = [batcher.submit(request()) for _ in range(5)]
    for answer in answers:
        answer.result(10)
    assert [len(together) for together in table.written] == [5]
    batcher.shutdown(10)


def test_a_writer_that_lingered_for_nothing_goes_on() -> None:
    table = Table()
    table.gate.set()
    batcher = Batcher(table, PipelineSettings(writers=3, linger=0.01))
    for _ in range(10):  # the second request wakes another writer, which finds that the first has taken both
        assert [answer.result(10).stored for answer in [batcher.submit(request()) for _ in range(2)]] == [1, 1]
    assert sum(thread.name.startswith("writer-") and thread.is_alive() for thread in batcher._threads) == 3
    assert batcher.shutdown(10)


def test_the_request_that_waits_longest_is_in_the_next_batch() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=1, max_batch_rows=2))
    answers = [batcher.submit(request())]
    table.entered.acquire()
    answers += [batcher.submit(logs(record("first"))), *(batcher.submit(request()) for _ in range(10))]
    table.gate.set()
    for answer in answers:
        answer.result(10)
    assert table.written[1][0].signal is Signal.LOGS
    batcher.shutdown(10)


def test_all_writers_work_at_the_same_time() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=3, max_batch_rows=1))
    answers = [batcher.submit(request()) for _ in range(3)]
    for _ in range(3):
        assert table.entered.acquire(timeout=10)
    table.gate.set()
    wait_until(lambda: all(answer.settled for answer in answers))
    batcher.shutdown(10)


def test_requests_that_were_given_up_take_no_memory_while_all_writers_hang() -> None:
    table = Table()
    batcher = Batcher(table, PipelineSettings(writers=1))
    hanging = batcher.submit(request())
    table.entered.acquire()
    given_up = [batcher.submit(request()) for _ in range(100)]
    kept = batcher.submit(request(2))
    assert all(answer.cancel() for answer in given_up)
    assert not any(answer.in_doubt for answer in given_up)
    assert [len(queue) for queue in batcher._queues.values()] == [1, 0]
    assert hanging.cancel()
    assert hanging.in_doubt
    table.gate.set()
    assert kept.result(10) == Outcome(stored=2)
    batcher.shutdown(10)


def test_a_request_is_in_doubt_while_it_is_written_and_for_ever_once_a_commit_was_lost() -> None:
    gates = [threading.Semaphore(0), threading.Semaphore(0)]
    errors = [DatabaseUnavailableError("a", in_doubt=False), DatabaseUnavailableError("b", in_doubt=True)]

    def write(batches: Sequence[RowBatch]) -> Sequence[Outcome]:
        gates[0].release()
        assert gates[1].acquire(timeout=30)
        if errors:
            raise errors.pop(0)
        return [Outcome(stored=batch.item_count) for batch in batches]

    batcher = Batcher(write, PipelineSettings(writers=1))
    answer = batcher.submit(request())
    for doubt_between in (False, True):
        assert gates[0].acquire(timeout=30)
        assert answer.in_doubt
        gates[1].release()
        wait_until(lambda doubt_between=doubt_between: answer.commit_lost == doubt_between)  # type: ignore[misc] # mypy infers no default
    assert gates[0].acquire(timeout=30)
    assert answer.cancel()
    gates[1].release()
    assert answer.in_doubt
    assert batcher.shutdown(10)
    assert answer.in_doubt
