"""Mapping files: what the bundled ones declare, and the errors that a user's own file can earn."""

import json
from importlib import resources
from pathlib import Path

import pytest

from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.mapping import FIELDS, Mapping, load
from otel_pg_exporter.model import Column, ColumnType, Signal, Source

FITTING = 'type = "text"\nfrom = "span.name"'


def write(folder: Path, columns: str, *, table: str = 'table = "spans"') -> Path:
    file = folder / "own.toml"
    file.write_text(f"{table}\n{columns}", encoding="utf-8")
    return file


def column(text: str) -> str:
    return f"[[column]]\n{text}\n"


def named(mapping: Mapping, name: str) -> Column:
    (found,) = [column for column in mapping.spans.columns if column.name == name]
    return found


def test_the_bundled_files_declare_three_tables() -> None:
    mapping = load()

    assert [column.name for column in mapping.spans.key] == ["start_minute", "trace_id", "span_id", "start_time"]
    assert mapping.logs.key == ()
    assert [column.name for column in mapping.resources.key] == ["resource_id"]
    assert mapping.table(Signal.TRACES) is mapping.spans
    assert mapping.table(Signal.LOGS) is mapping.logs


def test_every_field_has_a_column_in_the_bundled_files() -> None:
    mapping = load()
    tables = (mapping.spans, mapping.logs, mapping.resources)
    used = {(source.message, source.field) for table in tables for column in table.columns for source in column.sources}

    assert used >= {(message, field) for message, fields in FIELDS.items() for field in fields}


def test_promoted_columns_follow_the_tables_own_and_a_users_follow_genai(tmp_path: Path) -> None:
    mapping = load([write(tmp_path, column(f'name = "mine"\n{FITTING}'))])

    kinds = [column.promoted for column in mapping.spans.columns]
    assert kinds == sorted(kinds)
    assert mapping.spans.columns[-1].name == "mine"
    assert mapping.spans.columns[:-1] == load().spans.columns
    assert mapping.logs == load().logs


def test_a_users_column_is_read_whole(tmp_path: Path) -> None:
    text = """
        name = "tenant_tokens"
        type = "int8"
        from = ['span.attributes["tenant.tokens"]', 'resource.attributes["tenant \\"x\\""]']
        sum_in_traces = true
        comment = "Tokens of a tenant."
    """
    found = named(load([write(tmp_path, column(text))]), "tenant_tokens")

    assert found == Column(
        name="tenant_tokens",
        type=ColumnType.INT8,
        sources=(
            Source("span", "attributes", "tenant.tokens"),
            Source("resource", "attributes", 'tenant "x"'),
        ),
        promoted=True,
        sum_in_traces=True,
        comment="Tokens of a tenant.",
    )


