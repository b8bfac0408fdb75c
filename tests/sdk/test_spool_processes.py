"""Spools and processes: what a dead one leaves, forks, the interpreter's exit, and receivers beside exporters."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_pg_exporter.sdk import PostgresSpanExporter
from otel_pg_exporter.telemetry import ItemCounts
from tests.e2e.support import receiving
from tests.proxy import Proxy, proxy_for
from tests.sdk.conftest import Query
from tests.sdk.support import spans
from tests.support import wait_until

ROOT = Path(__file__).parents[2]
PREAMBLE = """
    import logging, os, signal, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
    logging.disable(logging.WARNING)
    from opentelemetry._logs import LogRecord
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
    exporter = PostgresSpanExporter()
"""


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with proxy_for(dsn) as proxy:
        yield proxy


def run(dsn: str, spool: Path, code: str, *, status: int = 0, timeout: float = 0.3) -> str:
    """Run a program whose exporters have a spool; return what it printed. It must not complain."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTHON"))}
    variables |= {
        "OTEL_EXPORTER_POSTGRESQL_DSN": dsn,
        "OTEL_EXPORTER_POSTGRESQL_TIMEOUT": str(timeout),
        "OTEL_EXPORTER_POSTGRESQL_SPOOL_DIR": str(spool),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, "")
    return done.stdout


def names(query: Query) -> list[str]:
    return sorted(name for (name,) in query("SELECT name FROM spans UNION ALL SELECT body FROM logs"))


@pytest.mark.parametrize("processor", ["BatchSpanProcessor", "SimpleSpanProcessor"])
def test_what_is_exported_at_the_exit_while_postgresql_is_away_is_kept_for_the_next_process(
    proxy: Proxy, query: Query, tmp_path: Path, processor: str
) -> None:
    app = f"""
    spans, logs = TracerProvider(), LoggerProvider()
    spans.add_span_processor({processor}(exporter))
    logs.add_log_record_processor(BatchLogRecordProcessor(PostgresLogRecordExporter()))
    spans.get_tracer("app").start_span(sys.argv[0] or "span").end()
    logs.get_logger("app").emit(LogRecord(body="record"))
    """
    proxy.refuse()
    run(proxy.dsn, tmp_path, app)
    assert names(query) == []
    proxy.up()
    run(proxy.dsn, tmp_path, app, timeout=60)
    assert names(query) == ["-c"] * 2 + ["record"] * 2
    assert [*tmp_path.glob("*/*")] == []


def test_what_a_killed_process_has_spooled_is_stored_by_a_receiver(
    proxy: Proxy, dsn: str, query: Query, tmp_path: Path
) -> None:
    proxy.refuse()
    run(
        proxy.dsn,
        tmp_path,
        """
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        for number in range(3):
            provider.get_tracer("app").start_span(f"span {number}").end()
        assert exporter.counts.in_spool == 3, exporter.counts
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        status=-9,
    )
    proxy.up()
    with receiving(proxy.dsn, read_dsn=dsn, spool_dir=tmp_path) as receiver:
        wait_until(lambda: receiver.service.counts().in_spool == 0)
        assert receiver.service.counts() == ItemCounts(recovered_from_spool=3, stored=3, drained=3)
    assert names(query) == ["span 0", "span 1", "span 2"]


def test_an_exporter_beside_a_receiver_leaves_its_spool_alone_and_the_receiver_takes_the_exporters(
    proxy: Proxy, dsn: str, query: Query, tmp_path: Path
) -> None:
    with receiving(proxy.dsn, read_dsn=dsn, spool_dir=tmp_path) as receiver:
        exporter = PostgresSpanExporter(dsn=proxy.dsn, spool_dir=tmp_path, timeout=0.3)
        proxy.refuse()
        exporter.export(spans("a"))
        assert exporter.counts.in_spool == 1
        proxy.up()
        wait_until(lambda: names(query) == ["a"])
        wait_until(lambda: receiver.service.counts().in_spool == 0)
        wait_until(lambda: exporter.force_flush() and exporter.counts.in_spool == 0)
        assert exporter.counts == ItemCounts(received=1, handed_over=1, spooled=1)
        assert receiver.service.counts().recovered_from_spool == 1
        exporter.shutdown()


def test_forked_children_spool_during_an_outage_and_all_is_stored_once_after_it(
    proxy: Proxy, query: Query, tmp_path: Path
) -> None:
    proxy.refuse()
    code = """
    import threading
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("app")
    tracer.start_span("parent first").end()
    stop = threading.Event()

    def keep_exporting():
        while not stop.is_set():
            tracer.start_span("parent").end()

    thread = threading.Thread(target=keep_exporting, daemon=True)
    thread.start()
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            for _ in range(5):
                tracer.start_span(f"child {number}").end()
            counts = exporter.counts
            os._exit(0 if counts.spooled == 5 and counts.balanced else 1)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    stop.set()
    thread.join()
    print(exporter.counts.spooled if exporter.counts.balanced else exporter.counts, flush=True)
    os._exit(0)  # without a last flush
    """
    parents = int(run(proxy.dsn, tmp_path, code))
    assert parents > 1
    proxy.up()
    exporter = PostgresSpanExporter(dsn=proxy.dsn, spool_dir=tmp_path)
    exporter.force_flush()
    assert exporter.counts.stored == exporter.counts.recovered_from_spool == parents + 8 * 5
    assert len(names(query)) == parents + 8 * 5
    exporter.shutdown()


def test_forks_while_another_thread_drains_leave_nothing_locked_and_nothing_twice(
    proxy: Proxy, query: Query, tmp_path: Path
) -> None:
    proxy.refuse()
    fill = """
    from tests.sdk.support import spans
    for batch in range(12):
        exporter.export(spans(*[f"{batch} {number}" for number in range(500)]))
    os._exit(0)  # without a last attempt
    """
    run(proxy.dsn, tmp_path, fill)
    proxy.up()
    code = """
    import threading
    thread = threading.Thread(target=exporter.force_flush)
    thread.start()
    for number in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            exporter.force_flush()
            os._exit(0 if exporter.counts.balanced else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    thread.join()
    assert exporter.counts.balanced, exporter.counts
    """
    run(proxy.dsn, tmp_path, code, timeout=60)
    assert len(names(query)) == len(set(names(query))) == 12 * 500
    assert [*tmp_path.glob("*/*")] == []
