"""The shop in other languages than Python, by the commands of its README."""

import functools
import re
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests.examples.quickstart import EXAMPLES, assert_a_query_finds, assert_the_shop_is_told, fetch, run, variables
from tests.receiver.certificates import Files
from tests.serving import Serving, start_serving
from tests.support import free_port, wait_until

pytestmark = [pytest.mark.toolchain, pytest.mark.timeout(900)]

PROTOCOLS = {
    "node": ("grpc", "http/protobuf", "http/json"),
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


@each_of(PROTOCOLS | {"node": ("http/protobuf", "http/json")})  # Node's gRPC exporter never retries
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


@each_of(PROTOCOLS)
def test_certificates_and_a_token_are_set_by_standard_variables_too(
    language: str, protocol: str, dsn: str, tmp_path: Path
) -> None:
    command = prepared(language)
    server, client = Files(folder=tmp_path / "server", client_ca=True), Files(folder=tmp_path / "client")
    for files in (server, client):
        files.folder.mkdir()
        files.write()
    key = load_pem_private_key(client.key.read_bytes(), password=None)
    client.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))  # the form for Java
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("of-the-shop\n")
    with start_serving(tmp_path) as start:
        serving = start(
            *("--tls-cert", server.cert, "--tls-key", server.key, "--tls-client-ca", server.authorities),
            *("--auth-bearer-file", tokens),
            variables={"OTEL_PG_EXPORTER_DSN": dsn},
        )
        told = variables(serving, f"shop-{language}", protocol)
        run(
            EXAMPLES / language,
            *command,
            variables=told
            | {
                "OTEL_EXPORTER_OTLP_ENDPOINT": told["OTEL_EXPORTER_OTLP_ENDPOINT"].replace("http:", "https:"),
                "OTEL_EXPORTER_OTLP_CERTIFICATE": str(server.authorities),
                "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(client.cert),
                "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(client.key),
                "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20of-the-shop",
            },
        )
    assert_the_shop_is_told(dsn, f"shop-{language}", SDKS[language])
