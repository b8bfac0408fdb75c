"""Run an example in its own language, and read back from SQL what it sent."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.serving import Serving

EXAMPLES = Path(__file__).parents[2] / "examples"

Rows = list[tuple[Any, ...]]

_FETCHED = "fetched"


def run(folder: Path, *command: str | Path, variables: Mapping[str, str], timeout: float = 300) -> str:
    """Run a command in an example's folder to its end; return what it said."""
    done = attempt(folder, *command, variables=variables, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def attempt(
    folder: Path, *command: str | Path, variables: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in an example's folder, with no OTEL_* variables but `variables`."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment, but of OTEL_* and PG* variables only the given ones."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PG"))} | dict(variables)


def fetch(folder: Path, *command: str) -> None:
    """Let a language's tool bring what an example needs; skip, and say why, where there is no tool or no registry.

    Once in a test run: two workers at once in one folder would be in each other's way.
    """
    if shutil.which(command[0]) is None:
        pytest.skip(f"{folder.name}: no {command[0]} on this machine")
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    outcome = Path(tempfile.gettempdir()) / f"otel-pg-exporter-{folder.name}-{run_id}"
    with outcome.open("a+", encoding="utf-8") as said:
        fcntl.flock(said, fcntl.LOCK_EX)
        said.seek(0)
        if not (known := said.read()):
            known = _fetched(folder, command)
            said.write(known)
    assert "COMPILATION ERROR" not in known, known  # Maven's, which fetches and compiles in one
    if known != _FETCHED:
        pytest.skip(f"{folder.name}: `{' '.join(command)}` {known}")


def _fetched(folder: Path, command: tuple[str, ...]) -> str:
    try:
        done = attempt(folder, *command, timeout=600)
    except subprocess.TimeoutExpired:
        return "took more than ten minutes"
    return _FETCHED if done.returncode == 0 else f"failed: {done.stdout[-2_000:].strip()}"


def variables(receiver: Serving, service: str, protocol: str) -> dict[str, str]:
    """Return the standard variables that lead an app to a receiver."""
    return sending_to(f"http://{receiver.address if protocol == 'grpc' else receiver.http_address}", protocol) | {
        "OTEL_SERVICE_NAME": service,
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=quickstart",
    }


def sending_to(endpoint: str, protocol: str = "grpc") -> dict[str, str]:
    """Return the standard variables that name an endpoint, and what goes there."""
    return {
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
    }


def assert_a_query_finds(dsn: str, query: str, shown: str) -> None:
    """Hold a query's answer against what psql is shown to print."""
    _, _, *rows = shown.splitlines()
    with closing(psycopg.connect(dsn)) as connection:
        found = connection.execute(query.encode()).fetchall()
    text = {True: "t", False: "f"}
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == [
        [text[cell] if isinstance(cell, bool) else str(cell).strip() for cell in row] for row in found
    ]


def assert_the_shop_is_told(dsn: str, service: str, language: str) -> None:
    """Hold what is stored against what the shop of any language does: spans, attributes, events, logs and summaries."""
    with closing(psycopg.connect(dsn, autocommit=True, options="-c search_path=otel")) as connection:

        def rows(text: str) -> Rows:
            return connection.execute(text.encode()).fetchall()

        assert rows("""
            SELECT s.name, p.name, span_kind_name(s.kind), s.status_code, s.status_message, count(*)
            FROM spans AS s LEFT JOIN spans AS p ON p.trace_id = s.trace_id AND p.span_id = s.parent_span_id
            GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 4
        """) == [
            ("POST /orders", None, "server", 0, "", 2),
            ("POST /orders", None, "server", 2, "bank timed out", 1),
            ("SELECT stock", "POST /orders", "client", 0, "", 3),
            ("charge", "POST /orders", "internal", 0, "", 2),
            ("charge", "POST /orders", "internal", 2, "bank timed out", 1),
            ("chat gpt-5-mini", "POST /orders", "client", 0, "", 2),
        ]
        order = {"http.request.method": "POST", "http.route": "/orders"}
        assert rows("SELECT attributes FROM spans WHERE name = 'POST /orders' ORDER BY start_time") == [
            ({**order, "shop.order.number": number, "shop.order.gift": number == 1},) for number in (1, 2, 3)
        ]
        assert rows("SELECT DISTINCT attributes FROM spans WHERE name LIKE 'chat %'") == [
            (
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "openai",
                    "gen_ai.request.model": "gpt-5-mini",
                    "gen_ai.request.temperature": 0.2,
                    "gen_ai.response.finish_reasons": ["stop"],
                    "gen_ai.usage.input_tokens": 268,
                    "gen_ai.usage.output_tokens": 28,
                },
            )
        ]
        assert rows("""
            SELECT name, event ->> 'name', event -> 'attributes' ->> 'shop.product',
                event -> 'attributes' ->> 'exception.message', count(*)
            FROM spans CROSS JOIN jsonb_array_elements(events) AS event GROUP BY 1, 2, 3, 4 ORDER BY 1, 2
        """) == [
            ("POST /orders", "exception", None, "bank timed out", 1),
            ("POST /orders", "stock reserved", "teapot", None, 3),
            ("charge", "exception", None, "bank timed out", 1),
        ]
        assert rows("""
            SELECT s.name, s.attributes -> 'shop.order.number', severity_name(l.severity_number), l.body,
                l.attributes, l.time - s.start_time BETWEEN interval '-1 second' AND interval '1 minute'
            FROM logs AS l LEFT JOIN spans AS s USING (trace_id, span_id, service_name) ORDER BY l.time
        """) == [
            ("POST /orders", 1, "info", "order 1 placed", {"order": 1}, True),
            ("POST /orders", 2, "error", "order 2 failed: bank timed out", {"order": 2}, True),
            ("POST /orders", 3, "info", "order 3 placed", {"order": 3}, True),
        ]
        assert rows("""
            SELECT root_name, root_service_name, service_names, span_count, error_count, gen_ai_input_tokens,
                gen_ai_output_tokens
            FROM traces ORDER BY start_time
        """) == [
            ("POST /orders", service, [service], *counts)
            for counts in ((4, 0, 268, 28), (3, 2, None, None), (4, 0, 268, 28))
        ]
        assert rows("(TABLE traces EXCEPT TABLE traces_exact) UNION ALL (TABLE traces_exact EXCEPT TABLE traces)") == []
        assert rows("""
            SELECT DISTINCT service_name, attributes ->> 'telemetry.sdk.language',
                attributes ->> 'deployment.environment.name'
            FROM resources
        """) == [(service, language, "quickstart")]
        assert rows("SELECT DISTINCT anomalies FROM spans UNION SELECT DISTINCT anomalies FROM logs") == [(0,)]
        assert rows("SELECT reason FROM dead_letters") == []
