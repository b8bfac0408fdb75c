"""The shop in other languages than Python, by the commands of its README."""

import functools
import re
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.examples.quickstart import EXAMPLES, assert_a_query_finds, assert_the_shop_is_told, fetch, run, variables
from tests.faults.test_process_kills import free_port
from tests.serving import Serving, start_serving
from tests.support import wait_until

pytestmark = [pytest.mark.toolchain, pytest.mark.timeout(900)]

PROTOCOLS = {
    "node": ("grpc", "http/protobuf"),
    "go": ("grpc", "http/protobuf"),
    "java": ("grpc", "http/protobuf"),
}
SDKS = {"node": "nodejs", "go": "go", "java": "java"}  # as they name themselves


def fenced(language: str, kind: str) -> str:
    """Return the README's only block of a kind."""
    readme = (EXAMPLES / language / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    return str(block)


@functools.cache
def prepared(language: str) -> list[str]:
    """Run the README's command that fetches all that is needed; return the one that runs the shop."""
    commands = [line.split() for line in fenced(language, "sh").splitlines() if not line.startswith("export ")]
    prepare, start = commands
    fetch(EXAMPLES / language, *prepare)
    return start


def each_of(protocols: Mapping[str, Sequence[str]]) -> pytest.MarkDecorator:
    """Run a test for each language and protocol."""
    return pytest.mark.parametrize(
        ("language", "protocol"),
        [
            pytest.param(language, protocol, marks=pytest.mark.quickstart(language=language))
            for language in protocols
            for protocol in protocols[language]
        ],
    )


@each_of(PROTOCOLS)
def test_the_shop_arrives_and_its_readme_shows_what_is_found(
    language: str, protocol: str, serving: Serving, dsn: str
) -> None:
    run(EXAMPLES / language, *prepared(language), variables=variables(serving, f"shop-{language}", protocol))
    assert_the_shop_is_told(dsn, f"shop-{language}", SDKS[language])
    assert_a_query_finds(dsn, fenced(language, "sql"), fenced(language, "text"))


@each_of(PROTOCOLS | {"node": ("http/protobuf",)})  # Node's gRPC exporter never retries
def test_what_is_refused_while_postgresql_is_away_comes_again_and_is_stored_once(
    language: str, protocol: str, own_server: EmbeddedServer, tmp_path: Path
) -> None:
    command, metrics = prepared(language), f"127.0.0.1:{free_port()}"

    def refused() -> bool:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
            found = re.findall(
                r"^otel_pg_exporter_items_refused\w*{.*} ([\d.e+]+)$", answer.read().decode(), re.MULTILINE
            )
        assert found
        return any(float(each) for each in found)

    with start_serving(tmp_path) as start, ThreadPoolExecutor() as pool:
        serving = start(
            *("--no-spool", "--migrate", "--ack-timeout", "0.5"),
            variables={"OTEL_PG_EXPORTER_DSN": own_server.dsn, "OTEL_PG_EXPORTER_METRICS_ENDPOINT": metrics},
        )
        own_server.stop()
        told = variables(serving, f"shop-{language}", protocol)
        app = pool.submit(run, EXAMPLES / language, *command, variables=told)
        wait_until(lambda: app.done() or refused(), timeout=120)
        own_server.start()
        app.result()
        assert_the_shop_is_told(own_server.dsn, f"shop-{language}", SDKS[language])
