import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.model import Column, ColumnType, Source, Table
from otel_pg_exporter.transcode.copy_format import NULL, bytea_field, control_row, join, split
from tests.transcode.support import columns, read


@given(st.lists(st.none() | st.binary(max_size=50)))
def test_split_returns_what_was_joined(contents: list[bytes | None]) -> None:
    fields = [NULL if content is None else bytea_field(content) for content in contents]

    assert split(join(fields, len(fields))) == contents


@pytest.mark.parametrize("table", [columns().spans, columns().logs, columns().resources], ids=lambda table: table.name)
def test_a_control_row_has_a_value_in_every_column(table: Table) -> None:
    assert None not in read(table, control_row(table)).values()


def test_a_control_row_knows_every_type() -> None:
    every = tuple(Column(name=f"c_{kind}", type=kind, sources=(Source("span", "name", None),)) for kind in ColumnType)
    row = control_row(Table(name="all", columns=every))

    assert struct.unpack_from(">h", row) == (len(ColumnType),)
    assert None not in read(Table(name="all", columns=every), row).values()
