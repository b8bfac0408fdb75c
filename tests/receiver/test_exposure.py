"""The warnings about endpoints that other machines reach."""

from pathlib import Path

import pytest

from otel_pg_exporter.config import MonitoringSettings, ReceiverSettings, SecuritySettings, ServeSettings
from otel_pg_exporter.receiver.exposure import exposure_warnings

PATH = Path("file")
COMPLETE = [
    SecuritySettings(tls_cert=PATH, tls_key=PATH, auth_bearer_file=PATH),
    SecuritySettings(tls_cert=PATH, tls_key=PATH, auth_basic_file=PATH),
    SecuritySettings(tls_cert=PATH, tls_key=PATH, tls_client_ca=PATH),
]


def warnings(
    security: SecuritySettings | None = None, *, grpc: str = "none", http: str = "none", metrics: str = "none"
) -> list[str]:
    settings = ServeSettings(
        receiver=ReceiverSettings(grpc_endpoint=grpc, http_endpoint=http),
        monitoring=MonitoringSettings(metrics_endpoint=metrics),
        security=security or SecuritySettings(),
    )
    return list(exposure_warnings(settings))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]", "localhost"])
def test_endpoints_of_this_machine_alone_are_not_warned_about(host: str) -> None:
    assert warnings(grpc=f"{host}:4317", http=f"{host}:4318", metrics=f"{host}:9464") == []


@pytest.mark.parametrize("endpoint", ["0.0.0.0:4317", "[::]:4317", "192.0.2.1:4317", "[::ffff:192.0.2.1]:4317"])
def test_endpoints_for_other_machines_need_both_tls_and_authentication(endpoint: str) -> None:
    without_tls, without_authentication = warnings(grpc=endpoint)
    assert f"--grpc-endpoint {endpoint}" in without_tls
    assert "without TLS what senders send can be read" in without_tls
    assert "all of them may send" in without_authentication
    other = endpoint.replace("4317", "4318")
    assert len(warnings(grpc=endpoint, http=other)) == 4
    assert [warnings(security, grpc=endpoint, http=other) for security in COMPLETE] == [[]] * 3


def test_credentials_that_can_be_read_on_the_way_are_warned_about() -> None:
    (warning,) = warnings(SecuritySettings(auth_basic_file=PATH), http="0.0.0.0:4318")
    assert "without TLS what senders send, and their credentials, can be read" in warning


def test_metrics_for_other_machines_are_warned_about_however_secure_the_front_doors_are() -> None:
    (warning,) = warnings(COMPLETE[0], metrics="0.0.0.0:9464")
    assert warning.startswith("--metrics-endpoint 0.0.0.0:9464: other machines reach it")
