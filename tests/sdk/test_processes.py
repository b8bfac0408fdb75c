"""The exporters in processes of their own: started by OpenTelemetry's tools, at exit, after a fork."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.sdk.conftest import Query

APP = """
    import logging
    from opentelemetry import trace
    with trace.get_tracer("app").start_as_current_span("work"):
        logging.getLogger("app").warning("at work")
"""
BY_HAND = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from otel_pg_exporter.sdk import PostgresSpanExporter
    exporter = PostgresSpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("app")
"""


def run(dsn: str, code: str, *, command: tuple[str, ...] = (sys.executable,), **environment: str) -> str:
    """Run a program with the exporters' DSN in its environment; return what it printed.

    It must not complain, but for OpenTelemetry's own tools, which do so for reasons that are none of ours.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTHON"))}
    variables |= {"OTEL_EXPORTER_POSTGRESQL_DSN": dsn, "OTEL_SERVICE_NAME": "shop"} | environment
    done = subprocess.run(
        [*command, "-c", textwrap.dedent(code)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    complaint = done.stderr if command == (sys.executable,) or "otel_pg_exporter" in done.stderr else ""
    assert (done.returncode, complaint) == (0, "")
    return done.stdout


def test_importing_the_exporters_loads_no_server_code() -> None:
    code = """
        import sys
        import otel_pg_exporter.sdk
        unwanted = ("grpc", "grpc_status", "argparse", "platformdirs", "psycopg_pool", "sqlite3",
                    "otel_pg_exporter.cli", "otel_pg_exporter.service", "otel_pg_exporter.receiver",
                    "otel_pg_exporter.postgres.embedded", "otel_pg_exporter.postgres.migrate")
        print([name for name in unwanted if name in sys.modules])
    """
    assert run("", code) == "[]\n"


def test_opentelemetry_instrument_finds_both_exporters_by_name(dsn: str, query: Query) -> None:
    run(
        dsn,
        APP,
        command=(str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable),
        OTEL_TRACES_EXPORTER="postgresql",
        OTEL_LOGS_EXPORTER="postgresql",
        OTEL_METRICS_EXPORTER="none",
        OTEL_PYTHON_LOGGING_AUTO_INSTRUMENTATION_ENABLED="true",
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert query("SELECT name, service_name FROM spans") == [("work", "shop")]
    assert query("SELECT body, service_name FROM logs JOIN spans USING (trace_id, span_id, service_name)") == [
        ("at work", "shop")
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.configuration") is None, reason="opentelemetry-configuration is missing"
)
def test_the_declarative_configuration_file_names_them_with_their_settings(
    dsn: str, query: Query, tmp_path: Path
) -> None:
    file = tmp_path / "otel.yaml"
    file.write_text(
        textwrap.dedent(
            """
            file_format: "1.0"
            resource:
              attributes:
                - name: service.name
                  value: from-file
            tracer_provider:
              processors:
                - batch:
                    exporter:
                      postgresql:
                        dsn: ${DATABASE}
                        timeout: 20
            logger_provider:
              processors:
                - batch:
                    exporter:
                      postgresql:
                        dsn: ${DATABASE}
                        write_method: insert
            """
        )
    )
    code = """
        from opentelemetry import trace
        from opentelemetry._logs import LogRecord, get_logger
        with trace.get_tracer("app").start_as_current_span("work"):
            get_logger("app").emit(LogRecord(body="at work"))
    """
    run(
        "postgresql://nobody@127.0.0.1:1/nowhere",
        code,
        command=(str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable),
        OTEL_CONFIG_FILE=str(file),
        DATABASE=dsn,
    )
    assert query("SELECT name, service_name FROM spans") == [("work", "from-file")]
    assert query("SELECT body, service_name FROM logs") == [("at work", "from-file")]


def test_a_program_that_exports_only_at_its_exit_loses_nothing(dsn: str, query: Query) -> None:
    assert run(dsn, BY_HAND + "    tracer.start_span('last').end()\n") == ""
    assert query("SELECT name FROM spans") == [("last",)]


def test_an_exit_without_a_shutdown_of_the_provider_neither_hangs_nor_warns(dsn: str, query: Query) -> None:
    code = """
        from otel_pg_exporter.sdk import PostgresSpanExporter
        from tests.sdk.support import spans
        exporter = PostgresSpanExporter()
        print(exporter.export(spans("a")).name)
    """
    root = str(Path(__file__).parents[2])
    assert run(dsn, code, PYTHONPATH=root) == "SUCCESS\n"
    assert query("SELECT name FROM spans") == [("a",)]


def test_a_child_of_a_parent_that_has_exported_writes_through_a_connection_of_its_own(dsn: str, query: Query) -> None:
    code = (
        BY_HAND
        + """
    tracer.start_span("parent before").end()
    provider.force_flush()
    for number in (1, 2):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            tracer.start_span(f"child {number}").end()
            sys.exit(0)  # the provider flushes at exit
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    tracer.start_span("parent after").end()
    provider.force_flush()
    print(exporter.counts.stored)
    """
    )
    assert run(dsn, code) == "2\n"
    assert query("SELECT name FROM spans ORDER BY start_time") == [
        ("parent before",),
        ("child 1",),
        ("child 2",),
        ("parent after",),
    ]


def test_a_fork_in_the_middle_of_an_export_does_not_lock_the_child(dsn: str, query: Query) -> None:
    code = (
        BY_HAND
        + """
    import threading
    stop = threading.Event()

    def keep_exporting():
        while not stop.is_set():
            tracer.start_span("parent").end()
            provider.force_flush()

    thread = threading.Thread(target=keep_exporting, daemon=True)
    thread.start()
    for number in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            tracer.start_span("child").end()
            provider.force_flush()
            done = exporter.force_flush(timeout_millis=0) and exporter.counts.stored == 1
            exporter.shutdown(timeout_millis=0)
            os._exit(0 if done else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    stop.set()
    thread.join()
    """
    )
    run(dsn, code)
    assert query("SELECT count(*) FROM spans WHERE name = 'child'") == [(20,)]
