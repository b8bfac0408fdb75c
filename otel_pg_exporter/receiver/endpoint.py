"""Endpoints: `host:port` as the user wrote it, and a clear error when it cannot be listened on."""

import contextlib
import errno
import re
import socket
from dataclasses import dataclass

from otel_pg_exporter.errors import ConfigurationError, StartupError

_ENDPOINT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})")
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens. Port 0 means any free one."""

    host: str  # a name or an address; IPv6 without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str, *, setting: str) -> Endpoint:
    """Parse `host:port`; `setting` is the name that a ConfigurationError gives the user."""
    match = _ENDPOINT.fullmatch(text)
    if match is None or int(match["port"]) > _MAX_PORT:
        raise ConfigurationError(
            f"{setting}: {text!r} is no host:port (examples: 127.0.0.1:4317, [::1]:4317; "
            "0.0.0.0:4317 for all interfaces)"
        )
    return Endpoint(host=match["ipv6"] or match["host"], port=int(match["port"]))


def check_free(endpoint: Endpoint, *, setting: str, reuse_port: bool = False) -> None:
    """Raise StartupError if a server could not listen on `endpoint`, saying why and what to do.

    Asked before the server binds: grpcio keeps the operating system's reason to itself, and of a name with two
    addresses (`localhost`) it silently takes the free one when the other belongs to someone else.
    """
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as exc:
        raise StartupError(f"{setting}: cannot resolve {endpoint.host!r}: {exc.strerror}") from exc
    usable = False
    missing: OSError | None = None
    for family, kind, protocol, _, address in found:
        try:
            _try_bind(family, kind, protocol, address, reuse_port=reuse_port)
        except OSError as exc:
            # One missing address is no error: many hosts resolve localhost to ::1 but have no IPv6.
            if exc.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise _not_free(endpoint, exc, setting) from exc
            missing = exc
        else:
            usable = True
    if not usable and missing is not None:
        raise _not_free(endpoint, missing, setting) from missing


def _try_bind(family: int, kind: int, protocol: int, address: tuple[object, ...], *, reuse_port: bool) -> None:
    with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port in TIME_WAIT looked busy
        if reuse_port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(address)


def _not_free(endpoint: Endpoint, error: OSError, setting: str) -> StartupError:
    remedy = {
        errno.EADDRINUSE: "another process has it, perhaps an OpenTelemetry Collector or another otel-pg-exporter "
        f"(`ss -ltnp 'sport = :{endpoint.port}'` shows it); stop that, or choose another port with {setting}",
        errno.EACCES: f"ports below 1024 need privileges; choose another with {setting}",
        errno.EADDRNOTAVAIL: f"this machine has no such address; choose another with {setting}",
    }.get(error.errno or 0, f"choose another endpoint with {setting}")
    return StartupError(f"cannot listen on {endpoint}: {error.strerror}; {remedy}")
