"""TLS on both front doors: what is served, what is refused, and certificates that change under way."""

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.receiver.security import Security
from otel_pg_exporter.receiver.tls import ServerTls
from tests.receiver.certificates import CA, OTHER_CA, Door, Files, client_context, new_leaf
from tests.receiver.support import Recorder, Serve
from tests.receiver.test_grpc_exporters import make_spans
from tests.support import wait_until

DAY = 86_400

Open = Callable[[Security], Door]

_POST = b"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"
_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_PING = b"\0\0\x08\6\0\0\0\0\0" + b"12345678"


@pytest.fixture(params=["grpc", "http"])
def open_door(request: pytest.FixtureRequest, serve: Serve) -> Open:
    """Start a receiver, and return one of its front doors."""

    def start(security: Security) -> Door:
        running = serve(Recorder(), security=security)
        if request.param == "grpc":
            return Door(port=running.port, alpn="h2", hello=_SETTINGS, again=_PING)
        return Door(port=running.http_port, alpn="http/1.1", hello=_POST, again=_POST)

    return start


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(folder=tmp_path)


@pytest.fixture
def mutual(tmp_path: Path) -> Files:
    """Return files that ask for clients' certificates."""
    return Files(folder=tmp_path, client_ca=True)


def security_of(files: Files) -> Security:
    return Security(files.settings)


def look(security: Security, times: int = 2) -> None:
    assert security.tls is not None
    for _ in range(times):
        security.tls.look()


def test_both_doors_present_the_certificate(open_door: Open, files: Files) -> None:
    certificate = files.write()
    assert open_door(security_of(files)).presented() == certificate


def test_what_is_older_than_tls_1_2_is_refused_and_1_2_is_served(open_door: Open, files: Files) -> None:
    files.write()
    door = open_door(security_of(files))
    old = client_context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.deprecated_call():
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert offered_version(old) == b"\3\2"  # this client, at least, would speak TLS 1.1
    with pytest.raises(ssl.SSLError), door.connect(context=old):
        pass
    current = client_context()
    current.maximum_version = ssl.TLSVersion.TLSv1_2
    with door.connect(context=current) as connection:
        assert connection.socket.version() == "TLSv1.2"


def offered_version(context: ssl.SSLContext) -> bytes:
    said = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said, server_hostname="localhost").do_handshake()
    return said.read()[9:11]


def test_a_client_without_tls_gets_nothing(open_door: Open, files: Files) -> None:
    files.write()
    door = open_door(security_of(files))
    with closing(socket.create_connection(("127.0.0.1", door.port), timeout=120)) as plain:
        plain.sendall(door.hello)
        try:
            heard = plain.recv(65_536)
        except ConnectionResetError:
            heard = b""
    assert heard[:1] in {b"", b"\x15"}  # closed, or a TLS alert


def test_a_handshake_that_fails_on_http_is_told_with_the_peer_and_what_the_sender_lacks(
    serve: Serve, files: Files, mutual: Files, caplog: pytest.LogCaptureFixture
) -> None:
    def told(security: Security, speak: Callable[[socket.socket], None]) -> str:
        caplog.clear()
        port = serve(Recorder(), security=security).http_port
        with closing(socket.create_connection(("127.0.0.1", port), timeout=120)) as connection:
            speak(connection)
            wait_until(lambda: "TLS handshake" in caplog.text)
        (message,) = (record.getMessage() for record in caplog.records if "handshake with" in record.getMessage())
        return message

    def without_the_authority(connection: socket.socket) -> None:
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")

    def without_a_certificate(connection: socket.socket) -> None:
        wrapped = client_context().wrap_socket(connection.dup(), server_hostname="localhost")
        with closing(wrapped), contextlib.suppress(OSError):
            wrapped.recv(1)

    files.write()
    mutual.write()
    plain = told(security_of(files), lambda connection: connection.sendall(_POST))
    assert plain == (
        "TLS handshake with 127.0.0.1 failed: http request: it does without TLS; its endpoint must begin with https://"
    )
    assert "does not trust our certificate" in told(security_of(files), without_the_authority)
    assert "--tls-client-ca" in told(security_of(mutual), without_a_certificate)


def test_new_handshakes_get_a_new_certificate_and_old_connections_live_on(open_door: Open, files: Files) -> None:
    old = files.write()
    security = security_of(files)
    door = open_door(security)
    with door.connect() as connection:
        assert connection.certificate == old
        new = files.write()
        look(security, times=1)
        assert door.presented() == old
        look(security, times=1)
        assert door.presented() == new
        assert connection.ask()
    files.write()
    look(security)
    assert door.presented() not in {old, new}


def test_the_thread_beside_takes_new_files_within_seconds(open_door: Open, files: Files) -> None:
    files.write()
    security = security_of(files)
    with ExitStack() as stack:
        security.follow(stack)
        door = open_door(security)
        new = files.write()
        wait_until(lambda: door.presented() == new)


