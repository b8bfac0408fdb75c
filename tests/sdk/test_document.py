"""What docs/how-to/sdk.md says to do, done in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "how-to" / "sdk.md").read_text(encoding="utf-8")
DOCUMENTED_DSN = "postgresql://app@db.example/telemetry"

PACKAGE, SDK = "opentelemetry.instrumentation.logging.handler", "opentelemetry.sdk._logs"

APP = """
import logging
from opentelemetry import trace
with trace.get_tracer("app").start_as_current_span("work"):
    logging.getLogger("app").warning("careful")
"""

STORED = """
    SELECT s.service_name, l.service_name, s.name, l.body
    FROM otel.logs AS l JOIN otel.spans AS s USING (trace_id, span_id)
"""


@pytest.fixture
def environment(dsn: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PG", "PYTHON"))}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "DSN": dsn,
    }


def block(heading: str, language: str, index: int = 0) -> str:
    """Return a block of a language below a heading of the document: the first, unless `index` says otherwise."""
    section = DOCUMENT.partition(f"\n{heading}\n")[2]
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return blocks[index]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout


def stored(dsn: str) -> list[tuple[str, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(STORED).fetchall()


@pytest.mark.parametrize("module", [PACKAGE, SDK])
def test_set_up_by_hand_stores_spans_and_logs_of_the_service(
    module: str, dsn: str, environment: dict[str, str], tmp_path: Path
) -> None:
    set_up = block("## By hand", "python")
    assert f"from {PACKAGE} import LoggingHandler" in set_up
    assert f"`from {SDK} import LoggingHandler`" in DOCUMENT  # the way without the package
    assert DOCUMENTED_DSN in set_up
    app = tmp_path / "app.py"
    app.write_text(set_up.replace(PACKAGE, module).replace(DOCUMENTED_DSN, dsn) + APP, encoding="utf-8")
    run([sys.executable, str(app)], tmp_path, environment)
    assert stored(dsn) == [("shop", "shop", "work", "careful")]


def test_set_up_by_environment_stores_spans_and_logs_of_the_service(
    dsn: str, environment: dict[str, str], tmp_path: Path
) -> None:
    commands = block("## By environment", "sh")
    assert DOCUMENTED_DSN in commands
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    run(["bash", "-eu", "-c", commands.replace(DOCUMENTED_DSN, '"$DSN"')], tmp_path, environment)
    assert stored(dsn) == [("shop", "shop", "work", "careful")]


def test_set_up_by_file_stores_spans_and_logs_of_the_service(
    dsn: str, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("opentelemetry.configuration")
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    (tmp_path / "otel.yaml").write_text(block("## By file", "yaml"), encoding="utf-8")
    run(["bash", "-eu", "-c", block("## By file", "sh")], tmp_path, environment | {"DATABASE_URL": dsn})
    assert stored(dsn) == [("shop", "shop", "work", "careful")]


def test_the_command_that_makes_the_tables_does_so(empty_dsn: str, environment: dict[str, str], tmp_path: Path) -> None:
    command = block("## The tables", "sh")
    commands = re.sub(r"postgresql://\S+", '"$DSN"', command)
    assert commands != command
    run(["bash", "-eu", "-c", commands], tmp_path, environment | {"DSN": empty_dsn})
    assert stored(empty_dsn) == []
