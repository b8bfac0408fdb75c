"""Keeping the exporters' own work out of what they export."""

import contextlib
import logging
from collections.abc import Iterator

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, create_key, detach, get_value, set_value

_EXPORTING = create_key("otel_pg_exporter.exporting")
_OWN = __name__.partition(".")[0]


def is_exporting() -> bool:
    """Tell whether the caller runs inside an export of ours."""
    return bool(get_value(_EXPORTING))


def is_own_logger(name: str) -> bool:
    """Tell whether a logger, which the SDK's handlers make the scope of its records, is this package's.

    A log line about an export would start the next export, for ever, so it is left to the other handlers.
    """
    return name == _OWN or name.startswith(f"{_OWN}.")


@contextlib.contextmanager
def suppressed() -> Iterator[None]:
    """Make the instrumentations (psycopg's, logging's) overlook what this thread does."""
    # The key has an underscore, but is what all instrumentations and the SDK's own processors go by.
    token = attach(set_value(_EXPORTING, True, set_value(_SUPPRESS_INSTRUMENTATION_KEY, True)))
    try:
        yield
    finally:
        detach(token)


def _not_exporting(_record: logging.LogRecord) -> bool:
    return not is_exporting()


def quiet_psycopg() -> None:
    """Hush what psycopg logs about the exporters' own connections; what matters of it the exporters log themselves."""
    logging.getLogger("psycopg").addFilter(_not_exporting)  # a second time does nothing