def test_a_swapped_link_is_followed_as_kubernetes_updates_secrets(open_door: Open, tmp_path: Path) -> None:
    for name in ("..old", "..new"):
        (tmp_path / name).mkdir()
    Files(folder=tmp_path / "..old").write()
    new = Files(folder=tmp_path / "..new").write()
    files = Files(folder=tmp_path)
    (tmp_path / "..data").symlink_to("..old")
    for each in (files.cert, files.key):
        each.symlink_to(f"..data/{each.name}")
    security = security_of(files)
    door = open_door(security)
    (tmp_path / "..data_tmp").symlink_to("..new")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    look(security)
    assert door.presented() == new


def test_a_certificate_and_a_key_may_be_replaced_one_after_the_other(open_door: Open, files: Files) -> None:
    old = files.write()
    security = security_of(files)
    door = open_door(security)
    cert, leaf = files.cert.read_bytes(), new_leaf()
    new = files.write(leaf)
    after = files.cert.read_bytes()
    files.cert.write_bytes(cert)  # for now only the key is new
    look(security, times=1)  # finds a change, and waits whether more comes
    files.cert.write_bytes(after)
    look(security, times=1)
    assert door.presented() == old
    look(security, times=1)
    assert door.presented() == new


@pytest.mark.parametrize("harm", ["half a certificate", "another's key", "no key", "garbage"])
def test_a_broken_pair_leaves_the_old_one_in_force_until_it_is_mended(open_door: Open, files: Files, harm: str) -> None:
    old = files.write()
    security = security_of(files)
    door = open_door(security)
    harms: dict[str, Callable[[], object]] = {
        "half a certificate": lambda: files.cert.write_bytes(files.cert.read_bytes()[:200]),
        "another's key": lambda: files.key.write_bytes(new_leaf().private_key_pem.bytes()),
        "no key": files.key.unlink,
        "garbage": lambda: files.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    }
    harms[harm]()
    look(security, times=1)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="what was read before stays in force"):
            look(security, times=1)
    assert door.presented() == old
    new = files.write()
    look(security)
    assert door.presented() == new


def test_only_clients_with_a_certificate_of_the_authority_are_let_in(open_door: Open, mutual: Files) -> None:
    mutual.write()
    door = open_door(security_of(mutual))
    with door.connect(client=CA.issue_cert("agent@example.org")) as connection:
        assert connection.ask()
    for client in (None, OTHER_CA.issue_cert("agent@example.org")):
        with pytest.raises((ssl.SSLError, ConnectionError)), door.connect(client=client):
            pass


def test_an_authority_that_another_has_signed_is_trusted_by_itself(open_door: Open, mutual: Files) -> None:
    mutual.write()
    senders = CA.create_child_ca()
    mutual.authorities.write_bytes(senders.cert_pem.bytes())
    door = open_door(security_of(mutual))
    with door.connect(client=senders.issue_cert("agent@example.org")) as connection:
        assert connection.ask()
    with pytest.raises((ssl.SSLError, ConnectionError)), door.connect(client=CA.issue_cert("agent@example.org")):
        pass


def test_another_authority_counts_for_new_handshakes(open_door: Open, mutual: Files) -> None:
    mutual.write()
    security = security_of(mutual)
    door = open_door(security)
    mutual.authorities.write_bytes(OTHER_CA.cert_pem.bytes())
    look(security)
    with door.connect(client=OTHER_CA.issue_cert("agent@example.org")) as connection:
        assert connection.ask()
    with pytest.raises((ssl.SSLError, ConnectionError)), door.connect(client=CA.issue_cert("agent@example.org")):
        pass


def test_handshakes_that_stall_hold_up_no_other(open_door: Open, files: Files) -> None:
    certificate = files.write()
    door = open_door(security_of(files))
    with ExitStack() as stack:
        for words in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):  # nothing, and the beginning of a ClientHello
            for _ in range(40):
                stalled = stack.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=120))
                stalled.sendall(words)
        assert door.presented() == certificate


# What is refused at the start.


def refused(values: SecuritySettings) -> str:
    with pytest.raises(ConfigurationError) as info:
        ServerTls(values)
    assert "PRIVATE KEY" not in str(info.value)
    return str(info.value)


def test_a_missing_file_is_named_with_its_setting(mutual: Files) -> None:
    mutual.write()
    for setting, path in {
        "--tls-cert": mutual.cert,
        "--tls-key": mutual.key,
        "--tls-client-ca": mutual.authorities,
    }.items():
        kept = path.read_bytes()
        path.unlink()
        assert refused(mutual.settings) == f"{setting}: cannot read {path}: No such file or directory"
        path.write_bytes(kept)


def test_a_key_of_another_certificate_is_refused(files: Files) -> None:
    files.write()
    files.key.write_bytes(new_leaf().private_key_pem.bytes())
    assert refused(files.settings) == f"--tls-key: {files.key} does not belong to the certificate in {files.cert}"


def test_a_key_of_another_kind_is_refused_in_the_same_words(files: Files) -> None:
    files.write()
    openssl("genrsa", "-out", files.key, "2048")
    assert refused(files.settings) == f"--tls-key: {files.key} does not belong to the certificate in {files.cert}"


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_passphrase(files: Files) -> None:
    files.write()
    openssl("ec", "-in", files.key, "-out", files.folder / "old", "-aes256", "-passout", "pass:s3cret")
    openssl("pkcs8", "-topk8", "-in", files.key, "-out", files.folder / "new", "-passout", "pass:s3cret")
    for name in ("old", "new"):
        files.key.write_bytes((files.folder / name).read_bytes())
        assert f"--tls-key: {files.key} is encrypted" in refused(files.settings)


