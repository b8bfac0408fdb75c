"""Exporters with a spool: what an outage, a lost COMMIT, a full disk, a death or a fork leaves is stored once."""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk._logs.export import (
    LogRecordExportResult,
)
from opentelemetry.sdk.trace.export import SpanExportResult

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders
from otel_pg_exporter.postgres.dsn import target_of
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
from otel_pg_exporter.telemetry import ItemCounts
from otel_pg_exporter.transcode.readable import otlp_request
from tests.proxy import Proxy, proxy_for
from tests.sdk.conftest import Query
from tests.sdk.support import records, spans
from tests.support import wait_until

Exporter = PostgresSpanExporter | PostgresLogRecordExporter


def export(exporter: Exporter, *names: str) -> bool:
    """Export spans or log records of these names; tell whether that was a success."""
    if isinstance(exporter, PostgresSpanExporter):
        return exporter.export(spans(*names)) is SpanExportResult.SUCCESS
    return exporter.export(records(*names)) is LogRecordExportResult.SUCCESS


def stored(query: Query, exporter: Exporter) -> list[str]:
    """List the names of the spans or the bodies of the log records that are stored."""
    column, table = ("name", "spans") if isinstance(exporter, PostgresSpanExporter) else ("body", "logs")
    return sorted(name for (name,) in query(f"SELECT {column} FROM {table}"))


def give_up_after(exporter: Exporter, seconds: float) -> None:
    """Change the timeout: short where a test waits for its end, long where a slow machine must not fail it."""
    exporter._settings = replace(exporter._settings, timeout=seconds)


def drain(exporter: Exporter) -> None:
    wait_until(lambda: exporter.force_flush() and exporter.counts.in_spool == 0)


@pytest.fixture
def proxy(writer_dsn: str) -> Iterator[Proxy]:
    with proxy_for(writer_dsn) as proxy:
        yield proxy


Make = Callable[..., Exporter]


