"""Where the exporters' messages go, in processes of their own, since logging is set up once per process."""

import subprocess
import sys
import textwrap

import pytest

SET_UPS = {
    "OpenTelemetry's handler alone": "root.addHandler(LoggingHandler(logger_provider=provider))",
    "the SDK's own handler alone": "root.addHandler(SdkHandler(logger_provider=provider))",
    "basicConfig": "logging.basicConfig()",
    "both": "logging.basicConfig(); root.addHandler(LoggingHandler(logger_provider=provider))",
    "a handler of ours": "logging.getLogger('otel_pg_exporter').addHandler(logging.StreamHandler())",
    "none": "",
    "a handler that wants worse": (
        "worse = logging.StreamHandler(); worse.setLevel(logging.CRITICAL); root.addHandler(worse)"
    ),
}
SILENT = {
    "NullHandler": "root.addHandler(logging.NullHandler())",
    "a level": "logging.getLogger('otel_pg_exporter').setLevel(logging.CRITICAL)",
    "no last resort": "logging.lastResort = None",
}
APP = """
import logging
import warnings
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler as SdkHandler
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter

warnings.simplefilter("ignore", DeprecationWarning)
DSN = "postgresql://u@127.0.0.1:1/nowhere"
root = logging.getLogger()
provider = LoggerProvider(shutdown_on_exit=False)
provider.add_log_record_processor(BatchLogRecordProcessor(PostgresLogRecordExporter(dsn=DSN, timeout=0.2)))
PostgresSpanExporter(dsn=DSN).shutdown()  # a second exporter doubles nothing
{set_up}
provider.get_logger("app").emit(body="lost")
provider.shutdown()
"""


def stderr(set_up: str) -> str:
    """Lose a log record, logging set up like this; return what is printed."""
    code = textwrap.dedent(APP).format(set_up=set_up)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("set_up", SET_UPS.values(), ids=SET_UPS)
def test_a_loss_is_printed_exactly_once_however_logging_is_set_up(set_up: str) -> None:
    printed = stderr(set_up)
    assert printed.count("1 log records could not be stored (1 so far)") == 1, printed
    lines = printed.splitlines()
    assert len(lines) == len(set(lines)), printed


@pytest.mark.parametrize("set_up", SILENT.values(), ids=SILENT)
def test_nothing_is_printed_where_the_application_wants_nothing(set_up: str) -> None:
    assert stderr(set_up) == ""
