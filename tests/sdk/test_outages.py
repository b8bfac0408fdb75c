import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from psycopg.conninfo import make_conninfo

from otel_pg_exporter.postgres.dsn import parse_dsn
from otel_pg_exporter.sdk import PostgresSpanExporter
from tests.sdk.conftest import Proxy, Query
from tests.sdk.support import spans
from tests.support import wait_until


class Export(threading.Thread):
    """An export in a thread of its own, and its result."""

    def __init__(self, exporter: PostgresSpanExporter, name: str) -> None:
        super().__init__(name="export")
        self._exporter = exporter
        self._spans = spans(name)
        self.result: SpanExportResult | None = None
        self.start()
        wait_until(lambda: exporter._running or self.result is not None)

    def run(self) -> None:
        self.result = self._exporter.export(self._spans)


def give_up_after(exporter: PostgresSpanExporter, seconds: float) -> None:
    """Change the timeout: short where a test waits for its end, long where a slow machine must not fail it."""
    exporter._settings = dataclasses.replace(exporter._settings, timeout=seconds)


@pytest.fixture
def exporter(proxy: Proxy) -> Iterator[PostgresSpanExporter]:
    exporter = PostgresSpanExporter(dsn=proxy.dsn, timeout=60)
    yield exporter
    exporter.shutdown(timeout_millis=0)


def test_an_outage_that_ends_before_the_deadline_costs_nothing(
    exporter: PostgresSpanExporter, proxy: Proxy, query: Query
) -> None:
    assert exporter.export(spans("before")) is SpanExportResult.SUCCESS
    proxy.down()
    export = Export(exporter, "during")
    assert exporter.force_flush(timeout_millis=200) is False
    proxy.up()
    assert exporter.force_flush(timeout_millis=30_000) is True
    export.join()
    assert export.result is SpanExportResult.SUCCESS
    assert query("SELECT name FROM spans ORDER BY name") == [("before",), ("during",)]
    assert exporter.counts.stored == 2


def test_an_outage_beyond_the_deadline_is_a_failure_that_is_logged_once(
    exporter: PostgresSpanExporter, proxy: Proxy, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.down()
    give_up_after(exporter, 0.3)
    assert exporter.export(spans("lost")) is SpanExportResult.FAILURE
    assert exporter.export(spans("lost")) is SpanExportResult.FAILURE
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "1 spans could not be stored" in record.getMessage()
    assert "no connection to PostgreSQL" in record.getMessage()
    proxy.up()
    give_up_after(exporter, 60)
    assert exporter.export(spans("found")) is SpanExportResult.SUCCESS
    assert query("SELECT name FROM spans") == [("found",)]
    assert (exporter.counts.stored, exporter.counts.refused) == (1, 2)


def test_a_wrong_password_is_a_failure_whose_log_line_does_not_show_it(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = PostgresSpanExporter(dsn=f"{dsn}&password=s3cret", timeout=3)
    assert exporter.export(spans("lost")) is SpanExportResult.FAILURE
    assert "password authentication failed" in caplog.text
    assert "s3cret" not in caplog.text
    exporter.shutdown()


def test_a_passfile_that_libpq_ignores_is_named_with_the_remedy(
    dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {key: value for key, value in parse_dsn(dsn).items() if key != "password"}
    passfile = tmp_path / "pgpass"
    passfile.write_text("*:*:*:*:s3cret\n")
    passfile.chmod(0o640)
    exporter = PostgresSpanExporter(dsn=make_conninfo(**{**parts, "passfile": str(passfile)}), timeout=3)
    assert exporter.export(spans("lost")) is SpanExportResult.FAILURE
    exporter.shutdown()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # of the writer, which the receiver has, too; and of the exporter, which has lost them
    assert all(f"chmod 0600 {passfile}" in line for line in lines)


def test_a_server_that_stops_answering_is_a_failure_at_the_deadline(
    exporter: PostgresSpanExporter, proxy: Proxy
) -> None:
    assert exporter.export(spans("before")) is SpanExportResult.SUCCESS
    proxy.stall()
    give_up_after(exporter, 0.5)
    assert exporter.export(spans("during")) is SpanExportResult.FAILURE
    proxy.flow()
    give_up_after(exporter, 60)
    assert exporter.export(spans("after")) is SpanExportResult.SUCCESS


def test_a_shutdown_during_an_outage_ends_the_retries(exporter: PostgresSpanExporter, proxy: Proxy) -> None:
    proxy.down()
    export = Export(exporter, "lost")
    exporter.shutdown(timeout_millis=30_000)
    assert exporter.force_flush(timeout_millis=0) is True
    export.join()
    assert export.result is SpanExportResult.FAILURE


def test_a_shutdown_cuts_an_export_that_outlasts_its_timeout(exporter: PostgresSpanExporter, proxy: Proxy) -> None:
    assert exporter.export(spans("before")) is SpanExportResult.SUCCESS
    proxy.stall()
    export = Export(exporter, "stuck")
    assert exporter.force_flush(timeout_millis=50) is False
    exporter.shutdown(timeout_millis=50)
    export.join()
    assert export.result is SpanExportResult.FAILURE


def test_a_shutdown_lets_a_running_export_finish(exporter: PostgresSpanExporter, proxy: Proxy, query: Query) -> None:
    assert exporter.export(spans("before")) is SpanExportResult.SUCCESS
    proxy.stall()
    export = Export(exporter, "during")
    stopping = threading.Thread(target=exporter.shutdown)
    stopping.start()
    wait_until(lambda: exporter._stopped)
    proxy.flow()
    stopping.join()
    export.join()
    assert export.result is SpanExportResult.SUCCESS
    assert query("SELECT count(*) FROM spans") == [(2,)]


def test_many_threads_may_export_through_one_exporter(dsn: str, query: Query) -> None:
    exporter = PostgresSpanExporter(dsn=dsn, timeout=60)
    threads = [threading.Thread(target=exporter.export, args=[spans(f"span {number}")]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert query("SELECT count(*) FROM spans") == [(8,)]
    assert exporter.counts.stored == 8
    exporter.shutdown()
