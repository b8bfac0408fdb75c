"""The commands of docs/how-to/tls-and-authentication.md, typed as they stand there."""

import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.receiver.security import Security
from tests.receiver.support import TRACES, Recorder, Serve, refusal

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "tls-and-authentication.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in which all commands of the page were typed."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on PATH")
    commands = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(commands) >= 5
    done = subprocess.run(
        ["bash", "-e"], input="".join(commands), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"authorization=Basic%20[A-Za-z0-9%]+\n?", done.stdout)
    return tmp_path


def test_what_the_commands_make_serves_the_senders_that_it_is_made_for(
    serve: Serve, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SecuritySettings(
        tls_cert=folder / "tls.crt",
        tls_key=folder / "tls.key",
        tls_client_ca=folder / "senders-ca.crt",
        auth_bearer_file=folder / "tokens",
    )
    running = serve(Recorder(), security=Security(settings))
    assert caplog.messages == []
    names = ("ca.crt", "shop.key", "shop.crt")
    credentials = grpc.ssl_channel_credentials(*((folder / name).read_bytes() for name in names))
    options = [("grpc.ssl_target_name_override", "otel.example")]
    with grpc.secure_channel(running.address, credentials, options=options) as channel:
        export = channel.unary_unary(TRACES, None, None)

        def send(token: str) -> None:
            value = f"Bearer {(folder / token).read_text().strip()}"
            export(b"", metadata=(("authorization", value),), timeout=60)

        send("shop.new-token")
        send("payments.token")
        with pytest.raises(grpc.RpcError) as info:
            send("shop.token")  # which was rotated out
        assert refusal(info.value).code is grpc.StatusCode.UNAUTHENTICATED
