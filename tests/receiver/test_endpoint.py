import socket

import pytest

from otel_pg_exporter.errors import ConfigurationError, StartupError
from otel_pg_exporter.receiver.endpoint import Endpoint, check_free, parse_endpoint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:4317", "127.0.0.1", 4317),
        ("localhost:0", "localhost", 0),
        ("0.0.0.0:65535", "0.0.0.0", 65_535),
        ("[::1]:4317", "::1", 4317),
        ("[::]:4317", "::", 4317),
        ("otel-gateway.example:4317", "otel-gateway.example", 4317),
    ],
)
def test_an_endpoint_reads_and_writes_as_host_and_port(text: str, host: str, port: int) -> None:
    endpoint = parse_endpoint(text, setting="--grpc-endpoint")
    assert endpoint == Endpoint(host=host, port=port)
    assert str(endpoint) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4317",
        ":4317",
        "localhost",
        "127.0.0.1:",
        "127.0.0.1:-1",
        "127.0.0.1:\u0664\u0663",
        "127.0.0.1:4317\n",
        "::1:4317",
        "[localhost]:4317",
        "http://127.0.0.1:4317",
        "a b:1",
    ],
)
def test_a_malformed_endpoint_names_the_setting_and_shows_examples(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--grpc-endpoint: .* no host:port \(examples: 127.0.0.1:4317"
    ) as info:
        parse_endpoint(text, setting="--grpc-endpoint")
    assert repr(text) in str(info.value)


@pytest.mark.parametrize("port", ["65536", "99999", "100000", "4317" * 2_000])
def test_a_port_beyond_the_last_one_is_told_where_they_end(port: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--grpc-endpoint: '\[::1\]:\d+' names no port: they end at 65535$"):
        parse_endpoint(f"[::1]:{port}", setting="--grpc-endpoint")


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(StartupError, match=r"--grpc-endpoint: cannot resolve 'no-such-host.invalid'"):
        check_free(Endpoint(host="no-such-host.invalid", port=4317), setting="--grpc-endpoint")


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192.0.2.1:4317: .*; this machine has no such address"):
        check_free(Endpoint(host="192.0.2.1", port=4317), setting="--grpc-endpoint")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_busy_port_is_named_with_what_to_do_also_when_only_one_of_the_hosts_addresses_has_it(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartupError) as info:
            check_free(Endpoint(host=host, port=port), setting="--grpc-endpoint")
    assert f"cannot listen on {host}:{port}: Address already in use" in str(info.value)
    assert f"'sport = :{port}'" in str(info.value)
    assert "choose another port with --grpc-endpoint" in str(info.value)


def test_a_port_left_in_time_wait_counts_as_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()
        client.close()
    check_free(Endpoint(host="127.0.0.1", port=port), setting="--grpc-endpoint")
