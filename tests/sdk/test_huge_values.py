"""Values that are too large for a row: refused alone, at once, and without taking memory; large ones are stored."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from otel_pg_exporter.sdk import PostgresSpanExporter
from otel_pg_exporter.telemetry import ItemCounts
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.weight import cut, weigh
from tests.proxy import proxy_for
from tests.sdk.conftest import Query
from tests.sdk.support import spans

EXPORT = """
    import logging, os, resource, sys
    logging.disable(logging.WARNING)
    from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
    from tests.sdk.support import records, spans
    value = {value}
    kind = sys.argv[1]
    exporter = PostgresSpanExporter() if kind == "span" else PostgresLogRecordExporter()
    items = spans("a", "b", "c") if kind == "span" else records("a", "b", "c")
    if kind == "span":
        items[1]._attributes = {{"big": value, "small": 1}}
    elif kind == "body":
        items[1].log_record.body = value
    else:
        items[1].log_record.attributes = {{"big": value, "small": 1}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert exporter.export(items).name == "SUCCESS"
    counts = exporter.counts
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(counts.stored, counts.rejected, counts.spooled, after - before, flush=True)
    os._exit(0)  # without a last attempt
"""
PAGE = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


def exported(dsn: str, kind: str, value: str, **environment: str) -> tuple[int, int, int, int]:
    """Export three items, the second with a big value, in a process of its own.

    Return how many were stored, rejected and spooled, and how many bytes that took at most, beside the value.
    """
    variables = {name: each for name, each in os.environ.items() if not name.startswith(("OTEL_", "PYTHON"))}
    variables |= {"OTEL_EXPORTER_POSTGRESQL_DSN": dsn, "PYTHONPATH": str(Path(__file__).parents[2])} | environment
    code = textwrap.dedent(EXPORT).format(value=value)
    done = subprocess.run(
        [sys.executable, "-c", code, kind], env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    stored, rejected, spooled, peak = map(int, done.stdout.split())
    return stored, rejected, spooled, peak * PAGE


TEXT = "its text takes 300,000,000 bytes or more as JSON; at most 134,217,728 are allowed"
BYTES = "its text takes 400,000,000 bytes or more as JSON; at most 134,217,728 are allowed"


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("span", "'x' * 300_000_000", TEXT),
        ("body", "'x' * 300_000_000", TEXT),
        ("log", "bytes(300_000_000)", BYTES),
        ("span", "list(range(1_000_000))", "it has more than 131,072 fields"),
        ("body", "list(range(1_000_000))", "it has more than 131,072 fields"),
    ],
)
def test_a_huge_value_is_refused_alone_and_takes_no_memory(
    dsn: str, query: Query, kind: str, value: str, reason: str
) -> None:
    stored, rejected, _, peak = exported(dsn, kind, value)
    assert (stored, rejected) == (2, 1)
    assert peak < 100 * 2**20
    [(said, size)] = query("SELECT reason, octet_length(otlp) FROM dead_letters")
    assert said.startswith(reason)
    assert said.endswith("(what is kept of it is cut)")
    assert size < 20_000


def test_a_large_value_is_stored_in_a_small_multiple_of_its_size(dsn: str, query: Query) -> None:
    size = 20_000_000
    stored, rejected, _, peak = exported(dsn, "span", f"'x' * {size}")
    assert (stored, rejected) == (3, 0)
    assert peak < 5 * size + 50 * 2**20
    assert query("SELECT max(length(attributes ->> 'big')) FROM spans") == [(size,)]


def test_an_export_that_is_too_large_for_one_transaction_is_written_in_several(dsn: str, query: Query) -> None:
    exporter = PostgresSpanExporter(dsn=dsn, timeout=120)
    batch = spans(*map(str, range(60)))
    for each in batch:
        each._attributes = {"text": "x" * 2**20}
    assert exporter.export(batch) is SpanExportResult.SUCCESS
    assert query("SELECT count(*), count(DISTINCT ingested_at) FROM spans") == [(60, 2)]
    assert exporter.counts == ItemCounts(received=60, stored=60)
    exporter.shutdown()


def test_what_is_too_large_comes_out_of_the_spool_cut_with_a_note(dsn: str, query: Query, tmp_path: Path) -> None:
    settings = {"OTEL_EXPORTER_POSTGRESQL_SPOOL_DIR": str(tmp_path), "OTEL_EXPORTER_POSTGRESQL_TIMEOUT": "0.3"}
    with proxy_for(dsn) as proxy:
        proxy.refuse()
        stored, _, spooled, peak = exported(proxy.dsn, "body", "'x' * 300_000_000", **settings)
        assert (stored, spooled) == (0, 3)
        assert peak < 100 * 2**20
        proxy.up()
        settings["OTEL_EXPORTER_POSTGRESQL_TIMEOUT"] = "60"
        assert exported(proxy.dsn, "body", "'short'", **settings)[0] == 6
    assert query("SELECT count(*) FROM logs") == [(6,)]
    [(body,)] = query("SELECT body FROM logs WHERE length(body) > 100")
    assert body == "x" * 1000 + "… (cut: it had 300,000,000 characters)"


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("a" * 100, 100),
        ('"\\' * 50, 200),
        ("\0" * 100, 600),
        ("é" * 100, 200),
        ("\U0001f600" * 100, 400),
        (b"1" * 75, 100),
    ],
)
def test_text_weighs_what_its_json_takes(value: object, size: int) -> None:
    assert weigh(value, Limits(text_bytes=size)) is None
    assert weigh({"k": [value]}, Limits(text_bytes=size + 10)) is None
    assert f"{size:,} bytes" in str(weigh(value, Limits(text_bytes=size - 1)))


def test_a_cut_tree_is_small_and_says_what_is_missing() -> None:
    tree: dict[str, Any] = {"text": "x" * 9999, "list": list(range(5000)), "bytes": bytes(5000), "number": 7}
    kept = cut(tree)
    assert kept["text"] == "x" * 1000 + "… (cut: it had 9,999 characters)"
    assert kept["list"][-1] == "(cut: it had 5,000 elements)"
    assert len(str(kept)) < 20_000
