"""Certificates for tests, and a raw TLS client that talks to either front door."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from otel_pg_exporter.config import SecuritySettings

CA = trustme.CA()
OTHER_CA = trustme.CA()


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of a server's certificate, in a folder."""

    folder: Path
    client_ca: bool = False
    ca: trustme.CA = field(default_factory=lambda: CA)

    @property
    def cert(self) -> Path:
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"

    @property
    def authorities(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def settings(self) -> SecuritySettings:
        return SecuritySettings(
            tls_cert=self.cert, tls_key=self.key, tls_client_ca=self.authorities if self.client_ca else None
        )

    def write(self, leaf: trustme.LeafCert | None = None) -> bytes:
        """Write a new certificate, its key, and the authorities; return the certificate in DER form."""
        leaf = leaf or new_leaf()
        self.key.touch(mode=0o600)
        self.key.write_bytes(leaf.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        if self.client_ca:
            self.authorities.write_bytes(self.ca.cert_pem.bytes())
        return der(leaf)


def new_leaf(ca: trustme.CA = CA) -> trustme.LeafCert:
    return ca.issue_cert("localhost", "127.0.0.1")


def der(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A server that listens, and what a client says to hear an answer of it."""

    port: int
    alpn: str
    hello: bytes
    again: bytes  # to be said later on the same connection

    @contextlib.contextmanager
    def connect(
        self, *, client: trustme.LeafCert | None = None, context: ssl.SSLContext | None = None
    ) -> Iterator["Connection"]:
        """Make a TLS handshake, and hear the first answer."""
        context = context or client_context()
        if client is not None:
            client.configure_cert(context)
        context.set_alpn_protocols([self.alpn])
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=120) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            connection = Connection(door=self, socket=wrapped)
            connection.ask(self.hello)
            yield connection

    def presented(self) -> bytes:
        """Return the certificate, in DER form, that a new handshake gets."""
        with self.connect() as connection:
            return connection.certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A connection on which the server has answered."""

    door: Door
    socket: ssl.SSLSocket

    @property
    def certificate(self) -> bytes:
        return self.socket.getpeercert(binary_form=True) or b""

    def ask(self, words: bytes | None = None) -> bytes:
        """Say something, and hear an answer; raises OSError if the server has hung up."""
        self.socket.sendall(self.door.again if words is None else words)
        answer = self.socket.recv(65_536)
        if not answer:
            raise ConnectionResetError("the server has hung up")
        return answer


def client_context(ca: trustme.CA = CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context
