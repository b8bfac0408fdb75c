"""What libpq takes from the environment."""

import os

from psycopg import pq

# Read by libpq, but not among the variables that its options tell of.
_OTHERS = ("PGDATESTYLE", "PGGEQO", "PGLOCALEDIR", "PGSERVICEFILE", "PGSYSCONFDIR", "PGTZ")
_MASK = "***"


def variables() -> dict[str, str]:
    """Return those of libpq's environment variables that are set, secrets masked."""
    secret = {_text(each.envvar): _is_secret(each) for each in pq.Conninfo.get_defaults() if each.envvar}
    secret |= dict.fromkeys(_OTHERS, False)
    return {
        name: _MASK if secret[name] else value for name, value in sorted(os.environ.items()) if name in secret and value
    }


def _is_secret(option: pq.ConninfoOption) -> bool:
    return option.dispchar == b"*"  # "password field - hide value", says libpq's documentation


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
