"""The spool behind the front door: an OK outlives every outage, and what it promised is stored once."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psycopg
import pytest

from otel_pg_exporter import mapping
from otel_pg_exporter.config import DatabaseSettings, PipelineSettings
from otel_pg_exporter.model import Signal, Window
from otel_pg_exporter.pipeline.availability import Availability
from otel_pg_exporter.pipeline.drain import Drain
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.postgres.dsn import target_of
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import compile_plan
from tests.e2e.support import METHODS, OK, WAYS, Protocol, Receiver, heard, persist, receiving
from tests.proxy import Proxy, proxy_for
from tests.receiver.support import refusal
from tests.support import wait_until
from tests.workload import Database, database, decoded, log_body, record, span, trace_body

ACK_TIMEOUT = 0.5  # seconds
HOUR = 3600 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """A receiver with a spool, whose way to PostgreSQL leads through a proxy."""

    receiver: Receiver
    proxy: Proxy

    def send(self, signal: Signal, body: bytes) -> None:
        assert self.receiver.send(signal, body) == OK

    def begin(self, signal: Signal) -> None:
        """Store 20 items, so that connections and partitions are there."""
        # On a slow machine by way of the spool.
        self.send(signal, request(signal, 0))
        self.wait_drained()

    @property
    def in_spool(self) -> int:
        return self.receiver.service.counts().in_spool

    def wait_drained(self) -> None:
        wait_until(lambda: self.in_spool == 0)


@contextlib.contextmanager
def house(
    dsn: str,
    writer_dsn: str,
    folder: Path,
    *,
    max_bytes: int = 2**30,
    proxy: Proxy | None = None,
    protocol: Protocol = "grpc",
) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        proxy = proxy or stack.enter_context(proxy_for(writer_dsn))
        receiver = stack.enter_context(
            receiving(
                proxy.dsn,
                read_dsn=dsn,
                pipeline=PipelineSettings(ack_timeout=ACK_TIMEOUT),
                database=DatabaseSettings(connect_timeout=2, statement_timeout=10),
                spool_dir=folder,
                spool_max_bytes=max_bytes,
                protocol=protocol,
            )
        )
        yield House(receiver=receiver, proxy=proxy)


def request(signal: Signal, number: int, count: int = 20) -> bytes:
    """Return a request of items that no other number's has."""
    if signal is Signal.TRACES:
        return trace_body([span(item, trace=1 + number) for item in range(count)])
    return log_body([record(f"{number}.{item}") for item in range(count)])


def rows_of(tables: Database, signal: Signal) -> int:
    tables.assert_traces_exact()
    return tables.count(signal.table)


@pytest.mark.parametrize(("signal", "protocol"), WAYS)
def test_an_outage_costs_senders_nothing(
    dsn: str, writer_dsn: str, tmp_path: Path, signal: Signal, protocol: Protocol
) -> None:
    with house(dsn, writer_dsn, tmp_path, protocol=protocol) as it:
        it.begin(signal)
        it.proxy.refuse()
        for number in range(1, 20):
            it.send(signal, request(signal, number))
        assert it.receiver.database.count(signal.table) == 20
        assert it.in_spool == 19 * 20
        it.proxy.up()
        it.wait_drained()
        assert rows_of(it.receiver.database, signal) == 400
        it.send(signal, request(signal, 20))
        counts = it.receiver.service.counts()
        assert (counts.stored, counts.duplicate, counts.refused, counts.spooled) == (420, 0, 0, counts.drained)


@pytest.mark.parametrize(("hours", "replayed"), [(2, True), (83, True), (85, False)])
def test_a_commit_without_an_answer_then_an_outage_and_a_restart_then_logs_are_there_once(
    dsn: str, writer_dsn: str, tmp_path: Path, hours: int, replayed: bool
) -> None:
    """Beyond half of `ledger_ttl`, the ledger may not know the request any more: it is kept, and not written."""
    signal = Signal.LOGS
    with proxy_for(writer_dsn) as proxy:
        with house(dsn, writer_dsn, tmp_path, proxy=proxy) as it:
            it.begin(signal)
            proxy.lose_commits(1, then=proxy.refuse)
            it.send(signal, request(signal, 1))
            wait_until(lambda: proxy.commits_lost == 1)
            assert it.in_spool == 20
        proxy.up()
        folder = SpoolFolders(tmp_path, target_of(DatabaseSettings(dsn=proxy.dsn))).acquire()
        with database(writer_dsn, read_dsn=dsn) as tables:
            spool = Spool(folder.path, max_bytes=2**30)
            counters = ItemCounters()
            drain = Drain(
                spool,
                SpoolWriter(
                    {each: compile_plan(mapping.load(), each, Window()) for each in Signal},
                    tables.writer.write,
                    probe=lambda: None,
                    counters=counters,
                    availability=Availability(),
                    ledger_ttl=7 * 86_400.0,
                    now_ns=lambda: time.time_ns() + hours * HOUR,
                ),
                counters,
            )
            wait_until(lambda: counters.snapshot().drained == 20 or spool.level.set_aside == 1)
            assert drain.stop(10)
            assert rows_of(tables, signal) == 40
            assert counters.snapshot().duplicate == (20 if replayed else 0)
            assert spool.level.set_aside == (not replayed)
            spool.close()
        folder.release()