def test_files_that_were_mixed_up_are_refused(mutual: Files) -> None:
    mutual.write()
    cert, key = mutual.cert.read_bytes(), mutual.key.read_bytes()
    mutual.cert.write_bytes(key)
    assert refused(mutual.settings) == f"--tls-cert: {mutual.cert} holds no certificate in PEM form"
    mutual.cert.write_bytes(cert)
    mutual.key.write_bytes(cert)
    assert refused(mutual.settings) == f"--tls-key: {mutual.key} holds no private key in PEM form"
    mutual.key.write_bytes(key)
    mutual.authorities.write_bytes(key)
    assert refused(mutual.settings) == f"--tls-client-ca: {mutual.authorities} holds no certificate in PEM form"


def test_a_key_that_is_too_short_is_refused_with_the_reason_of_openssl(files: Files) -> None:
    files.write()
    self_signed(files, "-newkey", "rsa:1024")
    assert "ee key too small" in refused(files.settings).lower()


# What is warned about.


def test_an_end_that_is_near_is_warned_about_at_the_start_by_the_day_and_after_a_change(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.write()
    now = ServerTls(files.settings).expires - 15 * DAY
    tls = ServerTls(files.settings, clock=lambda: now)
    assert caplog.messages == []
    now += 2 * DAY
    (daily,) = [job for job in tls.jobs if job.interval == DAY]
    daily.run()
    files.write()
    tls.look()
    tls.look()
    ServerTls(files.settings, clock=lambda: now)
    soon = f"--tls-cert: the certificate expires soon: {files.cert}, valid until 3000-01-01 00:00 UTC"
    assert caplog.messages == [soon] * 3


def test_an_expired_certificate_is_served_with_a_warning(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files.write()
    ServerTls(files.settings, clock=lambda: time.time() + 366_000 * DAY)
    assert f"--tls-cert: the certificate has expired, clients refuse it: {files.cert}" in caplog.messages[0]


@pytest.mark.parametrize("days", [1, 10_000, 30_000])
def test_the_end_is_what_openssl_says_before_and_after_2050(files: Files, days: int) -> None:
    files.write()
    self_signed(files, "-newkey", "rsa:2048", "-days", str(days))
    said = openssl("x509", "-in", files.cert, "-noout", "-enddate").partition("=")[2].strip()
    assert ServerTls(files.settings).expires == ssl.cert_time_to_seconds(said)


def test_a_kind_of_key_that_not_all_senders_know_is_warned_about(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.write()
    for known in (("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:P-384")):
        self_signed(files, "-newkey", *known)
        ServerTls(files.settings)
    assert [message for message in caplog.messages if "kind" in message] == []
    self_signed(files, "-newkey", "ed25519")
    ServerTls(files.settings)
    assert "--tls-key: gRPC in Python, C++, Ruby and PHP knows no keys of this kind" in caplog.messages[-1]


def test_a_key_that_everybody_can_read_is_warned_about(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files.write()
    files.key.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        ServerTls(files.settings)
    assert caplog.messages == [f"--tls-key: every user of this machine can read {files.key}; `chmod o-r` it"]


def openssl(*arguments: str | Path) -> str:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on PATH")
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


def self_signed(files: Files, *arguments: str) -> None:
    days = () if "-days" in arguments else ("-days", "90")
    openssl(
        *("req", "-x509", "-nodes", "-subj", "/CN=localhost", "-keyout", files.key, "-out", files.cert),
        *days,
        *arguments,
    )


# The official exporters.


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_official_exporters_send_by_mtls_with_files_from_their_environment(
    serve: Serve, mutual: Files, monkeypatch: pytest.MonkeyPatch, protocol: str, *, certificate: bool
) -> None:
    mutual.write()
    recorder = Recorder()
    running = serve(recorder, security=security_of(mutual))
    agent, key, ca = CA.issue_cert("agent@example.org"), mutual.folder / "agent.key", mutual.folder / "agent.ca"
    agent.private_key_pem.write_to_path(key)
    agent.cert_chain_pems[0].write_to_path(mutual.folder / "agent.crt")
    CA.cert_pem.write_to_path(ca)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)  # the HTTP exporter's `requests` prefers them
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(ca))
    if certificate:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", str(mutual.folder / "agent.crt"))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", str(key))
    timeout = 60 if certificate else 1
    exporter: SpanExporter
    if protocol == "grpc":
        exporter = GrpcSpanExporter(f"https://localhost:{running.port}", timeout=timeout)
    else:
        exporter = HttpSpanExporter(f"https://localhost:{running.http_port}/v1/traces", timeout=timeout)
    assert exporter.export(make_spans(3)) is (SpanExportResult.SUCCESS if certificate else SpanExportResult.FAILURE)
    exporter.shutdown()
    assert len(recorder.calls) == certificate
