"""DSNs: read without showing a password, and written without one."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from otel_pg_exporter.config import DatabaseSettings
from otel_pg_exporter.errors import ConfigurationError

_SECRETS = frozenset({"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"})


def parse_dsn(dsn: str) -> dict[str, Any]:
    """Split a DSN into libpq's keywords.

    Raises ConfigurationError. Its message never repeats the DSN: libpq's own would print the password.
    """
    try:
        parts: dict[str, Any] = dict(conninfo_to_dict(dsn))
    except psycopg.ProgrammingError:
        # No `from`: the cause's text holds pieces of the DSN.
        raise ConfigurationError(
            "the DSN is malformed: it must read postgresql://user@host:port/database or key=value pairs"
        ) from None
    # A password with a bare `/` ends up in the port and the database's name, one with `@` in the host's.
    is_url = dsn.startswith(("postgresql://", "postgres://"))
    if re.fullmatch(r"[\d,\s]*", parts.get("port", "")) is None or (is_url and _holds_at(dsn, parts)):
        raise ConfigurationError(
            "the DSN is malformed: in a URL, the characters / @ % of a password must be percent-encoded "
            "(as %2F, %40, %25), and a port is a number"
        )
    return parts


def _holds_at(url: str, parts: Mapping[str, Any]) -> bool:
    return any("@" in part and part in url for part in (str(parts.get("host", "")), str(parts.get("dbname", ""))))


def holds_secret(dsn: str) -> bool:
    """Tell whether a DSN has a password, or what serves as one, in it."""
    return not _SECRETS.isdisjoint(parse_dsn(dsn))


def mask_dsn(dsn: str) -> str:
    """Return the DSN as key=value pairs with `***` in place of passwords."""
    return make_conninfo(**{key: "***" if key in _SECRETS else value for key, value in parse_dsn(dsn).items()})


def shareable_url(dsn: str) -> str:
    """Return the DSN as a URL without passwords, fit for single quotes in a shell."""
    parts = {key: str(value) for key, value in parse_dsn(dsn).items() if key not in _SECRETS}
    user = quote(parts.pop("user", ""), safe="")
    host, port = parts.get("host", ""), parts.get("port", "")
    place = ""
    if re.fullmatch(r"[\w.-]*", host) and "," not in port:  # not a socket's folder, nor several servers
        place = parts.pop("host", "") + (f":{port}" if parts.pop("port", "") else "")
    database = quote(parts.pop("dbname", ""), safe="")
    query = urlencode(parts, quote_via=quote, safe="/")
    return f"postgresql://{user + '@' if user else ''}{place}/{database}{'?' if query else ''}{query}"


def target_of(settings: DatabaseSettings) -> str:
    """Name the server, database and schema that settings lead to, alike for all spellings of the DSN that matter."""
    defaults = {option.keyword.decode(): (option.val or b"").decode() for option in pq.Conninfo.get_defaults()}
    parts = {key: value for key, value in defaults.items() if value} | parse_dsn(settings.dsn)
    host = parts.get("host") or parts.get("hostaddr") or parts.get("service") or "localhost"
    database = parts.get("dbname") or parts.get("user", "")
    return f"{host}:{parts.get('port', '')}/{database} {settings.schema}"