@pytest.mark.parametrize("signal", list(Signal))
def test_refused_items_of_a_spooled_request_are_named_at_once_and_dead_letters_once(
    dsn: str, writer_dsn: str, tmp_path: Path, signal: Signal
) -> None:
    with house(dsn, writer_dsn, tmp_path) as it:
        it.receiver.database.execute(
            "ALTER TABLE spans ADD CONSTRAINT no_poison CHECK (name <> 'poison')",
            "ALTER TABLE logs ADD CONSTRAINT no_poison CHECK (body <> 'poison')",
        )
        it.proxy.refuse()
        if signal is Signal.TRACES:
            spans = [span(number) for number in range(10)]
            spans[3].span_id, spans[5].name = b"short", "poison"
            body, at_once, in_all = trace_body(spans), 1, 2
        else:
            body = log_body([record("poison" if number == 5 else f"{number}") for number in range(10)])
            at_once, in_all = 0, 1
        before = time.time()
        for _ in range(2):  # a retry hears the same, and changes nothing
            rejected, message = it.receiver.send(signal, body)
            assert rejected == at_once
            assert ("1 of 10 spans refused: item 3" in message) is (at_once == 1)
        answered = time.time()
        it.proxy.up()
        it.wait_drained()
        assert rows_of(it.receiver.database, signal) == 10 - in_all
        assert it.receiver.database.count("dead_letters") == in_all
        query = "SELECT extract(epoch FROM min(received_at)), extract(epoch FROM max(received_at)) FROM dead_letters"
        [(first, last)] = it.receiver.database.rows(query)
        assert before - 0.001 <= first <= last <= answered
        wait_until(lambda: it.receiver.send(signal, body)[0] == in_all)  # unless the machine is slow, at once
        assert it.receiver.database.count("dead_letters") == in_all


@pytest.mark.parametrize("signal", list(Signal))
def test_a_retry_meets_its_request_in_the_spool_being_written_or_drained_and_changes_nothing(
    dsn: str, writer_dsn: str, tmp_path: Path, signal: Signal
) -> None:
    with house(dsn, writer_dsn, tmp_path) as it:
        it.begin(signal)
        body = request(signal, 1)
        with psycopg.connect(dsn) as connection:
            connection.execute(f"LOCK TABLE otel.{signal.table} IN ACCESS EXCLUSIVE MODE".encode())
            it.send(signal, body)  # its write hangs, and goes on to hang
            for _ in range(3):
                it.send(signal, body)
            assert it.in_spool == 20
        for _ in range(20):
            it.send(signal, body)
        it.wait_drained()
        it.send(signal, body)
        assert rows_of(it.receiver.database, signal) == 40


def test_a_stop_in_an_outage_spools_what_waits_and_the_next_start_writes_it(
    dsn: str, writer_dsn: str, tmp_path: Path
) -> None:
    with proxy_for(writer_dsn) as proxy:
        with house(dsn, writer_dsn, tmp_path, proxy=proxy) as it, ThreadPoolExecutor(4) as pool:
            it.begin(Signal.TRACES)
            proxy.stall()
            calls = [
                it.receiver.client.future(METHODS[signal], request(signal, number))
                for number in range(1, 6)
                for signal in Signal
            ]
            wait_until(lambda: it.receiver.service.counts().in_flight + it.in_spool == 10 * 20)
            stopped = pool.submit(it.receiver.service.stop)
            assert [heard(call.result()) for call in calls] == [OK] * 10
            stopped.result(60)
            assert it.in_spool == 200
        proxy.flow()
        with house(dsn, writer_dsn, tmp_path, proxy=proxy) as it:
            it.wait_drained()
            assert it.receiver.service.counts().recovered_from_spool == 200
            assert rows_of(it.receiver.database, Signal.LOGS) == 100
            assert rows_of(it.receiver.database, Signal.TRACES) == 120
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_spool_asks_senders_to_come_again_and_has_room_after_the_drain(
    dsn: str, writer_dsn: str, tmp_path: Path
) -> None:
    line = "x" * 100_000
    with house(dsn, writer_dsn, tmp_path, max_bytes=2**20) as it:
        it.begin(Signal.LOGS)
        it.proxy.refuse()
        number = 0
        while True:
            number += 1
            try:
                it.send(Signal.LOGS, log_body([record(f"{number} {line}")]))
            except grpc.RpcError as exc:
                refused = refusal(exc)
                break
        assert (refused.code, refused.retry_delay) == (grpc.StatusCode.UNAVAILABLE, 1)
        assert "the spool is full: " in refused.details
        assert "of 1,048,576 bytes; 1 items refused" in refused.details
        assert number == 11
        it.proxy.up()
        assert persist(it.receiver.client, Signal.LOGS, log_body([record(f"{number} {line}")])) == OK
        it.wait_drained()
        assert rows_of(it.receiver.database, Signal.LOGS) == 20 + number


