# ruff: noqa: ANN401 - telemetry's values have any type
"""PostgreSQL takes the rows as they are, and returns what they say."""

from typing import Any

import psycopg
import pytest
from hypothesis import given
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from otel_pg_exporter.model import RowBatch, Signal, Table
from otel_pg_exporter.transcode.copy_format import control_row
from tests.transcode.support import NOW, columns, log_request, logs, read, trace_request, traces
from tests.transcode.test_any_value import encode, normalised, trees
from tests.transcode.test_every_field import full, run
from tests.transcode.test_hostile_values import hostile_spans

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"

Connection = psycopg.Connection[Any]


def copy(connection: Connection, table: Table, rows: list[bytes]) -> None:
    names = ", ".join(column.name for column in table.columns)
    with connection.cursor().copy(f"COPY otel.{table.name} ({names}) FROM STDIN (FORMAT BINARY)".encode()) as stream:
        stream.write(_SIGNATURE + b"".join(rows) + _TRAILER)


def stored(connection: Connection, table: Table) -> list[dict[str, Any]]:
    """Return the table's rows in the types that `support.read` gives them."""
    names = ", ".join(f"{column.name}" for column in table.columns)
    rows = connection.execute(f"SELECT {names} FROM otel.{table.name}".encode()).fetchall()
    kept = [column.name for column in table.columns]
    return [{name: getattr(value, "bytes", value) for name, value in zip(kept, row, strict=True)} for row in rows]


def same(found: Any, expected: Any) -> bool:
    """Compare, but for the spelling of doubles: jsonb writes 1e16 as an integer, exactly."""
    match expected:
        case float():
            return isinstance(found, int | float) and float(found) == expected
        case list():
            return len(found) == len(expected) and all(map(same, found, expected))
        case dict():
            return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
        case _:
            return type(found) is type(expected) and bool(found == expected)


def _span_id(row: dict[str, Any]) -> bytes:
    return bytes(row["span_id"])


def check(connection: Connection, batch: RowBatch) -> None:
    table = columns().table(batch.signal)
    copy(connection, columns().resources, list(batch.resources.values()))
    copy(connection, table, list(batch.rows))
    expected = [read(table, row) for row in batch.rows]
    found = stored(connection, table)
    assert same(sorted(found, key=_span_id), sorted(expected, key=_span_id))
    resources = [read(columns().resources, row) for row in batch.resources.values()]
    assert same(stored(connection, columns().resources), resources)


@pytest.mark.parametrize("signal", list(Signal))
def test_a_request_with_all_fields_set_returns_from_the_database(dsn: str, signal: Signal) -> None:
    with psycopg.connect(dsn) as connection:
        check(connection, run(signal, full(signal)))


def test_hostile_spans_return_from_the_database(dsn: str) -> None:
    batch = traces(trace_request(*hostile_spans()).SerializeToString())

    assert not batch.rejected
    with psycopg.connect(dsn) as connection:
        check(connection, batch)


@pytest.mark.parametrize("table", [columns().spans, columns().logs, columns().resources], ids=lambda table: table.name)
def test_the_control_row_is_valid(dsn: str, table: Table) -> None:
    with psycopg.connect(dsn) as connection:
        copy(connection, table, [control_row(table)])
        assert stored(connection, table) == [read(table, control_row(table))]


def test_keys_equal_what_the_database_returns_in_binary(dsn: str) -> None:
    batch = traces(trace_request(*hostile_spans()).SerializeToString())
    with psycopg.connect(dsn) as connection:
        copy(connection, columns().spans, list(batch.rows))
        names = ", ".join(column.name for column in columns().spans.key)
        cursor = connection.cursor(binary=True)
        cursor.execute(f"SELECT {names} FROM otel.spans".encode())
        assert cursor.pgresult is not None
        result = cursor.pgresult
        found = [
            b"".join(result.get_value(row, field) or b"" for field in range(result.nfields))
            for row in range(result.ntuples)
        ]
    assert sorted(found) == sorted(batch.keys)


def test_any_value_returns_from_the_database(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:

        @given(trees)
        def returns(tree: Any) -> None:
            record = LogRecord(time_unix_nano=NOW, body=encode(tree, AnyValue()))
            batch = logs(log_request(record).SerializeToString())
            connection.execute("TRUNCATE otel.logs")
            copy(connection, columns().logs, list(batch.rows))
            (found,) = stored(connection, columns().logs)
            column = "body" if isinstance(tree, str) else "body_json"
            assert same(found[column], normalised(tree))

        returns()
