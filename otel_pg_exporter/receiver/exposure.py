"""What other machines can do with our endpoints, as the settings have them: the warnings at the start."""

import socket
from collections.abc import Iterator

from otel_pg_exporter.addresses import is_this_machine
from otel_pg_exporter.config import ServeSettings
from otel_pg_exporter.receiver.endpoint import optional_endpoint


def exposure_warnings(settings: ServeSettings) -> Iterator[str]:
    """Yield a warning for each endpoint that others than this machine reach, and what it lacks for that."""
    receiver, security = settings.receiver, settings.security
    with_credentials = security.auth_bearer_file is not None or security.auth_basic_file is not None
    for setting, endpoint in (
        ("--grpc-endpoint", receiver.grpc_endpoint),
        ("--http-endpoint", receiver.http_endpoint),
    ):
        if _only_this_machine(endpoint, setting):
            continue
        if security.tls_cert is None:
            what = "what senders send, and their credentials," if with_credentials else "what senders send"
            yield (
                f"{setting} {endpoint}: other machines reach it, and without TLS {what} can be read on the way; "
                "set --tls-cert and --tls-key, unless a proxy in front does that"
            )
        if not with_credentials and security.tls_client_ca is None:
            yield (
                f"{setting} {endpoint}: other machines reach it, and all of them may send; "
                "set --auth-bearer-file, --auth-basic-file or --tls-client-ca"
            )
    setting, endpoint = "--metrics-endpoint", settings.monitoring.metrics_endpoint
    if not _only_this_machine(endpoint, setting):
        yield f"{setting} {endpoint}: other machines reach it; it has neither TLS nor authentication"


def _only_this_machine(text: str, setting: str) -> bool:
    endpoint = optional_endpoint(text, setting=setting)
    if endpoint is None:
        return True
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError:
        return True  # it will not be listened on either, and that is what there is to say
    return all(is_this_machine(str(address[0]).partition("%")[0]) for *_, address in found)