@pytest.fixture(params=[PostgresSpanExporter, PostgresLogRecordExporter], ids=["spans", "logs"])
def make(request: pytest.FixtureRequest, proxy: Proxy, tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes exporters of one signal, all with the same spool."""
    made: list[Exporter] = []

    def make(**settings: object) -> Exporter:
        exporter: Exporter = request.param(
            **{"dsn": proxy.dsn, "timeout": 0.3, "spool_dir": tmp_path / "spool"} | settings
        )
        made.append(exporter)
        return exporter

    yield make
    for exporter in made:
        exporter.shutdown(timeout_millis=0)
        assert exporter.counts.balanced
        assert exporter.counts.in_flight == 0


@contextmanager
def opened_spool(proxy: Proxy, root: Path) -> Iterator[Spool]:
    """Open the spool that nobody uses between two exports."""
    folder = SpoolFolders(root, target_of(DatabaseSettings(dsn=proxy.dsn))).acquire()
    with closing(Spool(folder.path, max_bytes=2**30)) as spool:
        yield spool
    folder.release()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_an_outage_beyond_the_timeout_leaves_is_a_success_and_stored_once_after_it(
    make: Make, proxy: Proxy, query: Query, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = make()
    proxy.refuse()
    assert export(exporter, "a", "b")
    assert export(exporter, "c")
    assert exporter.counts == ItemCounts(received=3, in_spool=3, spooled=3)
    [line] = [each.getMessage() for each in caplog.records if "in the spool" in each.getMessage()]
    assert "no connection to PostgreSQL" in line
    proxy.up()
    give_up_after(exporter, 60)
    wait_until(lambda: export(exporter, "d") and exporter.counts.in_spool == 0)
    assert set(stored(query, exporter)) == {"a", "b", "c", "d"}
    counts = exporter.counts
    assert (counts.in_spool, counts.spooled, counts.drained) == (0, counts.drained, counts.spooled)
    assert counts.received == counts.stored == len(stored(query, exporter))
    assert files(tmp_path) == []


def test_while_postgresql_is_away_an_export_does_not_wait_out_its_timeout(make: Make, proxy: Proxy) -> None:
    exporter = make()
    proxy.refuse()
    assert export(exporter, "a")
    give_up_after(exporter, 600)
    for _ in range(5):
        assert export(exporter, "b")  # the test's own timeout would end it
    assert exporter.counts.in_spool == 6


def test_an_export_during_a_stall_is_spooled_in_doubt_and_stored_once(make: Make, proxy: Proxy, query: Query) -> None:
    exporter = make(timeout=60)
    assert export(exporter, "before")
    proxy.stall()
    give_up_after(exporter, 0.5)
    assert export(exporter, "during")
    assert exporter.counts.in_spool == 1
    proxy.flow()
    give_up_after(exporter, 60)
    drain(exporter)
    assert stored(query, exporter) == ["before", "during"]


def test_what_was_committed_without_an_answer_before_an_outage_is_stored_once(
    make: Make, proxy: Proxy, query: Query, tmp_path: Path
) -> None:
    exporter = make(timeout=60)
    assert export(exporter, "before")
    proxy.lose_commits(1, then=proxy.refuse)
    exporter._availability.note_silence(exporter._signal)  # then one attempt is all, however long it may take
    assert export(exporter, "during")
    assert proxy.commits_lost == 1
    with opened_spool(proxy, tmp_path / "spool") as spool:
        [kept] = [each.record for each in spool.following(0)]
    assert kept is not None
    assert kept.in_doubt
    proxy.up()
    drain(exporter)
    assert stored(query, exporter) == ["before", "during"]
    assert (exporter.counts.stored, exporter.counts.duplicate) == (1, 1)


def test_a_log_request_in_doubt_that_the_ledger_may_have_forgotten_is_kept_but_not_written(
    proxy: Proxy, query: Query, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = PostgresLogRecordExporter(dsn=proxy.dsn, spool_dir=tmp_path, ledger_ttl=3600)
    for name, age in (("old", 1801), ("young", 0)):
        record = SpoolRecord(
            signal=Signal.LOGS,
            request_id=name.rjust(16).encode(),
            received_at=time.time_ns() - age * 10**9,
            item_count=1,
            in_doubt=True,
            otlp=otlp_request(records(name)),
        )
        with opened_spool(proxy, tmp_path) as spool:
            spool.append(record)
    exporter.force_flush()
    assert stored(query, exporter) == ["young"]
    assert exporter.counts == ItemCounts(recovered_from_spool=2, stored=1, in_spool=1, drained=1)
    assert "is kept in the spool, but not written: PostgreSQL may have committed it" in caplog.text
    exporter.shutdown()


def test_a_full_spool_is_a_failure_that_is_counted_and_logged(
    make: Make, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = make(spool_max_bytes=2**20)
    proxy.refuse()
    names = ["x" * 1000] * 300
    assert export(exporter, *names)
    assert export(exporter, *names)
    assert export(exporter, *names)
    assert not export(exporter, *names)
    assert (exporter.counts.spooled, exporter.counts.refused) == (900, 300)
    [line] = [each.getMessage() for each in caplog.records if "could not be stored" in each.getMessage()]
    assert "300" in line
    assert "the spool is full" in line
    assert "no connection to PostgreSQL" in line or "PostgreSQL was away" in line


def test_the_next_process_stores_what_a_dead_one_has_left(make: Make, proxy: Proxy, query: Query) -> None:
    dead, alive = make(), make(timeout=60)
    proxy.refuse()
    assert export(dead, "a", "b")
    proxy.up()
    assert export(alive, "c")
    wait_until(lambda: alive.force_flush() and alive.counts.drained == 2)  # if the export has left that undone
    assert stored(query, alive) == ["a", "b", "c"]
    assert alive.counts == ItemCounts(received=1, recovered_from_spool=2, stored=3, drained=2)
    dead.force_flush()  # it lives after all, and finds that somebody was quicker
    assert dead.counts == ItemCounts(received=2, handed_over=2, spooled=2)


def test_an_exporter_leaves_the_other_signals_requests_to_others(
    dsn: str, proxy: Proxy, query: Query, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"dsn": proxy.dsn, "timeout": 0.3, "spool_dir": tmp_path}
    traces, logs = PostgresSpanExporter(**settings), PostgresLogRecordExporter(**settings)
    proxy.refuse()
    assert export(traces, "a")
    assert export(logs, "b")
    proxy.up()
    for each in (traces, logs):
        give_up_after(each, 60)
    traces.shutdown()
    assert stored(query, traces) == ["a"]
    assert stored(query, logs) == []
    assert logs.counts == ItemCounts(received=1, in_spool=1, spooled=1)
    logs.shutdown()
    assert stored(query, logs) == ["b"]
    assert logs.counts == ItemCounts(received=1, stored=1, spooled=1, drained=1)
    assert files(tmp_path) == []


def test_the_folders_and_files_are_the_users_alone(make: Make, proxy: Proxy, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        exporter = make()
        proxy.refuse()
        assert export(exporter, "a")
    finally:
        os.umask(previous)
    for path in [*(tmp_path / "spool").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("exporter", [PostgresSpanExporter, PostgresLogRecordExporter])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_cannot_be_used_is_refused_by_the_constructor(
    exporter: Callable[..., Exporter], kind: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    if kind == "file":
        bad.write_text("")
    else:
        bad.symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match=r"spool_dir: .*bad") as caught:
        exporter(dsn="host=192.0.2.1", spool_dir=bad)
    assert "--" not in str(caught.value)


def test_a_folder_that_breaks_later_is_a_failure_and_a_log_line(
    make: Make, proxy: Proxy, query: Query, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = make(timeout=60)
    [target] = (tmp_path / "spool").iterdir()
    target.rmdir()
    target.write_text("")
    assert export(exporter, "a")
    give_up_after(exporter, 0.3)
    proxy.refuse()
    assert not export(exporter, "b")
    assert "is no folder" in caplog.text
    assert exporter.counts == ItemCounts(received=2, stored=1, refused=1)
    target.unlink()
