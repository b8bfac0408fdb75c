"""Tell of TLS handshakes that fail, with the peer and the reason: asyncio keeps both to itself."""

import logging
import socket
import ssl
from contextvars import ContextVar
from typing import Any

from otel_pg_exporter.telemetry import RateLimitedLogger

# asyncio gives each connection a copy of the context in which it was accepted, and its TLS object no word of the peer.
_peer: ContextVar[str] = ContextVar("peer", default="an unknown peer")

_NO_TRUST = "it does not trust our certificate; give it the authority's (OTEL_EXPORTER_OTLP_CERTIFICATE)"
_NO_CERTIFICATE = "it must have a certificate of an authority in --tls-client-ca"
_MEANINGS = {
    "HTTP_REQUEST": "it does without TLS; its endpoint must begin with https://",
    "TLSV1_ALERT_UNKNOWN_CA": _NO_TRUST,
    "SSLV3_ALERT_BAD_CERTIFICATE": _NO_TRUST,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _NO_TRUST,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": _NO_CERTIFICATE,
    "CERTIFICATE_VERIFY_FAILED": _NO_CERTIFICATE,
}


class Listener(socket.socket):
    """A listening socket that lets each connection's handshake know whose it is."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, as any socket does."""
        connection, address = super().accept()
        _peer.set(str(address[0]))
        return connection, address


class Handshake(ssl.SSLObject):
    """A connection's TLS: a warning if its handshake fails, but for peers that just go away, as probes do."""

    notices: RateLimitedLogger  # whoever makes the connection says which

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as exc:
            meaning = _MEANINGS.get(exc.reason or "")
            said = (exc.reason or str(exc)).replace("_", " ").lower()
            self.notices.log(
                logging.WARNING,
                said,
                f"TLS handshake with {_peer.get()} failed: {said}" + (f": {meaning}" if meaning else ""),
            )
            raise
