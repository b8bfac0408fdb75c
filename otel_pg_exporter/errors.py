"""Errors: every exception that this package raises on purpose.

::

    ExporterError
    ├── StartupError                 the process cannot start; the message says what to do
    │   ├── ConfigurationError       a setting, a DSN or a mapping file is wrong
    │   ├── SchemaError              the database's tables are missing, older, newer or changed
    │   └── EmbeddedServerError      the embedded PostgreSQL cannot run
    ├── RefusedError                 a whole request is refused for good; sending it again won't help
    │   ├── UndecodableError         not OTLP, even item by item
    │   ├── TooLargeError            above `max_request_bytes`, or of too many parts
    │   ├── UnsupportedError         in a form that is not read here: another media type or content encoding
    │   ├── UnauthenticatedError     no credentials, or wrong ones
    │   └── InternalError            it fails again and again in a way that nobody foresaw: a bug
    └── RetryableError               nothing is wrong with the request; the sender should come again
        ├── OverloadedError          the byte budget or the call limit is used up, or we are draining
        └── DatabaseUnavailableError a transaction failed, was too slow, or its COMMIT was not answered
            └── OutageError          the next one will fail as well: PostgreSQL is away or cannot write
                └── DeploymentError  PostgreSQL answers, but no row fits: drift, a missing table or privilege

What concerns one item of a request is no exception but a `Rejection` in its `Outcome`.
"""


class ExporterError(Exception):
    """Base of all errors that this package raises on purpose."""

    remedy = ""
    """What to do about it, where that is known and the message does not say so."""

    @property
    def with_remedy(self) -> str:
        """What a log line says of it."""
        return f"{self}; {self.remedy}" if self.remedy else str(self)


class StartupError(ExporterError):
    """The process cannot start."""


class ConfigurationError(StartupError):
    """A setting, a DSN or a mapping file is wrong."""


class SchemaError(StartupError):
    """The database's tables are missing, older, newer or changed."""


class EmbeddedServerError(StartupError):
    """The embedded PostgreSQL cannot run."""


class RefusedError(ExporterError):
    """A whole request is refused for good."""


class UndecodableError(RefusedError):
    """The body is not OTLP, even item by item."""


class TooLargeError(RefusedError):
    """The body is larger than `max_request_bytes`, or has too many parts."""


class UnsupportedError(RefusedError):
    """The body has a media type or content encoding that is not read here."""


class UnauthenticatedError(RefusedError):
    """The credentials are missing or wrong."""


class InternalError(RefusedError):
    """The request fails again and again in a way that nobody foresaw: a bug of ours."""


class RetryableError(ExporterError):
    """Nothing is wrong with the request; the sender should come again."""


class OverloadedError(RetryableError):
    """The byte budget or the call limit is used up, or the process is draining."""


class DatabaseUnavailableError(RetryableError):
    """A transaction failed, was too slow, or its COMMIT was not answered. `in_doubt`: it may be committed."""

    def __init__(self, message: str, *, in_doubt: bool = False, remedy: str = "") -> None:
        super().__init__(message)
        self.in_doubt = in_doubt
        self.remedy = remedy


class OutageError(DatabaseUnavailableError):
    """The next transaction will fail as well: PostgreSQL is away or cannot write."""


class DeploymentError(OutageError):
    """PostgreSQL answers, but no row fits: a drifted column, a missing table or privilege."""
