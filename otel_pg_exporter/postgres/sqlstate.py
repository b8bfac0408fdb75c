"""One table that says what an error of PostgreSQL means for a batch.

The phase and the state of the connection come first, the SQLSTATE second, and words never: messages are localised.
Classes are those of PostgreSQL's documentation, appendix A.
"""

import enum
import re

import psycopg

from otel_pg_exporter.errors import DatabaseUnavailableError, DeploymentError, OutageError


class Verdict(enum.Enum):
    """What to do about an error."""

    RETRY = "retry"  # the same batch may pass later
    DUPLICATE = "duplicate"  # some rows are there already: insert around them
    DATA = "data"  # some row is bad: find it
    DEPLOYMENT = "deployment"  # no row will pass until somebody mends the database


# The longest matching prefix decides.
_TABLE = {
    "08P01": Verdict.DATA,  # binary data too short for a column's type, over a connection that lives
    "0A": Verdict.DEPLOYMENT,  # feature not supported
    "21": Verdict.DATA,  # cardinality violation
    "22": Verdict.DATA,  # data exception
    "23": Verdict.DATA,  # integrity constraint violation
    "23505": Verdict.DUPLICATE,
    "25006": Verdict.RETRY,  # read-only transaction: a standby, or a server that is fenced off
    "28": Verdict.DEPLOYMENT,  # invalid authorization
    "3D": Verdict.DEPLOYMENT,  # no such database
    "3F": Verdict.DEPLOYMENT,  # no such schema
    "42": Verdict.DEPLOYMENT,  # undefined table, column, function; insufficient privilege; datatype mismatch
    "44": Verdict.DATA,  # WITH CHECK OPTION violation
    "54": Verdict.DATA,  # program limit exceeded: jsonb or index row too large, nesting too deep
    "P0": Verdict.DATA,  # an exception raised by a trigger
    "XX000": Verdict.DUPLICATE,  # Citus reports a duplicate inside COPY so
}

_MIGRATE = "run `otel-pg-exporter migrate` with the same settings"
READ_ONLY = "`otel-pg-exporter check` tells whether this is a standby, or was made read-only"
"""What to do about a server that takes no rows."""

_REMEDIES = {
    "25006": READ_ONLY,
    "23514": "attach the DEFAULT partition again",
    "42501": "grant what docs/how-to/roles.md lists",
    "42P01": _MIGRATE,
    "42703": _MIGRATE,
    "42883": _MIGRATE,
    "3F000": _MIGRATE,
}


def classify(error: psycopg.Error, *, broken: bool) -> Verdict:
    """Say what `error` means; `broken` tells that its connection is lost.

    A lost connection is worth a retry whatever the error says: a backend that is killed in the middle of a COPY
    leaves no SQLSTATE.
    """
    state = error.sqlstate
    if broken or state is None:
        return Verdict.RETRY
    if state == "23514" and error.diag.table_name and not error.diag.constraint_name:
        return Verdict.DEPLOYMENT  # no CHECK, but a day without partition where DEFAULT is detached
    for length in (5, 3, 2):
        if state[:length] in _TABLE:
            return _TABLE[state[:length]]
    return Verdict.RETRY


def is_outage(error: psycopg.Error, *, broken: bool) -> bool:
    """Tell whether the next transaction will fail as well, as when PostgreSQL is away or a table is locked."""
    passing = ("40", "57014")  # serialization and deadlock, timeouts
    return classify(error, broken=broken) is Verdict.RETRY and (
        broken or not (error.sqlstate or "").startswith(passing)
    )


def unavailable(error: psycopg.Error, *, phase: str, broken: bool) -> DatabaseUnavailableError:
    """Translate an error that is not about single rows, with the remedy where one is known."""
    state = error.sqlstate or "no SQLSTATE"
    text = f"{phase}: {reason(error)} ({state})"
    if classify(error, broken=broken) is not Verdict.RETRY:
        return DeploymentError(f"PostgreSQL refuses every row at {text}; {remedy(error)}")
    # Without a connection, nobody knows whether a COMMIT that was on its way arrived.
    kind = OutageError if is_outage(error, broken=broken) else DatabaseUnavailableError
    todo = "" if broken else _REMEDIES.get(state, "")
    return kind(f"PostgreSQL failed at {text}", in_doubt=broken and phase == "COMMIT", remedy=todo)


def remedy(error: psycopg.Error) -> str:
    """Return what to do about an error that is due to the database's own state."""
    return _REMEDIES.get(
        error.sqlstate or "", "compare the tables with `otel-pg-exporter migrate --check` and the same settings"
    )


def reason(error: psycopg.Error) -> str:
    """Return the server's primary message, or the client library's text, in one line without NUL."""
    text = error.diag.message_primary or str(error) or type(error).__name__
    return " ".join(text.replace("\0", "\N{REPLACEMENT CHARACTER}").split())


def copy_line(error: psycopg.Error) -> int | None:
    """Return the 1-based row that a COPY failed at, or None when the server doesn't say.

    Only digits are read, since the words are localised, and only of the context's last line: the lines before it
    come from triggers and functions. Our tables have no digits in their names.
    """
    context = (error.diag.context or "").strip().splitlines()
    number = re.search(r"[0-9]+", context[-1]) if context else None
    return int(number[0]) if number else None
