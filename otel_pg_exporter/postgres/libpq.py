"""What libpq takes from the environment and from files, and what it silently leaves there."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from psycopg import pq

# Read by libpq, but not among the variables that its options tell of.
_OTHERS = ("PGDATESTYLE", "PGGEQO", "PGLOCALEDIR", "PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ")
_MASK = "***"

# libpq gives no SQLSTATE for an attempt to connect, and words are localised: where no file is known to be to blame, the
# hint must fit every cause.
CHECK_DSN = (
    "check that the server is up, that the database and the user exist, and what --dsn (OTEL_PG_EXPORTER_DSN) says: "
    "host, port, database, user, options, and the password (better in ~/.pgpass or PGPASSWORD)"
)


def variables() -> dict[str, str]:
    """Return those of libpq's environment variables that are set, secrets masked."""
    secret = {_text(each.envvar): _is_secret(each) for each in pq.Conninfo.get_defaults() if each.envvar}
    secret |= dict.fromkeys(_OTHERS, False)
    return {
        name: _MASK if secret[name] else value for name, value in sorted(os.environ.items()) if name in secret and value
    }


def remedy(parts: Mapping[str, Any], *, needs_password: bool) -> str:
    """Say which file keeps libpq from connecting, though its own message does not; "" where none is known to.

    `parts` are a DSN's; `needs_password`: the server wanted a password, and libpq had none.
    """
    defaults = {_text(each.keyword): _text(each.val) for each in pq.Conninfo.get_defaults()}
    values = defaults | {key: str(value) for key, value in parts.items()}
    hints = list(_root_certificate(values))
    if needs_password:
        hints += _passfile(values)
    return "; ".join(hints)


def _root_certificate(values: Mapping[str, str]) -> Iterator[str]:
    named = values.get("sslrootcert", "")
    if not values.get("sslmode", "").startswith("verify-") or named == "system":
        return
    path = Path(named) if named else Path.home() / ".postgresql" / "root.crt"
    if not path.exists():
        yield (
            f"sslmode={values['sslmode']} needs the certificate of the server's authority, and there is no {path}: "
            "name it by sslrootcert in the DSN, or set sslrootcert=system where the system trusts that authority"
        )


def _passfile(values: Mapping[str, str]) -> Iterator[str]:
    named = values.get("passfile", "")
    path = Path(named) if named else Path.home() / ".pgpass"
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        if named:
            yield f"the passfile {path} cannot be read: {exc.strerror}"
        return
    if not stat.S_ISREG(mode):
        yield f"libpq ignores the passfile {path}, which is no plain file"
    elif mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield (
            f"libpq ignores the passfile {path}, since its mode is {stat.S_IMODE(mode):04o}, and only its owner may "
            f"have access: chmod 0600 {path}, or put the password into the DSN"
        )
    elif not os.access(path, os.R_OK):
        yield f"the passfile {path} cannot be read by this user"
    else:
        yield f"the passfile {path} has no line for this host, port, database and user"


def _is_secret(option: pq.ConninfoOption) -> bool:
    return option.dispchar == b"*"  # "password field - hide value", says libpq's documentation


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
