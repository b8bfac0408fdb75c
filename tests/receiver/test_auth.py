"""Who may send: bearer tokens and basic credentials, checked before anything else."""

import base64
import hashlib
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import grpc
import pytest
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.errors import ConfigurationError, UnauthenticatedError
from otel_pg_exporter.receiver.auth import Authenticator
from otel_pg_exporter.receiver.security import Security
from tests.receiver.http1 import PATHS, RawConnection, head
from tests.receiver.support import (
    LOGS,
    METRICS,
    TRACES,
    Blocker,
    Connect,
    ConnectHttp,
    Recorder,
    Serve,
    refusal,
    settings,
)
from tests.receiver.test_grpc_exporters import make_spans
from tests.support import wait_until

TOKEN, OTHER = "a-token-of-some-length", "another-token-of-some-length"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "credentials"


def write(file: Path, *lines: str) -> Path:
    file.touch(mode=0o600)
    file.write_text("\n".join(lines))
    return file


def bearer(file: Path, *lines: str) -> Authenticator:
    return Authenticator(SecuritySettings(auth_bearer_file=write(file, *lines)))


def basic(file: Path, *lines: str) -> Authenticator:
    return Authenticator(SecuritySettings(auth_basic_file=write(file, *lines)))


def sha256(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


def encoded(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def admits(authenticator: Authenticator, *authorization: str) -> bool:
    try:
        authenticator.check(authorization)
    except UnauthenticatedError:
        return False
    return True


def test_each_token_of_the_file_is_taken_and_no_other(file: Path) -> None:
    checks = bearer(file, "# of the collectors", "", f"  {TOKEN}  ", OTHER)
    assert admits(checks, f"Bearer {TOKEN}")
    assert admits(checks, f"bearer  {OTHER} ")
    for wrong in (
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer # of the collectors",
        "Bearer ",
        "Bearer",
        "",
        TOKEN,
    ):
        assert not admits(checks, wrong)


def test_a_token_may_stand_in_the_file_as_its_digest_which_itself_is_no_token(file: Path) -> None:
    checks = bearer(file, sha256(TOKEN))
    assert admits(checks, f"Bearer {TOKEN}")
    assert not admits(checks, f"Bearer {sha256(TOKEN)}")


def test_each_pair_of_the_file_is_taken_with_its_own_password_alone(file: Path) -> None:
    checks = basic(file, "shop:pass:word#with colon", f"pay:{sha256('übel')}", "shop:the next one")
    for right in ("shop:pass:word#with colon", "shop:the next one", "pay:übel"):
        assert admits(checks, encoded(right))
    for wrong in ("shop:übel", "pay:pass:word#with colon", "shop:", "shop", ":", "", f"pay:{sha256('übel')}"):
        assert not admits(checks, encoded(wrong))
    assert not admits(checks, "Basic not base64!")
    assert not admits(checks, "Basic ÿ")


def test_with_two_files_either_kind_of_credentials_will_do(tmp_path: Path) -> None:
    values = SecuritySettings(
        auth_bearer_file=write(tmp_path / "tokens", TOKEN),
        auth_basic_file=write(tmp_path / "passwords", "shop:password"),
    )
    checks = Authenticator(values)
    assert admits(checks, f"Bearer {TOKEN}")
    assert admits(checks, encoded("shop:password"))
    assert checks.challenge == 'Bearer realm="OTLP", Basic realm="OTLP"'


def test_what_is_said_of_refused_credentials_repeats_nothing_of_them(file: Path) -> None:
    checks = bearer(file, TOKEN)
    said = []
    for sent in ([], ["s3cret"], ["Bearer s3cret"], ["s3cret s3cret"], [encoded("a:s3cret")], ["Bearer s3cret"] * 2):
        with pytest.raises(UnauthenticatedError) as info:
            checks.check(sent)
        said.append(str(info.value))
    assert said == [
        "no credentials; the header `authorization` must bring Bearer ones",
        "the header `authorization` must begin with Bearer",
        "wrong Bearer credentials",
        "the header `authorization` must begin with Bearer",
        "the header `authorization` must begin with Bearer",
        "2 headers `authorization` where one is wanted",
    ]


@pytest.mark.parametrize(
    ("setting", "line", "complaint"),
    [
        ("auth_bearer_file", "", "holds no entry, so nobody could send"),
        ("auth_bearer_file", "# s3cret", "holds no entry, so nobody could send"),
        ("auth_bearer_file", "s3cret with blanks", "line 1: no bearer token"),
        ("auth_bearer_file", "sha256:s3cret", "line 1: after sha256: there must be 64 hexadecimal digits"),
        ("auth_bearer_file", sha256(""), "line 1: this is the digest of nothing"),
        ("auth_bearer_file", sha256("\n"), "line 1: this is the digest of nothing"),
        ("auth_basic_file", "s3cret", "line 1: not of the form user:password"),
        ("auth_basic_file", ":s3cret", "line 1: not of the form user:password"),
        ("auth_basic_file", "s3cret:", "line 1: not of the form user:password"),
        ("auth_basic_file", "shop:sha256:s3cret", "line 1: after sha256: there must be 64 hexadecimal digits"),
    ],
)
def test_a_file_that_lets_nobody_in_is_refused_with_its_line_and_without_its_text(
    file: Path, setting: str, line: str, complaint: str
) -> None:
    values = SecuritySettings(**{setting: write(file, line)})
    with pytest.raises(ConfigurationError) as info:
        Authenticator(values)
    assert complaint in str(info.value)
    assert f"--{setting.replace('_', '-')}: {file}" in str(info.value)
    assert "s3cret" not in str(info.value)


def test_a_file_that_is_missing_or_no_text_is_refused(file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--auth-basic-file: cannot read .*: No such file or directory"):
        Authenticator(SecuritySettings(auth_basic_file=file))
    file.write_bytes(b"shop:\xff\xfe")
    with pytest.raises(ConfigurationError, match="is no text in UTF-8"):
        Authenticator(SecuritySettings(auth_basic_file=file))
    file.write_bytes(b"shop:" + b"x" * 2**20)
    with pytest.raises(ConfigurationError, match="has more than 1,048,576 bytes"):
        Authenticator(SecuritySettings(auth_basic_file=file))


def test_a_new_token_is_taken_and_an_old_one_no_more_once_two_looks_agree(file: Path) -> None:
    checks = bearer(file, TOKEN)
    (job,) = checks.jobs
    write(file, OTHER)
    job.run()  # the file may still be in the middle of being written
    assert admits(checks, f"Bearer {TOKEN}")
    job.run()
    assert not admits(checks, f"Bearer {TOKEN}")
    assert admits(checks, f"Bearer {OTHER}")


def test_a_file_that_becomes_wrong_leaves_its_old_tokens_valid(file: Path) -> None:
    checks = bearer(file, TOKEN)
    (job,) = checks.jobs
    for spoil in (lambda: write(file, ""), file.unlink):
        spoil()
        job.run()
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="what was read before stays in force"):
                job.run()
        assert admits(checks, f"Bearer {TOKEN}")
    write(file, OTHER)
    job.run()
    job.run()
    assert admits(checks, f"Bearer {OTHER}")


def test_a_file_that_everybody_can_read_is_warned_about(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    bearer(file, TOKEN)
    assert caplog.messages == []
    file.chmod(0o644)
    checks = bearer(file, TOKEN)
    write(file, OTHER).chmod(0o644)
    (job,) = checks.jobs
    job.run()
    job.run()  # takes it over
    assert caplog.messages == [f"--auth-bearer-file: every user of this machine can read {file}; `chmod o-r` it"] * 2


def test_secrets_that_can_be_guessed_are_warned_about_by_their_lines(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    basic(file, "shop:hunter2", "# comment", f"pay:{sha256('hunter2')}", "ship:1234")
    (message,) = caplog.messages
    assert "line 1, 4: less than 16 characters" in message
    assert "hunter2" not in message


@hypothesis_settings(deadline=None)  # each example writes and reads files
@given(authorization=st.lists(st.text() | st.from_regex(r"(?i)(bearer|basic) .*"), max_size=3))
def test_whatever_is_sent_is_refused_and_breaks_nothing(authorization: list[str]) -> None:
    with TemporaryDirectory() as folder:
        values = SecuritySettings(
            auth_bearer_file=write(Path(folder) / "tokens", TOKEN),
            auth_basic_file=write(Path(folder) / "passwords", "shop:a long enough password"),
        )
        assert not admits(Authenticator(values), *authorization)


# Over gRPC.


@pytest.mark.parametrize("method", [TRACES, LOGS, METRICS])
def test_a_call_without_good_credentials_is_unauthenticated_and_nothing_is_exported(
    serve: Serve, connect: Connect, file: Path, method: str
) -> None:
    recorder = Recorder()
    security = Security(SecuritySettings(auth_bearer_file=write(file, TOKEN)))
    client = connect(serve(recorder, security=security).address)
    for metadata in ((), (("authorization", f"Bearer {OTHER}"),)):
        with pytest.raises(grpc.RpcError) as info:
            client.channel.unary_unary(method, None, None)(b"", metadata=metadata, timeout=60)
        heard = refusal(info.value)
        assert heard.code is grpc.StatusCode.UNAUTHENTICATED
        assert heard.trailers == {}
        assert OTHER not in heard.details
    assert recorder.calls == []
    client.channel.unary_unary(method, None, None)(b"", metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=60)


def test_a_call_without_credentials_is_answered_while_all_places_are_taken_and_before_its_body_is_there(
    serve: Serve, connect: Connect, file: Path
) -> None:
    blocker = Blocker()
    security = Security(SecuritySettings(auth_bearer_file=write(file, TOKEN)))
    running = serve(blocker, settings(max_calls=1), security=security)
    client = connect(running.address)
    good = (("authorization", f"Bearer {TOKEN}"),)
    waiting = client.channel.unary_unary(TRACES, None, None).future(b"x", metadata=good, timeout=60)
    wait_until(lambda: blocker.calls)
    reserved = running.budget.level

    def endless() -> "list[bytes]":
        blocker.released.wait(60)
        return []

    bodyless = client.channel.stream_unary(TRACES, None, None)
    with pytest.raises(grpc.RpcError) as info:
        bodyless(iter(endless, [b""]), timeout=120)
    assert refusal(info.value).code is grpc.StatusCode.UNAUTHENTICATED
    assert running.budget.level == reserved
    blocker.released.set()
    assert waiting.result() == b""


def test_health_checks_need_no_credentials(serve: Serve, connect: Connect, file: Path) -> None:
    security = Security(SecuritySettings(auth_bearer_file=write(file, TOKEN)))
    client = connect(serve(Recorder(), security=security).address)
    answer = client.export("/grpc.health.v1.Health/Check", b"")
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING


def test_refused_credentials_are_logged_with_their_sender_now_and_then_and_never_themselves(
    serve: Serve, connect: Connect, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    security = Security(SecuritySettings(auth_basic_file=write(file, "shop:a long enough password")))
    client = connect(serve(Recorder(), security=security).address)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                client.channel.unary_unary(TRACES, None, None)(
                    b"", metadata=(("authorization", encoded("shop:s3cret")),), timeout=60
                )
    (message,) = [message for message in caplog.messages if "credentials" in message]
    assert message.startswith("refused a request of ipv4:127.0.0.1:")
    assert message.endswith(": wrong Basic credentials")


@pytest.mark.parametrize("kind", ["bearer", "basic"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_official_exporters_send_with_credentials_from_their_environment(
    serve: Serve, file: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, kind: str
) -> None:
    line, header = {
        "bearer": (TOKEN, f"authorization=Bearer%20{TOKEN}"),
        "basic": ("shop:password of the shop", f"Authorization={quote(encoded('shop:password of the shop'))}"),
    }[kind]
    recorder = Recorder()
    running = serve(recorder, security=Security(SecuritySettings(**{f"auth_{kind}_file": write(file, line)})))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", header)
    exporter: SpanExporter
    if protocol == "grpc":
        exporter = GrpcSpanExporter(running.address, insecure=True, timeout=60)
    else:
        exporter = HttpSpanExporter(f"http://127.0.0.1:{running.http_port}/v1/traces", timeout=60)
    assert exporter.export(make_spans(1)) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert len(recorder.calls) == 1


# Over HTTP.


@pytest.mark.parametrize("path", PATHS.values())
def test_a_request_without_good_credentials_is_answered_401_with_a_challenge_and_nothing_is_exported(
    serve: Serve, connect_http: ConnectHttp, tmp_path: Path, path: str
) -> None:
    recorder = Recorder()
    security = Security(
        SecuritySettings(
            auth_bearer_file=write(tmp_path / "tokens", TOKEN),
            auth_basic_file=write(tmp_path / "passwords", "shop:password of the shop"),
        )
    )
    client = connect_http(serve(recorder, security=security))
    for headers in ({}, {"authorization": f"Bearer {OTHER}"}, {"authorization": OTHER}):
        reply = client.post(path, b"", headers=headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == 'Bearer realm="OTLP", Basic realm="OTLP"'
        assert OTHER not in f"{reply.headers} {reply.refusal}"
    assert recorder.calls == []
    for good in (f"Bearer {TOKEN}", encoded("shop:password of the shop")):
        assert client.post(path, b"", headers={"Authorization": good}).status == 200


def test_a_request_without_credentials_is_answered_while_all_places_are_taken_and_before_its_body_is_there(
    serve: Serve, connect: Connect, file: Path
) -> None:
    blocker = Blocker()
    security = Security(SecuritySettings(auth_bearer_file=write(file, TOKEN)))
    running = serve(blocker, settings(max_calls=1), security=security)
    good = (("authorization", f"Bearer {TOKEN}"),)
    waiting = connect(running.address).channel.unary_unary(TRACES, None, None).future(b"x", metadata=good, timeout=60)
    wait_until(lambda: blocker.calls)
    reserved = running.budget.level
    with RawConnection(running.http_port) as connection:
        connection.send(head(PATHS["traces"], "content-length: 1000000"))
        assert connection.reply().status == 401
    assert running.budget.level == reserved
    blocker.released.set()
    assert waiting.result() == b""


def test_a_request_with_two_credentials_is_refused(serve: Serve, file: Path) -> None:
    security = Security(SecuritySettings(auth_bearer_file=write(file, TOKEN)))
    with RawConnection(serve(Recorder(), security=security).http_port) as connection:
        line = f"authorization: Bearer {TOKEN}"
        connection.send(head(PATHS["traces"], line, line, "content-length: 0"))
        assert connection.reply().status == 401
