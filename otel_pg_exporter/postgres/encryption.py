"""Whether the way to PostgreSQL is encrypted for certain: libpq by itself is content without."""

import logging

from psycopg import pq

from otel_pg_exporter.addresses import is_this_machine
from otel_pg_exporter.telemetry import RateLimitedLogger

_logger = logging.getLogger(__name__)
_notices = RateLimitedLogger(_logger, interval=86_400)

_INSISTING = frozenset({"require", "verify-ca", "verify-full"})


def warn_if_encryption_is_optional(pgconn: pq.abc.PGconn) -> None:
    """Log a warning, once a day for each server, if an open connection could have been made unencrypted as well."""
    options = {option.keyword.decode(): (option.val or b"").decode() for option in pgconn.info}
    host, address = pgconn.host.decode(), pgconn.hostaddr.decode()
    if encryption_is_optional(address, options.get("sslmode", "")):
        _notices.log(
            logging.WARNING,
            address,
            f"PostgreSQL at {host} is on another machine, and sslmode={options.get('sslmode')} does not insist on "
            "encryption: set sslmode=verify-full with sslrootcert in the DSN, or at least sslmode=require",
        )


def encryption_is_optional(address: str, sslmode: str) -> bool:
    """Tell whether a connection leaves the machine, and libpq may do without TLS; a Unix socket has no address."""
    return bool(address) and not is_this_machine(address) and sslmode not in _INSISTING