def test_a_users_column_may_go_to_logs(tmp_path: Path) -> None:
    text = column("""name = "code"\ntype = "bool"\nfrom = 'log.attributes["code"]'""")

    assert load([write(tmp_path, text, table='table = "logs"')]).logs.columns[-1].name == "code"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (FITTING, "column number 1: has no name"),
        (f"name = 7\n{FITTING}", "column number 1: name is 7; it must be a string"),
        (f'name = "Mine"\n{FITTING}', 'column "Mine": the name must consist of a-z, 0-9 and _'),
        (f'name = "1x"\n{FITTING}', 'column "1x": the name must consist of'),
        (f'name = "a-b"\n{FITTING}', 'column "a-b": the name must consist of'),
        (f'name = ""\n{FITTING}', 'column "": the name must consist of'),
        (f'name = "{"x" * 64}"\n{FITTING}', "the name has 64 bytes; PostgreSQL keeps 63"),
        (f'name = "name"\n{FITTING}', 'column "name": table spans already has this column, from proto_mappings/spans'),
        (f'name = "gen_ai_tool_name"\n{FITTING}', "already has this column, from proto_mappings/promoted/genai.toml"),
        (f'name = "ingested_at"\n{FITTING}', "table spans already has this column"),
        (f'name = "ctid"\n{FITTING}', "table spans already has this column"),
        ('name = "x"\nfrom = "span.name"', 'column "x": has no type'),
        ('name = "x"\nfrom = "span.name"\ntype = "txt"', "type is 'txt'; it must be one of bool, bytea"),
        ('name = "x"\nfrom = "span.name"\ntype = "txt"', "did you mean text?"),
        ('name = "x"\nfrom = "span.name"\ntype = ["text"]', "type is ['text']; it must be one of"),
        ('name = "x"\ntype = "text"', "from must be a source such as span.name, or a list of sources"),
        ('name = "x"\ntype = "text"\nfrom = []', "from must be a source"),
        ('name = "x"\ntype = "text"\nfrom = [7]', "from must be a source"),
        ('name = "x"\ntype = "text"\nfrom = "span"', "from is 'span'; it must read like span.name or"),
        ('name = "x"\ntype = "text"\nfrom = "upper(span.name)"', "it must read like span.name or"),
        (
            'name = "x"\ntype = "text"\nfrom = "spam.name"',
            "takes span, scope, resource, request only; did you mean span?",
        ),
        (
            'name = "x"\ntype = "text"\nfrom = "log.severity_text"',
            "table spans takes span, scope, resource, request only",
        ),
        ('name = "x"\ntype = "text"\nfrom = "span.nam"', "span has no such field; did you mean name?"),
        ("name = 'x'\ntype = 'text'\nfrom = 'request.attributes[\"k\"]'", "request has no attributes"),
        ("name = 'x'\ntype = 'text'\nfrom = 'span.attributes[\"\"]'", "an attribute key is never empty"),
        ("name = 'x'\ntype = 'text'\nfrom = 'span.attributes[\"a\"b\"]'", "the attribute key is no JSON string"),
        ("name = 'x'\ntype = 'text'\nfrom = 'span.attributes[k]'", "it must read like span.name or"),
        ('name = "x"\ntype = "int8"\nfrom = "span.name"', 'column "x": type is int8; span.name is text'),
        (
            "name = 'x'\ntype = 'int4'\nfrom = 'span.attributes[\"k\"]'",
            "an attribute fits bool, int8, float8, text, jsonb",
        ),
        (
            f'name = "x"\n{FITTING}\nsum_in_traces = true',
            "sum_in_traces needs an int8 column of table spans; this is text",
        ),
        (f'name = "x"\n{FITTING}\nsum_in_traces = 1', "sum_in_traces is 1; it must be true or false"),
        (
            "name = 'span_count'\ntype = 'int8'\nfrom = 'span.flags'\nsum_in_traces = true",
            "a column of this name to table traces, which already has one",
        ),
        (f'name = "x"\n{FITTING}\nkey = true', "key may be set in the package's own tables alone"),
        (f'name = "x"\n{FITTING}\nmax_bytes = 5', "max_bytes may be set in the package's own tables alone"),
        (f'name = "x"\n{FITTING}\ncoment = "c"', "unknown key 'coment'; known are comment, from"),
        (f'name = "x"\n{FITTING}\ncoment = "c"', "did you mean comment?"),
        (f'name = "x"\n{FITTING}\ncomment = 5', "comment must be a string without NUL"),
        (f'name = "x"\n{FITTING}\ncomment = "\\u0000"', "comment must be a string without NUL"),
    ],
)
def test_a_bad_column_is_an_error_that_names_file_column_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = write(tmp_path, column(text))

    with pytest.raises(ConfigurationError) as caught:
        load([file])
    message = str(caught.value)
    assert message.startswith(f"{file}: column ")
    assert reason in message


def test_a_sum_over_logs_is_an_error(tmp_path: Path) -> None:
    text = column("name = 'x'\ntype = 'int8'\nfrom = 'log.flags'\nsum_in_traces = true")

    with pytest.raises(ConfigurationError, match="this is int8 in logs"):
        load([write(tmp_path, text, table='table = "logs"')])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("table = ", "not a TOML file: "),
        ("", "table is None; it must be one of spans, logs"),
        ('table = "traces"', "table is 'traces'; it must be one of spans, logs"),
        ('table = "resources"', "table is 'resources'; it must be one of spans, logs"),
        ('table = ["spans"]', "table is ['spans']; it must be one of"),
        ('table = "spans"', "declares no column"),
        ('table = "spans"\ncolumn = "x"', "declares no column"),
        ('table = "spans"\ncolumn = [1]', "declares no column"),
        ('table = "spans"\ncolumns = []', "unknown key 'columns'; known are column, table; did you mean column?"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError) as caught:
        load([file])
    assert str(caught.value).startswith(f"{file}: {reason}")


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.toml: cannot be read: No such file"):
        load([tmp_path / "absent.toml"])
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load([tmp_path])


def test_a_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(b"table = '\xff'")

    with pytest.raises(ConfigurationError, match=r"own\.toml: not a TOML file"):
        load([file])


def test_two_files_may_not_declare_the_same_column(tmp_path: Path) -> None:
    file = write(tmp_path, column(f'name = "mine"\n{FITTING}'))

    with pytest.raises(
        ConfigurationError, match=r'column "mine": table spans already has this column, from .*own\.toml'
    ):
        load([file, file])


def test_the_documentation_names_every_field_and_every_promoted_column() -> None:
    text = (Path(__file__).parent.parent / "docs" / "reference" / "mapping.md").read_text(encoding="utf-8")

    for message, fields in FIELDS.items():
        assert all(f"`{field}`" in text for field in fields), message
    for promoted in (column for column in load().spans.columns if column.promoted):
        assert f"`{promoted.name}`" in text
        assert all(f"`{source.key}`" in text for source in promoted.sources)


def test_the_example_in_the_documentation_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "promote-attributes.md").read_text(encoding="utf-8")
    file = tmp_path / "example.toml"
    file.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")

    assert len(load([file]).spans.columns) > len(load().spans.columns)


def test_the_files_are_found_in_the_package() -> None:
    folder = resources.files("otel_pg_exporter.proto_mappings")

    assert json.dumps(sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))) == (
        '["logs.toml", "resources.toml", "spans.toml"]'
    )
