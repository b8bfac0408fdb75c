"""TLS for both front doors: one certificate, taken over from its files when they change, without a restart."""

import logging
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import grpc

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.pipeline.ticker import Job
from otel_pg_exporter.receiver.files import LOOK_INTERVAL, FollowedFiles, exposed
from otel_pg_exporter.receiver.handshake import Handshake
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__name__)

_CERT, _KEY, _CLIENT_CA = "--tls-cert", "--tls-key", "--tls-client-ca"

_DAY = 86_400.0  # seconds
_NOTICE = 14 * _DAY  # seconds before its end that a certificate is warned about, once a day

_PEM_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_PEM_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")

# Object identifiers of the keys whose signatures gRPC's C core takes in a handshake: RSA, ECDSA on P-256 and on P-384.
_GRPC_KEYS = (b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01", b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2b\x81\x04\x00\x22")

_UTC_TIME = 0x17  # ASN.1's tag of a time with two digits for the year
_EXPLICIT_VERSION = 0xA0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Certificate:
    """The files' contents, as each protocol's library wants them."""

    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration
    expires: float  # seconds since the epoch
    known_to_grpc: bool  # the kind of its key


class ServerTls:
    """The server's certificate and key, and the authorities of its clients' certificates (mTLS) if there are any.

    Handshakes are begun with what the files said at the last look; connections that there are live on.
    """

    def __init__(self, settings: SecuritySettings, *, clock: Callable[[], float] = time.time) -> None:
        """Read the files; raises ConfigurationError, which says what is wrong with which."""
        self._clock = clock
        self.client_auth = settings.tls_client_ca is not None  # whether senders must have certificates
        paths = {_CERT: settings.tls_cert, _KEY: settings.tls_key, _CLIENT_CA: settings.tls_client_ca}
        self._paths = {name: path for name, path in paths.items() if path is not None}
        self._files = FollowedFiles(self._paths, self._load)
        _log(self.warnings())

    @property
    def jobs(self) -> list[Job]:
        """What is to be run beside: it looks at the files, and at the calendar."""
        return [
            Job(name="TLS certificate", interval=LOOK_INTERVAL, run=self.look),
            Job(name="TLS certificate's end", interval=_DAY, run=lambda: _log(self._end())),
        ]

    @property
    def expires(self) -> float:
        """When the certificate ends, in seconds since the epoch."""
        return self._files.value.expires

    def look(self) -> None:
        """Take over what has changed; raises ConfigurationError, and leaves all as it was, for what is wrong."""
        if self._files.look():
            _logger.info("new handshakes use the certificate that %s holds now, valid until %s", *self._shown)
            _log(self.warnings())

    def warnings(self) -> Iterator[str]:
        """Yield what is amiss with the files as they are; it was logged when they were read."""
        if not self._files.value.known_to_grpc:
            yield (
                f"{_KEY}: gRPC in Python, C++, Ruby and PHP knows no keys of this kind, so that senders in these "
                "languages cannot connect; an RSA key suits all, and so does an ECDSA key on the curve P-256 or P-384"
            )
        yield from exposed(_KEY, self._paths[_KEY])
        yield from self._end()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a gRPC server, which follow the files."""
        in_use = self._files.value

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal in_use
            if in_use is self._files.value:
                return None  # else every handshake would parse the certificate anew
            in_use = self._files.value
            return in_use.grpc

        return grpc.dynamic_ssl_server_credentials(
            in_use.grpc,
            fetch,  # type: ignore[arg-type] # the stubs don't know that None means no change
            require_client_authentication=self.client_auth,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for an asyncio server, which follows the files."""
        return _following(lambda: self._files.value.context)

    def _load(self, contents: Mapping[str, bytes]) -> _Certificate:
        cert, key, authorities = contents[_CERT], contents[_KEY], contents.get(_CLIENT_CA)
        leaf = _PEM_CERTIFICATE.search(cert)
        if leaf is None:
            raise ConfigurationError(f"{_CERT}: {self._paths[_CERT]} holds no certificate in PEM form")
        if b"ENCRYPTED" not in key and _PEM_KEY.search(key) is None:
            raise ConfigurationError(f"{_KEY}: {self._paths[_KEY]} holds no private key in PEM form")
        context = _context(self._paths[_CERT], self._paths[_KEY])
        if authorities is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: an intermediate authority will do
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
            except (ssl.SSLError, ValueError):
                raise ConfigurationError(
                    f"{_CLIENT_CA}: {self._paths[_CLIENT_CA]} holds no certificate in PEM form"
                ) from None
        try:
            expires, algorithm = _expiry_and_key_algorithm(ssl.PEM_cert_to_DER_cert(leaf[0].decode("ascii")))
        except (ValueError, IndexError, StopIteration):
            raise ConfigurationError(
                f"{_CERT}: the first certificate in {self._paths[_CERT]} does not keep to RFC 5280"
            ) from None
        config = grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=authorities)
        known = any(kind in algorithm for kind in _GRPC_KEYS)
        return _Certificate(context=context, grpc=config, expires=expires, known_to_grpc=known)

    @property
    def _shown(self) -> tuple[Path, str]:
        return self._paths[_CERT], f"{datetime.fromtimestamp(self.expires, UTC):%Y-%m-%d %H:%M} UTC"

    def _end(self) -> Iterator[str]:
        left = self.expires - self._clock()
        path, end = self._shown
        if left <= 0:
            yield f"{_CERT}: the certificate has expired, clients refuse it: {path}, valid until {end}"
        elif left < _NOTICE:
            yield f"{_CERT}: the certificate expires soon: {path}, valid until {end}"


