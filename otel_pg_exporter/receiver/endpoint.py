"""Endpoints: `host:port` as the user wrote it, and a clear error when it cannot be listened on."""

import contextlib
import errno
import re
import socket
from dataclasses import dataclass

from otel_pg_exporter.config import redacted
from otel_pg_exporter.errors import ConfigurationError, StartupError

_ENDPOINT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:/\s]+)):0*(?P<port>[0-9]+)")
_MAX_PORT = 65_535
_BACKLOG = 1_024  # connections that wait to be accepted; the system may allow fewer


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
    if match is None:
        raise ConfigurationError(
            f"{setting}: {redacted(text)!r} is no host:port (examples: 127.0.0.1:4317, [::1]:4317; "
            "0.0.0.0:4317 for all interfaces; none: not served)"
        )
    port = match["port"]
    if len(port) > len(str(_MAX_PORT)) or int(port) > _MAX_PORT:
        raise ConfigurationError(f"{setting}: {redacted(text)!r} names no port: they end at {_MAX_PORT}")
    return Endpoint(host=match["ipv6"] or match["host"], port=int(port))


def optional_endpoint(text: str, *, setting: str) -> Endpoint | None:
    """Parse as `parse_endpoint` does, or return None for the word `none`: not served."""
    return None if text == "none" else parse_endpoint(text, setting=setting)


def check_free(endpoint: Endpoint, *, setting: str, reuse_port: bool = False) -> None:
    """Raise StartupError if a server could not listen on `endpoint`, saying why and what to do.

    Asked before the server binds: grpcio keeps the operating system's reason to itself, and of a name with two
    addresses (`localhost`) it silently takes the free one when the other belongs to someone else.
    """
    for each in _bound(endpoint, setting, reuse_port=reuse_port):
        each.close()


def listen(endpoint: Endpoint, *, setting: str, reuse_port: bool = False) -> list[socket.socket]:
    """Listen on all addresses of `endpoint`, on the same port; raise StartupError as `check_free` does."""
    sockets = _bound(endpoint, setting, reuse_port=reuse_port)
    for each in sockets:
        each.listen(_BACKLOG)
    return sockets


def _bound(endpoint: Endpoint, setting: str, *, reuse_port: bool) -> list[socket.socket]:
    """Bind a socket to each address of `endpoint` that this machine has."""
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except OSError as exc:
        raise StartupError(f"{setting}: cannot resolve {endpoint.host!r}: {exc.strerror}") from exc
    missing: OSError | None = None
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        port = endpoint.port  # if the system chooses it, then once for all addresses
        for family, kind, protocol, _, address in found:
            whole = (address[0], port, *address[2:])
            try:
                each = _bind(family, kind, protocol, whole, only_ipv6=len(found) > 1, reuse_port=reuse_port)
            except OSError as exc:
                # One missing address is no error: many hosts resolve localhost to ::1 but have no IPv6.
                if exc.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise _not_free(endpoint, exc, setting) from exc
                missing = exc
            else:
                sockets.append(opened.enter_context(each))
                port = each.getsockname()[1]
        if not sockets and missing is not None:
            raise _not_free(endpoint, missing, setting) from missing
        opened.pop_all()
    return sockets


def _bind(
    family: int, kind: int, protocol: int, address: tuple[object, ...], *, only_ipv6: bool, reuse_port: bool
) -> socket.socket:
    with contextlib.ExitStack() as opened:
        each = opened.enter_context(socket.socket(family, kind, protocol))
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port in TIME_WAIT looked busy
        if reuse_port:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and only_ipv6:
            each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the IPv4 address has a socket of its own
        each.bind(address)
        opened.pop_all()
    return each


def _not_free(endpoint: Endpoint, error: OSError, setting: str) -> StartupError:
    remedy = {
        errno.EADDRINUSE: "another process has it, perhaps an OpenTelemetry Collector or another otel-pg-exporter "
        f"(`ss -ltnp 'sport = :{endpoint.port}'` shows it); stop that, or choose another port with {setting}",
        errno.EACCES: f"ports below 1024 need privileges; choose another with {setting}",
        errno.EADDRNOTAVAIL: f"this machine has no such address; choose another with {setting}",
    }.get(error.errno or 0, f"choose another endpoint with {setting}")
    return StartupError(f"cannot listen on {endpoint}: {error.strerror}; {remedy}")
