"""Secrets that are planted wherever one may be, and looked for in all that the programs say."""

import base64
import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import grpc
import httpx
import psycopg
import pytest

from tests.receiver.certificates import CA, Files, client_context
from tests.receiver.support import TRACES, refusal
from tests.serving import Serving, StartServing, environment, run, span_request, start_serving
from tests.support import wait_until


@dataclass(frozen=True, slots=True)
class Canaries:
    """Secrets to be planted, each found nowhere else."""

    planted: dict[str, str] = field(default_factory=dict)

    def plant(self, what: str, secret: str = "") -> str:
        """Make a secret, or take note of one."""
        self.planted[what] = secret or secrets.token_hex(16)
        return self.planted[what]

    def assert_kept(self, *said: str) -> None:
        """Fail if one was said, also in another spelling."""
        for what, secret in self.planted.items():
            raw = secret.encode()
            spellings = {secret, quote(secret, safe=""), raw.hex(), base64.b64encode(raw).decode()}
            found = [text for text in said for spelling in spellings if spelling in text]
            assert found == [], f"{what} was said"


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[StartServing]:
    with start_serving(tmp_path) as start:
        yield start


@pytest.fixture
def password_dsn(dsn: str, canaries: Canaries) -> Iterator[str]:
    """Return the DSN of a database with the tables, with a password in it."""
    role, password = f"canary_{os.getpid()}", canaries.plant("the DSN's password")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'".encode())
        info = connection.info
        yield f"postgresql://{role}:{password}@{info.host}:{info.port}/{info.dbname}"
        connection.execute(f"DROP ROLE {role}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """Files with secrets, and the settings that name them."""

    files: Files
    token: str
    password: str

    @property
    def variables(self) -> dict[str, str]:
        folder = self.files.folder
        return {
            "OTEL_PG_EXPORTER_TLS_CERT": str(self.files.cert),
            "OTEL_PG_EXPORTER_TLS_KEY": str(self.files.key),
            "OTEL_PG_EXPORTER_AUTH_BEARER_FILE": str(folder / "tokens"),
            "OTEL_PG_EXPORTER_AUTH_BASIC_FILE": str(folder / "passwords"),
            "OTEL_PG_EXPORTER_LOG_LEVEL": "debug",
        }


@pytest.fixture
def planted(tmp_path: Path, canaries: Canaries) -> Planted:
    files = Files(folder=tmp_path)
    files.write()
    for number, line in enumerate(files.key.read_text().splitlines()[1:-1]):
        canaries.plant(f"line {number} of the key", line)
    token, password = canaries.plant("a token"), canaries.plant("a basic password")
    digest = hashlib.sha256(canaries.plant("a token that is hashed").encode()).hexdigest()
    canaries.plant("its digest", digest)
    for name, lines in {"tokens": f"{token}\nsha256:{digest}\n", "passwords": f"shop:{password}\n"}.items():
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(lines)
    return Planted(files=files, token=token, password=password)


@contextlib.contextmanager
def watched_arguments() -> Iterator[list[str]]:
    """Collect the command lines of all processes that this one and its children start meanwhile."""
    seen: set[str] = set()
    found: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen.update(descendants(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found.extend(seen)


def descendants(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield from descendants(int(child))


def send(serving: Serving, *authorization: str) -> tuple[grpc.StatusCode, str]:
    """Send a span by gRPC; return the status and what else was heard."""
    port = serving.address.rpartition(":")[2]
    channel = grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(CA.cert_pem.bytes()))
    metadata = tuple(("authorization", value) for value in authorization)
    with channel:
        try:
            answer = channel.unary_unary(TRACES, None, None)(span_request(), metadata=metadata, timeout=120)
        except grpc.RpcError as exc:
            heard = refusal(exc)
            return heard.code, f"{heard.details} {heard.initial} {heard.trailers}"
        return grpc.StatusCode.OK, repr(answer)


def post(serving: Serving, *authorization: str) -> tuple[int, str]:
    """Send a span by HTTP; return the status and what else was heard."""
    headers = [("content-type", "application/x-protobuf"), *(("authorization", value) for value in authorization)]
    url = f"https://localhost:{serving.http_address.rpartition(':')[2]}/v1/traces"
    heard = httpx.post(url, content=span_request(), headers=headers, verify=client_context(), timeout=120)
    return heard.status_code, f"{heard.headers} {heard.text}"


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_receiver_keeps_its_secrets_and_its_senders_through_every_refusal_and_reload(
    serve: StartServing, planted: Planted, password_dsn: str, canaries: Canaries, log_format: str
) -> None:
    said = []
    variables = {
        **planted.variables,
        "OTEL_PG_EXPORTER_DSN": password_dsn,
        "OTEL_PG_EXPORTER_LOG_FORMAT": log_format,
    }
    with watched_arguments() as arguments:
        serving = serve(variables=variables)
        for good in (f"Bearer {planted.token}", basic(f"shop:{planted.password}")):
            status, heard = send(serving, good)
            assert status is grpc.StatusCode.OK, heard
            code, answer = post(serving, good)
            assert code == 200, answer
            said += [heard, answer]
        wrong = canaries.plant("a wrong credential")
        for bad in (f"Bearer {wrong}", wrong, f"{wrong} {wrong}", basic(f"shop:{wrong}"), f"Basic {wrong}"):
            status, heard = send(serving, bad)
            assert status is grpc.StatusCode.UNAUTHENTICATED
            code, answer = post(serving, bad)
            assert code == 401
            said += [heard, answer]
        for path in ("metrics", "healthz", "readyz"):  # for which nobody needs credentials
            shown = httpx.get(f"{serving.metrics_url}/{path}", timeout=120)
            assert shown.status_code == 200
            said.append(f"{shown.headers} {shown.text}")
        with (planted.files.folder / "tokens").open("a") as tokens:
            tokens.write(f"not a token: {canaries.plant('a token that is misspelt')}\n")
        planted.files.key.write_text(planted.files.key.read_text()[:-80])
        wait_until(lambda: serving.stderr.count("what was read before stays in force") >= 2)
        serving.send(signal.SIGTERM)
        assert serving.wait() == 0
    assert any("otel_pg_exporter serve" in line for line in arguments)
    assert "wrong Bearer credentials" in serving.stderr
    canaries.assert_kept(serving.stdout, serving.stderr, *arguments, *said)


def test_an_outage_and_a_wrong_password_repeat_no_dsn(
    serve: StartServing, password_dsn: str, dsn: str, canaries: Canaries
) -> None:
    wrong = password_dsn.replace(canaries.planted["the DSN's password"], canaries.plant("a wrong password"))
    said = []
    for words in (
        "serve",
        "migrate",
        "migrate --check",
        "check",
        "partitions list",
        "tail",
        "verify --since 1d",
        "dead-letters list",
        "bench",
    ):
        ended = run(*words.split(), OTEL_PG_EXPORTER_DSN=wrong, OTEL_PG_EXPORTER_LOG_LEVEL="debug")
        assert ended.returncode == 1, ended.stderr
        assert "password authentication failed" in ended.stdout + ended.stderr
        said += [ended.stdout, ended.stderr]
    serving = serve(variables={"OTEL_PG_EXPORTER_DSN": password_dsn, "OTEL_PG_EXPORTER_LOG_LEVEL": "debug"})
    with psycopg.connect(dsn, autocommit=True) as connection:
        role = password_dsn.partition("//")[2].partition(":")[0]
        connection.execute(f"ALTER ROLE {role} NOLOGIN".encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role])
    with grpc.insecure_channel(serving.address) as channel:
        said.append(repr(channel.unary_unary(TRACES, None, None)(span_request(), timeout=120)))  # spooled
    wait_until(lambda: "not permitted to log in" in serving.stderr)
    serving.send(signal.SIGTERM)
    assert serving.wait() == 0
    canaries.assert_kept(serving.stdout, serving.stderr, *said)


def test_settings_are_shown_and_checked_without_the_secrets_in_them(
    planted: Planted, password_dsn: str, canaries: Canaries
) -> None:
    variables = {**planted.variables, "OTEL_PG_EXPORTER_DSN": password_dsn}
    said = []
    for command in (["config", "show"], ["config", "show", "--json"], ["config", "show", "--toml"], ["check"]):
        ended = run(*command, **variables)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        said += [ended.stdout, ended.stderr]
    assert "tls.key" in said[0]
    canaries.assert_kept(*said)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://otel:{}@db.example:port/telemetry",
        "postgresql://otel:{}/x@db.example/telemetry",
        "postgresql://otel:{}%zz@db.example/telemetry",
        "host=db.example password='{} dbname=telemetry",
        "host=db.example passwort={}",
        "{}",
    ],
)
def test_a_malformed_dsn_is_not_repeated_wherever_it_stands(tmp_path: Path, dsn: str, canaries: Canaries) -> None:
    malformed = dsn.format(canaries.plant("the DSN's password"))
    file = tmp_path / "settings.toml"
    file.write_text(f'dsn = "{malformed}"\n')
    said = []
    for ended in (
        run("serve", OTEL_PG_EXPORTER_DSN=malformed),
        run("migrate", OTEL_PG_EXPORTER_DSN=malformed),
        run("serve", "--config", file),
        run("serve", f"--dsn={malformed}"),
    ):
        assert ended.returncode == 2, ended.stderr
        said += [ended.stdout, ended.stderr]
    canaries.assert_kept(*said)


def test_a_dsn_in_the_place_of_another_setting_is_not_repeated(canaries: Canaries) -> None:
    secret = canaries.plant("the DSN's password")
    said = []
    for dsn in (f"postgresql://otel:{secret}@db.example/x", f"otel:{secret}@db.example", f"password={secret}"):
        for ended in (
            run("config", "show", OTEL_PG_EXPORTER_WRITERS=dsn),
            run("config", "show", OTEL_PG_EXPORTER_SELF_METRICS_ENDPOINT=dsn),
            run("tail", f"--connect-timeout={dsn}"),
        ):
            assert (ended.stdout + ended.stderr).strip()
            said += [ended.stdout, ended.stderr]
    canaries.assert_kept(*said)


def test_a_secret_in_the_place_of_its_file_or_of_an_endpoint_is_not_repeated(
    planted: Planted, canaries: Canaries
) -> None:
    key, token = planted.files.key.read_text(), planted.token
    secret = canaries.plant("the DSN's password")
    dsn = f"postgresql://otel:{secret}@db.example/x"
    said = []
    for variables in (
        {"TLS_CERT": key, "TLS_KEY": key},
        {"TLS_CERT": str(planted.files.cert), "TLS_KEY": key},
        {"AUTH_BEARER_FILE": token},
        {"AUTH_BASIC_FILE": f"shop:{planted.password}"},
        *({name: dsn} for name in ("GRPC_ENDPOINT", "HTTP_ENDPOINT", "METRICS_ENDPOINT", "AUTH_BEARER_FILE")),
    ):
        ended = run("serve", **{f"OTEL_PG_EXPORTER_{name}": value for name, value in variables.items()})
        assert ended.returncode == 2, ended.stderr
        said += [ended.stdout, ended.stderr]
    ended = run("config", "show", OTEL_PG_EXPORTER_TLS_CERT=key, OTEL_PG_EXPORTER_TLS_KEY=key)
    assert "PRIVATE KEY-----***" in ended.stdout
    canaries.assert_kept(*said, ended.stdout, ended.stderr)


def test_a_settings_file_with_a_slip_in_it_is_not_repeated(tmp_path: Path, canaries: Canaries) -> None:
    secret = canaries.plant("the DSN's password")
    said = []
    for slip in (
        f'dsn = "postgresql://otel:{secret}@db/x',
        f"dsn = postgresql://otel:{secret}@db/x",
        f'dsn = ["{secret}"]',
    ):
        file = tmp_path / "settings.toml"
        file.write_text(slip)
        ended = run("serve", "--config", file)
        assert ended.returncode == 2, ended.stderr
        said += [ended.stdout, ended.stderr]
    canaries.assert_kept(*said)


def test_the_password_of_its_own_postgresql_is_in_no_argument_and_no_line(
    serve: StartServing, open_folder: Path, canaries: Canaries
) -> None:
    open_folder.chmod(0o755)
    with watched_arguments() as arguments:
        serving = serve("--data-dir", open_folder / "data", variables={"OTEL_PG_EXPORTER_LOG_LEVEL": "debug"})
        (passfile,) = (open_folder / "data").rglob("passfile")
        canaries.plant("the generated password", passfile.read_text().strip().rpartition(":")[2])
        serving.send(signal.SIGTERM)
        assert serving.wait() == 0
    assert any("initdb" in line for line in arguments)
    canaries.assert_kept(serving.stdout, serving.stderr, *arguments)


_APP = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from otel_pg_exporter.sdk import PostgresSpanExporter
exporter = PostgresSpanExporter(timeout=1.0)
print(exporter, vars(exporter) if hasattr(exporter, "__dict__") else "")
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(exporter))
provider.get_tracer("app").start_span("work").end()
provider.shutdown()
"""


@pytest.mark.parametrize("dsn", ["postgresql://otel:{}@127.0.0.1:1/telemetry", "postgresql://otel:{}@:x/telemetry"])
def test_the_sdk_exporters_repeat_no_dsn(dsn: str, canaries: Canaries) -> None:
    variables = {"OTEL_EXPORTER_POSTGRESQL_DSN": dsn.format(canaries.plant("the DSN's password"))}
    ended = subprocess.run(
        [sys.executable, "-c", _APP],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stderr != ""
    canaries.assert_kept(ended.stdout, ended.stderr)
