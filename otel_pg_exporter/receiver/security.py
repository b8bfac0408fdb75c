"""What both front doors share: the certificate, the credentials, and the thread that follows their files."""

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import grpc

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.pipeline.ticker import Ticker
from otel_pg_exporter.receiver.auth import Authenticator
from otel_pg_exporter.receiver.tls import ServerTls


class Security:
    """The certificate and the credentials that the settings name, each None where they name none."""

    def __init__(self, settings: SecuritySettings) -> None:
        """Read the files; raises ConfigurationError, which says what is wrong with which."""
        self.tls = None if settings.tls_cert is None else ServerTls(settings)
        files = (settings.auth_bearer_file, settings.auth_basic_file)
        self.authenticator = None if files == (None, None) else Authenticator(settings)

    def warnings(self) -> Iterator[str]:
        """Yield what is amiss with the files as they are; it was logged when they were read."""
        for part in (self.tls, self.authenticator):
            if part is not None:
                yield from part.warnings()

    @property
    def grpc_credentials(self) -> grpc.ServerCredentials | None:
        """What a gRPC server serves TLS with."""
        return None if self.tls is None else self.tls.grpc_credentials()

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """What an asyncio server serves TLS with."""
        return None if self.tls is None else self.tls.ssl_context()

    @property
    def authenticate(self) -> Callable[[Sequence[str]], None] | None:
        """What raises UnauthenticatedError unless the values of `authorization` are good."""
        return None if self.authenticator is None else self.authenticator.check

    @property
    def challenge(self) -> str:
        """HTTP's `WWW-Authenticate` for those without good ones."""
        return "" if self.authenticator is None else self.authenticator.challenge

    def follow(self, stack: ExitStack) -> None:
        """Follow the files until the stack is closed, in a thread of their own: PostgreSQL must not hold that up."""
        jobs = [] if self.tls is None else self.tls.jobs
        jobs += [] if self.authenticator is None else self.authenticator.jobs
        if jobs:
            stack.callback(Ticker(jobs, name="security-files").stop)
