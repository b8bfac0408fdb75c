"""That the benchmarks run. What they measure is nobody's to assert."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from benchmarks import spool
from benchmarks.ladder import main
from benchmarks.transcode import main as compare_cores
from otel_pg_exporter.model import Signal

ROOT = Path(__file__).resolve().parent.parent


def test_the_script_runs_by_its_path_and_reports_every_section(tmp_path: Path) -> None:
    report = tmp_path / "results.md"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ladder.py", "--quick", "--sizes", "20", "--markdown", report],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    written = report.read_text()
    for title in ("The ladder", "Tiny batches", "Duplicates", "Bad rows", "Where the client's time goes"):
        assert f"### {title}\n" in written
        assert f"{title}\n=" in done.stdout
    for rung in ("INSERT per row", "executemany", "binary COPY, write_row", "ours: Writer", "floor"):
        assert f"\n| {rung}" in written


def test_a_foreign_database_gets_its_schema_dropped_and_nothing_else_touched(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with psycopg.connect(dsn) as connection:
        before = connection.execute("SELECT nspname FROM pg_namespace ORDER BY 1").fetchall()
        connection.execute("INSERT INTO otel.ingest_requests (request_id) VALUES (gen_random_uuid())")
    main(["--quick", "--dsn", dsn, "--sizes", "10", "--sections", "ladder,isolation", "--signals", "logs,traces"])
    assert "logs " in capsys.readouterr().out
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT nspname FROM pg_namespace ORDER BY 1").fetchall() == before
        assert connection.execute("SELECT count(*) FROM otel.ingest_requests").fetchone() == (1,)


def test_an_unknown_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sections", "ladder,speed"])
    assert "speed: not among ladder, tiny, duplicates, isolation, profile" in capsys.readouterr().err


def test_the_spools_script_compares_with_and_without_and_measures_an_outage(
    dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spool.main(["--dsn", dsn, "--rounds", "1", "--requests", "3", "--items", "2", "--senders", "2"])
    said = capsys.readouterr().out
    assert said.count("of that without") == 2
    assert said.count("into the spool") == 4


def test_the_cores_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    compare_cores(["--sizes", "10", "--rounds", "1"])
    said = capsys.readouterr().out
    assert "Python reference" in said
    assert said.count("genai, 10 a request") == len(Signal)


@pytest.mark.parametrize(
    ("script", "flags", "title"),
    [
        ("floor", ("--signals", "traces"), "The floor"),
        ("memory", (), "Memory"),
        ("sdk", (), "The SDK plugin"),
    ],
)
def test_an_end_to_end_script_puts_its_part_into_the_results(
    tmp_path: Path, script: str, flags: tuple[str, ...], title: str
) -> None:
    report = tmp_path / "results.md"
    report.write_text("# Results\n\n## Another\n\nkept\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--quick", *flags, "--markdown", report],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    written = report.read_text()
    assert "## Another\n\nkept\n" in written
    command = " ".join(["python", f"benchmarks/{script}.py", "--quick", *flags, "--markdown benchmarks/RESULTS.md"])
    assert f"## {title}\n\nWritten by `{command}`.\n" in written
