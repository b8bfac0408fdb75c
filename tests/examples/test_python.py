"""The examples as a user runs them: in processes of their own, by their README's commands, on a real PostgreSQL."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from examples.python import shop
from tests.examples.quickstart import variables
from tests.serving import Serving

pytestmark = pytest.mark.quickstart(language="python")

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "python" / "README.md").read_text(encoding="utf-8")
SDK, RECEIVER = "examples.python.sdk_exporter", "examples.python.otlp_receiver"

SPANS_PER_SERVICE = "SELECT service_name, count(*) FROM spans GROUP BY 1 ORDER BY 1"
SERVICES_OF_LOGS = (
    "SELECT DISTINCT service_name FROM logs JOIN spans USING (trace_id, span_id, service_name) ORDER BY 1"
)

Rows = list[tuple[Any, ...]]
Query = Callable[[str], Rows]


class Shell:
    """A user's second terminal: in the clone, the virtual environment activated, DSN set."""

    def __init__(self, dsn: str, binaries: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PG", "PYTHON"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(binaries)])
        self.variables = kept | {"PATH": path, "DSN": dsn, "PGCONNECT_TIMEOUT": "30"}

    def run(self, commands: str) -> str:
        """Run commands; return what they said."""
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", commands],
            cwd=ROOT,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        assert "Traceback" not in done.stdout, f"{commands}\n{done.stdout}"
        return done.stdout

    def python(self, module: str, *arguments: str) -> str:
        return self.run(f'OTEL_EXPORTER_POSTGRESQL_DSN="$DSN" python -m {" ".join([module, *arguments])}')


@pytest.fixture
def shell(dsn: str, binaries: Path) -> Shell:
    return Shell(dsn, binaries)


@pytest.fixture
def query(dsn: str) -> Iterator[Query]:
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=otel") as connection:
        yield lambda text: connection.execute(text.encode()).fetchall()


@pytest.fixture
def receiver(shell: Shell, tmp_path: Path) -> Iterator[None]:
    """Run `otel-pg-exporter serve` on a free port, which the shell's variables then name."""
    environment = shell.variables | {
        "OTEL_PG_EXPORTER_DSN": shell.variables["DSN"],
        "OTEL_PG_EXPORTER_ACK_TIMEOUT": "30",
        "OTEL_PG_EXPORTER_SPOOL_DIR": str(tmp_path / "spool"),
        **{f"OTEL_PG_EXPORTER_{each}_ENDPOINT": "127.0.0.1:0" for each in ("GRPC", "HTTP", "METRICS")},
    }
    command = [sys.executable, "-m", "otel_pg_exporter", "serve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if found := re.search(r"OTEL_EXPORTER_OTLP_ENDPOINT=(\S+)", line):
                    shell.variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = found[1]
                    break
            else:
                pytest.fail(f"the receiver did not start: {said}")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            _, _ = process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(params=[SDK, RECEIVER])
def door(request: pytest.FixtureRequest) -> str:
    """Return the module that sets an app up: straight into PostgreSQL, or through a receiver that then runs."""
    if request.param == RECEIVER:
        request.getfixturevalue("receiver")
    return str(request.param)


def blocks(heading: str) -> list[str]:
    """Return the commands below a heading of the README."""
    _, _, rest = README.partition(f"\n## {heading}\n")
    assert rest, heading
    return re.findall(r"^```sh\n(.*?)^```$", rest.partition("\n## ")[0], flags=re.MULTILINE | re.DOTALL)


# The apps.


def test_the_shop_tells_the_same_through_either_front_door(door: str, shell: Shell, query: Query) -> None:
    shell.python(door)
    orders, failed = shop.ORDERS, len(shop.BANK_IS_DOWN_AT)
    assert query("""
        SELECT service_name, name, span_kind_name(kind), count(*), count(*) FILTER (WHERE status_code = 2)
        FROM spans GROUP BY 1, 2, 3 ORDER BY 1, 2
    """) == [
        ("payments", "POST /charge", "server", orders, failed),
        ("shop", "POST /charge", "client", orders, failed),
        ("shop", "POST /orders", "server", orders, failed),
        ("shop", "SELECT stock", "client", orders, 0),
        ("shop", "ship orders", "consumer", 1, 0),
    ]
    assert query("SELECT span_count, service_names, count(*) FROM traces GROUP BY 1, 2 ORDER BY 1") == [
        (1, ["shop"], 1),
        (4, ["payments", "shop"], orders),
    ]
    assert query("(TABLE traces EXCEPT TABLE traces_exact) UNION ALL (TABLE traces_exact EXCEPT TABLE traces)") == []


def test_the_shop_has_events_links_and_logs_that_lead_to_its_spans(door: str, shell: Shell, query: Query) -> None:
    shell.python(door)
    orders, failed = shop.ORDERS, len(shop.BANK_IS_DOWN_AT)
    assert query("""
        SELECT event ->> 'name', count(*) FROM spans CROSS JOIN jsonb_array_elements(events) AS event
        GROUP BY 1 ORDER BY 1
    """) == [("exception", 3 * failed), ("stock reserved", orders)]
    assert query("""
        SELECT batch.name, count(*)
        FROM spans AS batch CROSS JOIN jsonb_array_elements(links) AS link
        JOIN spans AS root ON root.trace_id = (link ->> 'trace_id')::uuid
            AND encode(root.span_id, 'hex') = link ->> 'span_id'
        GROUP BY 1
    """) == [("ship orders", orders - failed)]
    assert query("""
        SELECT s.service_name, s.name, severity_name(l.severity_number), count(*)
        FROM logs AS l JOIN spans AS s USING (trace_id, span_id, service_name)
        GROUP BY 1, 2, 3 ORDER BY 1
    """) == [("payments", "POST /charge", "error", failed), ("shop", "POST /orders", "info", orders - failed)]


def test_the_assistant_stores_the_tokens_that_it_says_it_used(door: str, shell: Shell, query: Query) -> None:
    said = shell.python(door, "genai")
    used = {
        model: tuple(int(number) for number in numbers)
        for model, *numbers in re.findall(
            r"(\S+): (\d+) calls, (\d+) tokens in \((\d+) of them cached\), (\d+) out", said
        )
    }
    assert list(used) == ["claude-haiku-4-5", "gpt-5-mini"]
    assert used == {
        model: tuple(numbers)
        for model, *numbers in query("""
            SELECT gen_ai_request_model, count(*), sum(gen_ai_input_tokens), sum(gen_ai_cache_read_input_tokens),
                sum(gen_ai_output_tokens)
            FROM spans WHERE gen_ai_operation_name = 'chat' GROUP BY 1
        """)
    }
    assert query("SELECT sum(gen_ai_input_tokens), sum(gen_ai_output_tokens) FROM traces") == [
        (sum(numbers[1] for numbers in used.values()), sum(numbers[3] for numbers in used.values()))
    ]


def test_the_assistant_asks_a_model_a_tool_and_another_model(door: str, shell: Shell, query: Query) -> None:
    shell.python(door, "genai")
    tree = query("""
        SELECT depth, btrim(operation), kind, error
        FROM trace_tree((SELECT trace_id FROM spans WHERE gen_ai_request_model = 'gpt-5-mini'))
    """)
    assert tree == [
        (0, "invoke_agent support", "internal", False),
        (1, "chat claude-haiku-4-5", "client", False),
        (1, "execute_tool get_order_status", "internal", False),
        (1, "chat claude-haiku-4-5", "client", True),
        (1, "chat gpt-5-mini", "client", False),
    ]
    assert query("""
        SELECT gen_ai_finish_reasons ->> 0, gen_ai_conversation_id, gen_ai_provider_name, gen_ai_response_model,
            attributes ->> 'error.type',
            (attributes ->> 'gen_ai.input.messages')::jsonb #>> '{-1,parts,0,type}',
            (attributes ->> 'gen_ai.output.messages')::jsonb #>> '{0,parts,0,type}'
        FROM spans WHERE gen_ai_operation_name = 'chat' AND gen_ai_conversation_id = 'conv-83c0' ORDER BY start_time
    """) == [
        ("tool_call", "conv-83c0", "anthropic", "claude-haiku-4-5-20251001", None, "text", "tool_call"),
        (None, "conv-83c0", "anthropic", None, "overloaded_error", "tool_call_response", None),
        ("stop", "conv-83c0", "openai", "gpt-5-mini-2025-08-07", None, "tool_call_response", "text"),
    ]


# The README's commands, as they stand there.


@pytest.mark.usefixtures("receiver")
def test_front_door_1_sends_to_the_receiver_without_a_line_of_code_and_by_hand(shell: Shell, query: Query) -> None:
    without_code, by_hand = blocks("Front door 1: the receiver")
    shell.run(without_code)
    assert query(SPANS_PER_SERVICE) == [("assistant", 19), ("shop", 4 * shop.ORDERS + 1)]
    assert query(SERVICES_OF_LOGS) == [("assistant",), ("shop",)]
    shell.run(by_hand)
    assert query("SELECT DISTINCT service_name FROM spans ORDER BY 1") == [("assistant",), ("payments",), ("shop",)]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_shop_says_where_to_send_to_by_standard_variables_alone(
    protocol: str, serving: Serving, shell: Shell, query: Query
) -> None:
    shell.variables.update(variables(serving, "shop", protocol))
    shell.run("opentelemetry-instrument python examples/python/shop.py")
    assert query(SPANS_PER_SERVICE) == [("shop", 4 * shop.ORDERS + 1)]
    assert query(SERVICES_OF_LOGS) == [("shop",)]
    assert query("SELECT DISTINCT attributes ->> 'deployment.environment.name' FROM resources") == [("quickstart",)]


def test_front_door_2_writes_without_a_line_of_code(shell: Shell, query: Query) -> None:
    without_code, _ = blocks("Front door 2: the SDK exporters")
    shell.run(without_code)
    assert query(SPANS_PER_SERVICE) == [("assistant", 19), ("shop", 4 * shop.ORDERS + 1)]
    assert query(SERVICES_OF_LOGS) == [("assistant",), ("shop",)]
    assert query("SELECT count(*) FROM logs WHERE service_name = 'shop' AND trace_id IS NOT NULL") == [(shop.ORDERS,)]


def test_front_door_2_writes_by_hand_and_a_first_look_follows(shell: Shell, query: Query) -> None:
    _, by_hand = blocks("Front door 2: the SDK exporters")
    shell.run(by_hand)
    assert query("SELECT DISTINCT service_name FROM spans ORDER BY 1") == [("assistant",), ("payments",), ("shop",)]
    for look in blocks("Look"):
        assert "payments" in shell.run(look)


def test_promoted_toml_adds_columns_online_and_fills_them_from_then_on(shell: Shell, query: Query) -> None:
    shell.python(SDK)
    migrate, write = blocks("A column of your own")
    assert "column spans.shop_customer_id" in shell.run(migrate)
    assert "is up to date" in shell.run(migrate)
    printed = shell.run(write)
    assert re.search(r"c-1001 +\| +\d+", printed)
    assert query("""
        SELECT count(shop_order_number), sum(shop_order_number), count(DISTINCT shop_customer_id),
            bool_and(shop_customer_id = attributes ->> 'shop.customer.id')
        FROM spans WHERE name = 'POST /orders'
    """) == [(shop.ORDERS, sum(range(1, shop.ORDERS + 1)), 4, True)]


@pytest.mark.usefixtures("receiver")
def test_a_column_of_the_receivers_own_stays_empty_for_writers_without_the_file(shell: Shell, query: Query) -> None:
    shell.run(blocks("A column of your own")[0])
    shell.python(RECEIVER)
    assert query("SELECT count(*), count(shop_customer_id) FROM spans WHERE name = 'POST /orders'") == [
        (shop.ORDERS, 0)
    ]


# The tutorials' commands, one after the other, as a reader types them.


@pytest.mark.usefixtures("receiver")
def test_the_tutorials_lead_to_what_they_show(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(tutorial("getting-started", "python")[0], encoding="utf-8")
    shell.variables["OTEL_PG_EXPORTER_DSN"] = shell.variables["DSN"]  # for what finds the PostgreSQL of `make run`
    _start, _dsn, _set_up, *commands = tutorial("getting-started", "sh")
    said = "".join(shell.run(each.replace("python app.py", f"python {tmp_path}/app.py")) for each in commands)
    for line in (
        "  SPAN    shop ",
        "no answer from the bank for order 13",
        "     POST /charge |",
        " Ada ",
        '{"greeted": "world"}',
        "hello, world",
    ):
        assert line in said
    said = "".join(shell.run(each) for each in tutorial("llm-app", "sh"))
    for line in (
        " claude-haiku-4-5-20251001 |     8 |      0 |         1841 |           193",
        "You have 30 days",
        "conv-a94e",
    ):
        assert line in said
    assert "   execute_tool get_order_status |" in said


def tutorial(name: str, language: str) -> list[str]:
    """Return the blocks of a language of a tutorial."""
    text = (ROOT / "docs" / "tutorial" / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