def test_one_signals_missing_table_leaves_the_other_alone(dsn: str, writer_dsn: str, tmp_path: Path) -> None:
    with house(dsn, writer_dsn, tmp_path) as it:
        for signal in Signal:
            it.begin(signal)
        it.receiver.database.execute("ALTER TABLE logs RENAME TO elsewhere")
        for number in range(1, 4):
            for signal in Signal:
                it.send(signal, request(signal, number))
        wait_until(lambda: rows_of(it.receiver.database, Signal.TRACES) == 80)
        wait_until(lambda: it.in_spool == 60)
        it.receiver.database.execute("ALTER TABLE elsewhere RENAME TO logs")
        it.wait_drained()
        assert rows_of(it.receiver.database, Signal.LOGS) == 80
        assert it.receiver.database.count("dead_letters") == 0


def test_a_living_process_takes_over_what_a_dead_one_has_left_damage_and_all(
    dsn: str, writer_dsn: str, tmp_path: Path
) -> None:
    with house(dsn, writer_dsn, tmp_path) as it:
        folders = SpoolFolders(tmp_path, target_of(DatabaseSettings(dsn=it.proxy.dsn)))
        dead = folders._new()
        (dead.path / f"{FILE_NAME}.corrupt-1").write_bytes(b"found by the dead process")
        spool = Spool(dead.path, max_bytes=2**30)
        for number in range(4):
            body = request(Signal.LOGS, number)
            spool.append(
                SpoolRecord(
                    signal=Signal.LOGS,
                    request_id=decoded(Signal.LOGS, body).request_id,
                    received_at=time.time_ns(),
                    item_count=20,
                    in_doubt=False,
                    otlp=body,
                )
            )
        spool.set_aside(1, "a reason")
        assert spool._file is not None
        spool._file._connection.execute("UPDATE requests SET checksum = x'00' WHERE id = 2")
        spool.close()
        foreign = SpoolFolders(tmp_path, "another:5432/db otel")
        elsewhere = foreign._new()
        Spool(elsewhere.path, max_bytes=1).close()
        (elsewhere.path / "something").touch()
        elsewhere.release()
        dead.release()  # as its end does; not empty, so the folder stays
        wait_until(lambda: it.receiver.database.count("logs") == 40)
        wait_until(lambda: not dead.path.exists())
        wait_until(lambda: it.receiver.service.counts().drained == 40)  # settled a moment after the COMMIT
        counts = it.receiver.service.counts()
        assert (counts.recovered_from_spool, counts.in_spool, counts.drained) == (60, 20, 40)
        assert it.receiver.service._spooling is not None
        assert it.receiver.service._spooling.spool.level.set_aside == 1
        assert len(list(it.receiver.service._spooling._folder.path.glob(f"{FILE_NAME}.corrupt-*"))) == 2
        assert elsewhere.path.exists()


def test_the_counts_balance_to_the_item_at_every_moment_of_an_outage_and_its_end(
    dsn: str, writer_dsn: str, tmp_path: Path
) -> None:
    done = threading.Event()
    with house(dsn, writer_dsn, tmp_path) as it:

        def client(number: int) -> int:
            sent = 0
            with it.receiver.sender() as sender:
                while not done.is_set():
                    sent += 1
                    body = request(list(Signal)[number % 2], 10_000 * number + sent, count=5)
                    assert persist(sender, list(Signal)[number % 2], body) == OK
                    if sent % 5 == 0:  # a retry of what was acknowledged
                        assert persist(sender, list(Signal)[number % 2], body) == OK
            return sent

        def look() -> int:
            looks = 0
            while not done.wait(0.001):
                counts = it.receiver.service.counts()
                assert counts.balanced, counts
                looks += 1
            return looks

        with ThreadPoolExecutor(7) as pool:
            clients = [pool.submit(client, number) for number in range(6)]
            looks = pool.submit(look)
            try:
                for _ in range(2):
                    it.proxy.lose_commits(2)
                    wait_until(lambda: it.proxy.commits_lost >= 2)
                    it.proxy.refuse()
                    before = it.receiver.service.counts().spooled
                    wait_until(lambda before=before: it.receiver.service.counts().spooled > before + 100)  # type: ignore[misc] # mypy infers no default
                    it.proxy.up()
                    wait_until(lambda: it.in_spool < 100)
            finally:
                done.set()
            sent = [each.result(60) for each in clients]
            assert looks.result(60) > 100
        it.wait_drained()
        assert rows_of(it.receiver.database, Signal.TRACES) == 5 * sum(sent[::2])
        assert rows_of(it.receiver.database, Signal.LOGS) == 5 * sum(sent[1::2])