def _log(warnings: Iterable[str]) -> None:
    for text in warnings:
        _logger.warning("%s", text)


class _FollowingContext(ssl.SSLContext):
    """A context that begins each handshake with whichever context is the current one.

    asyncio makes every connection's TLS object by `wrap_bio`, so that nothing else of this context counts.
    """

    current: Callable[[], ssl.SSLContext]
    notices: RateLimitedLogger

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:  # noqa: ANN401 - as its base, whatever that takes
        begun = self.current().wrap_bio(*args, **kwargs)
        if isinstance(begun, Handshake):
            begun.notices = self.notices
        return begun


def _following(current: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    context = _FollowingContext(ssl.PROTOCOL_TLS_SERVER)
    context.current = current
    context.notices = RateLimitedLogger(_logger)
    return context


def _context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslobject_class = Handshake
    context.set_alpn_protocols(["http/1.1"])

    def refuse() -> NoReturn:  # without it, OpenSSL asks on the terminal
        raise ConfigurationError(
            f"{_KEY}: {key} is encrypted; keep it in a file without a passphrase that only this process can read "
            "(`openssl pkey -in … -out …` makes one)"
        )

    try:
        context.load_cert_chain(cert, key, password=refuse)
    except ssl.SSLError as exc:
        if exc.reason in {"KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}:
            raise ConfigurationError(f"{_KEY}: {key} does not belong to the certificate in {cert}") from None
        raise ConfigurationError(f"{_CERT}, {_KEY}: OpenSSL does not take {cert} and {key}: {exc}") from None
    except OSError as exc:
        raise ConfigurationError(f"{_CERT}, {_KEY}: cannot read {cert} and {key}: {exc.strerror}") from exc
    return context


def _expiry_and_key_algorithm(der: bytes) -> tuple[float, bytes]:
    """Return when an X.509 certificate ends, and what kind of key it is for: neither does Python's ssl tell (RFC 5280).

    What does not keep to the form, which OpenSSL is not strict about, raises ValueError, IndexError or StopIteration.
    """
    (_, certificate) = next(_elements(der))
    (_, to_be_signed) = next(_elements(certificate))
    fields = [value for tag, value in _elements(to_be_signed) if tag != _EXPLICIT_VERSION]
    _, _, _, validity, _, key, *_ = fields  # after serial number, signature, issuer; before and after the subject
    _, (tag, time_text) = _elements(validity)
    year = "%y" if tag == _UTC_TIME else "%Y"
    expires = datetime.strptime(time_text.decode("ascii"), f"{year}%m%d%H%M%SZ").replace(tzinfo=UTC)
    (_, algorithm) = next(_elements(key))
    return expires.timestamp(), algorithm


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and contents of each element of a DER sequence's contents."""
    while der:
        length, start = der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        yield der[0], der[start : start + length]
        der = der[start + length :]
